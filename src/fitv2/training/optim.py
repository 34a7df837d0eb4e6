"""What changes the weights: which are trained, by which optimizer, at which learning rate."""

from collections.abc import Callable

import torch
from torch import Tensor

from fitv2.config import Training
from fitv2.errors import nearest
from fitv2.model import FiT
from fitv2.training.muon import Muon


def freeze(model: FiT, trainable: str) -> None:
    """Leave the gradients that are wanted.

    The paper's high-resolution post-training trains what the released code names x_embedder, bias, LN or
    final_layer; LN is in the name of every adaLN modulation too. 14.15 % of FiTv2-XL.
    """
    for name, parameter in model.named_parameters():
        whole = name.startswith(("patch_embed.", "head.", "early."))
        post = whole or name.endswith(".bias") or "modulation." in name
        early = name.startswith("early.")
        chosen = {"all": True, "post-training": post, "early-head": early}[trainable]
        parameter.requires_grad_(chosen)


# Matrices that hold several in their rows: q, k and v; gate and up; shifts, scales and gates.
PIECES = {"qkv.weight": 3, "gate_up.weight": 2, "modulation.weight": 6, "modulation.up.weight": 6}


def build_optimizers(model: FiT, config: Training) -> list[torch.optim.Optimizer]:
    """The optimizers of a model's trained parameters. Raises UserError for an unknown name."""
    if config.optimizer not in OPTIMIZERS:
        raise nearest("optimizer", config.optimizer, OPTIMIZERS)
    return OPTIMIZERS[config.optimizer](model, config)


def adamw(model: FiT, config: Training) -> list[torch.optim.Optimizer]:
    """AdamW for everything."""
    return [_adamw([p for p in model.parameters() if p.requires_grad], config)]


def muon(model: FiT, config: Training) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and of texts, AdamW for the rest: one learning rate fits both."""
    groups = []
    chosen: set[int] = set()
    for name, matrix in model.named_parameters():
        low_rank = ".lora_" in name  # neither factor is a matrix whose directions mean something alone
        of_muon = name.startswith(("blocks.", "text_embed.")) and not low_rank
        if matrix.requires_grad and matrix.ndim == 2 and of_muon:
            pieces = next((n for end, n in PIECES.items() if name.endswith(end)), 1)
            groups.append({"params": [matrix], "pieces": pieces})
            chosen.add(id(matrix))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    chosen_of = {"iterations": config.muon_iterations, "every": config.muon_every}
    with_muon = [Muon(groups, weight_decay=config.weight_decay, **chosen_of)] if groups else []
    return [*with_muon, _adamw(rest, config)]


def _adamw(parameters: list[Tensor], config: Training) -> torch.optim.Optimizer:
    betas = 0.9, config.beta2
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=config.weight_decay, fused=True)


OPTIMIZERS: dict[str, Callable[[FiT, Training], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "muon": muon,
}


def learning_rate(config: Training, step: int) -> float:
    """Linear warm-up, constant, linear decay over the last steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = min(1.0, (config.steps - step) / max(1, config.decay_steps))
    return config.learning_rate * warm * left
