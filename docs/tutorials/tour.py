# %% [markdown]
# # A tour of FiTv2
# Pictures of any shape from the shipped model, several in one call. It runs on a CPU in about a minute.
#
# Install the package (`pip install '.[text]' jupyterlab` in a clone), and start this with `jupyter lab`.

# %%
from PIL import Image, ImageDraw

import fitv2
from fitv2.figures import contact_sheet
from fitv2.runtime.rng import generator

pipe = fitv2.FiTPipeline.from_pretrained("emoji")
pipe.set_progress_bar_config(disable=True)

# %% [markdown]
# ## Prompts and shapes
# Lists of prompts, heights and widths go together. All pictures are computed as one sequence of tokens,
# without padding.

# %%
prompts = ["fox", "red apple", "two owls side by side", "three roses in a row"]
heights, widths = [128, 96, 96, 64], [128, 96, 192, 208]
seeds = [generator(seed) for seed in range(4)]
images = pipe(prompt=prompts, height=heights, width=widths, generator=seeds).images
contact_sheet([list(zip(prompts, images, strict=True))])

# %% [markdown]
# ## One seed, several sizes
# A seed is a picture's own: it stays the same, but for rounding, whatever is made beside it.

# %%
sizes = [(64, 64), (96, 96), (128, 128), (80, 160)]
rows, columns = zip(*sizes, strict=True)
owls = pipe(prompt=["owl"] * 4, height=rows, width=columns, generator=[generator(5)] * 4).images
contact_sheet([[(f"{height}x{width}", owl) for (height, width), owl in zip(sizes, owls, strict=True)]])

# %% [markdown]
# ## Guidance
# Guidance pulls pictures towards their prompt; 1 is none.

# %%
scales = [1.0, 2.0, 3.0, 5.0]
foxes = [
    pipe(prompt="fox", height=96, width=96, guidance_scale=scale, generator=[generator(1)]).images[0]
    for scale in scales
]
contact_sheet([[(f"guidance {scale:g}", fox) for scale, fox in zip(scales, foxes, strict=True)]])

# %% [markdown]
# ## A part made anew
# White in the mask is made anew. The rest stays as it is, to the last bit.

# %%
(cat,) = pipe(prompt="cat face", height=128, width=128, generator=[generator(0)]).images
mask = Image.new("L", cat.size)
ImageDraw.Draw(mask).rectangle((0, 0, cat.width, 56), fill="white")
hats = ["crown", "top hat", "panda"]
made = pipe(prompt=hats, image=[cat] * 3, mask_image=[mask] * 3, generator=generator(0)).images
contact_sheet([[("a picture", cat), ("a mask", mask), *zip(hats, made, strict=True)]])

# %% [markdown]
# ## Next
# - [Train on your own images](train-on-your-images.md), or [fine-tune the shipped model](fine-tune.md).
# - [Sampling](../guides/sampling.md) and [editing](../guides/editing.md) in full.
# - `fitv2 app emoji` is a page in the browser that does all of this.
