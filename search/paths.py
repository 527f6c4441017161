"""The way to the pixels that a search measures: model, sampler, cfg and conditioning, exactly as the user will sample."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import check_choice, check_integer, check_seed
from ..core.denoiser import Conditioning, Denoiser
from ..core.guidance import CFG
from ..core.identity import Identity, has_identity, identify, weights_digest
from ..core.layers import Layer, LayerMask, LayerModel, skipped_at
from ..core.noise import SeededNoise, StackedNoise
from ..core.reuse import ReuseSpan, reusing
from ..core.samplers import SAMPLERS, sample, start_scale
from ..core.schedules import ALIGN_YOUR_STEPS, SCHEDULES, FlowLevels, align_your_steps, make_sigmas, table_of


@dataclass
class Trajectory:
    """What a denoiser saw and said during one sampling: `states` (N, B, ...) at `sigmas` (N,) and `denoised` (N, B, ...)."""

    sigmas: list[float]
    states: list[Tensor]
    denoised: list[Tensor]

    def record(self, x: Tensor, sigma: float, denoised: Tensor) -> None:
        """Keep the last call at each level: solvers that look ahead come back to it with the true state."""
        if self.sigmas and abs(self.sigmas[-1] - sigma) <= 1e-6 * sigma:
            self.sigmas.pop(), self.states.pop(), self.denoised.pop()
        self.sigmas.append(sigma)
        self.states.append(x.detach().float().cpu())
        self.denoised.append(denoised.detach().float().cpu())


class SamplingPath(Protocol):
    """One way to sample; a pair is a number that stands for its noise seed and its conditioning.

    `calls` counts network calls, `evaluations` denoiser calls: one for each level a batch visits, with or without cfg.
    """

    @property
    def calls(self) -> int: ...

    @property
    def evaluations(self) -> int: ...

    def sample(
        self, sigmas: Tensor, pairs: Sequence[int], masks: Sequence[LayerMask] = (), watch: Trajectory | None = None,
        reuse: Sequence[ReuseSpan] = (),
    ) -> Tensor:  # fmt: skip
        """Return final latents (len(pairs), C, H, W) on the CPU; the same pair always starts from the same noise."""
        ...

    def table(self) -> Tensor:
        """Return the model's levels, ascending (T,)."""
        ...

    def stock(self, steps: int) -> dict[str, Tensor]:
        """Return the schedules that a user would take otherwise, by name."""
        ...

    def layers(self) -> tuple[Layer, ...]:
        """Return the blocks that can be skipped; raises ValueError when the model has none."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what the result depends on, as JSON: model {name, hash, ...}, sampler, cfg, size, conditioning, seed, and the
        fields of `sampling_fields`."""
        ...


class ModelPath:
    """A library model with a core sampler.

    Args:
        model: the `Denoiser`.
        cond, uncond: conditioning; pair i takes row i modulo the rows. `uncond` may be one row.
        size: latents' (channels, height, width).
        sampler: a name in `core.SAMPLERS`.
        cfg_scale: guidance.
        seed: where the noise of all pairs comes from.
        batch: most pairs in one network call; halved when the device runs out of memory.
        name: the model's name for the schedule file.
    """

    def __init__(
        self, model: Denoiser, cond: Conditioning, uncond: Conditioning | None = None,
        size: tuple[int, int, int] = (4, 16, 16), sampler: str = "euler", cfg_scale: float = 1.0, seed: int = 0,
        batch: int = 16, name: str = "",
    ) -> None:  # fmt: skip
        check_choice("sampler", sampler, SAMPLERS)
        check_integer("batch", batch, 1)
        self.model, self.cond, self.uncond, self.size = model, cond, uncond, tuple(size)
        self.sampler, self.cfg_scale, self.batch, self.name = sampler, float(cfg_scale), batch, name
        self.seed = check_seed("seed", seed)
        self.device = getattr(model, "device", torch.device("cpu"))
        self.evaluations = 0

    @property
    def calls(self) -> int:
        return self.model.calls

    @torch.no_grad()
    def sample(
        self, sigmas: Tensor, pairs: Sequence[int], masks: Sequence[LayerMask] = (), watch: Trajectory | None = None,
        reuse: Sequence[ReuseSpan] = (),
    ) -> Tensor:  # fmt: skip
        """See `SamplingPath.sample`."""
        parts = []
        pairs = list(pairs)
        while pairs:
            rows, rest = pairs[: self.batch], pairs[self.batch :]
            try:
                parts.append(self._batch(sigmas, rows, masks, watch, reuse).float().cpu())
                pairs = rest
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch = max(self.batch // 2, 1)
        return torch.cat(parts) if parts else torch.zeros(0, *self.size)

    def _batch(
        self, sigmas: Tensor, pairs: Sequence[int], masks: Sequence[LayerMask], watch: Trajectory | None,
        reuse: Sequence[ReuseSpan],
    ) -> Tensor:  # fmt: skip
        noise = StackedNoise([SeededNoise(self.seed).fork(f"pair {i}") for i in pairs])
        first = float(sigmas[0])
        unit = noise(torch.empty(len(pairs), *self.size, device=self.device))
        x = unit * start_scale(self.model, first)
        guided = CFG(self.model, self._rows(self.cond, pairs), self._uncond_rows(pairs), self.cfg_scale)
        denoise = reusing(self._watched(guided, masks, watch), reuse)
        return sample(self.sampler, denoise, x, sigmas, self.model.space, noise.fork("sampler"))

    def _watched(
        self, guided: CFG, masks: Sequence[LayerMask], watch: Trajectory | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = float(torch.as_tensor(sigma).flatten()[0])
            names = skipped_at(masks, level)
            self.evaluations += 1
            with skipping_of(self.model)(names) if names else nullcontext():
                denoised = guided(x, sigma)
            if watch is not None:
                watch.record(x, level, denoised)
            return denoised

        return denoise

    def _rows(self, cond: Conditioning, pairs: Sequence[int]) -> Conditioning:
        return cond.take([i % cond.rows for i in pairs])

    def _uncond_rows(self, pairs: Sequence[int]) -> Conditioning | None:
        return None if self.uncond is None else self._rows(self.uncond, pairs)

    def table(self) -> Tensor:
        return table_of(self.model.levels)

    def stock(self, steps: int) -> dict[str, Tensor]:
        """The library's schedules and Align Your Steps at this length."""
        found = {name: make_sigmas(name, self.model.levels, steps) for name in SCHEDULES}
        if self.model.levels.sigma_max > 1 and not isinstance(self.model.levels, FlowLevels):
            found |= {name: align_your_steps(self.model.levels, steps, name) for name in ALIGN_YOUR_STEPS}
        return found

    def layers(self) -> tuple[Layer, ...]:
        skipping_of(self.model)
        x = torch.zeros(1, *self.size, device=self.device)
        return self.model.layers(x, torch.full((1,), self.model.sigma_max, device=self.device), self.cond.take([0]))  # type: ignore[attr-defined]

    def identity(self) -> dict[str, Any]:
        return {
            "model": model_identity(self.model, self.name),
            "sampler": self.sampler,
            "cfg": self.cfg_scale,
            "size": list(self.size),
            "conditioning": identify(self.cond, self.uncond).digest[:16],
            "seed": self.seed,
            **sampling_fields(self, {"network": identify(model_state(self.model))}),
        }


def skipping_of(model: Any) -> Callable[..., Any]:
    """Return the model's ability to skip blocks; raises ValueError when it has none."""
    if not isinstance(model, LayerModel):
        raise ValueError(
            f"Expected a model whose blocks can be skipped, but got {type(model).__name__}. Search without layers."
        )
    return model.skipping


def model_state(model: Denoiser[Any]) -> Any:
    """Return what a model's numbers depend on: all that it holds but its counters, or what it says itself."""
    if has_identity(model):
        return model
    return type(model), {k: v for k, v in vars(model).items() if k not in ("calls", "rows")}


def sampling_fields(path: SamplingPath, named: dict[str, Identity]) -> dict[str, Any]:
    """Return fields for `SamplingPath.identity`: the digest of each part, and what stands for parts that cannot be named."""
    fields: dict[str, Any] = {"sampling": {name: found.digest[:16] for name, found in named.items()}}
    unnamed = [text for found in named.values() for text in found.unnamed]
    return {**fields, "unnamed": unnamed, "behaviour": behaviour(path)} if unnamed else fields


def behaviour(path: SamplingPath) -> str:
    """Return a digest of one short sampling of pair 0: what every patch, guider and sampler makes of it together.

    Rounded to a thousandth of its spread, so that one machine gives it again. Never twice the same when it is not finite.
    """
    table = path.table()
    index = torch.tensor([len(table) - 1, 2 * len(table) // 3, len(table) // 3]).unique().flip(0)
    watch = Trajectory([], [], [])
    final = path.sample(torch.cat([table[index].float(), torch.zeros(1)]), [0], watch=watch)
    coarse = []
    for x in (*watch.denoised, final):
        chunks = F.adaptive_avg_pool1d(torch.stack([x.flatten(), x.flatten() ** 2]), min(64, x.numel()))
        coarse.append((chunks / chunks.std(1, keepdim=True).clamp(min=1e-6) * 1000).round())
    found = torch.cat([c.flatten() for c in coarse])
    return identify(found).digest[:16] if bool(found.isfinite().all()) else uuid.uuid4().hex[:16]


def model_identity(model: Denoiser, name: str = "") -> dict[str, Any]:
    """Return name, hash, class, prediction, sigma_min, sigma_max and shift of a model."""
    network = getattr(model, "unet", None)
    network = getattr(network, "_orig_mod", network)  # the same after torch.compile
    return {
        "name": name,
        "hash": weights_digest(network.parameters() if isinstance(network, nn.Module) else [table_of(model.levels)]),
        "class": type(network or model).__name__,
        "prediction": getattr(getattr(model, "prediction", None), "kind", model.space.name),
        "sigma_min": float(model.sigma_min),
        "sigma_max": float(model.sigma_max),
        "shift": getattr(model.levels, "shift", None),
    }
