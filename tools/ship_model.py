"""Put a finished run into the package as a shipped model, in float16, and its record into docs/.

    python tools/ship_model.py runs/clipart clipart 2.5

The number is the guidance that samples look best with. Writes src/fitv2/models/NAME/ and
docs/results/models/NAME/ (run.json, log.jsonl, loss.png).
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fitv2.checkpoint import SHIPPED, export_model, load_model

RECORD = ("run.json", "log.jsonl", "loss.png")


def main(run: Path, name: str, guidance: float) -> None:
    """Copy the averaged model of the newest checkpoint, and what tells how it came about."""
    model, card = load_model(run)
    folder = SHIPPED / name
    shutil.rmtree(folder, ignore_errors=True)
    # float16 holds 11 bits of each weight, bfloat16 only 8.
    export_model(model, replace(card, guidance=guidance), folder, torch.float16)
    record = Path(__file__).parents[1] / "docs" / "results" / "models" / name
    record.mkdir(parents=True, exist_ok=True)
    for file in RECORD:
        shutil.copyfile(run / file, record / file)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB; record in {record}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
