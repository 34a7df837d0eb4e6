from fitv2.errors import nearest


def test_nearest_names_the_closest_choices_in_one_line():
    message = str(nearest("preset", "fitv2-xxl", ["debug", "fitv2-b", "fitv2-xl"]))
    assert message.startswith("unknown preset 'fitv2-xxl': did you mean fitv2-xl")
    assert "\n" not in message


def test_nearest_lists_all_when_none_is_close():
    assert str(nearest("label", "zzz", ["flags", "fruit"])) == "unknown label 'zzz': choose from flags, fruit"
