import math
import typing
from dataclasses import fields, is_dataclass

import pytest

from fitv2.cli.commands import COMMANDS, run
from fitv2.config import Architecture, Encoding, Guidance, Positions, Rope, Sampling, Training
from fitv2.errors import UserError
from fitv2.limits import LIMITS, Range, check_limit

SETTINGS = (Architecture, Encoding, Guidance, Positions, Rope, Sampling, Training)
OPTIONS = [kind for kind, _ in COMMANDS.values()]


def numeric(kind):
    """The names of the fields of a dataclass that hold numbers."""
    for name, annotation in typing.get_type_hints(kind).items():
        inside = {annotation, *typing.get_args(annotation)}
        if not is_dataclass(annotation) and {int, float} & inside and name in {f.name for f in fields(kind)}:
            yield name


@pytest.mark.parametrize("kind", [*SETTINGS, *OPTIONS], ids=lambda kind: kind.__name__)
def test_every_number_that_can_be_chosen_has_a_range(kind):
    for name in numeric(kind):
        assert f"{kind.__name__}.{name}" in LIMITS or name in LIMITS


@pytest.mark.parametrize("name", LIMITS)
def test_no_range_holds_what_is_no_finite_number(name):
    kind, _, field = name.rpartition(".")
    for odd in (math.nan, math.inf, -math.inf, 1e300, -1e300):
        with pytest.raises(UserError, match=f"`{field}` is"):
            check_limit(field, odd, kind)


@pytest.mark.parametrize("name", LIMITS)
def test_the_ends_of_a_range_belong_to_it_unless_they_are_left_out(name):
    limit = LIMITS[name]
    assert limit.holds(limit.least) != limit.above
    assert limit.holds(limit.most) != limit.below
    assert not limit.holds(math.nextafter(limit.least, -math.inf))
    assert not limit.holds(math.nextafter(limit.most, math.inf))


def test_a_range_says_its_ends_in_words():
    assert str(Range(0, 1, below=True)) == "at least 0 and below 1"
    assert str(Range(0, 1e6, above=True)) == "above 0 and at most 1e+06"


# What made models of NaN, black pictures, tracebacks or hangs.
ODD = [
    ("train debug --data d --out r", "--ema-decay", "nan"),
    ("train debug --data d --out r", "--learning-rate", "inf"),
    ("train debug --data d --out r", "--max-grad-norm", "-1"),
    ("train debug --data d --out r", "--label-dropout", "2"),
    ("train debug --data d --out r", "--beta2", "1"),
    ("train debug --data d --out r", "--minutes", "inf"),
    ("train debug --data d --out r", "--depth", "1000000000"),
    ("train debug --data d --out r", "--workers", "100000"),
    ("train debug --data d --out r", "--steps", "999999999999"),
    ("train debug --data d --out r", "--seed", "-1"),
    ("encode s o", "--workers", "100000"),
    ("encode s o", "--max-tokens", "0"),
    ("sample clipart", "--guidance-power", "nan"),
    ("sample clipart", "--guidance-scale", "inf"),
    ("sample clipart", "--guidance-interval", "0 nan"),
    ("sample clipart", "--steps", "999999999999"),
    ("sample clipart", "--num", "2147483648"),
    ("sample clipart", "--rtol", "nan"),
    ("sample clipart", "--size", "65536x65536"),
    ("sample clipart", "--size", "1x999999999999999"),
    ("inspect tokens", "--samples", "-1"),
    ("demo", "--minutes", "-inf"),
    ("convert s o", "--heads", "0"),
]


@pytest.mark.parametrize(("command", "option", "value"), ODD, ids=lambda value: value.replace(" ", "_"))
def test_commands_refuse_such_a_number_and_name_its_option(command, option, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    field = option.removeprefix("--").replace("-", "_")
    with pytest.raises(UserError, match=f"`{field}`.*(at least|above|at most|below)"):
        run([*command.split(), option, *value.split()])
    assert not list(tmp_path.iterdir())


def test_a_model_of_more_parameters_than_any_is_refused():
    with pytest.raises(UserError, match=r"make a model of [0-9,]+ billion parameters"):
        Architecture(depth=1000, width=65_536, heads=16)
