"""What computes: the device, its matmuls, its threads."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fitv2.errors import UserError, in_one_line

MOST = 65_535  # of processes, and of a port


def environment_number(name: str, default: int) -> int:
    """A number that the environment says, as torchrun does. Raises UserError for what is no such number."""
    said = os.environ.get(name, str(default))
    if not (said.isascii() and said.isdecimal() and int(said[:10]) <= MOST):
        raise UserError(f"{name}={said[:40]!r} in the environment: expected a whole number up to {MOST}")
    return int(said)


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU; or what FITV2_DEVICE names.

    Under torchrun each process of a machine has an accelerator of its own. Raises UserError when there
    is no device of that name.
    """
    named = os.environ.get("FITV2_DEVICE")
    found = named_device(named) if named else torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type == "cpu":
        return torch.device("cpu")
    if found.index is None and "LOCAL_RANK" in os.environ:
        # Modulo: some launchers let each process see one accelerator alone.
        seen = max(1, torch.accelerator.device_count())
        return torch.device(found.type, environment_number("LOCAL_RANK", 0) % seen)
    return found


def execution_device(module: torch.nn.Module) -> torch.device:
    """Where a module computes: the weights of one that accelerate offloads lie elsewhere."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    named = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in named if device is not None), None)
    return next(module.parameters()).device if found is None else torch.device(found)


def named_device(name: str) -> torch.device:
    """The device of that name. Raises UserError when this machine has none."""
    try:
        device = torch.device(name)
        check_usable(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = in_one_line(error, 100)
        raise UserError(f"FITV2_DEVICE={name!r} in the environment names no device here: {said}") from error
    return device


def check_usable(device: torch.device) -> None:
    """Raise what torch raises when it cannot compute there."""
    float(torch.ones(1, device=device))


def has_bfloat16_matmuls(device: torch.device) -> bool:
    """Whether the device has matmuls in bfloat16: a CPU that emulates them takes 20 times as long."""
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def single_threaded() -> Iterator[int]:
    """Operations of one thread each, so that results depend on no number of threads; gives that before.

    A thread that was started inside has to set its own: OpenMP counts for each thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
