"""The image size that a model was made for, and a warning where an image or an empty latent has quite another one."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .warnings import owned, warn

WRAPPER_KEY = "slipstream_native_size"
# Below this side a photo has too few latent cells to edit an object in.
LEAST_FOR_PHOTOS = 256
LEAST_FRAME = 16
REMEDY = "Set it to {}, or use Empty Latent for Model."
OTHERS = 1024
# Sides of the host's families by the names of their classes; v-prediction SD2 was made for 768.
SIDES = {
    "SD15": 512,
    "SD20": 512,
    "SD21UnclipL": 768,
    "SD21UnclipH": 768,
    "SDXL": 1024,
    "SDXLRefiner": 1024,
    "SSD1B": 1024,
}
# Shares of the native area between which a model composes as it was trained to; an image that is repainted may be larger.
LEAST, MOST, MOST_OF_IMAGE = 0.4, 2.5, 8.0
CELL = 8  # pixels across a latent cell, of the formats that do not say


def folder_side(path: pathlib.Path, network: str) -> int:
    """Return the native side in pixels that a diffusers folder states (`sample_size` in latent cells), else that of most models."""
    try:
        cells = json.loads((path / network / "config.json").read_text()).get("sample_size")
        channels = json.loads((path / "vae" / "config.json").read_text()).get("block_out_channels", [0] * 4)
    except (OSError, ValueError):
        return OTHERS
    return int(cells) * 2 ** (len(channels) - 1) if isinstance(cells, int) else OTHERS


def checkpoint_side(model: Any) -> int:
    """Return the native side in pixels of a MODEL of one of the host's families."""
    name = type(model.model.model_config).__name__
    return 768 if name == "SD20" and model.model.model_type.name == "V_PREDICTION" else SIDES.get(name, OTHERS)


def side_of(model: Any) -> int | None:
    """Return the native side in pixels of a MODEL, None where it is not known."""
    hints = model.get_wrappers("outer_sample", WRAPPER_KEY)
    if hints:
        return int(hints[0].side)
    return checkpoint_side(model) if type(model.model.model_config).__name__ in SIDES else None


def photo_pixels(model: Any, megapixels: float) -> int:
    """Return how many pixels of a photo are worked on: `megapixels`, or for 0 as many as the model was made for."""
    if megapixels > 0:
        return round(megapixels * 1e6)
    return max(side_of(model) or OTHERS, LEAST_FOR_PHOTOS) ** 2


def frame_side(model: Any, name: str, pixels: int) -> int:
    """Return one side of a frame: `pixels`, or for 0 that of the images that the model was made for."""
    if pixels == 0:
        return side_of(model) or OTHERS
    if pixels < LEAST_FRAME:
        raise ValueError(
            f"Expected `{name}` of 0 or at least {LEAST_FRAME}, but got {pixels}. 0 takes the model's own size."
        )
    return pixels


def cell_of(model: Any) -> int:
    """Return how many pixels a latent cell of a MODEL is across; the oldest hosts know only the usual one."""
    return int(getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", CELL))


def size_warning(side: int, what: str, width: int, height: int, remedy: str, most: float = MOST) -> str | None:
    """Return a sentence about `what` ("the frames are") of quite another size than `side` squared pixels, None where it fits.

    A "{}" in `remedy` becomes the size of these proportions that fits.
    """
    if LEAST <= width * height / side**2 <= most:
        return None
    scale = side / math.sqrt(width * height)
    fitting = " x ".join(str(max(64, 64 * round(given * scale / 64))) for given in (width, height))
    return f"This model was made for images of {side} x {side}, but {what} {width} x {height}. {remedy.format(fitting)}"


def warn_of_size(node: str, model: Any, what: str, width: int, height: int, remedy: str, most: float = MOST) -> None:
    """Warn as `node` where `what` has quite another size than the images that a MODEL is known to be made for."""
    side = side_of(model)
    text = None if side is None else size_warning(side, what, width, height, remedy, most)
    if text is not None:
        warn(node, text)


def warn_of_latents(node: str, model: Any, samples: Tensor, sampled_from: bool = True) -> None:
    """Warn as `node` where LATENT samples (..., H, W) have quite another size than those of a MODEL's images.

    `sampled_from` tells that a sampling of the host starts from them: a `SizeHint` on the MODEL warns of empty ones then.
    """
    cell, empty = cell_of(model), not samples.any()
    if empty and sampled_from and model.get_wrappers("outer_sample", WRAPPER_KEY):
        return
    what, remedy = ("the empty latent is", "Set it to {}.") if empty else ("the latent is of", "Scale the image to {}.")
    height, width = (cell * cells for cells in samples.shape[-2:])
    warn_of_size(node, model, what, width, height, remedy, MOST if empty else MOST_OF_IMAGE)


def hinted(model: Any, side: int) -> Any:
    """Return a MODEL that warns, on the node that runs now, of an empty latent of quite another size than `side` squared pixels."""
    clone = model.clone()
    clone.add_wrapper_with_key("outer_sample", WRAPPER_KEY, SizeHint(side, owned(warn)))
    return clone


@dataclass
class SizeHint:
    """Wrapper around a sampling: warns where it starts from an empty latent of a size that the model was not made for."""

    side: int
    warn: Callable[[str, str], None]
    identity: ClassVar[str] = ""  # a result does not depend on it

    def __call__(self, execute: Any, noise: Tensor, latent: Tensor, sampler: Any, *args: Any, **kwargs: Any) -> Tensor:
        if latent.ndim == 4 and not latent.any() and not getattr(sampler, "runs_ours", False):
            text = size_warning(
                self.side, "the empty latent is", CELL * latent.shape[-1], CELL * latent.shape[-2], REMEDY
            )
            if text is not None:
                self.warn("Load Model", text)
        return execute(noise, latent, sampler, *args, **kwargs)
