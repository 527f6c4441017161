"""Images side by side with a caption in each: before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .tensors import numpy_to_image

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

GAP = 6
LEAST_HEIGHT = 256  # below it a caption cannot be read
# Where Pillow's own has not all letters, looked for by name in the system's folders: Linux, Windows, macOS, then Chinese and Japanese.
FONTS = (
    "DejaVuSans.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial.ttf", "segoeui.ttf", "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc", "msyh.ttc", "YuGothM.ttc",
)  # fmt: skip
LEAST_SIZE = 11  # of the letters, in pixels
SHARE = 0.06  # height of the letters, of the image or of half of what is seen at once


def font(size: int, text: str = "") -> ImageFont | FreeTypeFont:
    """Return Pillow's own font, which has plain Latin letters only, or the one of the system's that draws most of `text`."""
    from PIL import ImageFont

    try:
        own = ImageFont.load_default(size)
    except TypeError:  # Pillow below 10.1 has one size
        return ImageFont.load_default()
    found = [own]
    for name in FONTS if undrawn(own, text) else ():
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return min(found, key=lambda letters: len(undrawn(letters, text)))


def undrawn(letters: ImageFont | FreeTypeFont, text: str) -> str:
    """Return the letters of a text that a font shows as boxes."""
    if not hasattr(letters, "getname"):  # the one of Pillow below 10.1
        return "".join(dict.fromkeys(letter for letter in text if ord(letter) > 255))
    box = bytes(letters.getmask("\uffff"))
    return "".join(c for c in dict.fromkeys(text) if not c.isspace() and bytes(letters.getmask(c)) == box)


def captioned(images: Tensor, caption: str, across: int = 0) -> Tensor:
    """Return IMAGE (B, H, W, 3) with a caption in its upper left corner, white on a dark plate; an empty one leaves it as it is.

    `across` is the width in pixels of the row that the image is shown in. Letters shrink until a caption fits its image.
    """
    if not caption.strip():
        return images
    import numpy as np
    from PIL import Image, ImageDraw

    # Of a panorama twice its height counts: its letters would cover it.
    size = max(LEAST_SIZE, round(SHARE * min(max(images.shape[1], across / 2), 2 * images.shape[1])))
    while True:
        letters = font(size, caption)
        left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), caption, letters)
        pad = round(0.4 * (bottom - top)) + 2
        if right - left + 2 * pad <= images.shape[2] or size <= LEAST_SIZE:
            break
        size = max(LEAST_SIZE, min(size - 1, int(size * images.shape[2] / (right - left + 2 * pad))))
    plate = Image.new(
        "RGB", (min(int(right - left) + 2 * pad, images.shape[2]), int(bottom - top) + 2 * pad), (24, 24, 24)
    )
    ImageDraw.Draw(plate).text((pad - left, pad - top), caption, (255, 255, 255), letters)
    drawn = numpy_to_image(np.array(plate)[: images.shape[1]])
    result = images.clone()
    result[:, : drawn.shape[1], : drawn.shape[2]] = drawn.to(images)
    return result


def to_height(images: Tensor, height: int) -> Tensor:
    """Return IMAGE (B, H, W, 3) at a height, its proportions kept."""
    if images.shape[1] == height:
        return images
    width = max(1, round(images.shape[2] * height / images.shape[1]))
    scaled = F.interpolate(rearrange(images, "b h w c -> b c h w"), (height, width), mode="bicubic", antialias=True)
    return rearrange(scaled.clamp(0, 1), "b c h w -> b h w c")


def sheet(images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
    """Return IMAGE (B, H, W, 3) of two or three images in a row, or four in two rows, each with its caption.

    Images (B, H, W, C) take the height of the highest; a batch that is shorter repeats its last image.
    """
    height, count = max(LEAST_HEIGHT, *(image.shape[1] for image in images)), max(len(image) for image in images)
    scaled = []
    for image in images:
        whole = torch.cat([image, image[-1:].expand(count - len(image), -1, -1, -1)])[..., :3].cpu().float()
        scaled.append(to_height(whole, height))
    across = sum(image.shape[2] for image in (scaled[:2] if len(scaled) == 4 else scaled))
    shown = [captioned(image, caption, across) for image, caption in zip(scaled, [*captions, *[""] * len(images)])]
    rows = [_joined(shown[:2], 2), _joined(shown[2:], 2)] if len(shown) == 4 else [_joined(shown, 2)]
    width = max(row.shape[2] for row in rows)
    return _joined([F.pad(row, (0, 0, 0, width - row.shape[2]), value=1.0) for row in rows], 1)


def _joined(images: Sequence[Tensor], axis: int) -> Tensor:
    """Images along an axis, with a white gap between them."""
    shape = list(images[0].shape)
    shape[axis] = GAP
    gap = torch.ones(shape)
    return torch.cat([part for image in images for part in (gap, image)][1:], axis)
