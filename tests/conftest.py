"""Small real images, datasets and models that tests share."""

import importlib.util
import io
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from fitv2.checkpoint import Card, save_model
from fitv2.cli.commands import main
from fitv2.config import Encoding
from fitv2.diffusion.noise import draw_noise
from fitv2.encoding.encode import encode
from fitv2.evaluation.features import EXTRACTORS
from fitv2.model import FiT
from fitv2.runtime.rng import generator
from fitv2.runtime.signals import NUMBERS

torch.set_num_threads(1)
os.environ["FITV2_DEVICE"] = "cpu"  # tests marked gpu name theirs


def fitv2(capsys, *arguments):
    """Run one command in this process: its status, output and error output."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["fitv2", *map(str, arguments)])
            main()
    finally:  # a command's handlers would end the forks of later tests without a word
        for number, handler in before.items():
            signal.signal(number, handler)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def picture(width, height, seed=0):
    """An image with some structure: two colours and a diagonal between them."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 3))
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.where((x * height > y * width)[..., None], *colours).astype(np.uint8))


def encoded_picture(width=16, height=16, seed=0):
    """Such an image as the bytes of a PNG."""
    file = io.BytesIO()
    picture(width, height, seed).save(file, "PNG")
    return file.getvalue()


def randomized(model, seed=0):
    """The model with random weights everywhere: at initialization adaLN-Zero's output is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


GAUSSIAN_MEAN, GAUSSIAN_STD = 0.4, 0.6


def gaussian(flow, layout):
    """The velocity of the flow to N(0.4, 0.6²), for times () and (B,)."""

    def velocity(x, t):
        t = layout.spread(t.expand(len(layout)))[:, None].to(x.dtype)
        (alpha, sigma), (alpha_rate, sigma_rate) = flow.path.coefficients(t), flow.path.derivatives(t)
        variance = alpha**2 * GAUSSIAN_STD**2 + sigma**2
        slope = (alpha * alpha_rate * GAUSSIAN_STD**2 + sigma * sigma_rate) / variance
        return alpha_rate * GAUSSIAN_MEAN + slope * (x - alpha * GAUSSIAN_MEAN)

    return velocity


def noise_of(layout, channels, first=0):
    """Noise tokens for a layout, image i's from the key (first + i,)."""
    return draw_noise(layout.lengths, channels, [generator(first + i) for i in range(len(layout))])


FORK = multiprocessing.get_context("fork")  # a fresh interpreter would take seconds to import


def together(size, work):
    """What `work` of each rank raises, as text, in so many processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = FORK.Queue()

    def run(rank):
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        try:
            work(rank)
        except Exception as error:
            said.put((rank, f"{type(error).__name__}: {error}"))
        else:
            said.put((rank, None))

    processes = [FORK.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    errors = dict(said.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * size
    return [errors[rank] for rank in range(size)]


def held_out_set(folder, tmp_path):
    """The images of `folder` as both splits of a data set."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": path.read_bytes(), "path": None}, "label": path.parent.name}
        for path in sorted(folder.rglob("*.png"))
    ]
    (tmp_path / "source").mkdir()
    for split in ("train", "validation"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "source" / f"{split}.parquet")
    encode(tmp_path / "source", tmp_path / "set", Encoding(max_tokens=(16,)), workers=0)
    return tmp_path / "set"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder of 12 images of several shapes under the labels blue and red."""
    root = tmp_path_factory.mktemp("pictures")
    for i, (width, height) in enumerate([(64, 64), (48, 96), (96, 48), (32, 32), (200, 80), (16, 70)] * 2):
        path = root / ("red" if i % 2 else "blue") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        picture(width, height, i).save(path)
    return root


@pytest.fixture(scope="session")
def tokens(folder, tmp_path_factory) -> Path:
    """That folder, encoded in pixels, at most 16 tokens an image."""
    out = tmp_path_factory.mktemp("tokens") / "set"
    encode(folder, out, Encoding(max_tokens=(16,)), workers=0)
    return out


@pytest.fixture
def model() -> FiT:
    """A tiny model with random weights everywhere."""
    shape = {"depth": 2, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}
    return randomized(FiT(**shape)).eval()


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """A tiny AutoencoderKL with downsampling 8, a scale and a shift, saved as diffusers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
        scaling_factor=0.5, shift_factor=0.25,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def holding(tmp_path):
    """A folder with files of these names."""

    def holding(*names):
        for name in names:
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        return str(tmp_path / "source")

    return holding


def write_latent(path, shape, number, seed=0, **changes):
    """One released file: both flips of an image of `shape` tokens with label `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    rows, columns = shape
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    save_file(
        {
            "feature": torch.randn(2, rows, columns, 16, generator=rng),
            "grid": torch.stack([column.flatten(), row.flatten()]),
            "size": torch.tensor([rows, columns], dtype=torch.int32),
            "label": torch.tensor(number),
        }
        | changes,
        path,
    )
    return path


@pytest.fixture
def latents(tmp_path):
    """Three images: a small one, one resized alone, one resized and cropped."""
    root = tmp_path / "latents"
    write_latent(root / "from_16_to_16" / "a.safetensors", (2, 3), 5, 1)
    write_latent(root / "greater_than_16_resize" / "b.safetensors", (2, 8), 6, 2)
    write_latent(root / "greater_than_16_resize" / "c.safetensors", (3, 5), 7, 3)
    write_latent(root / "greater_than_16_crop" / "c.safetensors", (4, 4), 7, 4)
    write_latent(root / "less_than_16" / "d.safetensors", (1, 1), 7, 4)
    return root


# Evaluation


@pytest.fixture(scope="session")
def fidelity():
    """torch_fidelity. It imports torchvision for built-in datasets alone, which no test asks for."""
    if importlib.util.find_spec("torchvision") is None:
        names = [
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ]
        modules = {name: ModuleType(name) for name in names}
        for name in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(modules["torchvision.datasets"], name, type(name, (), {}))
        for name, module in modules.items():
            above, _, own = name.rpartition(".")
            if above:
                setattr(modules[above], own, module)
        sys.modules |= modules
        fidelity = pytest.importorskip("torch_fidelity")
        for name in modules:  # other libraries ask whether it is there
            del sys.modules[name]
        return fidelity
    return pytest.importorskip("torch_fidelity")


class Colours:
    """An extractor that a test can reckon with: means and deviations of the colours, and of the halves'."""

    names = ("efficientnet",)
    digest = "0" * 64

    def __init__(self, *_):
        pass

    def __call__(self, pixels):
        x = pixels.float() / 255
        half = x.shape[3] // 2
        parts = [x.mean((2, 3)), x.std((2, 3)), x[..., :half].mean((2, 3)), x[..., half:].std((2, 3))]
        return {"efficientnet": torch.cat(parts, 1)}


@pytest.fixture
def colours(monkeypatch):
    """Features that cost nothing, under the name of the default ones."""
    monkeypatch.setitem(EXTRACTORS, "efficientnet", Colours)
    return Colours()


@pytest.fixture(scope="session")
def pixel_model(tmp_path_factory):
    """The folder of a tiny model of labels."""
    shape = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 2}
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(randomized(FiT(**shape)), Card(("blue", "red"), "pixels", 16, 1.0), folder)
    return folder


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """60 pictures of two labels and many shapes."""
    folder = tmp_path_factory.mktemp("real")
    for i in range(60):
        path = folder / ("blue" if i % 2 else "red") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        picture(20 + i % 7, 18 + i % 5, i).save(path)
    return folder


@pytest.fixture
def npz(tmp_path):
    images = np.stack([np.asarray(picture(16, 16, i)) for i in range(30)])
    np.savez(tmp_path / "batch.npz", images)
    return tmp_path / "batch.npz"
