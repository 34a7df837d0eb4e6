import pytest

from fitv2.config import Architecture, Rope
from fitv2.diffusion.objective import objective_of
from fitv2.errors import UserError

TINY = {"depth": 1, "width": 32, "heads": 2}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rope("ntk"), "give `train_side`, the rows of the largest square"),
        (lambda: Rope(attention_scale="paper"), "give `train_side`"),
        (lambda: objective_of(Architecture(**TINY, path="ddpm")), "predicts noise"),
        (lambda: objective_of(Architecture(**TINY, path="gvp", prediction="data")), "for `path` linear"),
        (lambda: Architecture(**TINY, time_shift=0), "`time_shift` is 0"),
        (lambda: Architecture(1, 8, 2, rope=Rope("ntk", train_side=4)), "heads of at least 8"),
    ],
)
def test_what_cannot_work_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
