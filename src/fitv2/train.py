"""The training loop. A run is a folder; the same command run again carries on from its checkpoint."""

import json
import math
import pickle
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from fitv2.autoencoder import load_autoencoder
from fitv2.checkpoint import Card, checkpoints, load_model, newest_checkpoint, save_model
from fitv2.corruption import corrupted, held_out, objective_of
from fitv2.data import Batch, Steps, TokenDataset, batches, require_whole
from fitv2.errors import UserError
from fitv2.figures import contact_sheet, loss_curve
from fitv2.files import whole_file, whole_folder
from fitv2.flow import PathSample
from fitv2.model import FiT
from fitv2.optimizers import freeze, learning_rate, optimizers
from fitv2.packing import FixedCount, Sampler, TokenBudget
from fitv2.presets import Preset
from fitv2.runs import cut_log, read_log, settle
from fitv2.runtime import World, default_device, derive_seed, joined, multiplies_bfloat16, ranks
from fitv2.sample import Request, generate
from fitv2.settings import Architecture, Rope, Sampling

# First numbers of the keys that randomness is derived from: (seed, purpose, …).
WEIGHTS, ORDER, CORRUPTION = range(3)
# What libraries raise on a file that is not whole.
DAMAGE = (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, UserError)


@dataclass(frozen=True)
class Progress:
    """What the loop reports after every step."""

    step: int
    loss: float
    images_per_second: float


def train(
    preset: Preset,
    data: Path | str,
    run: Path,
    *,
    init: str | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    check: Callable[[Iterable[Any], int], Iterable[Any]] = lambda names, _: names,
) -> Path:
    """Train `preset` on the token dataset `data` in the folder `run`, or carry on there.

    Under torchrun all processes share each step; with any number of them the training is the same.
    `init` starts from another model's weights. Ctrl-C and SIGTERM save and leave. Returns the
    newest checkpoint. Raises UserError for input that does not fit or is damaged, and
    FloatingPointError when the loss is not finite; the last checkpoint stays. `check` may show how
    far the dataset is compared with its SHA-256.
    """
    dataset = TokenDataset(data)
    minutes = preset.training.minutes
    deadline = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
    if preset.training.check_data and dataset.store.is_local:
        require_whole(dataset.store, dataset.card, check, *ranks())
    with joined() as world:
        trainer = Trainer(preset, dataset, data, run, init, world)
        with interrupted() as stop:
            while trainer.step < preset.training.steps:
                if world.any(stop() or time.monotonic() >= deadline):
                    break
                trainer.advance(report)
        trainer.save()
        if world.first:
            loss_curve(read_log(run / "log.jsonl"), run / "loss.png", f"Loss of {run.name}")
        world.wait()
    newest = newest_checkpoint(run)
    if newest is None:
        raise UserError(f"no checkpoint is in {run}: all processes need the same folder")
    return newest


class Trainer:
    """The state of a run, and what a step does to it."""

    def __init__(
        self,
        preset: Preset,
        dataset: TokenDataset,
        data: Path | str,
        run: Path,
        init: str | None,
        world: World | None = None,
    ) -> None:
        self.config, self.dataset, self.run = preset.training, dataset, run
        self.world = world = world or World()
        self.device = default_device()
        about = dataset.card.about
        self.card = Card(about.labels, about.autoencoder, about.max_tokens)
        architecture = fitted(preset.model, dataset)
        if self.config.trainable != "all" and not init:
            raise UserError(
                f"--trainable {self.config.trainable} trains a part of a trained model: give --init"
            )
        start = starting_model(init, architecture, self.card.labels) if init else None
        architecture = start.architecture if start else architecture
        torch.manual_seed(derive_seed(self.config.seed, WEIGHTS))
        # float32: what the optimizer changes
        self.master = (start or FiT(**asdict(architecture))).to(self.device).train()
        freeze(self.master, self.config.trainable)
        self.objective = objective_of(architecture, self.config)
        if world.first:  # which alone validates and draws
            self.codec = load_autoencoder(self.card.autoencoder, self.device)
            self.validation = list(held_out(data, self.config.batch_size, self.objective))
        seed, budget = derive_seed(self.config.seed, ORDER), self.config.tokens_a_step
        images = dataset.images(self.config.crop_probability)
        sampler: Sampler = FixedCount(images, self.config.batch_size, seed)
        if budget is not None:
            sampler = TokenBudget(images, budget, seed)
        # Last of what can fail on wrong input: a run folder is only made for a run that can start.
        if world.first:
            settle(run, Preset(preset.about, architecture, preset.training), dataset.card, init)
        world.wait()
        self.ema = deepcopy(self.master).eval().requires_grad_(False)
        self.model = self.master
        fast = self.config.precision == "auto" and multiplies_bfloat16(self.device)
        if fast or self.config.precision == "bfloat16":
            # Not FiT.to: diffusers' warns of modules that there are none of.
            self.model = torch.nn.Module.to(deepcopy(self.master), torch.bfloat16)
        # Each parameter that is trained: what the optimizer changes, its average, and what computes.
        every = zip(self.master.parameters(), self.ema.parameters(), self.model.parameters(), strict=True)
        self.trained = [weights for weights in every if weights[0].requires_grad]
        self.optimizers = optimizers(self.master, self.config)
        self.step = 0
        self.resume()
        world.wait()  # none may write a checkpoint that another has not looked for yet
        if world.first:
            cut_log(run / "log.jsonl", self.step)
            for partial in run.glob("checkpoints/.step-*"):  # of a process that was killed
                shutil.rmtree(partial)
        self.steps = Steps(dataset, sampler, world.rank, world.size)
        self.batches = batches(self.steps, self.step, self.config.workers)

    def advance(self, report: Callable[[Progress], None]) -> None:
        """One step, and what is due after it."""
        config, started = self.config, time.monotonic()
        batch = next(self.batches)
        value = self.gradients(batch)
        norm = self.clipped_norm()
        if not math.isfinite(value + norm):
            some = ", ".join(self.dataset.sources(batch.rows[:5]))
            raise FloatingPointError(
                f"loss {value} and gradient norm {norm} at step {self.step + 1}, of {batch.images} images"
                f" such as {some}; the last checkpoint is kept"
            )
        self.update()
        self.step += 1
        if not self.world.first:
            return
        rate = batch.images / (time.monotonic() - started)
        report(Progress(self.step, value, rate))
        if self.step % config.log_every == 0:
            line = {"loss": value, "gradient_norm": norm, "images_per_second": round(rate, 1)}
            self.log(line | {"learning_rate": learning_rate(config, self.step - 1)})
        if self.step % config.validate_every == 0 and self.validation:
            self.log({"validation": self.validate()})
        if self.step % config.save_every == 0:
            self.save()
        if self.step % config.sample_every == 0:
            self.draw()

    def gradients(self, batch: Batch) -> float:
        """The gradients of a step's mean loss over its images, in float32, and that loss.

        A sum over images divided by the count of all: so parts of a step, and processes, with
        other numbers of images and tokens add up to the same.
        """
        total = torch.zeros((), device=self.device)
        for part in batch.parts(self.config.micro_batches):
            sample, labels = self.corrupted(part)
            output = self.model(sample.noisy, sample.t_B, labels)
            loss = self.objective.loss(output, sample).sum() / batch.images
            loss.backward()
            total += loss.detach()
            self.take_gradients()
        self.world.add_up([total, *(weight.grad for weight, *_ in self.trained if weight.grad is not None)])
        return total.item()

    def take_gradients(self) -> None:
        """Add the gradients of the model that computes to those of the float32 weights."""
        if self.model is self.master:
            return
        for weight, _, computed in self.trained:
            assert computed.grad is not None
            gradient, computed.grad = computed.grad.float(), None
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    def corrupted(self, batch: Batch) -> tuple[PathSample, Tensor]:
        """The pictures of a step, corrupted, and their labels, some of them dropped."""
        keys = [(self.config.seed, CORRUPTION, int(key)) for key in batch.keys]
        sample, dropped = corrupted(batch.packed, keys, self.objective, self.config.label_dropout)
        labels = torch.where(dropped, self.master.null_label, batch.labels)
        return sample.to(self.device), labels.to(self.device)

    def clipped_norm(self) -> float:
        """Clip the gradients; their norm before."""
        weights = [weight for weight, *_ in self.trained]
        return float(torch.nn.utils.clip_grad_norm_(weights, self.config.clip))

    def update(self) -> None:
        """Step, average, and hand the new weights to the model that computes."""
        weights, averages, computing = map(list, zip(*self.trained, strict=True))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.step)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            # An average over at most a tenth of the steps so far: early weights do not linger.
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(averages, weights, 1 - decay)
            if self.model is not self.master:
                torch._foreach_copy_(computing, weights)

    @torch.inference_mode()
    def validate(self) -> float:
        """The averaged model's loss on held-out pictures, with fixed noise and evenly spread times."""
        losses = []
        for held, labels in self.validation:
            sample = held.to(self.device)
            output = self.ema(sample.noisy, sample.t_B, labels.to(self.device))
            losses.append(self.objective.loss(output, sample))
        return float(torch.cat(losses).mean())

    def draw(self) -> None:
        """A sheet of samples at several sizes from fixed seeds."""
        side = max(2, math.isqrt(self.card.max_tokens))
        sizes = [
            (side, side),
            (max(1, side * 5 // 8), side * 5 // 4),
            (max(1, side // 2), side * 3 // 2),
        ]
        labels = np.linspace(0, len(self.card.labels) - 1, min(8, len(self.card.labels))).astype(int)
        requests = [Request(int(label), size, 0) for size in sizes for label in labels]
        made = [
            (self.card.labels[request.label], image)
            for request, image in generate(self.ema, self.codec, requests, sampling=Sampling(steps=20))
        ]
        rows = [made[i : i + len(labels)] for i in range(0, len(made), len(labels))]
        with whole_file(self.run / "samples" / f"step-{self.step:07d}.png") as partial:
            contact_sheet(rows, f"step {self.step}").save(partial)

    def log(self, values: dict[str, Any]) -> None:
        """Append a line to log.jsonl."""
        with (self.run / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step} | values) + "\n")

    def save(self) -> None:
        """Write a checkpoint, whole or not at all, then remove the oldest ones."""
        folder = self.run / "checkpoints" / f"step-{self.step:07d}"
        if folder.exists() or not self.world.first:
            return
        state = {
            "step": self.step,
            "weights": self.master.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        try:
            with whole_folder(folder) as partial:
                save_model(self.ema, self.card, partial / "ema")
                torch.save(state, partial / "training.pt")
        except (RuntimeError, SafetensorError) as error:  # a quota or a limit on the size of files
            raise UserError(f"checkpoint {folder} cannot be written: {error}") from error
        for old in checkpoints(self.run)[: -self.config.keep]:
            shutil.rmtree(old)

    def resume(self) -> None:
        """Carry on from the newest checkpoint that can be read; damaged ones before it get another name.

        Raises UserError when there are checkpoints, but none of them can be read, and when the
        processes find different ones.
        """
        wrong: dict[Path, str] = {}
        loaded = False
        for checkpoint in reversed(checkpoints(self.run)):
            try:
                self._load(checkpoint)
            except torch.OutOfMemoryError:
                raise  # no fault of the checkpoint
            except DAMAGE as error:
                wrong[checkpoint] = f"{checkpoint} is damaged ({' '.join(str(error).split())[:200]})"
            else:
                loaded = True
                break
        if wrong and not loaded:
            raise UserError(f"{'; '.join(wrong.values())}: move it away to begin anew")
        steps = torch.zeros(self.world.size, device=self.device)
        steps[self.world.rank] = self.step
        self.world.add_up([steps])
        if len(steps.unique()) > 1:
            raise UserError(
                f"the processes find different checkpoints in {self.run}: all need the same folder"
            )
        if wrong and self.world.first:
            said = f"{'; '.join(wrong.values())}; carrying on from step {self.step}"
            warnings.warn(f"{said}, damaged ones are now called damaged-…", stacklevel=2)
            for damaged in wrong:  # else it would stand in the way of its successor
                damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))

    def _load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
        averages = load_model(checkpoint / "ema")[0].state_dict()
        self.master.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.load_state_dict(averages)
        if self.model is not self.master:
            self.model.load_state_dict(self.master.state_dict())
        self.step = state["step"]


def starting_model(name: str, architecture: Architecture, labels: tuple[str, ...]) -> FiT:
    """The model `name`, with the positions of `architecture` if it scales any: they hold no weights.

    Raises UserError when it has another architecture else, or other labels.
    """
    model, card = load_model(name)
    if architecture.rope == Rope():
        architecture = replace(architecture, rope=model.architecture.rope)
    model = model.with_rope(architecture.rope)
    theirs = asdict(model.architecture)
    differing = [key for key, value in asdict(architecture).items() if theirs[key] != value]
    if card.labels != labels:
        differing.append("labels")
    if differing:
        raise UserError(f"{name} cannot start this run: it has another {', '.join(differing)}")
    return model


def fitted(architecture: Architecture, dataset: TokenDataset) -> Architecture:
    """`architecture` with the token layout and labels of the dataset."""
    about = dataset.card.about
    return replace(
        architecture,
        patch_size=about.patch_size,
        in_channels=about.in_channels,
        num_classes=len(about.labels),
    )


@contextmanager
def interrupted() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came since; a second one acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
