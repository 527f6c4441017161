"""DDIM inversion of an image: its latents at every level of a schedule, and what the edit reads of its attention and features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from torch import Tensor

from ..core.attention import AttentionBank, AttentionHook, AttentionModel
from ..core.cache import INVERSIONS
from ..core.checks import check_finite, check_latents, check_shape
from ..core.denoiser import VE, Cond, Denoiser, NoiseSpace, Rows
from ..core.features import FeatureModel
from ..core.inversion import invert_step
from ..core.progress import Callback, Reporter
from .config import KEYS, EditConfig, steps_in
from .geometry import Canvas

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Inversion(Generic[Cond]):
    """One inverted photo; in the draft mode, just the photo: its clean latents and the one level 0.

    `latents` (S + 1, C, h, w) are the image at `sigmas` (S + 1,), from noise to clean, on the CPU, in the model's noise `space`.
    `canvas` tells how its pixels lie on the latents; `image` (1, H, W, 3) are those pixels, if they were given; `cond` is what it
    was inverted with. Keys and values live in `bank` (None: recomputed when read).
    """

    latents: Tensor
    sigmas: Tensor
    cond: Cond
    canvas: Canvas
    image: Tensor | None = None
    bank: AttentionBank | None = None
    memory: str = "row"
    space: NoiseSpace = VE
    # Names its features in the cache, whichever copy with prepared conditioning asks for them.
    _name: object = field(default_factory=object, repr=False)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def clean(self) -> Tensor:
        """The clean latents (1, C, h, w)."""
        return self.at(self.steps)

    def at(self, step: int) -> Tensor:
        """Return the latents (1, C, h, w) at `sigmas[step]`."""
        return self.latents[step][None]

    def noise_at(self, step: int) -> Tensor:
        """Return the noise (1, C, h, w) in the latents at `sigmas[step]`; 0 where there is none."""
        sigma = self.sigmas[step]
        return self.space.noise_of(self.at(step), self.clean, sigma) if sigma > 0 else torch.zeros_like(self.clean)

    def network_row(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the latents and level whose network call makes `step`'s keys and values: one level cleaner, seen at this level."""
        return carried(self.at(step + 1), self.sigmas[step + 1], self.sigmas[step], self.space), self.sigmas[step]

    def has_keys(self, step: int) -> bool:
        return self.bank is not None and step in self.bank.steps

    def features(self, model: FeatureModel[Cond], step: int) -> list[Tensor]:
        """Return the image's decoder features at a step, without gradients, kept for re-edits within the cache's bound."""

        def compute() -> list[Tensor]:
            device, sigma = device_of(model), self.sigmas[step]
            cond = self.cond.reference(float(sigma))
            with torch.no_grad():
                found = model.features(self.at(step).to(device), sigma.to(device).expand(1), cond)
            return [f.cpu() for f in found]

        return INVERSIONS.get((self._name, step), compute)


def carried(x: Tensor, low: Tensor, high: Tensor, space: NoiseSpace) -> Tensor:
    """Return latents of level `low` with the variance of `high`, as the published inversion shows them to the network."""
    return x * (space.deviation(high) / space.deviation(low))


def check_model(model: Denoiser) -> None:
    """Raise ValueError for a model that the fine mode cannot edit with: a flow, or one without features or attention access."""
    if model.space.name == "flow":
        raise ValueError(
            "Expected an eps or v-prediction model (SD1.5, SD2, SDXL) for the fine mode, but got a flow model (SD3, Flux): its "
            "feature blocks are not defined. Use mode draft."
        )
    for ability, name in ((FeatureModel, "features"), (AttentionModel, "self-attention")):
        if not isinstance(model, ability):
            raise ValueError(
                f"Expected a model that shows its {name} for the fine mode, but {type(model).__name__} does not. Use mode draft."
            )


def device_of(model: Any) -> torch.device | str:
    return getattr(model, "device", "cpu")


def denoise_on_device(model: Any, x: Tensor, sigma: Tensor, cond: Rows) -> Tensor:
    """Call the network where it is; the loop's own tensors are small and stay where `x` is. `sigma` is one level."""
    device = device_of(model)
    return model(x.to(device), sigma.to(device, torch.float32).expand(len(x)), cond).to(x.device)


def denoise_recording(model: Any, x: Tensor, sigma: Tensor, cond: Rows, hook: AttentionHook | None) -> Tensor:
    """Return the denoised estimate of one row while `hook`, if there is one, sees its self-attention.

    Combined prompts are several network rows, of parts of the image perhaps; what is recorded is then a row of its own.
    """
    reference = cond.reference(float(sigma))
    if hook is not None:
        with model.self_attention(hook):
            denoised = denoise_on_device(model, x, sigma, reference)
    return denoised if hook is not None and reference is cond else denoise_on_device(model, x, sigma, cond)


def invert(
    model: Denoiser[Cond],
    latents: Tensor,
    cond: Cond,
    config: EditConfig | None = None,
    canvas: Canvas | None = None,
    image: Tensor | None = None,
    callback: Callback | None = None,
) -> Inversion[Cond]:
    """Invert one photo: `steps` network rows, without guidance (arXiv 2010.02502 section 4.3); none in the draft mode.

    Args:
        latents: clean latents (1, C, h, w); in the draft mode also (1, C, 1, h, w).
        cond: one row, the prompt that describes the image.
        config: steps, schedule and memory; an edit must use the same ones.
        canvas: how the image's pixels lie on the latents (`fit` returns it); eight pixels a cell when left out.
        image: the image (1, H, W, 3), kept so that an edit can carry objects in pixels.

    Raises:
        ValueError: for more than one photo, NaN, or in mode fine a model without its abilities.
    """
    config = config or EditConfig()
    if config.mode == "fine":
        check_model(model)
    # Tensors made in a host's inference mode could not be part of the edit's gradients.
    with torch.inference_mode(False), torch.no_grad():
        if config.mode == "draft":
            return taken(latents, cond, canvas, image)
        return _invert(model, latents, cond, config, canvas, image, callback)


def taken(latents: Tensor, cond: Cond, canvas: Canvas | None = None, image: Tensor | None = None) -> Inversion[Cond]:
    """Return a photo as the draft mode takes it: not inverted. Arguments as of `invert`; latents (1, C, h, w) or (1, C, 1, h, w)."""
    if latents.ndim == 5 and latents.shape[2] > 1:
        raise ValueError(
            f"Expected the latents of one image, but got {latents.shape[2]} frames. Edit one image at a time."
        )
    check_latents("latents", latents, remedy="Give the latents of one image.")
    if len(latents) > 1:
        raise ValueError(f"Expected the latents of one image, but got {len(latents)}. Edit one image at a time.")
    check_finite("latents", latents)
    clean = latents.detach().to("cpu", torch.float32, copy=True)
    return Inversion(clean, torch.zeros(1), cond, *_pixels(clean, canvas, image), memory="none")


def _pixels(latents: Tensor, canvas: Canvas | None, image: Tensor | None) -> tuple[Canvas, Tensor | None]:
    """Return the canvas of latents (8 pixels a cell when left out) and a copy of the image; raises ValueError if they do not fit."""
    grid = (latents.shape[-2], latents.shape[-1])
    canvas = canvas or Canvas((8 * grid[0], 8 * grid[1]), grid, 8)
    if canvas.grid != grid or (image is not None and tuple(image.shape[1:3]) != canvas.size):
        raise ValueError(
            f"Expected `canvas` of these {grid} latents and this image, but got {canvas}. Use the one `fit` returned for it."
        )
    return canvas, None if image is None else image.detach().to("cpu", torch.float32, copy=True)


def _invert(
    model: Denoiser[Cond], latents: Tensor, cond: Cond, config: EditConfig, canvas: Canvas | None, image: Tensor | None,
    callback: Callback | None,
) -> Inversion[Cond]:  # fmt: skip
    check_shape("latents", latents, (1, None, None, None), "Invert one image at a time.")
    check_finite("latents", latents)
    latents, sigmas = latents.detach().to("cpu", torch.float32, copy=True), config.sigmas(model.levels).cpu()
    bank = AttentionBank(budget=config.memory_limit if config.memory == "auto" else 1 << 62)
    keep = config.memory != "row"
    wanted = steps_in(KEYS, config.steps)
    report = Reporter(config.steps, callback)
    space, x = model.space, latents
    trajectory = [x]
    for step in reversed(range(config.steps)):
        low, high = sigmas[step + 1], sigmas[step]
        hook = bank.recorder(step) if keep and step in wanted else None

        def denoise(seen: Tensor, sigma: Tensor, hook: AttentionHook | None = hook) -> Tensor:
            return denoise_recording(model, seen, sigma, cond, hook)

        x, denoised = invert_step(denoise, x, low, high, space, carried(x, low, high, space))
        trajectory.append(x)
        if keep and hook is not None and config.memory == "auto":
            keep = _fits(bank, len(wanted))
        report("invert", sigmas[step], denoised)
    if not keep:
        bank.clear()
    stored = torch.cat(trajectory[::-1])
    check_finite("inverted latents", stored, "Use float32 or bfloat16 for the network.")
    canvas, kept = _pixels(latents, canvas, image)
    return Inversion(stored, sigmas, cond, canvas, kept, bank if keep else None, "bank" if keep else "row", space)


def _fits(bank: AttentionBank, steps: int) -> bool:
    """Return whether the whole bank stays within its budget, judged from the steps recorded so far; tells when not."""
    expected = bank.bytes // max(1, len(bank.steps)) * steps
    if not bank.full and expected <= bank.budget:
        return True
    log.warning(
        "The attention bank would take %.1f GiB, more than memory_limit %.1f GiB: keys and values are computed again in each step.",
        expected / 2**30, bank.budget / 2**30,
    )  # fmt: skip
    return False


def check_inversions(inversions: Sequence[Inversion], config: EditConfig, sigmas: Tensor) -> None:
    """Raise ValueError unless every inversion was made with the levels of this edit."""
    for inversion in inversions:
        if inversion.steps == 0:
            raise ValueError(
                "Expected inversions of mode fine, but got a photo that is not inverted (mode draft). Use one mode for all of them."
            )
        if inversion.sigmas.shape != sigmas.shape or not torch.allclose(inversion.sigmas, sigmas.cpu()):
            raise ValueError(
                f"Expected inversions made with the {config.steps} steps of this edit, but got one with {inversion.steps} steps or "
                "another schedule. Use one config for `invert` and `edit`."
            )
