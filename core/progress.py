"""Progress as an argument: techniques report each network step, the caller decides what to show and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One finished step of a long run.

    `phase` names the part of the run ("invert", "cycle 3", "sample"); `index` of `total` counts over *all* phases from 1,
    so that one progress bar fits the whole run; `sigma` is the level just reached; `denoised` (B, C, H, W) is the current
    estimate for a preview, or None.
    """

    phase: str
    index: int
    total: int
    sigma: float
    denoised: Tensor | None = None


# A callback may raise to stop the run: the exception passes through the technique unchanged.
Callback = Callable[[Step], None]


class Reporter:
    """Counts the steps of one run and hands them to an optional callback."""

    def __init__(self, total: int, callback: Callback | None = None) -> None:
        self.total = total
        self.index = 0
        self.callback = callback

    def __call__(self, phase: str, sigma: float | Tensor, denoised: Tensor | None = None) -> None:
        self.index += 1
        if self.callback is not None:
            self.callback(Step(phase, self.index, self.total, float(sigma), denoised))
