"""Put a finished run into the package as a shipped model, in float16, and its record into docs/.

    python tools/ship_model.py runs/clipart clipart 2.5 [STEP]

The number is the guidance that samples look best with; STEP is another checkpoint than the newest. Writes
src/fitv2/models/NAME/ and docs/results/models/NAME/ (run.json, log.jsonl, loss.png).
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fitv2.checkpoint import SHIPPED, export_model, load_model
from fitv2.config import ANY_STEP
from fitv2.figures import loss_curve
from fitv2.training.run_folder import read_log

RECORD = ("run.json", "log.jsonl")


def main(run: Path, name: str, guidance: float, step: int | None) -> None:
    """Copy the averaged model of a checkpoint, and what tells how it came about."""
    model, card = load_model(run if step is None else run / "checkpoints" / f"step-{step:07}" / "ema")
    folder = SHIPPED / name
    shutil.rmtree(folder, ignore_errors=True)
    # float16 holds 11 bits of each weight, bfloat16 only 8.
    export_model(model, replace(card, guidance=guidance), folder, torch.float16)
    record = Path(__file__).parents[1] / "docs" / "results" / "models" / name
    record.mkdir(parents=True, exist_ok=True)
    for file in RECORD:
        shutil.copyfile(run / file, record / file)
    any_step = model.architecture.objective_name == ANY_STEP
    loss_curve(read_log(run / "log.jsonl"), record / "loss.png", f"Loss of {name}", other_loss=any_step)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB; record in {record}")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) == 5 else None)
