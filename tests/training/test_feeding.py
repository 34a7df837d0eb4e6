"""Which images a step takes, and whether they will do."""

import pytest
from test_trainer import settings

from conftest import together
from fitv2.config import Encoding
from fitv2.encoding.encode import encode
from fitv2.errors import UserError
from fitv2.training.trainer import train


def test_two_times_need_two_tokens(folder, tmp_path):
    encode(folder, tmp_path / "tokens", Encoding(max_tokens=(1,), mirror=False), workers=0)
    with pytest.raises(UserError, match="`clean_share` is for images of two tokens at least"):
        train(settings(clean_share=0.25), tmp_path / "tokens", tmp_path / "run")


def test_small_steps_first_are_for_a_number_of_images(tokens, tmp_path):
    with pytest.raises(UserError, match="`batch_rampup_steps` is for `batch_size`, not for"):
        train(settings(batch_rampup_steps=4, tokens_per_step=60), tokens, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.warns(UserWarning, match="steps grow to 3 of 8 images: give fewer `batch_rampup_steps`"):
        train(settings(steps=2, batch_size=8, batch_rampup_steps=8), tokens, tmp_path / "run")


def test_a_first_step_of_fewer_images_than_processes_is_refused(tokens, tmp_path):
    chosen = settings(batch_size=8, batch_rampup_steps=4)
    said = together(2, lambda _: train(chosen, tokens, tmp_path / "run"))
    assert all("the first step has 1 images for 2 processes: raise `batch_size`" in one for one in said)
    assert not (tmp_path / "run" / "run.json").exists()
