"""What a sampling in the host depends on: one answer for the inversion cache, COW, the schedule search and files on disk.

MODEL, GUIDER, CONDITIONING, SAMPLER, VAE and CLIP_VISION are named by what they hold: weights by some values of each, patches by
their code and settings. The same nodes run again, also in another process, give the same identity.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ...core.identity import Identity, Weights, identify, parts, weights_parts

SETTINGS = "slipstream_settings"  # attribute of our own GUIDERs: what they are and how they are set, without cfg
# What the host writes into these objects while it samples.
RUN_OPTIONS = ("sample_sigmas", "sigmas", "cond_or_uncond", "uuids")
RUN_GUIDER = ("model_patcher", "model_options", "original_conds", "conds", "inner_model", "loaded_models")
RUN_CONTROL = (
    "cond_hint",
    "timestep_range",
    "model_sampling_current",
    "extra_concat",
    "control_input",
    "control_model",
)
RUN_HOOK = ("hook_ref", "start_t", "_skip_adding")
# Options that act on the guided estimate, after the network was asked.
CFG_OPTIONS = (
    "sampler_cfg_function", "sampler_post_cfg_function", "sampler_pre_cfg_function", "sampler_calc_cond_batch_function",
    "disable_cfg1_optimization", "denoise_mask_function",
)  # fmt: skip


def sampling_identity(guider: Any, sampler: Any = None) -> dict[str, Identity]:
    """Return what a sampling with a GUIDER (or the guider of a running session) depends on, part by part.

    Its "weights" (with LoRA and every other weight patch), "patches" (object patches, model options, wrappers), "guider" (class and
    settings), "conditioning", and the "sampler" when one is given. Levels, noise and latents are the caller's.
    """
    _register()
    named = {
        "weights": identify(_weights(guider.model_patcher)),
        "patches": identify(_patches(guider.model_patcher, guider.model_options)),
        "guider": identify(_guider(guider)),
        "conditioning": identify({k: entries_of(v) for k, v in getattr(guider, "original_conds", {}).items()}),
    }
    return named if sampler is None else {**named, "sampler": identify(sampler)}


def model_identity(model: Any, options: dict[str, Any] | None = None) -> Identity:
    """Return what a MODEL's numbers depend on: weights, patches and its options (`options` takes their place)."""
    _register()
    return identify(_weights(model), _patches(model, model.model_options if options is None else options))


def host_identity(*values: Any) -> Identity:
    """Return the identity of values that may be or hold objects of the host (VAE, CLIP_VISION, CONDITIONING, MODEL)."""
    _register()
    return identify(*values)


def network_options(
    options: dict[str, Any], without: Sequence[str] = (), replaced: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what of a MODEL's options acts in its network, without these kinds of patches and of replaced attention."""
    transformer = options.get("transformer_options", {})
    patches = {k: v for k, v in transformer.get("patches", {}).items() if k not in without}
    changed = {k: v for k, v in transformer.get("patches_replace", {}).items() if k not in replaced}
    kept = {k: v for k, v in options.items() if k not in CFG_OPTIONS}
    return {**kept, "transformer_options": {**transformer, "patches": patches, "patches_replace": changed}}


def entries_of(conditioning: Sequence[Any]) -> list[Any]:
    """Return a CONDITIONING, as nodes pass it or as the host prepared it, without the numbers that each run gives out."""
    found = []
    for entry in conditioning:
        entry = entry if isinstance(entry, dict) else {"cross_attn": entry[0], **entry[1]}
        found.append({k: v for k, v in entry.items() if k not in ("uuid", "model_conds") or (k == "model_conds" and v)})
    return found


def original_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, parameter) of a MODEL as loaded from its file, also while patches are applied to it."""
    found = dict(model.model.named_parameters())
    for name, original in getattr(model, "object_patches_backup", {}).items():
        found = {k: v for k, v in found.items() if k != name and not k.startswith(f"{name}.")}
        if isinstance(original, nn.Module):
            found |= {f"{name}.{k}": v for k, v in original.named_parameters()}
    for name, parameter in found.items():
        hooked = getattr(model, "hook_backup", {}).get(name)
        backup = model.backup.get(name) if hooked is None else hooked[0]
        yield name, parameter if backup is None else getattr(backup, "weight", backup)


def _weights(model: Any) -> list[Any]:
    network = model.model
    config = getattr(getattr(network, "model_config", None), "unet_config", None)
    form = getattr(network, "latent_format", None)
    built = [
        type(network),
        type(getattr(network, "diffusion_model", None)),
        config,
        form,
        getattr(network, "manual_cast_dtype", None),
    ]
    return [built, weights_parts(original_weights(model)), Weights(model.patches), model.force_cast_weights]


def _patches(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    transformer = {
        k: v for k, v in options.get("transformer_options", {}).items() if k not in RUN_OPTIONS and _holds(v)
    }
    found = {
        "objects": model.object_patches,
        "sampling": _object(model, "model_sampling"),
        "options": {**{k: v for k, v in options.items() if _holds(v)}, "transformer_options": transformer},
    }
    kinds = ("wrappers", "callbacks", "injections", "attachments", "additional_models", "weight_wrapper_patches")
    return found | {kind: _without_empty(getattr(model, kind, {})) for kind in kinds}


def _object(model: Any, name: str) -> Any:
    try:
        return model.get_model_object(name)
    except AttributeError:  # a VAE's or a text encoder's patcher
        return None


def _holds(value: Any) -> bool:
    """Whether a part of options holds anything: the host makes empty dictionaries as it goes."""
    return bool(_without_empty(value)) if isinstance(value, dict) else True


def _without_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {k: _without_empty(v) for k, v in value.items()}
    return {k: v for k, v in inner.items() if not (isinstance(v, (dict, list)) and not v)}


def _guider(guider: Any) -> list[Any]:
    own = vars(guider).get(SETTINGS)
    settings = {k: v for k, v in vars(guider).items() if k not in RUN_GUIDER}
    return [type(guider), settings] if own is None else [own, getattr(guider, "cfg", None)]


@functools.cache
def _register() -> None:
    """Teach `core.identity` the host's own kinds, which hold what runs write into them."""
    import comfy.clip_vision
    import comfy.controlnet
    import comfy.hooks
    import comfy.model_patcher
    import comfy.samplers
    import comfy.sd

    parts.register(comfy.model_patcher.ModelPatcher, _patcher_parts)
    parts.register(comfy.samplers.CFGGuider, _guider_parts)
    parts.register(comfy.controlnet.ControlBase, _control_parts)
    parts.register(comfy.hooks.Hook, _hook_parts)
    parts.register(comfy.hooks.HookGroup, lambda group: [("", group.hooks)])
    parts.register(comfy.hooks.HookKeyframeGroup, lambda group: [("", group.keyframes)])
    parts.register(comfy.hooks.HookKeyframe, _hook_parts)
    parts.register(comfy.sd.VAE, _vae_parts)
    parts.register(
        comfy.sd.CLIP,
        lambda clip: [("", type(clip)), ("", clip.patcher), ("", clip.layer_idx), ("", type(clip.tokenizer))],
    )
    parts.register(comfy.clip_vision.ClipVisionModel, _vision_parts)


def _patcher_parts(model: Any) -> list[tuple[str, Any]]:
    return [("", type(model)), ("", _weights(model)), ("", _patches(model, model.model_options))]


def _guider_parts(guider: Any) -> list[tuple[str, Any]]:
    return [("", _guider(guider)), ("", guider.model_patcher), ("", guider.model_options), ("", guider.original_conds)]


def _control_parts(control: Any) -> list[tuple[str, Any]]:
    """A ControlNet with its image, strength, range, extra arguments, and the ControlNets chained before it.

    Its network is in the patcher that it is loaded with; one without (a ControlLoRA) keeps its weights.
    """
    kept = {k: v for k, v in vars(control).items() if k not in RUN_CONTROL}
    kept |= {k: Weights(kept[k]) for k in ("control_weights", "t2i_model") if k in kept}
    if "control_model_wrapped" not in kept and "control_weights" not in kept:
        kept["control_model"] = getattr(control, "control_model", None)
    return [("", type(control)), ("", kept)]


def _hook_parts(hook: Any) -> list[tuple[str, Any]]:
    """A hook, without what it notes down as it runs; LoRA weights that it holds count as weights."""
    kept = {k: Weights(v) if k.startswith("weights") else v for k, v in vars(hook).items() if k not in RUN_HOOK}
    return [("", type(hook)), ("", kept)]


def _vae_parts(vae: Any) -> list[tuple[str, Any]]:
    names = (
        "vae_dtype",
        "downscale_ratio",
        "upscale_ratio",
        "latent_channels",
        "process_input",
        "process_output",
        "crop_input",
    )
    return [("", type(vae)), ("", vae.patcher), *((f".{name}", getattr(vae, name, None)) for name in names)]


def _vision_parts(vision: Any) -> list[tuple[str, Any]]:
    names = ("image_size", "image_mean", "image_std", "dtype")
    return [("", type(vision)), ("", vision.patcher), *((f".{name}", getattr(vision, name, None)) for name in names)]
