"""The edit, prepared: several tasks at once, cells matched explicitly, leak-proof attention, everything else held to the photo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..core.attention import Attend, token_grid
from ..core.denoiser import Rows
from .config import EditConfig, steps_in
from .geometry import Canvas, Placement, around
from .invert import Inversion
from .parts import Energy, KeyValue, Part, inverse, make_part, on_cells, similarity, weighted
from .pixels import EditResult, Encode, draft
from .placing import Layout, lay_out
from .tasks import Task, Tasks

# Largest guidance of a cell, relative to the noise estimate: single cells may stand out by orders of magnitude.
LIMIT = 1.0


def prepare(
    tasks: Task | Tasks | Iterable[Task], inversion: Inversion, config: EditConfig | None = None, encode: Encode | None = None
) -> GuidedEdit:  # fmt: skip
    """Return an edit that is ready to be sampled: everything that needs no network.

    `encode` is the VAE's encoder (IMAGE at the photo's size -> latents in the model's space). With it, and inversions that know
    their pixels, objects are carried in pixels and then encoded, which keeps them sharper than carrying latent cells.

    Raises ValueError for tasks that lie outside the image or contradict each other, and masks of another size.
    """
    # Masks and latents take part in gradients later: none of them may come from a host's inference mode.
    with torch.inference_mode(False), torch.no_grad():
        layout = lay_out(Tasks.of(tasks).items, inversion)
        inversions = tuple(photo for photo in layout.photos if isinstance(photo, Inversion))
        parts = parts_of(layout)
        clean, image, _ = drafted_latents(layout, parts, encode)
        return GuidedEdit(config or EditConfig(), inversions, layout, parts, Regions.of(parts), clean, image)


def parts_of(layout: Layout) -> tuple[Part, ...]:
    """Return the tasks of a layout on the latent grid."""
    placed = zip(layout.tasks, layout.placements, layout.sources)
    return covered([make_part(task, where, layout.canvases, source) for task, where, source in placed])


def drafted_latents(
    layout: Layout, parts: Sequence[Part], encode: Encode | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the latents of the cut-and-paste, the IMAGE that they were encoded from, None where cells were carried instead, and
    where (H, W) its fill is sure."""
    made = None if encode is None else layout.draft()
    if encode is None or made is None:
        cells = carried_cells(parts, [photo for photo in layout.photos if isinstance(photo, Inversion)])
        return cells, None, torch.zeros(layout.canvases[0].size)
    return encode(made[0]).detach().to("cpu", torch.float32, copy=True), *made


@dataclass(frozen=True, eq=False)
class Regions:
    """Where on the latents an edit does what, (1, 1, h, w) each.

    `target` and `vacated` are shares of cells; `removed` is what is taken away. The others are 0 or 1: `free` may change,
    `carried` follows moved content and `filled` the smooth fill of what was vacated.
    """

    target: Tensor
    vacated: Tensor
    removed: Tensor
    free: Tensor
    carried: Tensor
    filled: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Regions:
        zero = torch.zeros_like(parts[0].target)
        target = union([p.target for p in parts], zero)
        vacated = union([p.vacated for p in parts], zero) * (1 - target)
        # One cell around the edit is free too: a cell's features and pixels reach into its neighbours.
        free = around(torch.maximum(target, vacated))
        carried = around(union([p.target for p in parts if p.carries], zero))
        # A part that carries nothing keeps its own cells.
        made = around(union([p.target for p in parts if not p.carries], zero))
        removed = union([p.removed for p in parts], zero)
        return cls(target, vacated, removed, free, carried, free * (1 - carried) * (1 - made))


@dataclass(frozen=True, eq=False)
class GuidedEdit:
    """One edit of one photo by any number of tasks: where to start, what guides it, what its attention reads, what is held.

    `inversions` are the photo's, then the references'; `clean` (1, C, h, w) are the latents of the cut-and-paste, `draft`
    (1, H, W, 3) is the cut-and-paste itself where it was made in pixels.
    """

    config: EditConfig
    inversions: tuple[Inversion, ...]
    layout: Layout
    parts: tuple[Part, ...]
    regions: Regions
    clean: Tensor
    draft: Tensor | None

    def under(self, conds: Sequence[Rows]) -> GuidedEdit:
        """Return it with conditioning for its inversions, in their order; a host prepares that for each run."""
        return replace(self, inversions=tuple(replace(i, cond=c) for i, c in zip(self.inversions, conds)))

    @property
    def base(self) -> Inversion:
        return self.inversions[0]

    @property
    def canvases(self) -> Sequence[Canvas]:
        return self.layout.canvases

    @property
    def calls(self) -> int:
        """The number of reports that sampling will make, for a progress bar."""
        config, steps = self.config, range(self.first_step, self.config.steps)
        guided = sum(config.passes(i) for i in steps if i in config.guided) * (1 + len(self.inversions))
        return sum(2 * config.passes(i) - 1 for i in steps) + guided  # one call leads back up between two passes

    @cached_property
    def first_step(self) -> int:
        """The first step that leaves any cell free: until then the latents are the draft's, whatever the network says."""
        steps = self.config.steps
        spans = (self.config.anchor_object, self.config.anchor_fill)
        # A part that carries nothing has no draft to follow.
        held = [steps_in(span, steps) for span in spans] if all(p.carries for p in self.parts) else [range(0)]
        return next((i for i in range(steps) if any(i not in span for span in held)), steps)

    # --- the latents ---

    def start(self, fresh: Tensor) -> Tensor:
        """Return the latents at the level of `first_step`."""
        return self._kept(self.first_step, self._drafted(self.first_step, fresh))

    def put_back(self, step: int, x: Tensor, fresh: Tensor) -> Tensor:
        """Return the latents after `step`, at `sigmas[step + 1]`, with what is not to be edited put back."""
        steps, held = self.config.steps, torch.zeros_like(self.regions.free)
        if step in steps_in(self.config.anchor_object, steps):
            held = torch.maximum(held, self.regions.carried)
        if step in steps_in(self.config.anchor_fill, steps):
            held = torch.maximum(held, self.regions.filled)
        return self._kept(step + 1, torch.where(held > 0, self._drafted(step + 1, fresh), x))

    def _drafted(self, step: int, fresh: Tensor) -> Tensor:
        """Return the draft at the noise of a level: what the inversion of the edited photo would look like.

        Inverted noise moves with its object; what was vacated gets `fresh` noise, or the object would grow back.
        """
        noise = torch.where(self.regions.vacated > 0.5, fresh, self.base.noise_at(step))
        for part in self.parts:
            if part.points is not None:
                # Nearest cell: interpolated noise would have too little variance.
                at = self.canvases[part.source_of].normalised(part.points)[None]
                inverted = self.inversions[part.source_of].noise_at(step)
                moved = F.grid_sample(inverted, at, "nearest", "border", align_corners=False)
                noise = torch.where(part.target > 0.5, moved, noise)
        return self.base.space.add_noise(self.clean, noise, self.base.sigmas[step])

    def _kept(self, step: int, x: Tensor) -> Tensor:
        return torch.where(self.regions.free > 0, x, self.base.at(step))

    # --- energies ---

    def energies(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Energy]:
        """Return the energies for the features of the current latents and of the inverted photos."""
        base, kept = references[0], 1 - self.regions.free
        found: list[Energy] = []
        content = current[0].new_zeros((), dtype=torch.float32)
        for f, r in zip(current, base):
            close = similarity(on_cells(f, self.canvases[0]), on_cells(r, self.canvases[0]))
            content = content + inverse(self.config.w_content, weighted(close, kept)) / len(current)
        for part in self.parts:
            found.append(part.edit_energy(current, base, references[part.source_of], self.canvases, self.config))
            content = content + part.fill_energy(current, base, kept, self.canvases[0], self.config)
        return [*found, Energy(content, self.regions.free * (1 - self.regions.target))]

    def guidance(self, gradients: Sequence[Tensor], energies: Sequence[Energy], eps: Tensor) -> Tensor:
        """Return what is added to `eps` (1, C, h, w), from the gradients with respect to latents of variance 1.

        The root mean square of every energy's part, in its region, is `energy_scale` times that of `eps`: so the strength depends
        neither on the size of the region nor on the model, the resolution or the schedule.
        """
        strength = self.config.energy_scale * eps.square().mean().sqrt()
        total = torch.zeros_like(eps)
        for gradient, energy in zip(gradients, energies):
            region = energy.region.to(eps)
            moved = gradient.to(eps) * region
            size = (moved.square().mean(1, keepdim=True).sum() / region.sum().clamp(min=1e-6)).sqrt()
            total = total + torch.where(size > 1e-20, strength * moved / size.clamp(min=1e-20), 0.0)
        limit = LIMIT * eps.square().mean().sqrt()
        norm = total.square().mean(1, keepdim=True).sqrt()
        return total * (limit / norm.clamp(min=1e-20)).clamp(max=1)

    # --- attention ---

    def attend(self, q: Tensor, k: Tensor, v: Tensor, references: Sequence[KeyValue], attend: Attend) -> Tensor:
        """Attend by region: a target reads its object, a vacated area all but the objects that left, the rest the photo.

        q, k, v (B, T, C) are the edit's own, `references` the keys and values (1, S, C) of each inverted photo.
        """
        grids = [token_grid(kv[0].shape[1], *c.grid) for kv, c in zip(references, self.canvases)]
        rest = torch.ones(q.shape[1], dtype=torch.bool, device=q.device)
        out = torch.zeros_like(q)
        everything = [(0, torch.ones(grids[0], dtype=torch.bool))]
        for region, readable in [*self._routes(grids), (everything[0][1], everything)]:
            queries = rearrange(region, "h w -> (h w)").to(q.device) & rest
            rest = rest & ~queries
            if bool(queries.any()):
                out[:, queries] = read(q[:, queries], k, v, references, readable, attend)
        return out

    def _routes(self, grids: Sequence[tuple[int, int]]) -> list[tuple[Tensor, list[tuple[int, Tensor]]]]:
        """Return (queries, [(index of a photo, its readable tokens)]) in order of precedence, as boolean maps at token size."""

        def tokens(weights: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(weights, grids[0])[0, 0] > 0.5

        routes = []
        for part in reversed(self.parts):
            source = F.adaptive_max_pool2d(part.source, grids[part.source_of])[0, 0] > 0.5
            readable = [(part.source_of, source)]
            if not part.carries:
                readable.append((0, ~tokens(part.target)))
            if part.handles is None:
                routes.append((tokens(part.target), readable))
        background = F.adaptive_max_pool2d(self.regions.removed, grids[0])[0, 0] < 0.1
        routes.append((tokens(self.regions.vacated), [(0, background)]))
        return routes

    # --- the result ---

    def result(self, latents: Tensor, notes: tuple[str, ...]) -> EditResult:
        """Return the result for the clean latents: only the edit in pixels, grown and feathered, may differ from the photo."""
        mask, restore = self.layout.changed(self.config.feather)
        latents = torch.where(self.regions.free > 0, latents, self.base.clean)
        return EditResult(latents, mask, notes, self.draft, None if self.draft is None else self.clean, restore)


def read(
    q: Tensor, k: Tensor, v: Tensor, references: Sequence[KeyValue], readable: Sequence[tuple[int, Tensor]], attend: Attend
) -> Tensor:  # fmt: skip
    """Attend to the own tokens and to the readable ones of the references."""
    keys, values = [k], [v]
    for index, allowed in readable:
        tokens = rearrange(allowed, "h w -> (h w)").to(k.device)
        kept = [t[:, tokens].expand(len(q), -1, -1) for t in references[index]]
        keys, values = [*keys, kept[0]], [*values, kept[1]]
    return attend(q, torch.cat(keys, 1), torch.cat(values, 1))


def carried_cells(parts: Sequence[Part], inversions: Sequence[Inversion]) -> Tensor:
    """Return the cut-and-paste made of latent cells, for photos whose pixels are not known."""
    placements = []
    for part in parts:
        if part.points is not None:
            target, removed, vacated = (region[0, 0] for region in (part.target, part.removed, part.vacated))
            placements.append((part.source_of, Placement(target, removed, vacated, part.points, part.bends)))
    canvases = [inversion.canvas for inversion in inversions]
    sizes = [(round(c.grid[0] * c.cell), round(c.grid[1] * c.cell)) for c in canvases]
    # Frames, of latents that have them, are further channels here.
    carried, _ = draft([inversion.clean.flatten(1, -3) for inversion in inversions], sizes, placements)
    return carried.reshape(inversions[0].clean.shape)


def union(weights: Sequence[Tensor], zero: Tensor) -> Tensor:
    """Return the cell-wise largest of several weights (1, 1, h, w); `zero` for none."""
    return torch.stack([zero, *weights]).amax(0)


def covered(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts with each target cut by those that lie on top of it: a later task covers an earlier one."""
    out = []
    for n, part in enumerate(parts):
        above = union([p.target for p in parts[n + 1 :] if p.carries], torch.zeros_like(part.target))
        out.append(replace(part, target=part.target * (1 - above)))
    return tuple(out)
