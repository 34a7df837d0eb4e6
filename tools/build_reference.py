"""Write docs/reference/cli.md and docs/reference/presets.md from the options and the presets themselves.

    python tools/build_reference.py [--check]

With --check nothing is written; the exit status is 1 if a page is not up to date.
"""

import ast
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro

from fitv2.cli.commands import COMMANDS
from fitv2.config import FREE, Architecture, Training
from fitv2.model import FiT
from fitv2.presets import PRESETS, Preset

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by tools/build_reference.py: change the code, then run it again. -->"
GIVEN = (
    "depth",
    "width",
    "heads",
    "patch_size",
    "in_channels",
    "num_classes",
    "text_channels",
    "pooled_channels",
)  # shown elsewhere, or by the data
PLACEHOLDERS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Option:
    """An option of a command."""

    group: str  # what the dataclass that holds it says of itself
    name: str
    takes: str
    default: str
    text: str


def options(kind: type, top: bool = True) -> Iterator[Option]:
    """Every option of a command's dataclass, those of nested ones too."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        wanted, marks = unwrap(hints[field.name])
        if dataclasses.is_dataclass(wanted):
            yield from options(typing.cast(type, wanted), top=False)
            continue
        owner = next(base for base in kind.__mro__ if field.name in inspect.get_annotations(base))
        name = field.name.replace("_", "-")
        if tyro.conf.Positional in marks:
            name = next(mark.metavar for mark in marks if hasattr(mark, "metavar"))
        elif wanted is bool:
            name = f"--{name}, --no-{name}"
        else:
            name = f"--{name}"
        group = "" if top else str(owner.__doc__).splitlines()[0]
        takes = "" if name.isupper() else placeholder(wanted)
        if tyro.conf.UseAppendAction in marks:
            takes = "TEXT; repeatable"
        yield Option(group, name, takes, shown(default_of(field)), description(owner, field.name))


def unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and what it is annotated with."""
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, ()
    wanted, *marks = typing.get_args(hint)
    return wanted, tuple(marks)


def placeholder(wanted: Any) -> str:
    """What a value of this type looks like on the command line."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is bool:
        return ""
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(placeholder(part) for part in arguments if part is not types.NoneType)
    if origin is tuple:
        one = placeholder(arguments[0])
        return f"{one} …" if arguments[-1] is Ellipsis else " ".join(placeholder(part) for part in arguments)
    return PLACEHOLDERS[wanted]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; MISSING where it has to be given."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def shown(value: Any) -> str:
    """A default as it is typed; nothing where the text says it, or where there is none."""
    if value in (MISSING, None, ()):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    return f"`{value}`"


def description(owner: type, name: str) -> str:
    """The text below a field of a dataclass."""
    (body,) = (
        node.body for node in ast.parse(inspect.getsource(owner)).body if isinstance(node, ast.ClassDef)
    )
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == name:
            assert isinstance(text, ast.Expr)
            return " ".join(ast.literal_eval(text.value).split()).replace("|", "\\|")
    raise LookupError(f"{owner.__name__}.{name} has no text below it")


def cli_page() -> str:
    """Every command and its options."""
    lines = [NOTE, "", "# The command line", ""]
    lines += [
        "`fitv2 COMMAND --help` prints the same. A mistake is one line and exit status 2.",
        "",
        "For `fitv2 train` the defaults below are the paper's; a preset replaces some of them, as",
        "[presets](presets.md) lists. Options marked ↻ may change when a run is resumed; the others may not.",
        "",
    ]
    for name, (kind, _) in COMMANDS.items():
        about = inspect.cleandoc(kind.__doc__ or "").splitlines()
        lines += [f"## fitv2 {name}", "", *about, ""]
        groups: dict[str, list[Option]] = {}
        for option in options(kind):
            groups.setdefault(option.group, []).append(option)
        for group, held in groups.items():
            lines += [group, ""] if group else []
            lines += ["| option | value | default | |", "|---|---|---|---|"]
            lines += [row_of(option, name == "train") for option in held]
            lines.append("")
    return "\n".join(lines)


def row_of(option: Option, of_training: bool) -> str:
    """A line of a table of options."""
    free = of_training and option.name.split(",")[0].strip("-").replace("-", "_") in FREE
    return f"| `{option.name}`{' ↻' * free} | {option.takes} | {option.default} | {option.text} |"


def parameters(preset: Preset) -> int:
    """How many parameters the model of a preset has, without making them."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in FiT(**asdict(preset.model)).parameters())


def differing(values: dict[str, Any], usual: dict[str, Any]) -> str:
    """Settings that are not the usual ones, as flags."""
    flags = []
    for key, value in values.items():
        if key in GIVEN or value == usual[key]:
            continue
        if isinstance(value, dict):
            flags.append(differing(value, usual[key]))
            continue
        name = key.replace("_", "-")
        said = " ".join(map(str, value)) if isinstance(value, tuple) else value
        flags.append(f"`--no-{name}`" if value is False else f"`--{name} {said}`")
    return ", ".join(flags)


def presets_page() -> str:
    """Every preset, its size, and its settings."""
    lines = [NOTE, "", "# Presets", ""]
    lines += [
        "`fitv2 train PRESET` trains one, and `fitv2.FiT.from_preset` builds its model. A dataset decides",
        "the size of a token and the number of labels. Parameters are counted with ImageNet's 1000 labels",
        "and the tokens of its latents, or with the 19 labels and the pixels of the clip-art set. FIDs are",
        "the papers', not measured here.",
        "",
        "| preset | parameters | depth | width | heads | |",
        "|---|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        model = preset.model
        size = f"{parameters(preset):,} | {model.depth} | {model.width} | {model.heads}"
        lines.append(f"| `{name}` | {size} | {preset.about} |")
    lines += [
        "",
        "## Settings",
        "",
        "What differs from the defaults of [`fitv2 train`](cli.md#fitv2-train), which are those of FiTv2.",
        "",
        "| preset | model | training |",
        "|---|---|---|",
    ]
    usual = asdict(Architecture(1, 4, 1))
    for name, preset in PRESETS.items():
        network = differing(asdict(preset.model), usual)
        training = differing(asdict(preset.training), asdict(Training()))
        lines.append(f"| `{name}` | {network} | {training} |")
    return "\n".join([*lines, ""])


PAGES = {"cli.md": cli_page, "presets.md": presets_page}


def stale() -> list[str]:
    """The pages that are not what this tool would write."""
    held = {name: FOLDER / name for name in PAGES}
    return [
        name for name, path in held.items()
        if not path.exists() or path.read_text(encoding="utf-8") != PAGES[name]()
    ]  # fmt: skip


def main() -> int:
    """Write the pages, or check them."""
    if "--check" in sys.argv:
        for name in (found := stale()):
            print(f"docs/reference/{name} is not up to date: run python tools/build_reference.py")
        return 1 if found else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
