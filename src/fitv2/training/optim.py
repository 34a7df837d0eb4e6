"""What changes the weights: which are trained, by which optimizer, at which learning rate."""

import torch

from fitv2.config import Training
from fitv2.model import FiT
from fitv2.training.muon import Muon


def freeze(model: FiT, trainable: str) -> None:
    """Leave the gradients that are wanted.

    The paper's high-resolution post-training trains what the released code names x_embedder, bias, LN or
    final_layer; LN is in the name of every adaLN modulation too. 14.15 % of FiTv2-XL.
    """
    for name, parameter in model.named_parameters():
        chosen = name.startswith(("patch_embed.", "head.")) or name.endswith(".bias") or "modulation." in name
        parameter.requires_grad_(trainable == "all" or chosen)


# Matrices that hold several in their rows: q, k and v; gate and up; shifts, scales and gates.
PIECES = {"qkv.weight": 3, "gate_up.weight": 2, "modulation.weight": 6, "modulation.up.weight": 6}


def optimizers(model: FiT, config: Training) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    Muon's steps are as large as AdamW's, so that one learning rate fits both.
    """
    groups = []
    chosen: set[int] = set()
    if config.optimizer == "muon":
        for name, matrix in model.blocks.named_parameters():
            if matrix.requires_grad and matrix.ndim == 2:
                pieces = next((n for end, n in PIECES.items() if name.endswith(end)), 1)
                groups.append({"params": [matrix], "pieces": pieces})
                chosen.add(id(matrix))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    decay = config.weight_decay
    adamw = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, config.beta2), weight_decay=decay, fused=True)
    return [Muon(groups, weight_decay=decay), adamw] if groups else [adamw]


def learning_rate(config: Training, step: int) -> float:
    """Linear warm-up, constant, linear decay over the last steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = min(1.0, (config.steps - step) / max(1, config.decay_steps))
    return config.learning_rate * warm * left
