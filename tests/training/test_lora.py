"""LoRA in training: what changes, what is saved, and that a run resumes bit for bit."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from conftest import randomized, together
from fitv2.checkpoint import LORA, WEIGHTS, load_model, newest_checkpoint, save_model
from fitv2.conditioning import Condition
from fitv2.config import Encoding
from fitv2.encoding.encode import encode
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.presets import preset
from fitv2.runtime.distributed import World
from fitv2.runtime.rng import generator
from fitv2.tokens import Layout
from fitv2.training.lora import TARGETS, adapted, add_lora, factors, without_lora
from fitv2.training.trainer import train
from fitv2.training.weights import Weights

DEBUG = preset("debug")
SHAPE = {"depth": 2, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 6, "num_classes": 5}


def settings(**changes):
    return replace(DEBUG, training=replace(DEBUG.training, **changes))


def output(model):
    layout = Layout.of([(2, 3), (3, 3)])
    x_TC = torch.randn(15, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x_TC, layout, torch.tensor([0.2, 0.7]), Condition.of(label=torch.tensor([1, 4])))


def changed_lora(model):
    """A model whose LoRA says something."""
    add_lora(model, 3)
    for _, layer in adapted(model):
        torch.nn.init.normal_(layer.lora_B["lora"].weight, std=0.1)
    return model


def test_at_first_it_changes_nothing_and_later_it_is_in_the_matrices():
    plain = output(randomized(FiT(**SHAPE)))
    fresh = randomized(FiT(**SHAPE))
    add_lora(fresh, 3)
    torch.testing.assert_close(output(fresh), plain)
    model = changed_lora(randomized(FiT(**SHAPE)))
    assert (output(model) - plain).abs().max() > 1e-2
    alone = without_lora(model)
    torch.testing.assert_close(output(alone), output(model), atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name in alone.state_dict())


def test_it_alone_is_trained_in_the_matrices_of_the_blocks():
    model = randomized(FiT(**SHAPE)).requires_grad_(False)
    add_lora(model, 3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 4 * 2
    assert all(re.fullmatch(TARGETS, name.split(".lora_")[0]) for name in trained)


def test_the_average_is_that_of_the_factors_and_lies_in_a_plain_model():
    master = randomized(FiT(**SHAPE)).requires_grad_(False)
    add_lora(master, 3)
    weights = Weights(master, torch.device("cpu"), torch.float32, World(), 1)
    before = {name: factor.clone() for name, factor in factors(master).items()}
    for _, layer in adapted(master):
        torch.nn.init.normal_(layer.lora_B["lora"].weight)
    weights.update_ema(0.75)
    adapter, average = weights.gather_adapter(World()), dict(weights.ema.named_parameters())
    for name, now in factors(master).items():
        torch.testing.assert_close(adapter[name], 0.75 * before[name] + 0.25 * now.detach())
    for name, layer in adapted(master):
        up, down = (adapter[f"{name}.lora_{part}.weight"] for part in "BA")
        torch.testing.assert_close(average[f"{name}.weight"], layer.base_layer.weight + up @ down)
    assert len(adapter) == 2 * sum(1 for _ in adapted(master))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_changes_what_it_should_and_saves_a_whole_model(tokens, tmp_path, optimizer, precision):
    train(settings(steps=2), tokens, tmp_path / "first")
    tuned = settings(steps=3, lora=4, optimizer=optimizer, precision=precision, ema_decay=0.5)
    train(tuned, tokens, tmp_path / "tuned", init=str(tmp_path / "first"))
    before, after = (load_model(tmp_path / name)[0] for name in ("first", "tuned"))
    changed = {
        name.removesuffix(".weight")
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    matrices = {name for name, _ in before.named_modules() if re.fullmatch(TARGETS, name)}
    assert changed == matrices


def test_interrupted_and_resumed_is_as_never_interrupted(tokens, tmp_path):
    train(settings(steps=2), tokens, tmp_path / "first")
    init = str(tmp_path / "first")
    whole = train(settings(steps=4, lora=4), tokens, tmp_path / "whole", init=init)
    train(settings(steps=2, lora=4), tokens, tmp_path / "parts", init=init)
    parts = train(settings(steps=4, lora=4), tokens, tmp_path / "parts", init=init)
    for folder in ("state", "ema"):
        one, other = (next(iter(sorted((run / folder).glob("*.safetensors")))) for run in (whole, parts))
        held = load_file(one), load_file(other)
        assert held[0].keys() == held[1].keys()
        assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
    with pytest.raises(UserError, match="lora"):
        train(settings(steps=5, lora=8), tokens, tmp_path / "parts", init=init)


def test_embeddings_of_other_labels_are_trained_too(tokens, folder, tmp_path):
    train(settings(steps=2), tokens, tmp_path / "first")
    named = tmp_path / "named"
    for name in ("cat", "dog", "owl"):
        (named / name).mkdir(parents=True)
        for i, path in enumerate(sorted((folder / "blue").glob("*.png"))[:4]):
            (named / name / f"{i}.png").write_bytes(path.read_bytes())
    encode(str(named), tmp_path / "other", Encoding(max_tokens=(16,), patch_size=DEBUG.model.patch_size))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = tmp_path / "tuned"
        train(settings(steps=3, lora=2), tmp_path / "other", run, init=str(tmp_path / "first"))
    assert any("label_embed start at random" in str(each.message) for each in said)
    held = load_file(newest_checkpoint(run) / "ema" / WEIGHTS)
    assert held["label_embed.weight"].shape[0] == 4  # with that for none
    shorter = train(
        settings(steps=1, lora=2), tmp_path / "other", tmp_path / "shorter", init=str(tmp_path / "first")
    )
    before = load_file(shorter / "ema" / WEIGHTS)
    assert not torch.equal(held["label_embed.weight"], before["label_embed.weight"])  # it is trained
    torch.testing.assert_close(held["time_embed.up.weight"], before["time_embed.up.weight"])
    torch.testing.assert_close(
        held["patch_embed.weight"], load_model(tmp_path / "first")[0].patch_embed.weight.detach()
    )


@pytest.mark.parametrize(("changes", "said"), [
    ({"lora": 4}, "`lora` changes a trained model: give `init`"),
    ({"lora": 4, "trainable": "post-training", "init": True}, "give `lora` or `trainable`"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(tokens, tmp_path, changes, said):
    init = None
    if changes.pop("init", False):
        train(settings(steps=1), tokens, tmp_path / "first")
        init = str(tmp_path / "first")
    with pytest.raises(UserError, match=said):
        train(settings(steps=1, **changes), tokens, tmp_path / "run", init=init)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("size", "fsdp_size"), [(2, 1), (2, 2), (4, 2)])
def test_several_processes_train_the_same_lora(tokens, tmp_path, size, fsdp_size):
    train(settings(steps=2), tokens, tmp_path / "first")
    init = str(tmp_path / "first")
    tuned = settings(steps=3, lora=3, batch_size=8, ema_decay=0.5)  # three rows do not divide evenly
    alone = train(tuned, tokens, tmp_path / "alone", init=init)
    shared = replace(tuned, training=replace(tuned.training, fsdp_size=fsdp_size))
    run = tmp_path / "shared"
    halfway = replace(shared, training=replace(shared.training, steps=2))
    assert together(size, lambda _: train(halfway, tokens, run, init=init) and None) == [None] * size
    assert together(size, lambda _: train(shared, tokens, run, init=init) and None) == [None] * size
    for name in (WEIGHTS, LORA):
        one, other = load_file(alone / "ema" / name), load_file(newest_checkpoint(run) / "ema" / name)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, atol=1e-5, rtol=1e-4)


def test_the_file_of_a_lora_makes_the_model_of_its_run(tokens, tmp_path):
    """By diffusers' own loading; and with it off, the model is the one before."""
    train(settings(steps=1), tokens, tmp_path / "first")
    model, card = load_model(tmp_path / "first")
    save_model(randomized(model), card, tmp_path / "random")  # a fresh one's last layer is zero
    init = str(tmp_path / "random")
    tuned = settings(steps=12, lora=4, learning_rate=1e-2, ema_decay=0.5, warmup_steps=0, save_every=4)
    train(tuned, tokens, tmp_path / "tuned", init=init)
    channels = load_model(init)[0].token_channels
    x_TC = torch.randn(13, channels, generator=generator(0))

    def output_of(pipe):
        layout, shown = Layout.of([(2, 2), (3, 3)]), Condition.of(label=torch.tensor([0, 1]))
        with torch.no_grad():
            return pipe.transformer(x_TC, layout, torch.tensor([0.2, 0.7]), shown)

    before, whole = (output_of(FiTPipeline.from_pretrained(name)) for name in (init, tmp_path / "tuned"))
    assert (whole - before).abs().max() > 1e-3
    pipe = FiTPipeline.from_pretrained(init)
    pipe.load_lora_weights(tmp_path / "tuned")
    torch.testing.assert_close(output_of(pipe), whole, atol=1e-5, rtol=1e-5)
    pipe.transformer.disable_lora()
    torch.testing.assert_close(output_of(pipe), before, atol=1e-6, rtol=1e-6)
    kept = [*(tmp_path / "tuned" / "checkpoints").iterdir()]
    assert len(kept) < 3  # the others are removed, file by file
    with pytest.raises(UserError, match="has no LoRA: "):
        FiTPipeline.from_pretrained(init).load_lora_weights(tmp_path / "first")
