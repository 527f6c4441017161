"""Live Stream in a real host: from a frame at the client to its result there, through the route, the host's UNet and its TAESD.

    COMFYUI_PATH=~/ComfyUI python benchmarks/live_host.py      # on the host's GPU: cameras of 30 and 60 fps, and all it takes
    COMFYUI_PATH=~/ComfyUI python benchmarks/live_host.py --device cpu --check      # does every path run?

The host is started for it (`COMFYUI_PYTHON` runs it, by default this Python), with the pack and a node that makes SD-Turbo's UNet and a
TAESD of random weights. Frames of 512 x 512 pixels go up as JPEG; the delay is from the moment a frame is sent until its result, decoded
again, is there: what the browser adds is its own drawing. "CPU" is that of the host's process for a frame.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from _common import ROOT
from load import load
from slipstream.stream.live import client
from slipstream.stream.queues import percentile
from slipstream.stream.video import Stamp
from torch import Tensor

WARM = 20  # results before anything is measured: kernels are chosen, compiled and recorded in them
LEAST = 4
MOST = 200.0  # frames a second of a source that never waits; the route takes 240
# (acceleration, steps, priority)
SETTINGS = (
    ("compile", 1, "latency"),
    ("none", 1, "latency"),
    ("compile", 1, "throughput"),
    ("compile", 4, "latency"),
    ("graph", 1, "latency"),
)


class Camera:
    """Frames at a fixed rate, that begin to count when `WARM` results have come, and end some seconds and `LEAST` results later."""

    path, live, has_sound, count, problem = "camera", True, False, 0, ""
    time_base = Fraction(1, 1000)

    def __init__(self, size: int, rate: float, seconds: float) -> None:
        self.rate = self.base_rate = Fraction(rate)
        self.size, self.seconds = size, seconds
        self.shown = self.counted = self.processed = 0
        self.begun = self.cpu = 0.0
        self.pid = 0

    def saw(self, found: client.Pushed) -> None:
        """Take note of a result; the first ones are forgotten."""
        self.shown = found.shown
        if not self.begun and self.shown >= WARM:
            found.delays.clear()
            self.counted, self.cpu, self.begun = self.shown, cpu_seconds(self.pid), time.perf_counter()

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]:
        generator = torch.Generator().manual_seed(1)
        cells = torch.randint(0, 256, (self.size // 8, 2 * self.size // 8, 3), dtype=torch.uint8, generator=generator)
        image = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)
        started, i = time.perf_counter(), 0
        while not self.begun or time.perf_counter() - self.begun < self.seconds or self.shown - self.counted < LEAST:
            time.sleep(max(started + i / float(self.rate) - time.perf_counter(), 0.0))
            i += 1
            left = 2 * i % self.size
            yield image[:, left : left + self.size].contiguous(), Stamp(i, self.time_base)
        self.processed = self.shown - self.counted
        self.cpu = cpu_seconds(self.pid) - self.cpu
        self.begun = time.perf_counter() - self.begun  # from now on how long it took


def cpu_seconds(pid: int) -> float:
    user, system = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def graph_of(info: dict[str, Any], shape: str, size: int, **inputs: Any) -> dict[str, Any]:
    graph = load("graph")
    asked = graph.all_inputs(info["SlipstreamLiveStream"])
    defaults = {name: graph.default_of(spec) for name, spec in asked.items() if graph.is_widget(spec)}
    sockets = {"model": ["m", 0], "vae": ["m", 1], "positive": ["m", 2], "negative": ["m", 2]}
    return {
        "m": graph.node("BenchmarkRandomModel", shape=shape),
        "live": graph.node("SlipstreamLiveStream", **{**defaults, "width": size, "height": size, **inputs}, **sockets),
    }


def measure(
    host: Any, info: dict[str, Any], args: argparse.Namespace, rate: float, setting: tuple[str, int, str]
) -> dict[str, Any]:
    """Run one stream and return what was seen of it."""
    acceleration, steps, priority = setting
    settings = {"acceleration": acceleration, "steps": steps, "priority": priority, "strength": 0.5, "guidance": "none"}
    camera = Camera(args.size, rate, args.seconds)
    camera.pid = host.pid
    begun = time.perf_counter()
    running = host.submit(graph_of(info, args.shape, args.size, **settings))
    found = client.Pushed()
    try:
        event = running.wait_for(
            lambda event: event.type == "slipstream.live" or "execution_error" in event.type, timeout=300
        )
        if event.type == "slipstream.live":
            found = client.push(f"{host.url}/slipstream/live/{event.data['stream']}", camera, progress=camera.saw)  # type: ignore[arg-type]
    finally:
        host.check_alive()  # else the end of its log says why
        running.interrupt()
        result = running.wait(60)
    if result.status == "error":
        raise RuntimeError(result.explain())
    delays, report = sorted(found.delays), found.report
    return {
        "acceleration": acceleration, "steps": steps, "priority": priority, "camera": rate, "seconds": camera.begun,
        "fps": camera.processed / camera.begun, "p50": percentile(delays, 50), "p95": percentile(delays, 95),
        "cpu_ms": 1000 * camera.cpu / max(camera.processed, 1), "limit": report.get("limit", ""),
        **{name: report.get(f"{name}_ms", 0.0) for name in ("encode", "denoise", "decode", "publish")},
        "all": time.perf_counter() - begun,
    }  # fmt: skip


@contextmanager
def kept(host: Any, path: pathlib.Path | None) -> Iterator[None]:
    """Keep the host's log, also when it ended."""
    try:
        yield
    finally:
        if path is not None:
            path.write_text(host.log())


def text(row: dict[str, Any]) -> str:
    return (
        f"{row['acceleration']:8} N={row['steps']} {row['priority']:10} camera {row['camera']:5.0f} fps: {row['fps']:6.1f} fps, delay p50 "
        f"{row['p50']:6.1f} p95 {row['p95']:6.1f} ms, ms: encode {row['encode']:5.1f} denoise {row['denoise']:5.1f} decode "
        f"{row['decode']:5.1f} publish {row['publish']:4.1f}, CPU {row['cpu_ms']:5.1f} ms a frame, limit {row['limit']} "
        f"({row['all']:.0f} s in all)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--shape", choices=("sd", "tiny"), default="sd")
    parser.add_argument("--size", type=int, default=512, help="side of the frames (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no further stream after so many (default %(default)s)"
    )
    parser.add_argument(
        "--cameras", type=float, nargs="+", default=[30.0, 60.0, MOST], help="frames a second (default 30, 60, 200)"
    )
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="so many of the settings, in their order")
    parser.add_argument(
        "--check", action="store_true", help="does every path run? a tiny network, 64 x 64 pixels, a few frames"
    )
    parser.add_argument(
        "--host-args", default="", help='more arguments for the host: --host-args="--disable-cuda-malloc"'
    )
    parser.add_argument("--log", type=pathlib.Path, help="keep the host's log in this file")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    settings: tuple[tuple[str, int, str], ...] = SETTINGS[: args.settings]
    if args.check:
        args.shape, args.size, args.seconds, args.cameras = "tiny", 64, 0.5, [30.0]
        settings = (("none", 1, "latency"), ("none", 1, "throughput"))
    began, rows = time.perf_counter(), []
    packs = [("slipstream", ROOT), ("live_pack", ROOT / "benchmarks" / "live_pack")]
    frontend = os.environ.get("COMFYUI_FRONTEND")
    more = ["--front-end-root", frontend] if frontend else []
    with (
        load("comfy_host").ComfyHost(packs, device=args.device, args=more + args.host_args.split()) as host,
        kept(host, args.log),
    ):
        info = host.object_info()
        stats = host.get("/system_stats")
        print(
            f"ComfyUI {stats['system'].get('comfyui_version')}, {stats['devices'][0]['name']}, {args.size} x {args.size}",
            flush=True,
        )
        for setting in settings:
            for rate in args.cameras:
                if time.perf_counter() - began > 60 * args.minutes:
                    print(f"left out after {args.minutes:g} minutes: {setting} at {rate:g} fps")
                    continue
                rows.append(measure(host, info, args, rate, setting))
                print(text(rows[-1]), flush=True)
        beside = "the VAE works on a CUDA stream of its own" in host.log()
        print(f"the VAE's own CUDA stream: {'yes' if beside else 'no'}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
