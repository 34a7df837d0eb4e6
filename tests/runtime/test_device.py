import pytest
import torch

from fitv2.errors import UserError
from fitv2.runtime.device import default_device, environment_number, has_bfloat16_matmuls, single_threaded


def test_default_device_can_compute():
    assert torch.ones(2, device=default_device()).sum().item() == 2


def test_threads_are_as_many_as_before():
    torch.set_num_threads(2)
    with single_threaded() as before:
        assert (before, torch.get_num_threads()) == (2, 1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_a_processor_says_whether_it_has_bfloat16(monkeypatch):
    assert has_bfloat16_matmuls(torch.device("cuda"))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda avx=avx: avx)
        assert has_bfloat16_matmuls(torch.device("cpu")) == (amx or avx)


def test_a_named_accelerator_gets_the_number_of_its_process(monkeypatch):
    monkeypatch.setattr("fitv2.runtime.device.check_usable", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for named, expected in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        monkeypatch.setenv("FITV2_DEVICE", named)
        assert str(default_device()) == expected
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # each process sees one
    monkeypatch.setenv("FITV2_DEVICE", "cuda")
    assert str(default_device()) == "cuda:0"


@pytest.mark.parametrize("name", ["meta", "gpu", "cpu:x", "cuda:999999", "", "\n", "vulkan"])
def test_a_device_that_is_none_is_one_line(monkeypatch, name):
    monkeypatch.setenv("FITV2_DEVICE", name)
    if not name:
        assert default_device().type in ("cpu", "cuda", "mps", "xpu")
        return
    with pytest.raises(UserError, match="in the environment names no device here"):
        default_device()


@pytest.mark.parametrize("said", ["two", "-1", "1.5", "", " 3", "\u0663", "9" * 5000, "70000"])
def test_a_number_of_the_environment_that_is_none_is_one_line(monkeypatch, said):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    with pytest.raises(UserError, match=r"LOCAL_WORLD_SIZE=.* in the environment: expected a whole number"):
        environment_number("LOCAL_WORLD_SIZE", 1)


def test_what_the_environment_does_not_say_is_the_default(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert environment_number("LOCAL_WORLD_SIZE", 1) == 1
