import pytest
import torch

from fitv2.errors import UserError
from fitv2.flow import (
    MIN_TIME_TO_DATA,
    PREDICTIONS,
    logit_normal_times,
    loss_per_image,
    noise,
    path_sample,
    prediction_named,
)  # fmt: skip
from fitv2.tokens import layout


def sample(times=(0.0, 0.4, 1.0)):
    packed = layout([(2, 2), (1, 3), (2, 1)])
    data, start = noise(packed.lengths, 5, [(0,), (1,), (2,)]), noise(packed.lengths, 5, [(3,), (4,), (5,)])
    return path_sample(packed.with_tokens(data), start, torch.tensor(times))


def test_path_goes_from_noise_to_data():
    point = sample()
    parts = [x.split(point.noisy.lengths) for x in (point.noisy.x_TC, point.noise_TC, point.data_TC)]
    (first, middle, last), start, data = parts
    torch.testing.assert_close(first, start[0])
    torch.testing.assert_close(middle, 0.4 * data[1] + 0.6 * start[1])
    torch.testing.assert_close(last, data[2])


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_perfect_output_gives_the_velocity_and_no_loss(name):
    point, prediction = sample((0.1, 0.4, 0.9)), prediction_named(name)
    perfect = {"velocity": point.data_TC - point.noise_TC, "data": point.data_TC}[name]
    velocity = prediction.velocity(perfect, point.noisy, point.t_B)
    torch.testing.assert_close(velocity, point.data_TC - point.noise_TC, rtol=1e-4, atol=1e-4)
    assert loss_per_image(perfect, point, prediction).abs().max() == 0


@pytest.mark.parametrize("name", PREDICTIONS)
def test_loss_is_the_velocity_error_of_each_image(name):
    point, prediction = sample((0.1, 0.4, 0.9)), prediction_named(name)
    output = torch.randn(point.data_TC.shape, generator=torch.Generator().manual_seed(9))
    error = prediction.velocity(output, point.noisy, point.t_B) - (point.data_TC - point.noise_TC)
    expected = torch.stack([image.square().mean() for image in error.split(point.noisy.lengths)])
    torch.testing.assert_close(loss_per_image(output, point, prediction), expected, rtol=1e-4, atol=1e-4)


def test_an_euler_step_to_the_data_ends_at_the_prediction():
    point, prediction = sample((0.3, 0.96, 0.999)), PREDICTIONS["data"]
    output = torch.randn(point.data_TC.shape, generator=torch.Generator().manual_seed(9))
    velocity = prediction.velocity(output, point.noisy, point.t_B)
    ended = point.noisy.x_TC + point.noisy.spread(1 - point.t_B)[:, None] * velocity
    torch.testing.assert_close(ended, output, rtol=1e-4, atol=1e-4)


def test_data_prediction_stays_finite_at_the_data():
    point, prediction = sample((1.0, 1.0, 1.0)), PREDICTIONS["data"]
    output = point.data_TC + 1
    torch.testing.assert_close(
        loss_per_image(output, point, prediction), torch.full((3,), MIN_TIME_TO_DATA**-2)
    )


def test_logit_normal_times_are_the_sigmoid_of_a_normal():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    times = logit_normal_times(normal, mean=-0.6, std=0.8)
    logits = torch.log(times / (1 - times))
    assert logits.mean().item() == pytest.approx(-0.6, abs=0.01)
    assert logits.std().item() == pytest.approx(0.8, abs=0.01)


def test_an_image_has_the_same_noise_in_any_company():
    together = noise([4, 6], 3, [(7,), (8,)])
    assert torch.equal(together[4:], noise([6], 3, [(8,)]))


def test_unknown_prediction_names_the_nearest():
    with pytest.raises(UserError, match="did you mean velocity"):
        prediction_named("velocty")
