import dataclasses
from dataclasses import dataclass, field

import pytest

from fitv2.cli.parsing import RENAMED, name_flags, option_names, parse, rename
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


def test_a_command_of_two_words_is_called_by_both():
    @dataclass(frozen=True)
    class StudySizes:
        num: int = 1

    with pytest.raises(UserError, match=r"see fitv2 study sizes --help"):
        parse(StudySizes, ["--num", "many"], None)


def test_arguments_replace_the_defaults():
    made = parse(Outer, ["--no-mirror"], Outer(name="y"))
    assert (made.name, made.mirror) == ("y", False)


def test_former_names_are_those_of_settings_today():
    from fitv2.config import Guidance, Rope, Training

    known = {field.name for kind in (Training, Rope, Guidance) for field in dataclasses.fields(kind)}
    assert set(RENAMED.values()) <= known
    assert not set(RENAMED) & known


def test_a_former_name_is_replaced_with_a_hint(capsys):
    known = ["--max-grad-norm", "--no-gradient-checkpointing"]
    assert rename("--clip=2", known) == "--max-grad-norm=2"
    assert capsys.readouterr().err == "fitv2: --clip is now --max-grad-norm\n"
    assert rename("--no-recompute", known) == "--no-gradient-checkpointing"
    assert rename("--clip", ["--label"]) == "--clip"
    assert [rename(text, known) for text in ("clip", "--depth", "2")] == ["clip", "--depth", "2"]


def test_fields_of_an_error_are_shown_as_flags():
    assert (
        name_flags("`max_grad_norm` is 0; see `X`, `datasets`, a`b", ["--max-grad-norm"])
        == "--max-grad-norm is 0; see `X`, `datasets`, a`b"
    )
