"""Our functions as the host's SAMPLER and GUIDER objects, for SamplerCustomAdvanced and every node that takes one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.guidance import Denoise
from ...core.noise import SeededNoise
from ...core.schedules import make_sigmas, whole_steps
from .denoiser import levels_of
from .identity import SETTINGS
from .session import Session, bound_denoise, check_images, session_of
from .warnings import owned, warn


def make_sampler(function: Callable[[Session], Tensor], name: str, replaces: bool = False) -> Any:
    """Return a SAMPLER (`comfy.samplers.KSAMPLER`) that runs `function(session)` -> latents in model space.

    The session has the user's guider bound as `session.denoise` (with its cfg), and the raw `session.denoiser` and
    `session.conds` for calls at another cfg. `session.latents` is the clean latent, `session.noise` the unit noise,
    `session.sigmas` the levels, `session.seed` the seed of the NOISE node. "denoised_output" equals "output".

    Args:
        function: the technique.
        name: the node's display name, for warnings.
        replaces: True when the technique puts its own known pixels back; then a `noise_mask` on the latent is ignored
            with a warning, because two replacements would fight.
    """
    import comfy.samplers

    @owned
    def sample(  # type: ignore[no-untyped-def]
        model, x, sigmas, extra_args=None, callback=None, disable=None, **options
    ):
        extra = dict(extra_args or {})
        if replaces and extra.get("denoise_mask") is not None:
            warn(
                name,
                "the latent's noise mask is ignored: this sampler keeps the subject without it. Remove the mask node.",
            )
            extra["denoise_mask"] = None
        bind = partial(bound_denoise, model, extra)
        session = session_of(model.inner_model, bind, extra, _clean(model, x), model.noise, sigmas)
        latents = function(session)
        if callback is not None:
            last = len(sigmas) - 2
            callback({"i": last, "denoised": latents, "x": latents, "sigma": sigmas[-1], "sigma_hat": sigmas[-1]})
        return latents

    return comfy.samplers.KSAMPLER(sample)


def _clean(model: Any, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if model.latent_image is None else model.latent_image


def make_guider(
    model: Any,
    start: Callable[[Session], Denoise],
    cfg_scale: float = 1.0,
    settings: tuple[Any, ...] | None = None,
    end: Callable[[Session, Tensor], None] | None = None,
    **conds: list[Any],
) -> Any:
    """Return a GUIDER whose prediction is ours: `start(session)` -> (x, sigma (B,)) -> denoised.

    `start` is called once at the beginning of each sampling, so state (a stored residual, the first noise) lives in its
    closure and never leaks into the next run. `session.denoiser`, `session.conds`, `session.noise`, `session.latents`,
    `session.sigmas` and `session.cfg_scale` are ready; do not call `session.denoise`, it would call this guider again.

    Args:
        model: MODEL.
        start: makes the prediction of one run.
        cfg_scale: the guider's cfg, `session.cfg_scale`.
        settings: what tells this prediction from others (a name and its values), for its identity; None = the code of `start`
            and what it holds.
        end: called with the session and its result, in the model's space, when a sampling has finished.
        **conds: CONDITIONING by name; at least `positive`.
    """
    import comfy.samplers

    begin = owned(start)

    class Guider(comfy.samplers.CFGGuider):
        prediction: Denoise | None = None
        session: Session | None = None
        inputs: tuple[Any, ...] = ()

        def inner_sample(self, noise, latent_image, device, sampler, sigmas, *args, **kwargs):  # type: ignore[no-untyped-def]
            check_images(self.model_patcher, latent_image)
            self.prediction, self.session, self.inputs = None, None, (latent_image, noise, sigmas)
            try:
                samples = super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)
                if end is not None and self.session is not None:
                    end(self.session, self.inner_model.process_latent_in(samples))
                return samples
            finally:
                self.prediction, self.session, self.inputs = None, None, ()

        def predict_noise(self, x, timestep, model_options={}, seed=None):  # type: ignore[no-untyped-def] # noqa: B006
            if self.prediction is None or self.session is None:
                samples, noise, sigmas = self.inputs
                extra = {"model_options": model_options, "seed": seed}
                latents = samples if not torch.count_nonzero(samples) else self.inner_model.process_latent_in(samples)
                bind = partial(bound_denoise, self, extra)
                self.session = session_of(self, bind, extra, latents, noise, sigmas, wrapped=True)
                self.prediction = begin(self.session)
            self.session.denoiser.adopt(model_options)
            return self.prediction(x, timestep)

    guider = Guider(model)
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg_scale)
    if settings is not None:
        setattr(guider, SETTINGS, settings)
    return guider


# Where the host calls a schedule of ours by another name.
SCHEDULER_NAMES = {"uniform": "normal"}


def ksampler_sigmas(model: Any, schedule: str, steps: int, strength: float) -> Tensor:
    """Return the sigmas of KSampler with `denoise` = `strength`; a `schedule` that the host lacks is core's own."""
    import comfy.samplers

    sampling, name = model.get_model_object("model_sampling"), SCHEDULER_NAMES.get(schedule, schedule)
    if name not in comfy.samplers.SCHEDULER_NAMES:
        return make_sigmas(schedule, levels_of(sampling), steps, strength)
    return comfy.samplers.calculate_sigmas(sampling, name, whole_steps(steps, strength))[-(steps + 1) :].float()


class KSamplerNoise(SeededNoise):
    """Noise for the rows of a LATENT whose first draw is what KSampler draws for it, at any size and with `batch_index`."""

    def __init__(self, seed: int, latent: dict[str, Any]) -> None:
        super().__init__(seed, latent.get("batch_index"))

    def __call__(self, like: Tensor) -> Tensor:
        if self.draws or self.rows is not None:
            return super().__call__(like)
        # In one go: where a row is no multiple of 16 values, that differs from row by row.
        return torch.randn(like.shape, generator=self.next_generator()).to(like)
