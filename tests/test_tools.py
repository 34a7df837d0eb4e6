"""What the tools work out; that they run is seen when they are used."""

import json
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"


def test_runs_are_compared_by_the_step_at_which_they_are_as_good(tmp_path):
    for name, losses in {"slow": (3.0, 2.0, 1.0), "fast": (2.0, 1.5, 0.5), "worse": (3.0, 2.5)}.items():
        (tmp_path / name).mkdir()
        lines = [{"step": 100 * (i + 1), "validation": loss} for i, loss in enumerate(losses)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, TOOLS / "compare_runs.py", tmp_path / "out.png"]
    runs = [tmp_path / name for name in ("slow", "fast", "worse")]
    result = subprocess.run([*command, *runs], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["as_low_as_first"] for line in lines] == [300, 250, None]
    assert (tmp_path / "out.png").stat().st_size > 1000
