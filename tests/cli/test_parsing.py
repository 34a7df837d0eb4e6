from dataclasses import dataclass, field

import pytest

from fitv2.cli.parsing import option_names, parse
from fitv2.errors import UserError


@dataclass(frozen=True)
class Inner:
    depth: int = 2


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    mirror: bool = True
    inner: Inner = field(default_factory=Inner)


def test_option_names_are_those_that_can_be_typed():
    assert [*option_names(Outer)] == ["--help", "--name", "--mirror", "--no-mirror", "--help", "--depth"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nmae", "y"], "unknown option '--nmae': did you mean --name"),
        (["--inner.depth", "many"], "unknown option '--inner.depth'"),
        (["--name"], r"--name.*\(see fitv2 outer --help\)"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    with pytest.raises(UserError, match=said) as raised:
        parse(Outer, arguments, None)
    assert "\n" not in str(raised.value)


def test_arguments_replace_the_defaults():
    made = parse(Outer, ["--no-mirror"], Outer(name="y"))
    assert (made.name, made.mirror) == ("y", False)
