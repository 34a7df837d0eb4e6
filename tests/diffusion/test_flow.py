import pytest
import torch

from conftest import noise_of
from fitv2.conditioning import Condition
from fitv2.config import Architecture, Sampling, Training
from fitv2.diffusion.flow import MIN_TIME_TO_DATA, PREDICTIONS, WEIGHTS, Flow, logit_normal, uniform
from fitv2.diffusion.noise import Known
from fitv2.diffusion.paths import PATHS
from fitv2.errors import UserError
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout

FLOWS = [Flow(path, p) for path in PATHS for p in PREDICTIONS if p != "data" or path == "linear"]
names = [f"{flow.path_name}-{flow.prediction}" for flow in FLOWS]


def sample(flow, times=(0.1, 0.4, 0.9)):
    layout = Layout.of([(2, 2), (1, 3), (2, 1)])
    noise = noise_of(layout, 5, first=3)
    return flow.add_noise(noise_of(layout, 5), layout, noise, torch.tensor(times))


def times_of(point):
    return point.layout.spread(point.t_B)[:, None]


def true_velocity(flow, point):
    data_rate, noise_rate = flow.path.derivatives(times_of(point))
    return data_rate * point.data_TC + noise_rate * point.noise_TC


def perfect(flow, point):
    sigma = flow.path.coefficients(times_of(point))[1]
    return {
        "velocity": true_velocity(flow, point),
        "data": point.data_TC,
        "noise": point.noise_TC,
        "score": -point.noise_TC / sigma,
    }[flow.prediction]


def test_path_goes_from_noise_to_data():
    point = sample(Flow(), (0.0, 0.4, 1.0))
    parts = [x.split(point.layout.lengths) for x in (point.x_TC, point.noise_TC, point.data_TC)]
    (first, middle, last), start, data = parts
    torch.testing.assert_close(first, start[0])
    torch.testing.assert_close(middle, 0.4 * data[1] + 0.6 * start[1])
    torch.testing.assert_close(last, data[2])


def test_the_last_tokens_are_at_the_cleaner_time_where_there_are_two():
    layout, flow = Layout.of([(2, 2), (1, 8)]), Flow(clean_share=0.25)
    data, noise = noise_of(layout, 5), noise_of(layout, 5, first=3)
    point = flow.add_noise(data, layout, noise, torch.tensor([0.1, 0.5]), torch.tensor([0.6, 0.9]))
    times = torch.tensor([0.1] * 3 + [0.6] + [0.5] * 6 + [0.9] * 2)[:, None]
    torch.testing.assert_close(point.x_TC, times * data + (1 - times) * noise)
    assert torch.equal(point.t_T1, times)
    assert flow.squared_error(data - noise, point).abs().max() < 1e-10
    seen = []

    def model(x_TC, layout, t, condition, levels):
        seen.extend([t, levels.lengths])
        return data - noise + 1

    torch.testing.assert_close(flow.loss(model, point, None).total_B, torch.ones(2))
    assert torch.equal(seen[0], torch.tensor([0.1, 0.6, 0.5, 0.9])) and seen[1] == (3, 1, 6, 2)


def test_two_times_are_drawn_the_noisier_first():
    rngs = [generator(i) for i in range(500)]
    pairs = torch.tensor([[float(t) for t in Flow(clean_share=0.25).draw_times(rng)] for rng in rngs])
    assert (pairs[:, 0] <= pairs[:, 1]).all()
    assert pairs.mean() == pytest.approx(0.5, abs=0.02)
    # The mean of the smaller of two of the paper's draws, by integrating their quantiles.
    expected = float((torch.sigmoid(torch.randn(2, 100_000, generator=generator(1)))).amin(0).mean())
    assert pairs[:, 0].mean() == pytest.approx(expected, abs=0.02)


def test_an_early_head_may_predict_the_data_beside_a_velocity():
    flow = Flow(early_weight=0.5, early_prediction="data")
    point = sample(flow)
    true = true_velocity(flow, point)
    x_TC, t_T1 = point.x_TC, times_of(point)
    assert flow.beyond_early(true, point.data_TC, x_TC, t_T1).abs().max() < 1e-5
    beyond = flow.beyond_early(true + 2, point.data_TC - 1, x_TC, t_T1)
    torch.testing.assert_close(beyond, (2 + 1 / (1 - t_T1)).expand_as(beyond), rtol=1e-4, atol=1e-4)
    late = torch.full_like(t_T1, 0.99)
    right = (point.data_TC - x_TC) / (1 - late)  # both heads know the data: no guidance, however late
    assert flow.beyond_early(right, point.data_TC, x_TC, late).abs().max() < 1e-4
    assert torch.equal(flow.early_error(point.data_TC, point), torch.zeros(3))
    torch.testing.assert_close(flow.early_error(point.data_TC + 2, point), torch.full((3,), 4.0))

    def model(x_TC, layout, t_B, condition, early):
        return true + 1, point.data_TC + 2

    total_B, error_B = flow.loss(model, point, None)
    torch.testing.assert_close(error_B, torch.ones(3))
    torch.testing.assert_close(total_B, torch.full((3,), 1 + 0.5 * 4))
    assert flow.held_out_errors(model, point, None)["validation_early"].tolist() == [4, 4, 4]


@pytest.mark.parametrize("flow", FLOWS, ids=names)
def test_a_perfect_output_gives_the_velocity_and_no_loss(flow):
    point = sample(flow)
    velocity = flow.velocity(perfect(flow, point), point.x_TC, times_of(point))
    torch.testing.assert_close(velocity, true_velocity(flow, point), rtol=1e-3, atol=1e-4)
    assert flow.squared_error(perfect(flow, point), point).abs().max() < 1e-10


@pytest.mark.parametrize("flow", FLOWS, ids=names)
def test_the_right_weight_makes_it_the_velocity_error_of_each_image(flow):
    weight = "velocity" if flow.prediction in ("noise", "score") else "none"
    flow = Flow(flow.path_name, flow.prediction, weight)
    point = sample(flow)
    output = torch.randn(point.data_TC.shape, generator=torch.Generator().manual_seed(9))
    error = flow.velocity(output, point.x_TC, times_of(point)) - true_velocity(flow, point)
    expected = torch.stack([image.square().mean() for image in error.split(point.layout.lengths)])
    torch.testing.assert_close(flow.squared_error(output, point), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_weights_are_those_of_sit(path):
    t = torch.tensor([0.2, 0.7])
    (alpha, sigma), (alpha_rate, sigma_rate) = path.coefficients(t), path.derivatives(t)
    g = alpha_rate / alpha * sigma**2 - sigma * sigma_rate
    torch.testing.assert_close(WEIGHTS["velocity"](path, t), (g / sigma) ** 2)
    torch.testing.assert_close(WEIGHTS["likelihood"](path, t), g / sigma**2)


def test_an_euler_step_to_the_data_ends_at_the_prediction():
    flow = Flow(prediction="data")
    point = sample(flow, (0.3, 0.96, 0.999))
    output = torch.randn(point.data_TC.shape, generator=torch.Generator().manual_seed(9))
    velocity = flow.velocity(output, point.x_TC, times_of(point))
    ended = point.x_TC + (1 - times_of(point)) * velocity
    torch.testing.assert_close(ended, output, rtol=1e-4, atol=1e-4)


def test_data_prediction_stays_finite_at_the_data():
    flow = Flow(prediction="data")
    point = sample(flow, (1.0, 1.0, 1.0))
    loss = flow.squared_error(point.data_TC + 1, point)
    torch.testing.assert_close(loss, torch.full((3,), MIN_TIME_TO_DATA**-2))


@pytest.mark.parametrize("flow", FLOWS, ids=names)
def test_all_is_finite_inside_the_interval(flow):
    start, stop = flow.interval()
    inside = sample(flow, (start, 0.5, 0.999 if flow.ends_early else stop))
    assert flow.velocity(torch.ones_like(inside.data_TC), inside.x_TC, times_of(inside)).isfinite().all()
    times = torch.tensor([1e-6, 0.5, 1 - 1e-6])
    trained = sample(flow, flow._scale_time(times).tolist())
    assert flow.squared_error(torch.ones_like(trained.data_TC), trained).isfinite().all()


def test_logit_normal_times_are_the_sigmoid_of_a_normal():
    rng = torch.Generator().manual_seed(0)
    times = torch.stack([logit_normal(rng, mean=-0.6, std=0.8) for _ in range(20_000)])
    logits = torch.log(times / (1 - times))
    assert logits.mean().item() == pytest.approx(-0.6, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)


def test_training_chooses_the_times():
    model = Architecture(depth=1, width=32, heads=2)
    even = Flow.of(model, Training(times="uniform"))
    rng = torch.Generator().manual_seed(0)
    times = torch.stack([even.draw_times(rng)[0] for _ in range(20_000)])
    assert torch.histc(times, 4, 0, 1).min() > 4_800
    shifted = Flow.of(model, Training(time_mean=-3.0))
    assert torch.stack([shifted.draw_times(rng)[0] for _ in range(100)]).mean() < 0.15
    assert Flow.of(model).draw is logit_normal
    assert even.draw is uniform
    with pytest.raises(UserError, match="did you mean uniform"):
        Flow.of(model, Training(times="unifrom"))


def test_training_chooses_the_weights_of_the_loss():
    model = Architecture(depth=1, width=32, heads=2, path="gvp", prediction="score")
    flow = Flow.of(model, Training(loss_weight="likelihood", direction_weight=0.3))
    assert (flow.path_name, flow.prediction) == ("gvp", "score")
    assert (flow.weight, flow.direction_weight) == ("likelihood", 0.3)
    plain = Flow.of(model)
    assert (plain.path_name, plain.prediction) == ("gvp", "score")
    assert (plain.weight, plain.direction_weight) == ("none", 0)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("liner", "velocity", "none"), "unknown path 'liner': did you mean linear"),
        (("linear", "velocty", "none"), "did you mean velocity"),
        (("linear", "noise", "velocities"), "did you mean velocity"),
        (("linear", "velocity", "likelihood"), "is for `prediction` noise or score"),
        (("gvp", "data", "none"), "`prediction` data is for `path` linear"),
        (("ddpm", "noise", "none"), "unknown path 'ddpm'"),
    ],
)
def test_what_there_is_not_is_named(names, said):
    with pytest.raises(UserError, match=said):
        Flow(*names)


def test_quantiles_are_those_of_the_papers_times():
    """Half-way is the median, and drawn times fill their shares evenly."""
    flow = Flow()
    assert float(flow.quantiles(torch.tensor(0.5))) == pytest.approx(0.5)
    drawn = torch.stack([logit_normal(generator(i)) for i in range(4000)])
    for share in (0.1, 0.5, 0.8):
        below = (drawn < flow.quantiles(torch.tensor(share))).float().mean()
        assert float(below) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("flow", FLOWS, ids=names)
def test_the_direction_of_a_perfect_output_costs_nothing_and_of_its_opposite_two(flow):
    point = sample(flow)
    right = perfect(flow, point)
    torch.testing.assert_close(flow.direction_error(right, point), torch.zeros(3), atol=1e-5, rtol=0)
    if flow.prediction == "velocity":
        torch.testing.assert_close(flow.direction_error(-right, point), torch.full((3,), 2.0))
        torch.testing.assert_close(flow.direction_error(7 * right, point), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_of_a_model_is_the_squared_error_and_what_the_direction_costs(weight):
    flow, asked = Flow(direction_weight=weight), []
    point = sample(flow)
    output = torch.randn(point.data_TC.shape, generator=torch.Generator().manual_seed(9))
    condition = Condition.of(label=torch.arange(3))

    def model(*inputs):
        asked.append(inputs)
        return output.bfloat16()

    total_B, error_B = flow.loss(model, point, condition)
    assert asked == [(point.x_TC, point.layout, point.t_B, condition)]
    rounded = output.bfloat16()
    torch.testing.assert_close(error_B, flow.squared_error(rounded, point))
    expected = error_B + weight * flow.direction_error(rounded, point)
    torch.testing.assert_close(total_B, expected)
    assert total_B.dtype == error_B.dtype == torch.float32


@pytest.mark.parametrize("flow", FLOWS, ids=names)
def test_what_a_model_says_is_followed_as_a_velocity_at_one_time_and_at_many(flow):
    point = sample(flow, (0.4, 0.4, 0.4))
    velocity = flow.follow(lambda x, t_B: x.bfloat16() * t_B[0], point.layout)
    expected = flow.velocity(point.x_TC.bfloat16() * torch.tensor(0.4), point.x_TC, times_of(point))
    for t in (torch.tensor(0.4), torch.tensor(0.4, dtype=torch.double), point.t_B):
        made = velocity(point.x_TC, t)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("flow", [Flow(path) for path in PATHS], ids=PATHS)
def test_the_score_is_that_of_the_noise_where_the_data_are_known(flow):
    """Of one image's path, x_t ~ N(α·data, σ²): −noise/σ, with the velocity at that point."""
    point = sample(flow)
    sigma = flow.path.coefficients(times_of(point))[1]
    score = flow.score(true_velocity(flow, point), point.x_TC, times_of(point))
    torch.testing.assert_close(score, -point.noise_TC / sigma, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("flow", [Flow(), Flow(prediction="data")], ids=["velocity", "data"])
@pytest.mark.parametrize("solver", [None, "dopri5"])
def test_a_model_that_knows_the_data_makes_them(flow, solver):
    point = sample(flow)
    known = {
        "velocity": lambda x, t_B: point.data_TC - point.noise_TC,
        "data": lambda x, t_B: point.data_TC,
    }[flow.prediction]
    rngs, seen = [generator(i) for i in range(3)], []
    on_step = lambda done, x: seen.append(done) or x  # noqa: E731
    made = flow.generate(known, point.layout, point.noise_TC, rngs, Sampling(solver), on_step)
    torch.testing.assert_close(made, point.data_TC, rtol=1e-4, atol=1e-4)
    assert seen[-1] == 1


@pytest.mark.parametrize("flow", FLOWS, ids=names)
def test_the_expected_data_of_a_perfect_velocity_are_the_data(flow):
    point = sample(flow)
    data_TC = flow.expected_data(true_velocity(flow, point), point.x_TC, times_of(point))
    torch.testing.assert_close(data_TC, point.data_TC, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flow", FLOWS, ids=names)
def test_what_is_known_stays_on_its_path_whatever_the_model_says(flow):
    point = sample(flow, (0.4, 0.4, 0.4))
    where_TC = torch.arange(point.data_TC.numel()).reshape(point.data_TC.shape) % 3 == 0
    seen = []

    def output(x_TC, t_B):
        seen.append(x_TC)
        return torch.zeros_like(x_TC)

    velocity = flow.follow_around(output, point.layout, Known(where_TC, point.data_TC, point.noise_TC))
    found = velocity(torch.zeros_like(point.x_TC), torch.tensor(0.4))
    torch.testing.assert_close(seen[0][where_TC], point.x_TC[where_TC])
    torch.testing.assert_close(found[where_TC], true_velocity(flow, point)[where_TC])
    assert (seen[0][~where_TC] == 0).all()
