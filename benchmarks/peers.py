"""Training beside the peers on what they are made for: squares of one size, one batch of tensors.

    python benchmarks/peers.py [--peers SiT JiT] [--batch 48] [--side 8] [--compile] [--precision bfloat16]

A peer is the square transformer that its paper describes, made the plain way in the forty lines below: a
batch of tensors, nn.Linear, PyTorch's attention, an adaLN of its own in every block. DiT (arXiv 2212.09748)
is a DDPM; SiT (2401.08740) the same network on a flow; LightningDiT (2501.01423) has RMSNorm, SwiGLU, rotary
positions and norms of queries and keys; JiT (2511.13720) the same and predicts the image. Ours is FiTv2, on
packed tokens of the same squares, at the same width, depth and heads. A step is forward, loss, backward,
AdamW and the EMA. In bfloat16 a peer runs under autocast, as they train, and ours as its trainer does.

Steps alternate in one process; prints a JSON object a line. A ratio is the median of the peer's over ours:
above 1 ours is ahead.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention, silu
from tqdm import tqdm

from fitv2.conditioning import Condition
from fitv2.config import Architecture
from fitv2.diffusion.noise import NoisySample
from fitv2.diffusion.objective import objective_of
from fitv2.model import FiT, TimeEmbedding
from fitv2.runtime.distributed import World
from fitv2.tokens import Layout
from fitv2.training.weights import Weights, compile_blocks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kind:
    """What a peer is made of."""

    modern: bool  # RMSNorm, SwiGLU, rotary positions, norms of queries and keys
    prediction: str = "velocity"
    path: str = "linear"


PEERS = {
    "DiT": Kind(modern=False, prediction="noise", path="ddpm"),
    "SiT": Kind(modern=False),
    "LightningDiT": Kind(modern=True),
    "JiT": Kind(modern=True, prediction="data"),
}


class PlainBlock(nn.Module):
    """A block of a peer, (B, N, D)."""

    def __init__(self, width: int, heads: int, modern: bool) -> None:
        super().__init__()
        self.heads, self.modern, hidden = heads, modern, 2 * 4 * width // 3 if modern else 4 * width
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * hidden if modern else hidden), nn.Linear(hidden, width)
        if modern:
            self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
            self.q_norm, self.k_norm = (nn.RMSNorm(width // heads) for _ in range(2))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(silu(c))[:, None].chunk(6, 2)
        x = x + gate1 * self.attend(self.norm(x, 0) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.feed(self.norm(x, 1) * (1 + scale2) + shift2)

    def norm(self, x: Tensor, which: int) -> Tensor:
        return self.norms[which](x) if self.modern else layer_norm(x, x.shape[-1:], eps=1e-6)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.modern:
            q, k = (one * cos + turned(one) * sin for one in (self.q_norm(q), self.k_norm(k)))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        if not self.modern:
            return self.down(gelu(self.up(x), approximate="tanh"))
        gate, up = self.up(x).chunk(2, -1)
        return self.down(silu(gate) * up)


def turned(x: Tensor) -> Tensor:
    """Pairs (a, b) as (−b, a)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-b, a], -1).flatten(-2)


class Plain(nn.Module):
    """A peer: tokens (B, N, C), times and labels (B,) to (B, N, outputs)."""

    def __init__(self, shape: Architecture, side: int, modern: bool) -> None:
        super().__init__()
        width, count = shape.width, side**2
        self.time, self.label = TimeEmbedding(width), nn.Embedding(shape.num_classes + 1, width)
        self.embed = nn.Linear(shape.token_channels, width)
        blocks = [PlainBlock(width, shape.heads, modern) for _ in range(shape.depth)]
        self.blocks, self.modulation = nn.ModuleList(blocks), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, shape.output_channels)
        angles = torch.arange(count)[:, None] * 10_000.0 ** -torch.linspace(0, 1, width // shape.heads // 2)
        angles = angles.repeat_interleave(2, 1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("positions", torch.randn(count, width))
        self.modern = modern

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        c = self.time(t, x.dtype) + self.label(labels)
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x, c, self.cos, self.sin)
        shift, scale = self.modulation(silu(c))[:, None].chunk(2, 2)
        norm = rms_norm if self.modern else layer_norm
        return self.out(norm(x, x.shape[-1:]) * (1 + scale) + shift)


def peer_step(
    shape: Architecture,
    kind: Kind,
    sample: NoisySample,
    labels: Tensor,
    side: int,
    options: argparse.Namespace,
) -> Callable[[], None]:
    """A step of a peer's training."""
    model = Plain(shape, side, kind.modern)
    average, objective, batch = deepcopy(model), objective_of(shape), len(labels)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    call = torch.compile(model) if options.compile else model
    half = options.precision == "bfloat16"

    def plain(x_TC: Tensor, layout: Layout, t_B: Tensor, condition: Condition) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return call(x_TC.unflatten(0, (batch, -1)), t_B, labels).flatten(0, 1)

    def step() -> None:
        objective.loss(plain, sample, Condition.of(label=labels)).total_B.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1e-4)

    return step


def our_step(
    shape: Architecture, sample: NoisySample, labels: Tensor, options: argparse.Namespace
) -> Callable[[], None]:
    """A step of ours, as `fitv2.training.trainer` has it."""
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    weights = Weights(FiT(**shape_of(shape)), CPU, dtype, World(), 1)
    if options.compile:
        compile_blocks(weights.model)
    objective, condition = objective_of(shape), Condition.of(label=labels)
    optimizer = torch.optim.AdamW(weights.master.parameters(), 1e-4)

    def step() -> None:
        objective.loss(weights.model, sample, condition).total_B.mean().backward()
        weights.collect()
        weights.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
        weights.update_ema(1 - 1e-4)

    return step


def shape_of(shape: Architecture) -> dict[str, object]:
    return {name: value for name, value in vars(shape).items() if name != "rope"}


def compare(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of each, and the ratio."""
    kind = PEERS[name]
    shape = Architecture(
        options.depth, options.width, options.width // 64, kind.prediction, kind.path, patch_size=2,
        in_channels=4, num_classes=1000,
    )  # fmt: skip
    layout = Layout.of([(options.side, options.side)] * options.batch)
    data, noise = torch.randn(2, options.batch * options.side**2, shape.token_channels)
    objective = objective_of(shape)
    times = objective.quantiles((torch.arange(options.batch) + 0.5) / options.batch)
    sample = objective.add_noise(data, layout, noise, times)
    labels = torch.randint(1000, (options.batch,))
    steps = {
        "ours": our_step(shape, sample, labels, options),
        name: peer_step(shape, kind, sample, labels, options.side, options),
    }
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for number in tqdm(range(options.warmup + options.steps), name, leave=False):
        for who, step in steps.items():
            started = perf_counter()
            step()
            if number >= options.warmup:
                seconds[who].append(perf_counter() - started)
    medians = {who: statistics.median(found) for who, found in seconds.items()}
    ratios = [peer / ours for ours, peer in zip(*seconds.values(), strict=True)]
    return {
        "ours_seconds": round(medians["ours"], 4), "peer_seconds": round(medians[name], 4),
        "ratio": round(statistics.median(ratios), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--side", type=int, default=8, help="tokens of a side")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.manual_seed(0)
    same = {"threads": torch.get_num_threads(), **{k: v for k, v in vars(options).items() if k != "peers"}}
    for name in options.peers:
        print(json.dumps({"peer": name} | compare(name, options) | same), flush=True)


if __name__ == "__main__":
    main()
