import pytest

from fitv2.errors import UserError
from fitv2.presets import PRESETS, preset


def test_every_preset_says_what_it_is():
    assert all(value.about for value in PRESETS.values())
    assert {"fitv2-b", "fitv2-xl", "fitv2-3b", "clipart", "debug"} <= set(PRESETS)


def test_presets_are_values():
    with pytest.raises(AttributeError):
        preset("debug").model.depth = 3


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean fitv2-xl"):
        preset("fitv2-xxl")
