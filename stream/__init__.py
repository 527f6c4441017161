"""StreamDiffusion: Stream Batch, residual CFG, similarity filter, queues."""

from ..core.guidance import RCFG
from .batch import StreamBatch, StreamFrame
from .config import StreamConfig
from .guidance import blend
from .lanes import StreamLanes
from .prompts import BlendedLanes, BlendedStream, PromptBlend
from .similarity import SimilarityFilter

__all__ = [
    "RCFG",
    "BlendedLanes",
    "BlendedStream",
    "PromptBlend",
    "SimilarityFilter",
    "StreamBatch",
    "StreamConfig",
    "StreamFrame",
    "StreamLanes",
    "blend",
]
