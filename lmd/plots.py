"""Charts and heat maps as IMAGE, drawn with Pillow alone: the host does not have matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.pictures import font
from ..core.tensors import numpy_to_image

BACKGROUND, INK, GRID = (255, 255, 255), (40, 44, 52), (225, 228, 232)
COLOURS = ((31, 119, 180), (214, 96, 20), (44, 140, 80), (180, 50, 60), (120, 90, 170), (110, 110, 110))
# Dark blue over green to yellow, evenly rising in lightness; and blue - white - red for signed values.
RISING = ((48, 18, 92), (49, 84, 140), (33, 145, 140), (94, 201, 98), (253, 231, 37))
SIGNED = ((33, 84, 160), (146, 184, 222), (247, 247, 247), (240, 160, 130), (170, 30, 45))


@dataclass(frozen=True)
class Line:
    """One curve: `x` and `y` of equal length; values that are not finite leave gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`."""
    raw = max(high - low, 1e-12) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _span(values: Sequence[float], zero: bool) -> tuple[float, float]:
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    low = min(low, 0.0) if zero else low
    return (low, high) if high - low > 1e-12 else (low, low + 1.0)


def line_chart(
    lines: Sequence[Line], title: str, x_label: str, y_label: str, size: tuple[int, int] = (640, 400),
    marks: Sequence[tuple[float, str]] = (),
) -> Any:  # fmt: skip
    """Return a Pillow image (width, height = `size`) of curves over a grid, y from 0; `marks` are labelled vertical lines."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(image)
    small = font(12)
    left, top, right, bottom = 64, 54, size[0] - 20, size[1] - 52
    (x0, x1), (y0, y1) = _span([v for c in lines for v in c.x], False), _span([v for c in lines for v in c.y], True)
    # The legend goes to the side where the curves are lower; where both are high it gets room above them.
    sides = (
        [y for c in lines for x, y in zip(c.x, c.y) if math.isfinite(y) and (x > (x0 + x1) / 2) == late]
        for late in (0, 1)
    )
    early, late = (max(values, default=y0) for values in sides)
    crowded = len(lines) > 1 and min(early, late) > y0 + 0.6 * (y1 - y0)
    y1 += (0.5 if crowded else 0.05) * (y1 - y0)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for tick in ticks(x0, x1):
        x, _ = at(tick, y0)
        draw.line([(x, top), (x, bottom)], GRID)
        draw.text((x, bottom + 5), f"{tick:g}", INK, small, anchor="ma")
    for tick in ticks(y0, y1):
        _, y = at(x0, tick)
        draw.line([(left, y), (right, y)], GRID)
        draw.text((left - 6, y), f"{tick:g}", INK, small, anchor="rm")
    draw.rectangle([left, top, right, bottom], outline=INK)
    draw.text((size[0] / 2, 10), title, INK, font(15), anchor="ma")
    draw.text(((left + right) / 2, size[1] - 24), x_label, INK, small, anchor="ma")
    draw.text((8, top - 6), y_label, INK, small, anchor="lb")
    for place, text in marks:
        if math.isfinite(place) and x0 <= place <= x1:
            x, _ = at(place, y0)
            _dashed(draw, x, top, bottom)
            draw.text((x + 4, top + 4), text, INK, small)
    for colour, line in zip(_cycle(len(lines)), lines):
        _curve(
            draw, [at(x, y) if math.isfinite(x) and math.isfinite(y) else None for x, y in zip(line.x, line.y)], colour
        )
    _legend(draw, lines, small, (left + 8, right - 8), top + (26 if marks else 8), late > early)
    return image


def _cycle(count: int) -> list[tuple[int, int, int]]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _dashed(draw: Any, x: float, top: float, bottom: float) -> None:
    for y in range(int(top), int(bottom), 8):
        draw.line([(x, y), (x, min(y + 4, bottom))], INK)


def _curve(draw: Any, points: Sequence[tuple[float, float] | None], colour: tuple[int, int, int]) -> None:
    for a, b in zip(points[:-1], points[1:]):
        if a is not None and b is not None:
            draw.line([a, b], colour, 2)
    if len(points) <= 40:
        for point in points:
            if point is not None:
                draw.ellipse([point[0] - 3, point[1] - 3, point[0] + 3, point[1] + 3], colour)


def _legend(
    draw: Any, lines: Sequence[Line], small: Any, sides: tuple[float, float], top: float, on_left: bool
) -> None:
    if len(lines) < 2:
        return
    width = max(draw.textlength(line.label, small) for line in lines) + 34
    left = sides[0] if on_left else sides[1] - width
    draw.rectangle([left, top, left + width, top + 18 * len(lines) + 4], BACKGROUND, GRID)
    for index, (colour, line) in enumerate(zip(_cycle(len(lines)), lines)):
        y = top + 11 + 18 * index
        draw.line([(left + 6, y), (left + 24, y)], colour, 3)
        draw.text((left + 30, y), line.label, INK, small, anchor="lm")


def colour_map(values: Tensor, low: float, high: float, colours: Sequence[tuple[int, int, int]] = RISING) -> np.ndarray:
    """Return uint8 (H, W, 3) of values (H, W) between `low` and `high`; beyond them the end colours."""
    share = ((values.float() - low) / max(high - low, 1e-12)).clamp(0, 1).cpu().numpy()
    knots = np.linspace(0, 1, len(colours))
    channels = [np.interp(share, knots, [c[i] for c in colours]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def heat_map(
    values: Tensor, title: str, low: float, high: float, colours: Sequence[tuple[int, int, int]] = RISING,
    outline: Tensor | None = None, side: int = 384, under: Tensor | None = None,
) -> Any:  # fmt: skip
    """Return a Pillow image of values (H, W): cells enlarged without smoothing, a colour bar, an outlined mask (H, W).

    `under` (h, w, 3) in [0, 1] is a picture that shines through.
    """
    from PIL import Image, ImageDraw

    scale = side / max(values.shape)
    size = max(1, round(values.shape[1] * scale)), max(1, round(values.shape[0] * scale))
    picture = Image.fromarray(colour_map(values, low, high, colours)).resize(size, Image.Resampling.NEAREST)
    if under is not None:
        base = Image.fromarray((under.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()).resize(size)
        picture = Image.blend(base.convert("L").convert("RGB"), picture, 0.6)
    if outline is not None:
        _outline(picture, outline)
    image = Image.new("RGB", (max(size[0] + 40, 240), size[1] + 96), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((image.width / 2, 10), title, INK, font(15), anchor="ma")
    left = (image.width - size[0]) // 2
    image.paste(picture, (left, 36))
    bar = Image.fromarray(colour_map(torch.linspace(0, 1, size[0])[None].expand(12, -1), 0, 1, colours))
    image.paste(bar, (left, size[1] + 48))
    for x, value, anchor in ((left, low, "la"), (left + size[0], high, "ra")):
        draw.text((x, size[1] + 66), f"{value:.3g}", INK, font(12), anchor=anchor)
    return image


def _outline(picture: Any, mask: Tensor) -> None:
    """Draw the border of a mask (H, W) onto an enlarged picture, white on black so that it shows on any colour."""
    from PIL import Image, ImageChops, ImageFilter

    flat = Image.fromarray(((mask > 0).to(torch.uint8) * 255).cpu().numpy()).resize(
        picture.size, Image.Resampling.NEAREST
    )
    for thickness, colour in ((7, (0, 0, 0)), (3, (255, 255, 255))):
        edge = ImageChops.difference(
            flat.filter(ImageFilter.MaxFilter(thickness)), flat.filter(ImageFilter.MinFilter(thickness))
        )
        picture.paste(colour, mask=edge)


def tiles(masks: Tensor, captions: Sequence[str], title: str, side: int = 96, columns: int = 8) -> Any:
    """Return a Pillow image of masks (N, H, W) as captioned tiles; more than four rows are thinned out evenly."""
    from PIL import Image, ImageDraw

    shown = np.unique(np.linspace(0, len(masks) - 1, min(len(masks), 4 * columns)).round().astype(int))
    height = max(8, round(side * masks.shape[1] / masks.shape[2]))
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    image = Image.new("RGB", (max(columns * (side + 12) + 12, 240), rows * (height + 26) + 44), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((image.width / 2, 10), title, INK, font(15), anchor="ma")
    for place, index in enumerate(shown):
        x, y = 12 + place % columns * (side + 12), 36 + place // columns * (height + 26)
        picture = Image.fromarray(colour_map(masks[index], 0, 1, ((233, 237, 242), (31, 119, 180))))
        image.paste(picture.resize((side, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x + side / 2, y + height + 4), captions[index], INK, font(12), anchor="ma")
    return image


def beside(*images: Any) -> Any:
    """Return Pillow images side by side, centred."""
    from PIL import Image

    out = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), BACKGROUND)
    x = 0
    for image in images:
        out.paste(image, (x, (out.height - image.height) // 2))
        x += image.width
    return out


def below(*images: Any) -> Any:
    """Return Pillow images one below the other, centred."""
    from PIL import Image

    out = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), BACKGROUND)
    y = 0
    for image in images:
        out.paste(image, ((out.width - image.width) // 2, y))
        y += image.height
    return out


def to_image(picture: Any) -> Tensor:
    """Return IMAGE (1, H, W, 3) of a Pillow image."""
    return numpy_to_image(np.array(picture.convert("RGB")))
