"""What no copy of the image fits, completed from many small ones.

Patches around a hole carry its structure inwards on a small image (Criminisi et al., IEEE TIP 2004); then, level by level, every patch
takes the one that is most like it (Wexler et al., PAMI 2007), found among its neighbours' and some random ones (PatchMatch, Barnes et
al., SIGGRAPH 2009), and each pixel is the weighted mean of what the patches over it say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..core.masks import bounding_box, grow
from ..core.tensors import fill

# Patches are squares of 2 RADIUS + 1 pixels. A hole is reduced until nothing in it lies deeper than DEEP pixels and its
# pairs with all others are few (PAIRS).
RADIUS, DEEP = 3, 8
# A hole looks around itself as far as this share of its longer side, at least so many pixels.
AROUND, LEAST = 0.6, 32
# How often patches are matched at the smallest level, the middle ones and the finest; a level of more than MOST patches keeps the matches
# of the one before.
START, ROUNDS, FINEST, MOST = 2, 3, 2, 12_000
# A patch from the other end of the image must be more alike by so much.
FARNESS = 3.0
# A pixel counts for so much of one that is nearer to the hole's edge, down to so many pixels.
DEPTH, DEEPEST = 0.87, 16
# A patch may be lighter or darker than its match by so much, of an image's deviation; the change counts for that share of a difference.
LIGHT, SHADE = 0.5, 0.9
# Up to so many pairs of patches are all compared; beyond, patches are looked for.
PAIRS = 1 << 22


def completed(values: Tensor, hole: Tensor, usable: Tensor) -> Tensor:
    """Return values (1, C, H, W) with a `hole` (H, W) completed from what is `usable` (H, W); smoothly where no whole patch is."""
    top, left, bottom, right = bounding_box(hole)
    reach = max(LEAST, round(AROUND * max(bottom - top, right - left)))
    part = (..., slice(max(0, top - reach), bottom + reach), slice(max(0, left - reach), right + reach))
    levels = _levels(values[part].float().cpu(), hole[part].cpu(), (usable & ~hole)[part].cpu())
    if not levels:
        return torch.where(hole, fill(values, (~hole).to(values)[None, None]), values)
    pixels, matches = levels[-1].started()
    for level, coarse in reversed(list(zip(levels, levels[1:]))):
        matches = level.finer(coarse, matches)
        pixels = level.voted(level.enlarged(coarse, pixels), matches)
        rounds = 0 if len(level.centres) > MOST else FINEST if level is levels[0] else ROUNDS
        pixels, matches, _ = level.settled(pixels, matches, rounds)
    out = values.clone()
    out[part] = levels[0].image_of(pixels).to(values)
    return torch.where(hole, out, values)


def _levels(image: Tensor, hole: Tensor, usable: Tensor) -> list[_Level]:
    """Return the image at its own size, a half, a quarter and so on, as far as it has patches to take from."""
    levels = list[_Level]()
    while True:
        easy = int(hole.sum()) * int(usable.sum()) <= PAIRS and not bool(grow(hole, -DEEP).any())
        last = easy or min(hole.shape) < 8 * RADIUS
        level = _Level.of(image, hole, usable, 1 if last else 2)
        levels += [] if level is None else [level]
        if last or level is None:
            return levels
        known = (~hole).to(image)[None, None]
        share = F.avg_pool2d(known, 2, ceil_mode=True)
        image = F.avg_pool2d(image * known, 2, ceil_mode=True) / share.clamp(min=1e-6)
        hole, usable = ~_halved(~hole), _halved(usable)


def _halved(mask: Tensor) -> Tensor:
    """Return where cells of 2 x 2 pixels lie wholly in a mask (H, W)."""
    return F.avg_pool2d(mask.float()[None, None], 2, ceil_mode=True)[0, 0] > 0.99


@dataclass(frozen=True, eq=False)
class _Level:
    """An image of `size` (h, w), bordered by RADIUS pixels and flat: `pixels` (P, C), rows of `width`.

    `hole` (P,) is to be filled and `weight` (P,) how much a pixel counts: 1 where it is known, less the deeper it lies, 0 beyond the image.
    Patches over the hole have their `centres` (N,) on a grid of `stride`, found by `index` (P,); they may take the patches around
    `sources` (S,), which are where `source` (P,) is. `window` (49,) leads from a centre to its patch.
    """

    size: tuple[int, int]
    width: int
    stride: int
    pixels: Tensor
    hole: Tensor
    weight: Tensor
    source: Tensor
    sources: Tensor
    centres: Tensor
    index: Tensor
    window: Tensor
    light: float

    @classmethod
    def of(cls, image: Tensor, hole: Tensor, usable: Tensor, stride: int) -> _Level | None:
        height, width = hole.shape
        inside, hole, usable = (F.pad(m, (RADIUS,) * 4) for m in (torch.ones_like(hole), hole, usable))
        on_grid = torch.zeros_like(inside)
        on_grid[RADIUS::stride, RADIUS::stride] = True
        source = inside & grow(usable, -RADIUS)
        centres, sources = (m.flatten().nonzero()[:, 0] for m in (inside & on_grid & grow(hole, RADIUS), source))
        if not len(sources):
            return None
        weight, left = inside.float(), hole
        for _ in range(DEEPEST):
            weight, left = weight * torch.where(left, DEPTH, 1.0), grow(left, -1)
        index = torch.full((hole.numel(),), -1)
        index[centres] = torch.arange(len(centres))
        along = torch.arange(-RADIUS, RADIUS + 1)
        wide = width + 2 * RADIUS
        pixels = rearrange(F.pad(image, (RADIUS,) * 4, mode="replicate"), "1 c h w -> (h w) c")
        window = (along[:, None] * wide + along).flatten()
        return cls(
            (height, width), wide, stride, pixels, hole.flatten(), weight.flatten(), source.flatten(), sources, centres, index, window,
            LIGHT * float(pixels[~hole.flatten()].std()),
        )  # fmt: skip

    def image_of(self, pixels: Tensor) -> Tensor:
        """Return flat pixels (P, C) as an image (1, C, h, w)."""
        whole = rearrange(pixels, "(h w) c -> 1 c h w", w=self.width)
        return whole[..., RADIUS:-RADIUS, RADIUS:-RADIUS]

    def patches(self, pixels: Tensor, at: Tensor) -> Tensor:
        """Return what lies around some centres (N,), (N, 49, ...)."""
        return pixels[at[:, None] + self.window]

    def apart(self, centres: Tensor, sources: Tensor) -> Tensor:
        """Return what the way from sources to centres costs."""
        return FARNESS / max(self.size) * (self.places(centres) - self.places(sources)).norm(dim=-1)

    def places(self, at: Tensor) -> Tensor:
        """Return flat places (...) as rows and columns (..., 2)."""
        return torch.stack([at // self.width, at % self.width], -1).float()

    def started(self) -> tuple[Tensor, Tensor]:
        """Return pixels and matches to begin with: those of two first guesses whose patches are most like their matches."""
        known = (~self.hole).float()[:, None]
        flat = rearrange(torch.cat([self.pixels, known], 1), "(h w) c -> 1 c h w", w=self.width)
        smooth = rearrange(fill(flat[:, :-1], flat[:, -1:]), "1 c h w -> (h w) c")
        guesses = [self.settled(pixels, None, START) for pixels in (peeled(self), smooth)]
        pixels, matches, _ = min(guesses, key=lambda guess: guess[2])
        return pixels, matches

    def settled(self, pixels: Tensor, matches: Tensor | None, rounds: int) -> tuple[Tensor, Tensor, float]:
        """Return pixels and matches after some rounds of matching and voting, and how far patches are from their matches in the mean."""
        costs = torch.zeros(1)
        for _ in range(rounds):
            matches, costs = self.matched(pixels, matches)
            pixels = self.voted(pixels, matches, costs)
        assert matches is not None or not rounds
        return pixels, self.sources[:0] if matches is None else matches, float(costs.mean())

    def matched(self, pixels: Tensor, matches: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return for each centre the source whose patch is most like its own, (N,), and how far it is, as a mean of squares."""
        wanted, weight = self.patches(pixels, self.centres), self.patches(self.weight, self.centres)
        if len(self.centres) * len(self.sources) <= PAIRS or matches is None:
            matches, costs = self._compared(wanted, weight)
        else:
            matches, costs = self._looked_for(wanted, weight, matches)
        return matches, costs / weight.sum(1)

    def _compared(self, wanted: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best of all sources and its cost."""
        offered = self.patches(self.pixels, self.sources)
        squares = offered.square().sum(-1)
        best = list[tuple[Tensor, Tensor]]()
        for want, weigh, centres in zip(wanted.split(512), weight.split(512), self.centres.split(512)):
            costs = (want.square().sum(-1) * weigh).sum(1, keepdim=True) + weigh @ squares.T
            for channel in range(offered.shape[-1]):
                ours, theirs = want[..., channel] * weigh, offered[..., channel]
                costs = costs - 2 * ours @ theirs.T
                apart = ours.sum(1, keepdim=True) - weigh @ theirs.T
                costs = costs - self.spared(apart, weigh.sum(1, keepdim=True))
            costs = costs.clamp(min=0)
            far = torch.cdist(self.places(centres), self.places(self.sources)) * (FARNESS / max(self.size))
            best.append((costs + far).min(1))
        return self.sources[torch.cat([b[1] for b in best])], torch.cat([b[0] for b in best])

    def _looked_for(self, wanted: Tensor, weight: Tensor, matches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best of each match, those of its neighbours and random ones nearer and nearer, and its cost."""
        draw = torch.Generator().manual_seed(0)
        best, costs = matches, torch.full((len(matches),), torch.inf)

        def offer(sources: Tensor) -> None:
            nonlocal best, costs
            sources = sources.clamp(0, len(self.source) - 1)
            picks = (self.source[sources] & ((sources != best) | costs.isinf())).nonzero()[:, 0]
            sources = sources[picks]
            differ, weigh = wanted[picks] - self.patches(self.pixels, sources), weight[picks]
            cost = (differ.square().sum(-1) * weigh).sum(1) + self.apart(self.centres[picks], sources)
            cost = cost - self.spared((differ * weigh[..., None]).sum(1), weigh.sum(1, keepdim=True)).sum(-1)
            better = cost < costs[picks]
            best, costs = best.clone(), costs.clone()
            best[picks[better]], costs[picks[better]] = sources[better], cost[better]

        offer(matches)
        for step in (1, self.width):
            for shift in (step * self.stride, -step * self.stride):
                beside = self.index[(self.centres + shift).clamp(0, len(self.index) - 1)]
                offer(torch.where(beside >= 0, best[beside] - shift, best))
        reach = max(self.size) // 4
        while reach > 0:
            rows, columns = torch.randint(-reach, reach + 1, (2, len(best)), generator=draw)
            offer(best + rows * self.width + columns)
            reach //= 4
        return best, costs

    def spared(self, apart: Tensor, weight: Tensor) -> Tensor:
        """Return what patches lose of their squared differences once their light is changed; `apart` sums what they differ by."""
        light = (apart / weight).clamp(-self.light, self.light)
        return (2 * light * apart - light.square() * weight) * (1 - SHADE)

    def enlarged(self, coarse: _Level, pixels: Tensor) -> Tensor:
        """Return this level's pixels (P, C), those of the hole from a level of half the size."""
        height, width = self.size
        large = F.interpolate(coarse.image_of(pixels), scale_factor=2.0, mode="bilinear", align_corners=False)
        large = F.pad(large[..., :height, :width], (RADIUS,) * 4, mode="replicate")
        return torch.where(self.hole[:, None], rearrange(large, "1 c h w -> (h w) c"), self.pixels)

    def voted(self, pixels: Tensor, matches: Tensor, costs: Tensor | None = None) -> Tensor:
        """Return pixels (P, C) with the hole as the matches say: those that are most alike and least deep count most."""
        trust = self.weight[self.centres]
        if costs is not None:
            trust = trust * (torch.exp(-costs / (costs.quantile(0.75) + 1e-8)) + 1e-6)
        offered, weight = self.patches(self.pixels, matches), self.patches(self.weight, self.centres)[..., None]
        light = ((self.patches(pixels, self.centres) - offered) * weight).sum(1, keepdim=True) / weight.sum(
            1, keepdim=True
        )
        said = torch.cat([offered + light.clamp(-self.light, self.light), torch.ones_like(offered[..., :1])], -1)
        places = (self.centres[:, None] + self.window).flatten()
        total = torch.zeros(len(pixels), said.shape[-1])
        total.index_add_(0, places, rearrange(said * trust[:, None, None], "n p c -> (n p) c"))
        return torch.where(self.hole[:, None], total[:, :-1] / total[:, -1:].clamp(min=1e-12), pixels)

    def finer(self, coarse: _Level, matches: Tensor) -> Tensor:
        """Return the matches of a level of half the size, for the centres of this one."""
        rows, columns = self.centres // self.width - RADIUS, self.centres % self.width - RADIUS
        on = 2 * coarse.stride
        above = coarse.index[
            (rows // on * coarse.stride + RADIUS) * coarse.width + columns // on * coarse.stride + RADIUS
        ]
        match = matches[above.clamp(min=0)]
        rows = (2 * (match // coarse.width - RADIUS) + rows % on).clamp(0, self.size[0] - 1)
        columns = (2 * (match % coarse.width - RADIUS) + columns % on).clamp(0, self.size[1] - 1)
        found = (rows + RADIUS) * self.width + columns + RADIUS
        near = self.sources[torch.searchsorted(self.sources, found).clamp(max=len(self.sources) - 1)]
        return torch.where(self.source[found] & (above >= 0), found, near)


def peeled(level: _Level) -> Tensor:
    """Return a level's pixels (P, C) with its hole filled patch by patch from its edge, first where lines run in (Criminisi et al.)."""
    pixels, known = level.pixels.clone(), ~level.hole & (level.weight > 0)
    sure, left = known.float(), level.hole.clone()
    pixels[~known] = 0
    offered = level.patches(level.pixels, level.sources)
    squares, offered = offered.square().sum(-1), rearrange(offered, "s p c -> s (p c)")
    while True:
        front = (left & grow(known.view(-1, level.width), 1).flatten()).nonzero()[:, 0]
        if not len(front):
            return pixels
        trust = sure[front[:, None] + level.window].mean(1)
        first = int((trust * (_lines(level, pixels, known, front) + 0.02)).argmax())
        place = front[first] + level.window
        seen = known[place].float()
        costs = squares @ seen - 2 * offered @ (pixels[place] * seen[:, None]).flatten()
        source = level.sources[(costs + level.apart(front[first], level.sources)).argmin()]
        new = left[place]
        pixels[place[new]], sure[place[new]] = level.pixels[source + level.window][new], trust[first]
        known[place[new]], left[place[new]] = True, False


def _lines(level: _Level, pixels: Tensor, known: Tensor, front: Tensor) -> Tensor:
    """Return how strong the lines are that run into the hole at its front (F,)."""
    there = known.view(1, -1, level.width).float()
    edge = F.avg_pool2d(F.avg_pool2d(there, 3, 1, 1), 3, 1, 1).flatten()
    grey, near = pixels.mean(1), front[:, None] + level.window
    ends = [(n.clamp(max=len(grey) - 1) for n in (near + step, near - step)) for step in (level.width, 1)]
    slopes = [(grey[after] - grey[before]) * (known[after] & known[before]) for after, before in ends]
    strongest = (slopes[0].square() + slopes[1].square()).argmax(1, keepdim=True)
    down, right = (slope.gather(1, strongest)[:, 0] for slope in slopes)
    y, x = (edge[front + step] - edge[front - step] for step in (level.width, 1))
    return (down * x - right * y).abs() / (x.square() + y.square()).sqrt().clamp(min=1e-6)
