"""Does a stream run for ever? 100,000 frames on a toy model with live changes and skips: memory and speed over time.

python benchmarks/stream_soak.py [--frames 100000] [--files]

With --files, `slipstream stream` repaints a video of so many frames instead: files, VAE and network of the bundled model. The similarity
filter leaves out what repeats, so that every 12th frame reaches the network.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from types import SimpleNamespace

import torch
from _common import ROOT
from slipstream.core import VE, Conditioning
from slipstream.core.schedules import DiscreteLevels, scaled_linear_alphas_cumprod
from slipstream.stream import StreamBatch, StreamConfig
from slipstream.stream.sinks import open_sink
from slipstream.stream.video import Stamp, open_source
from torch import Tensor


class Toy:
    """Shrinks every latent towards the prompt's number: the cheapest denoiser there is."""

    space = VE
    levels = DiscreteLevels(scaled_linear_alphas_cumprod())
    sigma_min, sigma_max = levels.sigma_min, levels.sigma_max
    calls = rows = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return x / (1 + sigma**2).reshape(-1, 1, 1, 1) + cond.expand(len(x)).context[:, :1, :1, None]


RATE = Fraction(25)
COMMAND = "import runpy, sys; runpy.run_path(sys.argv.pop(1)); import slipstream.cli; sys.exit(slipstream.cli.main())"


def resident(pid: int | str = "self") -> float:
    """Return a process's resident memory in MB, 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(float(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))
    except OSError:
        return 0.0


def write_clip(path: pathlib.Path, count: int) -> None:
    """Write a video of 16 x 16 pixels that shows another image every 20 frames."""
    source = SimpleNamespace(
        path="", live=False, has_sound=False, count=count, rate=RATE, base_rate=RATE, time_base=1 / RATE, problem=""
    )
    with open_sink(str(path), source) as sink:
        for i in range(count):
            coarse = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(i // 20))
            image = torch.nn.functional.interpolate(coarse, (16, 16))[0].movedim(0, -1)
            sink.write(image, Stamp(i, 1 / RATE, 1))


def through_files(count: int) -> None:
    """Run the command on a long video; print its memory whenever another tenth of the frames is done."""
    with tempfile.TemporaryDirectory() as folder:
        clip, out = pathlib.Path(folder) / "in.mp4", pathlib.Path(folder) / "out.mp4"
        write_clip(clip, count)
        options = "--prompt noise --steps 1 --guidance none --strength 0.5 --similarity 0.9 --blocks 1".split()
        command = [sys.executable, "-c", COMMAND, str(ROOT / "benchmarks" / "_common.py"), "stream"]
        process = subprocess.Popen(
            [*command, "--input", str(clip), "--out", str(out), *options], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        first, shown, begun = 0.0, 0, time.perf_counter()
        for line in process.stderr:
            found = re.match(r"(\d+)/", line)
            done = int(found[1]) if found else 0
            if not found:
                print(line.strip(), flush=True)
            if done >= shown + count // 10:
                first, shown, held = first or resident(process.pid), done, resident(process.pid)
                print(f"{done:7} frames  {held:7.1f} MB  {time.perf_counter() - begun:6.0f} s", flush=True)
        code, written = process.wait(), sum(1 for _ in open_source(str(out)))
        print(f"exit code {code}; {written} of {count} frames in the file; {held - first:.1f} MB after the first tenth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--files", action="store_true", help="the command, with files, VAE and network")
    args = parser.parse_args()
    count = args.frames
    torch.set_num_threads(1)
    if args.files:
        through_files(count)
        return
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
