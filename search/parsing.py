"""Strict reading of a schedule's JSON: every refusal names the field."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np

from ..core.checks import printable, shown
from ..core.reuse import REUSE_KINDS, ROUNDING, ReuseSpan

METADATA_KEY = "slipstream_schedule"
MAX_BYTES = 1 << 20
MAX_LEVELS = 1001
MAX_SIGMA = 1e5
MODEL_FIELDS = ("name", "hash", "class", "prediction", "sigma_min", "sigma_max", "shift")
SEARCH_TEXTS = ("method", "objective", "job")
SEARCH_NUMBERS = ("evaluations", "calls", "seconds", "seed", "pairs", "holdout_pairs")


class ScheduleError(ValueError):
    """A schedule that cannot be used; the message names the field that is wrong."""


def from_metadata(path: pathlib.Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except SafetensorError as error:
        raise ScheduleError(f"Expected a safetensors file, but got what cannot be read as one ({error}).") from error
    if text is not None and len(text) > MAX_BYTES:
        raise too_large(len(text))
    if text is None:
        raise ScheduleError(f"Expected {METADATA_KEY!r} in the metadata of the safetensors file, but it has none.")
    return parse(text)


def too_large(size: int) -> ScheduleError:
    return ScheduleError(f"Expected a file of at most {MAX_BYTES} bytes, but got {size}. This is not a schedule file.")


def parse(text: str | bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ScheduleError(f"Expected finite numbers in the schedule file, but got {constant}.")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ScheduleError):
            raise
        raise ScheduleError(
            f"Expected the schedule file to be valid JSON, but got an error in it: {error}. Save it again."
        ) from error


def check_levels(levels: Sequence[float]) -> None:
    if not isinstance(levels, (tuple, list)) or not all(isinstance(sigma, Real) for sigma in levels):
        raise ScheduleError(f"Expected `sigmas` as a list of numbers, but got {shown(levels)}.")
    if not 2 <= len(levels) <= MAX_LEVELS:
        raise ScheduleError(f"Expected `sigmas` with 2 to {MAX_LEVELS} levels, but got {len(levels)}.")
    for i, sigma in enumerate(levels):
        if not 0 <= sigma <= MAX_SIGMA:  # false for NaN
            raise ScheduleError(f"Expected `sigmas` between 0 and {MAX_SIGMA:g}, but got {shown(sigma)} at {i}.")
        # Samplers take them in float32, where close levels are one.
        if i and np.float32(sigma) >= np.float32(levels[i - 1]):
            raise ScheduleError(
                f"Expected `sigmas` that descend strictly in float32, but got {levels[i - 1]} then {sigma} at {i}."
            )


def typed_levels(text: str, name: str = "sigmas") -> tuple[float, ...]:
    """Return the levels of a list such as "1.0, 0.65, 0.44", with the 0 at its end that people leave out."""
    parts = text.replace(",", " ").split()
    try:
        levels = tuple(float(part) for part in parts)
    except ValueError:
        raise ScheduleError(f"Expected `{name}` as numbers separated by commas, but got {text!r:.60}.") from None
    levels = levels if not levels or levels[-1] == 0 else (*levels, 0.0)
    check_levels(levels)
    return levels


def check_length(data: dict[str, Any], levels: Sequence[float]) -> None:
    steps = whole(data["steps"], "steps", 1, MAX_LEVELS - 1)
    if steps != len(levels) - 1:
        raise ScheduleError(
            f"Expected `steps` {len(levels) - 1} for {len(levels)} sigmas (the last is where it ends), but got {steps}."
        )
    if data.get("logsnr") is None:
        return
    if len(a_list(data["logsnr"], "logsnr")) != len(levels):
        raise ScheduleError(f"Expected `logsnr` with {len(levels)} values like sigmas, but got {len(data['logsnr'])}.")
    numbers([value for value in data["logsnr"] if value is not None], "logsnr")  # None is infinite


def number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ScheduleError(f"Expected `{name}` as a number, but got {value!r:.60}.")
    finite = abs(value) < 1e300  # false for NaN; a whole number in JSON may be too large for a float
    if not finite or not low <= value <= high:
        raise ScheduleError(
            f"Expected `{name}` as a finite number between {low:g} and {high:g}, but got {value!r:.30}."
        )
    return float(value)


def whole(value: Any, name: str, low: int, high: int) -> int:
    found = number(value, name, low, high)
    if found != int(found):
        raise ScheduleError(f"Expected `{name}` as a whole number, but got {value}.")
    return int(found)


def a_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ScheduleError(f"Expected `{name}` as a list, but got {type(value).__name__}.")
    if len(value) > MAX_LEVELS:
        raise ScheduleError(f"Expected `{name}` with at most {MAX_LEVELS} entries, but got {len(value)}.")
    return value


def numbers(value: Any, name: str) -> tuple[float, ...]:
    return tuple(number(v, name) for v in a_list(value, name))


def text(value: Any, name: str, optional: bool = False) -> str | None:
    if value is None and optional:
        return None
    if not isinstance(value, str) or len(value) > 2000:
        raise ScheduleError(f"Expected `{name}` as a text of at most 2000 characters, but got {value!r:.60}.")
    return printable(value)


def mapping(value: Any, name: str) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise ScheduleError(f"Expected `{name}` as an object or null, but got {type(value).__name__}.")
    return value


def model_of(value: Any) -> dict[str, Any]:
    model = mapping(value, "model") or {}
    for name in model:
        if name not in MODEL_FIELDS:
            raise ScheduleError(
                f"Expected no field `model.{printable(name):.60}`, but got one. A model has {', '.join(MODEL_FIELDS)}."
            )
    for name in ("sigma_min", "sigma_max"):
        if name not in model:
            raise ScheduleError(f"Expected `model.{name}`, but it is missing.")
        number(model[name], f"model.{name}", 0, MAX_SIGMA)
    if model.get("shift") is not None:
        number(model["shift"], "model.shift", 0, 1000)
    texts: dict[str, Any] = {
        name: text(model[name], f"model.{name}", optional=True)
        for name in ("name", "hash", "class", "prediction")
        if name in model
    }
    return {**model, **texts}


def objective_of(value: Any) -> dict[str, Any] | None:
    """Return the checked {"id", "value", "baselines": {name: value}} of a searched schedule."""
    objective = mapping(value, "objective")
    if objective is None:
        return None
    _check_fields(objective, "objective", ("id", "value"), ("baselines",))
    baselines = mapping(objective.get("baselines"), "objective.baselines") or {}
    return {
        "id": text(objective["id"], "objective.id"),
        "value": number(objective["value"], "objective.value"),
        "baselines": {
            text(name, "objective.baselines"): number(score, f"objective.baselines.{printable(name):.60}")
            for name, score in baselines.items()
        },
    }


def search_of(value: Any) -> dict[str, Any] | None:
    """Return the checked record of how a schedule was searched: texts and numbers by name."""
    record = mapping(value, "search")
    if record is None:
        return None
    _check_fields(record, "search", (), SEARCH_TEXTS + SEARCH_NUMBERS)
    return {
        name: text(v, f"search.{name}", optional=True) if name in SEARCH_TEXTS else v if v is None else _plain(v, name)
        for name, v in record.items()
    }


def _plain(value: Any, name: str) -> float | int:
    found = number(value, f"search.{name}")
    return value if isinstance(value, int) else found


def _check_fields(data: dict[str, Any], name: str, required: Sequence[str], optional: Sequence[str]) -> None:
    for field in required:
        if field not in data:
            raise ScheduleError(f"Expected `{name}.{field}`, but it is missing.")
    for field in data:
        if field not in (*required, *optional):
            raise ScheduleError(f"Expected no field `{name}.{printable(field):.60}`, but got one. Remove it.")


def masks_of(value: Any) -> list[tuple[float, float, tuple[str, ...]]]:
    """Return (sigma_high, sigma_low, blocks) of each checked layer mask."""
    return [
        (high, low, tuple(text(s, f"{name}.skip") or "" for s in a_list(entry["skip"], f"{name}.skip")))
        for name, entry, high, low in _spans(value, "masks", ("skip",))
    ]


def reuse_of(value: Any, levels: Sequence[float]) -> tuple[ReuseSpan, ...]:
    """Return the checked reuse of a schedule with these `levels`: the first step has nothing to reuse, so it makes its call."""
    spans = []
    for name, entry, high, low in _spans(value, "reuse", ("kind",), ("weights",)):
        kind, weights = entry["kind"], numbers(entry.get("weights", []), f"{name}.weights")
        if kind not in REUSE_KINDS:
            raise ScheduleError(f"Expected `{name}.kind` one of {', '.join(REUSE_KINDS)}, but got {kind!r:.60}.")
        try:
            spans.append(ReuseSpan(high, low, kind, weights))
        except ValueError as error:
            raise ScheduleError(f"{error} It is `{name}`.") from None
    for i, span in enumerate(spans):
        if not any(span.holds(sigma) for sigma in levels[:-1]):
            raise ScheduleError(
                f"Expected `reuse[{i}]` around a level of the schedule, but got sigma {span.sigma_high:g} to {span.sigma_low:g}. "
                "Remove it."
            )
    ordered = sorted(spans, key=lambda span: -span.sigma_high)
    for before, after in zip(ordered, ordered[1:]):
        if after.sigma_high > before.sigma_low * (1 + ROUNDING):
            raise ScheduleError(
                f"Expected `reuse` without overlaps, but got one from sigma {before.sigma_high:g} to {before.sigma_low:g} and one "
                f"from {after.sigma_high:g}. Let each level be in one of them."
            )
    if any(span.holds(levels[0]) and span.kind != "fitted" for span in spans):
        raise ScheduleError(
            f"Expected `reuse` below the first level {levels[0]:g}, but got it there. The first step has nothing to reuse."
        )
    return tuple(spans)


def _spans(
    value: Any, field: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any], float, float]]:
    """Yield (name for messages, the entry, sigma_high, sigma_low) of each entry of a list of sigma intervals."""
    needed = ("sigma_high", "sigma_low", *needed)
    for i, entry in enumerate(a_list(value, field)):
        name = f"{field}[{i}]"
        if not isinstance(entry, dict) or not {*needed} <= {*entry} <= {*needed, *optional}:
            raise ScheduleError(
                f"Expected `{name}` as an object with {', '.join(needed[:-1])} and {needed[-1]}, but got {entry!r:.60}."
            )
        high = number(entry["sigma_high"], f"{name}.sigma_high", 0, MAX_SIGMA)
        low = number(entry["sigma_low"], f"{name}.sigma_low", 0, MAX_SIGMA)
        if low >= high:
            raise ScheduleError(f"Expected `{name}` with sigma_low below sigma_high, but got {low} and {high}.")
        yield name, entry, high, low
