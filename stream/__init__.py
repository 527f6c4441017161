"""StreamDiffusion: Stream Batch, residual CFG, similarity filter, queues."""

from .batch import StreamBatch, StreamFrame
from .config import StreamConfig
from .guidance import RCFG, blend
from .similarity import SimilarityFilter

__all__ = ["RCFG", "SimilarityFilter", "StreamBatch", "StreamConfig", "StreamFrame", "blend"]
