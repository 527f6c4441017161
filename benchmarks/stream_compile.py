"""torch.compile as a stream uses it, for true: time until the first frame, cold and from what is kept; do changed weights count?

    python benchmarks/stream_compile.py               # a UNet of one level, on the CPU: needs a C++ compiler, takes minutes
    python benchmarks/stream_compile.py --pocket      # the bundled student: many minutes of one core the first time

Each start is a process of its own on one cache folder, empty at first. "ready" is `core.graphs.replayed(..., compiled=True)`, in seconds of
the clock and of CPU (compilers included). A second network of the same kind, as after another LoRA or checkpoint, takes what is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from _common import ROOT  # noqa: F401  makes `slipstream` importable from a checkout
from slipstream import load
from slipstream.core import Conditioning, DiffusersDenoiser
from slipstream.core.diffusers_model import NetworkDenoiser
from slipstream.core.graphs import replayed
from slipstream.core.schedules import scaled_linear_alphas_cumprod

UNET = {
    "sample_size": 8, "block_out_channels": (32,), "attention_head_dim": 8, "norm_num_groups": 8, "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "cross_attention_dim": 16,
    "transformer_layers_per_block": 1,
}  # fmt: skip


def cpu_seconds() -> float:
    """Return what this process and those that it waited for have used."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def made(pocket: bool) -> tuple[NetworkDenoiser, Conditioning, int]:
    """Return a model, a prompt, and the side of its latents."""
    if pocket:
        pipe = load("pocket-lcm", device="cpu")
        return pipe.model, pipe.encode_text(["a red circle"]), 16
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**UNET).eval().requires_grad_(False)
    return DiffusersDenoiser(unet, scaled_linear_alphas_cumprod()), Conditioning(torch.randn(1, 7, 16)), 8


def ready(model: NetworkDenoiser, cond: Conditioning, side: int) -> tuple[NetworkDenoiser, list[float]]:
    begun, used = time.perf_counter(), cpu_seconds()
    fast = replayed(model, 1, side, side, cond, compiled=True)
    assert fast is not model, "it was not compiled: see the log"
    return fast, [time.perf_counter() - begun, cpu_seconds() - used]


@torch.inference_mode()
def difference(fast: NetworkDenoiser, model: NetworkDenoiser, cond: Conditioning, side: int) -> float:
    """Return the largest relative difference of a pass, compiled and not."""
    x, sigma = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0])
    a, b = fast(x, sigma, cond), model(x, sigma, cond)
    return float((a - b).abs().max() / b.abs().max())


def start(pocket: bool) -> dict[str, Any]:
    """Compile, run, change the weights in place, and take a second network of the same kind."""
    torch.manual_seed(0)
    model, cond, side = made(pocket)
    fast, first = ready(model, cond, side)
    worst = [difference(fast, model, cond, side)]
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.mul_(1.02)
    worst.append(difference(fast, model, cond, side))
    other, cond, side = made(pocket)
    again, second = ready(other, cond, side)
    worst.append(difference(again, other, cond, side))
    return {"ready": first, "second network": second, "difference": max(worst)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pocket", action="store_true", help="the bundled student in place of a tiny network")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(start(args.pocket)))
        return 0
    command = [sys.executable, __file__, "--child", *(["--pocket"] if args.pocket else [])]
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        kept = str(pathlib.Path(folder) / "kept")
        for name in ("cold", "warm: another process"):
            run = subprocess.run(
                command,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": kept},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found = json.loads(run.stdout.splitlines()[-1])
            (clock, cpu), (again, _) = found["ready"], found["second network"]
            print(
                f"{name}: ready in {clock:.1f} s ({cpu:.1f} s of CPU); a second network of this kind in {again:.1f} s"
            )
            worst = max(worst, found["difference"])
    print(f"compiled beside eager, also after the weights have changed in place: relative difference {worst:.0e}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
