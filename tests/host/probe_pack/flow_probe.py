"""Test-only nodes: tiny flow models of the host's own classes with random weights, a stand-in VAE, and what a run left on the MODEL."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F


def recent() -> bool:
    """Whether the host is newer than 0.3: its networks have further settings."""
    import comfyui_version

    return tuple(int(n) for n in comfyui_version.__version__.split(".")[:2]) > (0, 3)


def unet_config(family: str) -> dict[str, Any]:
    """The settings that the host's loader would detect in a file of such a network."""
    if family == "lumina2":
        more = {"rope_theta": 10000.0, "ffn_dim_multiplier": 4.0} if recent() else {}
        return {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 2304, "n_layers": 2,
            "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1, "qk_norm": True, "axes_dims": [16, 16, 16],
            "axes_lens": [300, 512, 512], "multiple_of": 32, **more,
        }  # fmt: skip
    if family == "flux":
        more = {"yak_mlp": False, "txt_norm": False, "txt_ids_dims": []} if recent() else {}
        return {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
            "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 28, 28],
            "theta": 10000, "qkv_bias": True, "guidance_embed": True, **more,
        }  # fmt: skip
    if family == "sd3":
        embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
        return {
            "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 2048, "qk_norm": "rms",
            "context_embedder_config": embedder, "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [0],
        }  # fmt: skip
    return {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2,
        "axes_dims_rope": (8, 28, 28), "joint_attention_dim": 3584,
    }  # fmt: skip


# Class of the host, what its text encoder gives: tokens, width, and more.
FAMILIES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "lumina2": ("Lumina2", 24, 2304, {"attention_mask": torch.ones(1, 24, dtype=torch.long), "pooled_output": None}),
    "flux": ("Flux", 32, 4096, {"pooled_output": torch.zeros(1, 768), "guidance": 3.5}),
    "sd3": ("SD3", 40, 4096, {"pooled_output": torch.zeros(1, 2048)}),
    "qwen_image": ("QwenImage", 18, 3584, {"pooled_output": None}),
}


def configured(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The host's settings of a family, computed in float32."""
    import comfy.supported_models

    config = getattr(comfy.supported_models, FAMILIES[family][0])(unet_config(family))
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    return config


def stored(model: Any, family: str, scaled: bool) -> Any:
    """The model with its weights in float8; `scaled` has the marks by which the host knows quantised files, then and now."""
    weights = model.diffusion_model.state_dict()
    if not scaled:
        made = configured(family, torch.float8_e4m3fn).get_model({}, "", device=None)
        made.diffusion_model.load_state_dict({k: v.to(torch.float8_e4m3fn) for k, v in weights.items()})
        return made
    config, mark = configured(family), {"format": "float8_e4m3fn"}
    if recent():
        config.quant_config = {"mixed_ops": True}
    else:
        config.scaled_fp8 = torch.float8_e4m3fn
    layers = [
        n
        for n, m in model.diffusion_model.named_modules()
        if (isinstance(m, torch.nn.Linear) and "blocks" in n) or "layers" in n
    ]
    for layer in (n for n in layers if weights.get(f"{n}.weight", torch.empty(0)).ndim == 2):
        weight = weights[f"{layer}.weight"]
        scale = weight.abs().max() / 448
        weights[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{layer}.{'weight_scale' if recent() else 'scale_weight'}"] = scale
        if recent():
            weights[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    made = config.get_model({}, "", device=None)
    made.diffusion_model.load_state_dict(weights, strict=recent())
    assert any(p.dtype.itemsize == 1 or type(p) is not torch.nn.Parameter for p in made.diffusion_model.parameters())
    return made


class CellMeans:
    """Stands in for a VAE: 16 channels of cell means, 8 pixels a cell; with `frames` as video VAEs give and take them."""

    downscale_ratio = 8

    def __init__(self, frames: bool) -> None:
        self.frames = frames

    def encode(self, image: Any) -> Any:
        small = F.avg_pool2d(image[..., :3].movedim(-1, 1), 8) * 2 - 1
        latents = torch.cat([small] * 5 + [small[:, :1]], 1)
        return latents.unsqueeze(2) if self.frames else latents

    def decode(self, latents: Any) -> Any:
        flat = latents.squeeze(2) if self.frames else latents
        image = F.interpolate((flat[:, :3] + 1) / 2, scale_factor=8).clamp(0, 1).movedim(1, -1)
        return image.unsqueeze(1) if self.frames else image


class TinyFlow:
    """MODEL, VAE and two prompts of a flow family. `override` counts the attention calls through an override of another node.

    `weights` are those of float32, stored so and cast for each call, or as quantised files have them: 8 bits and a scale a layer.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("MODEL", "VAE", "CONDITIONING", "CONDITIONING")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"family": (list(FAMILIES),), "override": ("BOOLEAN", {"default": False})},
            "optional": {"weights": (["float32", "fp8", "scaled fp8"], {"default": "float32"})},
        }

    def make(self, family: str, override: bool, weights: str = "float32") -> tuple[Any, ...]:
        import comfy.model_management
        import comfy.model_patcher

        _, tokens, width, more = FAMILIES[family]
        config = configured(family)
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode(False):
            model = config.get_model({}, "", device=None)
            for key, parameter in model.diffusion_model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim >= 2:
                    parameter.data = drawn / max(1, parameter[0].numel()) ** 0.5
                else:
                    parameter.data = 0.1 * drawn + float(key.split(".")[-1] in ("weight", "scale"))
            for key, buffer in model.diffusion_model.named_buffers():
                if key.endswith("pos_embed"):  # what it holds before a checkpoint is loaded may be NaN
                    buffer.data = 0.02 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(0))
            if weights != "float32":
                model = stored(model, family, scaled=weights == "scaled fp8")
            model.eval().requires_grad_(False)
        device = comfy.model_management.get_torch_device()
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
        if override:
            calls = SimpleNamespace(count=0)

            def counting(function: Any, *args: Any, **kwargs: Any) -> Any:
                calls.count += 1
                return function(*args, **kwargs)

            counting.calls = calls  # type: ignore[attr-defined]
            patcher.model_options["transformer_options"]["optimized_attention_override"] = counting
        prompts = [[[torch.randn(1, tokens, width, generator=generator), dict(more)]] for _ in range(2)]
        return patcher, CellMeans(family == "qwen_image"), *prompts


class FlowReport:
    """What is on a MODEL after a run, and whether an image is finite."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "look", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "image": ("IMAGE",), "latent": ("LATENT",)}}

    def look(self, model: Any, image: Any, latent: Any) -> Any:
        options = model.model_options["transformer_options"]
        override = options.get("optimized_attention_override")
        hooks = [m for m in model.model.diffusion_model.modules() if m._forward_hooks or m._forward_pre_hooks]
        report = {
            "options": sorted(options),
            "calls": getattr(getattr(override, "calls", None), "count", 0),
            "hooks": len(hooks),
            "patches": len(model.patches) + len(model.object_patches),
            "finite": bool(torch.isfinite(image).all() and torch.isfinite(latent["samples"]).all()),
            "shape": list(latent["samples"].shape),
        }
        return {"ui": {"report": [json.dumps(report)]}}


NODES = {"ProbeTinyFlow": TinyFlow, "ProbeFlowReport": FlowReport}
