"""Notes of what is evaluated in a folder, and digests of weights."""

import threading
import time

import pytest
import torch
from torch import nn

from fitv2.errors import UserError
from fitv2.evaluation.identity import settle, weights_digest


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


def test_a_digest_tells_weights_apart():
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    assert weights_digest(one) == weights_digest(one, None) != weights_digest(other)
    with torch.no_grad():
        other.load_state_dict(one.state_dict())
        assert weights_digest(other) == weights_digest(one)
        other.bias[0] += 1e-6
    assert weights_digest(other) != weights_digest(one)
