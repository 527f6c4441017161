"""Where a search begins: the schedules users have, and dynamic programming on one run of the model's own many-step sampler."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.denoiser import NoiseSpace
from .paths import Trajectory
from .space import Genome, Space

# Values of a state that the quadratic table of jumps is made from.
DP_VALUES = 16384


def jump_costs(trajectory: Trajectory, final: Tensor, space: NoiseSpace) -> Tensor:
    """Return (N, N + 1) errors of one Euler step from each of N states to each later one, the last being `final` at 0.

    Measured where the network sees them, at unit variance; infinite where no jump goes (GITS, arXiv 2405.11326, eq. 9
    without its discount).
    """
    sigmas = torch.tensor([*trajectory.sigmas, 0.0])
    targets = torch.stack([*trajectory.states, final]).float()
    scale = torch.ones_like(sigmas) if space.name == "flow" else (1 + sigmas**2).rsqrt()
    count = len(trajectory.sigmas)
    costs = torch.full((count, count + 1), torch.inf, dtype=torch.float64)
    for i in range(count):
        jumped = space.step(trajectory.states[i][None], trajectory.denoised[i][None], sigmas[i], sigmas[i + 1 :])
        error = (jumped - targets[i + 1 :]) * scale[i + 1 :].reshape(-1, *[1] * (targets.ndim - 1))
        costs[i, i + 1 :] = error.flatten(1).double().pow(2).mean(1).sqrt()
    return costs


def cheapest_path(costs: Tensor, steps: int) -> list[int]:
    """Return the `steps` states, from the first, whose jumps to the end add up to the least cost (dynamic programming)."""
    count = len(costs)
    total = torch.full((count + 1,), torch.inf, dtype=torch.float64)
    total[0] = 0
    came: list[Tensor] = []
    for _ in range(steps):
        through = total[:count, None] + costs
        total, best = through.min(0)
        came.append(best)
    path, at = [], count
    for best in reversed(came):
        at = int(best[at])
        path.append(at)
    return path[::-1]


def extrapolated_jump_costs(trajectory: Trajectory, final: Tensor, space: NoiseSpace, fitted: bool = False) -> Tensor:
    """Return (N, N, N + 1) errors [h, i, j] of going from state i to state j on a slope that is linear in sigma through h and i.

    That is what many reused steps between i and j come to. [i, i, j] is one Euler step; infinite where h > i or j <= i.
    `fitted`: on the best sum of the slopes at h and i instead.
    """
    sigmas = torch.tensor([*trajectory.sigmas, 0.0])
    states = torch.stack([*trajectory.states, final]).float().flatten(1)
    denoised = torch.stack(trajectory.denoised).float().flatten(1)
    keep = torch.arange(0, states.shape[1], max(1, states.shape[1] // DP_VALUES))
    states, denoised = states[:, keep], denoised[:, keep]
    scale = torch.ones_like(sigmas) if space.name == "flow" else (1 + sigmas**2).rsqrt()
    count = len(denoised)
    slopes = (states[:count] - denoised) / sigmas[:count, None]
    costs = torch.full((count, count, count + 1), torch.inf, dtype=torch.float64)
    for i in range(count):
        step = (sigmas[i + 1 :] - sigmas[i])[:, None]
        left = states[i + 1 :] - states[i]
        for h in range(i + 1):
            if fitted:
                basis = torch.linalg.qr(slopes[[i, h] if h < i else [i]].T).Q
                missed = left - left @ basis @ basis.T
            else:
                bend = 0.0 if h == i else (slopes[i] - slopes[h]) / (sigmas[i] - sigmas[h]) * step**2 / 2
                missed = left - step * slopes[i] - bend
            error = missed * scale[i + 1 :, None]
            costs[h, i, i + 1 :] = error.double().pow(2).mean(1).sqrt()
    return costs


def cheapest_extrapolated_path(costs: Tensor, steps: int) -> list[int]:
    """Return the `steps` states, from the first, that are cheapest when each jump may extrapolate from the state before."""
    count = len(costs)
    straight = costs.diagonal(dim1=0, dim2=1).movedim(-1, 0)  # [i, j]
    best = torch.minimum(costs, straight[None])
    total = torch.full((count, count), torch.inf, dtype=torch.float64)  # [last but one, last]
    total[0, 0] = 0
    came: list[Tensor] = []
    for _ in range(steps - 1):
        through = total[:, :, None] + best[:, :, :count]
        total, before = through.min(0)
        came.append(before)
    ends = total + best[:, :, count]
    previous, last = divmod(int(ends.argmin()), count)
    path = [last]
    for before in reversed(came):
        path.append(previous)
        previous, last = int(before[previous, last]), previous
    return path[::-1]


def from_trajectory(space: Space, trajectory: Trajectory, final: Tensor, noise_space: NoiseSpace) -> Genome | None:
    """Return the genome that dynamic programming picks from a teacher's states, or None when it has too few of them."""
    steps = space.config.network_steps
    if len(trajectory.sigmas) < steps:
        return None
    if space.reused or space.fit:
        costs = extrapolated_jump_costs(trajectory, final, noise_space, space.fit is not None)
        path = cheapest_extrapolated_path(costs, steps)
    else:
        path = cheapest_path(jump_costs(trajectory, final, noise_space), steps)
    levels = [trajectory.sigmas[i] for i in path]
    if not space.config.terminal_zero:
        levels.append(levels[-1] / 4)
    return space.snap(levels)


def starting_genomes(space: Space, stock: Mapping[str, Tensor]) -> dict[str, Genome]:
    """Return the stock schedules that have the right length, moved to the nearest legal genome, without repetitions."""
    found: dict[str, Genome] = {}
    for name, sigmas in stock.items():
        if len(sigmas) != space.config.network_steps + 1:
            continue
        levels = sigmas if space.config.terminal_zero else [*sigmas[:-1].tolist(), float(sigmas[-2]) / 4]
        genome = space.snap(levels)
        if genome not in found.values():
            found[name] = genome
    return found
