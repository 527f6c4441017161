"""What every reader of diffusers folders needs: weights on the CPU, their dtype, a MODEL, the colours of the host's latent previews."""

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


def choose_dtype(family: Any, state: dict[str, Tensor]) -> None:
    """Give a family of the host the dtype that the host takes for these weights, and the one that it computes in."""
    import comfy.model_management as management
    import comfy.utils

    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=list(family.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(state),
    )
    cast = management.unet_manual_cast(dtype, management.get_torch_device(), family.supported_inference_dtypes)
    family.set_inference_dtype(dtype, cast)


def as_model(model: Any) -> Any:
    """Return a loaded `BaseModel` of the host as a MODEL on the devices that the host chooses."""
    import comfy.model_management as management
    import comfy.model_patcher

    device, offload = management.get_torch_device(), management.unet_offload_device()
    model.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


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
