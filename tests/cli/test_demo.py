import contextlib
import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fitv2.checkpoint import SHIPPED, load_model
from fitv2.cli.demo import EVERY, SHEETS, demo
from fitv2.pipeline import FiTPipeline
from fitv2.presets import preset
from fitv2.runtime.rng import generator

CARD = load_model("emoji")[1]
UNIT = 16


def tokens_of(size):
    return -(-size[0] // UNIT) * -(-size[1] // UNIT)


def test_sheets_show_shapes_that_were_trained_and_one_that_was_not():
    lengths = {
        name: [tokens_of(one.pixels) for row in rows for one in row] for name, (_, rows) in SHEETS.items()
    }
    assert max(lengths["prompts"] + lengths["six_shapes"]) <= CARD.max_tokens
    assert min(lengths["beyond"]) > CARD.max_tokens
    shapes = [one for row in SHEETS["six_shapes"][1] for one in row]
    assert len({one.pixels for one in shapes}) == 6
    assert len({one.prompt for one in shapes}) == 1


MOST = {"clipart": 12_000_000, "emoji": 20_000_000, "emoji-any-step": 20_000_000}


@pytest.mark.parametrize(("name", "most"), MOST.items())
def test_the_shipped_models_are_small_and_are_their_presets(name, most):
    assert {path.name for path in SHIPPED.iterdir()} == set(MOST)
    assert sum(path.stat().st_size for path in (SHIPPED / name).iterdir()) <= most
    flow = name.removesuffix("-any-step")
    objective = None if flow == name else "any-step"
    assert load_model(name)[0].architecture == replace(preset(flow).model, objective=objective)


def test_the_few_steps_of_the_shipped_model_end_where_many_do():
    """By four steps and by sixteen, without guidance: much nearer than two pictures of other noise."""
    pipe = FiTPipeline.from_pretrained("emoji-any-step")

    def made(steps, seed):
        return pipe(
            prompt=["red apple", "penguin", "house", "green heart"], height=128, width=128, output_type="np",
            num_inference_steps=steps, generator=[generator(seed + i) for i in range(4)],
        ).images  # fmt: skip

    few, many, other = made(4, 0), made(16, 0), made(16, 50)
    assert np.abs(few - many).mean() < 0.4 * np.abs(other - many).mean()


@pytest.mark.slow
def test_demo_makes_what_it_says(tmp_path, capsys):
    """The whole of `make demo`, with seconds of training."""

    @contextlib.contextmanager
    def bar(*_):
        yield lambda _: None

    held = io.BytesIO()
    Image.effect_noise((64, 48), 80).convert("RGB").save(held, "PNG")
    rows = [
        {"image": {"bytes": held.getvalue(), "path": None}, "caption": f"drawing {i}",
         "artist": CARD.labels[i // EVERY % len(CARD.labels)]}
        for i in range(2 * EVERY * len(CARD.labels))
    ]  # fmt: skip
    (tmp_path / "source").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "source" / "train.parquet")
    demo(tmp_path / "demo", tmp_path / "source", 0.02, bar, bar)
    wanted = [one for _, rows in SHEETS.values() for row in rows for one in row]
    pictures = sorted((tmp_path / "demo" / "images").iterdir())
    assert len(pictures) == len(wanted)
    assert {Image.open(path).size[::-1] for path in pictures} == {one.pixels for one in wanted}
    assert min(np.array(Image.open(path)).std() for path in pictures) > 5
    said = capsys.readouterr().out
    for line in said.strip().splitlines():
        assert "demo" in line
    for name in (*(f"{sheet}.png" for sheet in SHEETS), "run/loss.png"):
        assert Image.open(tmp_path / "demo" / name).width > 300
    assert load_model(tmp_path / "demo" / "run")[0].architecture == load_model("emoji")[0].architecture
