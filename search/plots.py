"""Charts as IMAGE tensors (1, H, W, 3), drawn with Pillow alone: the host does not have matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.pictures import font
from ..core.tensors import numpy_to_image
from .comparison import Comparison, Interval
from .engine import SearchStep

INK, SOFT, GRID, ACCENT, BAR = (31, 41, 51), (110, 122, 138), (228, 231, 235), (11, 114, 133), (188, 204, 220)
SCALE = 2  # drawn twice as large and reduced, for smooth lines


class Canvas:
    """A white picture with one coordinate system at a time."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (width * SCALE, height * SCALE), (255, 255, 255))
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, size: int = 13, colour: Any = INK, anchor: str = "lm") -> None:
        self.draw.text((x * SCALE, y * SCALE), words, colour, font(size * SCALE), anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: Any, width: float = 1) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, colour, round(width * SCALE), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, colour: Any) -> None:
        self.draw.rectangle([left * SCALE, top * SCALE, max(right, left) * SCALE, bottom * SCALE], colour)

    def dot(self, x: float, y: float, radius: float, colour: Any) -> None:
        self.draw.ellipse([(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE], colour)  # fmt: skip

    def finished(self) -> Tensor:
        import numpy as np
        from PIL import Image

        size = (self.image.width // SCALE, self.image.height // SCALE)
        return numpy_to_image(np.array(self.image.resize(size, Image.Resampling.LANCZOS)))


class Axis:
    """Maps values to pixels, linear or logarithmic, with a few round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.log = log and low > 0
        self.start, self.end = start, end
        low, high = (math.log10(low), math.log10(high)) if self.log else (low, high)
        pad = (high - low) * 0.06 or 0.5
        self.low, self.high = (low - pad, high + pad) if self.log else (low, high + pad)

    def __call__(self, value: float) -> float:
        value = math.log10(max(value, 1e-300)) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        if not self.log:
            return round_numbers(self.low, self.high, most)
        if self.high - self.low < 0.5:
            return [v for v in round_numbers(10**self.low, 10**self.high, most) if v > 0]
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for marks in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**d for d in decades for m in marks if self.low <= math.log10(m) + d <= self.high]
            if len(found) <= most:
                break
        return found[:: math.ceil(len(found) / most)] if found else found


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Return at most about `most` round numbers between `low` and `high`."""
    raw = max(high - low, 1e-12) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def search_chart(step: SearchStep, best: Sequence[float], stock: Mapping[str, Sequence[float]]) -> Tensor:
    """Return the state of a search: best score by evaluation against the stock schedules, and the best levels so far.

    Args:
        step: the latest progress.
        best: levels of the best candidate so far, with their terminal.
        stock: levels of stock schedules by name, drawn in grey.
    """
    canvas = Canvas(900, 420)
    _history(canvas, step, (70, 60, 470, 360))
    _levels(canvas, best, stock, (560, 60, 880, 360))
    return canvas.finished()


def _frame(canvas: Canvas, box: tuple[int, int, int, int], title: str, label: str) -> None:
    left, top, right, bottom = box
    canvas.text(left, top - 32, title, 16)
    canvas.line([(left, top), (left, bottom), (right, bottom)], SOFT)
    canvas.text((left + right) / 2, bottom + 44, label, 13, SOFT, "mm")


def _scale(canvas: Canvas, axis: Axis, box: tuple[int, int, int, int]) -> None:
    for value in axis.ticks():
        y = axis(value)
        canvas.line([(box[0], y), (box[2], y)], GRID)
        canvas.text(box[0] - 8, y, f"{value:.3g}", 12, SOFT, "rm")


def _history(canvas: Canvas, step: SearchStep, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    known = f"best {step.best:.4g}" if math.isfinite(step.best) else "searching"
    _frame(canvas, box, known, f"evaluations (lower is better), {step.phase}")
    if not step.history:
        return
    shown = sorted((s, n) for n, s in step.baselines.items() if math.isfinite(s))[:4]
    values = [v for _, v in step.history] + [s for s, _ in shown]
    last = max(step.history[-1][0], step.evaluated, 2)
    across = Axis(1, last, left, right)
    upwards = Axis(min(values), max(values), bottom, top, log=True)
    _scale(canvas, upwards, box)
    for value in round_numbers(1, last, 6):
        if value >= 1 and value == int(value):
            canvas.text(across(value), bottom + 16, f"{value:g}", 12, SOFT, "mm")
    heights = spread([upwards(s) for s, _ in shown], -15)
    for (score, name), y in zip(shown, heights):
        canvas.line([(left, upwards(score)), (right, upwards(score))], SOFT, 0.7)
        canvas.text(right - 4, y - 8, f"{name} {score:.3g}", 12, SOFT, "rm")
    points = [(across(step.history[0][0]), upwards(step.history[0][1]))]
    for count, value in step.history[1:]:
        points += [(across(count), points[-1][1]), (across(count), upwards(value))]
    canvas.line([*points, (across(last), points[-1][1])], ACCENT, 2.5)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return label places in the given order, moved on by `gap` where they would overlap."""
    found: list[float] = []
    for place in places:
        limit = found[-1] + gap if found else place
        found.append((min if gap < 0 else max)(place, limit))
    return found


def _levels(
    canvas: Canvas, best: Sequence[float], stock: Mapping[str, Sequence[float]], box: tuple[int, int, int, int]
) -> None:
    left, top, right, bottom = box
    _frame(canvas, box, "noise levels (sigma)", "step, stock schedules in grey")
    curves = [[s for s in levels if s > 0] for levels in stock.values()]
    shown = [s for s in best if s > 0]
    positive = [s for curve in [*curves, shown] for s in curve]
    if not positive:
        return
    count = max(len(curve) for curve in [*curves, shown])
    across = Axis(0.6, max(count, 2), left, right)
    upwards = Axis(min(positive), max(positive), bottom, top, log=True)
    _scale(canvas, upwards, box)
    for i in range(1, count + 1, max(1, count // 10)):
        canvas.text(across(i), bottom + 16, str(i), 12, SOFT, "mm")
    for curve in curves:
        canvas.line([(across(i + 1), upwards(s)) for i, s in enumerate(curve)], (203, 210, 217))
    canvas.line([(across(i + 1), upwards(s)) for i, s in enumerate(shown)], ACCENT, 2.5)
    for i, sigma in enumerate(shown):
        canvas.dot(across(i + 1), upwards(sigma), 4, ACCENT)
        if len(shown) <= 10:
            canvas.text(across(i + 1) + 7, upwards(sigma) - 9, f"{sigma:.3g}", 12)


def comparison_chart(comparison: Comparison) -> Tensor:
    """Return one panel per objective: a bar for each schedule with its 95 % interval, best first."""
    rows, panels = comparison.rows, len(comparison.objectives)
    names, width = 210, 340
    canvas = Canvas(names + panels * (width + 60), 100 + 28 * len(rows))
    for i, row in enumerate(rows):
        name = row.name if len(row.name) <= 28 else row.name[:26] + ".."
        canvas.text(names - 12, 62 + 28 * i, f"{name} ({row.nfe})", 13, INK, "rm")
    canvas.text(names - 12, 28, "schedule (calls)", 13, SOFT, "rm")
    for p, objective in enumerate(comparison.objectives):
        left = names + p * (width + 60)
        canvas.text(left, 28, objective, 15)
        _bars(canvas, [row.scores[objective] for row in rows], left, width)
    note = f"lower is better; {comparison.pairs} pairs x {comparison.repeats} repeats"
    canvas.text(names, 74 + 28 * len(rows), note + (", whiskers: 95 %" if comparison.repeats > 1 else ""), 12, SOFT)
    return canvas.finished()


def _bars(canvas: Canvas, cells: Sequence[Interval], left: float, width: float) -> None:
    finite = [c for c in cells if math.isfinite(c.mean)]
    if not finite:
        return
    best = min(c.mean for c in finite)
    low = min(0.0, best)
    # One hopeless schedule must not squeeze the others into the axis: its bar is cut, its number is written.
    highest = sorted(c.mean for c in finite)[(len(finite) - 1) * 3 // 4] * 2.5
    high = min(max(c.mean + (c.half if math.isfinite(c.half) else 0) for c in finite), highest) or 1.0
    axis = Axis(low, max(high, low + 1e-12), left, left + width)
    for i, cell in enumerate(cells):
        y = 62 + 28 * i
        if not math.isfinite(cell.mean):
            canvas.text(left + 4, y, "not finite", 12, SOFT)
            continue
        end = min(axis(cell.mean), left + width)
        canvas.box(min(axis(0), end), y - 9, max(axis(0), end), y + 9, ACCENT if cell.mean == best else BAR)
        tip = end
        if math.isfinite(cell.half) and axis(cell.mean) <= left + width:
            ends = [min(max(axis(cell.mean + sign * cell.half), left), left + width) for sign in (-1, 1)]
            canvas.line([(ends[0], y), (ends[1], y)], INK, 1.2)
            tip = max(end, ends[1])
        canvas.text(tip + 6, y, f"{cell.mean:.3g}", 12)
