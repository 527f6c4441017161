"""Many prompts through the API, techniques in turn, by two hosts on one output folder: latency, memory and threads.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python benchmarks/load.py --prompts 1000

Exits with 1 when a prompt fails, a file that both hosts write is not whole, or memory or threads of a host keep growing.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import pathlib
import re
import statistics
import sys
import tempfile
import threading
import time
from typing import Any

import _common
from slipstream.search import Schedule

HOST_TESTS = _common.ROOT / "tests" / "host"
SHARED = "both"  # the schedule that both hosts write
# What may come after a quarter of the prompts: pages that the allocator keeps, and the host's history of 10,000 prompts at most.
GROWTH = 100e6


def load(name: str) -> Any:
    """Import one of the harness files of the host tests."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HOST_TESTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def prompt(kind: str, seed: int, info: dict[str, Any]) -> dict[str, Any]:
    """Return a short API prompt of a technique on the bundled model; another seed is another result."""
    graph = load("graph")

    def node(type: str, **inputs: Any) -> dict[str, Any]:
        required = info[type]["input"].get("required", {})
        defaults = {name: graph.default_of(spec) for name, spec in required.items() if graph.is_widget(spec)}
        return graph.node(type, **{**defaults, **inputs})

    common = {"model": ["m", 0], "positive": ["p", 0], "negative": ["n", 0]}
    found = {
        "m": node("SlipstreamLoadModel", model="pocket"),
        "p": node("CLIPTextEncode", clip=["m", 1], text="a red circle"),
        "n": node("CLIPTextEncode", clip=["m", 1], text=""),
    }
    custom = {
        "noise": node("RandomNoise", noise_seed=seed),
        "levels": node("BasicScheduler", model=["m", 0], steps=2),
        "x": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["g", 0],
            sampler=["s", 0],
            sigmas=["levels", 0],
            latent_image=["z", 0],
        ),
        "decoded": node("VAEDecode", samples=["x", 0], vae=["m", 2]),
    }
    photo = {
        "clip": node("SlipstreamExampleClip", frames=1, width=64, height=64),
        "z": node("VAEEncode", pixels=["clip", 0], vae=["m", 2]),
        "mask": node("SolidMask", value=1.0, width=64, height=64),
    }
    parts: dict[str, tuple[dict[str, Any], list[Any]]] = {
        "RCFG Guider": (
            {
                **custom, "z": node("EmptyLatentImage", width=64, height=64, batch_size=1),
                "g": node("SlipstreamRCFGGuider", **common, guidance="onetime"), "s": node("KSamplerSelect"),
            },
            ["decoded", 0],
        ),
        "Stream Frames": (
            {
                "clip": node("SlipstreamExampleClip", frames=2, width=64, height=64),
                "f": node("SlipstreamStreamFrames", **common, vae=["m", 2], frames=["clip", 0], seed=seed, steps=1),
            },
            ["f", 0],
        ),
        "Masked Regenerate": (
            {
                **photo, "r": node("SlipstreamMaskedRegenerate", **common, latent=["z", 0], seed=seed, steps=1, rounds=2),
                "decoded": node("VAEDecode", samples=["r", 0], vae=["m", 2]),
            },
            ["decoded", 0],
        ),
        "Edit": (
            {
                **photo, "half": node("CropMask", mask=["mask", 0], width=64, height=64),
                "inv": node("SlipstreamInvert", model=["m", 0], vae=["m", 2], image=["clip", 0], positive=["p", 0], steps=2),
                "move": node(
                    "SlipstreamMove", dx=8.0, image=["clip", 0], canvas='{"size": [64, 64], "shapes": [{"box": [8, 8, 40, 40]}]}'
                ),
                "e": node("SlipstreamEditSampler", **common, vae=["m", 2], inversion=["inv", 0], tasks=["move", 0], seed=seed),
            },
            ["e", 0],
        ),
    }  # fmt: skip
    more, image = parts[kind]
    schedule = {
        "load": node("SlipstreamLoadSchedule", file=info["SlipstreamLoadSchedule"]["input"]["required"]["file"][0][0]),
        "keep": node("SlipstreamSaveSchedule", schedule=["load", 0], name=SHARED),
    }
    return {**found, **more, **schedule, "out": node("SaveImage", images=image, filename_prefix=f"load {kind}")}


KINDS = ("RCFG Guider", "Stream Frames", "Masked Regenerate", "Edit")


def status(pid: int) -> tuple[float, int]:
    """Return the bytes in memory and the threads of a process."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    found = {key: int(value) for key, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", text, re.MULTILINE)}
    return found["VmRSS"] * 1024.0, found["Threads"]


class Load:
    """One host and what it was seen to do."""

    def __init__(self, host: Any, count: int, first: int, end: float = math.inf) -> None:
        self.host, self.count, self.first, self.end = host, count, first, end
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.memory: list[float] = []
        self.threads: list[int] = []
        self.problems: list[str] = []

    def run(self) -> None:
        info = self.host.object_info()
        for i in range(self.count):
            kind = KINDS[i % len(KINDS)]
            begun = time.perf_counter()
            if begun > self.end:
                self.problems.append(f"{i} of {self.count} prompts in the time that --minutes gives")
                break
            result = self.host.run(prompt(kind, self.first + i, info))
            if result.ok:
                self.seconds[kind].append(time.perf_counter() - begun)
            else:
                self.problems.append(result.explain().splitlines()[0])
            memory, threads = status(self.host.pid)
            self.memory.append(memory)
            self.threads.append(threads)
            if (i + 1) % 100 == 0:
                print(f"{i + 1} prompts, {memory / 1e6:.0f} MB, {threads} threads", file=sys.stderr, flush=True)

    def check(self) -> list[str]:
        quarter = len(self.memory) // 4
        grown = self.memory[-1] - max(self.memory[: quarter + 1])
        if grown > GROWTH:
            self.problems.append(f"memory grew by {grown / 1e6:.0f} MB after the first quarter")
        if self.threads[-1] > max(self.threads[: quarter + 1]):
            self.problems.append(f"threads grew from {max(self.threads[: quarter + 1])} to {self.threads[-1]}")
        return self.problems


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000, help="of both hosts together")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then, and report what was done")
    args = parser.parse_args()
    comfy_host = load("comfy_host")
    with tempfile.TemporaryDirectory() as folder:
        shared = ["--output-directory", f"{folder}/output", "--user-directory", f"{folder}/user"]
        for name in ("output", "user/default"):
            pathlib.Path(folder, name).mkdir(parents=True)
        hosts = [comfy_host.ComfyHost([("slipstream", _common.ROOT)], args=shared) for _ in range(args.hosts)]
        try:
            end = time.perf_counter() + 60 * args.minutes
            loads = [Load(host.start(), args.prompts // args.hosts, 1000 * i, end) for i, host in enumerate(hosts)]
            running = [threading.Thread(target=each.run) for each in loads]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            problems = [text for each in loads for text in each.check()]
            problems += [str(p) for p in pathlib.Path(folder).rglob(".part*")]
            files = list(pathlib.Path(folder).rglob(f"{SHARED}*.json"))
            names = [Schedule.load(file).name for file in files]
            if len(names) != args.hosts:
                problems.append(f"{len(names)} schedules of {args.hosts} hosts")
        finally:
            for host in hosts:
                host.stop()
    for kind in KINDS:
        all_seconds = [s for each in loads for s in each.seconds[kind]]
        shown = ", ".join(f"p{round(100 * q)} {percentile(all_seconds, q):.2f} s" for q in (0.5, 0.9, 0.99))
        print(f"{kind}: {len(all_seconds)} prompts, {shown}, mean {statistics.mean(all_seconds):.2f} s")
    for i, each in enumerate(loads):
        quarter = each.memory[: len(each.memory) // 4 + 1]
        print(
            f"host {i + 1}: {max(quarter) / 1e6:.0f} MB at most in the first quarter, {each.memory[-1] / 1e6:.0f} MB at the end; "
            f"threads {max(each.threads[: len(quarter)])} and {each.threads[-1]}"
        )
    print("\n".join(problems) or "no problem")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
