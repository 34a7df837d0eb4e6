import pytest

from fitv2.config import FREE, Training
from fitv2.errors import UserError


def test_a_step_has_images():
    with pytest.raises(UserError, match="`batch_size` is 0"):
        Training(batch_size=0)


def test_when_may_change_on_resuming_but_not_what_is_learnt():
    assert sorted(FREE) == [
        "check_data", "compile", "decay_steps", "evaluate_every", "evaluate_num", "fsdp_size",
        "grad_accum_steps", "gradient_checkpointing", "keep", "log_every", "milestone_every", "minutes",
        "sample_every", "save_every", "stall_minutes", "steps", "track", "validate_every", "workers",
    ]  # fmt: skip
