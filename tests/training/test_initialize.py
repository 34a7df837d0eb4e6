import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import held_out_set, together
from fitv2.checkpoint import load_model, save_model
from fitv2.conditioning import Text
from fitv2.config import Encoding, Guidance, Rope
from fitv2.data.dataset import TokenDataset
from fitv2.encoding.encode import encode
from fitv2.errors import UserError
from fitv2.pipeline import FiTPipeline
from fitv2.presets import preset
from fitv2.runtime.rng import generator
from fitv2.training.initialize import give_texts, shape_of_initial
from fitv2.training.run_folder import read_log
from fitv2.training.trainer import Trainer, train

DEBUG = preset("debug")


def settings(**changes):
    return replace(DEBUG, training=replace(DEBUG.training, **changes))


def test_continuing_another_model(tokens, tmp_path):
    train(settings(steps=2), tokens, tmp_path / "first")
    dataset = TokenDataset(tokens)
    trainer = Trainer(settings(steps=1), dataset, tokens, tmp_path / "second", str(tmp_path / "first"))
    expected = load_model(tmp_path / "first")[0]
    for held in (trainer.weights.master, trainer.weights.ema):
        for one, other in zip(held.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)
    wider = replace(settings(steps=1), model=replace(DEBUG.model, width=64))
    with pytest.raises(UserError, match="another width"):
        train(wider, tokens, tmp_path / "third", init=str(tmp_path / "first"))
    assert not (tmp_path / "third").exists()


def test_post_training_needs_a_trained_model(tokens, tmp_path):
    with pytest.raises(UserError, match=r"`trainable` post-training trains a part of .*: give `init`"):
        train(settings(steps=1, trainable="post-training"), tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_started_from_a_post_trained_model_keeps_its_positions(tokens, tmp_path):
    rope = Rope("ntk", train_side=4)
    scaled = replace(settings(steps=1), model=replace(DEBUG.model, rope=rope))
    train(scaled, tokens, tmp_path / "first")
    train(settings(steps=1), tokens, tmp_path / "second", init=str(tmp_path / "first"))
    assert load_model(tmp_path / "second")[0].architecture.rope == rope
    assert (
        json.loads((tmp_path / "second" / "run.json").read_text())["model"]["rope"]["extrapolation"] == "ntk"
    )


def any_step(**changes):
    chosen = preset("any-step")
    small = {"steps": 6, "batch_size": 4, "precision": "float32", "decay_steps": 0, "warmup_steps": 2}
    often = {"log_every": 1, "validate_every": 3, "sample_every": 3, "save_every": 3, "curriculum_steps": 4}
    return replace(chosen, training=replace(chosen.training, **small | often | changes))


@pytest.fixture(scope="module")
def flow(tokens, tmp_path_factory):
    """A run of a flow that predicts velocity, of a shape of its own."""
    run = tmp_path_factory.mktemp("flow") / "run"
    train(replace(settings(steps=2), model=replace(DEBUG.model, depth=3, prediction="velocity")), tokens, run)
    return run


def test_a_flow_becomes_an_any_step_model_of_its_shape_and_few_steps(tokens, flow, tmp_path):
    train(any_step(), tokens, tmp_path / "run", init=str(flow))
    model, card = load_model(tmp_path / "run")
    assert (model.architecture.depth, model.architecture.objective) == (3, "any-step")
    assert card.guidance == 1.0
    pipe = FiTPipeline.from_pretrained(str(tmp_path / "run"))
    evaluations = []
    pipe.transformer.register_forward_hook(lambda *_: evaluations.append(1))
    pipe(0, height=16, width=24)
    assert len(evaluations) == 4
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


def test_an_any_step_model_starts_as_its_flow(tokens, flow, tmp_path):
    preset_of_flow = shape_of_initial(any_step(), str(flow))
    trainer = Trainer(preset_of_flow, TokenDataset(tokens), tokens, tmp_path / "run", str(flow))
    expected = load_model(flow)[0]
    for one, other in zip(trainer.weights.master.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_any_step_run_resumes_to_the_last_bit(tokens, flow, tmp_path, precision):
    whole = train(any_step(precision=precision), tokens, tmp_path / "whole", init=str(flow))
    train(any_step(precision=precision, steps=3), tokens, tmp_path / "parts", init=str(flow))
    parts = train(any_step(precision=precision), tokens, tmp_path / "parts", init=str(flow))
    for one, other in zip(*(load_model(run / "ema")[0].parameters() for run in (whole, parts)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("size", "fsdp_size"), [(2, 1), (2, 2)])
def test_several_processes_train_the_same_any_step_model(tokens, flow, tmp_path, size, fsdp_size):
    """With so few images some have none that jumps, or none with a label."""
    wanted = any_step(batch_size=3, label_dropout=0.5, grad_accum_steps=2)
    shared = replace(wanted, training=replace(wanted.training, fsdp_size=fsdp_size))
    train(wanted, tokens, tmp_path / "alone", init=str(flow))
    said = together(size, lambda _: train(shared, tokens, tmp_path / "run", init=str(flow)) and None)
    assert said == [None] * size
    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("alone", "run")]
    curves = [[line["loss"] for line in log if "loss" in line] for log in logs]
    np.testing.assert_allclose(*curves, rtol=1e-3)


def test_compiled_blocks_learn_any_steps(tokens, flow, tmp_path):
    """In a process of its own: other tests fork, which what a compiler loads does not like."""
    eager = train(any_step(steps=2), tokens, tmp_path / "eager", init=str(flow))
    command = [sys.executable, "-m", "fitv2", "train", "any-step", "--init", flow, "--data", tokens]
    command += ["--out", tmp_path / "compiled", "--compile", "--steps", "2", "--batch-size", "4"]
    command += ["--precision", "float32", "--decay-steps", "0", "--warmup-steps", "2"]
    subprocess.run([*command, "--curriculum-steps", "4"], check=True)
    models = [load_model(run)[0] for run in (eager / "ema", tmp_path / "compiled")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_an_any_step_model_needs_a_flow_that_predicts_velocity(tokens, tmp_path):
    with pytest.raises(UserError, match="makes a trained flow one of few steps: give `init`"):
        train(any_step(), tokens, tmp_path / "run")
    train(settings(steps=1), tokens, tmp_path / "data")  # predicts data
    with pytest.raises(UserError, match="is for `path` linear and `prediction` velocity"):
        train(any_step(), tokens, tmp_path / "run", init=str(tmp_path / "data"))
    assert not (tmp_path / "run").exists()


def test_an_early_head_is_trained_alone_beside_a_frozen_model(tokens, flow, tmp_path):
    headed = replace(DEBUG.model, depth=3, prediction="velocity", early_head=1)
    alone = replace(settings(steps=3, trainable="early-head", learning_rate=1e-2), model=headed)
    with pytest.warns(UserWarning, match="^early start at random"):
        train(alone, tokens, tmp_path / "run", init=str(flow))
    trained, given = load_model(tmp_path / "run")[0].state_dict(), load_model(flow)[0].state_dict()
    assert all(torch.equal(trained[name], value) for name, value in given.items())
    assert trained["early.out.weight"].abs().max() > 0
    kept = [next(run.glob("checkpoints/*/ema/diffusion*.safetensors")) for run in (tmp_path / "run", flow)]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    with pytest.raises(UserError, match="`trainable` early-head trains a second head: give `early_head`"):
        train(settings(trainable="early-head"), tokens, tmp_path / "no", init=str(flow))


def test_an_early_head_is_trained_with_its_model_and_guides_its_samples(tokens, tmp_path):
    quick = settings(steps=6, learning_rate=0.02, ema_decay=0.1)
    headed = replace(quick, model=replace(DEBUG.model, depth=3, early_head=1))
    train(headed, tokens, tmp_path / "run")
    train(replace(quick, model=replace(DEBUG.model, depth=3)), tokens, tmp_path / "without")
    pairs = [load_model(tmp_path / name)[0].state_dict() for name in ("run", "without")]
    assert not torch.equal(*(each["blocks.0.mlp.down.weight"] for each in pairs))
    assert pairs[0]["early.out.weight"].abs().max() > 0
    pipe = FiTPipeline.from_pretrained(str(tmp_path / "run"))
    plain, guided = (
        pipe(0, height=16, width=16, guidance=Guidance(1.0, internal_scale=w), generator=generator(0),
             output_type="np").images
        for w in (1.0, 3.0)
    )  # fmt: skip
    assert not np.array_equal(plain, guided)


def test_an_early_head_alone_changes_nothing_else_whatever_the_data_are(tokens, folder, flow, tmp_path):
    """Other labels would make an embedding anew, and leave it there."""
    shutil.copytree(folder, tmp_path / "images")
    for path in sorted((tmp_path / "images").iterdir()):
        path.rename(path.with_name(f"other {path.name}"))
    encode(tmp_path / "images", tmp_path / "others", Encoding(max_tokens=(16,)), workers=0)
    headed = replace(DEBUG.model, depth=3, prediction="velocity", early_head=1)
    alone = replace(settings(steps=1, trainable="early-head"), model=headed)
    with pytest.raises(UserError, match="it has another early_head, labels"):
        train(alone, tmp_path / "others", tmp_path / "run", init=str(flow))
    with pytest.raises(UserError, match="an early head learns nothing with `early_weight` 0"):
        zero = replace(alone, training=replace(alone.training, early_weight=0.0))
        train(zero, tokens, tmp_path / "run", init=str(flow))


def test_an_early_head_is_kept_where_it_was_and_made_anew_elsewhere(tokens, flow, tmp_path):
    headed = replace(DEBUG.model, depth=3, prediction="velocity", early_head=1)
    with pytest.warns(UserWarning, match="^early start at random"):
        train(replace(settings(steps=2), model=headed), tokens, tmp_path / "first", init=str(flow))
    first = str(tmp_path / "first")
    with pytest.warns(UserWarning, match="^early start at random"):
        train(
            replace(settings(steps=1), model=replace(headed, early_head=2)),
            tokens,
            tmp_path / "b",
            init=first,
        )
    with pytest.warns(UserWarning, match="early head of the initial model is left out"):
        train(
            replace(settings(steps=1), model=replace(headed, early_head=0)),
            tokens,
            tmp_path / "c",
            init=first,
        )
    with pytest.warns(UserWarning, match="early head of the initial model is left out"):
        train(any_step(steps=4), tokens, tmp_path / "few", init=first)
    assert load_model(tmp_path / "few")[0].architecture.early_head == 0


def test_an_any_step_model_has_the_shape_of_its_flow_and_positions_of_ones_choice(tokens, flow, tmp_path):
    chosen, rope = any_step(), Rope("ntk", train_side=4)
    with pytest.raises(UserError, match="`depth` cannot be chosen"):
        train(replace(chosen, model=replace(chosen.model, depth=5)), tokens, tmp_path / "a", init=str(flow))
    with pytest.raises(UserError, match="`early_head` is not for `objective` any-step"):
        shape_of_initial(replace(chosen, model=replace(chosen.model, early_head=1)), str(flow))
    scaled = replace(chosen, model=replace(chosen.model, rope=rope))
    assert shape_of_initial(scaled, str(flow)).model.rope == rope
    with pytest.warns(UserWarning, match="reach 40% of their length"):
        shape_of_initial(any_step(steps=2, curriculum_steps=5), str(flow))


def test_variants_of_an_image_may_have_captions_of_their_own(tokens):
    class Encoder:
        name, channels, pooled_channels = "none", 4, 4

        def encode(self, captions):
            return Text.of([(torch.randn(2, 4), torch.randn(4)) for _ in captions])

    dataset = TokenDataset(tokens)
    rows = np.arange(len(dataset.lengths))
    dataset.captions = lambda rows: [f"row {row}" for row in rows]
    dataset.store = SimpleNamespace(is_local=False)  # nothing is kept beside the tokens
    give_texts(dataset, Encoder())
    assert len(dataset.texts.captions) == len(rows) > len(dataset.first_rows)


def test_a_run_keeps_the_guidance_of_the_model_that_it_starts_from(tokens, flow, tmp_path):
    model, card = load_model(flow)
    save_model(model, replace(card, guidance=3.5), tmp_path / "model")
    same = replace(DEBUG.model, depth=3, prediction="velocity")
    train(replace(settings(steps=1), model=same), tokens, tmp_path / "run", init=str(tmp_path / "model"))
    assert load_model(tmp_path / "run")[1].guidance == 3.5
    train(any_step(learned_guidance=1.0, steps=4), tokens, tmp_path / "few", init=str(tmp_path / "model"))
    assert load_model(tmp_path / "few")[1].guidance == 3.5


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"lora": 2}])
def test_any_steps_are_learned_in_other_ways_too(tokens, flow, tmp_path, how):
    train(any_step(steps=4, **how), tokens, tmp_path / "run", init=str(flow))
    trained, given = load_model(tmp_path / "run")[0], load_model(flow)[0]
    pairs = zip(trained.parameters(), given.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_held_out_pictures_are_judged_by_all_that_a_model_says(folder, tmp_path):
    """An early head, and the steps of an any-step model, beside the model itself."""
    data = held_out_set(folder, tmp_path)
    quick = settings(steps=2, validate_every=1)
    headed = replace(quick, model=replace(DEBUG.model, depth=3, prediction="velocity", early_head=1))
    train(headed, data, tmp_path / "headed")
    plain = replace(headed, model=replace(headed.model, early_head=0))
    train(plain, data, tmp_path / "flow")
    train(any_step(steps=2, validate_every=1), data, tmp_path / "jumps", init=str(tmp_path / "flow"))
    for run, more in (("headed", "validation_early"), ("flow", None), ("jumps", "validation_jump")):
        lines = [line for line in read_log(tmp_path / run / "log.jsonl") if "validation" in line]
        assert len(lines) == 2
        names = {name for name in lines[0] if name.startswith("validation") and "by_time" not in name}
        assert names == {"validation", more} - {None}
        assert all(math.isfinite(line[name]) for line in lines for name in names)
        assert (tmp_path / run / "loss.png").stat().st_size > 10_000
