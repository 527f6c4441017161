"""Charts as IMAGE tensors (1, H, W, 3): the live view of a search, and a comparison. Needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .comparison import Comparison
from .engine import SearchStep

INK, MUTED, ACCENT, SECOND = "#1f2933", "#9aa5b1", "#0b7285", "#c2410c"


def _figure(width: float = 8.0, height: float = 4.0) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Expected matplotlib for a chart, but it is not installed. pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")


def _image(figure: Any) -> Tensor:
    import numpy as np
    from PIL import Image

    data = io.BytesIO()
    figure.savefig(data, format="png")
    data.seek(0)
    pixels = np.array(Image.open(data).convert("RGB"))
    return torch.from_numpy(pixels).float()[None] / 255


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=12, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10, colors=INK)
    axes.grid(True, axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def search_chart(step: SearchStep, best: Sequence[float], stock: Mapping[str, Sequence[float]]) -> Tensor:
    """Return the state of a search: best score by evaluation against the stock schedules, and the best levels so far.

    Args:
        step: the latest progress.
        best: levels of the best candidate so far, with their terminal.
        stock: levels of stock schedules by name, drawn in grey.
    """
    figure = _figure()
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _plain(left, f"best {step.best:.4g}" if math.isfinite(step.best) else "searching")
    counts = [n for n, _ in step.history]
    values = [v for _, v in step.history]
    if values:
        left.step([*counts, max(step.index, counts[-1])], [*values, values[-1]], where="post", color=ACCENT, lw=2.5)
    shown = sorted((s, n) for n, s in step.baselines.items() if math.isfinite(s))[:3]
    for score, _ in shown:
        left.axhline(score, color=MUTED, lw=1, ls="--")
    for (_, name), y in zip(shown, _spread([s for s, _ in shown])):
        left.annotate(
            name, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9, color="#52606d"
        )
    if values and min(values) > 0:
        left.set_yscale("log")
        _few_ticks(left.yaxis)
    left.set_xlabel("evaluations", fontsize=10)
    left.set_ylabel("score, lower is better", fontsize=10)
    levels_panel(right, best, stock)
    return _image(figure)


def _few_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def _spread(values: Sequence[float], ratio: float = 1.12) -> list[float]:
    """Return label heights of ascending values, moved up where they would overlap on a log axis."""
    heights: list[float] = []
    for value in values:
        heights.append(max(value, heights[-1] * ratio) if heights and heights[-1] > 0 else value)
    return heights


def levels_panel(axes: Any, best: Sequence[float], stock: Mapping[str, Sequence[float]]) -> None:
    """Draw noise levels over the steps in log scale: stock schedules in grey, `best` in colour."""
    _plain(axes, "noise levels (sigma)")
    for levels in stock.values():
        shown = [s for s in levels if s > 0]
        axes.plot(range(1, len(shown) + 1), shown, color="#cbd2d9", lw=1.2)
    shown = [s for s in best if s > 0]
    if shown:
        axes.plot(range(1, len(shown) + 1), shown, color=ACCENT, lw=2.5, marker="o")
        for i, sigma in enumerate(shown):
            axes.annotate(f"{sigma:.3g}", (i + 1, sigma), (0, 7), textcoords="offset points", fontsize=9, color=INK)
        axes.set_yscale("log")
        axes.set_xticks(range(1, len(shown) + 1))
    axes.set_xlabel("step (stock schedules in grey)", fontsize=10)


def comparison_chart(comparison: Comparison) -> Tensor:
    """Return one panel per objective: a bar for each schedule with its 95 % interval, best first."""
    count = len(comparison.objectives)
    figure = _figure(max(4.0 * count, 7.0), 1.3 + 0.34 * len(comparison.rows))
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    names = [row.name if len(row.name) <= 28 else row.name[:27] + "..." for row in comparison.rows]
    for axes, objective in zip(panels, comparison.objectives):
        _plain(axes, objective)
        axes.grid(False)
        cells = [row.scores[objective] for row in comparison.rows]
        means = [c.mean if math.isfinite(c.mean) else 0.0 for c in cells]
        halves = [c.half if math.isfinite(c.half) else 0.0 for c in cells]
        best = min(range(len(means)), key=lambda i: means[i] if math.isfinite(cells[i].mean) else math.inf)
        colours = [ACCENT if i == best else "#bcccdc" for i in range(len(means))]
        axes.barh(names, means, xerr=halves, color=colours, ecolor="#52606d", capsize=2, height=0.7)
        right = max([m + h for m, h in zip(means, halves)] + [1e-12])
        for i, cell in enumerate(cells):
            text = f"{cell.mean:.3g}" if math.isfinite(cell.mean) else "not finite"
            axes.annotate(text, (means[i] + halves[i], i), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_xlim(0 if min(means) >= 0 else None, right * 1.18)
        axes.set_xlabel("lower is better", fontsize=10)
    panels[0].invert_yaxis()
    return _image(figure)
