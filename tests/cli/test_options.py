import dataclasses
import inspect

import pytest

from fitv2.cli import options

COMMANDS = [kind for _, kind in inspect.getmembers(options, dataclasses.is_dataclass)
            if kind.__module__ == options.__name__ and not kind.__subclasses__()]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(command):
    """The string after a field is its help; so is the class's docstring."""
    bases = [base for base in command.__mro__ if base.__module__ == options.__name__]
    source = "".join(map(inspect.getsource, bases))
    assert command.__doc__
    for field in dataclasses.fields(command):
        if not dataclasses.is_dataclass(getattr(field.type, "__origin__", None)):
            after = source.split(f"    {field.name}: ", 1)[1].split('\n    """', 1)
            assert len(after) == 2, field.name
            assert after[0].count("\n    ") <= 1, f"{field.name} has no text of its own"


def test_commands():
    names = {
        "App", "Convert", "Demo", "Edit", "Encode", "Evaluate", "Export", "Flops", "Inspect", "Sample",
        "StudyConvergence", "StudyScaling", "StudySizes", "StudySolvers", "Train",
    }  # fmt: skip
    assert {kind.__name__ for kind in COMMANDS} == names
