"""The canvas on a node: a widget that holds a drawing, the mask that it makes, and what a run sends back to be drawn on."""

from __future__ import annotations

import pathlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.drawing import Shape, paint, read_drawing
from ..core.masks import clean, touched
from .widgets import Widget

KEY = "slipstream_canvas"  # of the `ui` output, which web/canvas.js reads
STORED_TIP = "Stored as readable JSON (docs/guides/canvas.md)."
IMAGE_TIP = "The photo to draw on. A Load Image is shown at once, any other image after a run."


def canvas(tooltip: str) -> Widget:
    """A drawing in the JSON of `core.drawing`; the frontend shows an editor for it, a person who queues from the API types it."""
    return "STRING", {"default": "", "widgetType": "SLIPSTREAM_CANVAS", "socketless": True, "tooltip": tooltip}


def check_canvas(**canvas: str) -> None:
    """Raise ValueError unless the values of widgets, by name, are drawings."""
    for name, text in canvas.items():
        read_drawing(text, name)


def drawn_mask(
    node: str, text: str, mask: Tensor | None, image: Tensor | None, name: str = "mask", otherwise: Sequence[Shape] = ()
) -> Tensor:
    """Return the MASK (1, H, W) of a connected mask (H, W) or (1, H, W), if there is one, and of what was drawn on top of it.

    `otherwise` are the shapes that count where nothing was drawn or connected. A mask without a painted pixel counts as none beside
    shapes. Raises ValueError without any of them, and for a drawing of unknown size: no image is connected and its text has no `size`.
    """
    from .host.warnings import warn

    widget = "reference_canvas" if name == "reference_mask" else "canvas"
    drawing = read_drawing(text, widget)
    empty = mask is not None and not bool(touched(clean(mask)).any())
    if not drawing.shapes and (mask is None or empty):
        drawing = replace(drawing, shapes=tuple(otherwise))
    if not drawing.shapes and mask is None:
        raise ValueError(
            f"Expected an object, but got no `{name}` and an empty `{widget}`. Paint the object on the canvas."
        )
    if drawing.shapes and empty and (image is not None or drawing.size is not None):
        mask = None  # Load Image gives an empty mask of 64 x 64 pixels for an image without transparency
    size = tuple(image.shape[1:3]) if image is not None else drawing.size
    if mask is not None:
        size = tuple(mask.shape[-2:])
    if size is None:
        raise ValueError(
            f"Expected a drawing of known size, but got none in `{widget}`. Connect `image`, or give its `size`."
        )
    if drawing.size not in (None, size) and not (mask is not None and empty):
        height, width = drawing.size or size
        warn(
            node,
            f"`{widget}` was drawn on {width} x {height} pixels, but the image has {size[1]} x {size[0]}: its pixels are kept. "
            "Check what is drawn.",
        )
    if mask is not None and not drawing.shapes:
        return mask
    if mask is not None and mask.ndim == 3 and len(mask) != 1:
        raise ValueError(f"Expected one `{name}`, but got {len(mask)}. Give one mask a task.")
    under = torch.zeros(size) if mask is None else mask.reshape(size).float()
    return paint(drawing, under)[None]


def _watched() -> bool:
    """Whether a browser or another client listens: a run that nobody sees writes no files."""
    try:
        from server import PromptServer
    except ImportError:
        return False
    server = getattr(PromptServer, "instance", None)
    return server is not None and server.client_id is not None


def shown(image: Tensor | None, mask: Tensor | None = None, reference: Tensor | None = None) -> dict[str, Any]:
    """Return the `ui` part of a node's result that its canvas draws on: images (B, H, W, 3) and a connected mask."""
    found = [("image", image, "jpg"), ("mask", mask, "png"), ("reference", reference, "jpg")]
    if not _watched():
        return {}
    return {KEY: [_saved(role, values, suffix) for role, values, suffix in found if values is not None]}


def _saved(role: str, values: Tensor, suffix: str) -> dict[str, Any]:
    import folder_paths

    from ..core.images import save_image

    first = (
        values.reshape(-1, *values.shape[-2:])[0][..., None].expand(-1, -1, 3) if role == "mask" else values[0, ..., :3]
    )
    file = f"slipstream_{secrets.token_hex(8)}.{suffix}"
    save_image(first[None].float().clamp(0, 1), pathlib.Path(folder_paths.get_temp_directory()) / file)
    return {"role": role, "filename": file, "subfolder": "", "type": "temp"}
