"""Names in registries, read without importing them: help is built from them, and must not import torch."""

import ast
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
TABLES: dict[Any, tuple[str, ...]] = {}  # of each type that `one_of` made


def one_of(*tables: str, first: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> Any:
    """The type of a string that is a key of one of the tables, each given as `module:NAME`."""
    names = [*first, *(name for table in tables for name in keys_of(table)), *last]
    kind: Any = Literal[tuple(dict.fromkeys(names))]
    TABLES[kind] = tables
    return kind


def is_registered(kind: Any, name: Any) -> bool:
    """Whether one of the tables of a type of `one_of` has a name by now: code of your own may add some."""
    for table in TABLES.get(kind, ()) if isinstance(name, str) else ():
        module, _, attribute = table.partition(":")
        if name in getattr(sys.modules.get(module), attribute, ()):
            return True
    return False


@cache
def keys_of(table: str) -> tuple[str, ...]:
    """The keys of a dict that is written out at the top of a module. Raises LookupError if there is none."""
    module, _, name = table.partition(":")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if named and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            if None in node.value.keys:
                raise LookupError(f"{name} of {module} takes in another table, which is not read")
            return tuple(ast.literal_eval(key) for key in node.value.keys if key)
    raise LookupError(f"{module} has no table {name} that is written out")
