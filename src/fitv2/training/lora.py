"""LoRA (Hu et al., arXiv 2106.09685), by PEFT: low-rank changes of matrices, trained in their place."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.distributed import gather, local

ADAPTER = "lora"
TARGETS = r"blocks\.\d+\.(attention\.(qkv|out)|mlp\.(gate_up|down))"


def add_lora(model: FiT, rank: int) -> None:
    """Put B·A of a rank beside every matrix of attention and SwiGLU, B zero at first; it alone is trained.

    Raises UserError without PEFT.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise UserError("`lora` needs PEFT: pip install 'fitv2[lora]'") from error
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    inject_adapter_in_model(config, model, ADAPTER)
    for parameter in trained:
        parameter.requires_grad_(True)  # PEFT froze all that is not its own


def adapted(model: FiT) -> Iterator[tuple[str, Any]]:
    """The layers that have a LoRA, by their names."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def merged(layer: Any, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
    """The matrix of a layer with its change, W + α/r·B·A of rank r; here α = r.

    `up` is B and `down` A [default: the layer's own]. Of a matrix that processes share, the rows that this
    one holds: all have to ask.
    """
    up = layer.lora_B[ADAPTER].weight if up is None else up
    down = layer.lora_A[ADAPTER].weight if down is None else down
    return torch.addmm(local(layer.base_layer.weight), local(up), gather(down), alpha=layer.scaling[ADAPTER])


def factors(model: FiT) -> dict[str, Tensor]:
    """B and A of every layer, by the names that diffusers gives them in a file."""
    return {
        name.replace(f".{ADAPTER}.", "."): tensor
        for name, tensor in model.named_parameters() if ".lora_" in name
    }  # fmt: skip


@torch.no_grad()
def without_lora(model: FiT) -> FiT:
    """A copy of a model with its changes in the matrices themselves."""
    weights = {
        name.replace(".base_layer.", "."): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    weights |= {f"{name}.weight": merged(layer) for name, layer in adapted(model)}
    with torch.device("meta"):
        plain = FiT(**asdict(model.architecture))
    plain.load_state_dict(weights, assign=True)
    return plain
