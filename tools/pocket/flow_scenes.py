"""The world of pocket-flow: captioned scenes of sixty objects and six shapes, held as tensors and rendered on any device.

Objects lie on a grid of `Grid.step` pixels in one of two sizes, and background patterns have one phase. An autoencoder of stride 8 then
gives an object the same latents wherever it lies, which a small model learns from far fewer images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .emoji import OBJECTS, object_tiles
from .scenes import COLOURS, PALETTE, PLACES, SHAPES, SIZES, signed_distance

NOUNS = (*OBJECTS, *SHAPES)
KINDS = ("plain", "shaded", "striped", "checkered", "dotted")
RES = 128
SIDES = (40, 64)  # pixels, of small and large
WORDS = (
    *COLOURS,
    *NOUNS,
    *SIZES,
    *KINDS,
    *PLACES,
    *"a an and the on in at of to above below background picture image photo with next no".split(),
)
_RGB = torch.tensor([PALETTE[c] for c in COLOURS], dtype=torch.float32) / 255
_DIRECTION = torch.tensor([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])  # of PLACES
_ALONE, _PAIRED = (30, 32), 32  # distance of a place from the centre in pixels: small and large alone; either of a pair
UNSAID = -100
# Where there is time for a few only: of plain colours and outlines.
FEW_OBJECTS = (
    "fox", "pig", "frog", "penguin", "apple", "banana", "grapes", "watermelon",
    "lemon", "burger", "car", "tractor", "house", "tree", "sunflower", "sun",
)  # fmt: skip


@dataclasses.dataclass
class Scenes:
    """B scenes; what there may be two of is (B, 2), and -100 where there is no second object or an object has its own colours."""

    background: Tensor
    kind: Tensor
    tint: Tensor  # (B, 3), added to the background
    noun: Tensor
    size: Tensor
    colour: Tensor
    place: Tensor
    corner: Tensor  # (B, 2, 2), left and top in pixels

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, picks: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, f.name)[picks] for f in dataclasses.fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))


def sample_scenes(
    count: int, rng: np.random.Generator, pairs: float = 0.2, shapes: float = 0.2, step: int = 8,
    objects: Sequence[str] = tuple(OBJECTS),
) -> Scenes:  # fmt: skip
    """Draw scenes with corners on multiples of `step`: a share `pairs` with two objects.

    Of the objects a share `shapes` are coloured shapes and the others of `objects`.
    """
    draw = torch.Generator().manual_seed(int(rng.integers(2**62)))

    def pick(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape or (count,), generator=draw)

    pair = torch.rand(count, generator=draw) < pairs
    shaped = torch.rand(count, 2, generator=draw) < shapes
    among = torch.tensor([NOUNS.index(name) for name in objects])
    noun = torch.where(shaped, len(OBJECTS) + pick(len(SHAPES), count, 2), among[pick(len(among), count, 2)])
    background = pick(len(COLOURS))
    colour = (background[:, None] + 1 + pick(len(COLOURS) - 1, count, 2)) % len(COLOURS)
    first = torch.where(torch.rand(count, generator=draw) < 0.6, 1, 3)
    place = torch.where(pair[:, None], torch.stack([first, first + 1], 1), pick(len(PLACES), count, 2))
    size = pick(len(SIZES), count, 2)
    side = torch.tensor(SIDES)[size]
    distance = torch.where(pair[:, None], _PAIRED, torch.tensor(_ALONE)[size])
    jitter = 8 * torch.rand(count, 2, 2, generator=draw) * torch.tensor(1.9) - 7.6
    middle = RES / 2 + _DIRECTION[place] * distance[..., None] + jitter
    corner = ((middle - side[..., None] / 2) / step).round() * step
    corner = corner.clamp(min=0).minimum((RES - side)[..., None].float()).long()
    second = torch.stack([torch.ones_like(pair), pair], 1)
    kind = torch.multinomial(torch.tensor([0.3, 0.25, 0.15, 0.15, 0.15]), count, replacement=True, generator=draw)
    tint = 0.05 * torch.rand(count, 3, generator=draw) - 0.025
    return Scenes(
        background, kind, tint, noun.where(second, UNSAID), size.where(second, UNSAID),
        colour.where(shaped & second, UNSAID), place.where(second, UNSAID), corner,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- captions


def caption(scenes: Scenes, i: int, rng: np.random.Generator | None = None, full: bool = True) -> str:
    """Scene `i` in words; with ``full=False`` sizes, places and the kind of background are left out at random."""

    def said(share: float) -> bool:
        return full or (rng is not None and rng.random() < share)

    def noun(k: int) -> str:
        size = f"{SIZES[scenes.size[i, k]]} " if said(0.65) else ""
        colour = f"{COLOURS[scenes.colour[i, k]]} " if scenes.colour[i, k] >= 0 else ""
        return f"a {size}{colour}{NOUNS[scenes.noun[i, k]]}"

    places = list(PLACES.values())
    kind = f"{KINDS[scenes.kind[i]]} " if scenes.kind[i] > 0 and said(0.85) else ""
    tail = f" on a {COLOURS[scenes.background[i]]} {kind}background"
    where = f" {places[scenes.place[i, 0]]}" if said(0.65) or scenes.noun[i, 1] >= 0 else ""
    if scenes.noun[i, 1] < 0:
        return noun(0) + where + tail
    return f"{noun(0)}{where} and {noun(1)} {places[scenes.place[i, 1]]}{tail}"


# ---------------------------------------------------------------------------------------------------------------- rendering


def make_atlas() -> Tensor:
    """Tiles of every noun in both sizes, premultiplied colour and alpha, (2, N, 4, 64, 64); shapes are white, to be coloured."""
    largest = max(SIDES)
    atlas = torch.zeros(len(SIDES), len(NOUNS), 4, largest, largest)
    for k, side in enumerate(SIDES):
        atlas[k, : len(OBJECTS), :, :side, :side] = object_tiles(side)
        centres = torch.arange(side, dtype=torch.float32) + 0.5 - side / 2
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        for n, shape in enumerate(SHAPES, len(OBJECTS)):
            atlas[k, n, :, :side, :side] = (0.5 - signed_distance(shape, x, y, 0.43 * side)).clamp(0, 1)
    return atlas


def _share_of_dark(res: int, device: torch.device) -> Tensor:
    """How far each kind of background is from its light colour, (kinds, res, res)."""
    at = torch.arange(res, device=device)
    y, x = at[:, None].expand(res, res), at.expand(res, res)
    stripes, rows = (x // 16) % 2, (y // 16) % 2
    dots = ((x % 32 - 15.5) ** 2 + (y % 32 - 15.5) ** 2).sqrt()
    return torch.stack([
        torch.zeros(res, res, device=device), y / (res - 1), 0.6 * stripes, 0.6 * (stripes + rows - 2 * stripes * rows),
        0.7 * (7.5 - dots).clamp(0, 1),
    ])  # fmt: skip


def backgrounds(scenes: Scenes, res: int = RES) -> Tensor:
    """Backgrounds alone, (B, 3, res, res) in [0, 1]: black grows lighter where the others grow darker."""
    device = scenes.background.device
    base = (_RGB.to(device)[scenes.background] + scenes.tint).clamp(0, 1)
    black = (scenes.background == COLOURS.index("black"))[:, None]
    dark = torch.where(black, base * 0.5 + 0.22, base * 0.55)
    share = _share_of_dark(res, device)[scenes.kind][:, None]
    return torch.lerp(base[..., None, None].expand(-1, -1, res, res), dark[..., None, None], share)


def _tiles(scenes: Scenes, atlas: Tensor, k: int) -> Tensor:
    """Premultiplied tiles of object `k` of each scene, (B, 4, 64, 64); empty where there is none."""
    there = (scenes.noun[:, k] >= 0).view(-1, 1, 1, 1)
    tiles = atlas[scenes.size[:, k].clamp(min=0), scenes.noun[:, k].clamp(min=0)] * there
    own = (scenes.colour[:, k] < 0)[:, None]
    colour = torch.where(own, 1.0, _RGB.to(atlas.device)[scenes.colour[:, k].clamp(min=0)])
    return torch.cat([tiles[:, :3] * colour[..., None, None], tiles[:, 3:]], 1)


def place_tiles(tiles: Tensor, corner: Tensor, res: int = RES) -> Tensor:
    """Lay tiles (B, C, s, s) with their corners (B, 2: left, top) on empty images, (B, C, res, res)."""
    at = torch.arange(res, device=tiles.device)
    across, down = at - corner[:, :1], at - corner[:, 1:]
    side = tiles.shape[-1]
    inside = ((across >= 0) & (across < side))[:, None, None, :] & ((down >= 0) & (down < side))[:, None, :, None]
    rows = torch.arange(len(tiles), device=tiles.device)[:, None, None]
    laid = tiles.permute(0, 2, 3, 1)[rows, down.clamp(0, side - 1)[:, :, None], across.clamp(0, side - 1)[:, None, :]]
    return laid.permute(0, 3, 1, 2) * inside


def coverage(scenes: Scenes, atlas: Tensor) -> Tensor:
    """Exact masks of the objects, (B, 2, 128, 128) in [0, 1]."""
    return torch.cat([place_tiles(_tiles(scenes, atlas, k)[:, 3:], scenes.corner[:, k]) for k in range(2)], 1)


def render(scenes: Scenes, atlas: Tensor) -> Tensor:
    """Images of the scenes, (B, 3, 128, 128) in [-1, 1], on the device of `atlas`."""
    scenes = scenes.to(atlas.device)
    images = backgrounds(scenes)
    for k in range(2):
        laid = place_tiles(_tiles(scenes, atlas, k), scenes.corner[:, k])
        images = images * (1 - laid[:, 3:]) + laid[:, :3]
    return images * 2 - 1


def join(parts: Sequence[Scenes]) -> Scenes:
    """One `Scenes` of several."""
    return Scenes(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Scenes)))
