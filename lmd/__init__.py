"""Latent masking diffusion and two diagnostics."""
