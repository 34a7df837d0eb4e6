"""Every extension that docs/guides/extending.md shows really works, and takes the lines that it says."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import GAUSSIAN_MEAN, GAUSSIAN_STD, gaussian, noise_of, randomized
from fitv2.checkpoint import load_model
from fitv2.conditioning import EMBEDDERS, Condition
from fitv2.config import Guidance, Rope, Sampling
from fitv2.data import TokenDataset
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.guidance import guide
from fitv2.diffusion.objective import OBJECTIVES, objective_of
from fitv2.diffusion.paths import PATHS
from fitv2.diffusion.solvers import FIXED, fixed
from fitv2.diffusion.transport import transport
from fitv2.encoding.kinds import KINDS
from fitv2.model import FiT
from fitv2.rope import METHODS, scaled_frequencies
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout
from fitv2.training.run_folder import read_log

PAGE = (Path(__file__).parents[1] / "docs" / "guides" / "extending.md").read_text(encoding="utf-8")
TINY = {"depth": 1, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 4, "num_classes": 3}
LAYOUT = Layout.of([(2, 3), (4, 2)])
LABELS = Condition.of(label=torch.tensor([0, 2]))
TIMES = torch.tensor([0.3, 0.6])


def code_of(section):
    """The Python that the page shows under a heading."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def run(section):
    """Run it; the names that it leaves."""
    names = {"__name__": "page"}
    exec(compile(code_of(section), section, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def workplace(folder, tokens, tmp_path, monkeypatch):
    """A folder with images and tokens; registries lose what a test added."""
    (tmp_path / "images").symlink_to(folder)
    (tmp_path / "tokens").symlink_to(tokens)
    monkeypatch.chdir(tmp_path)
    tables = [(table, dict(table)) for table in (FIXED, PATHS, METHODS, OBJECTIVES, EMBEDDERS, KINDS)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


@torch.no_grad()
def make(model, condition=LABELS, steps=4):
    """Clean tokens for `LAYOUT` with the model's own objective."""
    objective = objective_of(model.architecture)
    output = guide(model, LAYOUT, condition, Guidance(2.0), objective)
    rngs = [generator(0), generator(1)]
    noise_TC = noise_of(LAYOUT, model.token_channels)
    return objective.generate(output, LAYOUT, noise_TC, rngs, Sampling(steps=steps))


def losses_of(run):
    return [line["loss"] for line in read_log(Path(run) / "log.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    ("section", "link"),
    re.findall(r"\| \[(an? .+?)\]\(#(.+?)\) \|", PAGE),
)
def test_the_page_counts_its_lines(section, link):
    """Statements after the imports, up to the entry in the table."""
    row = next(line for line in PAGE.splitlines() if f"(#{link})" in line)
    table, said = re.findall(r"`fitv2\.\S+\.(\w+)` \| (\d+)", row)[0]
    code = code_of(section[0].upper() + section[1:])
    body = [node for node in ast.parse(code).body if not isinstance(node, ast.Import | ast.ImportFrom)]
    last = next(i for i, node in enumerate(body) if ast.unparse(node).startswith(f"{table}["))
    lines = code.splitlines()[body[0].lineno - 1 : body[last].end_lineno]
    assert sum(bool(line.strip()) for line in lines) == int(said)


def test_a_solver_has_the_order_that_it_says():
    image = run("A solver")["image"]
    assert (image.height, image.width) == (48, 64)
    method, errors = FIXED["ralston"], []
    for steps in (8, 16):
        end = fixed(method, lambda x, _: x, torch.ones(1), torch.linspace(0, 1, steps + 1))
        errors.append(abs(float(end) - np.e))
    assert errors[0] / errors[1] == pytest.approx(2**method.order, rel=0.15)


def test_a_path_is_trained_on_and_followed():
    run("A path")
    path, t = PATHS["smoothstep"], torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    (alpha, sigma), (alpha_rate, sigma_rate) = path.coefficients(t), path.derivatives(t)
    torch.testing.assert_close(torch.autograd.grad(alpha.sum(), t, retain_graph=True)[0], alpha_rate)
    torch.testing.assert_close(torch.autograd.grad(sigma.sum(), t)[0], sigma_rate)
    torch.testing.assert_close(path.growth(t), alpha_rate / alpha)
    torch.testing.assert_close(path.score_rate(t), alpha_rate / alpha * sigma**2 - sigma * sigma_rate)
    assert np.isfinite(losses_of("runs/smoothstep")).all()
    model, _ = load_model("runs/smoothstep")
    assert objective_of(model.architecture).path is path
    assert make(model, Condition.of(label=torch.tensor([0, 1]))).isfinite().all()
    # The flow between two Gaussians ends where it is known to, along any path.
    flow, noise_TC = Flow("smoothstep"), noise_of(LAYOUT, 4)
    rngs = [generator(0), generator(1)]
    end = transport(flow, gaussian(flow, LAYOUT), LAYOUT, noise_TC, rngs, Sampling("rk4", steps=40))
    torch.testing.assert_close(end, GAUSSIAN_MEAN + GAUSSIAN_STD * noise_TC, rtol=1e-3, atol=1e-3)


def test_an_extrapolation_method_scales_larger_images_alone():
    image = run("An extrapolation method")["image"]
    assert (image.height, image.width) == (64, 192)
    rope = Rope("halfway", train_side=4)
    small, large = scaled_frequencies(rope, torch.tensor([[4, 4], [4, 16]]), 8)
    torch.testing.assert_close(large[0], small[0])
    torch.testing.assert_close(large[1], small[1] / 2)
    model, wide = randomized(FiT(**TINY)), Layout.of([(1, 9)])
    inputs = noise_of(wide, 4), wide, TIMES[:1], LABELS.select([0])
    assert (model.with_rope(rope)(*inputs) - model(*inputs)).abs().max() > 1e-4


def test_an_objective_is_trained_with_its_own_loss():
    objective_class = run("An objective")["StraightFlow"]
    assert np.isfinite(losses_of("runs/straight")).all()
    model, _ = load_model("runs/straight")
    assert isinstance(objective_of(model.architecture), objective_class)
    assert make(model, Condition.of(label=torch.tensor([0, 1]))).isfinite().all()
    model = randomized(FiT(**TINY, objective="straight"))
    ours, usual = objective_of(model.architecture), Flow.of(model.architecture)
    sample = ours.add_noise(noise_of(LAYOUT, 4), LAYOUT, noise_of(LAYOUT, 4, first=9), TIMES)
    (total_B, error_B), plain = ours.loss(model, sample, LABELS), usual.loss(model, sample, LABELS)
    assert (total_B > plain.total_B).all()
    torch.testing.assert_close(error_B, plain.error_B)


def test_a_condition_changes_the_output_and_can_be_left_out():
    names = run("A condition")
    assert names["output_TC"].shape == (10, names["model"].token_channels)
    model = randomized(FiT(**TINY, conditions=("label", "colour"))).eval()
    assert "colour_embed.linear.weight" in model.state_dict()

    def output(condition):
        return model(noise_of(LAYOUT, 4), LAYOUT, TIMES, condition)

    red, second_blue = (
        Condition.of(label=torch.tensor([0, 2]), colour=torch.tensor(colours))
        for colours in ([[1.0, 0, 0], [1.0, 0, 0]], [[1.0, 0, 0], [0, 0, 1.0]])
    )
    difference = (output(red) - output(second_blue)).abs()
    assert difference[:6].max() == 0
    assert difference[6:].max() > 1e-4
    torch.testing.assert_close(output(red.null()), output(second_blue.null()))
    assert (output(red) - output(red.null())).abs().max() > 1e-4
    assert make(model, red).isfinite().all()
    assert not torch.allclose(make(model, red), make(model, second_blue))


def test_a_source_becomes_tokens(tokens):
    run("A source")
    ours, usual = TokenDataset("from-zip"), TokenDataset(tokens)
    assert ours.card.about.labels == usual.card.about.labels
    assert ours.card.pictures == {"train": 12}
    packed, condition = ours.batch(ours.first_rows)
    by_name = {name: row for row, name in zip(usual.first_rows, usual.sources(usual.first_rows), strict=True)}
    same = [by_name[name] for name in ours.sources(ours.first_rows)]
    expected, labels = usual.batch(same)
    assert torch.equal(packed.x_TC, expected.x_TC)
    assert torch.equal(condition.values["label"], labels.values["label"])
