"""2-D rotary positions: half of each head's numbers turn with the row, half with the column.

RoPE: Su et al., arXiv 2104.09864; its 2-D form as in FiT (arXiv 2402.12376). Angles are computed
in float32 from integer positions at every forward pass: they are never a buffer that a cast to
bfloat16 could round.

On a grid with more rows or columns than were trained on, angles are scaled (FiTv2, section 3.4).
Every method is a function from the stretch of each image to its frequencies. Shape suffixes: F
frequencies of one axis, half of its numbers.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fitv2.config import Rope
from fitv2.errors import nearest
from fitv2.tokens import Layout

Method = Callable[[Tensor, int, float, int], Tensor]  # (stretch_B, dims, base, train side) → (B, F)


def frequencies(dims: int, base: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """Angles per position of one axis, (F,) radians: base^(−2i/dims)."""
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    return 1.0 / base**exponents


def position_interpolation(stretch_B: Tensor, dims: int, base: float, train_side: int = 0) -> Tensor:
    """PI: positions are squeezed into the trained range (Chen et al., arXiv 2306.15595)."""
    return frequencies(dims, base, stretch_B.device) / stretch_B[:, None]


def ntk(stretch_B: Tensor, dims: int, base: float, train_side: int = 0) -> Tensor:
    """NTK-aware: the base grows to base·s^(D/(D−2)), so slow frequencies stretch and fast ones stay."""
    bases_B = base * stretch_B ** (dims / (dims - 2))
    exponents_F = torch.arange(0, dims, 2, dtype=torch.float32, device=stretch_B.device) / dims
    return 1.0 / bases_B[:, None] ** exponents_F


def yarn(stretch_B: Tensor, dims: int, base: float, train_side: int) -> Tensor:
    """YaRN: frequencies with many turns within the trained side stay, those with few follow PI.

    Peng et al., arXiv 2309.00071, section 3.2. Its scaling of the angles' length is in `mscale`.
    """
    kept_F = _ramp(32, 1, dims, base, train_side).to(stretch_B.device)
    interpolated = position_interpolation(stretch_B, dims, base)
    return torch.lerp(interpolated, frequencies(dims, base, stretch_B.device), kept_F)


def ntk_by_parts(stretch_B: Tensor, dims: int, base: float, train_side: int) -> Tensor:
    """NTK-by-parts (arXiv 2309.00071, section 3.1), as the released code has it: PI, NTK, unscaled."""
    to_ntk_F = _ramp(1.25, 0.75, dims, base, train_side).to(stretch_B.device)
    kept_F = _ramp(16, 2, dims, base, train_side).to(stretch_B.device)
    interpolated = position_interpolation(stretch_B, dims, base)
    scaled = torch.lerp(interpolated, ntk(stretch_B, dims, base), to_ntk_F)
    return torch.lerp(scaled, frequencies(dims, base, stretch_B.device), kept_F)


def _ramp(most_turns: float, fewest_turns: float, dims: int, base: float, train_side: int) -> Tensor:
    """1 for frequencies that turn often within the trained side, 0 for the slow ones, (F,).

    Linear in between, over the index i of a frequency. It turns r times at i = D·ln(L/2πr) / 2·ln base;
    the released code clamps that to D−1, although i ends at D/2−1.
    """

    def index(turns: float) -> float:
        return dims * math.log(train_side / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(index(most_turns)), 0), min(math.ceil(index(fewest_turns)), dims - 1)
    width = high - low if high != low else 0.001
    return 1 - ((torch.arange(dims // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


METHODS: dict[str, Method] = {
    "pi": position_interpolation,
    "ntk": ntk,
    "ntk-by-parts": ntk_by_parts,
    "yarn": yarn,
}


Scale = Callable[[Tensor, Rope], Tensor]  # (rows and columns (B, 2), rope) → factor on the logits (B,)


def scale_by_pixels(size_B2: Tensor, rope: Rope) -> Tensor:
    """FiTv2, Eq. 15: the log of the pixels to the base of the trained pixels, at least 1."""
    side, unit = float(rope.train_side or 1), float(rope.pixels_per_token)
    return ((size_B2.prod(1) * unit**2).log() / math.log(side**2 * unit**2)).clamp_min(1)


def scale_by_side(size_B2: Tensor, rope: Rope) -> Tensor:
    """The released code's `ntk-aware-pro1`: ln 2n / ln m where 2n > m, n the longer side, m the trained one.

    The 2 is its quirk: it acts at the trained size too.
    """
    return _released_scale(size_B2.amax(1), float(rope.train_side or 1))


def scale_by_area(size_B2: Tensor, rope: Rope) -> Tensor:
    """The released code's `ntk-aware-pro2`: the same with the tokens, and the trained ones."""
    return _released_scale(size_B2.prod(1), float(rope.train_side or 1) ** 2)


def _released_scale(count_B: Tensor, trained: float) -> Tensor:
    doubled = 2 * count_B
    return torch.where(doubled > trained, doubled.log() / math.log(trained), torch.ones_like(count_B))


def scale_by_tokens(size_B2: Tensor, rope: Rope) -> Tensor:
    """The log of the tokens to the base of the trained tokens, at least 1: the softmax stays as sharp."""
    return (size_B2.prod(1).log() / (2 * math.log(float(rope.train_side or 1)))).clamp_min(1)


SCALES: dict[str, Scale] = {
    "paper": scale_by_pixels,
    "pro1": scale_by_side,
    "pro2": scale_by_area,
    "tokens": scale_by_tokens,
}


def mscale(rope: Rope, size_B2: Tensor) -> Tensor:
    """What cos and sin of each image are multiplied by, (B,): its square scales the attention logits.

    That of the attention scale, and with YaRN 0.1·ln s + 1.
    """
    size = size_B2.float()
    factor = torch.ones_like(size[:, 0])
    if rope.extrapolation == "yarn":
        stretch = (size.amax(1) / float(rope.train_side or 1)).clamp_min(1)
        factor = torch.where(stretch > 1, 0.1 * stretch.log() + 1, factor)
    if rope.attention_scale == "none":
        return factor
    if rope.attention_scale not in SCALES:
        raise nearest("attention_scale", rope.attention_scale, ["none", *SCALES])
    return factor * SCALES[rope.attention_scale](size, rope).sqrt()


def scaled_frequencies(rope: Rope, size_B2: Tensor, dims: int) -> Tensor:
    """Angles per row and per column of each image, (B, 2, F) radians; `dims` numbers turn an axis."""
    if rope.extrapolation == "none":
        return frequencies(dims, rope.base, size_B2.device).expand(size_B2.shape[0], 2, -1)
    if rope.extrapolation not in METHODS:
        raise nearest("extrapolation", rope.extrapolation, ["none", *METHODS])
    assert rope.train_side is not None  # Rope sees to that
    method = METHODS[rope.extrapolation]
    length_B2 = size_B2 if rope.per_axis else size_B2.amax(1, keepdim=True).expand(-1, 2)
    stretch_B2 = (length_B2.float() / rope.train_side).clamp_min(1.0)
    return method(stretch_B2.flatten(), dims, rope.base, rope.train_side).unflatten(0, (-1, 2))


def rotation(layout: Layout, head_dim: int, rope: Rope) -> Tensor:
    """The complex numbers (T, 1, head_dim/2) that turn each pair of a head, rows first."""
    if rope.kind == "absolute":
        return torch.ones(1, 1, head_dim // 2, dtype=torch.complex64, device=layout.pos_T2.device)
    size_B2 = layout.size_B2
    if rope.grid is not None:
        size_B2 = torch.tensor([rope.grid], device=size_B2.device).expand_as(size_B2)
    per_image = scaled_frequencies(rope, size_B2, head_dim // 2)
    alike = rope.extrapolation == "none"
    per_position = per_image[:1] if alike else layout.spread(per_image)  # (T or 1, 2, F)
    angles = (layout.pos_T2[:, :, None].float() * per_position).flatten(1)
    length = torch.ones_like(angles)
    if (rope.extrapolation, rope.attention_scale) != ("none", "none"):
        length = length * layout.spread(mscale(rope, size_B2))[:, None]
    return torch.polar(length, angles)[:, None]


def absolute(layout: Layout, width: int, rope: Rope) -> Tensor:
    """What DiT and SiT add to their tokens (T, width): sines and cosines of the row, then of the column."""
    angles = layout.pos_T2[:, :, None].float() * frequencies(width // 2, rope.base, layout.pos_T2.device)
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
