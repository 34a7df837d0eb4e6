"""Images into a token dataset: read and resize by several processes, autoencode, patchify, write.

The work is cut into shards, each a fixed slice of the source's list of images, and a shard is
encoded the same way whoever does it: so what was interrupted can be finished by any number of
processes, to the same bytes. A shard is done when its note in OUT/.encode says so.
"""

import contextlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fitv2.autoencoder import Autoencoder, load_autoencoder
from fitv2.config import Encoding
from fitv2.data.dataset import open_card
from fitv2.data.format import CARD, FORMAT, SKIPPED, About, Shard, described, finish, shard_name
from fitv2.data.storage import Store
from fitv2.encoding.kinds import open_source
from fitv2.encoding.manifest import Manifest, list_images, load_manifest
from fitv2.encoding.shard_encoder import Reader, ShardEncoder
from fitv2.encoding.sources import Source
from fitv2.errors import UserError
from fitv2.runtime.device import default_device, environment_number, single_threaded
from fitv2.runtime.distributed import ranks
from fitv2.runtime.files import only_writer, remove_own, write_json
from fitv2.runtime.serialization import from_dict, read_json
from fitv2.runtime.workers import read_ahead

PIXELS_A_TOKEN = 16  # side; the paper's: downsampling 8, patch 2
WORK = ".encode"  # folder in OUT for what is only needed until all is done
PLAN, LISTED = "plan.json", "pictures.arrow"
NOTE = re.compile(r".+-\d{5,}\.arrow\.json")  # that a shard is done
WAIT = 0.5  # seconds between looks for another process's list
PATIENCE = 600.0  # seconds until it has to have begun

StageProgress = Callable[[str, int, int | None], None]  # the stage, how many are done, of how many


@dataclass(frozen=True)
class Report:
    """What became of the images."""

    encoded: dict[str, int]  # of each split
    skipped: int
    others: int  # files that are no images by their names
    summary: tuple[str, ...] = ()  # what became of the collection, in lines for a person


@dataclass(frozen=True)
class Piece:
    """The images that become one shard: rows of the manifest."""

    name: str
    rows: range


@dataclass(frozen=True)
class Job:
    """What is to become of a manifest, and where."""

    out: Path
    about: About
    encoding: Encoding
    manifest: Manifest
    pieces: list[Piece]

    @property
    def pictures(self) -> int:
        """How many there are to encode."""
        return sum(len(piece.rows) for piece in self.pieces)

    def note_of(self, piece: Piece, checked: bool = False) -> dict[str, Any] | None:
        """What was noted of a shard when it was done: `shard` (None if it has no rows) and `skipped`.

        None if it was not, or in another format, or its file has another size, or (`checked`) other bytes.
        """
        path, shard = self.out / WORK / f"{piece.name}.json", self.out / piece.name
        if not path.exists():
            return None
        note = read_json(path)
        if note.get("format") != FORMAT:  # begun by another version
            return None
        written = note["shard"]
        if written is None:
            return note
        if not shard.exists() or shard.stat().st_size != written["bytes"]:
            return None
        return None if checked and described(shard).sha256 != written["sha256"] else note

    def write(self, piece: Piece, shard: ShardEncoder) -> None:
        """Write a shard, then the note that it is done."""
        rows, work = shard.rows(), self.out / WORK
        written = asdict(rows.write(self.out / piece.name, self.about, work)) if rows.tokens else None
        note = {"format": FORMAT, "shard": written, "skipped": shard.skipped}
        write_json(work / f"{piece.name}.json", note, work)


def encode(
    source: str | Path,
    out: Path,
    encoding: Encoding | None = None,
    *,
    workers: int | None = None,
    progress: StageProgress = lambda stage, done, total: None,
) -> Report | None:
    """Encode a source of images (see `fitv2.encoding.sources`) into the folder `out`, or resume there.

    Under torchrun each process does its share; the one that finishes last makes the dataset
    whole, and for the others the result is None. `workers` processes read images [default: as many
    as there are processors; with 0 they are read here]. Images that cannot be used are
    listed in out/skipped.jsonl. Raises UserError when nothing can be encoded (then `out` is not
    made), and when `out` holds other things or was begun with other settings.
    """
    encoding = encoding or Encoding()
    if re.match(r"\w+:/", str(out)):
        raise UserError(f"{out} is no folder on this machine: encode there, and upload it afterwards")
    out = out.absolute()  # Arrow would take a leading ~ for the home folder
    if out.is_relative_to(Path(source).absolute()):
        raise UserError(f"{out} lies in {source}, the source: choose a folder elsewhere")
    rank, world = ranks()
    # Whoever asks for an autoencoder by name wants it fetched.
    codec = load_autoencoder(encoding.autoencoder, default_device(), encoding.precision, allow_download=True)
    patch = encoding.patch_size or max(1, PIXELS_A_TOKEN // codec.downsample)
    opened = open_source(
        str(source), encoding.image_column, encoding.label_column, encoding.caption_column,
        encoding.mask_column, split=encoding.split, follow_links=encoding.follow_links,
    )  # fmt: skip
    decided = {"autoencoder": codec.name, "patch_size": patch, "source": opened.fingerprint}
    settings = asdict(encoding) | decided
    with only_writer(out) if rank == 0 else contextlib.nullcontext():
        settle(out, settings, begins=rank == 0)
        list_once(out, opened, settings, rank == 0, progress)
        del opened  # names of all files, which every reading process would hold
        try:
            return share(out, encoding, codec, patch, (rank, world), workers, progress)
        except (FileNotFoundError, UserError):  # another process may have made it whole, and cleared up
            if not (out / CARD).exists():
                raise
            return finished(out)


def share(
    out: Path,
    encoding: Encoding,
    codec: Autoencoder,
    patch: int,
    place: tuple[int, int],
    workers: int | None,
    progress: StageProgress,
) -> Report | None:
    """The part of process `place` (which, of how many); and the end, if it is the last to finish."""
    if (out / CARD).exists():
        return finished(out)
    manifest = load_manifest(out / WORK / LISTED)
    about = About(
        labels=manifest.labels,
        autoencoder=codec.name,
        scale=codec.scale,
        shift=codec.shift,
        patch_size=patch,
        in_channels=codec.channels,
        max_tokens=max(encoding.max_tokens),
        encoding=read_json(out / WORK / PLAN),
    )
    job = Job(out, about, encoding, manifest, pieces_of(manifest, encoding.shard_size))
    reader = Reader(out / WORK / LISTED, encoding, patch * codec.downsample)
    rank, world = place
    mine = replace(job, pieces=job.pieces[rank::world])
    stage = "encode" if world == 1 else f"encode, process {rank + 1} of {world}"
    work(mine, codec, reader, processors() if workers is None else workers, partial(progress, stage))
    return conclude(job)


def processors() -> int:
    """This process's share of the machine's."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, here // max(1, environment_number("LOCAL_WORLD_SIZE", 1)))


def settle(out: Path, settings: dict[str, Any], begins: bool) -> None:
    """Note the settings in a new folder if this process begins, or compare them with those noted before.

    Raises UserError naming those that differ, or when the folder holds other things.
    """
    before = settings_of(out)
    if before is None:
        if out.exists() and (not out.is_dir() or any(path.name != WORK for path in out.iterdir())):
            raise UserError(f"{out} already exists and is not empty: remove it or choose another")
        if begins:
            (out / WORK).mkdir(parents=True, exist_ok=True)
            write_json(out / WORK / PLAN, settings)
        return
    before = asdict(Encoding()) | before  # a setting that there was not was at its default
    now = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in differing)
        raise UserError(f"{out} was encoded otherwise: {changes}. Choose another folder")


def settings_of(out: Path) -> dict[str, Any] | None:
    """Those that a folder is, or was, encoded with. The plan goes away only when the card is there."""
    if (out / WORK / PLAN).exists():
        with contextlib.suppress(UserError):
            return read_json(out / WORK / PLAN)
    return open_card(Store(out)).about.encoding if (out / CARD).exists() else None


def list_once(
    out: Path, opened: Source, settings: dict[str, Any], begins: bool, progress: StageProgress
) -> None:
    """Have the images listed, by the process that begins; if there are none, leave no folder behind."""
    path = out / WORK / LISTED
    if begins and not path.exists() and not (out / CARD).exists():
        try:
            list_images(opened, lambda found: progress("list", found, None)).save(path, path.parent)
        except UserError:
            clear_up(out)
            raise
    seconds, begun = 0.0, False
    while not (path.exists() or (out / CARD).exists()):
        if begun and not (out / WORK / PLAN).exists() and not (out / CARD).exists():
            raise UserError("process 1 found no images: see what it says")
        if not begun and seconds > PATIENCE:
            raise UserError(
                f"process 1 has not begun in {out} for {PATIENCE:.0f} seconds: all need the same folder"
            )
        begun = begun or (out / WORK / PLAN).exists()
        progress("wait for process 1 to list the images", int(seconds), None)
        time.sleep(WAIT)
        seconds += WAIT
    if not begins:
        settle(out, settings, begins)  # only now there is something to compare with


def pieces_of(manifest: Manifest, size: int) -> list[Piece]:
    """The shards of a manifest, `size` images each."""
    return [
        Piece(shard_name(split, number), range(first, min(first + size, stop)))
        for split, (start, stop) in manifest.splits.items()
        for number, first in enumerate(range(start, stop, size))
    ]


def work(
    job: Job, codec: Autoencoder, reader: Reader, workers: int, progress: Callable[[int, int], None]
) -> None:
    """Encode what is not done: reading, autoencoding and writing each while the others go on.

    On a CPU several batches are encoded at once, each by one thread: how many there are then does not
    show in the results. (oneDNN adds up in another order with more threads.)
    """
    todo = [piece for piece in job.pieces if job.note_of(piece, checked=True) is None]
    done = job.pictures - sum(len(piece.rows) for piece in todo)
    progress(done, job.pictures)
    chunks = {piece.name: job.manifest.chunks(piece.rows) for piece in todo}
    read = read_ahead(reader.read, [chunk for piece in todo for chunk in chunks[piece.name]], workers)
    writing: Future[None] | None = None
    with single_threaded() as cores, contextlib.closing(read):
        threads = cores if default_device().type == "cpu" else 1
        one_each = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        with one_each as autoencoding, ThreadPoolExecutor(1) as writers:
            for piece in todo:
                shard = ShardEncoder(job.about, job.encoding, codec, autoencoding, threads + 1)
                for fitted in itertools.chain.from_iterable(next(read) for _ in chunks[piece.name]):
                    shard.add(fitted)
                    done += 1
                    progress(done, job.pictures)
                shard.encode_rest()
                if writing:
                    writing.result()
                writing = writers.submit(job.write, piece, shard)
            if writing:
                writing.result()


def conclude(job: Job) -> Report | None:
    """Make the dataset whole if every shard is done. Several processes may do so at once.

    Raises UserError, and removes the folder, when not one image could be used.
    """
    notes = {piece.name: job.note_of(piece) for piece in job.pieces}
    done = {name: note for name, note in notes.items() if note}
    if len(done) < len(notes):
        return finished(job.out, job.manifest.summary) if (job.out / CARD).exists() else None
    skipped = [entry for note in done.values() for entry in note["skipped"]]
    shards = {name: from_dict(Shard, note["shard"]) for name, note in done.items() if note["shard"]}
    if not shards:
        clear_up(job.out)
        first = f"{skipped[0]['source']}: {skipped[0]['reason']}"
        raise UserError(f"none of the {job.pictures} images can be used; the first, {first}")
    finish(job.out, job.about, shards, [*job.manifest.others, *skipped], job.out / WORK)
    return finished(job.out, job.manifest.summary)


def clear_up(out: Path) -> None:
    """Remove what was only needed until now, and the folder if nothing is in it."""
    remove_own(out / WORK, lambda name: name in (PLAN, LISTED) or NOTE.fullmatch(name) is not None)
    with contextlib.suppress(OSError):  # not empty
        out.rmdir()


def finished(out: Path, summary: tuple[str, ...] = ()) -> Report:
    """Clear up in a folder that is whole, and say what it holds."""
    clear_up(out)
    lines = (out / SKIPPED).read_text(encoding="utf-8").splitlines() if (out / SKIPPED).exists() else []
    alike = [json.loads(line).get("files_like_it", 0) for line in lines]
    return Report(open_card(Store(out)).pictures, alike.count(0), sum(alike), summary)
