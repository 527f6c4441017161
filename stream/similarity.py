"""Stochastic similarity filter: leave out frames that look like the last processed one (arXiv 2312.12491 section 3.5)."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_finite, check_integer, check_range
from ..core.transfer import to_device

TINY = 1e-6


class SimilarityFilter:
    """Decides frame by frame what is worth processing: skip with probability max(0, (c - threshold) / (1 - threshold)).

    c is the cosine similarity to the last processed frame. A random choice instead of a hard limit keeps slow changes smooth.

    Args:
        threshold: cosine at which skipping starts, 0 to 1; at 1 nothing is skipped.
        max_skip: a frame is forced after more than this many skips.
        rng: gives uniform numbers in [0, 1); default `random.Random(seed).random`, so that runs repeat.
        seed: of the default `rng`.
        blocks: compare in blocks x blocks parts and take the least similar one, so that small moving things count. 1 is the
            published global comparison.
    """

    def __init__(
        self, threshold: float = 0.98, max_skip: int = 10, rng: Callable[[], float] | None = None, seed: int = 0,
        blocks: int = 1,
    ) -> None:  # fmt: skip
        check_range("threshold", threshold, 0, 1)
        check_integer("max_skip", max_skip, 0)
        check_integer("blocks", blocks, 1, 64)
        self.threshold, self.max_skip, self.blocks = threshold, max_skip, blocks
        self.rng = rng or random.Random(seed).random
        self.reference: Tensor | None = None
        self.skips = 0

    def keep(self, image: Tensor) -> bool:
        """Return whether to process `image`, (C, H, W) or (1, C, H, W) pixels in [-1, 1], as the published filter sees them.

        The first frame and a frame of another size are always kept. Raises ValueError for other shapes and NaN.
        """
        image = image[0] if image.ndim == 4 and len(image) == 1 else image
        if image.ndim != 3:
            raise ValueError(f"Expected `image` of shape (channels, height, width), but got {tuple(image.shape)}.")
        check_finite("image", image)
        if self.reference is None or self.reference.shape != image.shape:
            return self._processed(image)
        skip = self.skip_probability(similarity(image, to_device(self.reference, image.device), self.blocks))
        if skip < self.rng() or self.skips > self.max_skip:
            return self._processed(image)
        self.skips += 1
        return False

    def skip_probability(self, cosine: float) -> float:
        """Return the chance of skipping at a similarity `cosine` (arXiv 2312.12491 eq. 9)."""
        return 0.0 if self.threshold >= 1 else max(0.0, (cosine - self.threshold) / (1 - self.threshold))

    def _processed(self, image: Tensor) -> bool:
        self.reference, self.skips = image, 0
        return True


def similarity(image: Tensor, reference: Tensor, blocks: int = 1) -> float:
    """Return the cosine similarity of two images (C, H, W), the least of blocks x blocks parts."""
    if blocks == 1:
        return float(F.cosine_similarity(image.flatten(), reference.flatten(), dim=0, eps=TINY))
    cells = min(blocks, *image.shape[-2:])
    products = torch.stack((image * reference, image * image, reference * reference)).mean(1)[None]
    dot, a, b = F.adaptive_avg_pool2d(products, cells)[0]
    # Two blocks without any signal (mid grey) are equal; one of them alone is as unlike as can be.
    cosine = torch.where(torch.maximum(a, b) < TINY, 1.0, dot / (a * b).clamp(min=TINY**2).sqrt())
    return float(cosine.min())


def select(images: Tensor, chooser: SimilarityFilter) -> list[int]:
    """Return the indices of pixels (B, C, H, W) in [-1, 1] that `chooser` keeps, frame by frame in order."""
    return [i for i, image in enumerate(images) if chooser.keep(image)]
