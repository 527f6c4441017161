"""What the techniques share: the Denoiser, schedules, guidance, samplers, noise, masks, loading. Knows torch, never the host."""

from .denoiser import FLOW, VE, Conditioning, Denoiser, NoiseSpace, Prediction
from .diffusers_model import DiffusersDenoiser
from .guidance import CFG, cfg
from .loading import load
from .noise import NoiseSource, ReplayNoise, SeededNoise
from .pipeline import Pipeline
from .progress import Callback, Reporter, Step
from .samplers import SAMPLERS, sample
from .schedules import SCHEDULES, make_sigmas
from .transformer_model import TransformerDenoiser

__all__ = [
    "CFG",
    "FLOW",
    "SAMPLERS",
    "SCHEDULES",
    "VE",
    "Callback",
    "Conditioning",
    "Denoiser",
    "DiffusersDenoiser",
    "NoiseSource",
    "NoiseSpace",
    "Pipeline",
    "Prediction",
    "ReplayNoise",
    "Reporter",
    "SeededNoise",
    "Step",
    "TransformerDenoiser",
    "cfg",
    "load",
    "make_sigmas",
    "sample",
]
