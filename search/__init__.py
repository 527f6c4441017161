"""AutoDiffusion: the best few-step schedule for a model, searched, kept and shared."""
