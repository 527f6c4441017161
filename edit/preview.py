"""An image of what an edit will do, before any sampling: regions, ghosts of what is carried, arrows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..core.masks import grow
from ..core.tensors import image_to_numpy, numpy_to_image
from .geometry import Canvas, Photo, Placement, Point, centre_of
from .placing import affine_of, lay_out
from .tasks import Appearance, Drag, Move, Task

RED, BLUE, WHITE, BLACK = (1.0, 0.25, 0.2), (0.2, 0.5, 1.0), (255, 255, 255), (0, 0, 0)


def preview(image: Tensor, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """Return (annotated, draft), both IMAGE (1, H, W, 3): the tasks drawn on the photo, and the plain cut-and-paste.

    Vacated areas are red, what else may change blue; a carried object is a half-transparent ghost with an arrow to it. Masks are
    checked as `edit` checks them.
    """
    size = (image.shape[1], image.shape[2])
    layout = lay_out(tasks, Photo(Canvas(size, size, 1.0), image))
    made = layout.draft()
    if made is None:
        raise ValueError(
            "Expected references that know their pixels, but got one without `image`. Give it to `invert`."
        )
    drafted, _ = made
    base, ghosts = (rearrange(i.float().cpu(), "b h w c -> b c h w") for i in (image, drafted))
    shown = _tinted(base, ghosts, [placed for _, placed in layout.carried], tasks)
    return _arrows(rearrange(shown, "b c h w -> b h w c"), tasks, layout.canvases[0]), drafted


def _tint(pixels: Tensor, region: Tensor, colour: Sequence[float], share: float) -> Tensor:
    tone = pixels.new_tensor(colour)[None, :, None, None]
    return pixels + share * region[None, None] * (tone - pixels)


def _tinted(base: Tensor, drafted: Tensor, placements: Sequence[Placement], tasks: Sequence[Task]) -> Tensor:
    out = base
    for task in tasks:
        if isinstance(task, (Appearance, Drag)):
            out = _tint(out, task.mask, BLUE, 0.25)
    for placed in placements:
        out = _tint(out, placed.vacated, RED, 0.5)
    for placed in placements:
        ghost = placed.target[None, None]
        out = out + 0.7 * ghost * (drafted - out)
    # Outlines show where colours do not: what is taken away in red, what arrives in white.
    for placed in placements:
        out = _tint(out, outline(placed.removed), RED, 1.0)
        out = _tint(out, outline(placed.target), (1.0, 1.0, 1.0), 0.9)
    return out.clamp(0, 1)


def outline(mask: Tensor) -> Tensor:
    """Return the inner border (H, W) of a mask."""
    inside = mask > 0.5
    return (inside & ~grow(inside, -1)).float()


def _arrows(image: Tensor, tasks: Sequence[Task], canvas: Canvas) -> Tensor:
    from PIL import Image, ImageDraw

    drawn = Image.fromarray(image_to_numpy(image)[0])
    pen = ImageDraw.Draw(drawn)
    thick = max(1, round(min(canvas.size) / 160))
    for task in tasks:
        if isinstance(task, Move):
            centre = centre_of(task.mask, "object")
            x, y = affine_of(task).forward(torch.tensor(centre)).tolist()
            _arrow(pen, centre, (x, y), thick)
        elif isinstance(task, Drag):
            for handle, target in task.points:
                _arrow(pen, handle, target, thick)
    return numpy_to_image(np.array(drawn))


def _arrow(pen: Any, start: Point, end: Point, thick: int) -> None:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = max((dx**2 + dy**2) ** 0.5, 1e-6)
    if length < thick:
        return
    u, v, head = dx / length, dy / length, min(5.0 * thick, length)
    left = (end[0] - head * u - head / 2 * v, end[1] - head * v + head / 2 * u)
    right = (end[0] - head * u + head / 2 * v, end[1] - head * v - head / 2 * u)
    shaft = [start, (end[0] - head * u, end[1] - head * v)]
    pen.line(shaft, fill=BLACK, width=thick + 2)
    pen.line(shaft, fill=WHITE, width=thick)
    pen.polygon([end, left, right], fill=WHITE, outline=BLACK)
    r = 1.5 * thick
    pen.ellipse([start[0] - r, start[1] - r, start[0] + r, start[1] + r], fill=WHITE, outline=BLACK)
