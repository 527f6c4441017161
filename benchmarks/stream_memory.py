"""Peak memory of Stream Frames beyond its input, as a multiple of the clip: COMFYUI_PATH=... PYTHON_OF_THE_HOST benchmarks/stream_memory.py

The result itself is once the clip. A tiny random network and a VAE without weights: what is measured is what the node holds.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import resource
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "host"))
import inside  # isort: skip  # before the host and the pack
import family_checks
import tiny_models
import torch
from slipstream.nodes import stream

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--frames", type=int, default=400)
parser.add_argument("--side", type=int, default=128, help="pixels, a multiple of 4")
args = parser.parse_args(inside.ARGUMENTS)
TINY = tiny_models.make("sd15")
VAE = family_checks.fake_vae(TINY)


def run(frames: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = stream.StreamFrames().stream(
            TINY.model, *TINY.prompts, VAE, frames, strength=0.7, steps=2, guidance="self", guidance_scale=1.4, seed=2
        )[0]
    return found


def now() -> float:
    """Bytes in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


clip = torch.rand(args.frames, args.side, args.side, 3)
run(clip[:32])  # whatever is made once
gc.collect()
before = now()
images = run(clip)
size = clip.numel() * clip.element_size()
print(
    f"{args.frames} frames of {args.side} x {args.side}, {size / 1e6:.0f} MB: {(peak() - before) / size:.2f} times the clip at the peak"
)
assert images.shape == clip.shape
