"""The page, in Gradio."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would ask the network for news of itself

import gradio as gr
from PIL import Image

from fitv2.app.drag import add_size_box
from fitv2.app.studio import (
    ALL,
    AROUND,
    BETWEEN,
    BY_ITSELF,
    EXTRAPOLATIONS,
    HOW,
    Order,
    Shown,
    Studio,
    edit_order,
)  # fmt: skip
from fitv2.config import Positions
from fitv2.errors import UserError
from fitv2.sampling.recipe import read_recipe
from fitv2.sampling.requests import STRENGTH

MOST_RANDOM = 1_000_000  # seeds that a person can type again
KEEP = 3600  # seconds that pictures stay on the server
SHAPES = {"1:1": (1, 1), "1:2": (1, 2), "2:1": (2, 1), "1:3": (1, 3), "3:1": (3, 1)}  # height to width
THEME = gr.themes.Soft(primary_hue="orange", neutral_hue="stone", font=("system-ui", "sans-serif"))
CSS = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: auto}
#gallery .grid-wrap {max-height: none !important; height: auto !important}
#gallery .caption-label {max-width: 60%; padding: 0 4px; font-size: 11px; opacity: 0.75}
"""
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}


def build_page(studio: Studio) -> gr.Blocks:
    """The page of a studio: making, editing, and what a picture says of itself."""
    with gr.Blocks(title=f"FiTv2: {studio.model}", delete_cache=(KEEP, KEEP)) as page:
        gr.Markdown(f"## FiTv2 · {studio.model}\nPictures of any shape, several at once.")
        with gr.Tab("Make"):
            making_tab(studio)
        with gr.Tab("Edit"):
            editing_tab(studio)
        with gr.Tab("Read a picture"):
            reading_tab()
    return page


def making_tab(studio: Studio) -> None:
    """Pictures from words or labels."""
    with gr.Row():
        with gr.Column(scale=2):
            shown = subject_fields(studio)
            with gr.Row():
                height, width = size_fields(studio)
            with gr.Row(equal_height=True):
                add_size_box(height, width, studio.bounds.max_side, studio.pipeline.unit)
                with gr.Column(min_width=120):
                    for name, shape in SHAPES.items():
                        button = gr.Button(name, size="sm")
                        button.click(lambda shape=shape: size_of(studio, shape), None, [height, width],
                                     api_visibility="private", queue=False)  # fmt: skip
            how = how_fields(studio)
            with gr.Accordion("Other shapes, other noises", open=False):
                shapes = gr.CheckboxGroup(list(SHAPES), label="Shapes, beside the one above")
                one_noise = gr.Checkbox(label="One noise at all of them")
                toward = gr.Number(-1, label="On the way to the noise of this seed, -1 for none", precision=0)
            button, stop = buttons("Make")
        with gr.Column(scale=3):
            gallery, said = outputs()

    def make(
        prompt: str, label: str, negative: str, rows: float, columns: float, count: float, seed: float,
        guidance: float, steps: float, extrapolation: str, shapes: Sequence[str] = (),
        one_noise: bool = False, toward: float = -1,
    ) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """Pictures of a prompt or a label: their files, and how far it is."""
        with in_words():
            order = Order(
                prompt=prompt or "", label=label or "", negative_prompt=negative or "", height=whole(rows),
                width=whole(columns), **settings(count, seed, guidance, steps, extrapolation),
                more_sizes=tuple(size_of(studio, SHAPES[name]) for name in shapes or ()),
                **noise(one_noise, toward),
            )  # fmt: skip
            yield from pictures(studio, order)

    run = button.click(
        make, [*shown, height, width, *how, shapes, one_noise, toward], [gallery, said], api_name="make",
        **ONE_AT_A_TIME,
    )  # fmt: skip
    stop.click(None, cancels=[run], api_visibility="private")


def editing_tab(studio: Studio) -> None:
    """Pictures from a picture."""
    with gr.Row():
        with gr.Column(scale=2):
            editor = gr.ImageEditor(
                type="pil", label="Your picture", brush=gr.Brush(colors=["#ff5500"]),
                sources=("upload", "clipboard"), format="png", transforms=(), elem_id="editor",
            )  # fmt: skip
            what = gr.Radio(HOW, value=HOW[0], label="What to do", elem_id="what")
            shown = subject_fields(studio)
            with gr.Group(visible=False) as canvas:
                with gr.Row():
                    height, width = size_fields(studio, "Canvas ", (1, 2))
                with gr.Row():
                    across, down = (
                        gr.Slider(0, 1, 0.5, step=0.05, label=name, min_width=120)
                        for name in ("From left to right", "From top to bottom")
                    )
            with gr.Row(visible=False) as amount:
                strength = gr.Slider(0.05, 1, STRENGTH, step=0.05, label="How much is made anew")
            with gr.Row(visible=False) as second:
                toward = gr.Image(
                    type="pil", image_mode=None, label="The other picture", height=200, elem_id="toward"
                )
            what.change(
                lambda what: [gr.update(visible=what == each) for each in (AROUND, ALL, BETWEEN)], what,
                [canvas, amount, second], api_visibility="private", queue=False,
            )  # fmt: skip
            how = how_fields(studio)
            button, stop = buttons("Edit")
        with gr.Column(scale=3):
            gallery, said = outputs()

    def edit(
        value: Any, what: str, prompt: str, label: str, negative: str, rows: float, columns: float,
        strength: float, count: float, seed: float, guidance: float, steps: float, extrapolation: str,
        across: float = 0.5, down: float = 0.5, toward: Any = None,
    ) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """Pictures made from a picture: their files, and how far it is."""
        with in_words():
            value = value or {}
            order = edit_order(
                studio, value.get("background"), value.get("layers") or [], what,
                (whole(rows), whole(columns)), strength, across=across, down=down, toward=toward,
                prompt=prompt or "", label=label or "", negative_prompt=negative or "",
                **settings(count, seed, guidance, steps, extrapolation),
            )  # fmt: skip
            yield from pictures(studio, order)

    run = button.click(
        edit, [editor, what, *shown, height, width, strength, *how, across, down, toward], [gallery, said],
        api_name="edit", **ONE_AT_A_TIME,
    )  # fmt: skip
    stop.click(None, cancels=[run], api_visibility="private")


def reading_tab() -> None:
    """What a picture says of how it was made."""
    with gr.Row():
        file = gr.File(label="A picture made here or by fitv2 sample", file_types=[".png"], elem_id="read")
        said = gr.JSON(label="How it was made")

    def read(path: str | None) -> dict[str, Any]:
        """How a picture was made, as its PNG file says."""
        with in_words():
            return asdict(read_recipe(Path(path))) if path else {}

    file.change(read, file, said, api_name="read")


# Fields ------------------------------------------------------------------------------------------


def subject_fields(studio: Studio) -> list[Any]:
    """Prompt, label, and what to lead away from; those that the model does not take are hidden."""
    labels = studio.labels
    prompt = gr.Textbox(label="Prompt", placeholder="red apple", visible=studio.takes_text)
    label = gr.Dropdown(
        ["", *labels] if studio.takes_text else labels, value="" if studio.takes_text else labels[0],
        label="Label", visible=bool(labels),
    )  # fmt: skip
    negative = gr.Textbox(label="Away from", placeholder="nothing in particular", visible=studio.takes_text)
    return [prompt, label, negative]


def size_fields(studio: Studio, of: str = "", shape: tuple[int, int] = (1, 1)) -> list[Any]:
    """Height and width in pixels."""
    rows, columns = size_of(studio, shape)
    most = studio.bounds.max_side
    return [
        gr.Slider(studio.pipeline.unit, most, value, step=1, label=f"{of}{name}".capitalize(), min_width=120)
        for name, value in (("Height", rows), ("Width", columns))
    ]


def size_of(studio: Studio, shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a shape with about as many tokens as the model was trained on."""
    stretch = (shape[0] / shape[1]) ** 0.5
    unit = studio.pipeline.unit
    rows, columns = (
        max(1, int(side / unit)) * unit for side in (studio.side * stretch, studio.side / stretch)
    )
    return min(rows, studio.bounds.max_side), min(columns, studio.bounds.max_side)


def how_fields(studio: Studio) -> list[Any]:
    """Count, guidance, steps, seed, and how sizes beyond the trained ones are made."""
    bounds = studio.bounds
    with gr.Row():
        count = gr.Slider(
            1, bounds.max_images, min(4, bounds.max_images), step=1, label="Count", min_width=120
        )
        seed = gr.Number(-1, label="Seed, -1 for any", precision=0, min_width=120)
    with gr.Accordion("More", open=False):
        guidance = gr.Slider(1, 10, studio.pipeline.card.guidance, step=0.1, label="Guidance")
        steps = gr.Slider(1, bounds.max_steps, min(studio.steps, bounds.max_steps), step=1, label="Steps")
        extrapolation = gr.Dropdown(
            list(EXTRAPOLATIONS), value=EXTRAPOLATIONS[0], label="Positions beyond the trained sizes"
        )
    return [count, seed, guidance, steps, extrapolation]


def buttons(name: str) -> tuple[Any, Any]:
    """One to begin, and one to stop."""
    with gr.Row():
        return gr.Button(name, variant="primary", scale=3), gr.Button("Stop", variant="stop", scale=1)


def outputs() -> tuple[Any, Any]:
    """The gallery, and a line below it."""
    gallery = gr.Gallery(
        label="Pictures", show_label=False, columns=3, object_fit="contain", format="png",
        elem_id="gallery", buttons=["download", "fullscreen"],
    )  # fmt: skip
    return gallery, gr.Markdown("Each file holds how it was made.", elem_id="said")


# What happens --------------------------------------------------------------------------------------


class in_words:  # noqa: N801  read as a statement
    """Turns what a visitor can mend into a message of the page."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, UserError):
            raise gr.Error(str(error).replace("`", ""), print_exception=False) from error


def whole(value: float | None) -> int:
    """A number of pixels. Raises UserError for none."""
    if value is None or value != int(value):
        raise UserError("height and width are whole numbers of pixels")
    return int(value)


def settings(count: float, seed: float, guidance: float, steps: float, extrapolation: str) -> dict[str, Any]:
    """The values of `how_fields`, in order, by the names of an order."""
    chosen = random.randrange(MOST_RANDOM) if seed is None or seed < 0 else int(seed)
    return {
        "count": whole(count), "seed": chosen, "guidance_scale": guidance, "steps": whole(steps),
        "extrapolation": extrapolation,
    }  # fmt: skip


def noise(one: bool, toward: float | None) -> dict[str, Any]:
    """What pictures are made of, by the names of an order, where it is not the noise of their seeds."""
    if toward is not None and toward >= 0:
        return {
            "toward_seed": int(toward),
            "edited": {"how": "between two noises", "toward_seed": int(toward)},
        }
    return {"one_noise": True, "edited": {"how": "one noise at all sizes"}} if one else {}


def pictures(studio: Studio, order: Order) -> Iterator[tuple[Any, str]]:
    """What the gallery shows as an order proceeds, and a line on it."""
    made: Sequence[Any] = []
    yield made, "Waiting for its turn."
    for shown in studio.make(order):
        made = captioned(shown, order)
        all_of_them = order.count * len(order.sizes)
        yield made, f"{shown.done} of {all_of_them} done, {shown.share:.0%} of the way."
    sizes = ", ".join(f"{height}x{width}" for height, width in order.sizes)
    told = f"{order.count} of {sizes}, seed {order.seed} and on. Each file holds how it was made."
    yield made, " ".join([told, *notes(studio, order)])


def notes(studio: Studio, order: Order) -> Iterator[str]:
    """What a visitor should know of the pictures."""
    if order.note:
        yield order.note
    if order.negative_prompt and order.guidance_scale == 1:
        yield "“Away from” has no effect at guidance 1: see More."
    beyond = [size for size in order.sizes if studio.pipeline.is_beyond(size)]
    if beyond:
        own = order.extrapolation == BY_ITSELF
        positions = Positions() if own else Positions(order.extrapolation)
        own_noise = order.toward is not None or order.one_noise or order.toward_seed is not None
        yield f"{studio.pipeline.said_beyond(beyond, positions, grows=not own_noise)}."


def captioned(shown: Shown, order: Order) -> Sequence[tuple[str | Image.Image, str]]:
    """Files and previews, each with its seed."""
    return [
        (str(each) if isinstance(each, Path) else each, str(order.seed + i % order.count))
        for i, each in enumerate(shown.pictures)
    ]


def serve(studio: Studio, *, host: str, port: int, queue: int) -> None:
    """Serve the page until it is ended. Raises UserError if the port is taken."""
    page = build_page(studio).queue(max_size=queue, default_concurrency_limit=4)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True, theme=THEME, css=CSS,
            allowed_paths=[str(studio.folder)], max_file_size="20mb", footer_links=["api"],
            prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used: choose another `port` ({error})") from error
    print(f"http://{host}:{port}  (the pictures lie in {studio.folder}; end with Ctrl-C)", flush=True)
    page.block_thread()
