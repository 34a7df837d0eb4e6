import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import FORK, held_out_set, randomized, together
from fitv2.checkpoint import WEIGHTS, checkpoints, load_model, newest_checkpoint
from fitv2.cli.commands import run as run_command
from fitv2.config import Encoding, Rope, Sampling
from fitv2.conversion.released import to_released
from fitv2.data.dataset import Steps, TokenDataset
from fitv2.data.packing import FixedCount
from fitv2.encoding.encode import encode
from fitv2.errors import UserError
from fitv2.pipeline import FiTPipeline
from fitv2.presets import preset
from fitv2.runtime.rng import generator
from fitv2.training.checkpointing import Saver
from fitv2.training.noising import Reading, drawn_batches
from fitv2.training.optim import freeze
from fitv2.training.run_folder import read_log
from fitv2.training.trainer import Trainer, train

DEBUG = preset("debug")


def settings(**changes):
    return replace(DEBUG, training=replace(DEBUG.training, **changes))


def tensors(checkpoint):
    """All that a checkpoint of one process holds."""
    (state,) = (checkpoint / "state").glob("*.safetensors")
    return [*load_file(state).values(), *load_file(checkpoint / "ema" / WEIGHTS).values()]


def measured(name):
    """Whether a quantity is of the machine, not of the training."""
    return name.startswith("speed/") or name == "memory_gib"


@pytest.mark.parametrize("how", [
    {"precision": "float32", "optimizer": "adamw"},
    {"precision": "bfloat16", "optimizer": "muon"},
    {"optimizer": "muon", "muon_every": 2, "clean_share": 0.25, "batch_rampup_steps": 4},
], ids=lambda how: "-".join(map(str, how.values())))  # fmt: skip
def test_six_steps_equal_three_and_three(tokens, tmp_path, how):
    whole = train(settings(steps=6, **how), tokens, tmp_path / "whole")
    train(settings(steps=3, **how), tokens, tmp_path / "parts")
    parts = train(settings(steps=6, **how), tokens, tmp_path / "parts")
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["step-0000003", "step-0000006"]
    for one, other in zip(tensors(whole), tensors(parts), strict=True):
        assert torch.equal(one, other)
    logs = [
        [{k: v for k, v in json.loads(line).items() if not measured(k)} for line in file.open()]
        for file in (tmp_path / "whole" / "log.jsonl", tmp_path / "parts" / "log.jsonl")
    ]
    assert logs[0] == logs[1]


def test_the_same_run_writes_the_same_bytes(tokens, tmp_path):
    """Also what files say of themselves, which safetensors writes in any order."""
    folders = [train(settings(steps=3), tokens, tmp_path / name) for name in ("one", "two", "three")]
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    ]
    assert len(files[0]) >= 6
    assert files[0] == files[1] == files[2]


def test_a_stop_signal_saves_and_leaves(tokens, tmp_path):
    def stop(progress):
        if progress.step == 2:
            signal.raise_signal(signal.SIGTERM)

    train(settings(steps=50), tokens, tmp_path / "run", report=stop)
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step-0000002"


def test_it_learns(tokens, tmp_path):
    """Four images, many steps: the loss of the same batch must fall far below where it began."""
    losses = []
    train(
        settings(steps=150, warmup_steps=5, learning_rate=3e-3, save_every=1000, sample_every=1000),
        tokens, tmp_path / "run", report=lambda progress: losses.append(progress.loss),
    )  # fmt: skip
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def test_a_run_folder_holds_what_people_look_for(tokens, tmp_path):
    run = tmp_path / "run"
    train(settings(steps=4, save_every=2, sample_every=2, keep=1), tokens, run)
    assert [path.name for path in checkpoints(run)] == ["step-0000004"]
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "log.jsonl", "loss.png", "run.json", "samples", "starts.jsonl", "tensorboard"
    ]  # fmt: skip
    model, card = load_model(run)
    assert card.labels == ("blue", "red")
    assert model.config.num_classes == 2


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tokens, tmp_path):
    train(settings(steps=1), tokens, tmp_path / "run")
    trainer = Trainer(settings(steps=9), TokenDataset(tokens), tokens, tmp_path / "run", None)
    with torch.no_grad():
        trainer.weights.model.head.out.bias.fill_(math.nan)
    with pytest.raises(
        FloatingPointError, match=r"a loss of nan at step 2, of images such as (blue|red)/\d+\.png, "
    ):
        trainer.advance(lambda _: None)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-0000001"]


def test_a_loss_that_is_not_finite_names_the_process(tokens, tmp_path):
    def work(rank):
        steps = []
        add_noise = Trainer.noise

        def with_a_hole(trainer, batch, draws):
            sample, condition = add_noise(trainer, batch, draws)
            steps.append(0)
            if rank == 1 and len(steps) == 3:
                sample.data_TC[0] = math.nan
            return sample, condition

        Trainer.noise = with_a_hole
        train(settings(steps=9, save_every=2, batch_size=8), tokens, tmp_path / "run")

    others, its_own = together(2, work)
    assert others == "FloatingPointError: a loss of nan at step 3 in process 1; the last checkpoint is kept"
    assert re.match(
        r"FloatingPointError: a loss of nan at step 3 in process 1, of images such as \w+/\d+\.png", its_own
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]


def test_processes_agree_that_the_last_checkpoint_is_being_written(tokens, tmp_path):
    """One has done its part and looked before the end, the other has not."""

    def work(rank):
        def look(saver):
            if rank == 1 and saver.writing is not None:
                saver.finish()

        Saver.look = look
        train(settings(steps=4, save_every=2, batch_size=8, stall_minutes=0.2), tokens, tmp_path / "run")

    assert together(2, work) == [None, None]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-0000002", "step-0000004"]


def test_the_image_whose_loss_is_not_finite_is_named(tokens, tmp_path):
    trainer = Trainer(settings(steps=9), TokenDataset(tokens), tokens, tmp_path / "run", None)
    add_noise, culprit = trainer.noise, []

    def with_a_hole(batch, draws):
        sample, condition = add_noise(batch, draws)
        sample.data_TC[-1] = math.nan
        culprit[:] = trainer.dataset.sources(batch.rows[-1:])
        return sample, condition

    trainer.noise = with_a_hole
    with pytest.raises(FloatingPointError) as error:
        trainer.advance(lambda _: None)
    assert f"of images such as {culprit[0]};" in str(error.value)


def test_an_error_is_not_hidden_by_a_checkpoint_that_fails(tokens, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk gone")

    monkeypatch.setattr("fitv2.training.checkpointing.write_state", fail)
    monkeypatch.setattr(Saver, "look", lambda _: None)
    monkeypatch.setattr(
        "fitv2.training.trainer.learning_rate", lambda _, step: math.nan if step == 2 else 1e-3
    )
    with (
        pytest.warns(UserWarning, match="disk gone"),
        pytest.raises(FloatingPointError, match="at step 4"),
    ):
        train(settings(steps=9, save_every=3), tokens, tmp_path / "run")


@pytest.mark.parametrize("fsdp_size", [1, 2])
def test_every_validation_and_checkpoint_is_of_the_average_of_its_step(folder, tmp_path, fsdp_size):
    """Sheets and validations in turn, several of each in one process."""
    data = held_out_set(folder, tmp_path)
    often = {"steps": 6, "batch_size": 8, "sample_every": 2, "validate_every": 3, "save_every": 6}
    alone = train(settings(**often), data, tmp_path / "alone")
    train_with(2, settings(**often, fsdp_size=fsdp_size), data, tmp_path / "run")
    np.testing.assert_allclose(validation(tmp_path / "run"), validation(tmp_path / "alone"), rtol=1e-4)
    together = newest_checkpoint(tmp_path / "run")
    one, two = (load_file(path / "ema" / WEIGHTS) for path in (alone, together))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)


def test_signals_to_the_whole_group_leave_the_readers_alone(tokens, tmp_path):
    """As torchrun and schedulers send them: a checkpoint is saved all the same."""
    run = tmp_path / "run"

    def work():
        os.setpgid(0, 0)
        train(settings(steps=100_000, workers=2, save_every=5), tokens, run)

    process = FORK.Process(target=work)
    process.start()
    deadline = time.monotonic() + 60
    while newest_step(run) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
    assert newest_step(run) == read_log(run / "log.jsonl")[-1]["step"]


def test_a_process_that_stalls_is_found(tokens, tmp_path):
    def work(rank):
        update = Trainer.update

        def asleep(trainer):
            if rank == 1 and trainer.step == 3:
                time.sleep(8)
            update(trainer)

        Trainer.update = asleep
        train(settings(steps=9, batch_size=8, stall_minutes=0.05), tokens, tmp_path / "run")

    waited, stalled = together(2, work)
    assert waited == "UserError: another process of this run did not answer in time (`stall_minutes`)"
    assert stalled == "UserError: another process of this run has ended: see what it says"


@pytest.mark.slow
def test_compiled_blocks_train_the_same_and_are_compiled_once(tokens, tmp_path):
    """Steps of other numbers of images and tokens; a compilation more only where there is a single image."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for compiled in (False, True):
        chosen = settings(steps=8, compile=compiled, tokens_per_step=60, sample_every=100, validate_every=100)
        train(
            replace(chosen, model=replace(DEBUG.model, depth=1)), tokens, tmp_path / str(compiled),
            report=lambda _: graphs.append(counters["stats"]["unique_graphs"]),
        )  # fmt: skip
    assert 0 < graphs[8] == graphs[-1]
    np.testing.assert_allclose(curve(tmp_path / "True"), curve(tmp_path / "False"), rtol=1e-4)


@pytest.mark.parametrize("part", ["ema", "state"])
def test_a_full_disk_keeps_the_previous_checkpoint(tokens, tmp_path, part, monkeypatch):
    """No file may grow beyond 4 KiB, which stands for a disk without room; then there is room again."""
    run = tmp_path / "run"
    before = tensors(train(settings(steps=1), tokens, run))
    if part == "state":  # else the averaged model, which is written first, already has no room
        monkeypatch.setattr("fitv2.training.checkpointing.save_model", lambda *_: None)

    def without_room(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        train(settings(steps=2, track=(), log_every=100), tokens, run)

    (error,) = together(1, without_room)
    assert re.match(r"UserError: checkpoint .*step-0000002 cannot be written: .*(large|written|rite)", error)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000001"]
    for one, other in zip(before, tensors(checkpoints(run)[0]), strict=True):
        assert torch.equal(one, other)
    monkeypatch.undo()
    assert train(settings(steps=2), tokens, run).name == "step-0000002"


def test_validation_is_the_same_every_time(folder, tmp_path):
    config = settings(steps=4, validate_every=2, learning_rate=0.0)
    train(config, held_out_set(folder, tmp_path), tmp_path / "run")
    losses = [line["validation"] for line in read_log(tmp_path / "run" / "log.jsonl") if "validation" in line]
    assert len(losses) == 2
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize(
    "model",
    [
        {"path": "ddpm", "prediction": "noise", "adaln": "full", "qk_norm": False},
        {"path": "gvp", "prediction": "velocity"},
        {"path": "vp", "prediction": "noise"},
        {"path": "linear", "prediction": "score"},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_every_objective_trains_and_samples(folder, tmp_path, model):
    data = held_out_set(folder, tmp_path)
    weight = "velocity" if model["prediction"] in ("noise", "score") and model["path"] != "ddpm" else "none"
    chosen = settings(steps=2, validate_every=2, sample_every=10, times="uniform", loss_weight=weight)
    train(replace(chosen, model=replace(chosen.model, **model)), data, tmp_path / "run")
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "validation" in line]
    assert math.isfinite(lines[-1]["validation"])
    pipe = FiTPipeline.from_pretrained(tmp_path / "run")
    (image,) = pipe(1, 32, 48, generator=[generator(0)], sampling=Sampling(steps=2)).images
    assert image.size == (48, 32)


def test_latents_of_an_autoencoder_train_and_sample(folder, tiny_vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vae").symlink_to(tiny_vae)
    encode(folder, Path("set"), Encoding("vae", (16,)), workers=0)
    train(settings(steps=2, sample_every=2), Path("set"), Path("run"))
    monkeypatch.chdir("/")  # the run remembers its autoencoder by its full path
    pipe = FiTPipeline.from_pretrained(tmp_path / "run")
    chosen = pipe.transformer.architecture
    assert (chosen.in_channels, chosen.patch_size, pipe.unit) == (4, 2, 16)
    (image,) = pipe(1, 32, 48, generator=[generator(0)], sampling=Sampling(steps=2)).images
    assert image.size == (48, 32)


def test_a_run_may_end_before_its_first_line(tokens, tmp_path):
    train(settings(steps=2, log_every=10), tokens, tmp_path / "run")
    assert (tmp_path / "run" / "loss.png").exists()


def test_minutes_end_a_run(tokens, tmp_path):
    newest = train(settings(steps=10_000, minutes=0.0), tokens, tmp_path / "run")
    assert newest.name == "step-0000000"


def test_a_damaged_checkpoint_is_passed_over_and_left(tokens, tmp_path):
    expected = tensors(train(settings(steps=4), tokens, tmp_path / "whole"))
    train(settings(steps=2), tokens, tmp_path / "run")
    newest = train(settings(steps=3), tokens, tmp_path / "run")
    (state_file(newest)).write_bytes((state_file(newest)).read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"step-0000003 is damaged .* carrying on from step 2"):
        last = train(settings(steps=4, keep=1), tokens, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(expected, tensors(last), strict=True))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["damaged-step-0000003", "step-0000004"]


def state_file(checkpoint):
    (path,) = (checkpoint / "state").glob("*.safetensors")
    return path


def test_processes_that_find_different_checkpoints_say_so(tokens, tmp_path):
    newest = train(settings(steps=2), tokens, tmp_path / "0")
    errors = together(2, lambda rank: train(settings(steps=4), tokens, tmp_path / str(rank)))
    for rank, error in enumerate(errors):
        different = f"the processes find different checkpoints in {tmp_path}/{rank}"
        assert error == f"UserError: {different}: all need the same folder"
    assert newest.exists()


def test_a_damaged_checkpoint_after_one_of_step_0_is_passed_over_too(tokens, tmp_path):
    train(settings(steps=2, minutes=0.0), tokens, tmp_path / "run")
    newest = train(settings(steps=2), tokens, tmp_path / "run")
    (state_file(newest)).write_bytes(b"")
    with pytest.warns(UserWarning, match="carrying on from step 0"):
        assert train(settings(steps=2), tokens, tmp_path / "run").name == "step-0000002"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tokens, tmp_path):
    newest = train(settings(steps=1), tokens, tmp_path / "run")
    (state_file(newest)).write_bytes(b"")
    with pytest.raises(UserError, match=r"step-0000001 is damaged .*: move it away to begin anew"):
        train(settings(steps=2), tokens, tmp_path / "run")
    assert newest.exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_post_training_changes_its_parameters_and_no_other(tokens, tmp_path, optimizer, precision):
    train(settings(steps=2), tokens, tmp_path / "first")
    post = replace(
        settings(steps=2, trainable="post-training", optimizer=optimizer, precision=precision),
        model=replace(DEBUG.model, rope=Rope("ntk", train_side=4)),
    )
    train(post, tokens, tmp_path / "post", init=str(tmp_path / "first"))
    before, after = (load_model(tmp_path / name)[0] for name in ("first", "post"))
    assert after.architecture.rope == Rope("ntk", train_side=4)
    changed = {
        name for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, other)
    }  # fmt: skip
    released = {name: re.sub("^_", "", to_released_name(name)) for name, _ in before.named_parameters()}
    chosen = {
        name for name, theirs in released.items()
        if any(part in theirs for part in ("x_embedder", "bias", "LN", "final_layer"))
    }  # fmt: skip
    assert changed == chosen


def to_released_name(name):
    """The released name of one of our parameters; of two halves the first."""
    return next(iter(to_released({name: torch.zeros(4, 4)})))


def test_batch_does_not_depend_on_its_size(tokens, tmp_path):
    """What an image meets (time, noise, dropped label) follows from its position alone."""
    trainer = Trainer(settings(steps=1), TokenDataset(tokens), tokens, tmp_path / "run", None)

    def noisy(count, step):
        steps = Steps(trainer.dataset, FixedCount(trainer.dataset.images(), count, seed=0))
        batch, draws = next(drawn_batches(Reading(steps, trainer.objective, 0), step, 0))
        return trainer.noise(batch, draws)[0]

    whole, first, second = noisy(8, 0), noisy(4, 0), noisy(4, 1)
    times = torch.cat([first.t_B, second.t_B])
    assert torch.equal(whole.t_B.sort().values, times.sort().values)
    noisy = torch.cat([first.noise_TC, second.noise_TC])
    assert torch.equal(whole.noise_TC.flatten().sort().values, noisy.flatten().sort().values)


def test_a_token_budget_resumes_to_the_same_weights(tokens, tmp_path):
    run = lambda steps: settings(steps=steps, tokens_per_step=40, precision="float32")  # noqa: E731
    whole = train(run(6), tokens, tmp_path / "whole")
    train(run(3), tokens, tmp_path / "parts")
    parts = train(run(6), tokens, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(parts), strict=True))
    trainer = Trainer(run(7), TokenDataset(tokens), tokens, tmp_path / "parts", None)
    sizes = [len(trainer.steps.batch(step).packed.x_TC) for step in range(8)]
    assert 24 < min(sizes) <= max(sizes) <= 40


def curve(run):
    """The losses and gradient norms of a log."""
    return [(line["loss"], line["gradient_norm"]) for line in read_log(run / "log.jsonl") if "loss" in line]


def train_with(size, preset, tokens, run):
    """Train with so many processes."""
    assert together(size, lambda _: train(preset, tokens, run)) == [None] * size


@pytest.mark.parametrize(("first", "second", "how"), [
    ((2, 1), (2, 1), {}),
    ((1, 1), (2, 2), {}),
    ((4, 2), (1, 1), {}),
    ((2, 1), (4, 4), {}),
    ((2, 2), (4, 1), {"tokens_per_step": 60}),
    ((3, 3), (2, 1), {"grad_accum_steps": 3}),
    ((2, 2), (4, 2), {"optimizer": "muon"}),
    ((4, 2), (2, 2), {"gradient_checkpointing": True}),
    ((2, 2), (2, 1), {"clean_share": 0.25, "optimizer": "muon", "muon_every": 2, "grad_accum_steps": 2}),
    ((2, 1), (1, 1), {"batch_size": 16, "batch_rampup_steps": 4}),
])  # fmt: skip
def test_any_number_of_processes_trains_the_same(folder, tmp_path, first, second, how, monkeypatch):
    """Half of a run with one number of processes and of those that share a model, half with others."""
    monkeypatch.setattr("fitv2.training.muon.SHARED_FROM", 8)  # matrices here are small
    data, run = held_out_set(folder, tmp_path), tmp_path / "run"
    chosen = lambda steps, fsdp_size=1: settings(  # noqa: E731
        steps=steps,
        fsdp_size=fsdp_size,
        validate_every=3,
        sample_every=3,
        **{"batch_size": 8, "precision": "float32"} | how,
    )
    train(chosen(6), data, tmp_path / "alone")
    train_with(first[0], chosen(3, first[1]), data, run)
    train_with(second[0], chosen(6, second[1]), data, run)
    assert len(curve(run)) == 6
    np.testing.assert_allclose(curve(run), curve(tmp_path / "alone"), rtol=1e-4)
    np.testing.assert_allclose(validation(run), validation(tmp_path / "alone"), rtol=1e-4)
    assert [path.name for path in checkpoints(run)] == ["step-0000003", "step-0000006"]
    assert len(list((run / "samples").iterdir())) == 2


def validation(run):
    return [line["validation"] for line in read_log(run / "log.jsonl") if "validation" in line]


def test_damage_twice_at_one_step_and_names_of_other_kinds(tokens, tmp_path):
    run = tmp_path / "run"
    train(settings(steps=2), tokens, run)
    for _ in range(2):
        newest = train(settings(steps=3), tokens, run)
        (newest.parent / "step-0000003.bak").mkdir(exist_ok=True)
        with state_file(newest).open("r+b") as file:  # the size stays
            file.seek(-64, os.SEEK_END)
            file.write(b"damage")
        with pytest.warns(UserWarning, match=r"step-0000003 is damaged .*; carrying on from step 2"):
            train(settings(steps=2), tokens, run)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-step-0000003", "damaged-step-0000003-2", "step-0000002", "step-0000003.bak"]


def test_post_training_of_a_shared_model_changes_the_same(tokens, tmp_path):
    train(settings(steps=2), tokens, tmp_path / "first")
    post = settings(steps=2, trainable="post-training", batch_size=8, fsdp_size=2)
    alone = replace(post, training=replace(post.training, fsdp_size=1))
    start = str(tmp_path / "first")
    assert together(2, lambda _: train(post, tokens, tmp_path / "two", init=start)) == [None, None]
    train(alone, tokens, tmp_path / "one", init=start)
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=1e-4)
    before, after = (load_model(tmp_path / name)[0] for name in ("first", "two"))
    changed = [
        not torch.equal(one, other)
        for one, other in zip(before.parameters(), after.parameters(), strict=True)
    ]
    freeze(before, "post-training")
    assert changed == [parameter.requires_grad for parameter in before.parameters()]


def test_a_number_of_processes_that_cannot_share_a_model_is_refused(tokens, tmp_path):
    with pytest.raises(UserError, match="`fsdp_size` 2 needs a multiple of 2 processes; there are 1"):
        train(settings(steps=1, fsdp_size=2), tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parts", [2, 4, 50])
def test_parts_of_unequal_token_counts_give_the_gradients_of_one_batch(tokens, tmp_path, parts):
    gradients = []
    for count in (1, parts):
        chosen = settings(steps=1, batch_size=11, grad_accum_steps=count, precision="float32")
        trainer = Trainer(chosen, TokenDataset(tokens), tokens, tmp_path / str(count), None)
        randomized(trainer.weights.master)
        batch, draws = next(trainer.batches)
        lengths = [part.packed.layout.tokens for part in batch.split(count)]
        assert len(lengths) == min(count, 11)
        loss, _ = trainer.accumulate(batch, draws)
        gradients.append([loss, *(weight.grad for weight in trainer.weights.master.parameters())])
    assert len(set(lengths)) > 1
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    for one, other in zip(gradients[0][1:], gradients[1][1:], strict=True):
        assert torch.linalg.norm(one - other) <= 1e-6 * torch.linalg.norm(one)


def test_one_process_that_is_told_to_stop_stops_all(tokens, tmp_path):
    """SIGTERM to one of two: both leave after the same step, and a checkpoint is there."""
    run = tmp_path / "run"
    started = FORK.Process(target=train_with, args=(2, settings(steps=100_000), tokens, run))
    started.start()
    deadline = time.monotonic() + 60
    while not read_log(run / "log.jsonl") and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [
        int(pid) for pid in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    ]
    os.kill(children[1], signal.SIGTERM)
    started.join(60)
    assert started.exitcode == 0  # train_with saw both processes end well
    last = read_log(run / "log.jsonl")[-1]["step"]
    assert newest_checkpoint(run).name == f"step-{last:07d}"


@pytest.mark.slow
def test_killed_at_30_random_moments_the_weights_are_the_same(tokens, tmp_path):
    chosen = settings(steps=60, save_every=4, keep=2, precision="float32")
    whole = train(chosen, tokens, tmp_path / "whole")
    rng, run, kills = np.random.default_rng(0), tmp_path / "run", 0
    while kills < 30:
        process = FORK.Process(target=train, args=(chosen, tokens, run))
        process.start()
        time.sleep(rng.uniform(0.02, 0.6))
        kills += process.is_alive()
        process.kill()
        process.join()
        if newest_step(run) == 60:
            assert (newest_checkpoint(run) / "ema" / WEIGHTS).read_bytes() == (
                whole / "ema" / WEIGHTS
            ).read_bytes()
            shutil.rmtree(run)
    parts = train(chosen, tokens, run)
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(parts), strict=True))
    assert curve(run) == curve(tmp_path / "whole")
    assert not list(run.glob("checkpoints/.*"))


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed_and_the_curve_is_the_same(tokens, tmp_path):
    chosen = ["--steps=60", "--save-every=10", "--sample-every=1000", "--batch-size=8"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--max-restarts=3",
        "-m",
        "fitv2",
    ]
    arguments = ["train", "debug", "--data", tokens, "--out", tmp_path / "run", *chosen]
    running = subprocess.Popen([*command, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for step in (10, 30):
        deadline = time.monotonic() + 60
        while newest_step(tmp_path / "run") < step and time.monotonic() < deadline:
            time.sleep(0.02)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    assert running.wait(120) == 0
    train(settings(steps=60, batch_size=8, save_every=10, sample_every=1000), tokens, tmp_path / "alone")
    assert len(curve(tmp_path / "run")) == 60
    np.testing.assert_allclose(curve(tmp_path / "run"), curve(tmp_path / "alone"), rtol=1e-4)


def newest_step(run):
    """The step of the newest checkpoint; 0 if there is none."""
    newest = newest_checkpoint(run)
    return int(newest.name.removeprefix("step-")) if newest else 0


@pytest.mark.parametrize("has_it", [True, False])
def test_precision_is_chosen_by_what_the_processor_has(tokens, tmp_path, monkeypatch, has_it):
    monkeypatch.setattr("fitv2.training.trainer.has_bfloat16_matmuls", lambda _: has_it)
    for precision, bfloat16 in (("auto", has_it), ("bfloat16", True), ("float32", False)):
        chosen = settings(steps=1, precision=precision)
        trainer = Trainer(chosen, TokenDataset(tokens), tokens, tmp_path / precision, None)
        assert next(trainer.weights.model.parameters()).dtype == (
            torch.bfloat16 if bfloat16 else torch.float32
        )
        assert next(trainer.weights.master.parameters()).dtype == torch.float32


# Texts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioned(folder, tmp_path_factory):
    """The images of `folder`, some with a caption."""
    root = tmp_path_factory.mktemp("captioned")
    shutil.copytree(folder, root / "in")
    for i, path in enumerate(sorted((root / "in").rglob("*.png"))):
        if i % 4:
            path.with_suffix(".txt").write_text(["red apple", "two owls side by side", "cat"][i % 3])
    encode(root / "in", root / "set", Encoding(max_tokens=(16,)), workers=0)
    return root / "set"


def of_texts(**changes):
    chosen = settings(**changes)
    return replace(chosen, model=replace(chosen.model, conditions=("label", "text")))


def test_a_model_of_texts_trains_resumes_bit_for_bit_and_samples(captioned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = train(of_texts(steps=6, sample_every=3), captioned, tmp_path / "whole")
    train(of_texts(steps=3), captioned, tmp_path / "parts")
    parts = train(of_texts(steps=6), captioned, tmp_path / "parts")
    for one, other in zip(tensors(whole), tensors(parts), strict=True):
        assert torch.equal(one, other)
    model, card = load_model(tmp_path / "whole")
    assert (card.text_encoder, model.architecture.text_channels) == ("wordllama", 256)
    assert (tmp_path / "whole" / "samples" / "step-0000003.png").exists()
    both = ["--prompt", "cat", "--label", "red", "--negative-prompt", "owl"]
    options = [*both, "--size", "32x64", "--size", "16x16", "--steps", "2"]
    assert run_command(["sample", "whole", "--prompt", "red apple", *options]) == 0
    made = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert made == [
        "cat_16x16_0.png",
        "cat_32x64_0.png",
        "red-apple_16x16_0.png",
        "red-apple_32x64_0.png",
    ]


def test_a_text_makes_its_image_whatever_is_beside_it(captioned, tmp_path):
    train(of_texts(steps=2), captioned, tmp_path / "run")
    model, card = load_model(tmp_path / "run")
    pipe = FiTPipeline.of(randomized(model), card)
    prompts, heights, widths = (
        ["red apple", "two owls side by side", "", "cat"],
        [16, 32, 48, 16],
        [32, 32, 16, 64],
    )
    made = pipe(
        height=heights, width=widths, prompt=prompts, negative_prompt="dog", output_type="np",
        generator=[generator(i) for i in range(4)], num_inference_steps=2,
    ).images  # fmt: skip
    for i, image in enumerate(made):
        alone = pipe(
            height=heights[i], width=widths[i], prompt=prompts[i], negative_prompt="dog", output_type="np",
            generator=[generator(i)], num_inference_steps=2,
        ).images[0]  # fmt: skip
        assert np.abs(alone - image).max() <= 1 / 255 + 1e-6
    other = pipe(
        prompt="cat", height=16, width=32, generator=[generator(0)], num_inference_steps=2, output_type="np"
    )
    assert np.abs(other.images[0] - made[0]).max() > 0.01


def test_labels_and_texts_are_asked_for_where_a_model_takes_them(captioned, tmp_path, tokens):
    only = of_texts(steps=1)
    only = replace(only, model=replace(only.model, conditions=("text",)))
    train(only, captioned, tmp_path / "texts")
    pipe = FiTPipeline.from_pretrained(tmp_path / "texts")
    with pytest.raises(UserError, match="takes `prompt`, not class labels"):
        pipe("red", 16, 16)
    with pytest.raises(UserError, match="this model takes texts: give `prompt`"):
        run_command(["sample", str(tmp_path / "texts"), "--size", "16x16"])
    assert len(pipe(prompt=["a", "b"], height=16, width=16, num_inference_steps=1).images) == 2
    with pytest.raises(UserError, match="takes class labels, not `prompt`"):
        FiTPipeline.from_pretrained("clipart")(prompt="cat")
    with pytest.raises(UserError, match="no image of the dataset has a caption"):
        train(of_texts(steps=1), tokens, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_of_texts_starts_from_a_model_of_labels(captioned, tmp_path):
    train(settings(steps=2), captioned, tmp_path / "labels")
    with pytest.warns(UserWarning, match="^text_embed start at random"):
        trainer = Trainer(
            of_texts(), TokenDataset(captioned), captioned, tmp_path / "x", str(tmp_path / "labels")
        )
    given, made = load_model(tmp_path / "labels")[0].state_dict(), trainer.weights.master.state_dict()
    shared = [key for key in made if not key.startswith("text_embed")]  # the labels are the same
    assert len(shared) > 20
    assert all(torch.equal(made[key], given[key]) for key in shared)
