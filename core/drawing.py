"""What a person draws on an image by hand, as readable JSON, and the mask that it makes. Coordinates are pixels, x to the right, y down.

    {"size": [768, 512],
     "shapes": [{"box": [60, 30, 290, 105]},
                {"outline": [[60, 30], [290, 30], [175, 105]]},
                {"brush": [[70, 60], [90, 62]], "width": 40},
                {"erase": [[80, 61]], "width": 12}]}

`size` (width, height) is that of the image it was drawn on; it is needed only where no image is connected. Shapes are painted in
their order. The editor in `web/canvas` writes this form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .points import Point

if TYPE_CHECKING:
    from PIL import ImageDraw

EXAMPLE = '{"size": [768, 512], "shapes": [{"box": [60, 30, 290, 105]}]}'
KINDS = ("box", "outline", "brush", "erase")


@dataclass(frozen=True)
class Shape:
    """One stroke or area: its kind, its points, and the width of a stroke."""

    kind: str
    points: tuple[Point, ...]
    width: float = 0.0


@dataclass(frozen=True)
class Drawing:
    """Shapes in the order in which they were drawn, and the (height, width) of the image that they were drawn on."""

    shapes: tuple[Shape, ...] = ()
    size: tuple[int, int] | None = None


def read_drawing(text: str, name: str = "canvas") -> Drawing:
    """Return the drawing of a JSON text; an empty text is an empty drawing. Raises ValueError for anything else."""
    if not text.strip():
        return Drawing()
    try:
        found = json.loads(text)
        shapes = tuple(_shape(entry) for entry in found.get("shapes", []))
        size = found.get("size")
        return Drawing(shapes, None if size is None else (_side(size[1]), _side(size[0])))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        raise ValueError(
            f"Expected `{name}` as JSON such as {EXAMPLE}, but got {text[:80]!r}. Clear it, or draw again."
        ) from None


def _side(value: Any) -> int:
    if not 1 <= int(value) <= 65536:
        raise ValueError
    return int(value)


def _shape(entry: dict[str, Any]) -> Shape:
    (kind,) = [key for key in entry if key in KINDS]
    values = entry[kind]
    points = [values[:2], values[2:]] if kind == "box" else values
    pairs = tuple((float(x), float(y)) for x, y in points)
    width = float(entry["width"]) if kind in ("brush", "erase") else 0.0
    if not pairs or not all(math.isfinite(v) and abs(v) < 1e6 for v in (width, *(v for p in pairs for v in p))):
        raise ValueError
    return Shape(kind, pairs, width)


def paint(drawing: Drawing, mask: Tensor) -> Tensor:
    """Return a mask (H, W) in [0, 1] with the shapes of a drawing painted on it, and erased from it, in their order."""
    for erases, shapes in groupby(drawing.shapes, lambda shape: shape.kind == "erase"):
        layer = _filled(list(shapes), mask.shape[-2], mask.shape[-1]).to(mask)
        mask = torch.minimum(mask, 1 - layer) if erases else torch.maximum(mask, layer)
    return mask


def _filled(shapes: Sequence[Shape], height: int, width: int) -> Tensor:
    """Return what shapes cover, (H, W), 0 or 1: every pixel whose centre lies in one of them."""
    import numpy as np
    from PIL import Image, ImageDraw

    image = Image.new("L", (width, height))
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        _fill(pen, shape)
    return torch.from_numpy(np.array(image)).float()


def _fill(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    # PIL counts from the centres of pixels, we count from their corners.
    centred = [(x - 0.5, y - 0.5) for x, y in shape.points]
    if shape.kind == "box":
        (x0, y0), (x1, y1) = shape.points
        left, right, top, bottom = round(min(x0, x1)), round(max(x0, x1)), round(min(y0, y1)), round(max(y0, y1))
        if right > left and bottom > top:
            pen.rectangle([left, top, right - 1, bottom - 1], fill=1)
    elif shape.kind == "outline":
        if len(centred) > 2:
            pen.polygon(centred, fill=1)
    else:
        radius = max(shape.width, 1.0) / 2
        pen.line(centred, fill=1, width=max(1, round(shape.width)))
        pen.point(centred, fill=1)
        for x, y in centred:
            pen.ellipse([x - radius + 0.5, y - radius + 0.5, x + radius - 0.5, y + radius - 0.5], fill=1)
