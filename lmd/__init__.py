"""Latent masking diffusion (arXiv 2312.07971) for any model, and two diagnostics: influence and stretch."""

from .influence import InfluenceProfile, influence
from .latent_fill import SIZES, FillConfig, LatentFill, latents_kind
from .mask_schedule import MaskSchedule, mask_ratio, mask_schedule
from .regenerate import RegenerateConfig, RegenerateResult, regenerate
from .stretch import StretchMap, drag_field, optical_flow, stretch_map
from .training import TrainConfig, TrainResult, TrainStep, train

__all__ = [
    "SIZES",
    "FillConfig",
    "InfluenceProfile",
    "LatentFill",
    "MaskSchedule",
    "RegenerateConfig",
    "RegenerateResult",
    "StretchMap",
    "TrainConfig",
    "TrainResult",
    "TrainStep",
    "drag_field",
    "influence",
    "latents_kind",
    "mask_ratio",
    "mask_schedule",
    "optical_flow",
    "regenerate",
    "stretch_map",
    "train",
]
