"""The draft mode: the cut-and-paste is noised and denoised inside what may change; no inversion, no gradients, any model.

Every cell follows the draft down to a level of its own and the network from there on (a change map, as in Differential Diffusion,
arXiv 2306.00950); cells outside the edit follow the photo all the way. So the photo around is known at every level without a
network call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.checks import check_finite
from ..core.denoiser import Cond, Denoiser
from ..core.guidance import guided
from ..core.holding import held
from ..core.masks import grow, over, touched
from ..core.noise import NoiseSource, SeededNoise
from ..core.progress import Callback, Step
from ..core.samplers import sample
from .config import EditConfig
from .geometry import Canvas, Placement, around
from .guided import drafted_latents, parts_of
from .invert import Inversion, device_of
from .pixels import EditResult, Encode
from .placing import lay_out
from .tasks import Appearance, Drag, Task, Tasks


@dataclass(frozen=True, eq=False)
class DraftedEdit:
    """An edit that is ready to be sampled in the draft mode.

    `photo` and `clean` (1, C, h, w), or (1, C, 1, h, w), are the latents of the photo and of its draft. `hold` (1, 1, h, w) is the
    share of the steps in which a cell follows the draft; 1 never changes. Where the draft is `known` to be right, (1, 1, h, w), the
    network's changes count only beyond its own error, which the cells `inside` each part of it show, (1, K, h, w). `mask`, `draft`,
    `restore` and `notes` go into the result.
    """

    config: EditConfig
    photo: Tensor
    clean: Tensor
    hold: Tensor
    mask: Tensor
    restore: Tensor
    draft: Tensor | None = None
    known: Tensor | None = None
    inside: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def first_step(self) -> int:
        """The first step that leaves any cell free."""
        return int(self._released.min())

    @property
    def calls(self) -> int:
        """The number of reports that sampling will make, for a progress bar."""
        return self.config.steps - self.first_step

    @property
    def source(self) -> Tensor:
        """The latents that are followed: the draft's where anything may change, the photo's elsewhere."""
        return torch.where(self.free, self.clean, self.photo)

    @property
    def free(self) -> Tensor:
        """Where the latents may change, shaped to broadcast over them."""
        return over(self._released[:, 0] < self.config.steps, self.clean)

    @property
    def _released(self) -> Tensor:
        """The step (1, 1, h, w) from which on a cell is free."""
        return (self.hold * self.config.steps).round().long()

    def levels(self, sigmas: Tensor) -> Tensor:
        """Return the level at and below which a cell is free, shaped to broadcast over the latents."""
        return over(sigmas[self._released[:, 0]], self.clean)

    def result(self, latents: Tensor) -> EditResult:
        latents = torch.where(self.free, latents, self.photo)
        # What was followed: cells of the photo beside it decode otherwise beside the draft's own.
        draft_latents = None if self.draft is None else self.source
        return EditResult(latents, self.mask, self.notes, self.draft, draft_latents, self.restore)


def drafts(photo: Inversion, config: EditConfig) -> bool:
    """Return whether an edit runs in the draft mode; raises ValueError where mode fine is asked for and the photo is not inverted."""
    if photo.steps == 0 and config.mode == "fine":
        raise ValueError(
            "Expected an inverted photo for mode fine, but got one of mode draft. Use one mode for `invert` and `edit`."
        )
    return photo.steps == 0 or config.mode == "draft"


def prepare_draft(
    tasks: Task | Tasks | Iterable[Task], photo: Inversion, config: EditConfig | None = None, encode: Encode | None = None
) -> DraftedEdit:  # fmt: skip
    """Return an edit for `sample_draft`. `photo` is what `invert` returned, in either mode; `encode` as in `prepare`.

    An Appearance begins with the other object's look, carried to its place; a Drag by energy, which needs gradients, is a warp.

    Raises ValueError as `prepare` does, and for an Appearance without known pixels.
    """
    config = config or EditConfig()
    items = Tasks.of(tasks).items
    notes: tuple[str, ...] = ()
    if any(isinstance(task, Drag) and task.method == "energy" for task in items):
        items = tuple(replace(task, method="warp") if isinstance(task, Drag) else task for task in items)
        notes = ("Drag by energy needs gradients: this is a drag by warp. Use mode fine on a UNet.",)
    layout = lay_out(items, photo, looks=True)
    clean, image, sure = drafted_latents(layout, parts_of(layout), encode)
    if image is None and any(isinstance(task, Appearance) for task in items):
        raise ValueError(
            "Expected `encode` and images for an Appearance without inversion, but got none. Give `image` to `invert` and "
            "`encode` to `edit`."
        )
    mask, restore = layout.changed(config.feather)
    hold, known, inside = holds(layout.placements, layout.canvases[0], config, sure)
    return DraftedEdit(config, photo.clean, clean, hold, mask, restore, image, known, inside, (*layout.notes, *notes))


def holds(
    placements: Sequence[Placement], canvas: Canvas, config: EditConfig, sure: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the share of the steps (1, 1, h, w) in which each cell follows the draft, where the draft is known to be right, and the cells
    inside each part of that (1, K, h, w): what is carried, and what of the fill is `sure` (H, W), is followed longer than the rest."""
    blank = torch.zeros(canvas.size)
    vacated = torch.stack([blank, *(p.vacated for p in placements)]).amax(0)
    changed = [vacated, *(p.target for p in placements)]
    kept = [vacated * sure, *(p.target for p in placements if p.keeps)]
    free, carried = (around(canvas.to_grid(torch.stack([blank, *regions]).amax(0))) for regions in (changed, kept))
    doubted = touched(canvas.to_grid(vacated * (1 - sure))) & ~touched(
        canvas.to_grid(torch.stack([blank, *kept]).amax(0))
    )
    hold, known = torch.where(free > 0, config.anchor_fill[1], 1.0), (carried > 0) & ~doubted
    fill, *objects = (canvas.to_grid(region) for region in kept)
    inside = torch.cat([well_within(fill), *(well_within(part, part > 0) for part in objects)], 1)
    return torch.where(known, config.anchor_object[1], hold), known, inside


def well_within(covered: Tensor, other: Tensor | None = None) -> Tensor:
    """Return the cells (1, 1, h, w) well within a region that covers these shares of them; of a small one all whole ones, else `other`."""
    whole = covered == 1
    inner = whole & ~touched(grow(1 - covered, 1))
    return next((cells for cells in (inner, whole, other) if cells is not None and bool(cells.any())), whole)


def sample_draft(
    model: Denoiser[Cond],
    problem: DraftedEdit,
    cond: Cond,
    uncond: Cond | None = None,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> EditResult:
    """Sample a prepared edit: Euler steps from the first level at which anything is free, one or two rows each.

    Args:
        cond: one row, the prompt of the result.
        uncond: one row; without it, or with cfg_scale 1, there is no classifier-free guidance and half the rows.
        callback: called after each step, `problem.calls` times; may raise to stop.
    """
    config, space = problem.config, model.space
    if problem.calls == 0:
        return problem.result(problem.source)
    device = device_of(model)
    with torch.no_grad():
        sigmas = config.sigmas(model.levels).float()
        levels = problem.levels(sigmas).to(device)
        latents = problem.source.to(device)
        watch = _Watch(problem, sigmas)
        drawn = (noise or SeededNoise(0))(problem.clean).to(device)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return watch(guided(model, x, sigma, cond, uncond, config.cfg_scale), sigma)

        def mask_at(sigma: Tensor) -> Tensor:
            return (sigma <= levels).to(latents)

        def report(step: Step) -> None:
            if callback is not None:
                callback(replace(step, phase="edit"))

        sigmas = sigmas[problem.first_step :]
        start = space.add_noise(latents, drawn, sigmas[0])
        x = sample("euler", held(denoise, space, latents, drawn, mask_at), start, sigmas, space, callback=report)
        check_finite("result", x, "Use float32 or bfloat16 for the network.")
    return problem.result(watch.sifted(x.to(problem.clean)))


# A change of what is known counts from this many times the network's own error on.
BEYOND = 4.0


@dataclass
class _Watch:
    """What the network makes of cells that are held, as they are known to be right: its own error, for this image and this level.

    Where it changes what is carried by no more than that, the change says nothing, and the draft's own latents come back.
    """

    problem: DraftedEdit
    sigmas: Tensor
    error: float = 0.0

    def __call__(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        held, config = ~self.problem.free, self.problem.config
        step = round(config.anchor_object[1] * config.steps)
        if self.problem.known is not None and step < config.steps and sigma == self.sigmas[step] and bool(held.any()):
            source = self.problem.source.to(denoised)
            apart = (denoised - source).square().mean(1, keepdim=True).sqrt()
            inside = self.problem.inside
            parts = [] if inside is None else [over(cells, source) for cells in inside.unbind(1)]
            right = [apart[cells.to(apart.device).expand_as(apart)] for cells in (held, *parts)]
            self.error = max(float(values.quantile(0.98)) for values in right if len(values))
        return denoised

    def sifted(self, latents: Tensor) -> Tensor:
        known, source = self.problem.known, self.problem.source
        if known is None:
            return latents
        slight = (latents - source).square().mean(1, keepdim=True).sqrt() <= BEYOND * self.error
        return torch.where(slight & over(known[:, 0], latents), source, latents)
