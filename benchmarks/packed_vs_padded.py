"""Packed tokens against padding with a dense mask: the same model, images, noise and times.

    python benchmarks/packed_vs_padded.py [--json]

The padded side follows the released code: every image padded to the token limit, a dense B×N×N
mask built in every block, modulation broadcast over padding. It uses the parameters of our own
model, and its loss and velocity are checked against the packed side's before anything is timed.
Steps alternate in one process; a ratio is the padded median over the packed one.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention, silu
from tqdm import tqdm

from fitv2.conditioning import Condition
from fitv2.config import Guidance, Rope
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.guidance import guide
from fitv2.diffusion.noise import NoisySample, draw_noise
from fitv2.encoding.images import resized
from fitv2.model import EPS, Attention, Block, FiT, SwiGLU
from fitv2.rope import rotation
from fitv2.runtime.rng import generator
from fitv2.sampling.generate import cut_into_packs, default_tokens_per_pack
from fitv2.sampling.requests import Request
from fitv2.tokens import Layout, Size

# The commonest sizes of ImageNet's training pictures, with about their shares of it; the rest is
# drawn at random below.
IMAGENET = {(500, 375): 0.47, (375, 500): 0.14, (500, 333): 0.10, (333, 500): 0.05, (500, 500): 0.04}
GUIDANCE = 1.5


def imagenet_sizes(count: int, rng: np.random.Generator) -> list[Size]:
    """Token grids of ImageNet-like pictures under the paper's limit of 256 tokens."""
    known = list(IMAGENET)
    rest = 1 - sum(IMAGENET.values())
    sizes = []
    for choice in rng.choice(len(known) + 1, size=count, p=[*IMAGENET.values(), rest]):
        if choice < len(known):
            width, height = known[choice]
        else:
            area, aspect = rng.lognormal(math.log(400), 0.5) ** 2, math.exp(rng.normal(0.2, 0.35))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        columns, rows = (side // 16 for side in resized(width, height, 256, 16))
        sizes.append((rows, columns))
    return sizes


def mixed_sizes(count: int, rng: np.random.Generator) -> list[Size]:
    """Grids from 16 to 1024 tokens, log-uniform in length, aspect ratios up to 3."""
    sizes = []
    for length in np.exp(rng.uniform(math.log(16), math.log(1024), size=count)):
        rows = max(1, round(math.sqrt(length * math.exp(rng.uniform(-1.1, 1.1)))))
        sizes.append((rows, max(1, min(round(length / rows), 1024 // rows))))
    return sizes


# The padded side ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Padded:
    """The layout of the released code."""

    mask_BN: Tensor  # 1 on tokens, 0 on padding
    cos_B1NK: Tensor
    sin_B1NK: Tensor


def pad(value_TC: Tensor, mask_BN: Tensor) -> Tensor:
    padded = value_TC.new_zeros(*mask_BN.shape, value_TC.shape[-1])
    padded[mask_BN.bool()] = value_TC
    return padded


def padded_layout(layout: Layout, limit: int, head_dim: int) -> Padded:
    mask_BN = (torch.arange(limit) < torch.tensor(layout.lengths)[:, None]).to(torch.uint8)
    turn_TK = rotation(layout, head_dim, Rope())[:, 0].repeat_interleave(2, dim=1)
    return Padded(mask_BN, pad(turn_TK.real, mask_BN)[:, None], pad(turn_TK.imag, mask_BN)[:, None])


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


def padded_attention(module: Attention, x_BND: Tensor, pads: Padded) -> Tensor:
    qkv = module.qkv(x_BND).unflatten(2, (3, module.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = (layer_norm(part, part.shape[-1:], eps=EPS) for part in (q, k))
    q, k = (part * pads.cos_B1NK + rotate_half(part) * pads.sin_B1NK for part in (q, k))
    row = pads.mask_BN[:, None, None, :]
    out = scaled_dot_product_attention(q, k, v, attn_mask=row == row.transpose(-2, -1))
    return module.out(out.transpose(1, 2).flatten(2) * pads.mask_BN[..., None])


def padded_mlp(module: SwiGLU, x_BND: Tensor) -> Tensor:
    gate, up = (
        linear(x_BND, weight, bias)
        for weight, bias in zip(module.gate_up.weight.chunk(2), module.gate_up.bias.chunk(2), strict=True)
    )
    return module.down(silu(gate) * up)


def padded_forward(model: FiT, x_BNC: Tensor, t_B: Tensor, condition: Condition, pads: Padded) -> Tensor:
    silu_c = silu(model.embed(t_B, condition, model.dtype))
    assert model.modulation is not None
    shared = model.modulation(silu_c)
    x = model.patch_embed(x_BNC)
    for block in cast(list[Block], model.blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = (shared + block.modulation(silu_c)).chunk(6, 1)
        branch = padded_attention(block.attention, modulate(x, shift1, scale1), pads)
        x = x + gate1[:, None] * branch
        x = x + gate2[:, None] * padded_mlp(block.mlp, modulate(x, shift2, scale2))
    shift, scale = model.head.modulation(silu_c).chunk(2, dim=1)
    return model.head.out(modulate(x, shift, scale)) * pads.mask_BN[..., None]


# One step of each kind ---------------------------------------------------------------------------


class Case:
    """The same batch for both sides."""

    def __init__(self, model: FiT, sizes: list[Size], limit: int) -> None:
        self.model, self.limit = model, limit
        sizes = sorted(sizes, key=lambda size: size[0] * size[1])
        layout = Layout.of(sizes)
        data, start = (
            draw_noise(layout.lengths, model.token_channels, [generator(part, i) for i in range(len(sizes))])
            for part in (0, 1)
        )
        self.t_B = torch.linspace(0.1, 0.9, len(sizes))
        self.flow = Flow.of(model.architecture)
        self.sample: NoisySample = self.flow.add_noise(data, layout, start, self.t_B)
        self.condition = Condition.of(label=torch.arange(len(sizes)) % model.architecture.num_classes)
        self.pads = padded_layout(layout, limit, model.architecture.width // model.architecture.heads)
        fields = (self.sample.x_TC, data, start)
        self.x_BNC, self.data_BNC, self.start_BNC = (pad(x, self.pads.mask_BN) for x in fields)
        self.velocities = list(self.in_packs(sizes))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def in_packs(self, sizes: list[Size]) -> Iterator[tuple[int, Callable[[Tensor, Tensor], Tensor]]]:
        """Tokens and guided velocity of each pack that sampling would make of these images."""
        requests = [
            Request(self.condition.select([i]), size, generator(0)) for i, size in enumerate(sizes)
        ]  # of tokens of one pixel
        for batch in cut_into_packs(requests, 1, default_tokens_per_pack(torch.device("cpu"))):
            condition = Condition.concatenate([request.condition for request in batch])
            layout = Layout.of([request.pixels for request in batch])
            output = guide(self.model, layout, condition, Guidance(GUIDANCE), self.flow)
            yield layout.tokens, self.flow.follow(output, layout)

    def train(self, loss: Callable[[], Tensor]) -> float:
        value = loss()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.item()

    def packed_loss(self) -> Tensor:
        return self.flow.loss(self.model, self.sample, self.condition).total_B.mean()

    def padded_loss(self) -> Tensor:
        output = padded_forward(self.model, self.x_BNC, self.t_B, self.condition, self.pads)
        error = (output - (self.data_BNC - self.start_BNC)).square() * self.pads.mask_BN[..., None]
        return (error.mean(2).sum(1) / self.pads.mask_BN.sum(1)).mean()

    @torch.inference_mode()
    def packed_sample(self) -> Tensor:
        t = torch.tensor(0.5)
        pieces = self.sample.x_TC.split([tokens for tokens, _ in self.velocities])
        moved = [x + 0.1 * v(x, t) for x, (_, v) in zip(pieces, self.velocities, strict=True)]
        return torch.cat(moved)

    @torch.inference_mode()
    def padded_sample(self) -> Tensor:
        cos, sin = self.pads.cos_B1NK, self.pads.sin_B1NK
        twice = Padded(self.pads.mask_BN.repeat(2, 1), cos.repeat(2, 1, 1, 1), sin.repeat(2, 1, 1, 1))
        x = self.x_BNC.repeat(2, 1, 1)
        t_B = torch.full((len(x),), 0.5)
        condition = Condition.concatenate([self.condition, self.condition.null()])
        both = padded_forward(self.model, x, t_B, condition, twice)
        conditional, unconditional = both.chunk(2)
        return self.x_BNC + 0.1 * (unconditional + GUIDANCE * (conditional - unconditional))

    def check_equal(self) -> None:
        """Both sides compute the same numbers, or the comparison is void."""
        torch.testing.assert_close(self.packed_loss(), self.padded_loss(), rtol=1e-4, atol=1e-5)
        padded = self.padded_sample()[self.pads.mask_BN.bool()]
        torch.testing.assert_close(self.packed_sample(), padded, rtol=1e-3, atol=1e-4)

    def steps(self) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
        """Of each kind of step, the padded and the packed way."""
        return {
            "sample": (self.padded_sample, self.packed_sample),
            "train": (lambda: self.train(self.padded_loss), lambda: self.train(self.packed_loss)),
        }


def flops(lengths: Sequence[int], width: int) -> float:
    """Of one block's forward pass: 24·D² a token in its products, 4·N·D in attention over N tokens."""
    return sum(n * (24 * width**2 + 4 * n * width) for n in lengths)


def measure(case: Case, repeats: int, title: str) -> dict[str, dict[str, float]]:
    """Median seconds of each side, alternating, after one warm-up of each."""
    result = {}
    for kind, sides in case.steps().items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for i in tqdm(range(repeats + 1), f"{title} {kind}", leave=False):
            for side, times in zip(sides, seconds, strict=True):
                started = time.perf_counter()
                side()
                if i:
                    times.append(time.perf_counter() - started)
        padded, packed = map(statistics.median, seconds)
        result[kind] = {"padded_s": padded, "packed_s": packed, "ratio": padded / packed}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one object of ratios and nothing else")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("imagenet_256", "mixed_1024"), help="one of the mixes")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = FiT(depth=options.depth, width=options.width, heads=options.width // 64)
    for parameter in model.parameters():  # trained weights have no zero gates
        torch.nn.init.normal_(parameter, std=0.02)
    mixes = {
        "imagenet_256": (imagenet_sizes(32, np.random.default_rng(0)), 256),
        "mixed_1024": (mixed_sizes(16, np.random.default_rng(0)), 1024),
    }
    ratios = {}
    for name, (sizes, limit) in mixes.items():
        if options.only not in (None, name):
            continue
        case = Case(model, sizes, limit)
        case.check_equal()
        result = measure(case, options.repeats, name)
        ratios[name] = {kind: round(values["ratio"], 3) for kind, values in result.items()}
        if not options.json:
            tokens = sum(rows * columns for rows, columns in sizes)
            least = [rows * columns for rows, columns in sizes]
            floor = flops([limit] * len(sizes), options.width) / flops(least, options.width)
            print(
                f"{name}: {len(sizes)} images, {tokens} tokens packed, {limit * len(sizes)} padded; "
                f"{floor:.2f} times the FLOPs padded"
            )
            for kind, v in result.items():
                print(
                    f"  {kind:7} {v['padded_s']:.3f} s padded, {v['packed_s']:.3f} s packed: {v['ratio']:.2f}"
                )
    if options.json:
        print(json.dumps(ratios))
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} threads, float32")


if __name__ == "__main__":
    main()
