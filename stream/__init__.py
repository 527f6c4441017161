"""StreamDiffusion: Stream Batch, residual CFG, similarity filter, queues."""

from .batch import StreamBatch, StreamFrame
from .config import StreamConfig
from .guidance import blend
from .similarity import SimilarityFilter

__all__ = ["SimilarityFilter", "StreamBatch", "StreamConfig", "StreamFrame", "blend"]
