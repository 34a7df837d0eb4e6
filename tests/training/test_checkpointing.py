import shutil
from threading import Event

import pytest
import torch

from conftest import randomized
from fitv2.checkpoint import Card, checkpoints, load_model, newest_checkpoint
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.distributed import World
from fitv2.training.checkpointing import (
    Saver,
    read_state,
    run_in_background,
    stage,
    state_of,
    verify_state,
    write_state,
)

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


def test_a_step_of_eight_digits_is_newer_than_one_of_seven(tmp_path):
    save(Saver(tmp_path, CARD, World(), 1, None), 9_999_999, 10_000_000)
    assert names(tmp_path) == ["step-10000000"]
    (tmp_path / "checkpoints" / "step-9999999").mkdir()
    assert newest_checkpoint(tmp_path).name == "step-10000000"


def test_a_checkpoint_holds_a_model(tmp_path):
    save(Saver(tmp_path, CARD, World(), 2, None), 10)
    read, card = load_model(checkpoints(tmp_path)[0] / "ema")
    assert card == CARD
    for one, other in zip(read.parameters(), model().parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_has_no_name_until_it_is_whole(tmp_path, monkeypatch):
    """And training can go on meanwhile."""
    room = Event()
    monkeypatch.setattr("fitv2.training.checkpointing.write_state", lambda *_: room.wait(30))
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

    monkeypatch.setattr("fitv2.training.checkpointing.write_state", fail)
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

    monkeypatch.setattr("fitv2.training.checkpointing.write_state", fail)
    saver.save(20, {}, model())
    with pytest.warns(UserWarning, match="step-0000020 cannot be written: no quota left"):
        saver.abandon(30)
    assert names(tmp_path) == ["step-0000010"]


def test_a_checkpoint_that_takes_too_long_is_left_and_not_touched(tmp_path, monkeypatch):
    """Other processes may still write to it."""
    room = Event()
    monkeypatch.setattr("fitv2.training.checkpointing.write_state", lambda *_: room.wait(30))
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
        run_in_background(lambda: 1 // 0).result(10)


SHAPE = {"depth": 1, "width": 16, "heads": 2, "patch_size": 1, "in_channels": 4, "num_classes": 3}


def trained(seed, steps=2, width=16):
    """A model, and an AdamW and a Muon that remember some steps."""
    model = randomized(FiT(**SHAPE | {"width": width}), seed)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(rest, fused=True), torch.optim.Muon(matrices)]
    for _ in range(steps):
        for p in model.parameters():
            p.grad = p.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


@pytest.fixture
def folder(tmp_path):
    model, optimizers = trained(0)
    write_state(stage(state_of(model, optimizers)), tmp_path)
    return tmp_path


def test_what_is_read_is_what_was_written(folder):
    written = state_of(*trained(0))
    other = trained(1, steps=1)
    read_state(folder, *other)
    read = state_of(*other)
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], value) for name, value in written.items())
    assert {name.rpartition(".")[2] for name in read if name.startswith("optimizer.")} == {
        "step", "exp_avg", "exp_avg_sq", "momentum_buffer"
    }  # fmt: skip
    # And the next step is the same.
    reference = trained(0)
    for model, optimizers in (reference, other):
        for p in model.parameters():
            p.grad = p.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, two in zip(reference[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(one, two)


def test_optimizers_that_made_no_step_yet_are_read_too(folder):
    fresh = trained(2, steps=0)
    read_state(folder, *fresh)
    assert len(state_of(*fresh)) == len(state_of(*trained(0)))


def test_a_staged_state_does_not_change_with_training():
    model, optimizers = trained(0)
    copy = stage(state_of(model, optimizers))
    with torch.no_grad():
        model.patch_embed.weight.zero_()
    optimizers[0].state[model.patch_embed.weight]["exp_avg"].zero_()
    assert copy["weights.patch_embed.weight"].any()
    assert copy["optimizer.patch_embed.weight.exp_avg"].any()


def test_there_is_no_pickle(folder):
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize("damage", ["cut", "gone", "changed", "no card"])
def test_a_damaged_state_is_refused(folder, damage):
    (path,) = folder.glob("*.safetensors")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "changed":
        with path.open("r+b") as file:
            file.seek(-100, 2)
            file.write(bytes(50))
    elif damage == "gone":
        path.unlink()
    else:
        (folder / "state.json").unlink()
    with pytest.raises(UserError, match=r"is missing or damaged|state\.json"):
        verify_state(folder)
    for rank in range(2):  # of two processes one finds it
        try:
            verify_state(folder, rank, 2)
        except UserError:
            break
    else:
        pytest.fail("neither of two processes found it")


def test_the_state_of_another_model_or_optimizer_is_refused(folder):
    model, (adamw, _) = trained(1)
    with pytest.raises(UserError, match=r"another model or optimizer: optimizer\.blocks.*momentum_buffer"):
        read_state(folder, model, [adamw])
    with pytest.raises((UserError, ValueError), match=r"[Ss]ize"):
        read_state(folder, *trained(1, width=32))


def test_a_state_read_in_part_leaves_nothing_behind(folder, tmp_path_factory):
    """Optimizers forget what a checkpoint gave them that then could not be read."""
    before = tmp_path_factory.mktemp("before")
    model, optimizers = trained(3, steps=0)
    write_state(stage(state_of(model, optimizers)), before)
    (path,) = folder.glob("*.safetensors")
    shutil.copy(next(before.glob("*.safetensors")), path)
    read_state(before, model, optimizers)
    assert not any(optimizer.state for optimizer in optimizers)
