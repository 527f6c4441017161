"""A setting that moves over the frames of a clip: values at some frames, evenly between them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

from ..core.checks import shown

KEY = re.compile(r"\s*(\d{1,7})\s*:\s*(\d*\.?\d+)\s*")
Curve = Sequence[tuple[int, float]]


def read_curve(name: str, text: str) -> Curve:
    """Return ascending (frame, value) of a text such as "0: 0.3, 24: 0.8"; raises ValueError for any other."""
    keys = [KEY.fullmatch(part) for part in text.split(",")] if text.strip() else []
    found = [(int(key[1]), float(key[2])) for key in keys if key]
    if len(found) < len(keys) or any(b[0] <= a[0] for a, b in zip(found, found[1:])):
        raise ValueError(
            f"Expected `{name}` as frames that ascend, each with its value, but got {shown(text)}. Example: 0: 0.3, 24: 0.8."
        )
    return found


def value_at(curve: Curve, frame: int) -> float:
    """Return the value at a frame: even between two keys, and that of the nearest key outside of all."""
    after = bisect_right(curve, frame, key=lambda key: key[0])
    if after in (0, len(curve)):
        return curve[min(after, len(curve) - 1)][1]
    (start, low), (end, high) = curve[after - 1], curve[after]
    return low + (high - low) * (frame - start) / (end - start)
