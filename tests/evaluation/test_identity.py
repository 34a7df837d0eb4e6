"""Notes of what is evaluated in a folder."""

import threading
import time

import pytest

from fitv2.errors import UserError
from fitv2.evaluation.identity import settle


def test_the_same_again_is_settled_and_another_named(tmp_path):
    settle(tmp_path / "out", {"a": {"b": (1, 2)}})
    settle(tmp_path / "out", {"a": {"b": (1, 2)}})
    with pytest.raises(UserError, match=r"a\.b was \[1, 2\], now \[1, 3\]"):
        settle(tmp_path / "out", {"a": {"b": (1, 3)}})


def test_others_wait_for_the_first(tmp_path):
    def begin():
        time.sleep(0.3)
        settle(tmp_path / "out", {"a": 1})

    first = threading.Thread(target=begin)
    first.start()
    settle(tmp_path / "out", {"a": 1}, begins=False)
    first.join()
    with pytest.raises(UserError, match="a was 1, now 2"):
        settle(tmp_path / "out", {"a": 2}, begins=False)
