"""Latents of a folder of images, encoded once and kept on disk by content."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_integer
from ..core.tensors import numpy_to_image
from .latent_fill import read_tensors, write_tensors

log = logging.getLogger(__name__)

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# IMAGE (B, H, W, 3) in [0, 1] -> latents (B, C, h, w)
Encode = Callable[[Tensor], Tensor]


def image_files(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Return the images below `folder`, sorted by path; raises ValueError when there are none."""
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"Expected `folder` to be a folder of images, but got {str(root)!r}. Give one that exists.")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not files:
        raise ValueError(
            f"Expected `folder` to hold images ({', '.join(EXTENSIONS)}), but got none in {str(root)!r}. Add some."
        )
    return files


def fit_image(image: Tensor, height: int, width: int) -> Tensor:
    """Return IMAGE (B, H, W, 3) scaled to cover `height` x `width` and cropped around its centre."""
    pixels = image[..., :3].movedim(-1, 1)
    scale = max(height / pixels.shape[-2], width / pixels.shape[-1])
    size = [max(round(pixels.shape[-2] * scale), height), max(round(pixels.shape[-1] * scale), width)]
    if tuple(size) != tuple(pixels.shape[-2:]):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width].movedim(1, -1)


def read_image(path: pathlib.Path, height: int, width: int) -> Tensor:
    """Return IMAGE (1, height, width, 3) of a file, turned upright and cropped to fit."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image = numpy_to_image(np.array(ImageOps.exif_transpose(file).convert("RGB")))
    return fit_image(image, height, width)


def probe(encode: Encode) -> str:
    """Return a name for an encoder from what it makes of one fixed picture; another VAE gives another name."""
    ramp = torch.linspace(0, 1, 64)
    picture = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), (ramp + ramp[:, None]) / 2], -1)
    latents = encode(picture[None]).float().cpu()
    # Rounded: the last bits differ between devices. At worst a device boundary costs one more encoding.
    return hashlib.sha256(((latents * 50).round() / 50 + 0.0).numpy().tobytes()).hexdigest()[:16]


def encode_files(
    files: Sequence[pathlib.Path],
    encode: Encode,
    height: int,
    width: int,
    cache: str | os.PathLike[str] | None = None,
    mirror: bool = True,
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return latents (N, C, h, w) of image files at `height` x `width` pixels, reading known ones from the `cache` folder.

    With `mirror` every image counts twice, once flipped. An entry is keyed by the file's bytes, the size and the encoder, so
    renaming or copying images encodes nothing. A file that cannot be read is left out with a warning; raises ValueError when
    none can. `callback(done, total)` may raise to stop; what was encoded stays in the cache.
    """
    check_integer("height", height, 8)
    check_integer("width", width, 8)
    encoder = probe(encode)
    found = []
    for done, path in enumerate(files, 1):
        try:
            content = path.read_bytes()
            key = hashlib.sha256(f"{encoder} {height}x{width} {mirror} ".encode() + content).hexdigest()
            entry = None if cache is None else pathlib.Path(cache) / f"{key[:32]}.safetensors"
            latents = _read_entry(entry)
            if latents is None:
                image = read_image(path, height, width)
                latents = encode(torch.cat([image, image.flip(2)]) if mirror else image).float().cpu()
                if entry is not None:
                    write_tensors(entry, {"latents": latents.contiguous()}, {})
            found.append(latents)
        except (OSError, SyntaxError) as error:  # what PIL raises for files that are no images
            log.warning("Leaving out %s: %s", path.name, error)
        if callback is not None:
            callback(done, len(files))
    if not found:
        raise ValueError(f"Expected `files` to hold readable images, but got {len(files)} that cannot be read.")
    return torch.cat(found)


def _read_entry(entry: pathlib.Path | None) -> Tensor | None:
    """Return the cached latents, or None when there are none or the file is damaged."""
    if entry is None or not entry.exists():
        return None
    try:
        return read_tensors(entry)[0]["latents"]
    except (ValueError, KeyError):
        log.warning("Encoding again: %s is damaged.", entry.name)
        return None


def encode_images(images: Tensor, encode: Encode, height: int, width: int, mirror: bool = True) -> Tensor:
    """Return latents of an IMAGE batch (B, H, W, C) at `height` x `width` pixels, one image at a time."""
    fitted: Iterable[Tensor] = (fit_image(image[None], height, width) for image in images)
    return torch.cat([encode(torch.cat([i, i.flip(2)]) if mirror else i).float().cpu() for i in fitted])
