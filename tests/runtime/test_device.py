import torch

from fitv2.runtime.device import default_device, has_bfloat16_matmuls, single_threaded


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
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for named, expected in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        monkeypatch.setenv("FITV2_DEVICE", named)
        assert str(default_device()) == expected
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # each process sees one
    monkeypatch.setenv("FITV2_DEVICE", "cuda")
    assert str(default_device()) == "cuda:0"
