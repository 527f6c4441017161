"""Gradients through the host's MODEL, although the host runs every node in inference mode."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def grad_ready(model: Any) -> Iterator[None]:
    """Leave inference mode with gradients on, and make a loaded MODEL's weights usable in a backward pass.

    Weights that a stock loader made in inference mode cannot be saved for backward: each such parameter and buffer is
    wrapped again once (a transient copy of one tensor), and stays, because normal tensors are valid in inference mode too.
    Enter it inside `run_on_model`'s `work` (the model must be loaded). Inside: `.clone()` every tensor that came from
    outside (x, sigma, masks), take gradients with `torch.autograd.grad` on inputs only, and leave before returning.

    Args:
        model: MODEL (`ModelPatcher`).

    Raises:
        ValueError: quantised weights (GGUF, nf4, int8, fp8 that the host does not cast): nothing goes back through them; or weights
            only partly on the device.
    """
    network = model.model.diffusion_model
    _check_weights(network)
    with torch.inference_mode(False), torch.enable_grad(), training_kernels():
        for module in model.model.modules():
            renew_tensors(module)
        yield


@contextmanager
def training_kernels() -> Iterator[None]:
    """Make newer hosts leave fused kernels aside that have no gradient, as they do for their own training (rotary embeddings)."""
    management = sys.modules.get("comfy.model_management")
    before = getattr(management, "in_training", None)
    if management is None or before is None:  # this host has no such kernels
        yield
        return
    management.in_training = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        management.in_training = before  # type: ignore[attr-defined]


def renew_tensors(module: nn.Module) -> int:
    """Replace the inference tensors among one module's own parameters and buffers; return how many there were."""
    renewed = 0
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_inference():
            module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
            renewed += 1
        elif parameter is not None:
            parameter.requires_grad_(False)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_inference():
            module._buffers[name] = buffer.clone()
            renewed += 1
    return renewed


def _check_weights(network: nn.Module) -> None:
    """Raise ValueError for weights that no gradient goes through, or that lie on more than one device.

    The gradient is that in the latents. fp8 weights are no obstacle where the host casts them for each call.
    """
    devices = set()
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            devices.add(parameter.device.type)
            cast = parameter.dtype.itemsize > 1 or getattr(module, "comfy_cast_weights", False)
            if not parameter.dtype.is_floating_point or not cast or type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"Expected `model` with float32, float16 or bfloat16 weights, but got {parameter.dtype} in {prefix}.{name}. "
                    "Editing in mode fine needs gradients, which quantised weights do not have: use mode draft, or weight_dtype default."
                )
    if len(devices) > 1:
        raise ValueError(
            f"Expected `model` wholly on one device, but got weights on {', '.join(sorted(devices))}. "
            "Free memory (close other models, smaller image), or start the host with --highvram."
        )
