"""Picture files: IMAGE tensors in and out, with errors that say what to do."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .tensors import image_to_numpy, numpy_to_image


def read_picture(path: str | pathlib.Path) -> Tensor:
    """Return IMAGE (1, H, W, 3 or 4) in [0, 1] of a picture file, turned as its camera says; alpha is kept.

    Raises ValueError for a missing file or one that is no picture.
    """
    from PIL import Image, ImageOps

    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"Expected a picture at {path}, but there is no such file. Check the path.")
    try:
        with Image.open(path) as file:
            turned = ImageOps.exif_transpose(file)
            has_alpha = "A" in turned.getbands() or "transparency" in turned.info
            picture = turned.convert("RGBA" if has_alpha else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"Expected {path} to be a picture, but it cannot be read ({error}). Save it again as PNG or JPEG."
        ) from error
    return numpy_to_image(np.array(picture))


def check_picture_name(path: str | pathlib.Path) -> None:
    """Raise ValueError unless `path` names a picture format that can be written: ask before the work, not after it."""
    from PIL import Image

    path = pathlib.Path(path).expanduser()
    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE or path.is_dir():
        raise ValueError(f"Expected a picture name such as out.png, but got {path.name!r}. Add .png or .jpg.")


def save_picture(image: Tensor, path: str | pathlib.Path) -> pathlib.Path:
    """Write the first picture of IMAGE (B, H, W, 3) in [0, 1]; folders are made, the format follows the name."""
    from PIL import Image

    check_picture_name(path)
    path = pathlib.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_to_numpy(image[:1])[0]).save(path, quality=92)
    return path


def side_by_side(images: Sequence[Tensor], gap: int = 4) -> Tensor:
    """Return one IMAGE (1, H, W, 3) with pictures (1, H, W, 3) of equal height in a row, `gap` white pixels between."""
    space = torch.ones(1, images[0].shape[1], gap, 3)
    parts = [part for image in images for part in (space, image[..., :3].cpu())][1:]
    return torch.cat(parts, 2)
