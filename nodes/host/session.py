"""A prepared sampling in the host: run our functions on a MODEL with everything the host does around its own sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...core.device import is_out_of_memory
from ...core.guidance import Denoise
from ...core.progress import Callback
from ...core.transfer import DEVICE_WORK
from .denoiser import HostConditioning, HostDenoiser, Source, take_hints
from .guidance import AFTER
from .progress import host_callback, overheard

Result = TypeVar("Result")
After = Callable[[dict[str, Any]], Tensor]  # a function of the host's kind after cfg: its arguments -> denoised


@dataclass
class Session:
    """What one of our functions gets while the host has the model loaded and the conditioning prepared.

    Attributes:
        denoiser: core `Denoiser` over the MODEL, with its patches. Raw: no cfg; with what acts around the network as `guided`.
        conds: `HostConditioning` by name ("positive", "negative", and any others that were given).
        denoise: (x, sigma) -> denoised of the whole guider, with the user's cfg and cfg patches (see `make_sampler`).
        denoise_then: the same with one more function after the cfg patches.
        latents: the LATENT in model space on the device (B, C, H, W), not yet noised.
        noise: the NOISE the user wired (same shape), or zeros in `run_on_model`.
        sigmas: the SIGMAS the user wired (S+1,), or the model's [sigma_max, 0] in `run_on_model`.
        seed: the seed of NOISE, for `SeededNoise(session.seed)`.
        noise_mask: the LATENT's noise mask (B, C, H, W), 1 = repaint, or None.
        callback: `callback(total)` -> core `Callback` that drives progress bar, preview and interrupt.
    """

    denoiser: HostDenoiser
    conds: dict[str, HostConditioning]
    denoise: Denoise
    denoise_then: Callable[[After], Denoise]
    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    seed: int
    noise_mask: Tensor | None
    callback: Callable[[int], Callback]
    guider: Any

    @property
    def cfg_scale(self) -> float:
        """The guider's cfg, which a patch may change from step to step."""
        return float(getattr(self.guider, "cfg", 1.0))

    def process_in(self, samples: Tensor) -> Tensor:
        """Return LATENT samples (unscaled, any device) in model space on the model's device."""
        return self.guider.inner_model.process_latent_in(samples.to(self.latents.device, torch.float32))

    def process_out(self, latents: Tensor, device: torch.device | None = None) -> Tensor:
        """Return model-space latents as LATENT samples on `device`, by default the host's intermediate one (CPU)."""
        import comfy.model_management

        samples: Tensor = self.guider.inner_model.process_latent_out(latents.to(torch.float32))
        return samples.to(comfy.model_management.intermediate_device() if device is None else device)

    def condition(self, name: str, conditioning: list[Any]) -> HostConditioning:
        """Prepare one more CONDITIONING while sampling runs (a live prompt).

        A ControlNet that was given under this name at the start stays on it, with its first image. Another one, and GLIGEN and hooks,
        are refused.
        """
        import comfy.sampler_helpers
        import comfy.samplers

        held = self.conds[name].items[0][0].entries if name in self.conds else ()
        control = held[0].get("control") if len(held) == 1 else None
        refused = ("gligen", "hooks", "additional_models", *(() if control is not None else ("control",)))
        for part in refused:
            if any(part in entry[1] for entry in conditioning):
                raise ValueError(
                    f"Expected a plain prompt during sampling, but got one with {part}. Give it at the start."
                )
        # It has been prepared: the host would do that again, while it is at work.
        plain = [[text, {k: v for k, v in options.items() if k != "control"}] for text, options in conditioning]
        conds = {name: comfy.sampler_helpers.convert_cond(plain)}
        with DEVICE_WORK.beside():  # the network is at work in another thread
            conds = comfy.samplers.process_conds(
                self.guider.inner_model,
                self.noise,
                conds,
                self.latents.device,
                self.latents,
                self.noise_mask,
                self.seed,
            )
        entries = tuple(
            {**entry, "control": take_hints(control, [0])} if control is not None else entry for entry in conds[name]
        )
        return HostConditioning.of(Source(name, entries))


def session_of(
    guider: Any, bind: Callable[..., Denoise], extra_args: dict[str, Any], latents: Tensor, noise: Tensor, sigmas: Tensor,
    wrapped: bool = False,
) -> Session:  # fmt: skip
    """Return the session of a sampling that the host has prepared (`guider.inner_model` and `guider.conds` are set).

    `bind` is `bound_denoise` with its first two arguments. `wrapped` says that the user's wrappers around the guider's prediction are
    around the session already. Raises ValueError for latents of another number of channels than the model's.
    """
    model = guider.model_patcher
    check_channels(model, latents)
    conds = {
        name: HostConditioning.of(Source(name, tuple(entries))) for name, entries in guider.conds.items() if entries
    }
    options = extra_args.get("model_options", {})
    denoiser = HostDenoiser(guider.inner_model, options, guider=None if wrapped else guider, patcher=model)
    entries = [entry for prepared in guider.conds.values() for entry in prepared or ()]

    def watched(after: After | None = None) -> Denoise:
        bound = bind(after)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            denoiser.descent.at(torch.as_tensor(sigma), entries)
            return bound(x, sigma)

        return denoise

    return Session(
        denoiser=denoiser,
        conds=conds,
        denoise=watched(),
        denoise_then=watched,
        latents=latents,
        noise=noise,
        sigmas=sigmas,
        seed=int(extra_args.get("seed") or 0),
        noise_mask=extra_args.get("denoise_mask"),
        callback=lambda total: overheard(host_callback(model, total)),
        guider=guider,
    )


def bound_denoise(model: Any, extra_args: dict[str, Any], after: After | None = None) -> Denoise:
    """Return (x, sigma) -> denoised over a k-diffusion style model callable; a single level is given to every row.

    `after` is called after the host's cfg and its own functions after that.
    """
    if after is not None:
        options = extra_args.get("model_options", {})
        extra_args = {**extra_args, "model_options": {**options, AFTER: [*options.get(AFTER, []), after]}}

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model(x, torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)), **extra_args)

    return denoise


def check_channels(model: Any, samples: Tensor) -> None:
    """Raise ValueError for LATENT samples (B, C, ...) of another family: of other channels, or of a video for a MODEL of images."""
    if packed(samples):
        return
    form = model.get_model_object("latent_format")
    if samples.ndim == 5 and samples.shape[2] > 1 and getattr(form, "latent_dimensions", 3) == 2:
        raise ValueError(
            f"Expected a latent of images for this model, but got one of a video with {samples.shape[2]} latent frames. Encode its "
            "frames as images with the VAE that belongs to this model."
        )
    wanted, got = int(form.latent_channels), samples.shape[1]
    if wanted != got:
        raise ValueError(
            f"Expected a latent of {wanted} channels for this model, but got {got}. Encode the image with the VAE that belongs to "
            "this model."
        )


def packed(samples: Tensor) -> bool:
    """Return whether LATENT samples hold sound and video together, as LTX-2's do; while it samples, the host packs them to (B, 1, N)."""
    return bool(getattr(samples, "is_nested", False)) or (samples.ndim == 3 and samples.shape[1] == 1)


def check_places(samples: Tensor) -> None:
    """Raise ValueError for LATENT samples without rows and columns."""
    if packed(samples):
        raise ValueError(
            "Expected a latent of images or of one video, but got one of sound and video together (LTX-2), whose cells have no "
            "places. Sample it with stock nodes; Search Schedule and Compare Schedules take it too."
        )


def check_images(model: Any, samples: Tensor) -> None:
    """Raise ValueError for LATENT samples that are none of images or of one video, or of another number of channels than the MODEL's."""
    check_places(samples)
    check_channels(model, samples)


def whole(model: Any) -> Any:
    """Return a MODEL whose weights the host loads as a whole, for one that it brings layer by layer (dynamic VRAM, newer hosts' default).

    Gradients and recordings read weights where they lie. The host reads the file again and keeps the second copy beside the MODEL.

    Raises:
        ValueError: the node that loaded the MODEL did not tell the host how to read it again, or its file is gone.
    """
    if not getattr(model, "is_dynamic", bool)():
        return model
    try:
        return model.get_non_dynamic_delegate()
    except (RuntimeError, OSError) as error:  # OSError: its file is gone
        if is_out_of_memory(error):
            raise
        raise ValueError(
            "Expected a `model` that ComfyUI can load as a whole, but it cannot be read again (dynamic VRAM). Load it with Load "
            "Checkpoint, Load Diffusion Model or Load Model, or start ComfyUI with --disable-dynamic-vram."
        ) from error


def run_on_model(
    model: Any,
    latent: dict[str, Any],
    work: Callable[[Session], Result],
    *,
    rows: int | None = None,
    seed: int = 0,
    cfg_scale: float = 1.0,
    **conds: list[Any],
) -> Result:
    """Run `work(session)` on a MODEL and return what it returns; for nodes that do the sampling.

    The host's own guider prepares and cleans up: memory for the model and for ControlNets, hooks, areas and masks,
    conditioning parts of the model family, keyed wrappers. Nothing given is changed.

        result = run_on_model(model, latent, lambda s: invert(s.denoiser, s.latents, s.conds["positive"]), positive=positive)
        return ({"samples": result},)       # work returns s.process_out(latents)

    Args:
        model: MODEL (`ModelPatcher`).
        latent: LATENT dict; its size is the size of the sampling, `session.latents` its content. Conditioning is prepared for
            its batch: row i of an image that came as a batch (inpainting) belongs to latent i.
        work: gets the `Session`; any exception passes through after the host has cleaned up.
        rows: most rows in one network call, for which the host reserves memory; default 2 * batch.
        seed: `session.seed`.
        cfg_scale: guidance of `session.denoise` (needs `positive` and `negative`).
        **conds: CONDITIONING by name; at least `positive`.
    """
    import comfy.sample

    results: list[Result] = []
    guider, sampler = _runner(model, lambda session: results.append(work(session)))
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg_scale)
    check_places(latent["samples"])
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    check_channels(model, samples)
    reserve = -(-rows // 2) if rows else len(samples)  # the host itself doubles the batch in its estimate
    noise = samples.new_zeros((reserve, *samples.shape[1:]))
    levels = model.get_model_object("model_sampling")
    sigmas = torch.tensor([float(levels.sigma_max), 0.0])
    guider.sample(noise, samples, sampler, sigmas, latent.get("noise_mask"), disable_pbar=True, seed=seed)
    return results[0]


def _runner(model: Any, work: Callable[[Session], object]) -> tuple[Any, Any]:
    """Return a guider of the host and a sampler that, in place of sampling, runs `work(session)` once."""
    import comfy.samplers

    class Work(comfy.samplers.Sampler):
        runs_ours = True  # the latent is a place to work in, not what sampling starts from

        def sample(  # type: ignore[no-untyped-def]
            self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
        ):  # fmt: skip
            extra = {**extra_args, "denoise_mask": denoise_mask}
            bind = partial(bound_denoise, model_wrap, extra_args)
            session = session_of(model_wrap, bind, extra, latent_image, noise, sigmas)
            work(session)
            return latent_image

    class Guider(comfy.samplers.CFGGuider):
        def inner_sample(self, noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs):  # type: ignore[no-untyped-def]
            # The rows of `noise` reserve memory; whatever is made by row has those of the latent.
            noise, batch = torch.zeros_like(latent_image), len(latent_image)
            denoise_mask = None if denoise_mask is None else denoise_mask[:batch]
            return super().inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs)

    return Guider(model), Work()
