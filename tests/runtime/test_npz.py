import numpy as np

from fitv2.runtime.npz import write_npz


def test_what_was_written_piece_by_piece_is_read_whole(tmp_path):
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    mu = np.linspace(0, 1, 5)
    write_npz(tmp_path / "x.npz", images.shape, (image.tobytes() for image in images), {"mu": mu})
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert np.array_equal(file["arr_0"], images)
        assert np.array_equal(file["mu"], mu)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
