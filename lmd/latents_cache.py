"""Latents of a folder of images, encoded once and kept on disk by content."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..core.checks import check_finite, check_integer
from ..core.identity import Identity, identify
from ..core.images import cover, read_image
from .latent_fill import read_tensors, write_tensors

log = logging.getLogger(__name__)

# IMAGE (B, H, W, 3) in [0, 1] -> latents (B, C, h, w)
Encode = Callable[[Tensor], Tensor]


def probe(encode: Encode) -> str:
    """Return a name for an encoder that cannot be compared, from what it makes of one fixed image."""
    ramp = torch.linspace(0, 1, 64)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), (ramp + ramp[:, None]) / 2], -1)
    latents = _finite(encode(image[None]), "a test image")
    # Rounded: the last bits differ between devices. At worst a device boundary costs one more encoding.
    return hashlib.sha256(((latents * 50).round() / 50 + 0.0).numpy().tobytes()).hexdigest()[:16]


def _finite(latents: Tensor, what: str) -> Tensor:
    """Return latents in float32 on the CPU; raises ValueError for NaN, which must not be kept."""
    latents = latents.float().cpu()
    check_finite(f"the latents of {what}", latents, "Use the VAE in float32 or bfloat16.")
    return latents


def encode_files(
    files: Sequence[pathlib.Path],
    encode: Encode,
    height: int,
    width: int,
    cache: str | os.PathLike[str] | None = None,
    mirror: bool = True,
    callback: Callable[[int, int], None] | None = None,
    encoder: Identity | None = None,
) -> Tensor:
    """Return latents (N, C, h, w) of image files at `height` x `width` pixels, reading known ones from the `cache` folder.

    With `mirror` every image counts twice, once flipped. An entry is keyed by the file's bytes, the size, the encoder and the
    code that reads and resizes images, so renaming or copying images encodes nothing. A file that cannot be read is left out
    with a warning; raises ValueError when none can, and for latents with NaN. `callback(done, total)` may raise to stop; what
    was encoded stays in the cache. `encoder` is what `encode` depends on; None looks at what it makes of a test image.
    """
    check_integer("height", height, 8)
    check_integer("width", width, 8)
    encoded_by = probe(encode) if encoder is None or encoder.unnamed else encoder.digest
    name = identify(encoded_by, read_image, cover).digest[:16]
    found: list[Tensor] = []
    for done, path in enumerate(files, 1):
        latents = _latents_of(path, encode, height, width, cache, mirror, name)
        found += [] if latents is None else [latents]
        if callback is not None:
            callback(done, len(files))
    if not found:
        raise ValueError(f"Expected `files` to hold readable images, but got {len(files)} that cannot be read.")
    return torch.cat(found)


def _latents_of(
    path: pathlib.Path, encode: Encode, height: int, width: int, cache: str | os.PathLike[str] | None, mirror: bool,
    encoder: str,
) -> Tensor | None:  # fmt: skip
    """Return the latents of one file from the cache or the encoder, or None with a warning when it is no image."""
    try:
        key = f"{encoder} {height}x{width} {mirror} ".encode() + path.read_bytes()
        entry = None if cache is None else pathlib.Path(cache) / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
        latents = _read_entry(entry)
        image = None if latents is not None else cover(read_image(path)[..., :3], height, width)
    except (OSError, ValueError) as error:
        log.warning("Leaving out %s: %s", path.name, error)
        return None
    if image is not None:
        latents = _finite(encode(torch.cat([image, image.flip(2)]) if mirror else image), path.name)
        if entry is not None:
            write_tensors(entry, {"latents": latents.contiguous()}, {})
    return latents


def _read_entry(entry: pathlib.Path | None) -> Tensor | None:
    """Return the cached latents, or None when there are none or the file is damaged."""
    if entry is None or not entry.exists():
        return None
    try:
        return _finite(read_tensors(entry)[0]["latents"], entry.name)
    except (ValueError, KeyError):
        log.warning("Encoding again: %s is damaged.", entry.name)
        return None


def encode_images(images: Tensor, encode: Encode, height: int, width: int, mirror: bool = True) -> Tensor:
    """Return latents of an IMAGE batch (B, H, W, C) at `height` x `width` pixels, one image at a time."""
    fitted: Iterable[Tensor] = (cover(image[None, ..., :3], height, width) for image in images)
    return torch.cat([_finite(encode(torch.cat([i, i.flip(2)]) if mirror else i), "an image") for i in fitted])
