"""What every reader of diffusers folders needs: weights on the CPU, and the colours of the host's latent previews."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.folder import Network


def read_weights(network: Network) -> dict[str, Tensor]:
    """Return a network's tensors, memory-mapped on the CPU."""
    import comfy.utils
    from safetensors import SafetensorError

    state: dict[str, Tensor] = {}
    for file in network.files:
        try:
            state |= comfy.utils.load_torch_file(str(file), safe_load=True)
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(
                f"Expected a whole safetensors file at {file.parent.name}/{file.name}, but it is damaged "
                f"({str(error).splitlines()[0]}). Download it again."
            ) from None
    return state


def preview_factors(vae: Any, scale_factor: float, shift_factor: float = 0.0) -> tuple[list[list[float]], list[float]]:
    """Return latent-to-RGB (factors (C, 3), bias (3,)) for the host's previews, fitted on a sheet of plain colours."""
    factor = vae.downscale_ratio
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand((8, 8, 3), generator=generator)
    image = colours.repeat_interleave(4 * factor, 0).repeat_interleave(4 * factor, 1)[None]
    latents = ((vae.encode(image) - shift_factor) * scale_factor)[0].flatten(1).T.float()
    target = colours.repeat_interleave(4, 0).repeat_interleave(4, 1).reshape(-1, 3) * 2 - 1
    inputs = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs, target.to(inputs)).solution
    return solution[:-1].tolist(), solution[-1].tolist()
