"""Procedural scenes with exact captions: what the pocket model was trained on and what tests and benchmarks score it with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 225, 60),
    "green": (45, 165, 70),
    "blue": (45, 85, 215),
    "purple": (140, 55, 185),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "large")
KINDS = ("plain", "gradient", "striped", "checkered")
PLACES: dict[str, str] = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
# Every word is one token of the pocket tokenizer; captions use nothing else.
VOCABULARY = (
    *COLOURS,
    *SHAPES,
    *SIZES,
    *KINDS,
    *PLACES,
    *"a an and the on in at of to above below background picture image photo with next no shape pattern".split(),
)

_RGB = torch.tensor([PALETTE[c] for c in COLOURS], dtype=torch.float32) / 255.0
_KIND_SHARES = (0.7, 0.3, 0.0, 0.0)
_TWO_OBJECTS_SHARE = 0.25
_DIRECTION = {"center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
# Shares of the image's width: (radius range, distance of the places from the centre), one object alone and two together.
_ALONE = {"small": ((0.12, 0.155), 0.25), "large": ((0.215, 0.27), 0.19)}
_PAIRED = {"small": ((0.11, 0.14), 0.24), "large": ((0.185, 0.215), 0.24)}


@dataclasses.dataclass(frozen=True)
class Item:
    """One object of a scene; radius and centre are shares of the image's width."""

    shape: str
    colour: str
    size: str
    place: str
    radius: float
    x: float
    y: float
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and one or two objects; `phase` and `horizontal` place a background's pattern."""

    background: str
    items: tuple[Item, ...]
    kind: str = "plain"
    phase: float = 0.0
    horizontal: bool = True
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)


def _tint(rng: np.random.Generator) -> tuple[float, float, float]:
    r, g, b = rng.uniform(-0.04, 0.04, 3).tolist()
    return r, g, b


def _item(rng: np.random.Generator, colour: str, place: str, sizes: dict, jitter: float) -> Item:
    size = SIZES[rng.integers(2)]
    (low, high), distance = sizes[size]
    dx, dy = _DIRECTION[place]
    return Item(
        shape=SHAPES[rng.integers(len(SHAPES))],
        colour=colour,
        size=size,
        place=place,
        radius=float(rng.uniform(low, high)),
        x=float(0.5 + dx * distance + rng.uniform(-jitter, jitter)),
        y=float(0.5 + dy * distance + rng.uniform(-jitter, jitter)),
        tint=_tint(rng),
    )


def sample_scene(rng: np.random.Generator, objects: int | None = None, kinds: Sequence[float] = _KIND_SHARES) -> Scene:
    """Draw a scene with `objects` (1, 2, or None for a mixture with a quarter of pairs); `kinds` are the shares of `KINDS`."""
    if objects not in (None, 1, 2):
        raise ValueError(f"Expected `objects` to be 1, 2 or None, but got {objects!r}.")
    pair = rng.random() < _TWO_OBJECTS_SHARE if objects is None else objects == 2
    background = COLOURS[rng.integers(len(COLOURS))]
    others = [c for c in COLOURS if c != background]
    colours = rng.choice(others, 2, replace=False).tolist()
    if pair:
        places = ("left", "right") if rng.random() < 0.6 else ("top", "bottom")
        items = tuple(_item(rng, c, p, _PAIRED, 0.03) for c, p in zip(colours, places))
    else:
        place = str(rng.choice(list(PLACES), p=[0.32, 0.17, 0.17, 0.17, 0.17]))
        items = (_item(rng, colours[0], place, _ALONE, 0.05),)
    return Scene(
        background=background,
        items=items,
        kind=KINDS[rng.choice(len(KINDS), p=list(kinds))],
        phase=float(rng.random()),
        horizontal=bool(rng.integers(2)),
        tint=_tint(rng),
    )


def caption(scene: Scene, rng: np.random.Generator | None = None, full: bool = True) -> str:
    """The scene in words; with ``full=False`` attributes are left out and pairs phrased at random, which needs `rng`."""
    if not full and rng is None:
        raise ValueError("Expected `rng` for a caption with random omissions, but got None. Pass a numpy Generator.")

    def said(share: float) -> bool:
        return full or (rng is not None and rng.random() < share)

    def noun(item: Item) -> str:
        return f"a {item.size + ' ' if said(0.65) else ''}{item.colour} {item.shape}"

    plain = "" if scene.kind == "plain" and said(0.85) else scene.kind + " "
    tail = f" on a {scene.background} {plain}background"
    if len(scene.items) == 1:
        (only,) = scene.items
        return noun(only) + (" " + PLACES[only.place] if said(0.65) else "") + tail
    one, two = scene.items
    phrase = 0 if full or rng is None else int(rng.integers(3))
    if phrase == 0:
        return f"{noun(one)} {PLACES[one.place]} and {noun(two)} {PLACES[two.place]}{tail}"
    beside = one.place == "left"
    if phrase == 1:
        return noun(one) + (" to the left of " if beside else " above ") + noun(two) + tail
    return noun(two) + (" to the right of " if beside else " below ") + noun(one) + tail


# ---------------------------------------------------------------------------------------------------------------- rendering


def _star(x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Distance to the edge of a five-pointed star, folded into one half of one point."""
    outer, inner = 1.15 * radius, 0.45
    segment = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + segment / 2, segment) - segment / 2).abs()
    rho = torch.hypot(x, y)
    ex, ey = inner * math.cos(math.pi / 5) - 1.0, inner * math.sin(math.pi / 5)
    return ((rho * angle.cos() - outer) * ey - rho * angle.sin() * ex) / math.hypot(ex, ey)


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Distance of the points (x, y) from the edge of a shape centred at 0, negative inside; all in one unit."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(ax, ay) - 0.86 * radius
    if shape == "triangle":  # tip up
        low = y - 0.12 * radius
        return torch.maximum(math.sqrt(0.75) * ax - 0.5 * low, low) - 0.55 * radius
    if shape == "star":
        return _star(x, y, radius)
    if shape == "ring":
        return (torch.hypot(x, y) - 0.78 * radius).abs() - 0.25 * radius
    if shape == "cross":
        bars = (torch.maximum(a - 1.05 * radius, b - 0.34 * radius) for a, b in ((ax, ay), (ay, ax)))
        return torch.minimum(*bars)
    raise ValueError(f"Expected `shape` to be one of {', '.join(SHAPES)}, but got {shape!r}.")


def _grid(res: int) -> tuple[Tensor, Tensor]:
    centres = (torch.arange(res, dtype=torch.float32) + 0.5) / res
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return x, y


def _colour(name: str, tint: Sequence[float]) -> Tensor:
    return (_RGB[COLOURS.index(name)] + torch.tensor(tint, dtype=torch.float32)).clamp(0, 1)[:, None, None]


def _bands(position: Tensor, phase: float, res: int) -> Tensor:
    """Four anti-aliased bands across the image, 0 or 1."""
    t = position * 4 + phase
    return (((t - t.floor() - 0.5).abs() - 0.25) * res / 4 + 0.5).clamp(0, 1)


def _background(scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    res = x.shape[-1]
    base = _colour(scene.background, scene.tint)
    dark = base * 0.55 if scene.background != "black" else base * 0.5 + 0.22
    along = x if scene.horizontal else y
    if scene.kind == "plain":
        share = torch.zeros_like(x)
    elif scene.kind == "gradient":
        share = along
    elif scene.kind == "striped":
        share = 0.7 * _bands(along, scene.phase, res)
    else:
        a, b = _bands(x, scene.phase, res), _bands(y, scene.phase, res)
        share = 0.7 * (a + b - 2 * a * b)
    return torch.lerp(base, dark, share)


def coverage(item: Item, res: int) -> Tensor:
    """Anti-aliased mask of one object, (res, res) in [0, 1]."""
    x, y = _grid(res)
    return (0.5 - signed_distance(item.shape, x - item.x, y - item.y, item.radius) * res).clamp(0, 1)


def render(scenes: Sequence[Scene], res: int = 128) -> Tensor:
    """Draw scenes as images, (B, 3, res, res) in [-1, 1]."""
    x, y = _grid(res)
    images = []
    for scene in scenes:
        image = _background(scene, x, y)
        for item in scene.items:
            image = torch.lerp(image, _colour(item.colour, item.tint), coverage(item, res))
        images.append(image)
    return torch.stack(images) * 2 - 1


# -------------------------------------------------------------------------------------------- reading an image without a net


def nearest_colour(rgb: Tensor) -> Tensor:
    """Index into `COLOURS` of the palette colour nearest to each `rgb` (..., 3) in [-1, 1]."""
    return torch.cdist(rgb.reshape(-1, 3) / 2 + 0.5, _RGB).argmin(-1).reshape(rgb.shape[:-1])


def pixel_check(images: Tensor) -> list[dict[str, str]]:
    """Read background colour, object colour and place of one-object images (B, 3, H, W) in [-1, 1], without a network.

    The background is the median of the border. The object is what differs from a plane of colour fitted to the border
    (which allows for gradients); its most frequent palette colour and its centre give the rest.
    """
    return [_read(p) for p in F.interpolate(images.clamp(-1, 1), 64, mode="area")]


def _read(image: Tensor) -> dict[str, str]:
    x, y = _grid(64)
    plane = torch.stack([torch.ones(64, 64), x - 0.5, y - 0.5], -1)
    border = torch.ones(64, 64, dtype=torch.bool)
    border[3:-3, 3:-3] = False
    pixels = image.permute(1, 2, 0)
    fit = torch.linalg.lstsq(plane[border], pixels[border]).solution
    difference = (pixels - plane @ fit).norm(dim=-1)
    inside = difference >= 0.5 * difference.flatten().kthvalue(64 * 64 - 20).values
    colour = nearest_colour(pixels[inside].reshape(-1, 3)).mode().values
    centre = torch.stack([x[inside].mean(), y[inside].mean()]) - 0.5
    place = min(PLACES, key=lambda p: float((centre - 0.22 * torch.tensor(_DIRECTION[p])).norm()))
    # A gradient darkens the colour to 55 %: its brightest border side is the named one (and the darkest for black).
    ends = (plane[border] @ fit).clamp(-1, 1)
    order = ends.sum(-1).argsort()
    bright, dark = ends[order[-12:]].median(0).values, ends[order[:12]].median(0).values
    named = dark if dark.amax() < -0.65 else bright
    return {"background": COLOURS[int(nearest_colour(named))], "colour": COLOURS[int(colour)], "place": place}
