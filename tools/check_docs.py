"""Check that what the documentation shows is true: its commands, its Python and its links.

    python tools/check_docs.py [--static] [PAGE ...]

Of every page (README.md, CONTRIBUTING.md and all below docs/):

- each command of a ```sh block is parsed by the option parser of its command, so no flag can be stale;
- each ```python block is compiled, and what it imports is looked up;
- links and paths lead to files that are there, and flags in the text are options of a command;
- blocks are run, in order, in a folder of their own with small images in it. The Python blocks of a page
  share their names. A block that cannot run here says so in the line above it, <!-- not run: REASON -->, one
  that takes long what is run in its place, <!-- run with: --steps 4 -->, and a page names what it takes for
  granted in <!-- given: tokens, models/xl -->.

Prints a line for each failure; the exit status is then 1. Nothing is downloaded. With --static nothing runs.
"""

import ast
import contextlib
import importlib
import importlib.machinery
import importlib.util
import io
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fitv2.cli import commands
from fitv2.cli.parsing import option_names, parse
from fitv2.errors import UserError

ROOT = Path(__file__).parents[1]
TORCHAO = Path(sys.prefix) / "torchao"  # beside the environment: see the Makefile
FOREIGN = {  # of other programs
    "--cfg-scale", "--scale-pow", "--interpolation", "--decouple", "--ori-max-pe-len", "--sampler-mode",
    "--num-sampling-steps", "--max-restarts", "--fix", "--repeats", "--repo-type", "--help",
}  # fmt: skip
PLACE = re.compile(r"(docs|tools|benchmarks|tests|src|data)/[\w./-]*[\w/]")
NAME = re.compile(r"fitv2(\.\w+)+")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int  # of its first line of text, from 1
    language: str
    text: str
    not_run: str | None = None  # why
    shorter: tuple[str, ...] = ()  # options and their values, in place of those that it has


@dataclass
class Page:
    """A page, cut up."""

    name: str  # from the root of the repository
    prose: list[tuple[int, str]] = field(default_factory=list)  # lines outside blocks
    blocks: list[Block] = field(default_factory=list)
    given: list[str] = field(default_factory=list)

    @property
    def runnable(self) -> list[Block]:
        """The blocks that are run."""
        return [block for block in self.blocks if block.language in ("sh", "python") and not block.not_run]

    @property
    def headings(self) -> set[str]:
        """The anchors of its headings, as GitHub makes them."""
        titles = (text.lstrip("# ") for _, text in self.prose if text.startswith("#"))
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def pages(root: Path = ROOT) -> list[str]:
    """The names of all pages."""
    below = sorted(path.relative_to(root).as_posix() for path in (root / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", *below]


def read_page(name: str, root: Path = ROOT) -> Page:
    """A page cut into prose and blocks."""
    page, fence, reason, shorter = Page(name), None, None, ()
    lines: list[str] = []
    for number, line in enumerate((root / name).read_text(encoding="utf-8").splitlines(), 1):
        if fence is not None:
            if line.strip() == "```":
                text = "\n".join(lines) + "\n"
                page.blocks.append(Block(name, number - len(lines), fence, text, reason, shorter))
                fence, reason, shorter = None, None, ()
            else:
                lines.append(line)
        elif match := re.match(r"\s*```(\w*)", line):
            fence, lines = match[1], []
        elif match := re.match(r"<!-- not run: (.+) -->$", line):
            reason = match[1]
        elif match := re.match(r"<!-- run with: (.+) -->$", line):
            shorter = tuple(match[1].split())
        elif match := re.match(r"<!-- given: (.+) -->$", line):
            page.given += match[1].split(", ")
        else:
            page.prose.append((number, line))
            reason = None if line.strip() else reason
    return page


# Commands -----------------------------------------------------------------------------------------


def split_commands(block: Block) -> Iterator[tuple[int, list[str]]]:
    """The commands of a block as words, each with the line it begins in."""
    began, so_far = block.line, ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        began = began if so_far else number
        so_far += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        if words := shlex.split(so_far, comments=True):
            yield began, words
        so_far = ""


def strip_launcher(words: list[str]) -> list[str]:
    """A command without variables before it, the folder of its program, and torchrun."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    words = [words[0].removeprefix(".venv/bin/"), *words[1:]]
    if "-m" in words and words[words.index("-m") + 1] == "fitv2":
        return words[words.index("-m") + 1 :]
    return words


def check_command(words: list[str], root: Path = ROOT) -> str | None:
    """What is wrong with a command, if anything is."""
    words = strip_launcher(words)
    if words[0] == "make":
        targets = re.findall(r"^([\w./-]+):", (root / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"make has no target {unknown[0]}" if unknown else None
    if words[0].startswith("python"):
        missing = [word for word in words[1:2] if word.endswith(".py") and not (root / word).exists()]
        return f"{missing[0]} does not exist" if missing else None
    if words[0] != "fitv2" or words[1:2] in ([], ["--help"], ["--version"]):
        return None
    try:
        name, rest = commands.split_command(words[1:])
    except UserError as error:
        return str(error)
    kind, _ = commands.COMMANDS[name]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parse(kind, rest, commands.train_defaults(rest) if name == "train" else None)
    except UserError as error:
        return str(error)
    except SystemExit:  # --help
        pass
    return said.getvalue().strip() or None  # a flag that has another name today


# Python -------------------------------------------------------------------------------------------


def check_python(block: Block) -> Iterator[str]:
    """What is wrong with the Python of a block before it runs: syntax, and names that are not there."""
    try:
        tree = ast.parse(block.text)
    except SyntaxError as error:
        yield f"{block.page}:{block.line + (error.lineno or 1) - 1}: {error.msg}"
        return
    for node in ast.walk(tree):
        for module, name in imported(node):
            if wrong := look_up(module, name):
                yield f"{block.page}:{block.line + getattr(node, 'lineno', 1) - 1}: {wrong}"


def imported(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """The modules and names that a statement imports or takes from `fitv2` itself."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((node.module or "", alias.name) for alias in node.names)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fitv2":
        yield "fitv2", node.attr


def look_up(module: str, name: str | None) -> str | None:
    """What is missing of a module and a name in it."""
    top = module.split(".", maxsplit=1)[0]
    if importlib.machinery.PathFinder.find_spec(top) is None:
        beside = importlib.machinery.PathFinder.find_spec(top, [str(TORCHAO)])
        return None if beside else f"there is no module {top}"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"{module}: {error}"
    if name is None or hasattr(found, name):
        return None
    if hasattr(found, "__path__") and importlib.util.find_spec(
        f"{module}.{name}"
    ):  # a module not yet imported
        return None
    return f"{module} has no {name}"


# Links and words ----------------------------------------------------------------------------------


def check_links(page: Page, root: Path = ROOT) -> Iterator[str]:
    """Links, and paths and flags in code spans, that lead nowhere."""
    here, known = (root / page.name).parent, all_options()
    for number, line in page.prose:
        spans = re.findall(r"`([^`]+)`", line)
        text = re.sub(r"`[^`]*`", "", line)
        for target in re.findall(r"\]\(([^)\s]+)\)", line) + re.findall(r'(?:src|href)="([^"]+)"', text):
            if not re.match(r"\w+:", target) and (wrong := dead_link(target, here, page, root)):
                yield f"{page.name}:{number}: {wrong}"
        for span in spans:
            if PLACE.fullmatch(span) and not (root / span).exists():
                yield f"{page.name}:{number}: {span} does not exist"
            if NAME.fullmatch(span) and (wrong := resolve(span)):
                yield f"{page.name}:{number}: {wrong}"
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
                if flag not in known:
                    yield f"{page.name}:{number}: no command has the option {flag}"


def resolve(name: str) -> str | None:
    """What is wrong with a dotted name, if it is neither a module nor something in one."""
    parts, count = name.split("."), 1
    found: Any = importlib.import_module(parts[0])
    while count < len(parts):
        path = ".".join(parts[: count + 1])
        if not hasattr(found, parts[count]):
            if not hasattr(found, "__path__") or importlib.util.find_spec(path) is None:
                return f"there is no {path}"
            importlib.import_module(path)
        found, count = getattr(found, parts[count]), count + 1
    return None


def dead_link(target: str, here: Path, page: Page, root: Path) -> str | None:
    """What is wrong with a relative link, if anything is."""
    path, _, anchor = target.partition("#")
    file = (here / path).resolve() if path else (root / page.name).resolve()
    if not file.exists():
        return f"the link {target} leads nowhere"
    if (
        anchor
        and file.suffix == ".md"
        and anchor not in read_page(str(file.relative_to(root)), root).headings
    ):
        return f"the link {target} names no heading"
    return None


def all_options() -> set[str]:
    """Every option of every command, and of other programs that the pages name."""
    return FOREIGN.union(*(option_names(kind) for kind, _ in commands.COMMANDS.values()))


# Running ------------------------------------------------------------------------------------------


def prepare_images(folder: Path) -> None:
    """A dozen small images of several shapes under the labels cats and dogs."""
    import numpy as np
    from PIL import Image

    shapes = [(64, 64), (96, 48), (48, 96), (32, 32), (80, 200), (70, 16)] * 2
    for i, (height, width) in enumerate(shapes):
        across = np.linspace(0, 255, width)[None, :, None]
        down = np.linspace(0, 255, height)[:, None, None] * np.array([1, 0.2 * (i % 5), 0])
        path = folder / "images" / ("cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((across + down) / 2).astype(np.uint8)).save(path)


def prepare_tokens(folder: Path) -> None:
    """Those images as tokens."""
    from fitv2.config import Encoding
    from fitv2.encoding.encode import encode

    encode(folder / "images", folder / "tokens", Encoding(max_tokens=(16,)), workers=0)


def prepare_model(folder: Path) -> None:
    """A tiny model with random weights that predicts velocity of such tokens."""
    import torch

    from fitv2.checkpoint import Card, save_model
    from fitv2.model import FiT

    torch.manual_seed(0)
    model = FiT.from_preset("debug", prediction="velocity", num_classes=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    save_model(model, Card(("cats", "dogs"), "pixels", 16), folder / "models" / "xl")


def prepare_run(folder: Path) -> None:
    """A short run on those tokens."""
    from fitv2.presets import preset
    from fitv2.training.trainer import train

    train(preset("debug"), folder / "tokens", folder / "runs" / "mine")


def prepare_photos(folder: Path) -> None:
    """Those images in one folder, each with a caption."""
    for i, path in enumerate(sorted((folder / "images").rglob("*.png"))):
        target = folder / "photos" / "icons" / f"{i:02}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        target.with_suffix(".txt").write_text("address book\n")


GIVEN: dict[str, Callable[[Path], None]] = {
    "images": prepare_images, "photos": prepare_photos,
    "tokens": prepare_tokens, "models/xl": prepare_model, "runs/mine": prepare_run,
}  # fmt: skip


def run_page(page: Page) -> Iterator[str]:
    """Run the blocks of a page in a folder of their own; stop at the first that fails."""
    todo = page.runnable
    if not todo:
        return
    names: dict[str, Any] = {"__name__": "docs"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("data").symlink_to(ROOT / "data")
        for given in ("images", *page.given):
            with quiet():
                GIVEN[given](Path(folder))
        for block in todo:
            run = run_python(block, names) if block.language == "python" else run_shell(block)
            if run:
                yield run
                return


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is printed inside goes into a string."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


def run_python(block: Block, names: dict[str, Any]) -> str | None:
    """Run a block; what went wrong, and in which line of the page."""
    where = f"{block.page}:{block.line}"
    try:
        with quiet():
            exec(compile(block.text, where, "exec"), names)
    except Exception as error:
        frames = [frame.lineno or 1 for frame in traceback.extract_tb(error.__traceback__)
                  if frame.filename == where]  # fmt: skip
        line = block.line + (frames[-1] if frames else 1) - 1
        return f"{block.page}:{line}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def shortened(words: list[str], options: tuple[str, ...]) -> list[str]:
    """A command with other values of its options."""
    values = dict(zip(options[::2], options[1::2], strict=True))
    return [values.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def run_shell(block: Block) -> str | None:
    """Run the commands of a block in this process; the first that fails."""
    for line, words in split_commands(block):
        where = f"{block.page}:{line}"
        if strip_launcher(words)[0] != "fitv2":
            return f"{where}: {words[0]} is not run: say why above the block, <!-- not run: REASON -->"
        try:
            with quiet() as said:
                status = commands.run(shortened(strip_launcher(words)[1:], block.shorter))
        except SystemExit:  # --help
            continue
        except Exception as error:
            return f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if status:
            return f"{where}: exit status {status}: {said.getvalue().strip()[-300:]}"
    return None


def check_page(name: str, root: Path = ROOT) -> Iterator[str]:
    """What can be said of a page without running anything."""
    page = read_page(name, root)
    yield from check_links(page, root)
    for block in page.blocks:
        if block.language == "python":
            yield from check_python(block)
        if block.language != "sh":
            continue
        for line, words in split_commands(block):
            if wrong := check_command(words, root):
                yield f"{name}:{line}: {wrong}"


def main(arguments: list[str]) -> int:
    """Check the pages that are named, or all; the exit status."""
    static = "--static" in arguments
    chosen = [name for name in arguments if name != "--static"] or pages()
    failures = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": cache}  # before anything reads them
        for name in chosen:
            wrong, page = list(check_page(name)), read_page(name)
            if not static and not wrong:
                wrong = list(run_page(page))
            ran = 0 if static else len(page.runnable)
            print(
                "\n".join(wrong) if wrong else f"{name}: ok, {ran} of {len(page.blocks)} blocks run",
                flush=True,
            )
            failures += len(wrong)
    print(f"{len(chosen)} pages, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
