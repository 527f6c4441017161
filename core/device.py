"""Where a model runs and in which number format, and what happens when memory runs out: one policy for every technique."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from .cache import CACHES

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
VARIABLE = "SLIPSTREAM_DEVICE"


def default_device() -> str:
    """Return what the environment variable SLIPSTREAM_DEVICE names, else "cuda" where CUDA is available, else "cpu"."""
    return os.environ.get(VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """Return `device`, or the default device; raises ValueError when torch cannot use it."""
    name = "`device`"
    if device is None:
        name, device = f"`{VARIABLE}` (environment variable)", default_device()
    try:
        # A tensor there tells whether it works, and gives "cuda" its index.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Expected {name} to be one that torch can use, but got {str(device)!r} ({reason}). "
            "Use 'cpu', or install a torch build that supports it."
        ) from error


def pick_dtype(device: torch.device, dtype: torch.dtype | str | None = None) -> torch.dtype:
    """Return `dtype`, or float16 on CUDA and float32 elsewhere; raises ValueError for a format that the device does not support."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    picked = DTYPES.get(SHORT.get(dtype, dtype)) if isinstance(dtype, str) else dtype
    if picked is None or picked not in DTYPES.values():
        raise ValueError(f"Expected `dtype` to be float32, float16 or bfloat16, but got {dtype}.")
    if device.type == "cpu" and picked == torch.float16:
        raise ValueError(
            "Expected `dtype` float32 or bfloat16 on the CPU, but got float16, which many CPU kernels lack or compute "
            "slowly. Use float32, or bfloat16 for half the memory."
        )
    return picked


def free_memory() -> None:
    """Move every cache off the device and give unused blocks back to it."""
    for cache in list(CACHES):
        cache.leave_device()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device or the host refused an allocation."""
    # torch's CPU allocator has no exception type of its own.
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def with_memory(run: Callable[[], T], what: str, remedy: str = "Use a smaller image or batch.") -> T:
    """Return `run()`; when memory runs out, free what the caches hold and try once more, then raise MemoryError.

    `run` must be free of side effects. `what` names the work for the message, as in "decode 4 images of 1024x1024".
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the except block: the first error's traceback would keep its tensors alive.
    free_memory()
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"Not enough memory to {what}: {_shortage(error)}. {remedy}") from error


def _shortage(error: BaseException) -> str:
    """Say what was asked for and what was free."""
    text = str(error)
    asked = re.search(r"allocate ([\d.]+ \w+)", text)
    needed = f"needed {asked[1]} more" if asked else "the allocation was refused"
    if isinstance(error, torch.cuda.OutOfMemoryError) and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{needed}, {free / 2**30:.2f} of {total / 2**30:.2f} GiB were free on the device"
    return needed
