import json
from dataclasses import replace

import pytest

from fitv2.errors import UserError
from fitv2.presets import preset
from fitv2.runs import cut_log, read_run, settle

DEBUG = preset("debug")


def test_run_json_rebuilds_the_preset(tmp_path):
    settle(tmp_path / "run", DEBUG, tmp_path, None)
    assert read_run(tmp_path / "run") == DEBUG


def test_only_when_may_change_not_what(tmp_path):
    run = tmp_path / "run"
    settle(run, DEBUG, tmp_path, None)
    settle(run, replace(DEBUG, training=replace(DEBUG.training, steps=99)), tmp_path, None)
    assert read_run(run).training.steps == 99
    for changed in ({"seed": 1}, {"learning_rate": 1.0}):
        with pytest.raises(UserError, match=f"another {next(iter(changed))}"):
            settle(run, replace(DEBUG, training=replace(DEBUG.training, **changed)), tmp_path, None)
    with pytest.raises(UserError, match="another init"):
        settle(run, DEBUG, tmp_path, "clipart")
    assert read_run(run).training.seed == 0


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a run"):
        settle(tmp_path, DEBUG, tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_log_is_cut_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_log(log, 3)
    assert not log.exists()
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    cut_log(log, 3)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
