"""What computes: the device, its matmuls, its threads."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU; or what FITV2_DEVICE names.

    Under torchrun each process of a machine has an accelerator of its own.
    """
    named = os.environ.get("FITV2_DEVICE")
    found = torch.device(named) if named else torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type == "cpu":
        return torch.device("cpu")
    if found.index is None and "LOCAL_RANK" in os.environ:
        # Modulo: some launchers let each process see one accelerator alone.
        seen = max(1, torch.accelerator.device_count())
        return torch.device(found.type, int(os.environ["LOCAL_RANK"]) % seen)
    return found


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
