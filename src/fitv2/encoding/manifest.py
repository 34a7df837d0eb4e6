"""Every image of a source, listed once in a table that all processes map to memory, and read by its row.

What an image is, and whether it can be used, is found out when it is read.
"""

import errno
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unicodedata import normalize

from PIL import Image

from fitv2.data.storage import filesystem, is_local
from fitv2.encoding.images import NoImage, UnusableImage, load_mask, load_rgb
from fitv2.encoding.kinds import KINDS
from fitv2.encoding.sources import (
    BROKEN,
    HEAD_BYTES,
    NO_LABEL,
    UNUSED,
    ImageRef,
    Listing,
    Source,
    others_of,
    root_of,
    what_it_is,
)
from fitv2.errors import UserError, reading
from fitv2.runtime.files import atomic_file

Report = Callable[[int], None]  # how many images were found so far
PLACES = {
    "source": "large_string", "path": "large_binary", "at": "int64", "size": "int64", "detail": "string",
    "group": "int32", "caption": "large_string", "mask": "large_binary",
}  # fmt: skip
CHUNK = 16  # images that one process reads at once
ROW_GROUP_CHUNK = 128  # the same of a Parquet file, so that others need not read their group


@dataclass(frozen=True)
class Manifest:
    """Every image of a source, split by split, each in the order of the source."""

    kind: str
    url: str
    labels: tuple[str, ...]
    splits: dict[str, tuple[int, int]]  # the rows of each
    others: list[dict[str, Any]]  # files that are no images
    table: Any  # Arrow: label (int32, −1 for none) and the rest of a ImageRef
    summary: tuple[str, ...] = ()  # what became of the collection, in lines for a person

    def save(self, path: Path, scratch: Path) -> None:
        """Write it as one Arrow file."""
        import pyarrow as pa

        about = {
            name: getattr(self, name) for name in ("kind", "url", "labels", "splits", "others", "summary")
        }
        table = self.table.replace_schema_metadata({"manifest": json.dumps(about)})
        with atomic_file(path, scratch) as partial, pa.ipc.new_file(str(partial), table.schema) as writer:
            writer.write_table(table)

    def picture(self, row: int) -> ImageRef:
        """One of its images."""
        values = {name: self.table[name][row].as_py() for name in PLACES if name in self.table.column_names}
        label = self.table["label"][row].as_py()
        split = next(split for split, (start, stop) in self.splits.items() if start <= row < stop)
        return ImageRef(split, self.labels[label] if label >= 0 else "", **values)

    def chunks(self, rows: range) -> list[range]:
        """These rows in pieces for one process to read: some files, or what lies in one row group."""
        in_groups = self.kind == "parquet"
        most = ROW_GROUP_CHUNK if in_groups else CHUNK
        starts = [rows.start]
        begins_group = self.table["at"].slice(rows.start, len(rows)).to_numpy() == 0
        for row in rows:
            grouped = in_groups and begins_group[row - rows.start]
            if row > starts[-1] and (grouped or row - starts[-1] == most):
                starts.append(row)
        return [range(*pair) for pair in pairwise([*starts, rows.stop])]


def load_manifest(path: Path) -> Manifest:
    """A manifest that `Manifest.save` wrote, memory-mapped."""
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    metadata = table.schema.metadata
    about = json.loads(metadata.get(b"manifest") or metadata[b"listing"])  # its name before
    splits = {split: tuple(rows) for split, rows in about["splits"].items()}
    kind = {"files": "images"}.get(about["kind"], about["kind"])  # its name before
    summary = tuple(about.get("summary", ()))
    return Manifest(kind, about["url"], tuple(about["labels"]), splits, about["others"], table, summary)


def list_images(source: Source, report: Report = lambda _: None) -> Manifest:
    """List a source. Raises UserError when it holds no image or cannot be understood."""
    import pyarrow as pa

    with reading(source.url):
        names, found, origin, listed = Listing(*KINDS[source.kind].list(source))
        pictures = []
        for picture in found:
            picture = picture._replace(
                label=normalize("NFC", picture.label), split=source.split or picture.split
            )
            pictures.append(picture)
            if len(pictures) % 1000 == 0:
                report(len(pictures))
    report(len(pictures))
    used = [p for p in pictures if p.at not in (BROKEN, UNUSED)]
    labels = (*names, *sorted_labels({p.label for p in used} - {*names, ""}))
    if not labels and used:
        raise UserError(f"{source.url}: not one of its {len(used)} images has a label ({origin})")
    if not labels:
        expected = "expected folders of images, named by label"
        reason = f"{pictures[0].source}: {pictures[0].detail}" if pictures else expected
        raise UserError(f"{source.url} has no images: {reason}")
    pictures.sort(key=lambda picture: picture.split)  # stable: within a split the source's order
    counts = Counter(picture.split for picture in pictures)
    splits = dict(zip(counts, pairwise([0, *accumulate(counts.values())]), strict=True))
    number = {label: i for i, label in enumerate(labels)}
    table = pa.table({
        "label": pa.array([number.get(p.label, -1) for p in pictures], pa.int32()),
        **{name: pa.array([getattr(p, name) for p in pictures], getattr(pa, kind)())
           for name, kind in PLACES.items()},
    })  # fmt: skip
    summary = tuple(summarize(used, labels, origin, source))
    if beside := sum(p.at == UNUSED for p in pictures):
        summary += (f"{beside} images that are about others, such as masks: skipped",)
    return Manifest(source.kind, source.url, labels, splits, others(source, listed), table, summary)


def summarize(
    pictures: list[ImageRef], labels: tuple[str, ...], origin: str, source: Source
) -> Iterator[str]:
    """What became of a collection, in lines for a person."""
    if labels == (NO_LABEL,):
        yield f"no labels: all images have the one label {NO_LABEL}"
    else:
        yield f"{len(labels)} classes" + (f" from {origin}" if origin else "")
    counts = Counter(picture.split for picture in pictures)
    bare = Counter(picture.split for picture in pictures if not picture.label)
    for split, number in bare.items():
        if number == counts[split]:
            yield f"{split} has no labels: {number} pictures skipped"
        else:
            yield f"{number} of {counts[split]} pictures in {split} have no label: skipped"
    captions = sum(bool(picture.caption) for picture in pictures)
    if captions:
        yield f"{captions} pictures have a caption, {len(pictures) - captions} have none"
    if source.mask_column and source.kind in ("images", "tars"):
        yield f"{sum(bool(picture.mask) for picture in pictures)} pictures have a mask"
    elif source.mask_column:
        yield f"masks from column {source.mask_column}"
    if "train" not in counts:
        yield f"only {' and '.join(sorted(counts))}: training needs images of the split train (`split` train)"
    if source.outside:
        yield f"{len(source.outside)} links lead out of the folder and were not followed (`follow_links`)"


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """By name; by number where all are numbers."""
    known = list(labels)
    numbers = all(label.isdecimal() for label in known)
    return sorted(known, key=lambda label: (int(label), label)) if numbers else sorted(known)


def others(source: Source, listed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files that are no images, as the kind of source listed them, and links that lead out."""
    outside = ((source.name(path), "a link that leads out of the folder") for path in source.outside)
    return [*listed, *others_of(outside)]


def read_image(
    manifest: Manifest, picture: ImageRef, hold: Callable[[], object] = lambda: None
) -> Image.Image:
    """An image as RGB, upright. `hold` is called before a large one is decoded, as `load_rgb` does.

    Raises UnusableImage with the reason, and UserError when its store cannot be reached for a while:
    then it is not the image's fault, and it is not to be left out.
    """
    if picture.at in (BROKEN, UNUSED):
        raise UnusableImage(picture.detail)
    if not picture.label:
        raise UnusableImage("it has no label")
    return load_rgb(io.BytesIO(content_of(manifest, picture)), hold)


def read_mask(
    manifest: Manifest, picture: ImageRef, size: tuple[int, int], hold: Callable[[], object] = lambda: None
) -> Image.Image | None:
    """What is white where an image of a size is to be learned, grey; None where it has no mask.

    Raises UnusableImage for a mask that cannot be read, and as `read_image` does.
    """
    if not picture.mask:
        return None
    place = KINDS[manifest.kind].mask
    assert place is not None  # else no image of the kind has one
    try:
        return load_mask(io.BytesIO(content_of(manifest, place(picture))), size, hold)
    except NoImage:
        return None
    except UnusableImage as error:
        raise UnusableImage(f"its mask cannot be used: {error}") from error


def content_of(manifest: Manifest, picture: ImageRef) -> bytes:
    """The bytes of an image. Raises as `read_image` does."""
    for pause in (*PAUSES, None):
        try:
            content = KINDS[manifest.kind].read(manifest.url, picture)
        except (UnusableImage, UserError, MemoryError):
            raise
        except Exception as error:  # libraries of remote stores have errors of their own
            if isinstance(error, FileNotFoundError):
                check_there(manifest, picture)
            if not may_pass(error, manifest.url):
                raise UnusableImage(f"cannot be read: {reason_of(error)}") from error
            if pause is None:
                now = f"{picture.source} cannot be read now ({reason_of(error)})"
                raise UserError(f"{now}: run the same command again later to resume") from error
            time.sleep(pause)
        else:
            break
    if not content:
        raise UnusableImage("empty")
    if what := what_it_is(content[:HEAD_BYTES]):
        raise UnusableImage(f"not an image but {what}")
    return content


def check_there(manifest: Manifest, picture: ImageRef) -> None:
    """UserError when a source, or a file of it that holds many images, is gone.

    Its images are not to be left out one by one.
    """
    system, path = filesystem(manifest.url)
    gone = manifest.url if not system.exists(root_of(system, path)) else os.fsdecode(picture.path)
    if gone == manifest.url or manifest.kind != "images":
        raise UserError(f"{gone} is gone: put it back and run the same command again to resume")


def may_pass(error: Exception, url: str) -> bool:
    """Whether to try again: stores elsewhere fail for a while; of a file here it is what is in it."""
    if isinstance(error, LASTING) or getattr(error, "errno", None) == errno.EIO:
        return False
    if not is_local(filesystem(url)[0]):
        return True
    damaged = type(error) is OSError and error.errno is None  # as Arrow says it
    return isinstance(error, OSError) and not damaged


# Errors that stay however often one tries. Arrow's are ValueErrors.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
PAUSES = (1.0, 4.0, 15.0)  # seconds before one tries again


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
