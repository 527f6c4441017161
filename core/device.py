"""Where a model runs and in which number format: one policy for every technique."""

from __future__ import annotations

import torch

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """Return `device`, or the current CUDA device when there is one, else the CPU; raises ValueError when it is not there."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Expected `device` to be one that torch can use, but got {str(device)!r} ({reason}). Use 'cpu', or install a torch build for it."
        ) from error
    if picked.type == "cuda" and picked.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return picked


def pick_dtype(device: torch.device, dtype: torch.dtype | str | None = None) -> torch.dtype:
    """Return `dtype`, or float16 on CUDA and float32 elsewhere; raises ValueError for a format the device is no good at."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    picked = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if picked not in DTYPES.values():
        raise ValueError(f"Expected `dtype` to be float32, float16 or bfloat16, but got {dtype}.")
    if device.type == "cpu" and picked == torch.float16:
        raise ValueError(
            "Expected `dtype` float32 or bfloat16 on the CPU, but got float16: many CPU kernels lack it or are many times "
            "slower. Use float32 for speed and accuracy, bfloat16 for half the memory."
        )
    return picked
