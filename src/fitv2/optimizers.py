"""What changes the weights: which are trained, by which optimizer, at which learning rate."""

import torch

from fitv2.model import FiT
from fitv2.settings import Training


def freeze(model: FiT, trainable: str) -> None:
    """Leave the gradients that are wanted.

    The paper's high-resolution post-training trains what the released code names x_embedder, bias, LN or
    final_layer; LN is in the name of every adaLN modulation too. 14.15 % of FiTv2-XL.
    """
    for name, parameter in model.named_parameters():
        chosen = name.startswith(("patch_embed.", "head.")) or name.endswith(".bias") or "modulation." in name
        parameter.requires_grad_(trainable == "all" or chosen)


def optimizers(model: FiT, config: Training) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    Muon: Jordan et al. 2024; scaled to AdamW's step size (arXiv 2502.16982), so that one learning
    rate fits both.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = {id(p) for p in model.blocks.parameters() if p.ndim == 2 and config.optimizer == "muon"}
    matrices = [p for p in trained if id(p) in blocks]
    rest = [p for p in trained if id(p) not in blocks]
    decay = config.weight_decay
    adamw = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, config.beta2), weight_decay=decay, fused=True)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def learning_rate(config: Training, step: int) -> float:
    """Linear warm-up, constant, linear decay over the last steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = min(1.0, (config.steps - step) / max(1, config.decay_steps))
    return config.learning_rate * warm * left
