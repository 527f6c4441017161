"""Means with 95 % intervals: a percentile bootstrap with a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bounds(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles of the mean of `values` resampled with replacement."""
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(np.asarray(values, dtype=float)[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return "mean [low, high]", the mean alone for one value, "-" for none."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    low, high = bounds(values)
    return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"
