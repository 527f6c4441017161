"""AutoDiffusion: the best few-step schedule for a model, searched, kept and shared (arXiv 2309.10438)."""

from ..core.layers import LayerMask
from .comparison import Comparison, compare
from .config import SearchConfig
from .engine import SearchResult, SearchStep, search
from .objectives import Objective, Paired, ReferenceImages, SelfDistribution
from .paths import ModelPath, SamplingPath
from .schedule import Schedule, ScheduleError

__all__ = [
    "Comparison",
    "LayerMask",
    "ModelPath",
    "Objective",
    "Paired",
    "ReferenceImages",
    "SamplingPath",
    "Schedule",
    "ScheduleError",
    "SearchConfig",
    "SearchResult",
    "SearchStep",
    "SelfDistribution",
    "compare",
    "search",
]
