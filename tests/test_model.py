import pytest
import torch

from conftest import noise_of, randomized
from fitv2.config import Rope
from fitv2.diffusion.flow import noise
from fitv2.errors import UserError
from fitv2.model import FiT, _Gated
from fitv2.runtime.rng import generator
from fitv2.tokens import concatenate, layout

RELEASED = {
    "fitv2-b": 128_149_072,
    "fitv2-xl": 671_045_776,
    "fitv2-3b": 2_971_928_080,
    "fit-b": 158_664_224,
    "fit-xl": 823_599_392,
}
TINY = {"depth": 2, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}
VARIANTS = {
    "fitv2": {},
    "fit": {"path": "ddpm", "prediction": "noise", "adaln": "full", "qk_norm": False, "mlp_width": 128},
    "scaled by image": {"rope": {"extrapolation": "ntk", "attention_scale": "pro2", "train_side": 4}},
}
SIZES = [(1, 1), (2, 7), (7, 2), (16, 16), (3, 5)]


@pytest.mark.parametrize(("name", "count"), RELEASED.items())
def test_parameter_counts_are_the_released_ones(name, count):
    with torch.device("meta"):
        model = FiT.from_preset(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def pack_of(sizes, channels=6):
    packed = layout(sizes)
    keys = [generator(7, *size) for size in sizes]
    return packed.with_tokens(noise(packed.lengths, channels, keys))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_each_image_alone_forward_and_backward(variant):
    model = randomized(FiT(**TINY, **VARIANTS[variant])).eval()
    times, labels = torch.linspace(0, 1, len(SIZES)), torch.arange(len(SIZES)) % 6
    weights = dict(model.named_parameters())

    def gradients(loss):
        return torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

    packed = pack_of(SIZES)
    output = model(packed, times, labels)
    together = gradients(output.square().sum())
    alone = [model(pack_of([size]), times[i : i + 1], labels[i : i + 1]) for i, size in enumerate(SIZES)]
    torch.testing.assert_close(output, torch.cat(alone), rtol=1e-5, atol=1e-5)
    summed = [sum(parts) for parts in zip(*(gradients(a.square().sum()) for a in alone), strict=True)]
    for name, ours, expected in zip(weights, together, summed, strict=True):
        scale = expected.abs().max().clamp_min(1e-3)
        assert ((ours - expected).abs().max() / scale).item() < 1e-5, name


def test_order_in_the_pack_does_not_matter(model):
    packs = [pack_of([size]) for size in SIZES]
    times, labels = torch.linspace(0, 1, len(SIZES)), torch.arange(len(SIZES)) % 6
    forward = model(concatenate(packs), times, labels).split([a * b for a, b in SIZES])
    backward = model(concatenate(packs[::-1]), times.flip(0), labels.flip(0)).split(
        [a * b for a, b in SIZES[::-1]]
    )
    for one, other in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_transposed_grid_is_another_image(model):
    wide, high = layout([(2, 7)]), layout([(7, 2)])
    x = noise_of(wide, 6)
    t, label = torch.tensor([0.5]), torch.tensor([0])
    difference = model(wide.with_tokens(x), t, label) - model(high.with_tokens(x), t, label)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["fitv2", "fit"])
def test_starts_at_zero_and_learns_everything(variant):
    """adaLN-Zero: the output is zero at first, and yet every parameter gets a gradient soon."""
    torch.manual_seed(0)
    model = FiT(**TINY, **VARIANTS[variant])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    packed, t, labels = pack_of(SIZES), torch.linspace(0.1, 0.9, len(SIZES)), torch.arange(len(SIZES))
    assert model(packed, t, labels).abs().max() == 0
    for _ in range(4):
        optimizer.zero_grad()
        output = model(packed, t, labels)
        (output - packed.x_TC.repeat(1, output.shape[1] // 6)).square().mean().backward()
        optimizer.step()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent


def test_bfloat16_stays_close_to_float32(model):
    packed, t, labels = pack_of(SIZES), torch.linspace(0, 1, 5), torch.arange(5)
    expected = model(packed, t, labels)
    result = randomized(FiT(**model.config)).to(torch.bfloat16)(packed, t, labels)
    assert result.dtype == torch.bfloat16
    assert (result - expected).abs().mean() / expected.abs().mean() < 0.03


def test_saved_folder_rebuilds_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    again = FiT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_other_positions_share_the_weights_and_leave_the_model_as_it_was(model):
    rope = Rope("ntk", train_side=2)
    scaled = model.with_rope(rope)
    assert scaled.patch_embed.weight is model.patch_embed.weight
    assert (scaled.architecture.rope, model.architecture.rope) == (rope, Rope())
    assert FiT.from_config(scaled.config).architecture.rope == rope
    assert FiT.from_config(model.config).architecture.rope == Rope()
    packed, t, label = pack_of([(2, 7)]), torch.tensor([0.5]), torch.tensor([0])
    assert (scaled(packed, t, label) - model(packed, t, label)).abs().max() > 1e-4


def test_time_shift_moves_what_the_model_sees(model):
    shifted = FiT(**model.config | {"time_shift": 3.0})
    shifted.load_state_dict(model.state_dict())
    packed, label = pack_of([(2, 3)]), torch.tensor([0])
    same = model(packed, torch.tensor([3 * 0.25 / (1 + 2 * 0.25)]), label)
    torch.testing.assert_close(shifted(packed, torch.tensor([0.25]), label), same)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="width 30 over 2 heads"):
        FiT(depth=1, width=30, heads=2)


def test_gated_and_its_gradients():
    shape = (3, 5)
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(shape, generator=generator, dtype=torch.double).requires_grad_() for _ in "ab")
    torch.testing.assert_close(_Gated.apply(gate, up), gate * gate.sigmoid() * up)
    assert torch.autograd.gradcheck(_Gated.apply, (gate, up))


def test_activations_that_are_computed_again_give_the_same_gradients(model):
    """And fewer numbers are kept meanwhile."""
    packed = layout([(2, 3), (4, 4)], 6)
    packed = packed.with_tokens(torch.randn(22, 6, generator=torch.Generator().manual_seed(0)))
    gradients, kept = [], []
    for again in (False, True):
        model.zero_grad()
        if again:
            model.enable_gradient_checkpointing()
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()) or x, lambda x: x):  # noqa: B023
            loss = model(packed, torch.tensor([0.2, 0.8]), torch.tensor([1, 2])).square().sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        kept.append(sum(numbers))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2
