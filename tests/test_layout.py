"""What the tree promises: a test for each module, imports that cost nothing, names that stay.

That modules import only from lower rooms is checked by import-linter: see pyproject.toml.
"""

import subprocess
import sys
from pathlib import Path

import fitv2

PACKAGE = Path(fitv2.__file__).parent


def test_every_module_has_a_test_at_the_same_place():
    modules = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")}
    tests = Path(__file__).parent
    missing = [str(m) for m in modules if not (tests / m.parent / f"test_{m.name}").exists()]
    assert not missing


def test_import_and_help_load_nothing_heavy():
    check = (
        "import sys, fitv2, fitv2.cli.commands; "
        "print([m for m in ('torch', 'diffusers', 'datasets', 'PIL', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_resolve():
    assert all(getattr(fitv2, name) is not None for name in fitv2.__all__)


def test_names_that_saved_folders_and_users_hold_on_to_stay():
    from fitv2.checkpoint import from_released, released_forward
    from fitv2.data import TokenDataset
    from fitv2.model import FiT

    assert all((from_released, released_forward, TokenDataset))
    assert FiT is fitv2.FiT
    assert FiT.__module__ == "fitv2.model"


def test_the_public_names_are_listed_and_each_is_there():
    assert set(fitv2.__all__) <= set(dir(fitv2))
    assert "__version__" in dir(fitv2)
    assert all(getattr(fitv2, name) is not None for name in fitv2.__all__)
