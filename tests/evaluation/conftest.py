"""torch-fidelity as the reference, where it is installed without torchvision too."""

import importlib.util
import sys
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def fidelity():
    """torch_fidelity. It imports torchvision for built-in datasets alone, which no test asks for."""
    if importlib.util.find_spec("torchvision") is None:
        names = [
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ]
        modules = {name: ModuleType(name) for name in names}
        for name in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(modules["torchvision.datasets"], name, type(name, (), {}))
        for name, module in modules.items():
            above, _, own = name.rpartition(".")
            if above:
                setattr(modules[above], own, module)
        sys.modules |= modules
    return pytest.importorskip("torch_fidelity")
