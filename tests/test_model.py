from dataclasses import replace

import pytest
import torch

from conftest import noise_of, randomized
from fitv2.conditioning import Condition, Text
from fitv2.config import Rope
from fitv2.diffusion.noise import draw_noise
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout

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
    "absolute": {"rope": {"kind": "absolute"}},
    "scaled by image": {"rope": {"extrapolation": "ntk", "attention_scale": "pro2", "train_side": 4}},
}
SIZES = [(1, 1), (2, 7), (7, 2), (16, 16), (3, 5)]


@pytest.mark.parametrize(("name", "count"), RELEASED.items())
def test_parameter_counts_are_the_released_ones(name, count):
    with torch.device("meta"):
        model = FiT.from_preset(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def pack_of(sizes, channels=6):
    layout = Layout.of(sizes)
    return draw_noise(layout.lengths, channels, [generator(7, *size) for size in sizes]), layout


def labelled(labels):
    return Condition.of(label=torch.as_tensor(labels))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_each_image_alone_forward_and_backward(variant):
    model = randomized(FiT(**TINY, **VARIANTS[variant])).eval()
    times, labels = torch.linspace(0, 1, len(SIZES)), labelled(torch.arange(len(SIZES)) % 6)
    weights = dict(model.named_parameters())

    def gradients(loss):
        return torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

    output = model(*pack_of(SIZES), times, labels)
    together = gradients(output.square().sum())
    alone = [model(*pack_of([size]), times[i : i + 1], labels.select([i])) for i, size in enumerate(SIZES)]
    torch.testing.assert_close(output, torch.cat(alone), rtol=1e-5, atol=1e-5)
    summed = [sum(parts) for parts in zip(*(gradients(a.square().sum()) for a in alone), strict=True)]
    for name, ours, expected in zip(weights, together, summed, strict=True):
        scale = expected.abs().max().clamp_min(1e-3)
        assert ((ours - expected).abs().max() / scale).item() < 1e-5, name


def test_order_in_the_pack_does_not_matter(model):
    times, labels = torch.linspace(0, 1, len(SIZES)), labelled(torch.arange(len(SIZES)) % 6)
    turned = labels.select(range(len(SIZES))[::-1])
    forward = model(*pack_of(SIZES), times, labels).split([a * b for a, b in SIZES])
    backward = model(*pack_of(SIZES[::-1]), times.flip(0), turned).split([a * b for a, b in SIZES[::-1]])
    for one, other in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_order_of_the_tokens_of_an_image_does_not_matter(model):
    x, layout = pack_of(SIZES)
    times, labels = torch.linspace(0, 1, len(SIZES)), labelled(torch.arange(len(SIZES)))
    orders = [torch.randperm(n, generator=generator(n)) for n in layout.lengths]
    order = torch.cat([n + start for n, start in zip(orders, layout.cu_seqlens.tolist(), strict=False)])
    moved = model(x[order], layout.reorder(order), times, labels)
    torch.testing.assert_close(moved, model(x, layout, times, labels)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_at_two_times_packed_and_alone_forward_and_backward(variant):
    model = randomized(FiT(**TINY, **VARIANTS[variant])).eval()
    sizes = [(1, 2), *SIZES[1:], (3, 5), (3, 5)]
    (x, layout), labels = pack_of(sizes), labelled(torch.arange(len(sizes)) % 6)
    first, second = torch.linspace(0, 0.9, len(sizes)), torch.linspace(0.1, 1, len(sizes))
    times = torch.stack([first, second], 1).flatten()

    def output(model, x, layout, times, labels):
        return model(x, layout, times, labels, levels=layout.divide(0.25))

    same = torch.stack([first, first], 1).flatten()
    plain = model(x, layout, first, labels)
    torch.testing.assert_close(output(model, x, layout, same, labels), plain, rtol=1e-5, atol=1e-6)

    together, weights = output(model, x, layout, times, labels), list(model.parameters())
    pieces = x.split(layout.lengths)
    alone = [
        output(model, piece, Layout.of([size]), times[2 * i : 2 * i + 2], labels.select([i]))
        for i, (piece, size) in enumerate(zip(pieces, sizes, strict=True))
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert (together - plain).abs().max() > 1e-3
    one, other = (
        torch.autograd.grad(made.square().sum(), weights, allow_unused=True)
        for made in (together, torch.cat(alone))
    )
    for grad, expected in zip(one, other, strict=True):
        if expected is not None:
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)


def test_texts_at_two_times_are_as_alone(text_model):
    sizes, lengths = [(2, 3), (1, 4), (3, 3)], (3, 0, 1)
    layout, condition = Layout.of(sizes), with_texts(lengths)
    x, times = torch.randn(layout.tokens, 6), torch.rand(6)
    together = text_model(x, layout, times, condition, levels=layout.divide(0.3)).split(layout.lengths)
    for i, (part, size) in enumerate(zip(x.split(layout.lengths), sizes, strict=True)):
        one = Layout.of([size])
        its = part, one, times[2 * i : 2 * i + 2], condition.select([i])
        torch.testing.assert_close(
            together[i], text_model(*its, levels=one.divide(0.3)), rtol=1e-5, atol=1e-5
        )


def test_a_text_has_the_time_of_the_first_run(text_model):
    layout, condition = Layout.of([(2, 3), (1, 4), (3, 3)]), with_texts((3, 0, 1))
    x, t = torch.randn(layout.tokens, 6, generator=generator(0)), torch.rand(3, generator=generator(1))

    def output(later):
        times = torch.stack([t, later], 1).flatten()
        return text_model(x, layout, times, condition, levels=layout.divide(0.25))

    plain = text_model(x, layout, t, condition)
    torch.testing.assert_close(output(t), plain, rtol=1e-5, atol=1e-5)
    assert (output(t + 0.3) - plain).abs().amax(1).min() > 1e-5


def test_a_transposed_grid_is_another_image(model):
    wide, high = Layout.of([(2, 7)]), Layout.of([(7, 2)])
    x = noise_of(wide, 6)
    t, label = torch.tensor([0.5]), labelled([0])
    difference = model(x, wide, t, label) - model(x, high, t, label)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["fitv2", "fit"])
def test_starts_at_zero_and_learns_everything(variant):
    """adaLN-Zero: the output is zero at first, and yet every parameter gets a gradient soon."""
    torch.manual_seed(0)
    model = FiT(**TINY, **VARIANTS[variant])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    (x, layout), t, labels = pack_of(SIZES), torch.linspace(0.1, 0.9, len(SIZES)), labelled(range(len(SIZES)))
    assert model(x, layout, t, labels).abs().max() == 0
    for _ in range(4):
        optimizer.zero_grad()
        output = model(x, layout, t, labels)
        (output - x.repeat(1, output.shape[1] // 6)).square().mean().backward()
        optimizer.step()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent


def test_bfloat16_stays_close_to_float32(model):
    inputs = (*pack_of(SIZES), torch.linspace(0, 1, 5), labelled(range(5)))
    expected = model(*inputs)
    result = randomized(FiT(**model.config)).to(torch.bfloat16)(*inputs)
    assert result.dtype == torch.bfloat16
    assert (result - expected).abs().mean() / expected.abs().mean() < 0.03


def test_saved_folder_rebuilds_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]
    again = FiT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_other_positions_share_the_weights_and_leave_the_model_as_it_was(model):
    rope = Rope("ntk", train_side=2)
    scaled = model.with_rope(rope)
    assert scaled.patch_embed.weight is model.patch_embed.weight
    assert (scaled.architecture.rope, model.architecture.rope) == (rope, Rope())
    assert FiT.from_config(scaled.config).architecture.rope == rope
    assert FiT.from_config(model.config).architecture.rope == Rope()
    inputs = (*pack_of([(2, 7)]), torch.tensor([0.5]), labelled([0]))
    assert (scaled(*inputs) - model(*inputs)).abs().max() > 1e-4


def test_time_shift_moves_what_the_model_sees(model):
    shifted = FiT(**model.config | {"time_shift": 3.0})
    shifted.load_state_dict(model.state_dict())
    packed, label = pack_of([(2, 3)]), labelled([0])
    same = model(*packed, torch.tensor([3 * 0.25 / (1 + 2 * 0.25)]), label)
    torch.testing.assert_close(shifted(*packed, torch.tensor([0.25]), label), same)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="width 30 over 2 heads"):
        FiT(depth=1, width=30, heads=2)


def test_activations_that_are_computed_again_give_the_same_gradients(model):
    """And fewer numbers are kept meanwhile."""
    packed = pack_of([(2, 3), (4, 4)])
    gradients, kept = [], []
    for again in (False, True):
        model.zero_grad()
        if again:
            model.enable_gradient_checkpointing()
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()) or x, lambda x: x):  # noqa: B023
            loss = model(*packed, torch.tensor([0.2, 0.8]), labelled([1, 2])).square().sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        kept.append(sum(numbers))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


# Transforms of torch.func --------------------------------------------------------------------------


def moved_along(model, layout, x, t, label, direction, rate):
    """The directional derivative of the model along (direction, rate), by torch.func.jvp."""
    function = lambda x, t: model(x, layout, t, label)  # noqa: E731
    return torch.func.jvp(function, (x, t), (direction, rate))[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_jacobian_product_is_the_limit_of_central_differences(variant):
    """The error of differences falls as ε², so they converge to it."""
    model = randomized(FiT(**TINY, **VARIANTS[variant])).eval().double()
    layout, t, label = Layout.of([(2, 3), (3, 3)]), torch.tensor([0.3, 0.6]), labelled([1, 2])
    x, direction = (torch.randn(15, 6, generator=generator(n), dtype=torch.float64) for n in (0, 1))
    exact = moved_along(model, layout, x, t, label, direction, torch.zeros(2))
    errors = []
    for step in (0.1, 0.05, 0.025):
        ahead, behind = (model(x + sign * step * direction, layout, t, label) for sign in (1, -1))
        errors.append(((ahead - behind) / (2 * step) - exact).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_a_jacobian_product_knows_the_time(model):
    layout, x, label = Layout.of([(2, 3)]), torch.randn(6, 6, generator=generator(0)), labelled([1])
    t = torch.tensor([0.4])
    exact = moved_along(model, layout, x, t, label, torch.zeros_like(x), torch.ones(1))
    ahead, behind = (model(x, layout, t + sign * 1e-2, label) for sign in (1, -1))
    assert (exact - (ahead - behind) / 2e-2).norm() < 0.01 * exact.norm()


def test_vmap_over_seeds_equals_one_after_another(model):
    layout, t, label = Layout.of([(2, 3), (1, 4)]), torch.tensor([0.4, 0.8]), labelled([1, 3])
    x_STC = torch.randn(3, 10, 6, generator=generator(0))
    together = torch.func.vmap(lambda x: model(x, layout, t, label))(x_STC)
    for x, ours in zip(x_STC, together, strict=True):
        torch.testing.assert_close(ours, model(x, layout, t, label), rtol=1e-5, atol=1e-5)


# Texts ------------------------------------------------------------------------------------------


@pytest.fixture
def text_model():
    shape = {"depth": 2, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}
    return randomized(FiT(**shape, conditions=("label", "text"), text_channels=7)).eval()


def with_texts(lengths, seed=0):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, 7, generator=rng)  # noqa: E731
    text = Text.of([(draw(n), draw(1)[0]) for n in lengths])
    return Condition.of(label=torch.arange(len(lengths)) % 5, text=text)


def test_each_image_with_its_text_is_as_alone(text_model):
    sizes, lengths = [(2, 3), (1, 4), (3, 3), (2, 2)], (3, 0, 1, 5)
    layout, condition = Layout.of(sizes), with_texts(lengths)
    condition = condition.drop(torch.tensor([False, False, False, True]))
    x, t = torch.randn(layout.tokens, 6), torch.rand(4)
    together = text_model(x, layout, t, condition).split(layout.lengths)
    for i, (part, size) in enumerate(zip(x.split(layout.lengths), sizes, strict=True)):
        alone = text_model(part, Layout.of([size]), t[i : i + 1], condition.select([i]))
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)


def test_texts_padded_and_masked_are_as_packed(text_model):
    """The released layout: 77 states a text, those of no token masked."""
    length, size = 5, (2, 3)
    layout, condition = Layout.of([size]), with_texts([length])
    x, t = torch.randn(6, 6), torch.rand(1)
    packed = text_model(x, layout, t, condition)
    text = condition.values["text"]
    padded = Text(
        torch.cat([text.states_ME, torch.randn(77 - length, 7)]),
        torch.tensor([77]),
        text.pooled_BE,
        text.held_B,
    )
    layout77 = layout.behind(torch.tensor([77]), 77)
    # Where the image would stand behind 5 tokens, and with keys that nobody sees.
    position = layout77.layout.pos_T2.clone()
    position[77:] += length - 77
    seen = torch.ones(77 + 6, dtype=torch.bool)
    seen[length:77] = False

    def masked(q, k, v, _):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(83, 83))[
            0
        ].transpose(0, 1)

    layout._joints[(77,)] = layout77._replace(layout=replace(layout77.layout, pos_T2=position))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fitv2.model.attention", masked)
        out = text_model(x, layout, t, Condition.of(label=condition.values["label"], text=padded))
    torch.testing.assert_close(out, packed, rtol=1e-5, atol=1e-5)


def test_a_text_changes_the_image_and_every_weight_learns(text_model):
    layout, condition = Layout.of([(2, 3), (2, 2)]), with_texts((3, 2))
    x, t = torch.randn(10, 6), torch.rand(2)
    out = text_model(x, layout, t, condition)
    assert not torch.allclose(out, text_model(x, layout, t, with_texts((3, 2), seed=1)), atol=1e-3)
    assert not torch.allclose(out, text_model(x, layout, t, condition.null()), atol=1e-3)
    nothing = text_model(x, layout, t, Condition.nothing(2))
    torch.testing.assert_close(nothing, text_model(x, layout, t, condition.null()))
    # Also where a step has no text at all: a missing gradient would stop the optimizer.
    text_model(x, layout, t, condition.null()).sum().backward()
    assert all(parameter.grad is not None for parameter in text_model.parameters())


def test_the_output_comes_as_diffusers_has_it():
    model = randomized(FiT(depth=1, width=32, heads=2, patch_size=1, in_channels=6, num_classes=5)).eval()
    layout = Layout.of([(2, 3)])
    given = torch.randn(6, 6), layout, torch.tensor([0.3]), Condition.of(label=torch.tensor([1]))
    plain = model(*given)
    assert torch.equal(model(*given, return_dict=True).sample, plain)
    (only,) = model(*given, return_dict=False)
    assert torch.equal(only, plain)


def test_blocks_are_what_diffusers_places_and_compiles():
    model = FiT(depth=2, width=32, heads=2)
    for names in (model._no_split_modules, model._repeated_blocks):
        assert {type(block).__name__ for block in model.blocks} == set(names)


def test_times_stay_in_float32_when_the_rest_is_cast_or_loaded_in_half(model, tmp_path):
    layout, t_B = Layout.of([(2, 3), (4, 1)]), torch.tensor([0.31, 0.77])
    x, label = noise_of(layout, 6), Condition.of(label=torch.tensor([1, 3]))
    with torch.no_grad():
        exact = model(x, layout, t_B, label)
        model.save_pretrained(tmp_path)
        loaded = FiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
        model.cast(torch.bfloat16)
        for half in (model, loaded):
            kinds = {name: value.dtype for name, value in half.named_parameters()}
            assert {kind for name, kind in kinds.items() if "time_embed" in name} == {torch.float32}
            assert {kind for name, kind in kinds.items() if "time_embed" not in name} == {torch.bfloat16}
            assert half.dtype == torch.bfloat16
            made = half(x, layout, t_B, label)
            assert made.dtype == torch.bfloat16
            torch.testing.assert_close(made.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_what_diffusers_does_with_whole_blocks_gives_the_same(model, tmp_path):
    """Spread over devices, of which this machine may have one, and compiled one for all."""
    model.save_pretrained(tmp_path)
    assert f"{model.num_parameters():,} parameters" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    inputs = (*pack_of([(2, 3), (3, 3)]), torch.tensor([0.2, 0.7]), labelled([1, 2]))
    expected = model(*inputs).detach()
    spread = FiT.from_pretrained(tmp_path, device_map="auto").eval()
    torch.testing.assert_close(spread(*inputs).detach(), expected)
    compiled = FiT.from_pretrained(tmp_path).eval()
    compiled.compile_repeated_blocks(backend="eager", dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), expected, atol=1e-5, rtol=1e-5)
