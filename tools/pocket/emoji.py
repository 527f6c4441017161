"""Sixty everyday objects as small colour images, drawn from the font Noto Color Emoji (SIL OFL 1.1): the recipe, not the images."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

FONT = pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_FONT_SIZE = 109  # the only size of the font's bitmaps
OBJECTS: dict[str, str] = {
    "cat": "\U0001f431", "dog": "\U0001f436", "mouse": "\U0001f42d", "rabbit": "\U0001f430", "fox": "\U0001f98a",
    "bear": "\U0001f43b", "panda": "\U0001f43c", "tiger": "\U0001f42f", "lion": "\U0001f981", "cow": "\U0001f42e",
    "pig": "\U0001f437", "frog": "\U0001f438", "monkey": "\U0001f435", "chicken": "\U0001f414", "penguin": "\U0001f427",
    "owl": "\U0001f989", "horse": "\U0001f434", "bee": "\U0001f41d", "butterfly": "\U0001f98b", "snail": "\U0001f40c",
    "fish": "\U0001f420", "whale": "\U0001f433", "octopus": "\U0001f419", "turtle": "\U0001f422", "apple": "\U0001f34e",
    "banana": "\U0001f34c", "grapes": "\U0001f347", "watermelon": "\U0001f349", "strawberry": "\U0001f353", "cherry": "\U0001f352",
    "pineapple": "\U0001f34d", "lemon": "\U0001f34b", "pear": "\U0001f350", "peach": "\U0001f351", "carrot": "\U0001f955",
    "tomato": "\U0001f345", "mushroom": "\U0001f344", "pizza": "\U0001f355", "burger": "\U0001f354", "cake": "\U0001f370",
    "car": "\U0001f697", "bus": "\U0001f68c", "truck": "\U0001f69a", "tractor": "\U0001f69c", "bicycle": "\U0001f6b2",
    "boat": "\u26f5", "rocket": "\U0001f680", "hammer": "\U0001f528", "scissors": "\u2702\ufe0f", "key": "\U0001f511",
    "umbrella": "\u2614", "guitar": "\U0001f3b8", "house": "\U0001f3e0", "tree": "\U0001f333", "cactus": "\U0001f335",
    "sunflower": "\U0001f33b", "clock": "\u23f0", "sun": "\U0001f31e", "cloud": "\u2601\ufe0f", "snowman": "\u26c4",
}  # fmt: skip


def draw_object(name: str, font: pathlib.Path = FONT) -> Image:
    """One object as a square RGBA image, cropped to what it covers."""
    from PIL import Image, ImageDraw, ImageFont

    if not font.is_file():
        raise FileNotFoundError(
            f"Expected the font Noto Color Emoji at {font}, but it is not there. Install fonts-noto-color-emoji (Debian, Ubuntu)."
        )
    canvas = Image.new("RGBA", (2 * _FONT_SIZE, 2 * _FONT_SIZE))
    letter = ImageFont.truetype(str(font), _FONT_SIZE)
    ImageDraw.Draw(canvas).text((20, 20), OBJECTS[name], font=letter, embedded_color=True)
    drawn = canvas.crop(canvas.getbbox())
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square


def object_tiles(side: int, font: pathlib.Path = FONT) -> Tensor:
    """All objects at `side` pixels: colour times alpha, and alpha, (N, 4, side, side) in [0, 1]."""
    from PIL import Image

    images = [
        draw_object(name, font).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS) for name in OBJECTS
    ]
    pixels = np.stack([np.asarray(image) for image in images])
    tiles = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    tiles[:, :3] = tiles[:, :3].minimum(tiles[:, 3:])  # resampling overshoots
    return tiles
