import pytest

from fitv2.config import Encoding
from fitv2.errors import UserError


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_tokens": (64, 64)}, "names a limit twice"),
        ({"max_tokens": ()}, "names no limit"),
        ({"max_tokens": (40_000,)}, "at most 32767"),
        ({"patch_size": 0}, "`patch_size` is 0"),
        ({"patch_size": 500}, "at most 128"),
        ({"shard_size": 0}, "`shard_size` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
    ],
)
def test_encodings_that_cannot_be_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        Encoding(**values)
