"""What the Doctor node tells about the host, a MODEL, a VAE and a stream of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...core.doctor import seconds_of, stage_facts
from .native import frame_side
from .session import Session, run_on_model
from .vae import decode_images, encode_images

UNKNOWN = "not known"


def _told(ask: Callable[[], Any]) -> str:
    """Return an answer as text; a host of another age may not have it."""
    try:
        return str(ask()).removeprefix("torch.")
    except (ImportError, AttributeError):
        return UNKNOWN


def host_facts() -> dict[str, str]:
    """Return version, device, memory and attention of the host."""
    import comfy.ldm.modules.attention as attention
    import comfy.model_management as management

    def host_version() -> Any:
        import comfyui_version

        return comfyui_version.__version__

    free = management.get_free_memory(management.get_torch_device()) / 2**30
    total = management.get_total_memory(management.get_torch_device()) / 2**30
    return {
        "ComfyUI": _told(host_version),
        "device": _told(management.get_torch_device),
        "memory": f"{free:.1f} of {total:.1f} GiB free, {_told(lambda: management.vram_state.name)}",
        "host attention": _told(lambda: attention.optimized_attention.__name__),
    }


def model_facts(model: Any) -> dict[str, str]:
    """Return class, precision and patches of a MODEL."""
    options = model.model_options.get("transformer_options", {})
    patches = [*options.get("patches", {}), *options.get("patches_replace", {}), *options.get("wrappers", {})]
    wrapped = [name for name in ("model_function_wrapper", "sampler_cfg_function") if name in model.model_options]
    return {
        "model": f"{type(model.model).__name__}, {_told(model.model.get_dtype)}, {_told(lambda: model.load_device)}",
        "weight patches": str(len(model.patches)),
        "patches": ", ".join(sorted({*patches, *wrapped})) or "none",
    }


def vae_facts(vae: Any) -> dict[str, str]:
    """Return class and precision of a VAE."""
    return {
        "vae": f"{type(vae.first_stage_model).__name__}, {_told(lambda: vae.vae_dtype)}, {_told(lambda: vae.device)}"
    }


def stream_facts(model: Any, vae: Any, positive: list[Any]) -> dict[str, str]:
    """Return the milliseconds of each stage of a stream of one step, at the model's own size, and which one limits it."""
    side = frame_side(model, "side", 0)
    image = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(0))
    samples = encode_images(vae, image)
    spent = {"encode": seconds_of(lambda: encode_images(vae, image))}

    def work(session: Session) -> float:
        denoiser, cond = session.denoiser, session.conds["positive"].at(0)
        sigma = torch.full((1,), denoiser.sigma_max / 4)
        return seconds_of(lambda: denoiser(session.latents, sigma, cond))

    spent["denoise"] = run_on_model(model, {"samples": samples}, work, rows=1, positive=positive)
    spent["decode"] = seconds_of(lambda: decode_images(vae, samples))
    return stage_facts(spent, side, side)
