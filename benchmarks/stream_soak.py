"""Does a stream run for ever? 100,000 frames on a toy model with live changes and skips: memory and speed over time.

python benchmarks/stream_soak.py [--frames 100000]
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
from _common import ROOT  # noqa: F401  makes `slipstream` importable from a checkout
from slipstream.core import VE, Conditioning
from slipstream.core.schedules import DiscreteLevels, scaled_linear_alphas_cumprod
from slipstream.stream import StreamBatch, StreamConfig
from torch import Tensor


class Toy:
    """Shrinks every latent towards the prompt's number: the cheapest denoiser there is."""

    space = VE
    levels = DiscreteLevels(scaled_linear_alphas_cumprod())
    sigma_min, sigma_max = levels.sigma_min, levels.sigma_max
    calls = rows = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return x / (1 + sigma**2).reshape(-1, 1, 1, 1) + cond.expand(len(x)).context[:, :1, :1, None]


def resident() -> float:
    """Return this process's resident memory in MB, 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as file:
            return next(float(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))
    except OSError:
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    count = parser.parse_args().frames
    torch.set_num_threads(1)
    stream = StreamBatch(Toy(), Conditioning(torch.zeros(1, 1, 1)), None, StreamConfig(strength=0.7, steps=4))  # type: ignore[arg-type]
    frame, out, first, begun = torch.zeros(1, 4, 8, 8), 0, 0.0, time.perf_counter()
    for n in range(1, count + 1):
        out += len(stream.skip() if n % 11 == 0 else stream.push(frame))
        if n % 97 == 0:
            stream.update(cfg_scale=1 + n % 5 / 10, strength=0.4 + n % 7 / 20, steps=1 + n % 6)
        if n % max(count // 10, 1) == 0:
            gc.collect()
            first = first or resident()
            seconds, begun = time.perf_counter() - begun, time.perf_counter()
            print(
                f"{n:7} frames  {resident():7.1f} MB  {1e6 * seconds / max(count // 10, 1):6.0f} us per frame",
                flush=True,
            )
    out += len(stream.drain())
    print(f"{out} of {count} frames came out; memory grew by {resident() - first:.1f} MB after the first tenth")


if __name__ == "__main__":
    main()
