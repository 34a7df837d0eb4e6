import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

from conftest import randomized, together
from fitv2.conditioning import Condition
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.distributed import World, gather, join, local
from fitv2.tokens import Layout
from fitv2.training.weights import Weights

CPU = torch.device("cpu")
SHAPE = {"depth": 2, "width": 36, "heads": 3, "patch_size": 1, "in_channels": 6, "num_classes": 5}


def fresh():
    return randomized(FiT(**SHAPE))


def loss_of(model, seed):
    """Of two images, other ones for each seed."""
    rng = torch.Generator().manual_seed(seed)
    layout = Layout.of([(2, 3), (3 + seed, 2)])
    x_TC = torch.randn(layout.tokens, 6, generator=rng)
    condition = Condition.of(label=torch.tensor([1, 4]))
    output = model(x_TC, layout, torch.tensor([0.2, 0.7]), condition)
    return mse_loss(output.float(), torch.ones_like(output).float())


def test_in_one_process_a_bfloat16_copy_computes_and_float32_weights_change():
    weights = Weights(fresh(), CPU, torch.bfloat16, World(), 1)
    assert {p.dtype for p in weights.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in (*weights.master.parameters(), *weights.ema.parameters())} == {torch.float32}
    for seed in (0, 1):  # gradients of parts add up, in float32
        loss_of(weights.model, seed).backward()
        weights.collect()
    expected = fresh()
    (loss_of(expected, 0) + loss_of(expected, 1)).backward()
    for mine, theirs in zip(weights.master.parameters(), expected.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        assert torch.linalg.norm(mine.grad - theirs.grad) <= 0.05 * torch.linalg.norm(theirs.grad)
    assert all(p.grad is None for p in weights.model.parameters())


def test_the_average_follows_and_what_computes_gets_the_new_weights():
    weights = Weights(fresh(), CPU, torch.bfloat16, World(), 1)
    before = [p.clone() for p in weights.ema.parameters()]
    with torch.no_grad():
        for p in weights.master.parameters():
            p.add_(1)
    weights.update_ema(0.75)
    held = (list(m.parameters()) for m in (weights.ema, weights.master, weights.model))
    for old, average, new, computing in zip(before, *held, strict=True):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new)
        assert torch.equal(computing, new.to(torch.bfloat16))


def test_the_average_that_is_saved_is_a_copy():
    weights = Weights(fresh(), CPU, torch.float32, World(), 1)
    copy = weights.gather_ema(World())
    weights.update_ema(0.0)
    with torch.no_grad():
        weights.ema.patch_embed.weight.zero_()
    assert torch.equal(copy.patch_embed.weight, fresh().patch_embed.weight)
    assert copy.architecture == weights.ema.architecture


def test_clipping_gives_the_norm_before():
    weights = Weights(fresh(), CPU, torch.float32, World(), 1)
    loss_of(weights.model, 0).backward()
    norm = torch.cat([p.grad.flatten() for p in weights.master.parameters()]).norm()
    assert weights.clip(float(norm) / 2) == pytest.approx(float(norm), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in weights.master.parameters()]).norm()
    assert float(after) == pytest.approx(float(norm) / 2, rel=1e-5)
    total = torch.cat([p.flatten() for p in weights.master.parameters()]).norm()
    assert weights.norm() == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize(("size", "fsdp_size", "dtype"), [
    (2, 1, torch.float32), (2, 2, torch.float32), (4, 2, torch.float32), (2, 2, torch.bfloat16)
])  # fmt: skip
def test_gradients_of_several_processes_are_summed_in_float32(size, fsdp_size, dtype):
    expected = fresh()
    sum(loss_of(expected, rank) for rank in range(size)).backward()

    def work(_):
        with join() as world:
            weights = Weights(fresh(), CPU, dtype, world, fsdp_size)
            loss_of(weights.model, world.rank).backward()
            weights.collect()
            tolerance = 1e-5 if dtype == torch.float32 else 0.05
            for mine, theirs in zip(weights.master.parameters(), expected.parameters(), strict=True):
                assert mine.grad.dtype == torch.float32
                difference = torch.linalg.norm(gather(mine.grad) - theirs.grad)
                assert difference <= tolerance * torch.linalg.norm(theirs.grad)
            # What processes share, each holds a part of.
            for held in (weights.master, weights.ema):
                numbers = sum(local(p.detach()).numel() for p in held.parameters())
                assert numbers == pytest.approx(
                    sum(p.numel() for p in held.parameters()) / fsdp_size, rel=0.05
                )
            gathered = weights.gather_ema(world)
            assert (gathered is None) == (world.rank > 0)
            weights.restore(fresh().requires_grad_(False).apply(zeroed))
            assert not any(local(p).any() for p in weights.ema.parameters())
            dist.barrier()
            if gathered is not None:
                for mine, theirs in zip(gathered.parameters(), expected.parameters(), strict=True):
                    assert torch.equal(mine, theirs)

    assert together(size, work) == [None] * size


def zeroed(module):
    for parameter in module.parameters(recurse=False):
        parameter.zero_()


def test_processes_that_cannot_share_are_refused():
    with pytest.raises(UserError, match="`fsdp_size` 4 needs a multiple of 4 processes; there are 6"):
        Weights(fresh(), CPU, torch.float32, World(0, 6), 4)
