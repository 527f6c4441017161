"""The images of this technique as IMAGE (B, H, W, 3): schedules, losses, influence and stretch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.charts import ACCENT, COLOURS, INK, RISING, SIGNED, SOFT, figure, legend, points, styled, to_image
from .influence import InfluenceProfile
from .mask_schedule import MaskSchedule
from .stretch import StretchMap

LETTERS = 18  # pixels
TILES, TILE = 8, 192  # masks in a row, and the longer side of one in pixels
HEAT, MARGIN, TOP, BOTTOM = 440, 30, 56, 84  # pixels of a heat map and of the white around it


def schedule_chart(schedule: MaskSchedule) -> Tensor:
    """Return the masked share over the steps above the masks themselves."""
    measured = schedule.masks.flatten(1).mean(1).tolist()
    shown = np.unique(np.linspace(0, len(measured) - 1, min(len(measured), 4 * TILES)).round().astype(int))
    tiles, columns = _tiled(schedule.masks[torch.from_numpy(shown)])
    height = min(round(780 / tiles.shape[1] * tiles.shape[0]), 700) + 50
    drawn = figure(800, 360 + height)
    above, below = drawn.subplots(2, 1, height_ratios=(360, height))
    styled(above, "masked share", "step", "share", LETTERS)
    numbers = range(1, len(measured) + 1)
    above.plot(numbers, schedule.ratios, "o-", color=COLOURS[0], linewidth=points(3), label="asked for")
    above.plot(numbers, measured, "o--", color=COLOURS[1], linewidth=points(3), label="in whole patches")
    above.set_ylim(0, max([*measured, *schedule.ratios, 0.01]) * 1.12)
    above.xaxis.get_major_locator().set_params(integer=True)
    legend(above, LETTERS)
    below.imshow(tiles, cmap=_two_colours(), vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    below.set_title("masks (blue = masked)", fontsize=points(LETTERS), color=INK, loc="left")
    below.axis("off")
    side, rise = tiles.shape[1] / columns, tiles.shape[0] / -(-len(shown) // columns)
    for place, index in enumerate(shown):
        below.text((place % columns + 0.46) * side, (place // columns + 0.99) * rise, f"{measured[index]:.0%}", ha="center",
                   va="bottom", fontsize=points(LETTERS * 0.85), color=SOFT)  # fmt: skip
    return to_image(drawn)


def _tiled(masks: Tensor) -> tuple[Any, int]:
    """Return masks (N, H, W) as one array of tiles with gaps of NaN, each with room for a line below it, and the columns."""
    largest = max(masks.shape[-2:])
    if largest > TILE:  # masks of pixels: a tile shows no more of them
        height, width = (max(1, round(TILE * side / largest)) for side in masks.shape[-2:])
        masks = F.adaptive_avg_pool2d(masks.float(), (height, width))
    side = max(1, TILE // max(masks.shape[-2:]))
    cells = masks.repeat_interleave(side, 1).repeat_interleave(side, 2).float()
    height, width = cells.shape[1:]
    columns = max(min(TILES, len(cells)), 4)  # a lone mask is not blown up to the full width
    gap, line = max(1, width // 12), max(1, round(width * 0.26))
    rows = -(-len(cells) // columns)
    out = torch.full((rows * (height + line), columns * (width + gap)), torch.nan)
    for i, cell in enumerate(cells):
        y, x = i // columns * (height + line), i % columns * (width + gap)
        out[y : y + height, x : x + width] = cell
    return out.numpy(), columns


def _two_colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("masks", ["#e9edf2", COLOURS[0]])


def loss_chart(losses: Sequence[float], total: int, start: int = 0) -> Tensor:
    """Return the loss from step `start` on, each point the mean of a thirtieth of it, as a share of the variance."""
    width = max(1, len(losses) // 30)
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    x = [start + min((i + 0.5) * width, len(losses)) for i in range(len(parts))]
    y = [sum(p) / len(p) for p in parts]
    drawn = figure(800, 460)
    axes = styled(drawn.subplots(), f"step {start + len(losses)} of {total}", "step", "", 21)
    axes.set_ylabel("error / variance\n(masked patches)", fontsize=points(21), color=SOFT)
    axes.plot(x, y, "o-", color=ACCENT, linewidth=points(4), markersize=points(8))
    finite = [v for v in y if math.isfinite(v)]
    axes.set_ylim(0, max(finite, default=1.0) * 1.1 or 1.0)
    if finite and math.isfinite(y[-1]):
        axes.annotate(f"{y[-1]:.3g}", (x[-1], y[-1]), (0, 10), textcoords="offset points", ha="right", color=INK,
                      fontsize=points(19))  # fmt: skip
    return to_image(drawn)


def influence_chart(profile: InfluenceProfile, unit: str = "cells") -> Tensor:
    """Return difference against distance for up to five steps, the last step's heat map, and reach against step."""
    count = len(profile.mean)
    shown = sorted({round(i * (count - 1) / 4) for i in range(5)})
    drawn = figure(1040, 460 if count == 1 else 820)
    top = drawn.subplots(1, 2, width_ratios=(1.5, 1)) if count == 1 else None
    if top is None:
        grid = drawn.add_gridspec(2, 2, width_ratios=(1.5, 1), height_ratios=(1.35, 1))
        top = [drawn.add_subplot(grid[0, 0]), drawn.add_subplot(grid[0, 1])]
        _reach(drawn.add_subplot(grid[1, :]), profile, unit)
    curves = styled(
        top[0], "difference against distance", f"distance to the change ({unit})", "mean |difference|", LETTERS
    )
    name = part_of(unit)
    _curves(curves, profile, shown, name)
    heat = profile.heat[-1]
    high = float(heat.max()) or 1.0
    styled(top[1], f"at the last {name}" if count > 1 or name == "step" else "difference", size=LETTERS)
    shades = top[1].imshow(heat.cpu().numpy(), cmap=RISING, vmin=0, vmax=high, interpolation="nearest")
    top[1].axis("off")
    bar = drawn.colorbar(shades, ax=top[1], location="bottom", fraction=0.05, pad=0.03)
    bar.ax.tick_params(labelsize=points(LETTERS * 0.9), labelcolor=SOFT)
    bar.ax.locator_params(nbins=4)
    bar.outline.set_visible(False)
    return to_image(drawn)


def part_of(unit: str) -> str:
    """Return what the parts of a profile are: images are measured in pixels, the steps of a sampling in latent cells."""
    return "image" if unit == "pixels" else "step"


def _curves(axes: Any, profile: InfluenceProfile, shown: Sequence[int], name: str) -> None:
    """Draw one curve a part, from pale to dark, and where the last one has fallen to 1/e and to a tenth."""
    distance = profile.distance.tolist()
    for place, i in enumerate(shown):
        weight = 1.0 if len(shown) == 1 else 0.25 + 0.75 * place / (len(shown) - 1)
        axes.plot(distance, profile.mean[i].tolist(), "o-", color=COLOURS[0], alpha=weight, linewidth=points(3),
                  markersize=points(5), label=f"{name} {i + 1}")  # fmt: skip
    axes.set_ylim(bottom=0)
    for height, reach, text in ((0.98, float(profile.reach_e[-1]), "1/e"), (0.91, float(profile.reach_10[-1]), "10 %")):
        if math.isfinite(reach) and reach > 0:
            axes.axvline(reach, color=COLOURS[1], linewidth=points(2), linestyle="--")
            axes.text(reach, height, f" {text}", transform=axes.get_xaxis_transform(), va="top", color=COLOURS[1],
                      fontsize=points(LETTERS * 0.9))  # fmt: skip
    if len(shown) > 1:
        legend(axes, LETTERS, loc="center right")


def _reach(axes: Any, profile: InfluenceProfile, unit: str) -> None:
    styled(axes, "reach (a gap: it never falls so far)", part_of(unit), unit, LETTERS)
    steps = range(1, len(profile.mean) + 1)
    for values, label, colour in ((profile.reach_e, "to 1/e", 0), (profile.reach_10, "to 10 %", 1)):
        finite = [v if math.isfinite(v) else math.nan for v in values.tolist()]
        axes.plot(steps, finite, "o-", color=COLOURS[colour], linewidth=points(3), label=label)
    axes.set_xlim(0.5, len(steps) + 0.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(axes, LETTERS)


def influence_heat_maps(profile: InfluenceProfile, unit: str = "cells") -> Tensor:
    """Return one heat map a step, all on one scale and of one size."""
    high = float(profile.heat.max()) or 1.0
    maps = [heat_map(heat, f"difference at {part_of(unit)} {i}", 0.0, high) for i, heat in enumerate(profile.heat, 1)]
    return torch.cat(maps)


def influence_report(profile: InfluenceProfile, unit: str = "cells") -> str:
    """Return one line for each step."""

    def text(value: float, unit: str = "") -> str:
        return f"{value:.2f}{unit}" if math.isfinite(value) else "beyond the image"

    rows = zip(
        profile.reach_e.tolist(), profile.reach_10.tolist(), profile.outside.tolist(), profile.mean[:, 0].tolist()
    )
    return "\n".join(
        f"{part_of(unit)} {i}: reach {text(e, f' {unit}')} to 1/e, {text(ten)} to 10 %; {outside:.0%} of the difference lies outside; "
        f"mean inside {inside:.4g}"
        for i, (e, ten, outside, inside) in enumerate(rows, 1)
    )


def stretch_charts(
    result: StretchMap, under: Tensor | None = None, callback: Callable[[], object] | None = None
) -> Tensor:
    """Return one map a row, all on one scale: red is stretched, blue is squeezed in every direction, folds are outlined.

    `under` (B, H, W, 3) are images that shine through. `callback` is called before each map and may raise to stop.
    """
    # Near a fold the stretch has no bound: beyond a factor of 4.5 colours saturate.
    limit = min(max(float(result.stretch.abs().amax((1, 2)).median()), 0.1), 1.5)
    behind = [None] * len(result.stretch) if under is None else list(under)
    maps = []
    for stretch, fold, image in zip(result.stretch, result.fold, behind):
        if callback is not None:
            callback()
        title = f"log stretch, {float(fold.float().mean()):.1%} folds"
        maps.append(heat_map(stretch, title, -limit, limit, SIGNED, fold, image))
    return torch.cat(maps)


def stretch_report(result: StretchMap) -> str:
    """Return one line for each map."""
    return "\n".join(
        f"map {i}: largest stretch x{float(s.max().exp()):.2f}, median x{float(s.median().exp()):.2f}; "
        f"{float(f.float().mean()):.2%} of the pixels fold"
        for i, (s, f) in enumerate(zip(result.stretch, result.fold), 1)
    )


def heat_map(
    values: Tensor, title: str, low: float, high: float, colours: str = RISING, outline: Tensor | None = None,
    under: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return IMAGE (1, h, w, 3) of values (H, W): cells enlarged without smoothing, a colour bar, an outlined mask (H, W).

    `under` (h, w, 3) in [0, 1] is an image that shines through, in grey.
    """
    rows, columns = values.shape
    width, height = (max(24, round(HEAT * side / max(rows, columns))) for side in (columns, rows))
    full = max(width, 320) + 2 * MARGIN, height + TOP + BOTTOM
    drawn = figure(*full, tidy=False)

    def area(x: float, y: float, w: float, h: float) -> Any:
        axes = drawn.add_axes((x / full[0], y / full[1], w / full[0], h / full[1]))
        axes.axis("off")
        return axes

    axes = area((full[0] - width) / 2, BOTTOM, width, height)
    place = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    if under is not None:
        grey = under[..., :3].clamp(0, 1).mean(-1).cpu().numpy()
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=place, aspect="auto", interpolation="nearest")
    axes.imshow(values.float().cpu().numpy(), cmap=colours, vmin=low, vmax=high, extent=place, aspect="auto",
                interpolation="nearest", alpha=1.0 if under is None else 0.65)  # fmt: skip
    if outline is not None and bool((outline > 0).any()):
        _outline(axes, outline > 0)
    axes.set(xlim=place[:2], ylim=place[2:])
    drawn.text(0.5, 1 - 0.5 * TOP / full[1], title, ha="center", va="center", fontsize=points(20), color=INK)
    bar = area(MARGIN, BOTTOM - 32, full[0] - 2 * MARGIN, 14)
    bar.imshow(np.linspace(0, 1, 256)[None], cmap=colours, aspect="auto")
    for x, value, align in ((MARGIN, low, "left"), (full[0] - MARGIN, high, "right")):
        drawn.text(
            x / full[0], (BOTTOM - 38) / full[1], f"{value:.3g}", ha=align, va="top", fontsize=points(18), color=SOFT
        )
    return to_image(drawn)


def _outline(axes: Any, mask: Tensor) -> None:
    """Draw the border of a mask (H, W) along its cells, white on black so that it shows on any colour."""
    fine = 4
    padded = F.pad(mask.float().cpu().repeat_interleave(fine, 0).repeat_interleave(fine, 1), (1, 1, 1, 1)).numpy()
    y, x = ((np.arange(n) - 0.5) / fine - 0.5 for n in padded.shape)
    for width, colour in ((5, "black"), (2, "white")):
        axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=points(width))
