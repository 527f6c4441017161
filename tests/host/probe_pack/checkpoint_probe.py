"""Tiny checkpoints of SD1.5, SD2 and SDXL kind, which the host's own loaders take for such: its families are told of their sizes."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys
from typing import Any

import comfy.sd1_clip
import comfy.supported_models as supported
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.utils

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu", "vocab_size": 49408, "eos_token_id": 49407, "projection_dim": 64, "layer_norm_eps": 1e-5,
}  # fmt: skip
CHANNELS, WIDTH = 32, TEXT["hidden_size"]
ADM = WIDTH + 6 * 256  # the pooled text and the six sizes of SDXL
LAYERS = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1, "use_spatial_transformer": True, "use_checkpoint": False,
    "legacy": False, "use_temporal_resblock": False,
}  # fmt: skip


class TinyText(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = {}) -> None:  # noqa: B006
        clip = functools.partial(comfy.sd1_clip.SDClipModel, textmodel_json_config=dict(TEXT))
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=clip)


def tiny(base: Any, linear: bool, adm: int | None = None) -> Any:
    """Return a family of the host at the tiny size; its name is what tells the native size of a model."""
    config = {
        "context_dim": WIDTH, "model_channels": CHANNELS, "use_linear_in_transformer": linear, "adm_in_channels": adm,
        "use_temporal_attention": False,
    }  # fmt: skip
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, TinyText)
    changes = {
        "unet_config": config,
        "unet_extra_config": {"num_heads": 4, "num_head_channels": -1},
        "clip_target": lambda self, state_dict={}: target,
        "process_clip_state_dict": supported.SD15.process_clip_state_dict,
    }
    return type(base.__name__, (base,), changes)


FAMILIES = {
    "SD15": tiny(supported.SD15, False),
    "SD20": tiny(supported.SD20, True),
    "SDXL": tiny(supported.SDXL, True, ADM),
}
supported.models[:0] = FAMILIES.values()


def randomise(module: Any) -> Any:
    path = pathlib.Path(__file__).resolve().parents[1] / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules.setdefault("tiny_models", importlib.util.module_from_spec(spec))
    if not hasattr(made, "randomise"):
        spec.loader.exec_module(made)
    made.randomise(module)
    return module.state_dict()


class TinyCheckpoint:
    """Writes a checkpoint of a kind into a file."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (list(FAMILIES),), "file": ("STRING", {})}}

    def run(self, kind: str, file: str) -> Any:
        family = FAMILIES[kind]({**LAYERS, **FAMILIES[kind].unet_config})
        if family.unet_config["adm_in_channels"]:
            family.unet_config["num_classes"] = "sequential"
        family.set_inference_dtype(comfy.model_management.torch.float32, None)
        parts = {
            "model.diffusion_model.": family.get_model({}, "", device=None).diffusion_model,
            "cond_stage_model.": TinyText().clip_l,
            "first_stage_model.": comfy.taesd.taesd.TAESD(latent_channels=4),
        }
        state = {prefix + key: value for prefix, part in parts.items() for key, value in randomise(part).items()}
        comfy.utils.save_torch_file({key: value.contiguous() for key, value in state.items()}, file)
        return {"ui": {"text": [file]}}


NODES = {"ProbeTinyCheckpoint": TinyCheckpoint}
