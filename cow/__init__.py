"""Cyclic One-Way Diffusion: a subject's pixels stay while a scene grows around it."""
