"""Charts as IMAGE: the house style over matplotlib's object interface. Never pyplot: it is global state, and nodes run in threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tensors import numpy_to_image

INK, SOFT, GRID, ACCENT, MUTED = "#1f2933", "#5c6977", "#e4e7eb", "#0b7285", "#b6c2cd"
COLOURS = ("#1f77b4", "#d66014", "#2c8c50", "#b4323c", "#785aaa", "#6e6e6e")
RISING, SIGNED = "viridis", "RdBu_r"  # evenly rising in lightness; and blue - white - red for signed values
DPI = 100


class NoChart(ValueError):  # noqa: N818 - reads as a sentence where it is caught
    """A chart cannot be drawn here; the message says what to install."""


def figure(width: int, height: int, tidy: bool = True) -> Any:
    """Return an empty matplotlib figure of `width` x `height` pixels; `tidy` keeps labels from overlapping.

    Raises NoChart without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoChart(
            "Expected matplotlib to draw a chart, but it is not installed. pip install matplotlib in the Python that runs this."
        ) from error
    made = Figure((width / DPI, height / DPI), DPI, facecolor="white", layout="constrained" if tidy else None)
    FigureCanvasAgg(made)
    return made


def check_drawing() -> None:
    """Raise NoChart when no chart can be drawn here: ask before the work, not after it."""
    figure(8, 8)


def points(pixels: float) -> float:
    """Return the font size or line width in points that is `pixels` high in our figures."""
    return pixels * 72 / DPI


def styled(axes: Any, title: str = "", x: str = "", y: str = "", size: float = 15) -> Any:
    """Return `axes` with title and labels, a quiet frame and grid; `size` is that of the letters in pixels."""
    axes.set_title(title, fontsize=points(size * 1.15), color=INK, loc="left", pad=points(size * 0.6))
    axes.set_xlabel(x, fontsize=points(size), color=SOFT)
    axes.set_ylabel(y, fontsize=points(size), color=SOFT)
    axes.tick_params(labelsize=points(size * 0.93), labelcolor=SOFT, color=GRID, which="both")
    axes.grid(color=GRID, linewidth=points(1))
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    return axes


def log_scale(axis: Any, low: float, high: float) -> None:
    """Make `axis` (an axes' xaxis or yaxis) logarithmic with a handful of plain numbers as ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    # Less than a decade: round numbers are closer together than 1, 2, 5.
    subs = (1.0,) if high / low > 300 else (1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0)
    axis.set_major_locator(MaxNLocator(5) if high / low < 4 else LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(LogLocator(subs=(), numticks=2))


def legend(axes: Any, size: float = 15, **options: Any) -> None:
    """Draw a legend of the labelled artists where it hides least."""
    axes.legend(fontsize=points(size * 0.93), labelcolor=INK, edgecolor=GRID, framealpha=0.9, **options)


def to_image(drawn: Any) -> Tensor:
    """Return IMAGE (1, H, W, 3) of a figure."""
    drawn.canvas.draw()
    return numpy_to_image(np.asarray(drawn.canvas.buffer_rgba())[..., :3].copy())


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return rising label places at least `gap` apart, as near as possible to the rising `places`, in their order."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap) if found else place)
    shift = sum(f - p for f, p in zip(found, places)) / max(len(found), 1)
    return [f - shift for f in found]


def chart_or_notice(draw: Callable[[], Tensor], say: Callable[[str], None]) -> Tensor:
    """Return the chart that `draw` makes; without matplotlib a small image of the sentence, which goes to `say` too.

    What a chart illustrates may have cost hours: a missing library never loses it.
    """
    try:
        return draw()
    except NoChart as error:
        say(str(error))
        return notice(str(error))


def notice(text: str) -> Tensor:
    """Return a sentence as IMAGE (1, H, 640, 3), drawn with Pillow's own letters."""
    import textwrap

    from PIL import Image, ImageDraw

    lines = textwrap.wrap(text, 90)
    image = Image.new("RGB", (640, 40 + 18 * len(lines)), "white")
    ImageDraw.Draw(image).multiline_text((20, 20), "\n".join(lines), (31, 41, 51), spacing=4)
    return numpy_to_image(np.array(image))


class LiveChart:
    """Draws a chart now and then while something runs, for at most a thirtieth of the time; None in between.

    Without matplotlib it never draws, with one warning.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.due, self.possible = say, 0.0, True

    def __call__(self, draw: Callable[[], Tensor], last: bool = False) -> Any:
        """Return a Pillow image of what `draw` makes when it is time for it, always for the `last`."""
        from PIL import Image

        begin = time.monotonic()
        if not self.possible or (begin < self.due and not last):
            return None
        try:
            image = draw()
        except NoChart as error:
            self.possible = False
            self.say(str(error))
            return None
        self.due = time.monotonic() + max(1.0, 30 * (time.monotonic() - begin))
        return Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy())
