"""A node pack for `benchmarks/live_host.py`: the host's own UNet in SD's shape and its own TAESD, with random weights."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import torch

SHAPES = {
    "sd": {
        "model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3, "context_dim": 1024,
    },
    "tiny": {
        "model_channels": 64, "channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1],
        "transformer_depth_output": [1, 1], "context_dim": 1024,
    },
}  # fmt: skip


class Turbo(comfy.supported_models.SD20):
    """SD-Turbo: heads of 64 channels, and predictions of the noise."""

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> Any:
        import comfy.model_base

        return comfy.model_base.ModelType.EPS


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for weight in network.parameters():
            weight.uniform_(-0.02, 0.02)
    return network


class RandomModel:
    """MODEL, VAE and CONDITIONING of random numbers; speed does not depend on what they are."""

    CATEGORY, FUNCTION = "benchmarks", "make"
    RETURN_TYPES = ("MODEL", "VAE", "CONDITIONING")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"shape": (list(SHAPES),)}}

    @torch.inference_mode(False)
    def make(self, shape: str) -> tuple[Any, Any, Any]:
        config = {
            **SHAPES[shape], "image_size": 32, "in_channels": 4, "out_channels": 4, "transformer_depth_middle": 1,
            "use_linear_in_transformer": True, "use_spatial_transformer": True, "use_checkpoint": False, "legacy": False,
            "use_temporal_attention": False, "use_temporal_resblock": False, "adm_in_channels": None,
        }  # fmt: skip
        device = comfy.model_management.get_torch_device()
        family = Turbo(config)
        family.set_inference_dtype(torch.float16 if device.type == "cuda" else torch.float32, None)
        model = family.get_model({}, "", device=None)
        randomised(model.diffusion_model).eval().requires_grad_(False)
        patcher = comfy.model_patcher.ModelPatcher(
            model, load_device=device, offload_device=comfy.model_management.unet_offload_device()
        )
        vae = comfy.sd.VAE(sd=randomised(comfy.taesd.taesd.TAESD()).state_dict())
        return patcher, vae, [[torch.randn(1, 77, config["context_dim"]), {"pooled_output": None}]]


NODE_CLASS_MAPPINGS = {"BenchmarkRandomModel": RandomModel}
