"""Run docs/tutorials/tour.py cell by cell, and write it with its pictures as a notebook beside it.

python tools/build_notebook.py
"""

import ast
import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

SCRIPT = Path(__file__).parents[1] / "docs" / "tutorials" / "tour.py"
MARK = "# %%"
TEXT = "[markdown]"


def cells(script: str) -> list[tuple[str, str]]:
    """The kind and the text of each cell: "markdown" or "code"."""
    found = []
    for piece in script.split(MARK)[1:]:
        head, _, body = piece.partition("\n")
        if head.strip() == TEXT:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip()))
    return found


def run(code: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, if that is an expression."""
    tree = ast.parse(code)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, SCRIPT.name, "exec"), names)
        return None
    tree.body.pop()
    exec(compile(tree, SCRIPT.name, "exec"), names)
    return eval(compile(ast.Expression(last.value), SCRIPT.name, "eval"), names)


def outputs(value: Any, number: int) -> list[dict[str, Any]]:
    """A picture as a notebook shows it."""
    if not isinstance(value, Image.Image):
        return []
    file = io.BytesIO()
    value.quantize(256).save(file, "PNG", optimize=True)
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "<a picture>"}
    return [{"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}]


def build(script: str) -> dict[str, Any]:
    """The notebook, run."""
    names: dict[str, Any] = {}
    made: list[dict[str, Any]] = []
    for place, (kind, text) in enumerate(cells(script)):
        cell: dict[str, Any] = {
            "id": f"cell-{place}",
            "cell_type": kind,
            "metadata": {},
            "source": text.splitlines(True),
        }
        if kind == "code":
            number = sum(one["cell_type"] == "code" for one in made) + 1
            cell |= {"execution_count": number, "outputs": outputs(run(text, names), number)}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about: dict[str, Any] = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Write the notebook."""
    notebook = build(SCRIPT.read_text(encoding="utf-8"))
    target = SCRIPT.with_suffix(".ipynb")
    target.write_text(json.dumps(notebook, indent=1) + "\n", encoding="utf-8")
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
