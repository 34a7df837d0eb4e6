import runpy
import subprocess
import sys
import typing
from importlib import import_module

import pytest

from fitv2.config import names as config_names
from fitv2.runtime import registry
from fitv2.runtime.registry import keys_of, one_of


def tables_of_config():
    """Every table that config takes names from."""
    tables = {}

    def noted(table):
        tables[table] = keys_of(table)
        return tables[table]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "keys_of", noted)
        runpy.run_path(config_names.__file__)
    return tables


TABLES = tables_of_config()


def test_config_takes_its_names_from_the_tables():
    names = {table.partition(":")[2] for table in TABLES}
    assert names - {"EXTRACTORS"} == {
        "METHODS", "PATHS", "PREDICTIONS", "WEIGHTS", "TIMES", "FORMS", "OBJECTIVES", "OPTIMIZERS", "FIXED",
        "MULTISTEP", "ADAPTIVE", "STOCHASTIC", "JUMPS", "SCHEDULERS", "SCALES",
    }  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_what_is_read_are_the_keys_of_the_table_that_is_imported(table):
    module, _, name = table.partition(":")
    assert TABLES[table] == tuple(getattr(import_module(module), name))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module `package.tables`, which cannot be imported."""
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    (tmp_path / "package").mkdir()

    def write(source):
        (tmp_path / "package" / "tables.py").write_text(f"raise ImportError\n{source}\n", encoding="utf-8")
        keys_of.cache_clear()

    yield write
    keys_of.cache_clear()


def test_a_table_is_read_without_importing_it(module):
    module('PLAIN = {"a": print, "é": [1, 2]}\nTYPED: dict[str, int] = {"b": 1}\nEMPTY = {}')
    assert keys_of("package.tables:PLAIN") == ("a", "é")
    assert keys_of("package.tables:TYPED") == ("b",)
    assert keys_of("package.tables:EMPTY") == ()


def test_reading_names_loads_nothing_heavy():
    check = (
        "import sys; from fitv2.runtime.registry import keys_of; keys_of('fitv2.diffusion.solvers:FIXED'); "
        "print([m for m in ('torch', 'numpy', 'fitv2.diffusion.solvers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_one_of_is_a_literal_of_all_names_each_once(module):
    module('ONE = {"a": 1, "b": 2}\nTWO = {"b": 3, "c": 4}')
    assert one_of("package.tables:ONE", "package.tables:TWO") == typing.Literal["a", "b", "c"]
    more = one_of("package.tables:TWO", first=("none",), last=("z", "c"))
    assert typing.get_args(more) == ("none", "b", "c", "z")


@pytest.mark.parametrize("source", [
    "", "OTHER = {}", "TABLE = dict(a=1)", "TABLE = OTHER", "def f():\n    TABLE = {}",
    "TABLE: dict[str, int]",
])  # fmt: skip
def test_a_table_that_is_not_written_out_is_named(module, source):
    module(source)
    with pytest.raises(LookupError, match=r"package\.tables has no table TABLE that is written out"):
        keys_of("package.tables:TABLE")


def test_a_name_that_was_added_later_is_accepted_in_a_configuration(monkeypatch):
    from fitv2 import rope
    from fitv2.config import Rope
    from fitv2.errors import UserError
    from fitv2.runtime.serialization import from_dict

    settings = {"extrapolation": "halfway", "train_side": 4}
    with pytest.raises(UserError, match="extrapolation of Rope is 'halfway'"):
        from_dict(Rope, settings)
    monkeypatch.setitem(rope.METHODS, "halfway", rope.ntk)
    assert from_dict(Rope, settings).extrapolation == "halfway"
