"""Against flicker, each off by default: motion-aware strength and attention across the frames in flight.

(Feedback of the previous output is one line in `batch.py`.)
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

# A change of half the picture's own size, root mean square, counts as full motion.
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
        self.recent: deque[float] = deque(maxlen=REMEMBERED)
        self.rate = 1.0

    def factor(self, x0: Tensor, amount: float) -> float:
        """Return the share of the full strength for frames x0 (B, C, H, W), between 1 - `amount` and 1.

        Looks at the values, so it makes a GPU wait.
        """
        newest = x0[-1:]
        if self.last is not None and self.last.shape == newest.shape:
            size = newest.square().mean().sqrt().clamp(min=1e-6)
            self.recent.append(float((newest - self.last).square().mean().sqrt() / size))
        self.last = newest
        motion = min(max(self.recent, default=0.0) / FULL_MOTION, 1.0)
        self.rate = SMOOTHING * (1 - amount * motion) + (1 - SMOOTHING) * self.rate
        return max(round(self.rate * NOTCHES), 1) / NOTCHES
