"""Adapters between the library and the host's MODEL, CLIP, VAE, SAMPLER and GUIDER objects."""
