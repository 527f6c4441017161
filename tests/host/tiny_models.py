"""Tiny random-weight versions of the host's own native networks, wrapped as its loaders wrap them; runs inside the host's Python.

Real latent shapes, real kinds of conditioning, few channels: what is tried is how the host calls a family, not what it draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import torch
from comfyui_version import __version__ as VERSION
from torch import Tensor

OLD = VERSION.startswith("0.3.")
Kind = comfy.model_base.ModelType
Conditioning = list[Any]
GENERATOR = torch.Generator()


class Tiny(NamedTuple):
    """A MODEL, the shape of one latent (C, H, W) or (C, T, H, W), and two prompts of unequal length where the family has them."""

    model: Any
    shape: tuple[int, ...]
    prompts: list[Conditioning]


def rnd(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = name.rsplit(".", 1)[-1] in ("weight", "scale", "gamma")
        fan = math.sqrt(parameter[0].numel()) if parameter.ndim >= 2 else 10
        parameter.data = (noise / fan + (scale if parameter.ndim < 2 else 0)).to(parameter.dtype)
    for name, buffer in module.named_buffers():
        if name.endswith("pos_embed"):
            buffer.data = 0.02 * torch.randn(buffer.shape, generator=generator)


def build(cls: Any, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    class Family(cls):  # type: ignore[misc]
        pass

    Family.__name__ = cls.__name__
    family = Family(dict(config))
    family.set_inference_dtype(dtype, None)
    with torch.inference_mode(False):
        model = family.get_model({}, "", device=None)
        randomise(model.diffusion_model)
        model.eval().requires_grad_(False)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def prompts(
    width: int, lengths: tuple[int, int] = (9, 14), mask: bool = False, **more: Callable[[int], Any]
) -> list[Any]:
    """Two CONDITIONINGs of these token lengths; `more` makes their other parts from a length."""
    made = []
    for tokens in lengths:
        extra = {"attention_mask": torch.ones(1, tokens, dtype=torch.long)} if mask else {}
        parts = {name: part(tokens) for name, part in more.items()}
        made.append([[rnd(1, tokens, width), {"pooled_output": None, **extra, **parts}]])
    return made


# -- UNets


def unet(in_channels: int = 4, context: int = 64, base: Any = supported.SD15, kind: Any = None, **settings: Any) -> Any:
    class Heads(base):  # type: ignore[misc]
        unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

        def model_type(self, state_dict: Any, prefix: str = "") -> Any:
            self.sampling_settings = {**self.sampling_settings, **settings}
            return kind or super().model_type(state_dict, prefix)

    Heads.__name__ = base.__name__
    xl = {"adm_in_channels": 2816, "num_classes": "sequential"} if base is supported.SDXL else {"adm_in_channels": None}
    config = {
        "image_size": 32, "in_channels": in_channels, "out_channels": 4, "model_channels": 32, "channel_mult": [1],
        "num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1],
        "transformer_depth_middle": 1, "context_dim": context, "use_linear_in_transformer": base is supported.SDXL,
        "use_spatial_transformer": True, "use_checkpoint": False, "legacy": False, "use_temporal_attention": False,
        "use_temporal_resblock": False, **xl,
    }  # fmt: skip
    return build(Heads, config)


def clip_prompts(width: int = 64, pooled: int = 768) -> list[Any]:
    return prompts(width, (77, 77), pooled_output=lambda tokens: rnd(1, pooled))


def sd15() -> Tiny:
    return Tiny(unet(), (4, 8, 8), clip_prompts())


def sampled(model: Any, node: str, *values: Any) -> Any:
    """A stock node of comfy_extras.nodes_model_advanced on a MODEL."""
    import comfy_extras.nodes_model_advanced as nodes

    return getattr(nodes, node)().patch(model, *values)[0]


def with_sampling(node: str, *values: Any) -> Callable[[], Tiny]:
    return lambda: sd15()._replace(model=sampled(unet(), node, *values))


def sd15_inpaint() -> Tiny:
    return Tiny(unet(9), (4, 8, 8), clip_prompts())


def xl(kind: Any = None, **settings: Any) -> Tiny:
    model = unet(context=64, base=supported.SDXL, kind=kind, **settings)
    return Tiny(model, (4, 8, 8), clip_prompts(pooled=1280))


def playground() -> Tiny:
    tiny = xl(Kind.EDM, sigma_data=0.5, sigma_max=80.0, sigma_min=0.002)
    tiny.model.model.latent_format = comfy.latent_formats.SDXL_Playground_2_5()
    return tiny


# -- transformers of images


def sd3() -> Tiny:
    config = {
        "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 64, "qk_norm": "rms",
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [0],
    }  # fmt: skip
    return Tiny(
        build(supported.SD3, config), (16, 16, 16), prompts(64, (20, 20), pooled_output=lambda tokens: rnd(1, 64))
    )


def flux_config(guidance: bool, channels: int) -> dict[str, Any]:
    newer = {} if OLD else {"yak_mlp": False, "txt_norm": False, "txt_ids_dims": []}
    return {
        "image_model": "flux", "in_channels": channels, "out_channels": 16, "patch_size": 2, "vec_in_dim": 32,
        "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True, "guidance_embed": guidance, **newer,
    }  # fmt: skip


def flux(base: str = "Flux", guidance: bool = True, channels: int = 16, **parts: Callable[[int], Any]) -> Tiny:
    model = build(getattr(supported, base), flux_config(guidance, channels))
    if guidance:
        parts = {"guidance": lambda tokens: 2.0 + tokens / 10, **parts}
    return Tiny(model, (16, 16, 16), prompts(64, pooled_output=lambda tokens: rnd(1, 32), **parts))


def flux_kontext() -> Tiny:
    return flux(reference_latents=lambda tokens: [rnd(1, 16, 12, 20)])


def flux2() -> Tiny:
    config = {
        "image_model": "flux2", "axes_dim": [8, 8, 8, 8], "num_heads": 2, "mlp_ratio": 3.0, "theta": 2000, "out_channels": 128,
        "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "default_ref_method": "index",
        "ref_index_scale": 10.0, "txt_ids_dims": [3], "patch_size": 1, "in_channels": 128, "hidden_size": 64,
        "context_in_dim": 64, "vec_in_dim": None, "depth": 1, "depth_single_blocks": 1, "guidance_embed": True, "yak_mlp": False,
        "txt_norm": False,
    }  # fmt: skip
    return Tiny(build(supported.Flux2, config), (128, 8, 8), prompts(64, guidance=lambda tokens: 3.5))


def chroma() -> Tiny:
    config = {
        **flux_config(True, 64), "image_model": "chroma", "out_channels": 64, "in_dim": 64, "out_dim": 64, "hidden_dim": 64,
        "n_layers": 1,
    }  # fmt: skip
    for name in ("guidance_embed", "vec_in_dim", "yak_mlp", "txt_norm"):
        config.pop(name, None)
    config.update({} if OLD else {"vec_in_dim": None})
    return Tiny(build(supported.Chroma, config), (16, 16, 16), prompts(64))


def next_dit(base: str = "Lumina2", **more: Any) -> Tiny:
    config = {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 64, "n_layers": 2,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1, "qk_norm": True, "axes_dims": [16, 16, 16],
        "axes_lens": [300, 512, 512], "multiple_of": 32, **({} if OLD else {"rope_theta": 10000.0, "ffn_dim_multiplier": 4.0}),
        **more,
    }  # fmt: skip
    return Tiny(build(getattr(supported, base), config), (16, 16, 16), prompts(64, mask=True))


def z_image() -> Tiny:
    return next_dit(
        "ZImage", dim=256, n_heads=4, n_kv_heads=4, axes_dims=[16, 24, 24], axes_lens=[1536, 512, 512], rope_theta=256.0,
        ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
    )  # fmt: skip


def qwen_image(**parts: Callable[[int], Any]) -> Tiny:
    config = {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
        "axes_dims_rope": (8, 12, 12), "joint_attention_dim": 64,
    }  # fmt: skip
    return Tiny(build(supported.QwenImage, config), (16, 1, 16, 16), prompts(64, **parts))


def qwen_edit() -> Tiny:
    return qwen_image(reference_latents=lambda tokens: [rnd(1, 16, 1, 12, 20)])


def hidream() -> Tiny:
    config = {
        "image_model": "hidream", "attention_head_dim": 64, "axes_dims_rope": [32, 16, 16], "caption_channels": [64, 64],
        "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [0, 1], "num_attention_heads": 2,
        "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 1, "num_single_layers": 1, "out_channels": 16,
        "patch_size": 2, "text_emb_dim": 64,
    }  # fmt: skip
    llama = lambda tokens: rnd(1, 2, tokens, 64)  # noqa: E731
    made = prompts(64, (16, 16), pooled_output=lambda tokens: rnd(1, 64), conditioning_llama3=llama)
    return Tiny(build(supported.HiDream, config), (16, 16, 16), made)


def pixart() -> Tiny:
    config = {
        "image_model": "pixart_sigma", "num_heads": 4, "patch_size": 2, "hidden_size": 64, "in_channels": 4, "depth": 1,
        "model_max_length": 300, "input_size": 128, "pe_interpolation": 2, "micro_condition": False,
    }  # fmt: skip
    # The host's PixArt divides by zero below 32 cells, and its width of text is built in.
    return Tiny(build(supported.PixArtSigma, config), (4, 34, 34), prompts(4096, (12, 12)))


def auraflow() -> Tiny:
    config = {
        "max_seq": 64 * 64, "cond_seq_dim": 64, "n_double_layers": 1, "n_layers": 2, "dim": 64, "n_heads": 2, "global_conddim": 64,
    }  # fmt: skip
    return Tiny(build(supported.AuraFlow, config), (4, 16, 16), prompts(64, (16, 16)))


def omnigen2() -> Tiny:
    config = {
        "image_model": "omnigen2", "axes_dim_rope": [16, 24, 24], "axes_lens": [1024, 1664, 1664], "ffn_dim_multiplier": None,
        "hidden_size": 128, "in_channels": 16, "multiple_of": 32, "norm_eps": 1e-5, "num_attention_heads": 2, "num_kv_heads": 1,
        "num_layers": 1, "num_refiner_layers": 1, "out_channels": None, "patch_size": 2, "text_feat_dim": 64,
        "timestep_scale": 1000.0,
    }  # fmt: skip
    made = prompts(64, mask=True, reference_latents=lambda tokens: [rnd(1, 16, 12, 20)])
    return Tiny(build(supported.Omnigen2, config), (16, 16, 16), made)


def cosmos2() -> Tiny:
    config = {
        "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
        "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True,
        "crossattn_emb_channels": 64, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop",
        "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 32, "num_blocks": 2, "num_heads": 2,
        "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False,
    }  # fmt: skip
    return Tiny(build(supported.CosmosT2IPredict2, config), (16, 1, 16, 16), prompts(64, (16, 16)))


# -- transformers of videos


def wan(
    base: str = "WAN21_T2V", channels: int = 16, inputs: int = 16, kind: str = "t2v", **parts: Callable[[int], Any]
) -> Tiny:
    config = {
        "image_model": "wan2.1", "model_type": kind, "dim": 64, "out_dim": channels, "num_heads": 2, "ffn_dim": 64,
        "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 64, "window_size": (-1, -1), "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6, "in_dim": inputs, "text_dim": 64,
    }  # fmt: skip
    return Tiny(build(getattr(supported, base), config), (channels, 3, 8, 8), prompts(64, (16, 16), **parts))


def wan_i2v() -> Tiny:
    mask = torch.ones(1, 1, 3, 8, 8)
    mask[:, :, 0] = 0
    parts = {"concat_latent_image": lambda tokens: rnd(1, 16, 3, 8, 8), "concat_mask": lambda tokens: mask}
    return wan("WAN21_I2V", inputs=36, kind="i2v", **parts)


def hunyuan_video() -> Tiny:
    newer = {} if OLD else {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
    config = {
        "image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16, "vec_in_dim": 32,
        "axes_dim": [16, 24, 24], "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "byt5": False, "meanflow": False, "guidance_embed": True, **newer,
    }  # fmt: skip
    made = prompts(64, pooled_output=lambda tokens: rnd(1, 32), guidance=lambda tokens: 6.0)
    return Tiny(build(supported.HunyuanVideo, config), (16, 3, 8, 8), made)


def ltxv() -> Tiny:
    config = {
        "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "cross_attention_dim": 64,
        "caption_channels": 64,
    }  # fmt: skip
    made = prompts(64, (16, 16), mask=True, frame_rate=lambda tokens: 25)
    return Tiny(build(supported.LTXV, config), (128, 3, 8, 8), made)


# The columns of the README's support table.
UNETS = "SD1.5, SD2, SDXL, inpaint models"
OTHERS = "EDM (Playground, CosXL), Cascade, Cosmos-Predict2"
FLOWS = "Flux, Flux.2, SD3, Chroma, Lumina 2, Z-Image, HiDream, AuraFlow, OmniGen2, PixArt"
QWEN, VIDEO = "Qwen-Image, Qwen-Edit", "Wan, Hunyuan Video, LTX"
# name: (column of the support table, builder)
FAMILIES: dict[str, tuple[str, Callable[[], Tiny]]] = {
    "sd15": (UNETS, sd15),
    "sd15 inpaint": (UNETS, sd15_inpaint),
    "sd15 lcm": (UNETS, with_sampling("ModelSamplingDiscrete", "lcm", False)),
    "sd15 x0": (UNETS, with_sampling("ModelSamplingDiscrete", "x0", False)),
    "sd15 v zsnr": (UNETS, with_sampling("ModelSamplingDiscrete", "v_prediction", True)),
    "sdxl": (UNETS, xl),
    "sdxl v zsnr": (UNETS, lambda: xl(Kind.V_PREDICTION, zsnr=True)),
    "continuous edm": (OTHERS, with_sampling("ModelSamplingContinuousEDM", "eps", 14.6, 0.03)),
    "continuous v": (OTHERS, with_sampling("ModelSamplingContinuousV", "v_prediction", 500.0, 0.03)),
    "cascade": (OTHERS, with_sampling("ModelSamplingStableCascade", 2.0)),
    "cosxl": (OTHERS, lambda: xl(Kind.V_PREDICTION_EDM, sigma_max=120.0, sigma_min=0.002)),
    "playground": (OTHERS, playground),
    "cosmos predict2": (OTHERS, cosmos2),
    "pixart": (FLOWS, pixart),
    "sd3": (FLOWS, sd3),
    "auraflow": (FLOWS, auraflow),
    "flux": (FLOWS, flux),
    "flux schnell": (FLOWS, lambda: flux("FluxSchnell", guidance=False)),
    "flux fill": (FLOWS, lambda: flux("FluxInpaint", channels=96)),
    "flux kontext": (FLOWS, flux_kontext),
    "flux2": (FLOWS, flux2),
    "chroma": (FLOWS, chroma),
    "lumina2": (FLOWS, next_dit),
    "z-image": (FLOWS, z_image),
    "hidream": (FLOWS, hidream),
    "omnigen2": (FLOWS, omnigen2),
    "qwen-image": (QWEN, qwen_image),
    "qwen-edit": (QWEN, qwen_edit),
    "wan": (VIDEO, wan),
    "wan i2v": (VIDEO, wan_i2v),
    "hunyuan video": (VIDEO, hunyuan_video),
    "ltx": (VIDEO, ltxv),
}
# The network of sd15 or sdxl with other levels.
SAMPLINGS = {"sd15 lcm", "sd15 x0", "sd15 v zsnr", "sdxl v zsnr", "continuous edm", "continuous v", "cascade", "cosxl"}
NEWER = {"flux2", "z-image"}  # not in the oldest host


def make(name: str) -> Tiny:
    GENERATOR.manual_seed(7)
    return FAMILIES[name][1]()
