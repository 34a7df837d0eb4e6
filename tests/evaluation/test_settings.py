"""What an evaluation and a study take."""

import pytest

from fitv2.errors import UserError
from fitv2.evaluation.settings import Evaluation, Scale


@pytest.mark.parametrize("values", [{"num": 9}, {"crop_at_most": 1.1}, {"seed": -1}, {"most_real": 1}])
def test_evaluations_that_cannot_be_are_refused(values):
    with pytest.raises(UserError, match=f"`{next(iter(values))}` is"):
        Evaluation(**values)


def test_scales_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="`every` is 0"):
        Scale(every=0)
