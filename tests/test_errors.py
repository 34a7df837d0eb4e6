import pytest

from fitv2.errors import UserError, in_one_line, nearest, printable, reading


def test_nearest_names_the_closest_choices_in_one_line():
    message = str(nearest("preset", "fitv2-xxl", ["debug", "fitv2-b", "fitv2-xl"]))
    assert message.startswith("unknown preset 'fitv2-xxl': did you mean fitv2-xl")
    assert "\n" not in message


def test_nearest_lists_all_when_none_is_close():
    assert str(nearest("label", "zzz", ["flags", "fruit"])) == "unknown label 'zzz': choose from flags, fruit"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "a.json cannot be read: 'x'"),
        (RecursionError(), "a.json cannot be read: RecursionError"),
        (OSError(5, "Input/output error"), "a.json cannot be read: Input/output error"),
        (ValueError("two\nlines"), "a.json cannot be read: two lines"),
        (UserError("as it is"), "as it is"),
    ],
)
def test_any_error_on_somebodys_file_is_one_line_that_names_it(error, said):
    with pytest.raises(UserError) as raised, reading("a.json"):
        raise error
    assert str(raised.value) == said


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_what_says_nothing_of_the_file_passes(error):
    with pytest.raises(type(error)), reading("a.json"):
        raise error


def test_a_long_message_is_cut():
    assert in_one_line(ValueError("x" * 1000)) == "x" * 300


def test_what_a_file_says_moves_no_cursor():
    assert printable("a\x1b[2Jb\u202ec\ud800") == "a?[2Jb?c?"
    assert in_one_line(ValueError("\x1b]0;title\x07")) == "?]0;title?"
