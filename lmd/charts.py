"""The pictures of this technique: schedules, losses, influence and stretch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .influence import InfluenceProfile
from .mask_schedule import MaskSchedule
from .plots import SIGNED, Line, below, beside, heat_map, line_chart, tiles
from .stretch import StretchMap


def schedule_chart(schedule: MaskSchedule) -> Any:
    """Return the masked share over the steps above the masks themselves."""
    numbers = list(range(1, len(schedule.ratios) + 1))
    measured = schedule.masks.flatten(1).mean(1).tolist()
    lines = [Line("asked for", numbers, schedule.ratios), Line("in whole patches", numbers, measured)]
    chart = line_chart(lines, "Masked share", "step", "share")
    return below(chart, tiles(schedule.masks, [f"{m:.0%}" for m in measured], "Masks (blue = masked)"))


def loss_chart(losses: Sequence[float], total: int, start: int = 0) -> Any:
    """Return the loss from step `start` on, each point the mean of a thirtieth of it, as a share of the variance."""
    width = max(1, len(losses) // 30)
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    x = [start + min((i + 0.5) * width, len(losses)) for i in range(len(parts))]
    line = Line("loss", x, [sum(p) / len(p) for p in parts])
    title = f"Error on masked patches, step {start + len(losses)} of {total}"
    return line_chart([line], title, "step", "mean squared error / variance")


def influence_chart(profile: InfluenceProfile, unit: str = "cells") -> Any:
    """Return difference against distance for up to five steps, reach against step, and the last step's heat map."""
    count = len(profile.mean)
    shown = sorted({round(i * (count - 1) / 4) for i in range(5)})
    distance = profile.distance.tolist()
    lines = [Line(f"step {i + 1}", distance, profile.mean[i].tolist()) for i in shown]
    marks = [(float(profile.reach_e[-1]), "1/e"), (float(profile.reach_10[-1]), "10 %")]
    chart = line_chart(
        lines, "Mean difference against distance", f"distance to the change ({unit})", "mean |difference|", marks=marks
    )
    heat = profile.heat[-1]
    picture = heat_map(heat, "Difference at the last step", 0.0, float(heat.max()) or 1.0, side=330)
    if count == 1:
        return beside(chart, picture)
    steps = list(range(1, count + 1))
    reach = [Line("to 1/e", steps, profile.reach_e.tolist()), Line("to 10 %", steps, profile.reach_10.tolist())]
    over = line_chart(reach, "Reach against step (gap: never falls so far)", "step", f"reach ({unit})", (640, 300))
    return below(beside(chart, picture), over)


def influence_heat_maps(profile: InfluenceProfile) -> list[Any]:
    """Return one heat map a step, all on one scale and of one size."""
    high = float(profile.heat.max()) or 1.0
    return [heat_map(heat, f"Difference at step {i}", 0.0, high) for i, heat in enumerate(profile.heat, 1)]


def influence_report(profile: InfluenceProfile, unit: str = "cells") -> str:
    """Return one line for each step."""

    def text(value: float) -> str:
        return f"{value:.2f}" if math.isfinite(value) else "beyond the picture"

    rows = zip(
        profile.reach_e.tolist(), profile.reach_10.tolist(), profile.outside.tolist(), profile.mean[:, 0].tolist()
    )
    return "\n".join(
        f"step {i}: reach {text(e)} {unit} to 1/e, {text(ten)} to 10 %; {outside:.0%} of the difference lies outside; "
        f"mean inside {inside:.4g}"
        for i, (e, ten, outside, inside) in enumerate(rows, 1)
    )


def stretch_charts(result: StretchMap, under: Tensor | None = None) -> list[Any]:
    """Return one map a row, all on one scale: red is stretched, blue is squeezed in every direction, folds are outlined.

    `under` (B, H, W, 3) are pictures that shine through.
    """
    # Near a fold the stretch has no bound: beyond a factor of 4.5 colours saturate.
    limit = min(max(float(result.stretch.abs().amax((1, 2)).median()), 0.1), 1.5)
    pictures = [None] * len(result.stretch) if under is None else list(under)
    return [
        heat_map(
            stretch, f"log stretch; {float(fold.float().mean()):.1%} folds", -limit, limit, SIGNED, fold, under=picture
        )
        for stretch, fold, picture in zip(result.stretch, result.fold, pictures)
    ]


def stretch_report(result: StretchMap) -> str:
    """Return one line for each map."""
    return "\n".join(
        f"map {i}: largest stretch x{float(s.max().exp()):.2f}, median x{float(s.median().exp()):.2f}; "
        f"{float(f.float().mean()):.2%} of the cells fold"
        for i, (s, f) in enumerate(zip(result.stretch, result.fold), 1)
    )
