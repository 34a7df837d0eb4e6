from threading import Event

import pytest
import torch

from conftest import randomized
from fitv2.checkpoint import Card, checkpoints, load_model
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime import World
from fitv2.saver import Saver, in_background

CARD = Card(("a", "b", "c"), "pixels", 16)


def model():
    return randomized(FiT(depth=1, width=16, heads=2, patch_size=1, in_channels=3, num_classes=3))


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def save(saver, *steps):
    for step in steps:
        saver.save(step, {"step": torch.tensor(step)}, model())
    saver.finish()


def test_the_newest_are_kept_and_milestones_for_good(tmp_path):
    save(Saver(tmp_path, CARD, World(), 2, 30), *range(10, 80, 10))
    assert names(tmp_path) == ["step-0000030", "step-0000060", "step-0000070"]
    save(Saver(tmp_path, CARD, World(), 1, None), 80)
    assert names(tmp_path) == ["step-0000080"]


def test_a_checkpoint_holds_a_model(tmp_path):
    save(Saver(tmp_path, CARD, World(), 2, None), 10)
    read, card = load_model(checkpoints(tmp_path)[0] / "ema")
    assert card == CARD
    for one, other in zip(read.parameters(), model().parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_has_no_name_until_it_is_whole(tmp_path, monkeypatch):
    """And training can go on meanwhile."""
    room = Event()
    monkeypatch.setattr("fitv2.saver.write_state", lambda *_: room.wait(30))
    saver = Saver(tmp_path, CARD, World(), 2, None)
    saver.save(10, {}, None)
    saver.look()
    assert saver.last == 10
    assert not checkpoints(tmp_path)
    room.set()
    saver.finish()
    assert names(tmp_path) == ["step-0000010"]


def test_looking_gives_a_written_checkpoint_its_name(tmp_path):
    saver = Saver(tmp_path, CARD, World(), 2, None)
    saver.save(10, {"step": torch.tensor(10)}, model())
    saver.writing[1].result(30)
    saver.look()
    assert names(tmp_path) == ["step-0000010"]


@pytest.mark.parametrize("kind", [RuntimeError, OSError])
def test_what_cannot_be_written_is_an_error_and_leaves_the_rest(tmp_path, monkeypatch, kind):
    saver = Saver(tmp_path, CARD, World(), 1, None)
    save(saver, 10)

    def fail(*_):
        raise kind("no quota\nleft")

    monkeypatch.setattr("fitv2.saver.write_state", fail)
    saver.save(20, {}, model())
    with pytest.raises(UserError, match="step-0000020 cannot be written: no quota left"):
        saver.finish()
    assert names(tmp_path) == ["step-0000010"]
    saver.finish()  # said once


def test_after_a_graver_error_a_failing_checkpoint_is_a_warning(tmp_path, monkeypatch):
    saver = Saver(tmp_path, CARD, World(), 1, None)
    saver.save(10, {"step": torch.tensor(10)}, model())
    saver.abandon(30)
    assert names(tmp_path) == ["step-0000010"]

    def fail(*_):
        raise RuntimeError("no quota left")

    monkeypatch.setattr("fitv2.saver.write_state", fail)
    saver.save(20, {}, model())
    with pytest.warns(UserWarning, match="step-0000020 cannot be written: no quota left"):
        saver.abandon(30)
    assert names(tmp_path) == ["step-0000010"]


def test_a_checkpoint_that_takes_too_long_is_left_and_not_touched(tmp_path, monkeypatch):
    """Other processes may still write to it."""
    room = Event()
    monkeypatch.setattr("fitv2.saver.write_state", lambda *_: room.wait(30))
    saver = Saver(tmp_path, CARD, World(), 1, None)
    saver.save(10, {}, None)
    with pytest.warns(UserWarning, match="checkpoint of step 10 is left half-written"):
        saver.abandon(0.1)
    assert names(tmp_path) == [".step-0000010"]
    room.set()


def test_what_a_kill_left_is_removed(tmp_path):
    (tmp_path / "checkpoints" / ".step-0000010" / "state").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-0000005").mkdir()
    Saver(tmp_path, CARD, World(), 1, None).clean()
    assert names(tmp_path) == ["step-0000005"]


def test_work_in_the_background_gives_its_error():
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0).result(10)
