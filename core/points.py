"""Points in pixels of an image, in every form that people have them in, and in the one form that we write.

Read: JSON lists of {"x": 120, "y": 80} (KJNodes' Points Editor) or [120, 80], the store of that editor, splines (KJNodes' Spline
Editor: the first point of each goes to its last), and text such as "120, 80 -> 150, 80" (Stretch Map) or "120,80:150,80" (the
command line). Written: a JSON list of {"x": 120, "y": 80}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

Point = tuple[float, float]
Pair = tuple[Point, Point]

FARTHEST = 1e6  # pixels
EXAMPLE = '[{"x": 120, "y": 80}]'
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_POINT = re.compile(rf"\s*{_NUMBER}\s*,\s*{_NUMBER}\s*")
_BETWEEN, _ARROW = re.compile(r"[\s;]*"), re.compile(r"->|:")


def read_points(text: str, name: str = "points") -> list[Point]:
    """Return the points (x, y) of a text, an empty list for an empty one; raises ValueError for anything else."""
    try:
        if text.lstrip()[:1] in ("[", "{"):
            return _listed(json.loads(text))
        return _scanned(text)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
        raise ValueError(
            f"Expected `{name}` as a JSON list of points in pixels such as {EXAMPLE}, but got {text[:80]!r}."
        ) from None


def read_pairs(text: str, name: str = "points") -> list[Pair]:
    """Return pairs (handle, target) of a text of arrows or splines, an empty list for an empty one; raises ValueError otherwise."""
    try:
        if text.lstrip()[:1] == "[":
            return [(spline[0], spline[-1]) for spline in map(_spline, json.loads(text))]
        lines = filter(None, (line.strip() for line in text.splitlines()))
        return [pair for line in lines for pair in _arrows(line)]
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        bad = error.args[0] if isinstance(error, _NoArrowError) else text[:80]
        raise ValueError(
            f"Expected `{name}` as lines of 'x, y -> x, y', but got {bad!r}. Example: 60, 60 -> 90, 60."
        ) from None


def write_points(points: Sequence[Point]) -> str:
    """Return points as a JSON list of {"x": ., "y": .}."""
    return json.dumps([{"x": x, "y": y} for x, y in points])


class _NoArrowError(ValueError):
    """The line that is no arrow."""


def _spline(found: object) -> list[Point]:
    points = _listed(found)
    if len(points) < 2:
        raise ValueError
    return points


def _listed(found: object) -> list[Point]:
    if isinstance(found, dict):
        found = found["positive"] if "positive" in found else [found]
    if not isinstance(found, list):
        raise TypeError
    if len(found) == 1 and isinstance(found[0], list) and found[0] and not isinstance(found[0][0], (int, float)):
        found = found[0]  # the only one of a list of splines
    return [_point(p["x"], p["y"]) if isinstance(p, dict) else _point(p[0], p[1]) for p in found]


def _point(x: Any, y: Any) -> Point:
    found = float(x), float(y)
    if not all(abs(value) < FARTHEST for value in found):  # false for NaN too
        raise ValueError
    return found


def _scanned(text: str) -> list[Point]:
    """Return the points of "x, y x, y", also on several lines or with semicolons between them."""
    points, at = list[Point](), 0
    while at < len(text):
        found = _POINT.match(text, at)
        if found is None:
            raise ValueError
        points.append(_point(found[1], found[2]))
        between = _BETWEEN.match(text, found.end())
        at = between.end() if between else found.end()
    return points


def _arrows(line: str) -> list[Pair]:
    """Return the pairs of one line: "x, y -> x, y", or "x,y:x,y" with further ones after a space or a semicolon."""
    pairs, at = list[Pair](), 0
    while at < len(line):
        handle = _POINT.match(line, at)
        arrow = _ARROW.match(line, handle.end()) if handle else None
        target = _POINT.match(line, arrow.end()) if arrow else None
        if handle is None or target is None:
            raise _NoArrowError(line)
        try:
            pairs.append((_point(handle[1], handle[2]), _point(target[1], target[2])))
        except ValueError:
            raise _NoArrowError(line) from None
        between = _BETWEEN.match(line, target.end())
        at = between.end() if between else target.end()
    return pairs
