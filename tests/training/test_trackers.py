import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from fitv2.errors import UserError
from fitv2.training.trackers import build_trackers


def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    return board.Reload()


def test_a_line_for_each_call_and_curves_for_tensorboard(tmp_path):
    made = build_trackers(["tensorboard"], tmp_path, 0, {})
    for step in (1, 2):
        for tracker in made:
            tracker.scalars(step, {"loss": 1 / step, "speed/images_per_second": 3.0})
            tracker.image(step, "samples", Image.new("RGB", (8, 4)))
    for tracker in made:
        tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert lines[1] == {"step": 2, "loss": 0.5, "speed/images_per_second": 3.0}
    board = events(tmp_path)
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert [(e.step, e.width, e.height) for e in board.Images("samples")] == [(1, 8, 4), (2, 8, 4)]


def test_what_was_logged_after_the_checkpoint_is_hidden(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        (_, board) = build_trackers(["tensorboard"], tmp_path, start, {})
        for step in steps:
            board.scalars(step, {"loss": 10.0 * start + step})
        board.close()
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_one_run_for_a_folder(tmp_path, monkeypatch, name):
    calls = []
    service = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda: calls.append(("finish",)),
        Image=lambda image: image.size,
    )
    monkeypatch.setitem(sys.modules, name, service)
    for _ in range(2):
        _, tracker = build_trackers([name], tmp_path / "mine", 0, {"model": {"depth": 2}})
        tracker.scalars(3, {"loss": 0.5})
        tracker.image(3, "samples", Image.new("RGB", (8, 4)))
        tracker.close()
    first, second = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    assert first == second
    kind, options = first[0]
    assert (kind, options["project"], options["name"][:4]) == ("init", "fitv2", "mine")
    assert options["config"] == {"model": {"depth": 2}}
    assert first[1:] == [("log", 3, {"loss": 0.5}), ("log", 3, {"samples": (8, 4)}), ("finish",)]


def test_a_service_that_fails_is_left_alone(tmp_path, monkeypatch):
    calls = []

    def fail(*_, **__):
        calls.append(0)
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None, log=fail, finish=fail))
    _, service = build_trackers(["wandb"], tmp_path, 0, {})
    with pytest.warns(UserWarning, match="wandb gets nothing more: no network"):
        service.scalars(1, {"loss": 1.0})
    service.scalars(2, {"loss": 1.0})
    service.close()
    assert len(calls) == 1
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail))
    with pytest.raises(UserError, match="`track` wandb cannot begin: no network"):
        build_trackers(["wandb"], tmp_path, 0, {})


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="`track` trackio needs it: pip install trackio"):
        build_trackers(["trackio"], tmp_path, 0, {})
