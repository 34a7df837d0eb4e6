"""2-D rotary positions: half of each head's numbers turn with the row, half with the column.

RoPE: Su et al., arXiv 2104.09864; its 2-D form as in FiT (arXiv 2402.12376). Angles are computed
in float32 from integer positions at every forward pass: they are never a buffer that a cast to
bfloat16 could round.
"""

import torch
from torch import Tensor


def frequencies(dims: int, base: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """Angles per position of one axis, (dims/2,) radians: base^(−2i/dims)."""
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    return 1.0 / base**exponents


def rotation(pos_T2: Tensor, head_dim: int) -> Tensor:
    """The unit complex numbers (T, 1, head_dim/2) that turn each pair of a head, rows first."""
    per_axis = frequencies(head_dim // 2, device=pos_T2.device)
    angles = (pos_T2[:, :, None].float() * per_axis).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x_THK: Tensor, rotation_T1P: Tensor) -> Tensor:
    """Turn interleaved pairs (2i, 2i+1) of every head, in float32; returns the dtype of `x_THK`."""
    pairs = torch.view_as_complex(x_THK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation_T1P).flatten(-2).to(x_THK.dtype)
