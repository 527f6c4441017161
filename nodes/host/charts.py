"""Charts in the host: a missing matplotlib becomes a warning and an image of that sentence, never a lost result."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from ...core.charts import LiveChart, chart_or_notice
from .warnings import warn


def chart(node: str, draw: Callable[[], Tensor]) -> Tensor:
    """Return the IMAGE that `draw` makes for `node` (its display name), or a notice."""
    return chart_or_notice(draw, functools.partial(warn, node))


def live_chart(node: str) -> LiveChart:
    """Return a chart for the preview of `node` while it runs."""
    return LiveChart(functools.partial(warn, node))
