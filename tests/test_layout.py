"""A module imports only from lower levels: the order in which the package is read."""

import ast
import subprocess
import sys
from pathlib import Path

import fitv2

PACKAGE = Path(fitv2.__file__).parent
LEVELS = [
    {"errors"},
    {
        "arguments",
        "config",
        "files",
        "images",
        "meters",
        "packing",
        "paths",
        "runtime",
        "settings",
        "solvers",
        "stores",
        "tokens",
        "tracking",
        "workers",
    },
    {
        "attention",
        "autoencoder",
        "bars",
        "figures",
        "flow",
        "muon",
        "presets",
        "rope",
        "shards",
        "sources",
        "training_state",
    },
    {"archives", "data", "ddpm", "model", "options", "runs", "tables"},
    {"corruption", "flops", "guidance", "listing", "optimizers", "parallel", "released", "transport"},
    {"checkpoint", "encoder"},
    {"convert", "encode", "sample", "saver", "starting"},
    {"preview"},
    {"inspection", "train"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]


def imported(path):
    """Every module of the package that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fitv2."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "fitv2":
            named = [name.name for name in node.names if name.name != "__version__"]
            yield from (fitv2._HOME.get(name, name) for name in named)
        elif isinstance(node, ast.Import):
            yield from (n.name.split(".")[1] for n in node.names if n.name.startswith("fitv2."))


def test_modules_import_only_from_lower_levels():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    files = {path.stem: path for path in PACKAGE.glob("*.py")}
    assert set(files) == set(level)
    wrong = [
        f"{name} (level {level[name]}) imports {other} (level {level[other]})"
        for name, path in files.items()
        for other in imported(path)
        if level[other] >= level[name]
    ]
    assert not wrong


def test_every_module_has_a_test():
    tested = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules <= tested


def test_import_and_help_load_nothing_heavy():
    check = (
        "import sys, fitv2, fitv2.cli; "
        "print([m for m in ('torch', 'diffusers', 'datasets', 'PIL', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_resolve():
    assert all(getattr(fitv2, name) is not None for name in fitv2.__all__)
