"""Coefficients of a multistep solver for the levels of one schedule, fitted to the model's own many-step run.

S4S (arXiv 2502.17423) learns them by gradients through the sampler; one step's coefficients alone are a linear least squares
problem, which needs no gradient and no network call that a search does not make anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .paths import SamplingPath, Trajectory
from .space import DIGITS, Candidate

Weights = tuple[tuple[float, ...], ...]
VALUES = 16384  # of a state that the coefficients are fitted on
PULL = 1e-5  # towards Euler's step, as a share of the slopes' square: slopes that are nearly the same share the weight


@dataclass(frozen=True)
class Course:
    """States (N + 1, P) and slopes (N, P) of a many-step run at its levels `sigmas` (N + 1,), the last being 0."""

    sigmas: Tensor
    states: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, trajectory: Trajectory, final: Tensor) -> Course:
        sigmas = torch.tensor([*trajectory.sigmas, 0.0])
        states = thinned([*trajectory.states, final])
        return cls(sigmas, states, (states[:-1] - thinned(trajectory.denoised)) / sigmas[:-1, None])

    def state(self, sigma: float) -> Tensor:
        """Return the state (P,) at any level, linear in sigma as Euler's steps are."""
        return self._at(self.states, sigma)

    def slope(self, sigma: float) -> Tensor:
        return self._at(self.slopes, sigma)

    def _at(self, values: Tensor, sigma: float) -> Tensor:
        levels = self.sigmas[: len(values)]
        after = int((levels > sigma).sum())
        if after == 0 or after == len(levels):
            return values[min(after, len(levels) - 1)]
        share = (levels[after - 1] - sigma) / (levels[after - 1] - levels[after])
        return torch.lerp(values[after - 1], values[after], share)

    def pack(self) -> Tensor:
        """Return all of it as one tensor (2 N + 1, 1 + P), for the store."""
        return torch.cat(
            [torch.cat([self.sigmas, self.sigmas[:-1]])[:, None], torch.cat([self.states, self.slopes])], 1
        )

    @classmethod
    def unpack(cls, packed: Tensor) -> Course:
        count = len(packed) // 2 + 1
        return cls(packed[:count, 0], packed[:count, 1:], packed[count:, 1:])


def thinned(states: Sequence[Tensor]) -> Tensor:
    """Return each state's values (N, P), evenly thinned to about `VALUES`."""
    flat = torch.stack([x.float().flatten() for x in states])
    return flat[:, :: -(-flat.shape[1] // VALUES)]


def step_weights(slopes: Sequence[Tensor], wanted: Tensor) -> tuple[float, ...]:
    """Return the weights, newest slope first, whose sum of `slopes` (P,) is nearest to the slope `wanted` (P,)."""
    matrix = torch.stack(list(slopes)).double()
    gram = matrix @ matrix.T
    pull = PULL * gram.diagonal().mean().clamp(min=1e-30)
    right = matrix @ wanted.double()
    right[0] += pull
    found = torch.linalg.solve(gram + pull * torch.eye(len(gram), dtype=gram.dtype), right)
    return tuple(round(float(w), DIGITS) for w in found)


def planned_weights(course: Course, levels: Sequence[float], order: int) -> Weights:
    """Return each step's weights as if the sampler were on the many-step run's own states: no network call."""
    slopes = [course.slope(sigma) for sigma in levels[:-1]]
    return tuple(
        step_weights(
            slopes[max(i + 1 - order, 0) : i + 1][::-1], (course.state(low) - course.state(high)) / (low - high)
        )
        for i, (high, low) in enumerate(zip(levels, levels[1:]))
    )


def followed_weights(
    path: SamplingPath, course: Course, levels: Sequence[float], order: int, pairs: Sequence[int]
) -> Weights:
    """Return each step's weights on the way that they lead: a step also mends what the ones before it missed.

    Samples `pairs`, those of the course, up to each step in turn: K (K + 1) / 2 calls a pair for K steps.
    """
    weights: list[tuple[float, ...]] = []
    for i in range(len(levels) - 1):
        watch = Trajectory([], [], [])
        begun = Candidate(tuple(levels[: i + 2]), weights=(*weights, ()))
        path.sample(begun.sigmas, pairs, watch=watch, reuse=begun.reuse_spans())
        states, sigmas = thinned(watch.states), torch.tensor(watch.sigmas)
        slopes = (states - thinned(watch.denoised)) / sigmas[:, None]
        wanted = (course.state(levels[i + 1]) - states[-1]) / (levels[i + 1] - levels[i])
        weights.append(step_weights(list(slopes[-order:].flip(0)), wanted))
    return tuple(weights)
