"""The benchmarks run, on a small scale; what they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_packed_vs_padded_prints_one_object_of_ratios():
    small = ["--json", "--depth=1", "--width=64", "--repeats=1"]
    command = [sys.executable, BENCHMARKS / "packed_vs_padded.py", *small]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    ratios = json.loads(result.stdout)
    assert set(ratios) == {"imagenet_256", "mixed_1024"}
    for mix in ratios.values():
        assert set(mix) == {"train", "sample"}
        assert all(ratio > 0 for ratio in mix.values())


TINY = ["--width=48", "--depth=1"]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "training_step.py",
            [*TINY, "--tokens=600", "--steps=2"],
            {"seconds", "beside_forward_and_backward"},
        ),
        ("image_size.py", [*TINY, "--repeats=1"], {"tokens_per_second", "time", "flops", "ratio"}),
        (
            "gpu_train.py",
            [*TINY, "--preset=fitv2-b", "--images=4", "--grad-accum-steps=2", "--steps=1", "--eager-only"],
            {"images_per_second", "share_of_peak"},
        ),
        (
            "threads.py",
            [
                "--preset=debug",
                "--state=busy",
                "--setting",
                "passive",
                "1 thread",
                "--rounds=1",
                "--seconds=0.1",
            ],
            {"passive", "1 thread", "runs"},
        ),
        ("evaluation.py", ["--pictures", "1", "3", "--rounds=1"], {"dtype", "floor_ms", "share_of_peak"}),
        (
            "peers.py",
            ["--width=64", "--depth=1", "--batch=2", "--side=2", "--steps=1", "--warmup=0"],
            {"ours_seconds", "peer_seconds", "ratio"},
        ),
        (
            "variants.py",
            [
                "--variants",
                "FiTv2",
                "fast+levels",
                "--width=32",
                "--heads=2",
                "--depth=1",
                "--batch=2",
                "--steps=1",
            ],
            {"variant", "milliseconds", "times_as_long"},
        ),
        ("start.py", ["--module=fitv2.limits", "--rounds=1"], {"plain_seconds", "seconds", "ratio"}),
        ("muon.py", ["--preset=debug", "--rounds=1"], {"way", "milliseconds", "times_as_fast", "floor_ms"}),
        (
            "gpu_layouts.py",
            ["--preset=fitv2-b", "--width=96", "--depth=1", "--images=3", "--repeats=1", "--eager-only"],
            {"layout", "tokens_per_image", "share_of_peak"},
        ),
        ("planning.py", ["20000"], {"fill", "seconds_an_epoch", "megabytes"}),
        ("encoding.py", ["--pictures=40", "--milliseconds=1"], {"busy", "reading_alone_per_second"}),
        (
            "loading.py",
            ["--images=2000", "--seconds=0.2"],
            {"images_per_second", "two_workers", "megabytes_grown"},
        ),
    ],
)
def test_benchmarks_print_their_figures(name, options, said):
    command = [sys.executable, BENCHMARKS / name, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in result.stdout.splitlines():
        assert said <= json.loads(line).keys()
