"""Against flicker, each off by default: motion-aware strength and attention across the frames in flight.

(Feedback of the previous output is one line in `batch.py`.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..core.attention import Attend, AttentionModel
from ..core.transfer import Arrival, to_host

# A change of half the image's own size, root mean square, counts as full motion.
FULL_MOTION = 0.5
REMEMBERED = 4
SMOOTHING = 0.5
# Strength moves in steps of 1/16, so that frames share their tables of levels.
NOTCHES = 16


class Motion:
    """Lowers the strength of frames that move fast (StreamDiffusionV2, arXiv 2511.07399: motion-aware noise).

    A slow scene can be repainted freely without flicker; a fast one must follow its input.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.coming: deque[Arrival] = deque()
        self.recent: deque[float] = deque(maxlen=REMEMBERED)
        self.rate = 1.0

    def factor(self, x0: Tensor, amount: float) -> float:
        """Return the share of the full strength for frames x0 (B, C, H, W), between 1 - `amount` and 1.

        On a GPU a change counts from the next frame on: by then its value has come to the host, and nothing has to wait.
        """
        newest = x0[-1:]
        if self.last is not None and self.last.shape == newest.shape:
            size = newest.square().mean().sqrt().clamp(min=1e-6)
            self.coming.append(to_host((newest - self.last).square().mean().sqrt() / size))
        self.last = newest
        while len(self.coming) > newest.is_cuda:
            self.recent.append(float(self.coming.popleft().get()))
        motion = min(max(self.recent, default=0.0) / FULL_MOTION, 1.0)
        self.rate = SMOOTHING * (1 - amount * motion) + (1 - SMOOTHING) * self.rate
        return max(round(self.rate * NOTCHES), 1) / NOTCHES


def sharing(model: Any, blocks: Sequence[int]) -> AbstractContextManager[Any]:
    """Return a context in which self-attention sees the keys and values of all rows of a block (arXiv 2312.12491 v2).

    `blocks` are numbers of consecutive rows: the negative ones and the positive ones look at their own kind only. A model
    offers `sharing(blocks)` itself or hands out its self-attention (core's `AttentionModel`: the decoder's layers; the paper
    takes all layers). Raises ValueError for a model with neither.
    """
    if hasattr(model, "sharing"):
        return model.sharing(blocks)
    if not isinstance(model, AttentionModel):
        raise ValueError(
            f"Expected a model with attention that can be shared for `cross_frame`, but got {type(model).__name__}. "
            "Switch `cross_frame` off."
        )

    def hook(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        return attend(q, join_rows(k, blocks), join_rows(v, blocks))

    return model.self_attention(hook)


def join_rows(tokens: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return (B, S, C) tokens (B, T, C) joined over each block of rows; rows after the last block are padding and join it.

    Blocks of unequal size are repeated to one length, which leaves softmax attention unchanged.
    """
    blocks = [n for n in blocks if n]
    longest = math.lcm(*blocks)
    joined, row = [], 0
    for n in blocks:
        block = tokens[row : row + n].flatten(0, 1).repeat(longest // n, 1)
        joined.append(block.expand(n, *block.shape))
        row += n
    if row < len(tokens):
        joined.append(joined[-1][:1].expand(len(tokens) - row, *joined[-1].shape[1:]))
    return torch.cat(joined)
