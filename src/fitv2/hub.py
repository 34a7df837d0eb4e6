"""What a saved pipeline has beside its weights, so that others can open it from a folder or the hub."""

from pathlib import Path

from fitv2.checkpoint import Card
from fitv2.model import FiT
from fitv2.runtime.files import write_text

README, CODE = "README.md", "pipeline.py"
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
