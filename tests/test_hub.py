"""What a saved pipeline has beside its weights: with the package and without, on a disk and on the hub."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoModel
from PIL import Image

from conftest import randomized
from fitv2.adapters import adaptable
from fitv2.checkpoint import Card
from fitv2.config import Sampling
from fitv2.errors import UserError
from fitv2.hub import describe, said_labels
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator

SHAPE = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 2}
MADE = ("model_index.json", "README.md", "pipeline.py", "transformer/README.md", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors")  # fmt: skip


@pytest.fixture
def pipe():
    return FiTPipeline.of(randomized(FiT(**SHAPE)).eval(), Card(("blue", "red"), "pixels", 16, 2.5))


def test_a_readme_says_how_to_open_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert all((tmp_path / name).exists() for name in MADE)
    said = (tmp_path / "README.md").read_text()
    for words in ("library_name: diffusers", "16x16", "class_labels=[0, 1]", "Labels: blue, red.", "2.5"):
        assert words in said
    (tmp_path / "README.md").write_text("mine")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_diffusers_auto_model_opens_the_transformer(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert isinstance(opened, FiT)
    weights = pipe.transformer.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in opened.state_dict().items())


def test_a_model_of_texts_says_so():
    pipe = FiTPipeline.from_pretrained("emoji")
    said = describe(pipe.transformer, pipe.card, pipe.unit)
    assert "pipeline_tag: text-to-image" in said
    assert "Texts are encoded by `wordllama`" in said
    assert said_labels(tuple("abc"), most=2) == "Labels: a, b, and 1 more."


@pytest.mark.parametrize("opening", [
    "import fitv2; pipe = fitv2.FiTPipeline.from_pretrained(folder)",
    "from diffusers import DiffusionPipeline; pipe = DiffusionPipeline.from_pretrained("
    "folder, custom_pipeline=folder, trust_remote_code=True)",
])  # fmt: skip
def test_a_fresh_process_makes_the_same_pixels(pipe, tmp_path, opening):
    pipe.save_pretrained(tmp_path / "pipe")
    (image,) = pipe("red", 12, 20, generator=[generator(3)], num_inference_steps=3).images
    code = f"""
import sys
folder, out = sys.argv[1:]
{opening}
from fitv2.runtime.rng import generator
pipe("red", 12, 20, generator=[generator(3)], num_inference_steps=3).images[0].save(out)
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pipe"), str(tmp_path / "x.png")], check=True,
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": ""}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), np.asarray(image))


def test_nothing_of_a_folder_runs_unless_it_is_trusted(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_text("raise SystemExit('executed')")
    FiTPipeline.from_pretrained(tmp_path)
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path))


def test_what_goes_to_the_hub_is_what_is_saved(pipe, monkeypatch):
    sent = {}

    class Repository:
        repo_id = "someone/tiny"

    def upload(repo_id, folder_path, **options):
        from pathlib import Path

        found = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        sent[repo_id] = sorted(path.relative_to(folder_path).as_posix() for path in found)
        return "there"

    monkeypatch.setattr("fitv2.pipeline.create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr("fitv2.pipeline.upload_folder", upload)
    assert pipe.push_to_hub("tiny", private=True) == "there"
    assert sent == {"someone/tiny": sorted(MADE)}
    with pytest.raises(UserError, match="call push_to_hub"):
        pipe.save_pretrained("x", push_to_hub=True)


def test_a_lora_is_fused_with_the_weights_taken_out_again_and_deleted(pipe, tmp_path):
    from peft import LoraConfig

    def made():
        sampling = Sampling(steps=2)
        return np.asarray(pipe("red", 8, 8, generator=[generator(0)], sampling=sampling).images[0], int)

    def differ(one, other):
        return np.abs(one - other).max() > 1  # of 255: adding up in another order rounds

    plain, other = made(), randomized(FiT(**SHAPE))
    config = LoraConfig(r=2, target_modules=["qkv", "gate_up"], init_lora_weights=False)
    adaptable(other).add_adapter(config, "mine")
    other.save_lora_adapter(tmp_path, adapter_name="mine")
    pipe.load_lora_weights(tmp_path, adapter_name="mine")
    adapted = made()
    assert differ(adapted, plain)
    pipe.fuse_lora()
    assert not differ(made(), adapted)
    pipe.unfuse_lora()
    assert not differ(made(), adapted)
    pipe.delete_adapters("mine")
    assert pipe.get_active_adapters() == []
    assert not differ(made(), plain)
    pipe.unload_lora_weights()
    assert np.array_equal(made(), plain)


def test_a_lora_is_loaded_ruled_and_removed(pipe, tmp_path):
    from peft import LoraConfig

    def made(which):
        sampling = Sampling(steps=2)
        return np.asarray(which("red", 8, 8, generator=[generator(0)], sampling=sampling).images[0], int)

    plain = made(pipe)
    other = FiTPipeline.of(randomized(FiT(**SHAPE)).eval(), pipe.card)
    config = LoraConfig(r=2, target_modules=["qkv", "gate_up"], init_lora_weights=False)
    adaptable(other.transformer).add_adapter(config, "mine")
    other.transformer.save_lora_adapter(tmp_path, adapter_name="mine")
    pipe.load_lora_weights(tmp_path, adapter_name="mine")
    adapted = made(pipe)
    assert np.array_equal(adapted, made(other))
    assert not np.array_equal(adapted, plain)
    pipe.disable_lora()
    assert np.array_equal(made(pipe), plain)
    assert isinstance(pipe.transformer, FiT)
    assert adaptable(pipe.transformer) is pipe.transformer
    pipe.enable_lora()
    pipe.set_adapters("mine", 0.0)
    assert np.array_equal(made(pipe), plain)
    pipe.set_adapters(["mine"], [1.0])
    assert np.array_equal(made(pipe), adapted)
    pipe.save_lora_weights(tmp_path / "again", "mine")
    assert (pipe.get_list_adapters(), pipe.get_active_adapters()) == (["mine"], ["mine"])
    with pytest.raises(UserError, match="unknown adapter 'mien': did you mean mine"):
        pipe.set_adapters("mien")
    with pytest.raises(UserError, match="there is an adapter mine already"):
        pipe.load_lora_weights(tmp_path, adapter_name="mine")
    with pytest.raises(UserError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "whole")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "whole")
    assert np.array_equal(made(pipe), plain)
    pipe.load_lora_weights(tmp_path / "again")
    assert np.array_equal(made(pipe), adapted)
    pipe.unload_lora_weights()
