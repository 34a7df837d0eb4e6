import pickle
from typing import ClassVar

import fsspec
import numpy as np
import pytest

from fitv2.data.storage import OPEN_FILES, Store, filesystem
from fitv2.errors import UserError

CONTENT = {"a": bytes(range(100)), "b": bytes(range(100, 200))}


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path):
    """The same two files on this disk, and in a store of fsspec's."""
    url = str(tmp_path) if request.param == "local" else "memory://stores/test"
    system, path = filesystem(url)
    for name, content in CONTENT.items():
        system.pipe(f"{path}/{name}", content)
    yield Store(url)
    system.rm(path, recursive=True)


def test_sizes_and_whole_files(store):
    assert store.sizes() == {"a": 100, "b": 100}
    assert store.read("b").to_pybytes() == CONTENT["b"]
    assert Store(f"{store}/none").sizes() == {}


def test_pieces_of_files_in_the_order_asked_for(store):
    out = np.zeros(9, np.uint8)
    store.fill(out, [("b", 50), ("a", 0), ("b", 0)], [4, 3, 2])
    assert out.tolist() == [150, 151, 152, 153, 0, 1, 2, 100, 101]


def test_a_file_that_ends_too_early_is_named(store):
    with pytest.raises(UserError, match="/a is damaged: it ends too early"):
        store.fill(np.zeros(9, np.uint8), [("a", 95)], [9])


def test_it_can_be_sent_to_another_process(store):
    out = np.zeros(1, np.uint8)
    store.fill(out, [("a", 7)], [1])
    pickle.loads(pickle.dumps(store)).fill(out, [("a", 8)], [1])
    assert out.tolist() == [8]


def test_more_files_than_may_be_open(tmp_path):
    for i in range(OPEN_FILES + 50):
        (tmp_path / str(i)).write_bytes(bytes([i % 256]))
    store, out = Store(tmp_path), np.zeros(OPEN_FILES + 50, np.uint8)
    names = [str(i) for i in range(OPEN_FILES + 50)]
    for _ in range(2):
        store.fill(out, [(name, 0) for name in names], [1] * len(names))
        assert (out == np.arange(len(names)) % 256).all()


class Counting(fsspec.AbstractFileSystem):
    """As that of the hub: no ranges of its own, files that are read in blocks."""

    protocol = "counting"
    fetched: ClassVar[list[tuple[int, int]]] = []

    def _open(self, path, mode="rb", **options):
        return CountedFile(self, path, mode, size=100_000_000, **options)


class CountedFile(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start, end):
        Counting.fetched.append((start, end))
        return bytes(end - start)


def test_no_more_is_fetched_than_is_asked_for():
    fsspec.register_implementation("counting", Counting)
    out = np.ones(30, np.uint8)
    Store("counting://folder").fill(out, [("a", 50_000_000), ("b", 7)], [20, 10])
    assert sorted(Counting.fetched) == [(7, 17), (50_000_000, 50_000_020)]
    assert not out.any()


def test_a_protocol_that_there_is_none_of_is_named():
    with pytest.raises(UserError, match="nonsense://x cannot be reached"):
        filesystem("nonsense://x")
    assert isinstance(filesystem("memory://x")[0], fsspec.AbstractFileSystem)
