"""What to do to an image: small immutable values that add up. All coordinates are pixels of the image, x to the right, y down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.checks import check_choice, check_range, shown
from ..core.masks import painted
from .geometry import Point

if TYPE_CHECKING:
    from .invert import Inversion

MAX_SCALE = 8.0
DRAG_METHODS = ("warp", "energy")
CENTRES = ("object", "image")


def check_mask(name: str, mask: Tensor) -> Tensor:
    """Return a mask as clean (H, W) floats in [0, 1]; raises ValueError when it is empty, not finite or more than one."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"Expected `{name}` to be a tensor (H, W), but got {type(mask).__name__}.")
    while mask.ndim > 2 and len(mask) == 1:
        mask = mask[0]
    if mask.ndim != 2:
        raise ValueError(
            f"Expected `{name}` as one mask (H, W), but got shape {tuple(mask.shape)}. Give one mask a task."
        )
    # A mask made in a host's inference mode could not take part in gradients.
    with torch.inference_mode(False):
        mask = painted(mask.detach().clone().cpu(), name)[0]
    if not bool((mask > 0.5).any()):
        raise ValueError(f"Expected `{name}` with at least one painted pixel, but got an empty mask. Paint the object.")
    return mask


class Task:
    """One thing to do; `a + b` does both in one run."""

    def __add__(self, other: Task | Tasks) -> Tasks:
        return Tasks.of(self) + other


@dataclass(frozen=True)
class Tasks:
    """Several tasks for one run."""

    items: tuple[Task, ...] = ()

    @classmethod
    def of(cls, tasks: Task | Tasks | Iterable[Task]) -> Tasks:
        """Return any of: one task, tasks, a sequence of tasks."""
        if isinstance(tasks, Tasks):
            return tasks
        items = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
        if not items or not all(isinstance(t, Task) for t in items):
            raise ValueError(
                f"Expected `tasks` with at least one Move, Remove, Paste, Appearance or Drag, but got {items!r}."
            )
        return cls(items)

    def __add__(self, other: Task | Tasks) -> Tasks:
        return Tasks(self.items + Tasks.of(other).items)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def _check_transform(dx: float, dy: float, scale: float, angle: float) -> None:
    for name, value in (("dx", dx), ("dy", dy)):
        check_range(name, value, -1e6, 1e6, "Give the shift in pixels of the image.")
    check_range("scale", scale, 1 / MAX_SCALE, MAX_SCALE, "1 keeps the size, 2 doubles it.")
    check_range("angle", angle, -360, 360, "Give degrees; positive turns clockwise.")


@dataclass(frozen=True, eq=False)
class Move(Task):
    """Move what lies under `mask` (H, W) by (dx, dy) pixels; scale it and turn it by `angle` degrees, clockwise, about the object's centre.

    `about` "image" scales and turns about the image's centre instead.
    `fill_from` (H, W) marks where the vacated area takes its content from; None is everything but the object.
    """

    mask: Tensor
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    about: str = "object"
    fill_from: Tensor | None = None
    angle: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", check_mask("mask", self.mask))
        _check_transform(self.dx, self.dy, self.scale, self.angle)
        check_choice("about", self.about, CENTRES)
        if self.fill_from is not None:
            object.__setattr__(self, "fill_from", check_mask("fill_from", self.fill_from))


@dataclass(frozen=True, eq=False)
class Remove(Task):
    """Take away what lies under `mask` (H, W); its place is filled from around it."""

    mask: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", check_mask("mask", self.mask))


@dataclass(frozen=True, eq=False)
class Paste(Task):
    """Paste what lies under `mask` (H, W) of another inverted image, shifted by (dx, dy), scaled and turned as by `Move`.

    (dx, dy) = (0, 0) puts it where it is in its own image, top left corners aligned.
    """

    reference: Inversion
    mask: Tensor
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    about: str = "object"
    angle: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", check_mask("mask", self.mask))
        _check_transform(self.dx, self.dy, self.scale, self.angle)
        check_choice("about", self.about, CENTRES)


@dataclass(frozen=True, eq=False)
class Appearance(Task):
    """Give what lies under `mask` (H, W) the look of what lies under `reference_mask` of another inverted image; shape is kept."""

    mask: Tensor
    reference: Inversion
    reference_mask: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", check_mask("mask", self.mask))
        object.__setattr__(self, "reference_mask", check_mask("reference_mask", self.reference_mask))


def check_points(points: Sequence[tuple[Point, Point]]) -> tuple[tuple[Point, Point], ...]:
    """Return (handle, target) pairs as floats; raises ValueError for none, NaN, a handle on its target or shared targets."""
    try:
        pairs = tuple(((float(hx), float(hy)), (float(tx), float(ty))) for (hx, hy), (tx, ty) in points)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"Expected `points` as ((x, y), (x, y)) pairs of handle and target, but got {shown(points)}."
        ) from None
    if not pairs:
        raise ValueError("Expected `points` with at least one pair of handle and target, but got none.")
    if not torch.isfinite(torch.tensor(pairs)).all():
        raise ValueError(f"Expected `points` to be finite, but got {pairs}.")
    still = [pair for pair in pairs if pair[0] == pair[1]]
    if len(still) == len(pairs):
        raise ValueError(
            f"Expected a target away from its handle, but got {still[0]}. Drag at least one point; pinned points may stay."
        )
    targets = [target for _, target in pairs]
    if len(set(targets)) < len(targets):
        raise ValueError(f"Expected targets that differ, but got {targets}. Two handles cannot land on one point.")
    return pairs


@dataclass(frozen=True, eq=False)
class Drag(Task):
    """Pull each handle to its target: `points` = ((handle x, y), (target x, y)) pairs; only `mask` (H, W) may change.

    `method` "warp" bends the region smoothly and regenerates what that uncovers, "energy" is the published point guidance.
    """

    mask: Tensor
    points: Sequence[tuple[Point, Point]]
    method: str = "warp"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", check_mask("mask", self.mask))
        object.__setattr__(self, "points", check_points(self.points))
        check_choice("method", self.method, DRAG_METHODS)
