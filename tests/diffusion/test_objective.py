"""What every objective promises, whatever it is: a new entry of the table is tested by being there."""

from dataclasses import asdict, replace

import pytest
import torch

from conftest import noise_of, randomized
from fitv2.conditioning import Condition
from fitv2.config import Architecture, Guidance, Sampling, Training
from fitv2.diffusion.ddpm import DDPM
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.guidance import guide
from fitv2.diffusion.objective import OBJECTIVES, objective_of
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout

TINY = {"depth": 2, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}
NEEDS = {"ddpm": {"path": "ddpm", "prediction": "noise"}}  # where the defaults do not fit
LAYOUT = Layout.of([(2, 2), (1, 3), (3, 2)])
CONDITION = Condition.of(label=torch.tensor([3, 1, 4])).drop(torch.tensor([False, True, False]))
DATA, NOISE = noise_of(LAYOUT, 6), noise_of(LAYOUT, 6, first=3)

every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def architecture_of(name):
    return Architecture(**TINY, objective=name, **NEEDS.get(name, {}))


def made(name, training=None):
    """A model for an objective, and the objective."""
    model = randomized(FiT(**asdict(architecture_of(name)))).eval()
    return model, objective_of(model.architecture, training)


def times_of(objective):
    return torch.stack([objective.draw_times(generator(i), 0)[0] for i in range(len(LAYOUT))])


# Where the times of a flow are not all that is drawn.
OF_A_FLOW = {"any-step": Training(jump_share=0.0)}


def rms(value):
    return value.square().mean().sqrt().item()


@every_objective
def test_the_loss_is_a_finite_number_for_each_image(name):
    model, objective = made(name, Training())
    sample = objective.add_noise(DATA, LAYOUT, NOISE, times_of(objective))
    for loss_B in objective.loss(model, sample, CONDITION):
        assert loss_B.shape == (3,)
        assert loss_B.dtype == torch.float32
        assert loss_B.isfinite().all()


@every_objective
def test_every_weight_learns_from_the_loss(name):
    model, objective = made(name, Training())
    sample = objective.add_noise(DATA, LAYOUT, NOISE, times_of(objective))
    objective.loss(model, sample, CONDITION).total_B.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@every_objective
def test_only_what_is_learned_of_an_image_counts(name):
    """A weight for each token: all alike changes nothing, and where it is zero the output may be anything."""
    model, objective = made(name, Training())
    sample = objective.add_noise(DATA, LAYOUT, NOISE, times_of(objective))
    whole = objective.loss(model, sample, CONDITION)
    even = objective.loss(model, replace(sample, learned_T=torch.full((LAYOUT.tokens,), 0.4)), CONDITION)
    for ours, expected in zip(even, whole, strict=True):
        torch.testing.assert_close(ours, expected)
    learned_T = torch.ones(LAYOUT.tokens)
    learned_T[0] = learned_T[-1] = 0

    def elsewhere(*given, **more):
        output = model(*given, **more).clone()
        return output + 100 * (1 - learned_T)[:, None] if len(output) == LAYOUT.tokens else output

    for one, other in zip(
        objective.loss(model, replace(sample, learned_T=learned_T), CONDITION),
        objective.loss(elsewhere, replace(sample, learned_T=learned_T), CONDITION),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(objective.loss(elsewhere, sample, CONDITION).error_B[0], whole.error_B[0])


@every_objective
def test_a_loss_does_not_depend_on_the_neighbours(name):
    model, objective = made(name, Training())
    t_B = times_of(objective)
    sample = objective.add_noise(DATA, LAYOUT, NOISE, t_B)
    together = objective.loss(model, sample, CONDITION)
    pieces = zip(DATA.split(LAYOUT.lengths), NOISE.split(LAYOUT.lengths), strict=True)
    for i, (data, noise) in enumerate(pieces):
        one = objective.add_noise(data, LAYOUT.select([i]), noise, t_B[i : i + 1])
        alone = objective.loss(model, one, CONDITION.select([i]))
        for ours, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(ours, expected[i : i + 1], rtol=1e-5, atol=1e-5)


@every_objective
def test_progress_runs_from_noise_to_data(name):
    objective = made(name)[1]
    t_B = objective.quantiles(torch.tensor([1e-6, 0.5, 1 - 1e-6]))
    progress_B = objective.progress(t_B)
    assert 0 <= progress_B[0] < 0.01
    assert progress_B[1].item() == pytest.approx(0.5, abs=1e-3)
    assert 0.99 < progress_B[2] <= 1
    sample = objective.add_noise(DATA, LAYOUT, NOISE, t_B)
    (near_noise, _, near_data), data, noise = (
        x.split(LAYOUT.lengths) for x in (sample.x_TC, sample.data_TC, sample.noise_TC)
    )
    assert rms(near_noise - noise[0]) < 0.03
    assert rms(near_data - data[2]) < 0.03


@every_objective
def test_noise_is_added_to_each_image_at_its_own_time_and_the_sample_says_what_was_there(name):
    objective = made(name)[1]
    t_B = objective.quantiles(torch.tensor([0.2, 0.9, 0.5]))
    sample = objective.add_noise(DATA, LAYOUT, NOISE, t_B)
    assert torch.equal(sample.data_TC, DATA)
    assert torch.equal(sample.noise_TC, NOISE)
    assert torch.equal(sample.t_B, t_B)
    assert sample.layout is LAYOUT
    assert sample.x_TC.dtype == torch.float32
    rest = (sample.x_TC - DATA).square().mean(1)
    assert LAYOUT.mean_per_image(rest).argsort().tolist() == [1, 2, 0]


@every_objective
def test_times_of_training_lie_on_the_way_and_follow_from_the_generator(name):
    objective = made(name, OF_A_FLOW.get(name, Training()))[1]
    drawn = torch.stack([objective.draw_times(generator(i), 0)[0] for i in range(200)])
    assert torch.equal(drawn[:3], times_of(objective))
    progress = objective.progress(drawn)
    assert progress.min() >= 0
    assert progress.max() <= 1
    assert progress.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert progress.float().std() > 0.1


@every_objective
def test_times_of_validation_do_not_depend_on_how_a_model_is_trained(name):
    shares = torch.linspace(0.001, 0.999, 99)
    expected = made(name)[1].quantiles(shares)
    assert (made(name)[1].progress(expected).diff() > 0).all()
    for training in (Training(), Training(times="uniform"), Training(time_mean=-2.0, time_std=0.3, seed=3)):
        assert torch.equal(made(name, training)[1].quantiles(shares), expected)


def generated(name, images, seen=None, scale=2.0):
    model, objective = made(name)
    layout = LAYOUT.select(images)
    x = torch.cat([NOISE.split(LAYOUT.lengths)[i] for i in images])
    output = guide(model, layout, CONDITION.select(images), Guidance(scale), objective)
    rngs = [generator(9, i) for i in images]
    seen = [] if seen is None else seen
    with torch.no_grad():
        return objective.generate(
            output, layout, x, rngs, Sampling(steps=4), lambda done, x: seen.append(done) or x
        )


@every_objective
def test_images_are_made_in_few_steps(name):
    seen = []
    x = generated(name, [0, 1, 2], seen)
    assert x.shape == DATA.shape
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert not torch.allclose(x, NOISE)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


@every_objective
def test_an_image_does_not_depend_on_those_made_beside_it(name):
    together = generated(name, [0, 1, 2]).split(LAYOUT.lengths)
    for images in ([1], [2, 0]):
        expected = torch.cat([together[i] for i in images])
        torch.testing.assert_close(generated(name, images), expected, rtol=1e-4, atol=1e-4)


@every_objective
def test_a_solver_that_does_not_fit_is_refused(name):
    model, objective = made(name)
    output = guide(model, LAYOUT, CONDITION, Guidance())
    rngs = [generator(i) for i in range(3)]
    with pytest.raises(UserError, match=r"unknown solver 'none-such'|none-such follows a flow"):
        objective.generate(output, LAYOUT, NOISE, rngs, Sampling("none-such"))


def test_a_path_has_its_objective_where_none_is_named():
    assert isinstance(objective_of(Architecture(**TINY)), Flow)
    assert isinstance(objective_of(Architecture(**TINY, path="gvp", prediction="score")), Flow)
    assert isinstance(objective_of(Architecture(**TINY, path="ddpm", prediction="noise")), DDPM)


@pytest.mark.parametrize(
    ("changes", "training", "said"),
    [
        ({"objective": "flwo"}, {}, "unknown objective 'flwo': did you mean flow"),
        ({"objective": "dpm"}, {}, "did you mean ddpm"),
        ({"path": "liner"}, {}, "unknown path 'liner': did you mean linear"),
        ({"prediction": "scores"}, {}, "unknown prediction 'scores': did you mean score"),
        ({}, {"times": "unifrom"}, "unknown distribution of times 'unifrom': did you mean uniform"),
        ({"prediction": "noise"}, {"loss_weight": "velocty"}, "unknown loss weight 'velocty': did you mean"),
        ({}, {"loss_weight": "velocity"}, "is for `prediction` noise or score"),
        ({"path": "gvp", "prediction": "data"}, {}, "`prediction` data is for `path` linear"),
        ({"path": "ddpm"}, {}, "with `path` ddpm a model predicts noise"),
        ({"path": "ddpm", "prediction": "noise", "time_shift": 2.0}, {}, "its times are not shifted"),
        ({"path": "ddpm", "prediction": "noise"}, {"direction_weight": 0.5}, "`direction_weight` is for"),
    ],
)
def test_what_there_is_not_and_what_does_not_fit_is_refused(changes, training, said):
    with pytest.raises(UserError, match=said):
        objective_of(Architecture(**TINY, **changes), Training(**training))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "ddpm", "path": "linear", "prediction": "noise"}, "has a path of its own"),
        ({"objective": "flow", "path": "ddpm", "prediction": "noise"}, "`path` ddpm is for `objective` ddpm"),
    ],
)
def test_an_objective_and_a_path_of_another_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        objective_of(Architecture(depth=1, width=32, heads=2, **settings))
