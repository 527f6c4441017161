"""What a report of a fault should tell: versions, devices, precision, attention, and which stage limits a stream."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .device import pick_device, pick_dtype
from .pipeline import Pipeline

PACKAGES = (
    "torch", "diffusers", "transformers", "safetensors", "einops", "numpy", "pillow", "av", "matplotlib", "xformers",
    "sageattention", "flash-attn",
)  # fmt: skip
OPTIONAL = ("av", "matplotlib", "xformers", "sageattention", "flash-attn")
REPEATS = 3


def versions() -> dict[str, str]:
    """Return the system and the versions of what is installed, without importing it; that of torch names its build, as in 2.11.0+cu130."""
    found = {
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            # The installed version of a wheel from PyPI does not tell whether it is a build for CUDA.
            found[name] = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            if name not in OPTIONAL:
                found[name] = "not installed"
    return found


def devices() -> dict[str, str]:
    """Return each device that torch can use, and what is picked by default."""
    found = {"CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        found[f"cuda:{index}"] = (
            f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}"
        )
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    device = pick_device()
    return {**found, "default": f"{device}, {str(pick_dtype(device)).removeprefix('torch.')}"}


def attention() -> dict[str, str]:
    """Return the kernels that torch may choose from for attention."""
    backends = torch.backends.cuda
    kernels = {
        "flash": backends.flash_sdp_enabled(), "memory efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }  # fmt: skip
    return {"attention": f"torch, kernels: {', '.join(name for name, on in kernels.items() if on) or 'none'}"}


def stages(pipe: Pipeline, height: int, width: int) -> dict[str, str]:
    """Return the milliseconds of each stage of a stream of one step, and the slowest: the one that limits it."""
    image = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))
    cond = pipe.encode_text([""], (height, width))
    latents = pipe.encode_image(image)
    sigma = torch.full((1,), pipe.model.sigma_max / 4, device=latents.device)
    spent = {
        "encode": seconds_of(lambda: pipe.encode_image(image)),
        "denoise": seconds_of(lambda: pipe.model(latents, sigma, cond)),
        "decode": seconds_of(lambda: pipe.decode(latents)),
    }
    return stage_facts(spent, height, width)


def stage_facts(spent: Mapping[str, float], height: int, width: int) -> dict[str, str]:
    """Return the seconds that each stage takes for a frame as text, and which one limits a stream."""
    times = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in spent.items())
    return {
        f"stream {width}x{height}": times,
        "limited by": limited_by(spent),
    }


def limited_by(spent: Mapping[str, float]) -> str:
    """Return which stage of a stream limits it, of the seconds that each takes for a frame, and to how much; "" of none."""
    slowest = max(spent, key=lambda name: spent[name], default="")
    return f"{slowest}: at most {1 / max(spent[slowest], 1e-9):.1f} frames per second" if slowest else ""


def seconds_of(run: Callable[[], Any]) -> float:
    """Return the least time of a few runs after a first one."""
    best = float("inf")
    for index in range(REPEATS + 1):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if index:
            best = min(best, time.perf_counter() - begun)
    return max(best, 1e-9)


def report(*parts: Mapping[str, str]) -> str:
    """Return parts of a report as lines "name: value", aligned, to paste into an issue; it holds no path and no name of a user."""
    lines = [(name, value) for part in parts for name, value in part.items()]
    longest = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name + ':':<{longest + 1}} {value}" for name, value in lines)
