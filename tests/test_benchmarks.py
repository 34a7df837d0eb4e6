"""The benchmarks run, on a small scale; what they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

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
