"""Imports without garbage collections."""

import gc
import sys

import pytest

from fitv2.runtime.imports import import_quickly


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of this source, to be imported by the name given back."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(source):
        (tmp_path / "made_here.py").write_text(source)
        monkeypatch.delitem(sys.modules, "made_here", raising=False)
        return "made_here"

    yield written
    sys.modules.pop("made_here", None)
    gc.unfreeze()


def test_nothing_is_collected_while_a_module_is_imported(module):
    name = module("import gc\ncollecting = gc.isenabled()\nkept = [[] for _ in range(100)]")
    before = gc.get_freeze_count()
    import_quickly(name)
    assert not sys.modules[name].collecting
    assert gc.isenabled()
    assert gc.get_freeze_count() > before + 100  # what it made is exempt


def test_what_was_imported_before_is_left_alone(module):
    name = module("")
    import_quickly(name)
    frozen = gc.get_freeze_count()
    import_quickly(name)
    assert gc.get_freeze_count() == frozen


def test_a_module_that_is_not_there_is_an_error_and_garbage_is_collected_again():
    with pytest.raises(ModuleNotFoundError, match="fitv2_none"):
        import_quickly("fitv2_none")
    assert gc.isenabled()
