"""A test-only node that looks at layer masks on tiny models of the host's own architectures, with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .edit_probe import ours


def randomise(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim >= 2:
            p.data = noise / math.sqrt(p[0].numel())
        else:
            p.data = (name.endswith(("weight", "scale"))) + 0.1 * noise
    for name, b in network.named_buffers():
        if name.endswith("pos_embed"):
            b.data = 0.02 * torch.randn(b.shape, generator=generator)


def with_new(config: dict[str, Any], newer: bool, **more: Any) -> dict[str, Any]:
    """Return `config` with what has no default in newer hosts and is unknown to older ones."""
    return {**config, **(more if newer else {})}


FLUX = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 128, "mlp_ratio": 4.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 28, 28], "theta": 10000, "qkv_bias": True,
}  # fmt: skip
FLUX_NEW = {"yak_mlp": False, "txt_norm": False, "txt_ids_dims": []}
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 2304, "n_layers": 2, "n_refiner_layers": 1,
    "n_heads": 2, "n_kv_heads": 1, "qk_norm": True, "axes_dims": [16, 16, 16], "axes_lens": [300, 512, 512], "multiple_of": 32,
}  # fmt: skip
COSMOS = {
    "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128, "concat_padding_mask": True, "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
    "use_adaln_lora": True, "adaln_lora_dim": 32, "num_blocks": 2, "num_heads": 2, "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}  # fmt: skip
OMNIGEN = {
    "image_model": "omnigen2", "axes_dim_rope": [16, 24, 24], "axes_lens": [1024, 1664, 1664], "ffn_dim_multiplier": None,
    "hidden_size": 128, "in_channels": 16, "multiple_of": 32, "norm_eps": 1e-5, "num_attention_heads": 2, "num_kv_heads": 1,
    "num_layers": 2, "num_refiner_layers": 1, "out_channels": None, "patch_size": 2, "text_feat_dim": 2048, "timestep_scale": 1000.0,
}  # fmt: skip
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2], "num_res_blocks": [1, 1, 1],
    "transformer_depth": [1, 1, 0], "transformer_depth_output": [1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1, "context_dim": 768,
    "use_linear_in_transformer": False, "use_spatial_transformer": True, "adm_in_channels": None, "use_checkpoint": False, "legacy": False,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
JOINT = {
    "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 2048, "qk_norm": "rms", "num_patches": 36864,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
    "pos_embed_max_size": 192, "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [0],
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2,
    "axes_dims_rope": (8, 28, 28), "joint_attention_dim": 3584,
}  # fmt: skip

# family: (class in comfy.supported_models, settings given the host's age, latents, tokens x width of the prompt, further conditioning)
FAMILIES: dict[str, tuple[str, Callable[[bool], dict[str, Any]], tuple[int, ...], tuple[int, int], dict[str, Any]]] = {
    "sd15": ("SD15", lambda new: UNET, (4, 16, 16), (77, 768), {}),
    "flux": (
        "Flux", lambda new: with_new({**FLUX, "image_model": "flux", "guidance_embed": True}, new, **FLUX_NEW), (16, 16, 16), (64, 4096),
        {"pooled_output": torch.zeros(1, 768), "guidance": 3.5},
    ),
    "chroma": (
        "Chroma",
        lambda new: with_new(
            {**{k: v for k, v in FLUX.items() if k != "vec_in_dim"}, "image_model": "chroma", "in_channels": 64, "out_channels": 64,
             "in_dim": 64, "out_dim": 128, "hidden_dim": 64, "n_layers": 1}, new, txt_ids_dims=[], vec_in_dim=None),
        (16, 16, 16), (20, 4096), {},
    ),
    "sd3": ("SD3", lambda new: JOINT, (16, 16, 16), (154, 4096), {"pooled_output": torch.zeros(1, 2048)}),
    "lumina2": (
        "Lumina2", lambda new: with_new(LUMINA, new, rope_theta=10000.0, ffn_dim_multiplier=4.0), (16, 16, 16), (24, 2304),
        {"attention_mask": torch.ones(1, 24, dtype=torch.long)},
    ),
    "qwen_image": ("QwenImage", lambda new: QWEN, (16, 1, 16, 16), (18, 3584), {}),
    "omnigen2": ("Omnigen2", lambda new: OMNIGEN, (16, 16, 16), (30, 2048), {"attention_mask": torch.ones(1, 30, dtype=torch.long)}),
    "cosmos2": ("CosmosT2IPredict2", lambda new: COSMOS, (16, 1, 16, 16), (512, 1024), {}),
}  # fmt: skip


def tiny_model(family: str) -> tuple[Any, tuple[int, ...], list[Any], list[Any]]:
    """Return (MODEL, shape of a latent, positive, negative) of a family, as a stock loader makes it."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import comfyui_version

    name, settings, shape, (tokens, width), options = FAMILIES[family]
    supported: Any = getattr(comfy.supported_models, name)

    class Config(supported):  # type: ignore[misc]
        unet_extra_config = (
            {"num_heads": 4, "num_head_channels": -1} if family == "sd15" else supported.unet_extra_config
        )

    newer = not comfyui_version.__version__.startswith("0.3.")
    config = Config(dict(settings(newer)))
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        model = config.get_model({}, "", device=None)
        randomise(model.diffusion_model)
        model.eval().requires_grad_(False)
    device = comfy.model_management.get_torch_device()
    generator = torch.Generator().manual_seed(7)
    prompts = [
        [[torch.randn(1, tokens, width, generator=generator), {"pooled_output": None, **options}]] for _ in range(2)
    ]
    return comfy.model_patcher.ModelPatcher(model, device, device), shape, *prompts


class TinyFamily:
    """A tiny MODEL of a family."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"family": (list(FAMILIES),)}}

    def make(self, family: str) -> tuple[Any]:
        return (tiny_model(family)[0],)


class LookAtLayers:
    """Skips each block of a tiny model alone: which there are, whether they run, and what the blocks after them get."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "look", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"family": (list(FAMILIES),)}}

    def look(self, family: str) -> Any:
        return {"ui": {"report": [json.dumps(Look(*tiny_model(family)).report())]}}


class Look:
    def __init__(self, model: Any, shape: tuple[int, ...], positive: list[Any], negative: list[Any]) -> None:
        import comfy.samplers

        self.model, self.prompts = model, (positive, negative)
        self.sampler = comfy.samplers.sampler_object("euler")
        self.sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
        self.latents = torch.zeros(1, *shape)
        self.noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
        self.blocks = ours("nodes.host.layers").blocks_of(model)
        self.computed: dict[str, int] = {}
        self.entered: dict[str, list[Tensor]] = {}

    def report(self) -> dict[str, Any]:
        layers, search_path = ours("nodes.host.layers"), ours("nodes.host.search_path")
        mask_class = ours("core.layers").LayerMask
        plain = self.sample(self.model)
        watched = self.watched()
        path = search_path.HostPath(self.guider(watched), self.sampler, {"samples": self.latents}, layers=True)
        found = path.layers()
        calls, passed, changed = {}, [], []
        for layer in found:
            self.computed, self.entered = dict.fromkeys(self.blocks, 0), {}
            image = self.sample(layers.with_masks(watched, [mask_class(math.inf, -1.0, (layer.name,))]))
            calls[layer.name] = [self.computed[layer.name], max(self.computed.values())]
            order = list(self.entered)
            following = self.entered[(order[order.index(layer.name) :] + order)[1]]
            if any(torch.equal(a, b) for a in self.entered[layer.name] for b in following):
                passed.append(layer.name)
            if image.isfinite().all() and not torch.equal(image, plain):
                changed.append(layer.name)
        return {
            "costs": {layer.name: layer.cost for layer in found},
            "calls": calls,
            "passed": passed,
            "changed": changed,
            "restored": torch.equal(self.sample(self.model), plain),
            "measuring": path.calls,
        }

    def guider(self, model: Any) -> Any:
        import comfy.samplers

        made = comfy.samplers.CFGGuider(model)
        made.set_conds(*self.prompts)
        made.set_cfg(2.0)
        return made

    def sample(self, model: Any) -> Tensor:
        return self.guider(model).sample(self.noise, self.latents, self.sampler, self.sigmas, disable_pbar=True, seed=1)

    def watched(self) -> Any:
        """Return a clone whose blocks count when they are computed; also what enters them is kept."""
        model = self.model.clone()

        def count(name: str, forward: Any) -> Any:
            def counted(*args: Any, **kwargs: Any) -> Any:
                self.computed[name] = self.computed.get(name, 0) + 1
                return forward(*args, **kwargs)

            return counted

        def enter(name: str) -> Any:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
                self.entered.setdefault(name, [t.clone() for t in tensors[:1]])

            return hook

        for name, (path, block) in self.blocks.items():
            key = f"diffusion_model.{path}.forward"
            model.add_object_patch(key, count(name, model.get_model_object(key)))
            block.module.register_forward_pre_hook(enter(name), with_kwargs=True)
        return model


NODES = {"ProbeTinyFamily": TinyFamily, "ProbeLayers": LookAtLayers}
