"""The edit: several tasks at once, cells matched explicitly, leak-proof attention, everything else held to the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention import Attend, token_grid
from ..core.masks import feather, grow, touched
from ..core.noise import NoiseSource
from .config import EditConfig, steps_in
from .geometry import Placement
from .invert import Inversion
from .parts import KeyValue, Part, Pull, inverse, make_part, on_cells, similarity, weighted
from .picture import EditResult, draft
from .placing import place_tasks
from .tasks import Task

Encode = Callable[[Tensor], Tensor]
# Largest guidance of a cell, relative to the noise estimate: single cells may stand out by orders of magnitude.
LIMIT = 1.0


class GuidedEdit:
    """One edit of one picture by any number of tasks: where to start, what pulls it, what its attention reads, what stays.

    `pictures` are the base picture, then the references; steps before `first_step` would not change anything.
    """

    def __init__(
        self, tasks: Sequence[Task], base: Inversion, config: EditConfig, encode: Encode | None = None
    ) -> None:
        self.config, self.base = config, base
        self.notes: list[str] = []
        self.pictures = [base]
        for task in tasks:
            reference = getattr(task, "reference", None)
            if reference is not None and not any(reference is p for p in self.pictures):
                self.pictures.append(reference)
        self.canvases = [p.canvas for p in self.pictures]
        self.placements = place_tasks(tasks, self.canvases, [self.picture_of(t) for t in tasks], self.notes)
        parts = [make_part(task, self.canvases, self.picture_of(task)) for task in tasks]
        self.parts = stacked(parts)
        self.target = union(p.target for p in self.parts)
        self.vacated = union(p.vacated for p in self.parts) * (1 - self.target)
        # One cell around the edit is free too: a cell's features and pixels reach into its neighbours.
        self.free = touched(F.max_pool2d(torch.maximum(self.target, self.vacated), 3, 1, 1)).float()
        self.removed = union(p.removed for p in parts)
        carried = union(p.target for p in self.parts if p.carries)
        self.carried = touched(F.max_pool2d(carried, 3, 1, 1)).float() if carried.ndim else torch.zeros_like(self.free)
        # Around what was vacated; a part that carries nothing keeps its own cells.
        own = union(p.target for p in self.parts if not p.carries)
        made = touched(F.max_pool2d(own, 3, 1, 1)).float() if own.ndim else torch.zeros_like(self.free)
        self.filled = self.free * (1 - self.carried) * (1 - made)
        self.noise_strength = config.eta * self.free
        self.draft: Tensor | None = None
        self.clean = self._draft(encode)
        self.first_step = self._first_step()
        self.fresh = torch.zeros_like(self.clean)

    def picture_of(self, task: Task) -> int:
        reference = getattr(task, "reference", None)
        return next((i for i, p in enumerate(self.pictures) if p is reference), 0)

    def _draft(self, encode: Encode | None) -> Tensor:
        """Return clean latents of the cut-and-paste: made in pixels and encoded where pixels are known, else cell by cell."""
        self.draft = self.draft_image() if encode is not None else None
        if self.draft is not None and encode is not None:
            return encode(self.draft).float().cpu()
        carried = []
        for part in self.parts:
            if part.points is not None:
                target, removed, vacated = part.target[0, 0], part.removed[0, 0], part.vacated[0, 0]
                carried.append((part.picture, Placement(target, removed, vacated, part.points, part.bends)))
        sizes = [(round(c.grid[0] * c.cell), round(c.grid[1] * c.cell)) for c in self.canvases]
        return draft([p.clean for p in self.pictures], sizes, carried)

    def draft_image(self) -> Tensor | None:
        """Return the cut-and-paste (1, H, W, 3) in pixels, None when a picture's pixels are not known."""
        pixels = [p.image.movedim(-1, 1) for p in self.pictures if p.image is not None]
        if len(pixels) < len(self.pictures):
            return None
        carried = [(p.picture, placed) for p, placed in zip(self.parts, self.placements) if p.carries]
        return draft(pixels, [c.size for c in self.canvases], carried).movedim(1, -1).clamp(0, 1)

    # --- the latents ---

    def start(self, noise: NoiseSource) -> Tensor:
        """Inverted noise moves with its object; what was vacated gets fresh noise, or the object would grow back."""
        self.fresh = noise.fork("vacated")(self.clean)
        return self._held(self.first_step, self._drafted(self.first_step))

    def _first_step(self) -> int:
        """Return the first step that leaves any cell free: until then the latents are the draft's, whatever the network says."""
        held = self._hold()
        return next((i for i in range(self.config.steps) if any(i not in span for span in held)), self.config.steps)

    def _hold(self) -> list[range]:
        """Return the steps in which each kind of free cell follows the draft; none for an edit that carries nothing there."""
        if not all(p.carries for p in self.parts):
            return [range(0)]
        return [steps_in(span, self.config.steps) for span in (self.config.anchor_object, self.config.anchor_fill)]

    def _drafted(self, step: int) -> Tensor:
        """Return the draft at the noise of a level: what the inversion of the edited picture would look like."""
        noise = torch.where(self.vacated > 0.5, self.fresh, self.base.noise_at(step))
        for part in self.parts:
            if part.points is not None:
                # Nearest cell: interpolated noise would have too little variance.
                at = self.canvases[part.picture].normalised(part.points)[None]
                inverted = self.pictures[part.picture].noise_at(step)
                moved = F.grid_sample(inverted, at, "nearest", "border", align_corners=False)
                noise = torch.where(part.target > 0.5, moved, noise)
        return self.base.space.add_noise(self.clean, noise, self.base.sigmas[step])

    def _held(self, step: int, x: Tensor) -> Tensor:
        return torch.where(self.free > 0, x, self.base.at(step))

    def settle(self, step: int, x: Tensor) -> Tensor:
        """Return the latents after `step`, at `sigmas[step + 1]`, with what is not to be edited put back."""
        steps = self.config.steps
        held = torch.zeros_like(self.free)
        if step in steps_in(self.config.anchor_object, steps):
            held = torch.maximum(held, self.carried)
        if step in steps_in(self.config.anchor_fill, steps):
            held = torch.maximum(held, self.filled)
        return self._held(step + 1, torch.where(held > 0, self._drafted(step + 1), x))

    # --- energies ---

    def pulls(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        """Return the energies for the features of the current latents and of the pictures."""
        base, kept = references[0], 1 - self.free
        found: list[Pull] = []
        content = current[0].new_zeros((), dtype=torch.float32)
        for f, r in zip(current, base):
            close = similarity(on_cells(f, self.canvases[0]), on_cells(r, self.canvases[0]))
            content = content + inverse(self.config.w_content, weighted(close, kept)) / len(current)
        for part in self.parts:
            found += part.pull(current, base, references[part.picture], self.canvases, self.config)
            content = content + part.refill(current, base, kept, self.canvases[0], self.config)
        return [*found, Pull(content, self.free * (1 - self.target))]

    def scale(self, gradients: Sequence[Tensor], pulls: Sequence[Pull], eps: Tensor) -> Tensor:
        """Give every energy the same say: its root mean square in its region is `energy_scale` times that of eps.

        So the strength depends neither on the size of the region nor on the model, the resolution or the schedule.
        """
        strength = self.config.energy_scale * eps.square().mean().sqrt()
        total = torch.zeros_like(eps)
        for gradient, pull in zip(gradients, pulls):
            region = pull.region.to(eps)
            pulled = gradient.to(eps) * region
            size = (pulled.square().mean(1, keepdim=True).sum() / region.sum().clamp(min=1e-6)).sqrt()
            total = total + torch.where(size > 1e-20, strength * pulled / size.clamp(min=1e-20), 0.0)
        limit = LIMIT * eps.square().mean().sqrt()
        norm = total.square().mean(1, keepdim=True).sqrt()
        return total * (limit / norm.clamp(min=1e-20)).clamp(max=1)

    # --- attention ---

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend) -> Tensor:
        """Attend by region: a target reads its object, a vacated area everything but the objects that left, the rest the picture."""
        grids = [token_grid(kv[0].shape[1], *c.grid) for kv, c in zip(pictures, self.canvases)]
        rest = torch.ones(grids[0], dtype=torch.bool, device=q.device).flatten()
        out = torch.zeros_like(q)
        for region, readable in self._routes(grids):
            queries = region.flatten().to(q.device) & rest
            rest = rest & ~queries
            if bool(queries.any()):
                out[:, queries] = self._read(q[:, queries], k, v, pictures, readable, attend)
        if bool(rest.any()):
            out[:, rest] = self._read(q[:, rest], k, v, pictures, [(0, torch.ones(grids[0], dtype=torch.bool))], attend)
        return out

    def _routes(self, grids: Sequence[tuple[int, int]]) -> list[tuple[Tensor, list[tuple[int, Tensor]]]]:
        """Return (queries, [(picture, its readable tokens)]) in order of precedence, as boolean maps at token size."""

        def tokens(weights: Tensor, picture: int) -> Tensor:
            return F.adaptive_avg_pool2d(weights, grids[picture])[0, 0] > 0.5

        routes = []
        for part in reversed(self.parts):
            source = F.adaptive_max_pool2d(part.source, grids[part.picture])[0, 0] > 0.5
            readable = [(part.picture, source)]
            if not part.carries:
                readable.append((0, ~tokens(part.target, 0)))
            if part.handles is None:
                routes.append((tokens(part.target, 0), readable))
        background = F.adaptive_max_pool2d(self.removed, grids[0])[0, 0] < 0.1
        routes.append((tokens(self.vacated, 0), [(0, background)]))
        return routes

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pictures: Sequence[KeyValue],
        readable: list[tuple[int, Tensor]],
        attend: Attend,
    ) -> Tensor:
        """Attend to the own tokens and to the readable ones of the pictures."""
        keys, values = [k], [v]
        for picture, allowed in readable:
            index = allowed.flatten().to(k.device)
            if bool(index.any()):
                keys.append(pictures[picture][0][:, index].expand(len(q), -1, -1))
                values.append(pictures[picture][1][:, index].expand(len(q), -1, -1))
        return attend(q, torch.cat(keys, 1), torch.cat(values, 1))

    # --- the result ---

    def result(self, latents: Tensor, notes: tuple[str, ...]) -> EditResult:
        """Only the edit in pixels, grown and feathered, may differ from the picture."""
        height, width = self.canvases[0].size
        mask, restore = torch.zeros(1, height, width), torch.ones(1, height, width)
        for part, placed in zip(self.parts, self.placements):
            changed = touched(torch.maximum(placed.target, placed.removed)).float()[None]
            mask = torch.maximum(mask, changed)
            if not part.carries:  # made anew: the old detail must not come back
                restore = restore * (1 - changed)
        reach = min(self.config.feather, min(height, width) // 2)
        if reach:
            mask = feather(grow(mask, reach), reach)
        latents = torch.where(self.free > 0, latents, self.base.clean)
        return EditResult(latents, mask, notes, self.draft, None if self.draft is None else self.clean, restore)


def union(weights) -> Tensor:  # type: ignore[no-untyped-def]
    """Return the cell-wise largest of several weights (1, 1, h, w); 0 for none."""
    out = torch.zeros(())
    for w in weights:
        out = torch.maximum(out, w) if out.ndim else w
    return out


def stacked(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with each target cut by those that lie on top of it: a later task covers an earlier one."""
    from dataclasses import replace

    out = []
    for n, part in enumerate(parts):
        above = union(p.target for p in parts[n + 1 :] if p.carries)
        out.append(replace(part, target=part.target * (1 - above)))
    return out
