"""Nodes that edit a photo: invert it once, say what to do, look at a preview, run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.drawing import Shape
from ..core.identity import Identity
from ..core.points import Pair, read_pairs, read_points
from ..edit.config import MEMORY, MODES
from ..edit.tasks import CENTRES, DRAG_METHODS, check_points
from .canvas import IMAGE_TIP, STORED_TIP, canvas, check_canvas, drawn_mask, shown
from .host.vae import cell_side
from .unused import Unused
from .widgets import Widget, choice, integer, number, refusal, seed, string, switch

CATEGORY = "slipstream/edit"
INVERSION, TASKS = "SLIPSTREAM_INVERSION", "SLIPSTREAM_EDIT"
ADD_UP = (TASKS, {"tooltip": "Other tasks for the same run: they add up. Later ones lie on top."})
NO_POINTS = "[]"
MASK_TIP = "White marks the object, at the size of the image. What is painted on the canvas is added."
OBJECT_TIP = (
    "Marks the object (1), for example from a segmentation node. What is painted on the canvas is added. Not needed when the object is "
    "painted there."
)
CANVAS_TIP = (
    "Draw here: paint the object or put a box around it, then pull it to its new place. Ctrl+Z takes a stroke back, arrow keys move by one "
    "pixel. " + STORED_TIP
)


def _pixels(default: int, tooltip: str) -> Widget:
    return number(default, -16384.0, 16384.0, tooltip, 0.5)


@dataclass(frozen=True)
class HostInversion:
    """An inverted image with what the host needs to run its prompt again, and the identity of the MODEL it was made with."""

    inversion: Any
    conditioning: list[Any]
    model: Identity
    config: Any


def _single(image: Tensor, name: str) -> Tensor:
    """Return one RGB image (1, H, W, 3); raises ValueError for a batch."""
    if len(image) != 1:
        raise ValueError(f"Expected `{name}` with one image, but got {len(image)}. Edit one image at a time.")
    return image[..., :3].float()


def _decoded(vae: Any, samples: Tensor) -> Tensor:
    """Return the IMAGE (B, H, W, 3) of latents; a video VAE gives one dimension more."""
    from .host.progress import check_interrupt

    check_interrupt()
    image: Tensor = vae.decode(samples)
    return image.reshape(-1, *image.shape[-3:])


def _encoder(model: Any, vae: Any, canvas: Any) -> Callable[[Tensor], Tensor]:
    """Return IMAGE at the photo's size -> latents in the MODEL's space."""
    from ..edit import fit
    from .host.progress import check_interrupt

    def encode(image: Tensor) -> Tensor:
        check_interrupt()
        with torch.inference_mode():
            samples = vae.encode(fit(image, cell_side(vae), like=canvas)[0])
            latents: Tensor = model.model.process_latent_in(samples)
        return latents

    return encode


class Invert:
    """Prepares a photo for all edits of it: runs it backwards through the MODEL where the mode needs that."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Prepares a photo for Edit. Mode fine runs it backwards through the MODEL once (DDIM inversion, arXiv 2010.02502, as used by "
        "DiffEditor, arXiv 2402.02583); while nothing upstream changes the host keeps the result. Mode draft only encodes it, for any "
        "MODEL."
    )
    RETURN_TYPES = (INVERSION,)
    RETURN_NAMES = ("inversion",)
    OUTPUT_TOOLTIPS = ("The prepared photo, for Edit and for tasks that take from another image.",)
    FUNCTION = "invert"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "Any image model in mode draft; SD1.5, SD2 or SDXL, not quantised, in mode fine."},
                ),
                "vae": ("VAE", {"tooltip": "The VAE of this model."}),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "One photo, any size. Sides that do not fit the VAE are padded, and the padding is cut off again."
                    },
                ),
                "positive": ("CONDITIONING", {"tooltip": "What the photo shows. A plain description works best."}),
                "steps": integer(16, 2, 200, "16 is fast, 50 follows the paper. Edits use the same."),
                "megapixels": number(
                    0.0,
                    0.0,
                    16.0,
                    "Larger photos are worked on at this size; untouched pixels keep theirs. 0: the size that the model was made for.",
                ),
                "memory": choice(
                    MEMORY,
                    "auto",
                    "bank: keep attention keys and values in RAM (fast re-edits). row: compute them again "
                    "in each step (no memory). auto: bank up to 4 GiB.",
                    advanced=True,
                ),
            },
            "optional": {
                "mode": choice(
                    MODES,
                    "draft",
                    "draft: denoises the cut-and-paste inside the edit, on any MODEL, without gradients. fine: inversion, feature "
                    "guidance and shared attention (DiffEditor), UNets only.",
                )
            },
        }

    def invert(
        self,
        model: Any,
        vae: Any,
        image: Tensor,
        positive: list[Any],
        steps: int,
        megapixels: float,
        memory: str,
        mode: str = "draft",
    ) -> tuple[HostInversion]:
        from ..core.cache import INVERSIONS
        from ..edit import EditConfig, fit, invert, taken
        from .host.descent import without_step_cache
        from .host.edit_model import HostEditModel, check_model, check_prompt, inversion_identity
        from .host.identity import entries_of, host_identity, model_identity
        from .host.native import photo_pixels
        from .host.session import run_on_model, whole
        from .host.warnings import warn

        if mode == "fine":
            check_model(model)
        config = EditConfig(steps=steps, memory=memory, mode=mode)
        photo = _single(image, "image")
        padded, canvas = fit(photo, cell_side(vae), max_pixels=photo_pixels(model, megapixels))
        latent = {"samples": vae.encode(padded)}

        def run() -> Any:
            loaded = without_step_cache(whole(model), "Invert")
            return run_on_model(loaded, latent, lambda session: work(session, loaded), positive=positive)

        def work(session: Any, loaded: Any) -> Any:
            ours = HostEditModel(session.denoiser, loaded)
            cond = session.conds["positive"]
            check_prompt("positive", cond, session.latents, config.sigmas(ours.levels)[:-1])
            made = invert(ours, session.latents, cond, config, canvas, photo, session.callback(steps))
            # Prepared conditioning belongs to one run: keep the host's own and prepare it again for each edit.
            return replace(made, cond=None)

        made_with = inversion_identity(model)
        if mode == "draft":
            if memory != "auto":
                warn("Invert", "`memory` has no effect in mode draft, which keeps nothing. Use mode fine on a UNet.")
            latents = model.model.process_latent_in(latent["samples"])
            return (HostInversion(taken(latents, None, canvas, photo), positive, made_with, config),)
        # The host's own cache forgets a photo once another goes through the same node.
        inversion = INVERSIONS.get(
            host_identity(
                "edit", model_identity(model), latent["samples"], photo, entries_of(positive), canvas, config
            ),
            run,
            warn=lambda text: warn("Invert", text),
        )
        if inversion.memory == "row" and memory == "auto":
            warn(
                "Invert",
                "The attention bank would be too large; keys and values are computed again in each step instead.",
            )
        return (HostInversion(inversion, positive, made_with, config),)


class _TaskNode:
    CATEGORY = CATEGORY
    RETURN_TYPES = (TASKS,)
    RETURN_NAMES = ("tasks",)
    OUTPUT_TOOLTIPS = ("What to do, for Edit and Edit Preview, or for the next task.",)
    FUNCTION = "make"


def _add(tasks: Any, task: Any) -> tuple[Any]:
    from ..edit import Tasks

    return (Tasks.of(task) if tasks is None else tasks + task,)


def _drawn(task: tuple[Any], image: Tensor | None, mask: Tensor | None, reference: Tensor | None = None) -> Any:
    """Return a task node's result with what its canvas shows."""
    ui = shown(image, mask, reference)
    return {"ui": ui, "result": task} if any(ui.values()) else task


def _transform_inputs() -> dict[str, Any]:
    return {
        "dx": _pixels(0, "Shift to the right, in pixels of the image; negative = left."),
        "dy": _pixels(0, "Shift down, in pixels of the image; negative = up."),
        "scale": number(1.0, 0.125, 8.0, "Size: 1 keeps it, 2 doubles it, 0.5 halves it."),
        "about": choice(
            CENTRES,
            "object",
            "What stays in place when scaling or turning: the object's or the image's centre.",
            advanced=True,
        ),
    }


def _angle() -> Widget:
    return number(0.0, -360.0, 360.0, "Turns the object clockwise, in degrees; negative = counter-clockwise.", 0.5)


CENTRE_UNUSED = Unused(
    "about", lambda v: v.scale == 1 and v.angle % 360 == 0, "at `scale` 1 and `angle` 0. Change one of them."
)


class MoveObject(_TaskNode):
    """Moves, resizes and turns an object."""

    DESCRIPTION = "Move, resize or turn what is under the mask. The place it leaves is filled in; everything else stays untouched."

    UNUSED = (
        CENTRE_UNUSED,
        Unused(
            "fill_from",
            lambda v: v.dx == v.dy == v.angle % 360 == 0 and v.scale >= 1 and v.about == "object",
            "where nothing is vacated. Move, turn or shrink the object, or disconnect it.",
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": _transform_inputs(),
            "optional": {
                "mask": ("MASK", {"tooltip": OBJECT_TIP}),
                "tasks": ADD_UP,
                "fill_from": (
                    "MASK",
                    {"tooltip": "Where the vacated area takes its look from. Default: everything but the object."},
                ),
                "angle": _angle(),
                "image": ("IMAGE", {"tooltip": IMAGE_TIP}),
                "canvas": canvas(CANVAS_TIP),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, canvas: str | None = None) -> bool | str:
        return refusal(cls, check_canvas, canvas=canvas)

    def make(
        self,
        dx: float,
        dy: float,
        scale: float,
        about: str,
        mask: Tensor | None = None,
        tasks: Any = None,
        fill_from: Tensor | None = None,
        angle: float = 0.0,
        image: Tensor | None = None,
        canvas: str = "",
    ) -> Any:
        from ..edit import Move
        from .host.warnings import warn

        if dx == dy == angle % 360 == 0 and scale == 1:
            warn(
                "Move / Resize Object",
                "the object stays as it is. Press Move on the canvas and pull it, or set `dx`, `dy`, `scale` or `angle`.",
            )
        task = Move(drawn_mask("Move / Resize Object", canvas, mask, image), dx, dy, scale, about, fill_from, angle)
        return _drawn(_add(tasks, task), image, mask)


class PasteObject(_TaskNode):
    """Pastes an object of another image."""

    DESCRIPTION = "Paste what is under the mask of another (inverted) image. It goes to the same place in this photo, shifted by dx and dy."

    UNUSED = (CENTRE_UNUSED,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "reference": (
                    INVERSION,
                    {"tooltip": "The other image, from an Invert with the same model and steps."},
                ),
                **_transform_inputs(),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {"tooltip": "Marks the object in the other image (1). What is painted on the canvas is added."},
                ),
                "tasks": ADD_UP,
                "angle": _angle(),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "The photo that is pasted into. A Load Image is shown at once, any other image after a run."
                    },
                ),
                "canvas": canvas(
                    "Draw here: paint the object on the other image, then place it on the photo. " + STORED_TIP
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, canvas: str | None = None) -> bool | str:
        return refusal(cls, check_canvas, canvas=canvas)

    def make(
        self,
        reference: HostInversion,
        dx: float,
        dy: float,
        scale: float,
        about: str,
        mask: Tensor | None = None,
        tasks: Any = None,
        angle: float = 0.0,
        image: Tensor | None = None,
        canvas: str = "",
    ) -> Any:
        from ..edit import Paste
        from ..edit.placing import check_size

        other = reference.inversion.image
        painted = drawn_mask("Paste Object", canvas, mask, other)
        task = Paste(reference, painted, dx, dy, scale, about, angle)  # type: ignore[arg-type]
        check_size("mask", task.mask, reference.inversion.canvas.size)
        return _drawn(_add(tasks, task), image, mask, other)


class ChangeAppearance(_TaskNode):
    """Gives an object the look of another."""

    DESCRIPTION = (
        "Give an object the look (colour, texture) of an object in another inverted photo; its shape is kept. Paint both objects on the "
        "node, or wire masks."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "reference": (
                    INVERSION,
                    {"tooltip": "The photo with the look, from an Invert with the same model and steps."},
                ),
            },
            "optional": {
                "mask": ("MASK", {"tooltip": MASK_TIP}),
                "reference_mask": (
                    "MASK",
                    {
                        "tooltip": "White marks the object with the look, at the size of that photo. What is painted is added."
                    },
                ),
                "tasks": ADD_UP,
                "image": ("IMAGE", {"tooltip": IMAGE_TIP}),
                "canvas": canvas("Draw here: paint the object that changes. " + STORED_TIP),
                "reference_canvas": canvas(
                    "Draw here: paint the object with the look, on the other photo. " + STORED_TIP
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, canvas: str | None = None, reference_canvas: str | None = None) -> bool | str:
        checked = refusal(cls, check_canvas, canvas=canvas)
        return refusal(cls, check_canvas, reference_canvas=reference_canvas) if checked is True else checked

    def make(
        self,
        reference: HostInversion,
        mask: Tensor | None = None,
        reference_mask: Tensor | None = None,
        tasks: Any = None,
        image: Tensor | None = None,
        canvas: str = "",
        reference_canvas: str = "",
    ) -> Any:
        from ..edit import Appearance
        from ..edit.placing import check_size

        other = reference.inversion.image
        painted = drawn_mask("Appearance", canvas, mask, image)
        look = drawn_mask("Appearance", reference_canvas, reference_mask, other, "reference_mask")
        task = Appearance(painted, reference, look)  # type: ignore[arg-type]
        check_size("reference_mask", task.reference_mask, reference.inversion.canvas.size)
        return _drawn(_add(tasks, task), image, mask, other)


class RemoveObject(_TaskNode):
    """Takes an object away."""

    DESCRIPTION = (
        "Remove what is under the mask. Its place is filled with a part of the photo that fits its surroundings, or by the model "
        "where none fits; everything else stays untouched."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {},
            "optional": {
                "mask": ("MASK", {"tooltip": MASK_TIP}),
                "tasks": ADD_UP,
                "image": ("IMAGE", {"tooltip": IMAGE_TIP}),
                "canvas": canvas("Draw here: paint the object to remove, and its shadow. " + STORED_TIP),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, canvas: str | None = None) -> bool | str:
        return refusal(cls, check_canvas, canvas=canvas)

    def make(self, mask: Tensor | None = None, tasks: Any = None, image: Tensor | None = None, canvas: str = "") -> Any:
        from ..edit import Remove

        return _drawn(_add(tasks, Remove(drawn_mask("Remove Object", canvas, mask, image))), image, mask)


def read_drags(handles: str, targets: str) -> tuple[Pair, ...]:
    """Return (handle, target) pairs of two lists of points, or of arrows in `handles`; raises ValueError for lists that do not fit."""
    wanted = read_points(targets, "targets")
    if not wanted and not handles.strip(" []\n"):
        raise ValueError(
            "Expected at least one pair of `handles` and `targets`, but got none. Pull a point on the canvas."
        )
    try:
        pulled = read_points(handles, "handles")
    except ValueError:
        if wanted:
            raise
        return check_points(read_pairs(handles, "handles"))
    if len(pulled) != len(wanted):
        raise ValueError(
            f"Expected as many `targets` as `handles` ({len(pulled)}), but got {len(wanted)}. Pair them up."
        )
    return check_points(list(zip(pulled, wanted)))


def around(pairs: Sequence[Pair], image: Tensor) -> list[Shape]:
    """Return what may change where nothing was painted: everything within twice the longest drag, or a tenth of the image, of a drag."""
    longest = max(math.dist(*pair) for pair in pairs)
    return [Shape("brush", pair, 2 * max(2 * longest, 0.1 * min(image.shape[1:3]))) for pair in pairs]


class DragPoints(_TaskNode):
    """Pulls points of an object to where they should be."""

    DESCRIPTION = (
        "Pull handle points to target points; only what is under the mask may change. warp bends the region smoothly and repairs it, "
        "energy is the published point guidance (slower, less exact). Pull the points on the canvas, or wire KJNodes' Points Editor."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "handles": string(
                    NO_POINTS, "Where to take hold: points in pixels, written by the canvas, by KJNodes or by hand."
                ),
                "targets": string(
                    NO_POINTS,
                    "Where each handle goes, in the same order. Leave it empty if handles has arrows: 60,60 -> 90,60.",
                ),
                "method": choice(
                    DRAG_METHODS, "warp", "warp is fast and exact, energy is the published point guidance."
                ),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {
                        "tooltip": "Marks what may change (1). Its interior goes with the handles, its edge stays: paint generously. "
                        "What is painted on the canvas is added; without either, the surroundings of the drags may change."
                    },
                ),
                "tasks": ADD_UP,
                "image": ("IMAGE", {"tooltip": IMAGE_TIP}),
                "canvas": canvas(
                    "Draw here: press on a point and pull it to where it should go. Paint what may change. "
                    + STORED_TIP
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, handles: str | None = None, targets: str | None = None, canvas: str | None = None
    ) -> bool | str:
        # A node that nothing was pulled on yet is no mistake: only a run of it is.
        untouched = handles == targets == NO_POINTS
        checked = untouched or refusal(cls, read_drags, handles=handles, targets=targets)
        return refusal(cls, check_canvas, canvas=canvas) if checked is True else checked

    def make(
        self,
        handles: str,
        targets: str,
        method: str,
        mask: Tensor | None = None,
        tasks: Any = None,
        image: Tensor | None = None,
        canvas: str = "",
    ) -> Any:
        from ..edit import Drag

        pairs = read_drags(handles, targets)
        free = around(pairs, image) if image is not None else []
        region = drawn_mask("Drag Points", canvas, mask, image, otherwise=free)
        return _drawn(_add(tasks, Drag(region, pairs, method)), image, mask)


def library_tasks(tasks: Any) -> list[Any]:
    """Return the tasks with library inversions in place of the node's."""
    return [
        replace(task, reference=task.reference.inversion)
        if isinstance(getattr(task, "reference", None), HostInversion)
        else task
        for task in tasks
    ]


def inversions_of(inversion: HostInversion, tasks: Any) -> dict[int, HostInversion]:
    """Return the node inversions of an edit by the id of their library inversion: the photo's and the references'."""
    references = [getattr(task, "reference", None) for task in tasks]
    found = [inversion, *(r for r in references if isinstance(r, HostInversion))]
    return {id(each.inversion): each for each in found}


class EditPreview:
    """Draws what an edit will do."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Draws the tasks on the image, without any sampling: what moves where (arrow and ghost), what is vacated (red), what may change "
        "(blue)."
    )
    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("preview", "draft")
    OUTPUT_TOOLTIPS = ("Image with arrows, ghosts and regions.", "The plain cut-and-paste that the edit starts from.")
    FUNCTION = "draw"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The image that will be edited."}),
                "tasks": (TASKS, {"tooltip": "From Move, Remove, Paste, Appearance or Drag."}),
            }
        }

    def draw(self, image: Tensor, tasks: Any) -> dict[str, Any]:
        from ..edit.preview import preview
        from .host.preview import preview_images

        drawn = preview(_single(image, "image"), library_tasks(tasks))
        return {"ui": preview_images(drawn[0]), "result": drawn}


def _any_task(v: Any, *names: str) -> bool:
    return any(type(task).__name__ in names for task in v.tasks)


def _in_draft_mode(v: Any) -> bool:
    return isinstance(v.inversion, HostInversion) and v.inversion.config.mode == "draft"


class EditSampler:
    """Runs the edit."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Runs the tasks on a photo, in the mode that Invert prepared it for: draft (any MODEL) or fine (DiffEditor, arXiv 2402.02583; "
        "DragonDiffusion, arXiv 2307.02421). No training and no extra model. Every pixel outside the edit comes back untouched. In mode "
        "fine a MODEL patched by an IP-Adapter node gives its image prompt from 20 to 40 % of the steps."
    )
    RETURN_TYPES = ("IMAGE", "LATENT", "MASK", "STRING")
    RETURN_NAMES = ("image", "latent", "changed", "report")
    OUTPUT_TOOLTIPS = (
        "The edited photo; pixels outside the edit are the original's.",
        "The edited latent, for further sampling.",
        "What changed, with a soft edge.",
        "Cost and warnings.",
    )
    FUNCTION = "edit"

    UNUSED = (
        Unused(
            "guidance noise low_memory",
            _in_draft_mode,
            "in mode draft: it needs no gradients and adds no noise. Use mode fine of Invert on a UNet.",
        ),
        Unused("low_memory", lambda v: v.guidance == 0, "at `guidance` 0: there is no gradient pass. Switch it off."),
        Unused(
            "hold_object",
            lambda v: not _any_task(v, "Move", "Paste", "Drag"),
            "where nothing is carried (Remove, Appearance).",
        ),
        Unused(
            "hold_fill",
            lambda v: not _any_task(v, "Move", "Remove", "Drag", *["Appearance"] * _in_draft_mode(v)),
            "where nothing is vacated (Paste, Appearance).",
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The MODEL that inverted the photo."}),
                "vae": ("VAE", {"tooltip": "The VAE of this model."}),
                "inversion": (INVERSION, {"tooltip": "The photo, from Invert."}),
                "tasks": (TASKS, {"tooltip": "What to do: Move, Remove, Paste, Appearance, Drag, or several."}),
                "positive": (
                    "CONDITIONING",
                    {"tooltip": "What the result shows. The same prompt as for Invert is fine."},
                ),
                "negative": ("CONDITIONING", {"tooltip": "What to keep out. Unused at cfg 1."}),
                "seed": seed("Noise of the vacated area and of the edited region. Same seed, same result."),
                "cfg": number(
                    2.0,
                    0.0,
                    30.0,
                    "Classifier-free guidance of the edit. 1 halves the cost; the paper uses 4 to 5.",
                    0.1,
                ),
                "guidance": number(
                    0.1, 0.0, 2.0, "Strength of the feature guidance, relative to the noise estimate. 0 = off."
                ),
                "hold_object": number(
                    0.9,
                    0.0,
                    1.0,
                    "Share of the steps in which a moved object follows its draft exactly. Lower: "
                    "blends in more, keeps less. 1: kept as it is.",
                ),
                "hold_fill": number(
                    0.4,
                    0.0,
                    1.0,
                    "Share of the steps in which a vacated area follows a smooth fill. Lower: the model invents more there.",
                ),
                "noise": number(
                    0.4,
                    0.0,
                    1.0,
                    "Fresh noise within the edit, from 22 to 40 % of the steps (paper: 0.4).",
                    advanced=True,
                ),
                "feather": integer(4, 0, 256, "Soft seam around the edit, in pixels.", advanced=True),
                "low_memory": switch(
                    False,
                    "Recompute activations in the gradient pass: a third slower, a fifth of the memory.",
                    advanced=True,
                ),
            }
        }

    def edit(
        self,
        model: Any,
        vae: Any,
        inversion: HostInversion,
        tasks: Any,
        positive: list[Any],
        negative: list[Any],
        seed: int,
        cfg: float,
        guidance: float,
        hold_object: float,
        hold_fill: float,
        noise: float,
        feather: int,
        low_memory: bool,
    ) -> dict[str, Any]:
        from ..edit import finish
        from .host.warnings import warn

        config = inversion.config.replace(
            cfg_scale=cfg,
            energy_scale=guidance,
            anchor_object=(0.0, hold_object),
            anchor_fill=(0.0, hold_fill),
            eta=noise,
            feather=feather,
            checkpoint=low_memory,
        )
        inversions = inversions_of(inversion, tasks)
        _check_made_with(model, list(inversions.values()))

        encode = _encoder(model, vae, inversion.inversion.canvas)
        sample = _sample_drafted if config.mode == "draft" else _sample_guided
        try:
            run = sample(model, inversion, inversions, library_tasks(tasks), config, encode, positive, negative, seed)
        except ValueError as error:
            raise ValueError(_as_widgets(str(error))) from error
        decoded = iter(_decoded(vae, samples) for samples in run.latents)
        edited = finish(inversion.inversion.image, run.result, lambda latents: next(decoded))
        for note in run.result.notes:
            warn("Edit", _as_widgets(note))
        report = f"{run.calls} network calls, {run.rows} rows, mode {config.mode}."
        if config.mode == "fine":
            report += f" Keys and values: {inversion.inversion.memory}."
        return {"ui": {"text": [report]}, "result": (edited, {"samples": run.latents[0]}, run.result.mask, report)}


# What the library calls some of the widgets.
WIDGETS = {"energy_scale": "guidance", "cfg_scale": "cfg", "eta": "noise", "checkpoint": "low_memory"}


def _as_widgets(text: str) -> str:
    """Return a sentence of the library with the names of the widgets."""
    return re.sub(r"`(\w+)`", lambda found: f"`{WIDGETS.get(found[1], found[1])}`", text)


class _EditRun(NamedTuple):
    """What the library returned, its latents (of the edit, and of the draft where there is one) as the host's, the cost."""

    result: Any
    latents: list[Tensor]
    calls: int
    rows: int


def _sample_drafted(
    model: Any, inversion: HostInversion, inversions: dict[int, HostInversion], tasks: Any, config: Any, encode: Any,
    positive: list[Any], negative: list[Any], seed: int,
) -> _EditRun:  # fmt: skip
    from ..edit import prepare_draft

    return sample_prepared(
        model, prepare_draft(tasks, inversion.inversion, config, encode), "Edit", positive, negative, seed
    )


def sample_prepared(
    model: Any, prepared: Any, node: str, positive: list[Any], negative: list[Any], seed: int
) -> _EditRun:
    """Sample an edit of the draft mode on a MODEL, as the host's own sampling would: with all its patches."""
    from ..core.noise import SeededNoise
    from ..edit import sample_draft
    from .host.descent import without_step_cache
    from .host.edit_model import check_prompt
    from .host.guidance import asks_negative
    from .host.session import run_on_model

    config = prepared.config

    def work(session: Any) -> _EditRun:
        sigmas = config.sigmas(session.denoiser.levels)[prepared.first_step : -1]
        for name in ("positive", "negative") if asks_negative(model, config.cfg_scale) else ("positive",):
            check_prompt(name, session.conds[name], session.latents, sigmas)
        result = sample_draft(
            session.denoiser, prepared, session.conds["positive"], session.conds["negative"], SeededNoise(seed),
            session.callback(prepared.calls),
        )  # fmt: skip
        latents = [session.process_out(t) for t in (result.latents, result.draft_latents) if t is not None]
        return _EditRun(result, latents, session.denoiser.calls, session.denoiser.rows)

    return run_on_model(
        without_step_cache(model, node),
        {"samples": torch.zeros_like(prepared.photo)},
        work,
        rows=2,
        seed=seed,
        cfg_scale=config.cfg_scale,
        positive=positive,
        negative=negative,
    )


def _sample_guided(
    model: Any, inversion: HostInversion, inversions: dict[int, HostInversion], tasks: Any, config: Any, encode: Any,
    positive: list[Any], negative: list[Any], seed: int,
) -> _EditRun:  # fmt: skip
    """Sample an edit of mode fine on a MODEL."""
    from ..core.noise import SeededNoise
    from ..edit import Drag, prepare, sample_edit
    from .host.descent import without_step_cache
    from .host.edit_model import (
        HostEditModel,
        check_model,
        check_prompt,
        check_reference,
        has_image_prompt,
        left_out,
    )
    from .host.guidance import asks_negative
    from .host.session import run_on_model, whole
    from .host.warnings import warn

    check_model(model)
    model = whole(model)
    if config.energy_scale == 0 and any(isinstance(task, Drag) and task.method == "energy" for task in tasks):
        warn("Edit", "Drag Points by energy pulls nothing at `guidance` 0. Raise it, or drag by warp.")
    for name in left_out(model):
        warn("Edit", f"The patch {name} of this MODEL has no effect on an edit in mode fine and is left out.")
    # The draft is encoded here, before the MODEL is loaded: both at once may not fit.
    prepared = prepare(tasks, inversion.inversion, config, encode)
    inverted = {f"inversion_{n}": inversions[id(each)].conditioning for n, each in enumerate(prepared.inversions)}

    def work(session: Any) -> _EditRun:
        plain = HostEditModel(session.denoiser, model)
        prompted = HostEditModel(session.denoiser, model, image_prompt=True) if has_image_prompt(model) else None
        sigmas = config.sigmas(plain.levels)[:-1]
        for name in ("positive", "negative") if asks_negative(model, config.cfg_scale) else ("positive",):
            check_prompt(name, session.conds[name], session.latents, sigmas)
        conds = [session.conds[name] for name in inverted]
        for cond, own in zip(conds, prepared.canvases):
            check_reference(cond, prepared.canvases[0].grid, own.grid)
        result = sample_edit(
            plain, prepared.under(conds), session.conds["positive"], session.conds["negative"], SeededNoise(seed), prompted,
            session.callback(prepared.calls),
        )  # fmt: skip
        latents = [session.process_out(t) for t in (result.latents, result.draft_latents) if t is not None]
        return _EditRun(result, latents, plain.calls, plain.rows)

    return run_on_model(
        without_step_cache(model, "Edit"),
        {"samples": torch.zeros(1, 4, *prepared.canvases[0].grid)},
        work,
        rows=2 + len(inverted),
        seed=seed,
        cfg_scale=config.cfg_scale,
        positive=positive,
        negative=negative,
        **inverted,
    )


def _check_made_with(model: Any, inversions: list[HostInversion]) -> None:
    from .host.edit_model import inversion_identity

    made_with = inversion_identity(model)
    if any(inversion.model.digest != made_with.digest for inversion in inversions):
        raise ValueError(
            "Expected inversions made with this `model`, but got one of another MODEL or of other patches (LoRA, sampling). Connect "
            "the same MODEL to Invert and Edit."
        )


class Harmonise:
    """Makes a composition one image."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Turns a collage into one image: seams are repainted, pasted objects take on the light around them, and all other pixels are "
        "kept. Any MODEL. Place it between the host's Compositor (or any two images and a mask) and Save Image."
    )
    RETURN_TYPES = ("IMAGE", "LATENT", "MASK", "STRING")
    RETURN_NAMES = ("image", "latent", "changed", "report")
    OUTPUT_TOOLTIPS = (
        "The image; pixels away from the pasted objects are the composition's.",
        "Its latent, for further sampling.",
        "What changed, with a soft edge.",
        "Cost and warnings.",
    )
    FUNCTION = "harmonise"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Any image model."}),
                "vae": ("VAE", {"tooltip": "The VAE of this model."}),
                "image": ("IMAGE", {"tooltip": "The composition, or the image to paste if `background` is connected."}),
                "mask": ("MASK", {"tooltip": "White = what was pasted. Size of the image."}),
                "positive": ("CONDITIONING", {"tooltip": "What the whole image shows."}),
                "negative": ("CONDITIONING", {"tooltip": "What to keep out. Unused at cfg 1."}),
                "seed": seed("Noise of what is repainted. Same seed, same result."),
                "steps": integer(
                    16, 2, 200, "Steps of a whole sampling; the first ones, which would change nothing, are skipped."
                ),
                "cfg": number(2.0, 0.0, 30.0, "Classifier-free guidance. 1 halves the cost.", 0.1),
                "hold_object": number(
                    0.7,
                    0.0,
                    1.0,
                    "Share of the steps in which a pasted object follows the composition. Lower: blends in more, keeps less.",
                ),
                "hold_seam": number(0.4, 0.0, 1.0, "The same for the seam around it. Lower: more is repainted there."),
                "seam": integer(8, 0, 512, "Width of the seam on both sides of the edge, in pixels."),
                "megapixels": number(
                    0.0,
                    0.0,
                    16.0,
                    "Larger images are worked on at this size; untouched pixels keep theirs. 0: the size that the model was made for.",
                ),
            },
            "optional": {
                "background": (
                    "IMAGE",
                    {
                        "tooltip": "If connected, `image` is pasted onto it under the mask. Both must have the same size."
                    },
                )
            },
        }

    def harmonise(
        self,
        model: Any,
        vae: Any,
        image: Tensor,
        mask: Tensor,
        positive: list[Any],
        negative: list[Any],
        seed: int,
        steps: int,
        cfg: float,
        hold_object: float,
        hold_seam: float,
        seam: int,
        megapixels: float,
        background: Tensor | None = None,
    ) -> dict[str, Any]:
        from ..core.tensors import composite
        from ..edit import HARMONISE, finish, fit, prepare_harmony
        from ..edit.placing import check_size
        from ..edit.tasks import check_mask
        from .host.native import photo_pixels

        config = HARMONISE.replace(
            steps=steps, cfg_scale=cfg, anchor_object=(0.0, hold_object), anchor_fill=(0.0, hold_seam)
        )
        photo = _single(image, "image")
        if background is not None:
            under = _single(background, "background")
            if under.shape != photo.shape:
                raise ValueError(
                    f"Expected `background` of the image's size {photo.shape[2]} x {photo.shape[1]}, but got "
                    f"{under.shape[2]} x {under.shape[1]}. Resize one of them."
                )
            region = check_mask("mask", mask)
            check_size("mask", region, (photo.shape[1], photo.shape[2]))
            photo = composite(under, photo, region[None])
        _, canvas = fit(photo, cell_side(vae), max_pixels=photo_pixels(model, megapixels))
        prepared = prepare_harmony(photo, mask, canvas, _encoder(model, vae, canvas), config, seam)
        run = sample_prepared(model, prepared, "Harmonise", positive, negative, seed)
        decoded = iter(_decoded(vae, samples) for samples in run.latents)
        made = finish(photo, run.result, lambda latents: next(decoded))
        report = f"{run.calls} network calls, {run.rows} rows."
        return {"ui": {"text": [report]}, "result": (made, {"samples": run.latents[0]}, run.result.mask, report)}


NODES = {
    "SlipstreamInvert": (Invert, "Invert Photo"),
    "SlipstreamMove": (MoveObject, "Move / Resize Object"),
    "SlipstreamPaste": (PasteObject, "Paste Object"),
    "SlipstreamRemove": (RemoveObject, "Remove Object"),
    "SlipstreamAppearance": (ChangeAppearance, "Appearance"),
    "SlipstreamDrag": (DragPoints, "Drag Points"),
    "SlipstreamEditSampler": (EditSampler, "Edit"),
    "SlipstreamEditPreview": (EditPreview, "Edit Preview"),
    "SlipstreamHarmonise": (Harmonise, "Harmonise"),
}
