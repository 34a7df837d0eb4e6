"""What a saved pipeline has beside its weights, so that others can open it from a folder or the hub."""

from pathlib import Path

from fitv2.autoencoder import CLASSES
from fitv2.checkpoint import Card
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.files import write_text
from fitv2.runtime.serialization import read_json

README, CODE = "README.md", "pipeline.py"
INDEX = "model_index.json"
FLOWS = (
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
)  # fmt: skip
COMPONENTS = {"transformer": (FiT.__name__,), "vae": (*CLASSES, None), "scheduler": (*FLOWS, None)}
# diffusers takes a class that is not its own from such a file, if it is trusted in so many words.
ONE_LINE = """\
\"""For `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)`; the code is in the package fitv2.\"""

from fitv2.pipeline import FiTPipeline as FiTPipeline
"""
PAPER = """\
---
library_name: diffusers
pipeline_tag: {task}
tags: [fitv2, diffusers]
---

# A FiTv2 model

{parameters:,} parameters, trained on images of up to {tokens} tokens of {unit}x{unit} pixels:
{height}x{width}, or as many in another shape. It makes images of any size and shape, several at once.

```python
import fitv2  # pip install fitv2

pipe = fitv2.FiTPipeline.from_pretrained("THIS FOLDER, OR ITS NAME ON THE HUB")
images = pipe({asked}, height=[{height}, {half}], width={width}).images
```

Nothing in this folder is executed. diffusers by itself opens it with

```python
DiffusionPipeline.from_pretrained(NAME, custom_pipeline=NAME, trust_remote_code=True)
```

which runs the one line of `pipeline.py`; the package `fitv2` has to be installed all the same. The
transformer alone is `fitv2.FiT.from_pretrained(NAME, subfolder="transformer")`; after
`from fitv2 import FiT` diffusers' `AutoModel` opens it too.

{shows} Guidance that looks best: {guidance:g}.

FiTv2: arXiv 2410.13925. FiT: arXiv 2402.12376.
"""


def write_papers(folder: Path, model: FiT, card: Card, unit: int) -> None:
    """Write README.md, unless there is one, and pipeline.py; `unit` is the side of a token in pixels."""
    write_text(folder / CODE, ONE_LINE)
    if not (folder / README).exists():
        write_text(folder / README, describe(model, card, unit))


def describe(model: FiT, card: Card, unit: int) -> str:
    """A README for the hub, in Markdown."""
    takes_text = "text" in model.architecture.conditions
    height, width = (side * unit for side in card.square)
    return PAPER.format(
        task="text-to-image" if takes_text else "unconditional-image-generation",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=card.max_tokens, unit=unit, height=height, half=height // 2, width=width,
        asked='prompt=["a cat", "two cats"]' if takes_text else "class_labels=[0, 1]",
        shows=f"Texts are encoded by `{card.text_encoder}`." if takes_text else said_labels(card.labels),
        guidance=card.guidance,
    )  # fmt: skip


def said_labels(labels: tuple[str, ...], most: int = 20) -> str:
    """Some of the labels, and how many more there are."""
    more = f", and {len(labels) - most} more" if len(labels) > most else ""
    return f"Labels: {', '.join(labels[:most])}{more}."


def check_index(folder: Path, pipeline: str) -> None:
    """UserError unless a folder's model_index.json names parts of ours: diffusers imports whatever it names.

    And what a config.json that is only a string would have diffusers look for on the hub. `pipeline` is the
    name of our class.
    """
    index = read_json(folder / INDEX)
    for config in folder.glob("*/config.json"):
        read_json(config)
    parts = {name: value for name, value in index.items() if isinstance(value, list) and name != "labels"}
    for name, value in parts.items():
        known = name in COMPONENTS and len(value) == 2 and value[1] in COMPONENTS[name]
        if not known or value[0] not in ("fitv2.model", "fitv2", "diffusers", None):
            raise UserError(f"{folder / INDEX} names the part {name} {value}, which is none of this pipeline")
    if index.get("_class_name") != pipeline:
        raise UserError(f"{folder / INDEX} is that of another pipeline, {index.get('_class_name')}")
