"""LoRA on a pipeline, by diffusers' own methods and file format; needs PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fitv2.checkpoint import LORA, find_model
from fitv2.errors import UserError, in_one_line, nearest
from fitv2.model import FiT


class LoRALoading:
    """What a pipeline with a `transformer` does with adapters, under the names that diffusers' have."""

    transformer: Any

    def load_lora_weights(
        self, source: str | Path | dict[str, Tensor], adapter_name: str = "default", **options: Any
    ) -> None:
        """Add a LoRA that `save_lora_adapter` or `fitv2 train --lora` saved; needs PEFT.

        `source` is a folder, a run, or its tensors; a hub name is fetched. `transformer` then has diffusers'
        methods for adapters: `set_adapters`, `disable_lora`, `delete_adapters` and the others (`adaptable`).
        Raises UserError for a run or a model without a LoRA.
        """
        if not isinstance(source, dict):
            options = {"weight_name": LORA} | options
            if not (is_hub_name(source) or "subfolder" in options):
                source = folder_with_lora(source, options["weight_name"])
            source = str(source)
        adaptable(self.transformer)
        if adapter_name in self.get_list_adapters():
            raise UserError(f"there is an adapter {adapter_name} already: give another `adapter_name`")
        with reading_hub(source):
            self.transformer.load_lora_adapter(source, prefix=None, adapter_name=adapter_name, **options)

    def save_lora_weights(self, save_directory: str | Path, adapter_name: str = "default") -> None:
        """Write an adapter as diffusers does, pytorch_lora_weights.safetensors."""
        adaptable(self.transformer).save_lora_adapter(str(save_directory), adapter_name=adapter_name)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Use these adapters, each with a weight [default: 1]."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        known = self.get_list_adapters()
        for name in names:
            if name not in known:
                raise nearest("adapter", name, known)
        adaptable(self.transformer).set_adapters(names, adapter_weights)

    def get_list_adapters(self) -> list[str]:
        """The names of all adapters."""
        return list(getattr(self.transformer, "peft_config", {}))

    def get_active_adapters(self) -> list[str]:
        """Those in use."""
        return list(adaptable(self.transformer).active_adapters()) if self.get_list_adapters() else []

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove some."""
        adaptable(self.transformer).delete_adapters(adapter_names)

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Add adapters to the weights that they change, which is as fast as none."""
        adaptable(self.transformer).fuse_lora(lora_scale=lora_scale, adapter_names=adapter_names)

    def unfuse_lora(self) -> None:
        """Take them out of the weights again."""
        adaptable(self.transformer).unfuse_lora()

    def disable_lora(self) -> None:
        """Leave all adapters aside."""
        adaptable(self.transformer).disable_lora()

    def enable_lora(self) -> None:
        """Use them again."""
        adaptable(self.transformer).enable_lora()

    def unload_lora_weights(self) -> None:
        """Remove all adapters."""
        adaptable(self.transformer).unload_lora()


def adaptable(model: FiT) -> Any:
    """The same model, with diffusers' methods for adapters; needs PEFT.

    They come only now: what diffusers has them in imports transformers, which takes seconds.
    """
    from diffusers.loaders.peft import PeftAdapterMixin

    if not isinstance(model, PeftAdapterMixin):
        kind = type(FiT.__name__, (type(model), PeftAdapterMixin), {"__module__": FiT.__module__})
        model.__class__ = kind
    return model


def folder_with_lora(source: str | Path, name: str) -> Path:
    """The folder that holds the LoRA of a run, a model or a folder. Raises UserError when there is none."""
    folder = Path(source) if (Path(source) / name).exists() else find_model(source)
    if not (folder / name).exists():
        raise UserError(f"{source} has no LoRA: {folder / name} is missing")
    return folder


@contextmanager
def reading_hub(name: Any) -> Iterator[None]:
    """Turn what the hub's library says, if `name` is one of the hub, into a UserError of one line."""
    try:
        yield
    except OSError as error:
        if not is_hub_name(name):
            raise
        raise UserError(
            f"there is no folder {name} here, and the hub does not give it: {in_one_line(error, 100)}"
        ) from error


def is_hub_name(name: Any) -> bool:
    """Whether `name` can only be one of the hub: ORGANIZATION/NAME, and no such folder is here."""
    return isinstance(name, str) and name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()
