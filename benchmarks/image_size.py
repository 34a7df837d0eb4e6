"""What a token costs in images of 64 to 4096 tokens, against the count of operations.

    python benchmarks/image_size.py [--width 768] [--depth 2] [--tokens 4096] [--repeats 5]

Forward and backward of one pack of so many tokens in all, as 64 images of 64 tokens, 16 of 256, 4 of 1024 or
one of 4096, alternating in one process. Attention's operations grow with the length, all others do not, so
longer images cost more a token; `time` and `flops` say how much more than 64 tokens, and `ratio` is the one
over the other: 1 means that the time follows the count. Prints one JSON object a size.
"""

import argparse
import json
import statistics
from time import perf_counter

import torch

from fitv2.conditioning import Condition
from fitv2.model import FiT
from fitv2.runtime.device import default_device
from fitv2.tokens import Layout, PackedTokens
from fitv2.training.throughput import TrainingFlops, peak_flops

SIDES = (8, 16, 32, 64)


def seconds(model: FiT, packed: PackedTokens, device: torch.device) -> float:
    images = len(packed)
    t_B = torch.linspace(0.1, 0.9, images, device=device)
    condition = Condition.of(label=torch.arange(images, device=device) % 1000)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = perf_counter()
    model(packed.x_TC, packed.layout, t_B, condition).float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = perf_counter() - started
    model.zero_grad()
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = default_device()
    torch.manual_seed(0)
    model = FiT(depth=options.depth, width=options.width, heads=options.heads)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model = torch.nn.Module.to(model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    packs = []
    for side in SIDES:
        images = max(1, options.tokens // side**2)
        layout = Layout.of([(side, side)] * images)
        packs.append(PackedTokens(torch.randn(layout.tokens, model.token_channels), layout).to(device))
    count = TrainingFlops(model)
    flops = [count(packed.layout.lengths) / packed.layout.tokens for packed in packs]
    for packed in packs:
        seconds(model, packed, device)
    rounds = [[seconds(model, packed, device) for packed in packs] for _ in range(options.repeats)]
    for i, packed in enumerate(packs):
        tokens = packed.layout.tokens
        # Of one round, so that a machine that slows down slows both.
        time = statistics.median(times[i] / tokens / (times[0] / packs[0].layout.tokens) for times in rounds)
        fastest = min(times[i] for times in rounds)
        print(
            json.dumps(
                {
                    "tokens_an_image": packed.layout.lengths[0],
                    "tokens_per_second": round(tokens / fastest),
                    "of_peak": round(flops[i] * tokens / fastest / peak_flops(device), 3),
                    "time": round(time, 3),
                    "flops": round(flops[i] / flops[0], 3),
                    "ratio": round(time / (flops[i] / flops[0]), 3),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
