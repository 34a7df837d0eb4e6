"""Diffusers' own tests of a model, on FiT: they are in no package, so DIFFUSERS_SOURCE names a checkout.

    DIFFUSERS_SOURCE=diffusers RUN_COMPILE=1 python -m pytest -o addopts= tests/test_diffusers_mixins.py

Its tests of adapters name layers to_q and to_k, which FiT has in one matrix: see test_hub.py and
test_adapters.py for those.
"""

import os
import sys

import pytest
import torch

from fitv2.conditioning import Condition
from fitv2.model import FiT
from fitv2.tokens import Layout

SOURCE = os.environ.get("DIFFUSERS_SOURCE")
if SOURCE is None:
    pytest.skip("DIFFUSERS_SOURCE names no checkout of diffusers", allow_module_level=True)
sys.path.insert(0, SOURCE)
from tests.models.testing_utils import (  # noqa: E402
    BaseModelTesterConfig,
    LayerwiseCastingTesterMixin,
    ModelTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)


class Config(BaseModelTesterConfig):
    """What diffusers' tests ask of a model."""

    model_class = FiT
    output_shape = (10, 12)

    def get_init_dict(self):
        """A model of two blocks."""
        return {"depth": 2, "width": 32, "heads": 2, "patch_size": 2, "in_channels": 3, "num_classes": 2}

    def get_dummy_inputs(self):
        """Two images of different shapes."""
        rng, layout = torch.Generator().manual_seed(0), Layout.of([(2, 3), (4, 1)])
        return {
            "x_TC": torch.randn(layout.tokens, 12, generator=rng),
            "layout": layout,
            "t_B": torch.rand(2, generator=rng),
            "condition": Condition.of(label=torch.tensor([0, 1])),
        }


class TestModel(Config, ModelTesterMixin):
    """Saving, loading, dtypes, sharding."""

    @pytest.mark.xfail(reason="by itself FiT returns the tensor, not a dictionary", strict=True)
    def test_outputs_equivalence(self):
        """Not by default, but with `return_dict`."""
        super().test_outputs_equivalence()


class TestTraining(Config, TrainingTesterMixin):
    """Gradients, EMA, gradient checkpointing."""

    def test_gradient_checkpointing_is_applied(self):
        """To the whole model."""
        super().test_gradient_checkpointing_is_applied(expected_set={"FiT"})


class TestCasting(Config, LayerwiseCastingTesterMixin):
    """Weights in eight bits."""

    main_input_name = "x_TC"


class TestCompile(Config, TorchCompileTesterMixin):
    """torch.compile; needs an accelerator, see test_compile.py for the rest."""
