"""Features piece by piece."""

import pytest

from conftest import picture
from fitv2.errors import UserError
from fitv2.evaluation import extract as extraction
from fitv2.evaluation.extract import collect, extract, is_whole, piece_paths
from fitv2.evaluation.reference import Collection


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(extraction, "PIECE", 8)


def test_pieces_are_shared_and_never_done_twice(tmp_path, colours):
    class Counted:
        def __init__(self):
            self.read_numbers = []

        def __len__(self):
            return 20

        def read(self, numbers):
            self.read_numbers += numbers
            return [picture(8, 8, number) for number in numbers]

    pictures = Counted()
    extract(pictures, [colours], tmp_path, (1, 2))
    assert pictures.read_numbers == list(range(8, 16))
    assert not is_whole(tmp_path, 20)
    extract(pictures, [colours], tmp_path, (0, 1))
    assert sorted(pictures.read_numbers) == list(range(20))
    assert collect(tmp_path, 20).numbers == list(range(20))


def test_a_damaged_piece_is_named(tmp_path, colours, real):
    taken = Collection.open(str(real), None).pictures((8, 8), 1.0)
    extract(taken, [colours], tmp_path)
    piece_paths(tmp_path, 60)[2].write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"00002\.safetensors"):
        collect(tmp_path, len(taken))
