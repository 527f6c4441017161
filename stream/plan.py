"""What one pass needs besides latents, computed once for each arrangement of frames in flight.

In a steady stream the arrangement never changes, so a pass is one network call and three small tensor operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.denoiser import Denoiser, NoiseSpace
from ..core.guidance import own_guidance, residual_weights
from ..core.noise import NoiseSource
from ..core.schedules import Levels
from ..core.transfer import to_device
from .config import StreamConfig, boundary_scalings
from .stability import sharing

Network = Callable[[Tensor], Tensor]
# (x, negative estimate or None to ask for it, cfg_scale) -> denoised, of a model with guidance of its own
OwnGuidance = Callable[[Tensor, "Tensor | None", float], Tensor]
Move = Callable[[Tensor, Tensor], Tensor]  # (denoised, x) of the rows that continue -> x at their next level


@dataclass(eq=False)
class Track:
    """The steps that a frame takes: levels (N,) on the CPU and the noise of each step (N, C, H, W) on the device.

    A frame enters as `scale` * x0 + `entry`, its share of the first step's noise.
    """

    sigmas: Tensor
    noise: Tensor
    scale: float
    entry: Tensor

    @property
    def last(self) -> int:
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class Skipped:
    """A frame that was not processed; it shows the result of the group before it."""

    id: int
    meta: Any
    arrived: float
    born: int


@dataclass(eq=False)
class Group:
    """Frames that travel together: `stage` is the step they take next, `result` (rows, C, H, W) is set when done."""

    ids: list[int]
    metas: list[Any]
    arrived: list[float]
    track: Track
    born: int
    conds: list[Any] | None = None  # of the frames themselves, where they have their own
    unconds: list[Any] | None = None
    stage: int = 0
    result: Tensor | None = None
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def ending(self) -> bool:
        """Whether the next step is the last."""
        return self.stage == self.track.last


@dataclass(frozen=True, eq=False)
class Plan:
    """One arrangement of frames in flight, bound to its levels and prompts.

    `network` maps x (R, C, H, W) to denoised and `guided` is the model's own guidance, if it has one; `bind` makes both for
    other prompts. `entering` rows take their first step; `residual` are the weights of `residual_negative` (R, 1, 1, 1);
    `skip_out` are consistency scalings; `kept` are the rows with a step left and `move` takes them there.
    """

    network: Network
    guided: OwnGuidance | None
    bind: Callable[[Any, Any, Sequence[Group]], tuple[Network, OwnGuidance | None]]
    entering: int
    residual: tuple[Tensor, Tensor] | None
    skip_out: tuple[Tensor, Tensor] | None
    kept: slice | Tensor
    move: Move | None
    reference_shift: Tensor | None

    def with_prompts(self, cond: Any, uncond: Any, active: Sequence[Group]) -> Plan:
        """Return the plan for other groups of the same arrangement, whose frames have prompts of their own."""
        network, guided = self.bind(cond, uncond, active)
        return replace(self, network=network, guided=guided)


def make_plan(
    model: Denoiser, config: StreamConfig, cond: Any, uncond: Any, active: Sequence[Group], like: Tensor, source: NoiseSource
) -> Plan:  # fmt: skip
    """Plan a pass of `active` groups, newest first, whose rows have the shape, device and dtype of `like`.

    All levels are worked out on the CPU and sent to the device once, so that a GPU does not wait even for a new arrangement.
    """
    space, there = model.space, functools.partial(to_device, device=like.device, dtype=like.dtype)
    rows = functools.partial(_rows, dimensions=like.ndim)
    sigma = _per_row([(g.track.sigmas[g.stage], g.size) for g in active])
    onward = [g for g in active if not g.ending]
    kept = _kept_rows(active)
    entering = active[0].size if active[0].stage == 0 else 0
    residual = residual_weights(sigma, config.delta, space) if config.guidance in ("self", "onetime") else None
    move = shift = None
    if onward:
        low = there(rows(_per_row([(g.track.sigmas[g.stage + 1], g.size) for g in onward])))
        high = there(rows(sigma[kept]))
        noise = torch.cat([g.track.noise[g.stage + 1].expand(g.size, *like.shape[1:]) for g in onward])
        move = RENOISERS[config.renoise](space, high, low, noise, source)
        if config.renoise == "none":
            # As recorded: the published residual counts the noise that the latents were not given.
            shift = low * noise / space.scale(low)
    boundary = _boundary(model.levels, sigma) if config.consistency else None
    bind = bind_calls(model, config, sigma, entering, like.device)
    network, guided = bind(cond, uncond, active)
    return Plan(
        network=network,
        guided=guided,
        bind=bind,
        entering=entering,
        residual=None if residual is None else (there(rows(residual[0])), there(rows(residual[1]))),
        skip_out=None if boundary is None else (there(rows(boundary[0])), there(rows(boundary[1]))),
        kept=kept if isinstance(kept, slice) else to_device(kept, like.device),
        move=move,
        reference_shift=shift,
    )


# -- how a frame gets from level `high` to its next level `low`: each returns a function of (denoised, x)


def _fixed(space: NoiseSpace, high: Tensor, low: Tensor, noise: Tensor, source: NoiseSource) -> Move:
    """The same noise for every frame at the same step (arXiv 2312.12491 section 3.6)."""
    scale, added = space.scale(low), low * noise
    if space.name == "ve":
        return lambda denoised, x: denoised + added
    return lambda denoised, x: torch.addcmul(added, denoised, scale)


def _fresh(space: NoiseSpace, high: Tensor, low: Tensor, noise: Tensor, source: NoiseSource) -> Move:
    scale = space.scale(low)
    return lambda denoised, x: torch.addcmul(denoised * scale, source(denoised), low)


def _dropped(space: NoiseSpace, high: Tensor, low: Tensor, noise: Tensor, source: NoiseSource) -> Move:
    scale = space.scale(low)
    return lambda denoised, x: denoised * scale


def _ddim(space: NoiseSpace, high: Tensor, low: Tensor, noise: Tensor, source: NoiseSource) -> Move:
    """The noise that the latents already hold (arXiv 2010.02502 eq. 12, variance 0)."""
    from_x = low / high
    from_denoised = space.scale(low) - from_x * space.scale(high)
    return lambda denoised, x: torch.addcmul(denoised * from_denoised, x, from_x)


RENOISERS: dict[str, Callable[[NoiseSpace, Tensor, Tensor, Tensor, NoiseSource], Move]] = {
    "fixed": _fixed,
    "fresh": _fresh,
    "none": _dropped,
    "ddim": _ddim,
}


# -- coefficients


def _boundary(levels: Levels, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return consistency scalings for latents as they are here; the published c_skip is for x / sqrt(sigma^2 + 1)."""
    skip, out = boundary_scalings(levels.sigma_to_t(sigma))
    return skip * (sigma**2 + 1).rsqrt(), out


def _per_row(values: Sequence[tuple[Tensor, int]]) -> Tensor:
    return torch.cat([value.expand(rows) for value, rows in values])


def _rows(values: Tensor, dimensions: int) -> Tensor:
    return values.reshape(-1, *[1] * (dimensions - 1))


def _kept_rows(active: Sequence[Group]) -> slice | Tensor:
    """Return the rows of frames that have a step left: a slice when they are the first ones, as in a steady stream."""
    flags = [not g.ending for g in active for _ in range(g.size)]
    count = sum(flags)
    return slice(0, count) if all(flags[:count]) else torch.tensor(flags).nonzero().flatten()


# -- the network call


class Layout(NamedTuple):
    """The rows of a network call: negative ones first, then the frames, then padding to the one shape of `static_rows`."""

    negatives: int
    frames: int
    padding: int


def layout_of(config: StreamConfig, rows: int, entering: int) -> Layout:
    """Return how `rows` frames, of which `entering` take their first step, go into a call: as the guidance asks for."""
    negatives = {"full": rows, "onetime": entering}.get(config.guidance, 0) if config.guided else 0
    return Layout(negatives, rows, max(config.rows - rows - negatives, 0) if config.static_rows else 0)


def prompt_rows(layout: Layout, cond: Any, uncond: Any, active: Sequence[Group]) -> Any:
    """Return one row of conditioning for each row of the call: a frame's own, or the stream's."""
    found = _by_row(cond, [(g.conds, g.size) for g in active])
    if layout.negatives:
        asked = active if layout.negatives == layout.frames else active[:1]
        found = _by_row(uncond, [(g.unconds, g.size) for g in asked]).join(found)
    return found.join(found.take([found.rows - 1] * layout.padding)) if layout.padding else found


def bind_calls(
    model: Denoiser, config: StreamConfig, sigma: Tensor, entering: int, device: torch.device
) -> Callable[[Any, Any, Sequence[Group]], tuple[Network, OwnGuidance | None]]:
    """Return (cond, uncond, groups) -> (network, own guidance) for frames at `sigma` (rows,) on the CPU, of which `entering` enter.

    Under a guidance of the model's own the network is asked only for the negative prompt of entering frames.
    """
    if own_guidance(model) is not None:
        return _bind_own(model, config, sigma, entering, device)
    layout = layout_of(config, len(sigma), entering)
    network = bind_network(model, config, layout, sigma, device)
    return lambda cond, uncond, active: (network(prompt_rows(layout, cond, uncond, active)), None)


def _bind_own(
    model: Denoiser, config: StreamConfig, sigma: Tensor, entering: int, device: torch.device
) -> Callable[[Any, Any, Sequence[Group]], tuple[Network, OwnGuidance]]:
    own, levels = own_guidance(model), to_device(sigma, device)
    assert own is not None

    def with_prompts(cond: Any, uncond: Any, active: Sequence[Group]) -> tuple[Network, OwnGuidance]:
        positive = _by_row(cond, [(g.conds, g.size) for g in active])
        negative = None if uncond is None else _by_row(uncond, [(g.unconds, g.size) for g in active])

        def guided(x: Tensor, estimate: Tensor | None, cfg_scale: float) -> Tensor:
            blocks = (len(x) if estimate is None and cfg_scale != 1 else 0, len(x))
            with sharing(model, blocks) if config.cross_frame else nullcontext():
                return own(x, levels, positive, negative, cfg_scale, estimate)

        def network(x: Tensor) -> Tensor:
            assert negative is not None
            with sharing(model, (len(x),)) if config.cross_frame else nullcontext():
                return model(x, levels[: len(x)], negative.take(range(len(x))))

        return network, guided

    return with_prompts


def bind_network(
    model: Denoiser, config: StreamConfig, layout: Layout, sigma: Tensor, device: torch.device
) -> Callable[[Any], Network]:
    """Return prompts -> (x -> denoised) for frames at `sigma` (rows,) on the CPU, with levels and padding bound."""
    negatives, rows, padding = layout
    bound = _bind(model, torch.cat((sigma[:negatives], sigma, sigma[-1:].expand(padding))), device)

    def with_prompts(cond: Any) -> Network:
        call = _sharing_rows(model, bound(cond), (negatives, rows)) if config.cross_frame else bound(cond)
        return call if not padding else lambda x: call(torch.cat((x, x[-1:].expand(padding, *x.shape[1:]))))[:-padding]

    return with_prompts


def _by_row(default: Any, groups: Sequence[tuple[list[Any] | None, int]]) -> Any:
    """Return one row of conditioning per frame: its own, or the stream's."""
    if all(own is None for own, _ in groups):
        return default.expand(sum(size for _, size in groups))
    rows = [default if c is None else c for own, size in groups for c in (own or [None] * size)]
    return rows[0].join(*rows[1:]) if len(rows) > 1 else rows[0]


def _sharing_rows(model: Denoiser, call: Network, blocks: tuple[int, int]) -> Network:
    def network(x: Tensor) -> Tensor:
        with sharing(model, blocks):
            return call(x)

    return network


def _bind(model: Denoiser, sigma: Tensor, device: torch.device) -> Callable[[Any], Network]:
    """Return cond -> (x -> denoised); a model that can prepare its levels once (`bind_levels`) does so."""
    bind = getattr(model, "bind_levels", None)
    if bind is not None:
        return bind(sigma)
    sigma = to_device(sigma, device)
    return lambda cond: lambda x: model(x, sigma, cond)
