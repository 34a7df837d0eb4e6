from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import jvp

from conftest import noise_of, picture, randomized
from fitv2.checkpoint import Card
from fitv2.conditioning import Condition, Text
from fitv2.config import Architecture, Guidance, Sampling, Training
from fitv2.diffusion.any_step import SOFTENING, AnyStep
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.guidance import guide
from fitv2.diffusion.noise import NoisySample
from fitv2.diffusion.objective import objective_of
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout

ARCHITECTURE = Architecture(
    depth=3, width=32, heads=2, patch_size=1, in_channels=6, num_classes=5, objective="any-step"
)
LAYOUT = Layout.of([(2, 2), (1, 3), (3, 2)])
CONDITION = Condition.of(label=torch.tensor([3, 1, 4]))
T, R = torch.tensor([0.1, 0.5, 0.3]), torch.tensor([0.9, 0.5, 0.45])
PLAIN = Training(learned_guidance=1.0)


def model_of(**changes):
    return randomized(FiT(**asdict(replace(ARCHITECTURE, **changes)))).eval()


def sample_of(layout=LAYOUT, t_B=T, target_B=R, channels=6, dtype=torch.float32):
    noisy = Flow().add_noise(
        noise_of(layout, channels).to(dtype),
        layout,
        noise_of(layout, channels, first=4).to(dtype),
        t_B.to(dtype),
    )
    return replace(noisy, target_B=target_B.to(dtype))


def curved(x_TC, layout, t_B, condition, target_B=None):
    """A formula of x, t and r with attention between the tokens of an image, in any precision."""
    target_B = t_B if target_B is None else target_B
    t_T1, r_T1 = layout.spread(t_B)[:, None], layout.spread(target_B)[:, None]
    pieces = (x_TC * (1 + t_T1**2)).split(layout.lengths)
    mixed = torch.cat([(piece @ piece.T / 6).softmax(1) @ piece.sin() for piece in pieces])
    return mixed * (1 + 3 * r_T1 * t_T1) + (5 * t_T1).sin() * x_TC


# The network


def test_a_target_that_is_the_time_itself_gives_the_flow_to_the_last_bit():
    model, x_TC = model_of(), noise_of(LAYOUT, 6)
    with torch.no_grad():
        flow = model(x_TC, LAYOUT, T, CONDITION)
        assert torch.equal(model(x_TC, LAYOUT, T, CONDITION, target_B=T), flow)
        moved = model(x_TC, LAYOUT, T, CONDITION, target_B=R)
    of_images = [(one - other).abs().max() for one, other in zip(
        moved.split(LAYOUT.lengths), flow.split(LAYOUT.lengths), strict=True)]  # fmt: skip
    assert of_images[1] == 0
    assert min(of_images[0], of_images[2]) > 1e-3


@pytest.mark.parametrize(("depth", "first"), [(2, 1), (3, 2), (8, 5), (15, 10), (36, 24)])
def test_the_first_two_thirds_of_the_blocks_see_the_time_alone(depth, first):
    model, seen = model_of(depth=depth, width=8, heads=1), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[3]))
    model(noise_of(LAYOUT, 6), LAYOUT, T, CONDITION, target_B=R)
    alike = [torch.equal(one, seen[0]) for one in seen]
    assert alike == [True] * first + [False] * (depth - first)


@pytest.mark.parametrize("adaln", ["lora", "full"])
def test_the_mean_velocity_of_a_pack_is_that_of_each_image_alone(adaln):
    model, x_TC = model_of(adaln=adaln), noise_of(LAYOUT, 6)
    with torch.no_grad():
        together = model(x_TC, LAYOUT, T, CONDITION, target_B=R).split(LAYOUT.lengths)
        for i, piece in enumerate(x_TC.split(LAYOUT.lengths)):
            one = LAYOUT.select([i]), T[i : i + 1], CONDITION.select([i])
            alone = model(piece, *one, target_B=R[i : i + 1])
            torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-5)


# What it learns


def exact_rate(sample, velocity_TC):
    """du/dt along the flow by a product with the Jacobian, and the mean velocity that follows."""
    t_T1 = sample.layout.spread(sample.t_B)

    def along(x_TC, t_B):
        return curved(x_TC, sample.layout, t_B, CONDITION, sample.target_B)

    rate_TC = jvp(along, (sample.x_TC, sample.t_B), (velocity_TC, torch.ones_like(sample.t_B)))[1]
    return velocity_TC + (sample.layout.spread(sample.target_B) - t_T1)[:, None] * rate_TC


def test_the_difference_is_the_derivative_along_the_flow_up_to_its_square():
    sample = sample_of(dtype=torch.float64)
    velocity_TC = sample.data_TC - sample.noise_TC
    expected = exact_rate(sample, velocity_TC)
    errors = []
    for difference in (0.02, 0.01, 0.005):
        objective = AnyStep(training=replace(PLAIN, difference=difference))
        errors.append((objective.mean_velocity(curved, sample, CONDITION) - expected).abs().max().item())
    assert errors[0] > 1e-5
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.02)


def test_a_difference_that_would_leave_the_way_is_taken_from_one_side():
    ends, targets = torch.tensor([0.0, 5e-5, 1 - 5e-5]), torch.tensor([1.0, 0.7, 1.0])
    sample = sample_of(t_B=ends, target_B=targets, dtype=torch.float64)
    times = []

    def watched(x_TC, layout, t_B, condition, target_B=None):
        times.append(t_B)
        return curved(x_TC, layout, t_B, condition, target_B)

    found = AnyStep(training=replace(PLAIN, difference=1e-4)).mean_velocity(watched, sample, CONDITION)
    assert min(t.min() for t in times) == 0
    assert max(t.max() for t in times) == 1
    expected = exact_rate(sample, sample.data_TC - sample.noise_TC)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.005)


DATA_STD = 0.5


def std_at(t):
    """Of the marginal at time t, where data are N(0, DATA_STD²) and noise is N(0, 1)."""
    return ((t * DATA_STD) ** 2 + (1 - t) ** 2).sqrt()


def gaussian(x_TC, layout, t_B, condition, target_B=None):
    """The exact mean velocity of that flow, whose map from t to r multiplies by std(r)/std(t)."""
    target_B = t_B if target_B is None else target_B
    t, r = layout.spread(t_B)[:, None], layout.spread(target_B)[:, None]
    velocity = x_TC * (t * DATA_STD**2 - (1 - t)) / std_at(t) ** 2
    mean = x_TC * (std_at(r) / std_at(t) - 1) / torch.where(r == t, 1, r - t)
    return torch.where(r == t, velocity, mean)


def test_the_exact_mean_velocity_of_a_gaussian_is_what_is_asked_of_it():
    x_TC, t_T1 = noise_of(LAYOUT, 6).double(), LAYOUT.spread(T.double())[:, None]
    velocity_TC = gaussian(x_TC, LAYOUT, T.double(), CONDITION)
    # The pair of data and noise whose line through x has the velocity of the flow there.
    data_TC, noise_TC = x_TC + (1 - t_T1) * velocity_TC, x_TC - t_T1 * velocity_TC
    sample = NoisySample(x_TC, LAYOUT, T.double(), data_TC, noise_TC, R.double())
    objective = AnyStep(training=replace(PLAIN, difference=1e-3))
    expected = gaussian(x_TC, LAYOUT, T.double(), CONDITION, R.double())
    found = objective.mean_velocity(gaussian, sample, CONDITION)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (expected - velocity_TC).abs().max() > 0.1
    loss = objective.loss(gaussian, sample, CONDITION)
    assert loss.error_B.max() < 1e-9


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_any_number_of_steps_of_an_exact_model_ends_at_the_data(steps):
    noise_TC = noise_of(LAYOUT, 6)
    objective = AnyStep()

    def output(x_TC, t, target=None):
        t_B = t.expand(len(LAYOUT))
        return gaussian(x_TC, LAYOUT, t_B, CONDITION, None if target is None else target.expand(len(LAYOUT)))

    for sampling in (Sampling(steps=steps), Sampling("any-step", steps, shift=2.0)):
        made = objective.generate(output, LAYOUT, noise_TC, [], sampling)
        torch.testing.assert_close(made, DATA_STD * noise_TC, rtol=1e-5, atol=1e-5)
    if steps < 8:  # as a flow it needs more
        euler = objective.generate(output, LAYOUT, noise_TC, [], Sampling("euler", steps))
        assert (euler - DATA_STD * noise_TC).abs().max() > 0.05


def test_guidance_is_learned_between_its_times_of_images_that_have_a_condition():
    t_B = torch.tensor([0.2, 0.5, 0.6])
    sample = sample_of(t_B=t_B, target_B=t_B)

    def model(x_TC, layout, t_B, condition, target_B=None):
        return x_TC + layout.spread(condition.present_B.float())[:, None]  # u_c − u_∅ is 1

    objective = AnyStep(training=Training(learned_guidance=2.5, learned_guidance_interval=(0.3, 1.0)))
    condition = CONDITION.drop(torch.tensor([False, False, True]))
    found = objective.mean_velocity(model, sample, condition) - (sample.data_TC - sample.noise_TC)
    expected = LAYOUT.spread(torch.tensor([0.0, 0.6, 0.0]))[:, None].expand_as(found)
    torch.testing.assert_close(found, expected)
    none = replace(objective, training=PLAIN).mean_velocity(model, sample, condition)
    assert torch.equal(none, sample.data_TC - sample.noise_TC)


@pytest.mark.parametrize(("target_B", "present"), [(T, True), (R, False), (T, False)])
def test_the_model_is_called_equally_often_whatever_the_images_are(target_B, present):
    """Else processes that share a model would wait for each other without end."""
    calls, condition = [], CONDITION.drop(torch.full((3,), not present))

    def model(x_TC, layout, t_B, condition, target_B=None):
        calls.append(len(layout))
        return curved(x_TC, layout, t_B, condition, target_B)

    sample = sample_of(target_B=target_B)
    found = AnyStep(training=Training()).mean_velocity(model, sample, condition)
    assert len(calls) == 2
    if not present and target_B is T:
        assert torch.equal(found, sample.data_TC - sample.noise_TC)


def test_the_loss_weighs_easy_and_hard_times_alike_and_reports_the_error():
    sample = sample_of(target_B=T)
    loss = AnyStep(training=PLAIN).loss(curved, sample, CONDITION)
    true_TC = sample.data_TC - sample.noise_TC
    error_B = LAYOUT.mean_per_image((curved(sample.x_TC, LAYOUT, T, CONDITION) - true_TC).square().mean(1))
    torch.testing.assert_close(loss.error_B, error_B)
    torch.testing.assert_close(loss.total_B, (1 + error_B / SOFTENING).log())


def test_held_out_errors_are_of_the_flow_and_of_steps_to_the_data():
    objective, model = AnyStep(), model_of()
    found = objective.held_out_errors(model, replace(sample_of(), target_B=None), CONDITION)
    flow = objective.loss(model, sample_of(target_B=T), CONDITION).error_B
    jumps = objective.loss(model, sample_of(target_B=torch.ones_like(T)), CONDITION).error_B
    assert found.keys() == {"validation", "validation_jump"}
    assert torch.equal(found["validation"], flow)
    assert torch.equal(found["validation_jump"], jumps)
    assert not torch.equal(flow, jumps)


def test_nothing_is_learned_through_what_is_asked_of_it():
    model = randomized(FiT(**asdict(ARCHITECTURE)))
    target_TC = AnyStep(training=Training()).mean_velocity(model, sample_of(), CONDITION)
    assert not target_TC.requires_grad


# Times


def drawn(training, step=0, count=2000):
    objective = AnyStep(training=training)
    return torch.stack([torch.stack(objective.draw_times(generator(i), step)) for i in range(count)]).unbind(
        1
    )


def test_a_share_of_the_images_jumps_and_all_of_them_forward():
    t_B, target_B = drawn(Training(jump_share=0.25))
    assert (target_B >= t_B).all()
    assert (target_B > t_B).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert t_B.min() > 0
    assert target_B.max() < 1
    jumps = (target_B - t_B)[target_B > t_B]
    assert jumps.max() > 0.8
    assert jumps.mean() > 0.25


def test_steps_grow_over_the_curriculum():
    training = Training(jump_share=1.0, curriculum_steps=100)
    whole = drawn(replace(training, curriculum_steps=0), count=100)
    for step, reach in ((0, 0.01), (49, 0.5), (99, 1.0), (1000, 1.0)):
        t_B, target_B = drawn(training, step, count=100)
        assert torch.equal(t_B, whole[0])
        torch.testing.assert_close(target_B - t_B, reach * (whole[1] - whole[0]), rtol=1e-4, atol=1e-6)


# Where it does not fit


@pytest.mark.parametrize("changes", [{"prediction": "data"}, {"path": "gvp"}])
def test_it_is_for_the_velocity_of_a_linear_path(changes):
    with pytest.raises(UserError, match="any-step is for `path` linear and `prediction` velocity"):
        objective_of(replace(ARCHITECTURE, **changes))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (Training(direction_weight=0.5), "`direction_weight` is not for `objective` any-step"),
        (Training(learned_guidance_interval=(0.5, 0.5)), "two rising times"),
    ],
)
def test_settings_that_cannot_be(training, message):
    with pytest.raises(UserError, match=message):
        objective_of(ARCHITECTURE, training)


def test_one_block_has_no_last_third():
    with pytest.raises(UserError, match="any-step needs a `depth` of 2"):
        objective_of(replace(ARCHITECTURE, depth=1))


def test_a_flow_takes_no_jumps_and_jumps_lead_towards_data_alone():
    def output(x_TC, t, target=None):
        return x_TC

    with pytest.raises(UserError, match="leads any-step models towards data alone"):
        Flow().generate(output, LAYOUT, noise_of(LAYOUT, 6), [], Sampling("any-step"))
    with pytest.raises(UserError, match="leads any-step models towards data alone"):
        AnyStep().invert(output, LAYOUT, noise_of(LAYOUT, 6), [], Sampling("any-step"))
    assert AnyStep().invert(output, LAYOUT, noise_of(LAYOUT, 6), [], Sampling()).isfinite().all()


# In a pipeline


@pytest.fixture(scope="module")
def pipe():
    card = Card(labels=tuple("abcde"), autoencoder="pixels", max_tokens=16, guidance=1.0)
    shape = {**asdict(ARCHITECTURE), "patch_size": 4, "in_channels": 3}
    return FiTPipeline.of(randomized(FiT(**shape)).eval(), card)


def array(image):
    return np.asarray(image)


def test_what_is_known_stays_to_the_last_bit_in_few_steps(pipe):
    image = picture(16, 24)
    mask = Image.new("L", (24, 16), 0)
    mask.paste(255, (12, 0, 24, 16))
    image = image.resize((24, 16))
    made = pipe("a", image=image, mask_image=mask, generator=generator(0)).images[0]
    assert np.array_equal(array(made)[:, :12], array(image)[:, :12])
    assert not np.array_equal(array(made)[:, 12:], array(image)[:, 12:])


def test_growth_variations_and_schedulers_of_diffusers_lead_to_pictures(pipe):
    grown = pipe("a", height=32, width=40, generator=generator(0)).images[0]
    assert grown.size == (40, 32)
    varied = pipe("a", image=picture(16, 16), strength=0.5, generator=generator(0)).images[0]
    assert varied.size == (16, 16)
    for solver in ("ab2", "unipc", "dpm++", "dopri5", "euler-maruyama"):
        sampling = Sampling(solver, steps=6)
        assert pipe("a", height=16, width=16, sampling=sampling).images[0].size == (16, 16)


def test_a_picture_is_as_alone_beside_others_of_other_shapes(pipe):
    sizes = [(16, 16), (8, 24), (24, 8)]
    rngs = [generator(i) for i in range(3)]
    together = pipe(["a", "b", "c"], [h for h, _ in sizes], [w for _, w in sizes], generator=rngs).images
    for i, (label, (height, width)) in enumerate(zip("abc", sizes, strict=True)):
        alone = pipe(label, height, width, generator=[generator(i)]).images[0]
        apart = np.abs(array(alone).astype(int) - array(together[i]).astype(int))
        assert apart.max() <= 1


def test_guidance_on_top_is_the_formula_at_the_target_too():
    model, x_TC, layout = model_of(), noise_of(LAYOUT, 6), LAYOUT
    partly = Guidance(2.0, guidance_interval=(0.2, 0.4))
    with torch.no_grad():
        own = model(x_TC, layout, T, CONDITION, target_B=R)
        none = model(x_TC, layout, T, CONDITION.null(), target_B=R)
        made = guide(model, layout, CONDITION, partly)(x_TC, T, R)
    inside = layout.spread(torch.tensor([0.0, 0.0, 1.0]))[:, None]
    torch.testing.assert_close(made, own + inside * (own - none), rtol=1e-4, atol=1e-4)


def test_texts_go_with_their_images():
    text = Text.of([(torch.randn(n, 8), torch.randn(8)) for n in (2, 0, 3)])
    condition = Condition.of(label=torch.tensor([3, 1, 4]), text=text)
    shape = asdict(ARCHITECTURE) | {"conditions": ("label", "text"), "text_channels": 8, "pooled_channels": 8}
    model, sample = randomized(FiT(**shape)).eval(), sample_of()
    objective = AnyStep(training=Training(learned_guidance_interval=(0.0, 1.0)))
    together = objective.mean_velocity(model, sample, condition).split(LAYOUT.lengths)
    for i in range(3):
        pieces = [each.split(LAYOUT.lengths)[i] for each in (sample.x_TC, sample.data_TC, sample.noise_TC)]
        one = NoisySample(pieces[0], LAYOUT.select([i]), T[i : i + 1], *pieces[1:], R[i : i + 1])
        alone = objective.mean_velocity(model, one, condition.select([i]))
        torch.testing.assert_close(alone, together[i], rtol=1e-3, atol=1e-3)
