"""The charts of a search and of a comparison, as IMAGE (1, H, W, 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.charts import ACCENT, INK, MUTED, SOFT, figure, legend, log_scale, points, spread, styled, to_image
from .comparison import Comparison, Interval
from .engine import SearchStep

LETTERS = 21  # pixels: a node shows these charts at less than half their size


def search_chart(
    step: SearchStep, best: Sequence[float], stock: Mapping[str, Sequence[float]],
    profile: Sequence[tuple[int, float]] = (), calls: int = 0,
) -> Tensor:  # fmt: skip
    """Return the state of a search: best score by evaluation against the stock schedules, and the best levels so far.

    Args:
        step: the latest progress.
        best: levels of the best candidate so far, with their terminal.
        stock: levels of stock schedules by name, drawn in grey.
        profile: (network calls, error) of each budget, in a panel of its own, where `calls` is the one that was searched.
    """
    drawn = figure(1400 if profile else 960, 500)
    panels = drawn.subplots(1, 3 if profile else 2, width_ratios=(1.15, 1, 1) if profile else (1.15, 1))
    _history(panels[0], step)
    _levels(panels[1], best, stock)
    if profile:
        _profile(panels[2], profile, calls)
    return to_image(drawn)


def _profile(axes: Any, profile: Sequence[tuple[int, float]], calls: int) -> None:
    styled(axes, "fewer or more calls", "calls of the model", "difference to the full run", LETTERS)
    counts, errors = [n for n, _ in profile], [100 * error for _, error in profile]
    axes.plot(counts, errors, "o-", color=MUTED, linewidth=points(3), markersize=points(9))
    for count, error in zip(counts, errors):
        chosen = count == calls
        if chosen:
            axes.plot(count, error, "o", color=ACCENT, markersize=points(13))
        axes.annotate(f"{error:.2g} %", (count, error), (6, 6), textcoords="offset points", fontsize=points(LETTERS * 0.85),
                      color=ACCENT if chosen else SOFT)  # fmt: skip
    _extent(axes.yaxis, errors)
    axes.set_xlim(min(counts) - 0.6, max(counts) + 2)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)


def _history(axes: Any, step: SearchStep) -> None:
    known = f"best score {step.best:.4g}" if math.isfinite(step.best) else "searching"
    styled(axes, known, "evaluations", "score (lower is better)", LETTERS)
    if not step.history:
        return
    counts, values = [n for n, _ in step.history], [v for _, v in step.history]
    last = max(counts[-1], step.evaluated, 2)
    shown = sorted((s, n) for n, s in step.baselines.items() if math.isfinite(s))[:3]
    axes.step([*counts, last], [*values, values[-1]], where="post", color=ACCENT, linewidth=points(4))
    axes.plot(last, values[-1], "o", color=ACCENT, markersize=points(11))
    axes.set_xlim(0, last * 1.03)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    _extent(axes.yaxis, [*values, *(s for s, _ in shown)])
    # Places in the axes' own height, where letters have one size on any scale.
    at = axes.transData + axes.transAxes.inverted()
    heights = [float(at.transform((0, score))[1]) for score, _ in shown]
    for (score, name), height in zip(shown, spread(heights, 0.085)):
        axes.axhline(score, color=MUTED, linewidth=points(1.5), zorder=1)
        axes.text(0.98, height + 0.005, f"{name} {score:.3g}", fontsize=points(LETTERS * 0.85), color=SOFT,
                  ha="right", va="bottom", transform=axes.transAxes)  # fmt: skip


def _extent(axis: Any, values: Sequence[float], room: float = 0.08) -> None:
    """Set an axis to hold `values`, logarithmic when all are above 0."""
    low, high = min(values), max(values)
    if low > 0:
        ratio = max(high / low, 1.05)
        low, high = low * ratio**-room, high * ratio**room
        log_scale(axis, low, high)
    else:
        low, high = low - room * ((high - low) or 1), high + room * ((high - low) or 1)
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)


def _levels(axes: Any, best: Sequence[float], stock: Mapping[str, Sequence[float]]) -> None:
    styled(axes, "noise levels", "step", "sigma", LETTERS)
    curves = [[s for s in levels if s > 0] for levels in stock.values()]
    shown = [s for s in best if s > 0]
    values = [s for curve in [*curves, shown] for s in curve]
    if not values:
        return
    for i, curve in enumerate(curves):
        axes.plot(range(1, len(curve) + 1), curve, color=MUTED, linewidth=points(1.5), label="" if i else "stock")
    axes.plot(range(1, len(shown) + 1), shown, "o-", color=ACCENT, linewidth=points(4), markersize=points(10), label="best")  # fmt: skip
    _extent(axes.yaxis, values)
    count = max(len(curve) for curve in [*curves, shown])
    axes.set_xlim(0.7, count + (0.9 if count <= 8 else 0.3))
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
    if len(shown) <= 8:
        for i, sigma in enumerate(shown, 1):
            axes.annotate(f"{sigma:.3g}", (i, sigma), (7, 5), textcoords="offset points", color=INK,
                          fontsize=points(LETTERS * 0.85))  # fmt: skip
    if curves:
        legend(axes, LETTERS, loc="lower left")


def comparison_chart(comparison: Comparison) -> Tensor:
    """Return one panel per objective: a point for each schedule with its 95 % interval, best first, numbers at the right."""
    rows, size = comparison.rows, 19
    panels = len(comparison.objectives)
    drawn = figure(300 + 460 * panels, 150 + 34 * len(rows))
    for p, (axes, objective) in enumerate(zip(drawn.subplots(1, panels, squeeze=False)[0], comparison.objectives)):
        styled(axes, objective, "", "", size)
        axes.set_yticks(range(len(rows)), [_label(r.name, r.nfe) for r in rows] if p == 0 else [""] * len(rows))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        _dots(axes, [row.scores[objective] for row in rows], size)
    note = f"lower is better; {comparison.pairs} pairs x {comparison.repeats} repeats"
    note += ", bars: 95 %" if comparison.repeats > 1 else ""
    drawn.supxlabel(note, fontsize=points(size * 0.9), color=SOFT)
    return to_image(drawn)


def _label(name: str, nfe: int) -> str:
    short = name if len(name) <= 24 else name[:22] + ".."
    return f"{short}  ({nfe} calls)"


def _dots(axes: Any, cells: Sequence[Interval], size: float) -> None:
    means = [c.mean for c in cells if math.isfinite(c.mean)]
    if means:
        _extent(axes.xaxis, means, 0.1)
    best = min(means, default=math.inf)
    left = axes.get_xlim()[0]
    for i, cell in enumerate(cells):
        finite = math.isfinite(cell.mean)
        colour = ACCENT if cell.mean == best else SOFT
        text = f"{cell.mean:.3g}" if finite else "not finite"
        axes.text(1.03, i, text, transform=axes.get_yaxis_transform(), fontsize=points(size * 0.93), va="center",
                  color=colour if finite else SOFT, weight="bold" if cell.mean == best else "normal")  # fmt: skip
        if not finite:
            continue
        axes.plot([left, cell.mean], [i, i], color=MUTED, linewidth=points(1.5), zorder=1)
        if math.isfinite(cell.half):
            ends = [max(cell.mean - cell.half, left), cell.mean + cell.half]
            axes.plot(ends, [i, i], color=colour, linewidth=points(4), alpha=0.45, solid_capstyle="butt")
        axes.plot(cell.mean, i, "o", color=colour, markersize=points(12))
