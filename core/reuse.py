"""Call reuse: steps of a sampling that continue on the slopes of earlier network calls instead of making one.

The slope is that of the probability-flow ODE, d = (x - denoised) / sigma: the noise estimate of a VE model, the velocity of a
flow model. A cache that keeps the residual denoised - x instead lets the slope grow as 1 / sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import check_choice
from .guidance import Denoise

ReuseKind = Literal["last", "linear", "fitted"]
REUSE_KINDS: tuple[ReuseKind, ...] = ("last", "linear", "fitted")
MAX_WEIGHTS = 4
# Relative distance of two float32 sigmas that name one level.
ROUNDING = 1e-5


@dataclass(frozen=True)
class ReuseSpan:
    """How calls with sigma_low < sigma <= sigma_high continue on earlier ones.

    `kind` "last" makes no call and keeps the slope of the last one; "linear" makes none and extrapolates the slopes of the last
    two linearly in sigma, which with one call so far is the same. "fitted" makes the first call of the span, and the whole span
    continues on the sum of its slope and those before it, newest first, times `weights`: a multistep solver with coefficients of
    its own for each step (S4S, arXiv 2502.17423). With fewer slopes than weights it keeps the last.
    """

    sigma_high: float
    sigma_low: float
    kind: ReuseKind = "linear"
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, REUSE_KINDS)
        if not 0 <= self.sigma_low < self.sigma_high:
            raise ValueError(
                f"Expected `sigma_low` between 0 and `sigma_high`, but got {self.sigma_low} and {self.sigma_high}. "
                "A span holds the levels below its higher one."
            )
        fitted = self.kind == "fitted"
        if not (1 <= len(self.weights) <= MAX_WEIGHTS if fitted else not self.weights):
            legal = f"1 to {MAX_WEIGHTS} `weights` for the kind fitted" if fitted else f"no `weights` for {self.kind}"
            raise ValueError(f"Expected {legal}, but got {self.weights}. Weights belong to fitted spans alone.")

    def holds(self, sigma: float) -> bool:
        """Whether a call at `sigma` is inside; both ends allow for float32 rounding."""
        return self.sigma_low * (1 + ROUNDING) < sigma <= self.sigma_high * (1 + ROUNDING)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON."""
        fields = {"sigma_high": self.sigma_high, "sigma_low": self.sigma_low, "kind": self.kind}
        return {**fields, "weights": list(self.weights)} if self.weights else fields


@dataclass
class CallReuse:
    """Which calls of one sampling are reused, and the slopes of its last computed calls.

    The state belongs to one sampling: it is dropped when the level rises or the latents change their shape.
    `computed` and `reused` count calls since it was made.
    """

    spans: Sequence[ReuseSpan]
    computed: int = 0
    reused: int = 0
    _slopes: list[tuple[float, Tensor]] = field(default_factory=list)  # (sigma, slope), oldest first
    _level: float = 0.0  # of the last call

    def __call__(self, denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
        """Return denoised `x` (B, ...) at `sigma` (B,) or (): by `denoise`, from the slopes where a span holds, or by both.

        Rows at different levels are always computed.
        """
        levels = sigma.reshape(-1)
        level = float(levels[0])
        if level > self._level * (1 + ROUNDING) or (self._slopes and self._slopes[-1][1].shape != x.shape):
            self._slopes.clear()
        self._level = level
        same = len(levels) == 1 or bool((levels == levels[0]).all())
        span = next((s for s in self.spans if s.holds(level)), None) if same else None
        if span is None or self._calls(span):
            denoised = self._compute(denoise, x, sigma, level if same else None)
            if span is None or len(self._slopes) < max(len(span.weights), 1) or span.kind != "fitted":
                return denoised
        else:
            self.reused += 1
        return torch.sub(x, self._slope(level, span), alpha=level).to(x.dtype)

    def _calls(self, span: ReuseSpan) -> bool:
        """Whether the next call inside `span` is made."""
        return not self._slopes or (span.kind == "fitted" and not span.holds(self._slopes[-1][0]))

    def _compute(self, denoise: Denoise, x: Tensor, sigma: Tensor, level: float | None) -> Tensor:
        denoised = denoise(x, sigma)
        self.computed += 1
        if level is None or level <= 0:
            self._slopes.clear()
            return denoised
        known = [s for s in self._slopes if s[0] > level * (1 + ROUNDING)]
        depth = max((len(span.weights) for span in self.spans), default=0)
        self._slopes = [*known, (level, (x - denoised).float() / level)][-max(depth, 2) :]
        return denoised

    def _slope(self, sigma: float, span: ReuseSpan) -> Tensor:
        last_sigma, last = self._slopes[-1]
        if span.kind == "fitted" and len(self._slopes) >= len(span.weights):
            total = span.weights[0] * last
            for weight, (_, slope) in zip(span.weights[1:], reversed(self._slopes[:-1])):
                total = total.add_(slope, alpha=weight)
            return total
        if span.kind != "linear" or len(self._slopes) == 1:
            return last
        before_sigma, before = self._slopes[-2]
        return torch.lerp(before, last, (sigma - before_sigma) / (last_sigma - before_sigma))


def reusing(denoise: Denoise, spans: Sequence[ReuseSpan]) -> Denoise:
    """Return `denoise` for one sampling in which the calls inside `spans` are reused; `denoise` itself when there are none."""
    if not spans:
        return denoise
    reuse = CallReuse(spans)
    return lambda x, sigma: reuse(denoise, x, torch.as_tensor(sigma))
