"""StreamDiffusion: Stream Batch, residual CFG, similarity filter, queues."""
