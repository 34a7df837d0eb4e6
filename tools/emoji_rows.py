"""Add rows and columns of two or three to the emoji set, for the shapes that single drawings lack.

    python tools/emoji_rows.py data/emoji tokens/emoji-pictures
    fitv2 encode tokens/emoji-pictures tokens/emoji --autoencoder emoji --no-mirror --label-column concept

Every drawing is kept, and appears once more beside, or on top of, copies of itself. Which of the four
arrangements it gets follows from the hash of its `source`, so the same set gives the same files.
"""

import hashlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm


class Arrangement(NamedTuple):
    """How many copies, in which direction, and how a caption says so."""

    copies: int
    upright: bool
    caption: str


ARRANGEMENTS = (
    Arrangement(2, upright=False, caption="two side by side: {}"),
    Arrangement(2, upright=True, caption="two on top of each other: {}"),
    Arrangement(3, upright=False, caption="a row of three: {}"),
    Arrangement(3, upright=True, caption="a column of three: {}"),
)
COLUMNS = ("image", "caption", "concept", "artist", "source")


def arranged(image: Image.Image, arrangement: Arrangement) -> Image.Image:
    """Copies of a drawing in a row or a column."""
    across, down = (1, arrangement.copies) if arrangement.upright else (arrangement.copies, 1)
    sheet = Image.new("RGB", (image.width * across, image.height * down), "white")
    for copy in range(arrangement.copies):
        sheet.paste(image, (0, copy * image.height) if arrangement.upright else (copy * image.width, 0))
    return sheet


def with_rows(drawings: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each drawing, then its arrangement."""
    for drawing in tqdm(drawings):
        concept, source = drawing["caption"], drawing["source"]
        common = {"concept": concept, "artist": drawing["artist"]}
        yield {"image": drawing["image"]["bytes"], "caption": concept, "source": source, **common}
        arrangement = ARRANGEMENTS[hashlib.sha256(source.encode()).digest()[0] % len(ARRANGEMENTS)]
        image = Image.open(io.BytesIO(drawing["image"]["bytes"]))
        held = io.BytesIO()
        arranged(image, arrangement).save(held, "PNG")
        caption = arrangement.caption.format(concept)
        yield {"image": held.getvalue(), "caption": caption, "source": f"{source}+{caption}", **common}


def main(emoji: Path, out: Path) -> None:
    """Write train.parquet and validation.parquet."""
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        drawings = pq.read_table(emoji / f"{split}.parquet").to_pylist()
        rows = list(with_rows(drawings))
        table = pa.table({column: [row[column] for row in rows] for column in COLUMNS})
        pq.write_table(table, out / f"{split}.parquet", row_group_size=512)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
