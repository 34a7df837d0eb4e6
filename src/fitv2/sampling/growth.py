"""Images of more tokens than were trained on: made at the trained size, enlarged, and made on from there.

Noise is put on the enlarged image as the path has it at some time, and the flow followed from there (SDEdit:
Meng et al., arXiv 2108.01073). What is large stays as the model knows it; what the noise hides is drawn anew,
at the new size.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import interpolate

from fitv2.tokens import Layout, Size


@dataclass(frozen=True)
class Growth:
    """Which images are grown, and from when on they are made at their own size."""

    max_tokens: int  # trained on; images of more are grown
    time: float  # 0 is noise: all of the way; 1 is data: none of it

    def applies(self, grid: Size) -> bool:
        """Whether an image of so many (rows, columns) is grown."""
        return self.time > 0 and grid[0] * grid[1] > self.max_tokens

    def small(self, layout: Layout) -> Layout:
        """The layout of the images as they are made first."""
        return Layout.of([within(grid, self.max_tokens) for grid in layout.sizes]).to(layout.image_T.device)


def within(grid: Size, max_tokens: int) -> Size:
    """A grid of at most `max_tokens` tokens, as large as can be and of nearly the proportions of `grid`."""
    rows, columns = grid
    found, best = (1, 1), 0.0
    for few in range(1, min(rows, max_tokens) + 1):
        wide = max(1, min(round(few * columns / rows), max_tokens // few))
        stretch = wide * rows / (few * columns)
        score = few * wide * min(stretch, 1 / stretch) ** 2  # a tenth off costs as much as a fifth fewer
        if score > best:
            found, best = (few, wide), score
    return found


def enlarge(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (3, h, w) at a larger size, bicubic.

    In pixels: latents that are enlarged themselves decode to ghosts along edges.
    """
    return interpolate(image[None], size, mode="bicubic", align_corners=False)[0].clamp(-1, 1)
