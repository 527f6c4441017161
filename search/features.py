"""What images are compared by: one vector (D,) per sample, from latents, pixels, or any network that embeds images."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.images import cover, image_files, read_image

Decode = Callable[[Tensor], Tensor]  # latents (B, C, h, w) -> IMAGE (B, H, W, 3) in [0, 1]


class Features(Protocol):
    """One way to turn samples into vectors."""

    id: str

    def of_latents(self, latents: Tensor) -> Tensor:
        """Return (B, D) for generated latents (B, C, H, W)."""
        ...

    def of_images(self, images: Sequence[Tensor]) -> Tensor:
        """Return (N, D) for reference images (H, W, 3) in [0, 1] that may differ in size."""
        ...


def grid_features(x: Tensor, cells: int = 4) -> Tensor:
    """Return (B, D) on the CPU: the mean of each channel of (B, C, H, W) in cells x cells areas, and the edge energy in half as many.

    The energy sees grain and blur that the means do not.
    """
    x = x.float().cpu()
    means = F.adaptive_avg_pool2d(x, cells)
    dy, dx = x.diff(dim=-2)[..., :, :-1], x.diff(dim=-1)[..., :-1, :]
    if 0 in dy.shape:
        return means.flatten(1)
    energy = F.adaptive_avg_pool2d((dx**2 + dy**2 + 1e-12).sum(1, keepdim=True).sqrt(), max(cells // 2, 1))
    return torch.cat([means.flatten(1), energy.flatten(1)], 1)


class LatentFeatures:
    """Coarse colour and edge energy of the latents: needs no decoding. Reference images need `encode` (the VAE).

    Args:
        encode: IMAGE (B, H, W, 3) -> latents (B, C, h, w).
        size: (height, width) in pixels that reference images are cropped and scaled to before `encode`.
    """

    id = "latent"

    def __init__(self, encode: Decode | None = None, size: tuple[int, int] | None = None) -> None:
        self.encode, self.size = encode, size

    def of_latents(self, latents: Tensor) -> Tensor:
        return grid_features(latents)

    def of_images(self, images: Sequence[Tensor]) -> Tensor:
        if self.encode is None or self.size is None:
            raise ValueError(
                "Expected a VAE to compare latents with reference images, but got none. Connect one, or compare pixels."
            )
        return torch.cat(
            [grid_features(self.encode(cover(image[..., :3].float(), *self.size)[None])) for image in images]
        )


class PixelFeatures:
    """Coarse colour and edge energy of the decoded images, at 64 x 64."""

    id = "pixels"

    def __init__(self, decode: Decode, batch: int = 16) -> None:
        self.decode, self.batch = decode, batch

    def of_latents(self, latents: Tensor) -> Tensor:
        return torch.cat([self.of_images(list(self.decode(part))) for part in latents.split(self.batch)])

    def of_images(self, images: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [grid_features(cover(image[..., :3].float(), 64, 64)[None].movedim(-1, 1)) for image in images]
        )


class NetworkFeatures:
    """Embeddings of the decoded images by a network: the host's CLIP vision model, Inception, a classifier.

    Args:
        decode: latents -> IMAGE.
        embed: IMAGE (B, H, W, 3) in [0, 1] -> (B, D).
        id: goes into the schedule file.
        size: (height, width) that images of mixed sizes are brought to before `embed`.
    """

    def __init__(
        self, decode: Decode, embed: Decode, id: str, size: tuple[int, int] = (224, 224), batch: int = 16
    ) -> None:
        self.decode, self.embed, self.id, self.size, self.batch = decode, embed, id, size, batch

    def of_latents(self, latents: Tensor) -> Tensor:
        return torch.cat([self.embed(self.decode(part)).float().cpu().flatten(1) for part in latents.split(self.batch)])

    def of_images(self, images: Sequence[Tensor]) -> Tensor:
        found = []
        for first in range(0, len(images), self.batch):
            part = [images[i] for i in range(first, min(first + self.batch, len(images)))]
            fitted = torch.stack([cover(image[..., :3].float().cpu(), *self.size) for image in part])
            found.append(self.embed(fitted).float().cpu().flatten(1))
        return torch.cat(found)


class ImageFolder(Sequence[Tensor]):
    """Image files as (H, W, 3) in [0, 1], each read when it is asked for: a folder of photos need not fit into memory."""

    def __init__(self, files: Sequence[pathlib.Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ImageFolder(self.files[index])
        return read_image(self.files[index])[0, ..., :3]


def load_images(folder: str | pathlib.Path, limit: int = 5000) -> ImageFolder:
    """Return the images in a folder (not below it) as (H, W, 3) in [0, 1], in natural order of their names, at most `limit`.

    Raises ValueError for a folder without images, and for a file that is not one when it is read.
    """
    return ImageFolder(image_files(folder)[:limit])
