"""The one way to make images: from labels, sizes and seeds, as a diffusers pipeline.

The command line, previews of a training, the demo and the tools call it.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from huggingface_hub import create_repo, upload_folder
from PIL import Image
from torch import Generator, Tensor

from fitv2.adapters import LoRALoading, is_hub_name, reading_hub
from fitv2.autoencoder import (
    Autoencoder,
    DiffusersAutoencoder,
    Pixels,
    load_autoencoder,
    offline,
)
from fitv2.checkpoint import Card, find_model, load_model
from fitv2.conditioning import Condition, Text
from fitv2.config import Guidance, Positions, Sampling
from fitv2.diffusion.flow import Flow
from fitv2.diffusion.objective import objective_of
from fitv2.errors import UserError, nearest
from fitv2.hub import INDEX, check_index, write_papers
from fitv2.model import FiT
from fitv2.sampling.generate import generate
from fitv2.sampling.generate import invert as invert_requests
from fitv2.sampling.growth import Growth
from fitv2.sampling.outputs import OUTPUT_TYPES, convert, to_image
from fitv2.sampling.reporting import Reporting
from fitv2.sampling.requests import Request, Wanted
from fitv2.text_encoder import TextEncoder, caption_of, load_text_encoder

LOGGER = logging.getLogger("fitv2")


class FiTPipeline(LoRALoading, DiffusionPipeline):
    """Images of any labels and sizes, all in one packed batch.

    Components: `transformer`, a `FiT`; `vae`, a diffusers `AutoencoderKL`, or None for a model on pixels; and
    `scheduler`, one of diffusers' for flows, or None for the solvers of `Sampling`. `labels` names the
    classes, `max_tokens` is the longest image it was trained on, and `guidance_scale` the strength that looks
    best.
    """

    _optional_components: ClassVar[list[str]] = ["vae", "scheduler"]
    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: FiT,
        vae: AutoencoderKL | None = None,
        labels: Sequence[str] = (),
        max_tokens: int = 256,
        guidance_scale: float = 1.5,
        text_encoder_name: str = "",
        scheduler: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(
            labels=list(labels), max_tokens=max_tokens, guidance_scale=guidance_scale,
            text_encoder_name=text_encoder_name,
        )  # fmt: skip
        codec = "pixels" if vae is None else "vae"
        self.card = Card(tuple(labels), codec, max_tokens, guidance_scale, text_encoder_name)
        self.allow_download = False  # of a text encoder that is not on this machine
        self._encoder: TextEncoder | None = None

    @classmethod
    def of(
        cls, model: FiT, card: Card, autoencoder: Autoencoder | None = None, *, allow_download: bool = False
    ) -> FiTPipeline:
        """The pipeline of a model and its card; the autoencoder is loaded by the card's name.

        `allow_download` lets it come from the hub.
        """
        if autoencoder is None:
            autoencoder = load_autoencoder(card.autoencoder, model.device, allow_download=allow_download)
        vae = autoencoder.model if isinstance(autoencoder, DiffusersAutoencoder) else None
        made = cls(model, vae, card.labels, card.max_tokens, card.guidance, card.text_encoder)
        made.allow_download = allow_download
        return made

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, allow_download: bool = False, **options: Any
    ) -> FiTPipeline:
        """A pipeline by the names the command line takes, or as diffusers saves it.

        `name` is a shipped model (`clipart`), a run folder, a model folder, or a folder or hub name
        with a `model_index.json`. The network is used for a hub name alone; with `allow_download` also for
        an autoencoder or a text encoder of the hub that a model names. Raises UserError for a name that is
        nothing of these.
        """
        if is_hub_name(name) or (Path(name) / INDEX).exists():
            made = cls._from_diffusers(str(name), allow_download, options)
            made.allow_download = allow_download
            return made
        dtype = options.pop("torch_dtype", None) or options.pop("dtype", None)
        given = {name: options.pop(name) for name in ("vae", "scheduler") if name in options}
        if options:
            raise UserError(f"{name} is opened without {', '.join(options)}")
        model, card = load_model(find_model(name))
        made = cls.of(model, card, allow_download=allow_download)
        made.register_modules(**given)
        if dtype is not None:
            model.cast(dtype)
            if made.vae is not None:
                made.vae.to(dtype)
        return made

    @classmethod
    def _from_diffusers(cls, name: str, allow_download: bool, options: dict[str, Any]) -> FiTPipeline:
        """What diffusers saved, in a folder or on the hub."""
        of_hub = is_hub_name(name)
        if not of_hub:
            check_index(Path(name), FiTPipeline.__name__)
        with reading_hub(name), offline(not (of_hub or allow_download)):
            return super().from_pretrained(name, **options)

    @property
    def autoencoder(self) -> Autoencoder:
        """What decodes."""
        return Pixels() if self.vae is None else DiffusersAutoencoder(self.vae, "vae")

    def encode_texts(self, texts: Sequence[str]) -> Text:
        """Texts as the model's encoder gives them, which is loaded at the first.

        Raises UserError for a model without texts, and when the encoder is not there.
        """
        if "text" not in self.transformer.architecture.conditions:
            raise UserError("this model takes class labels, not `prompt`")
        if self._encoder is None:
            name = self.card.text_encoder
            self._encoder = load_text_encoder(name, allow_download=self.allow_download)
        return self._encoder.encode([caption_of(text) for text in texts])

    @property
    def unit(self) -> int:
        """Side of a token in pixels."""
        return self.autoencoder.downsample * self.transformer.architecture.patch_size

    @property
    def is_flow(self) -> bool:
        """Whether the model has a flow from noise to data: it is no DDPM."""
        return isinstance(objective_of(self.transformer.architecture), Flow)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tokens that cover an image of (height, width) pixels."""
        height, width = size
        return -(-height // self.unit), -(-width // self.unit)

    def is_beyond(self, size: tuple[int, int]) -> bool:
        """Whether an image of (height, width) pixels has more tokens than those trained on."""
        return math.prod(self.grid(size)) > self.card.max_tokens

    def said_beyond(self, sizes: Sequence[tuple[int, int]], positions: Positions, grows: bool = True) -> str:
        """How images of sizes (height, width) beyond those trained on are made, in a sentence."""
        own, trained = self.transformer.architecture.rope, self.card.max_tokens
        rope = positions.apply(own, self.card.square[0], self.unit)
        how = {"none": "left as they are"}.get(rope.extrapolation, f"scaled by {rope.extrapolation}")
        scale = "" if rope.attention_scale == "none" else f", attention by {rope.attention_scale}"
        restart = positions.restart_time(self.is_flow) if grows else 0.0
        grown = f"; grown from {trained} at time {restart:g}" if restart else ""
        named = [f"{height}x{width}" for height, width in dict.fromkeys(sizes)]
        which = ", ".join(named[:3]) + ("…" if len(named) > 3 else "")
        return f"{which}: more than the {trained} tokens trained on; positions are {how}{scale}{grown}"

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The indices of labels given by their names. Raises UserError naming the nearest."""
        names = [label] if isinstance(label, str) else label
        return [self.card.label_index(name) for name in names]

    def __call__(
        self,
        class_labels: str | int | Sequence[str | int | None] | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        extrapolation: str | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make images, one for each label and size; single values serve all.

        Args:
            class_labels: names or numbers of labels; None for an image of nothing in particular.
            height, width: in pixels, exactly [default: the largest square trained on].
            prompt: for a model of texts; what each image is to show.
            negative_prompt: what guidance leads away from [default: nothing in particular]. Without guidance
                it has no effect, and a warning says so.
            guidance_scale: of classifier-free guidance; 1 is none [default: the model's own].
            guidance_interval: guide only between these times, 0 noise to 1 data.
            num_inference_steps: steps of the solver [default: 25; 4 of any-step models]; an image of more
                tokens than trained on is made twice, at the trained size too: see `Positions`.
            extrapolation: how positions of such an image are scaled, by a name of `Positions` [default: it
                grows from the trained size, and a warning says so].
            generator: one for each image, or one from which a seed for each is drawn.
            output_type: "pil", "np" (N, H, W, 3 in [0, 1]) or "pt" (N, 3, H, W): a list where sizes differ.
            return_dict: else a tuple.
            options: as of `stream`: pictures to edit, positions, and more.

        Raises UserError for labels, sizes, a solver or settings that do not exist or do not fit.
        """
        if output_type not in OUTPUT_TYPES:
            raise nearest("output_type", output_type, OUTPUT_TYPES)
        sampling = replace(options.pop("sampling", Sampling()))
        if num_inference_steps is not None:
            if not isinstance(num_inference_steps, int):
                raise UserError(
                    f"`num_inference_steps` is {num_inference_steps!r}; it must be a whole number"
                )
            sampling = replace(sampling, steps=num_inference_steps)
        guidance = options.pop("guidance", Guidance(self.config.guidance_scale))
        if guidance_scale is not None:
            guidance = replace(guidance, guidance_scale=guidance_scale)
        if guidance_interval is not None:
            guidance = replace(guidance, guidance_interval=guidance_interval)
        if extrapolation is not None:
            options["positions"] = replace(options.get("positions", Positions()), extrapolation=extrapolation)
        made = list(
            self.stream(
                class_labels,
                height,
                width,
                generator,
                prompt=prompt,
                negative_prompt=negative_prompt,
                guidance=guidance,
                sampling=sampling,
                **options,
            )
        )
        self.maybe_free_model_hooks()  # after `enable_model_cpu_offload`
        images = convert(made, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def stream(
        self,
        class_labels: str | int | Sequence[str | int | None] | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask_image: Image.Image | Sequence[Image.Image | None] | None = None,
        strength: float | Sequence[float] | None = None,
        latents: Sequence[Tensor] | None = None,
        guidance: Guidance = Guidance(),  # noqa: B008  frozen
        sampling: Sampling = Sampling(),  # noqa: B008
        positions: Positions = Positions(),  # noqa: B008
        tokens_per_pack: int | None = None,
        progress: Callable[[float], None] | None = None,
        callback_on_step_end: Callable[[FiTPipeline, int, float, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        watch: Callable[[int, Callable[[], list[Image.Image]]], None] | None = None,
    ) -> Iterator[Image.Image]:
        """Make images as `__call__` does, and give them one after another, as soon as each pack is done.

        Args:
            class_labels, height, width, generator, prompt, negative_prompt: as of `__call__`.
            image: pictures to start from; the size is theirs, or they are brought to that which is given.
            mask_image: white where a picture is made anew; the rest stays as it is [default: all of it].
            strength: how much of the way from noise is gone again, above 0 to 1 [default: 0.6; 1 with a
                mask].
            latents: noise to start from, (rows, columns, channels per token) each: see
                `fitv2.sampling.editing`, and `invert`.
            guidance, sampling: as of `fitv2 sample`.
            positions: how positions are scaled, and how images beyond the trained size are made.
            tokens_per_pack: how many tokens are computed together.
            progress: called with the share done [default: a bar].
            callback_on_step_end: called as diffusers does, with the pipeline, the number of the step, the
                share done, and {"latents": tokens (rows, columns, channels per token) of each image that is
                being made}. They may be changed, or others be given in such a dictionary; what it raises ends
                the making. An image that grows is first made at a smaller size.
            callback_on_step_end_tensor_inputs: "latents", all that there is.
            watch: called at every evaluation with the number of the first image of those that are being made,
                and a function that gives what they look like so far. What it raises ends the making.
        """
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise nearest("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        wanted = Wanted(
            class_labels=class_labels, height=height, width=width, prompt=prompt,
            negative_prompt=negative_prompt, image=image, mask_image=mask_image, strength=strength,
            latents=latents,
        )  # fmt: skip
        requests = self._requests(wanted, generator)
        growth = Growth(self.card.max_tokens, positions.restart_time(self.is_flow))
        if positions.restart and any(request.noise is not None for request in requests):
            raise UserError(
                "`restart` is for images that grow; those from noise of one's own are made at once"
            )
        beyond = [request for request in requests if self.is_beyond(request.pixels)]
        if beyond:
            grows = any(request.way(growth, self.unit)[0] for request in beyond)
            LOGGER.warning("%s", self.said_beyond([one.pixels for one in beyond], positions, grows))
        if guidance.guidance_scale is None:
            guidance = replace(guidance, guidance_scale=self.card.guidance)
        if guidance.guidance_scale == 0:  # as diffusers' users say that they want none
            guidance = replace(guidance, guidance_scale=1.0)
        if negative_prompt is not None and guidance.guidance_scale == 1:
            LOGGER.warning("`negative_prompt` has no effect without guidance: give `guidance_scale` above 1")
        if sampling.solver is None and self.scheduler is not None:
            sampling = replace(sampling, solver=self.scheduler)

        def see(first: int, show: Callable[[], list[Tensor]]) -> None:
            if watch:
                watch(first, lambda: [to_image(made) for made in show()])

        with Reporting(self, progress, callback_on_step_end) as report:
            pixels = generate(
                self._scaled(positions), self.autoencoder, requests, guidance, sampling,
                tokens_per_pack=tokens_per_pack,
                growth=growth,
                progress=report.move,
                watch=watch and see,
                change=report.end_step if callback_on_step_end else None,
            )  # fmt: skip
            for made in pixels:
                yield to_image(made)

    def invert(
        self,
        image: Image.Image | Sequence[Image.Image],
        class_labels: str | int | Sequence[str | int | None] | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        positions: Positions = Positions(),  # noqa: B008
    ) -> list[Tensor]:
        """The noise of pictures, (rows, columns, channels per token) each: `latents` that give them again.

        Along the flow from data to noise, without guidance: with `guidance_scale` 1 and small steps they
        come back as they were. Raises UserError for a model without a flow.
        """
        wanted = Wanted(class_labels=class_labels, height=height, width=width, prompt=prompt, image=image)
        requests = self._requests(wanted, generator)
        return invert_requests(self._scaled(positions), self.autoencoder, requests, sampling)

    def _scaled(self, positions: Positions) -> FiT:
        """The model with positions scaled so; it shares its weights."""
        own = self.transformer.architecture.rope
        rope = positions.apply(own, self.card.square[0], self.unit)
        return self.transformer if rope == own else self.transformer.with_rope(rope)

    def _requests(self, wanted: Wanted, generator: Generator | Sequence[Generator] | None) -> list[Request]:
        return wanted.requests(generator, self._conditions, self.card.square[0] * self.unit, self.unit)

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """Save all parts as diffusers does, with a README and the line by which diffusers itself opens it."""
        if options.pop("push_to_hub", False):
            raise UserError("to put it on the hub, call push_to_hub")
        if getattr(self.transformer, "peft_config", None):
            raise UserError(
                "adapters are loaded: save_lora_weights saves one; call unload_lora_weights for the rest"
            )
        self.register_modules(scheduler=self.scheduler)  # diffusers overlooks one that was None before
        super().save_pretrained(save_directory, *arguments, **options)
        write_papers(Path(save_directory), self.transformer, self.card, self.unit)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "A FiTv2 model",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Upload what `save_pretrained` saves, to a repository that is made if there is none; its address."""
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            return str(upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, token=token,
                create_pr=create_pr,
            ))  # fmt: skip

    def _conditions(
        self, labels: Sequence[str | int | None], prompts: Sequence[str | None]
    ) -> list[Condition]:
        """What each image is to show; a single label serves all prompts."""
        labels = [*labels] * (len(prompts) if len(labels) == 1 else 1)
        numbers = [-1 if label is None else self._label_index(label) for label in labels]
        values: dict[str, Tensor | Text] = {"label": torch.tensor(numbers)}
        given = any(prompt is not None for prompt in prompts)
        if given or "text" in self.transformer.architecture.conditions:
            values["text"] = self.encode_texts([prompt or "" for prompt in prompts])
        every = Condition.of(**values)
        said = zip(numbers, prompts, strict=True)
        every = every.drop(torch.tensor([number < 0 and not prompt for number, prompt in said]))
        return [every.select([i]) for i in range(len(numbers))]

    def _label_index(self, label: str | int) -> int:
        if "label" not in self.transformer.architecture.conditions:
            raise UserError("this model takes `prompt`, not class labels")
        # A number is an index, also where labels are named by numbers.
        index = self.card.label_index(label) if isinstance(label, str) else int(label)
        count = self.transformer.architecture.num_classes
        if not 0 <= index < count:
            raise UserError(f"unknown label {index}: numbers go from 0 to {count - 1}")
        return index
