"""What the ecosystem wraps around layers works on FiT: adapters, offloading, casting, quantization."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from diffusers import AutoencoderKL
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, inject_adapter_in_model

from conftest import randomized
from fitv2.autoencoder import DiffusersAutoencoder
from fitv2.checkpoint import Card
from fitv2.conditioning import Condition
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.device import execution_device
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout

SHAPE = {"depth": 2, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}
LAYOUT = Layout.of([(2, 3), (3, 3)])
X = torch.randn(15, 6, generator=generator(0))
T = torch.tensor([0.3, 0.6])


def build():
    return randomized(FiT(**SHAPE)).eval()


def output_of(model, dtype=torch.float32):
    with torch.no_grad():
        return model(X.to(dtype), LAYOUT, T, Condition.of(label=torch.tensor([1, 2]))).float()


@pytest.mark.parametrize("layer", ["qkv", "gate_up", "down", "out"])
def test_a_lora_on_any_layer_changes_the_output_and_is_trained(layer):
    model = build()
    before = output_of(model)
    config = LoraConfig(r=4, target_modules=[layer], init_lora_weights=False)
    model = inject_adapter_in_model(config, model)
    assert (output_of(model) - before).abs().max() > 1e-3
    model(X, LAYOUT, T, Condition.of(label=torch.tensor([1, 2]))).square().sum().backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapters) >= 4
    assert all(grad is not None and grad.abs().max() > 0 for grad in adapters.values())


def test_a_lora_of_nothing_changes_nothing():
    model = build()
    before = output_of(model)
    config = LoraConfig(r=4, target_modules=["qkv", "gate_up"])  # its second matrix is zero
    torch.testing.assert_close(output_of(inject_adapter_in_model(config, model)), before)


def test_weights_on_the_host_or_the_disk_give_the_same(tmp_path):
    expected = output_of(build())
    offloaded = cpu_offload(build(), execution_device=torch.device("cpu"))
    torch.testing.assert_close(output_of(offloaded), expected)
    on_disk = disk_offload(build(), tmp_path, execution_device=torch.device("cpu"))
    assert next(on_disk.blocks[0].attention.qkv.parameters()).device.type == "meta"
    torch.testing.assert_close(output_of(on_disk), expected)


def test_layers_moved_one_by_one_give_the_same():
    model = build()
    expected = output_of(model)
    devices = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    apply_group_offloading(model, offload_type="leaf_level", **devices)
    torch.testing.assert_close(output_of(model), expected)


def test_weights_stored_in_eight_bits_are_computed_in_sixteen():
    model = build().to(torch.bfloat16)
    expected = output_of(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    stored = {parameter.dtype for parameter in model.blocks.parameters()}
    assert stored == {torch.float8_e4m3fn}
    assert model.head.out.weight.dtype == torch.float8_e4m3fn
    assert model.time_embed.up.weight.dtype == torch.bfloat16  # diffusers leaves out what it keeps in float32
    difference = (output_of(model) - expected).norm() / expected.norm()
    assert 1e-4 < difference < 0.2


QUANTIZED = """
import sys
sys.path[:0] = [{tests!r}, {torchao!r}]
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from test_adapters import build, output_of

model = build()
expected = output_of(model)
quantize_(model, Int8WeightOnlyConfig())
kinds = {{type(model.blocks[0].attention.qkv.weight.data).__name__ for _ in "a"}}
print(float((output_of(model) - expected).norm() / expected.norm()), *kinds)
"""


def test_weights_quantized_to_int8_stay_close():
    """In a process of its own: torchao lies beside the environment (see the Makefile)."""
    torchao, tests = Path(sys.prefix) / "torchao", Path(__file__).parent
    code = QUANTIZED.format(tests=str(tests), torchao=str(torchao))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    difference, kind = result.stdout.split()
    assert 1e-5 < float(difference) < 0.1
    assert kind not in ("Tensor", "Parameter")


def with_hook(model):
    cpu_offload_with_hook(model, torch.device("cpu"))


def in_groups(model, kind):
    devices = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    apply_group_offloading(model, offload_type=kind, num_blocks_per_group=1, **devices)


OFFLOADED = {
    "moved by accelerate": lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
    "moved as a whole": with_hook,
    "moved by layers": lambda model: in_groups(model, "leaf_level"),
    "moved by blocks": lambda model: in_groups(model, "block_level"),
}


@pytest.mark.parametrize("name", OFFLOADED)
def test_pictures_of_an_offloaded_model_are_the_same_at_every_size(name):
    """Beyond the trained size positions are scaled, in a model that shares weights and hooks with it."""
    model = randomized(FiT(**SHAPE | {"patch_size": 4, "in_channels": 3, "qk_norm": False})).eval()
    for block in model.blocks:  # so that positions matter
        block.attention.qkv.weight.data *= 6

    def pictures(model):
        pipe = FiTPipeline.of(model, Card(("a", "b", "c"), "pixels", 4))
        how = {"num_inference_steps": 2, "progress": lambda _: None, "extrapolation": "ntk"}
        return pipe([0, 1], [8, 8], [8, 32], generator=[generator(0), generator(1)], **how).images

    expected = pictures(deepcopy(model))
    OFFLOADED[name](model)
    found = pictures(model)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    plain = FiTPipeline.of(model, Card(("a", "b", "c"), "pixels", 4))
    unscaled = plain(1, 8, 32, generator=[generator(1)], num_inference_steps=2, progress=lambda _: None,
                     extrapolation="none").images[0]  # fmt: skip
    assert np.abs(np.asarray(unscaled, int) - np.asarray(found[1], int)).max() > 1


def test_an_autoencoder_that_waits_elsewhere_computes_where_its_hook_says(tiny_vae):
    vae = AutoencoderKL.from_pretrained(tiny_vae)
    plain = DiffusersAutoencoder(deepcopy(vae), "vae")
    hooked, _ = cpu_offload_with_hook(vae, torch.device("cpu"))
    moved = DiffusersAutoencoder(hooked, "vae")
    assert execution_device(hooked) == torch.device("cpu")
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(moved.encode(pixels), plain.encode(pixels))
    assert torch.equal(moved.decode(plain.encode(pixels)), plain.decode(plain.encode(pixels)))
