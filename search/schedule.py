"""A schedule as a file: levels, layer masks, and what they were searched for. Loading is strict, every error names its field."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_integer, printable
from ..core.files import save_tensors, write_beside
from ..core.layers import LayerMask
from ..core.reuse import ReuseSpan
from . import parsing
from .parsing import MAX_BYTES, MAX_LEVELS, METADATA_KEY, ScheduleError

FORMAT = "slipstream-schedule"
# Version 2 adds `reuse`; a schedule without it is written as version 1, which older releases read.
VERSIONS = (1, 2)
REQUIRED = ("format", "version", "sigmas", "model", "sampler", "cfg", "steps", "nfe")
OPTIONAL = ("name", "timesteps", "logsnr", "masks", "reuse", "objective", "search", "source", "warnings")


@dataclass(frozen=True)
class Schedule:
    """Noise levels of one sampling with their provenance.

    Attributes:
        levels: descending sigmas, the terminal level included: K + 1 for K steps.
        model: name, hash, class, prediction, sigma_min, sigma_max, shift of the model it belongs to.
        sampler, cfg_scale: what it was searched with; None = not tied to one.
        nfe: denoiser calls per sample (a call with cfg counts once).
        timesteps: training timesteps of the positive levels, None for a model without.
        masks: blocks to skip, by interval of sigma.
        reuse: steps that reuse earlier network calls, by interval of sigma.
        objective: {"id", "value", "baselines": {name: value}} on held-out pairs; None for a preset.
        search: method, evaluations, calls, seconds, seed, pairs; None for a preset.
        source: where a preset was published.
    """

    levels: tuple[float, ...]
    model: dict[str, Any]
    sampler: str | None = None
    cfg_scale: float | None = None
    nfe: int = 0
    name: str = ""
    timesteps: tuple[float, ...] | None = None
    masks: tuple[LayerMask, ...] = ()
    reuse: tuple[ReuseSpan, ...] = ()
    objective: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    source: str = ""
    warnings: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        parsing.check_levels(self.levels)
        if self.timesteps is not None and len(self.timesteps) != sum(s > 0 for s in self.levels):
            raise ScheduleError(
                f"Expected `timesteps` with one for each of the {sum(s > 0 for s in self.levels)} levels above 0, "
                f"but got {len(self.timesteps)}."
            )

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @property
    def sigmas(self) -> Tensor:
        """The levels as a float32 tensor (steps + 1,): what samplers take."""
        return torch.tensor(self.levels, dtype=torch.float32)

    @property
    def logsnr(self) -> tuple[float | None, ...]:
        """Log signal-to-noise ratio of each level, None for infinite ones: what stays equal across noise conventions."""
        values = (_logsnr(s, self.is_flow) for s in self.levels)
        return tuple(v if math.isfinite(v) else None for v in values)

    @property
    def is_flow(self) -> bool:
        return self.model.get("prediction") == "flow"

    def resample(self, steps: int) -> Schedule:
        """Return a schedule of another length: linear in log-SNR over the position, first, last positive and terminal level exact."""
        check_integer("steps", steps, 1, MAX_LEVELS - 1)
        if self.reuse:
            raise ValueError(
                f"Expected a schedule without call reuse to resample, but got one of {self.nfe} calls in {self.steps} steps. "
                "Search again with the number of calls that you want."
            )
        ends_at_zero = self.levels[-1] == 0
        known = self.levels[:-1] if ends_at_zero else self.levels
        count = steps if ends_at_zero else steps + 1
        if count > 1 and len(known) < 2:
            raise ValueError(
                f"Expected a schedule of at least 2 steps to resample to {steps}, but got {self.steps}. Search more steps."
            )
        levels = _interpolate(known, count, self.is_flow) + ((0.0,) if ends_at_zero else ())
        timesteps = None
        note = f"Resampled from {self.steps} to {steps} steps: measured scores do not hold for it."
        warnings = self.warnings if steps == self.steps else (*self.warnings, note)
        if steps == self.steps:
            timesteps = self.timesteps
        nfe = round(self.nfe / self.steps * steps)
        return replace(self, levels=levels, timesteps=timesteps, nfe=nfe, warnings=warnings)

    def mismatches(
        self, model: Mapping[str, Any] | None = None, sampler: str | None = None, cfg_scale: float | None = None
    ) -> list[str]:
        """Return one sentence for each way in which it is about to be used for something else than it was searched for."""
        found = []
        if model is not None:
            if self.model.get("hash") and model.get("hash") and self.model["hash"] != model["hash"]:
                made_for, given = (m.get("name") or m["hash"][:8] for m in (self.model, model))
                found.append(
                    (
                        f"the schedule was searched for model {made_for!r}, this is {given!r}"
                        if made_for != given
                        else f"the schedule was searched for other weights of {given!r} (another checkpoint, LoRA or strength)"
                    )
                    + ": search again for the best result"
                )
            top, own, made = model.get("sigma_max"), self.levels[0], self.model.get("sigma_max")
            if top and own > top * 1.001:
                found.append(f"the schedule starts at sigma {own:.4g}, above this model's {top:.4g}")
            elif top and made and made < 0.99 * top:
                found.append(
                    f"the schedule was made for noise levels up to {made:.4g}, this model's go up to {top:.4g}"
                )
        if sampler is not None and self.sampler not in (None, sampler):
            found.append(f"the schedule was searched with sampler {self.sampler!r}, not {sampler!r}")
        if cfg_scale is not None and self.cfg_scale is not None and abs(cfg_scale - self.cfg_scale) > 0.01:
            found.append(f"the schedule was searched at cfg {self.cfg_scale:g}, not {cfg_scale:g}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format": FORMAT,
            "version": 2 if self.reuse else 1,
            "name": self.name,
            "model": self.model,
            "sampler": self.sampler,
            "cfg": self.cfg_scale,
            "steps": self.steps,
            "nfe": self.nfe,
            "sigmas": list(self.levels),
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "logsnr": list(self.logsnr),
            "masks": [{"sigma_high": m.sigma_high, "sigma_low": m.sigma_low, "skip": list(m.skip)} for m in self.masks],
            **({"reuse": [span.to_dict() for span in self.reuse]} if self.reuse else {}),
            "objective": self.objective,
            "search": self.search,
            "source": self.source,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Schedule:
        """Return a checked schedule from its JSON form; raises ScheduleError that names the field."""
        if not isinstance(data, dict):
            raise ScheduleError(f"Expected the schedule file to hold a JSON object, but got {type(data).__name__}.")
        if data.get("format") != FORMAT:
            raise ScheduleError(
                f"Expected `format` {FORMAT!r}, but got {data.get('format')!r:.60}. This is not a schedule file."
            )
        if data.get("version") not in VERSIONS or isinstance(data["version"], bool):
            raise ScheduleError(
                f"Expected `version` 1 or 2, but got {data.get('version')!r:.60}. Update Slipstream or save the schedule again."
            )
        for name in REQUIRED:
            if name not in data:
                raise ScheduleError(f"Expected `{name}`, but it is missing. This schedule file is not complete.")
        for name in data:
            if name not in REQUIRED + OPTIONAL:
                raise ScheduleError(f"Expected no field `{printable(name):.60}`, but got one. Remove it.")
        levels = parsing.numbers(data["sigmas"], "sigmas")
        parsing.check_levels(levels)
        parsing.check_length(data, levels)
        return cls(
            levels=levels,
            model=parsing.model_of(data["model"]),
            sampler=parsing.text(data["sampler"], "sampler", optional=True),
            cfg_scale=None if data["cfg"] is None else parsing.number(data["cfg"], "cfg", -1000, 1000),
            nfe=parsing.whole(data["nfe"], "nfe", 0, 10 * MAX_LEVELS),
            name=parsing.text(data.get("name", ""), "name") or "",
            timesteps=None if data.get("timesteps") is None else parsing.numbers(data["timesteps"], "timesteps"),
            masks=tuple(LayerMask(*m) for m in parsing.masks_of(data.get("masks", []))),
            reuse=parsing.reuse_of(data.get("reuse", []), levels),
            objective=parsing.objective_of(data.get("objective")),
            search=parsing.search_of(data.get("search")),
            source=parsing.text(data.get("source", ""), "source") or "",
            warnings=tuple(
                parsing.text(w, "warnings") or "" for w in parsing.a_list(data.get("warnings", []), "warnings")
            ),
        )

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write JSON, or for a .safetensors path one tensor "sigmas" with the JSON in its metadata; returns the path."""
        path = pathlib.Path(path)
        with write_beside(path) as file:
            if path.suffix == ".safetensors":
                save_tensors({"sigmas": self.sigmas}, file, {METADATA_KEY: json.dumps(self.to_dict(), allow_nan=False)})
            else:
                file.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Schedule:
        """Read a schedule from JSON or from the metadata of any safetensors file; raises ScheduleError or OSError."""
        path = pathlib.Path(path)
        if path.suffix == ".safetensors":
            return cls.from_dict(parsing.from_metadata(path))
        if path.stat().st_size > MAX_BYTES:
            raise parsing.too_large(path.stat().st_size)
        return cls.from_dict(parsing.parse(path.read_bytes()))


def embed(schedule: Schedule, source: str | pathlib.Path, target: str | pathlib.Path) -> None:
    """Write a copy of the safetensors file `source` that carries `schedule` in its metadata."""
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        metadata = {**(file.metadata() or {}), METADATA_KEY: json.dumps(schedule.to_dict(), allow_nan=False)}
        with write_beside(target) as beside:
            save_tensors({key: file.get_tensor(key) for key in file.keys()}, beside, metadata)


def _logsnr(sigma: float, flow: bool) -> float:
    if sigma <= 0:
        return math.inf
    signal = 1 - sigma if flow else 1.0
    return -math.inf if signal <= 0 else 2 * math.log(signal / sigma)


def _interpolate(levels: Sequence[float], count: int, flow: bool) -> tuple[float, ...]:
    if count == 1:
        return (levels[0],)
    # A flow's first level has no signal at all: its place in log-SNR is taken just below 1, its value stays exact.
    known = [_logsnr(min(s, 1 - 1e-4) if flow else s, flow) for s in levels]
    found = []
    for i in range(1, count - 1):
        position = i * (len(levels) - 1) / (count - 1)
        low = min(int(position), len(levels) - 2)
        value = known[low] + (position - low) * (known[low + 1] - known[low])
        ratio = math.exp(-value / 2)
        found.append(ratio / (1 + ratio) if flow else ratio)
    return (levels[0], *found, levels[-1])
