"""Harmonise: an image composed by hand is made one image, by the draft mode with the composition itself as the draft."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.checks import check_integer
from ..core.denoiser import Cond, Denoiser
from ..core.masks import feather, grow, touched
from ..core.noise import NoiseSource
from ..core.progress import Callback
from .config import EditConfig
from .drafted import DraftedEdit, sample_draft
from .geometry import Canvas
from .pixels import EditResult, Encode
from .placing import check_size
from .tasks import check_mask

# The objects follow the composition for most of the steps, their seams for fewer.
HARMONISE = EditConfig.fast(mode="draft", anchor_object=(0.0, 0.7), anchor_fill=(0.0, 0.4))


def prepare_harmony(
    image: Tensor, mask: Tensor, canvas: Canvas, encode: Encode, config: EditConfig = HARMONISE, seam: int = 8
) -> DraftedEdit:
    """Return a composed IMAGE (1, H, W, 3), ready for `sample_draft`; `mask` (H, W) is 1 on what was pasted.

    What was pasted follows the composition in `config.anchor_object` of the steps, and what lies within `seam` pixels of its edge,
    on both sides, in `config.anchor_fill`. Everything else stays the image's.

    Raises ValueError for an empty mask or one of another size.
    """
    mask = check_mask("mask", mask)
    check_size("mask", mask, canvas.size)
    check_integer("seam", seam, 0, min(canvas.size))
    inside = (mask > 0.5).float()[None]
    changed = grow(touched(mask).float()[None], seam)
    ring = changed - (grow(inside, -seam) if seam else inside)
    hold = torch.ones(1, 1, *canvas.grid)
    for region, span in ((inside, config.anchor_object), (ring, config.anchor_fill)):
        hold = torch.where(touched(canvas.to_grid(region[0])), span[1], hold)
    latents = encode(image).detach().to("cpu", torch.float32, copy=True)
    # What the VAE loses of an object is put back as far as the object stays; the old seam is not.
    restore = (1 - ring).clamp(min=0) * config.anchor_object[1]
    soft = feather(changed, min(seam, config.feather))
    return DraftedEdit(config, latents, latents, hold, soft, restore, image)


def harmonise(
    model: Denoiser[Cond],
    image: Tensor,
    mask: Tensor,
    cond: Cond,
    uncond: Cond | None,
    canvas: Canvas,
    encode: Encode,
    config: EditConfig = HARMONISE,
    seam: int = 8,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> EditResult:
    """Make a composed image one image: `prepare_harmony`, then `sample_draft`. `finish` gives the IMAGE.

    Args:
        image: the composition (1, H, W, 3). mask: (H, W), 1 on what was pasted.
        canvas: how pixels lie on the latents (`fit` returns it).
        encode: the VAE's encoder, IMAGE at the photo's size -> latents in the model's space.
    """
    return sample_draft(
        model, prepare_harmony(image, mask, canvas, encode, config, seam), cond, uncond, noise, callback
    )
