"""What is checked of a folder that the library `datasets` saved before that library reads it."""

import json
import os
import posixpath
from collections.abc import Iterator
from typing import Any

from fitv2.data.storage import filesystem, is_local
from fitv2.encoding.sources import HEAD_BYTES, Source, head_of, read_whole, what_it_is
from fitv2.errors import UserError

MOST_JSON = 64 << 20  # bytes


def check_saved(source: Source) -> None:
    """UserError for a folder of this machine whose files lead out of it, or unpack to more than they are."""
    if not is_local(filesystem(source.url)[0]):
        return
    outside = {source.name(path) for path in source.outside}
    for name in data_files(source):
        if name in outside or name.startswith("../") or posixpath.isabs(name):
            raise UserError(f"{source.url}: its file {name} lies outside it, where nothing is read")
        path = posixpath.join(source.root, name)
        if what := what_it_is(head_of(path)[:HEAD_BYTES]):
            raise UserError(f"{source.url}: {name} is {what}")
        if name.endswith(".arrow") and os.path.isfile(path) and is_compressed(path):  # noqa: PTH113
            raise UserError(f"{source.url}: {name} is compressed, which `datasets` does not: save it again")


def data_files(source: Source) -> Iterator[str]:
    """The files that `datasets` would read, by their names in the folder."""
    whole = source.root
    parts = [""]
    if os.path.exists(posixpath.join(whole, "dataset_dict.json")):  # noqa: PTH110
        yield "dataset_dict.json"
        parts = [str(part) for part in _json(whole, "dataset_dict.json")["splits"]]
    for part in parts:
        for name in ("state.json", "dataset_info.json"):
            yield posixpath.normpath(posixpath.join(part, name))
        for file in _json(whole, posixpath.join(part, "state.json"))["_data_files"]:
            yield posixpath.normpath(posixpath.join(part, str(file["filename"])))


def _json(folder: str, name: str) -> Any:
    return json.loads(read_whole(posixpath.join(folder, name), folder, MOST_JSON))


def is_compressed(path: str) -> bool:
    """Whether a record batch of an Arrow stream is: it could unpack to any size."""
    import pyarrow as pa

    with pa.memory_map(path) as file:
        messages = pa.ipc.MessageReader.open_stream(file)
        for message in iter(messages.read_next_message, None):
            if message.type in ("record batch", "dictionary") and _says_compression(
                message.metadata.to_pybytes(), message.type == "dictionary"
            ):
                return True
    return False


def _says_compression(metadata: bytes, in_dictionary: bool) -> bool:
    """Arrow's Message.fbs: Message.header (field 2) is a RecordBatch, or a DictionaryBatch that has one as
    its field 1; RecordBatch.compression is field 3."""
    table = int.from_bytes(metadata[:4], "little")
    for number in (2, 1) if in_dictionary else (2,):
        at = _field(metadata, table, number)
        table = at + int.from_bytes(metadata[at : at + 4], "little")
    return _field(metadata, table, 3) > table


def _field(metadata: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table lies; the table itself if it is left out."""
    shape = table - int.from_bytes(metadata[table : table + 4], "little", signed=True)
    size = int.from_bytes(metadata[shape : shape + 2], "little")
    slot = 4 + 2 * number
    return table + (int.from_bytes(metadata[shape + slot : shape + slot + 2], "little") if slot < size else 0)
