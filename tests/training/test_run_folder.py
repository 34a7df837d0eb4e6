import json
import subprocess
import sys
from dataclasses import replace

import pytest

from fitv2.data.format import About, DatasetCard
from fitv2.errors import UserError
from fitv2.presets import Architecture, Training, preset
from fitv2.runtime.serialization import from_dict, read_json
from fitv2.training.run_folder import cut_log, describe_code, note_start, read_log, settle

DEBUG = preset("debug")
ABOUT = About(("a", "b"), "pixels", 1.0, 0.0, 16, 3, 64, {"shard_size": 9})
DATA = DatasetCard(2, ABOUT, {"train": 9}, {"train": 18}, {"train": 90}, {}, {})


def test_run_json_rebuilds_the_preset(tmp_path):
    settle(tmp_path / "run", DEBUG, DATA, None)
    values = read_json(tmp_path / "run" / "run.json")
    assert from_dict(Architecture, values["model"]) == DEBUG.model
    assert from_dict(Training, values["training"]) == DEBUG.training
    data = {key: value for key, value in values["data"].items() if key not in ("pictures", "rows")}
    assert from_dict(About, data) == replace(ABOUT, encoding={})


def test_only_when_may_change_not_what(tmp_path):
    run = tmp_path / "run"
    settle(run, DEBUG, DATA, None)
    (run / "checkpoints" / "step-0000010").mkdir(parents=True)
    settle(run, replace(DEBUG, training=replace(DEBUG.training, steps=99)), DATA, None)
    assert read_json(run / "run.json")["training"]["steps"] == 99
    for changed in ({"seed": 1}, {"learning_rate": 1.0}):
        with pytest.raises(UserError, match=f"another {next(iter(changed))}"):
            settle(run, replace(DEBUG, training=replace(DEBUG.training, **changed)), DATA, None)
    with pytest.raises(UserError, match="another init"):
        settle(run, DEBUG, DATA, "clipart")
    with pytest.raises(UserError, match="another labels"):
        settle(run, DEBUG, replace(DATA, about=replace(ABOUT, labels=("b", "a"))), None)
    assert read_json(run / "run.json")["training"]["seed"] == 0


def test_a_run_is_lengthened_and_ended_with_a_decay_but_not_one_that_began_before(tmp_path):
    run = tmp_path / "run"

    def changed(**schedule):
        return settle(run, replace(DEBUG, training=replace(DEBUG.training, **schedule)), DATA, None)

    assert changed(steps=20) == {}
    (run / "checkpoints" / "step-0000020").mkdir(parents=True)
    assert changed(steps=30, decay_steps=10) == {"steps": [20, 30], "decay_steps": [0, 10]}
    with pytest.raises(UserError, match=r"begun at step 18, and the run is at 20: give `steps` 30"):
        changed(steps=28, decay_steps=10)
    assert read_json(run / "run.json")["training"]["steps"] == 30
    (run / "checkpoints" / "step-0000025").mkdir()
    assert changed(steps=30, decay_steps=10) == {}  # the same run, resumed within its decay


OLD_NAMES = {
    "tokens_per_step": "tokens_a_step", "grad_accum_steps": "micro_batches", "max_grad_norm": "clip",
    "gradient_checkpointing": "recompute", "fsdp_size": "shard",
}  # fmt: skip


def test_a_run_begun_when_settings_had_other_names_goes_on(tmp_path):
    run = tmp_path / "run"
    settle(run, DEBUG, DATA, None)
    (run / "checkpoints" / "step-0000010").mkdir(parents=True)
    written = (run / "run.json").read_text()
    before = json.loads(written)
    before["training"] = {OLD_NAMES.get(key, key): value for key, value in before["training"].items()}
    before["model"]["rope"]["pixels_a_token"] = before["model"]["rope"].pop("pixels_per_token")
    for later in ("objective", "conditions"):  # no settings at the time
        del before["model"][later]
    (run / "run.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match="another max_grad_norm"):
        settle(run, replace(DEBUG, training=replace(DEBUG.training, max_grad_norm=2.0)), DATA, None)
    assert json.loads((run / "run.json").read_text()) == before
    settle(run, DEBUG, DATA, None)
    assert (run / "run.json").read_text() == written


def test_a_run_that_has_no_checkpoint_yet_can_be_corrected(tmp_path):
    settle(tmp_path, DEBUG, DATA, None)
    settle(tmp_path, replace(DEBUG, training=replace(DEBUG.training, batch_size=2)), DATA, None)
    assert read_json(tmp_path / "run.json")["training"]["batch_size"] == 2


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a run"):
        settle(tmp_path, DEBUG, DATA, None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_log_is_cut_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_log(log, 3)
    assert read_log(log) == []
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    cut_log(log, 3)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_each_start_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fitv2", "train", "a b"])
    note_start(tmp_path, 0, 1, {})
    note_start(tmp_path, 30, 8, {"steps": [20, 40]})
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").open())
    assert (first["step"], second["step"], second["processes"]) == (0, 30, 8)
    assert first["command"] == "fitv2 train 'a b'"
    assert {"python", "fitv2", "torch", "diffusers"} <= first["versions"].keys()
    assert first["machine"]
    assert (first["schedule"], second["schedule"]) == ({}, {"steps": [20, 40]})


def repository(folder):
    """A repository that holds the package, and a function that runs git in it."""
    module = folder / "src" / "fitv2" / "training" / "run_folder.py"
    module.parent.mkdir(parents=True)
    module.write_text("x")
    (folder / "pyproject.toml").write_text("[project]")

    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", folder, *identity, *command], check=True, capture_output=True)

    return module, git


def test_the_state_of_the_code_is_that_of_its_repository(tmp_path, monkeypatch):
    module, git = repository(tmp_path)
    monkeypatch.setattr("fitv2.training.run_folder.PACKAGE", tmp_path / "src" / "fitv2")
    assert describe_code() is None
    for command in (["init"], ["add", "."], ["commit", "-m", "one"]):
        git(*command)
    commit = describe_code()
    assert len(commit) == 40
    module.write_text("y")
    assert describe_code() == f"{commit} with changes"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert describe_code() == f"{commit} with changes"


@pytest.mark.parametrize("place", ["site-packages/fitv2", "src/fitv2"])
def test_no_repository_around_the_package_runs_or_is_recorded(tmp_path, monkeypatch, place):
    _, git = repository(tmp_path)
    hook = tmp_path / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    for command in (["init"], ["add", "."], ["commit", "-m", "one"], ["config", "core.fsmonitor", str(hook)]):
        git(*command)
    monkeypatch.setattr("fitv2.training.run_folder.PACKAGE", tmp_path / place)
    assert (describe_code() is not None) == (place == "src/fitv2")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "line", ["3", "null", '"text"', "[]", '{"loss": 1}', '{"step": "2"}', "[" * 9999, "1" * 9999]
)
def test_a_log_is_read_up_to_a_line_that_is_none(tmp_path, line):
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    assert read_log(log) == [{"step": 1}]
    cut_log(log, 9)
    assert log.read_text() == '{"step": 1}\n'
