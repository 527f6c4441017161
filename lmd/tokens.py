"""Square patches of latents as tokens: grids, reshaping, and which tokens a mask hides."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..core.masks import touched


def token_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Return (rows, columns) of tokens that cover `height` x `width` cells; the last ones may hang over the edge."""
    return -(-height // patch), -(-width // patch)


def to_tokens(latents: Tensor, patch: int) -> Tensor:
    """Return tokens (B, rows * columns, C * patch * patch) of latents (B, C, H, W) whose sides are multiples of `patch`."""
    return F.unfold(latents, patch, stride=patch).transpose(1, 2)


def from_tokens(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Undo `to_tokens`: latents (B, C, height, width)."""
    return F.fold(tokens.transpose(1, 2), (height, width), patch, stride=patch)


def tokens_to_cells(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Return a mask (B, height, width) from a mask over tokens (B, rows, columns)."""
    cells = tokens.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    return cells[..., :height, :width]


def tokens_touched(mask: Tensor, patch: int) -> Tensor:
    """Return bool (B, rows, columns): which tokens hold any masked cell of `mask` (B, H, W)."""
    rows, columns = token_grid(mask.shape[-2], mask.shape[-1], patch)
    padded = F.pad(mask.float(), (0, columns * patch - mask.shape[-1], 0, rows * patch - mask.shape[-2]))
    return touched(F.max_pool2d(padded[:, None], patch)[:, 0])


def masked_count(tokens: int, ratio: float) -> int:
    """Return how many of `tokens` a ratio hides, keeping int(tokens * (1 - ratio)) visible as MAE does (arXiv 2111.06377)."""
    # 10 * (1 - 0.9) is 0.9999999999999998: the nudge keeps the token that exact arithmetic keeps.
    return tokens - int(tokens * (1 - ratio) + 1e-9)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return bool like `scores` (B, L): true for the `count` lowest of each row, ties to the first."""
    rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < count
