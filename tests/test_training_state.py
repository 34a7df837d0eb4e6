import shutil

import pytest
import torch

from conftest import randomized
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.training_state import read_state, require_whole_state, staged, state_of, write_state

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
    write_state(staged(state_of(model, optimizers)), tmp_path)
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
    copy = staged(state_of(model, optimizers))
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
        require_whole_state(folder)
    for rank in range(2):  # of two processes one finds it
        try:
            require_whole_state(folder, rank, 2)
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
    write_state(staged(state_of(model, optimizers)), before)
    (path,) = folder.glob("*.safetensors")
    shutil.copy(next(before.glob("*.safetensors")), path)
    read_state(before, model, optimizers)
    assert not any(optimizer.state for optimizer in optimizers)
