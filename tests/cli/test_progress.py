import sys
import time
from types import SimpleNamespace

import pytest

from fitv2.cli.progress import new_bar, share_bar, stages_bar, training_bar
from fitv2.config import Training


def test_a_share_becomes_a_count(capsys):
    with share_bar("sample", 8, "image") as progress:
        progress(0.25)
        progress(1.0)
    assert "8/8" in capsys.readouterr().err


def test_a_run_shows_its_step_loss_and_rate(capsys):
    with training_bar(Training(steps=20)) as report:
        report(SimpleNamespace(step=11, loss=0.5, images_per_second=12.3))
        report(SimpleNamespace(step=12, loss=0.25, images_per_second=12.3))
    said = capsys.readouterr().err
    assert "12/20" in said
    assert "loss=0.2500" in said


@pytest.mark.parametrize(("training", "total"), [(Training(steps=7), 7), (Training(minutes=0.5), 30)])
def test_a_bar_counts_steps_or_seconds(training, total):
    with new_bar(training, 0) as bar:
        assert bar.total == total


def test_a_run_that_never_starts_shows_no_bar(capsys):
    with training_bar(Training()):
        pass
    assert capsys.readouterr().err == ""


def test_stages_are_one_bar_after_another(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with stages_bar("image") as progress:
        progress("list", 500, None)
        progress("encode", 20, 100)
        progress("encode", 100, 100)
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert "encode: 100%" in last
    assert "100/100" in last
    assert "list" not in last


def test_a_log_file_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("fitv2.cli.progress.EVERY", 0.2)
    with stages_bar("image") as progress:
        begun = time.monotonic()
        while time.monotonic() - begun < 0.5:
            progress("encode", round(100 * (time.monotonic() - begun)), 100)
        progress("encode", 100, 100)
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert 3 <= len(lines) <= 5  # the start, about two on the way, the end
    assert "100/100" in lines[-1]


def test_other_processes_draw_no_bar(capsys):
    with stages_bar("image", shown=False) as progress:
        progress("encode", 20, 100)
    assert capsys.readouterr().err == ""
