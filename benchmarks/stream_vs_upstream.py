"""Stream Batch beside the published package: passes, network rows and CPU milliseconds per frame, in one run on one thread.

    pip install --no-deps streamdiffusion==0.1.1
    python benchmarks/stream_vs_upstream.py [--frames 120] [--json FILE]

Both drive the same tiny random UNet (tests/golden/stream/unet) with the same frames, noise and prompts; their results are
compared as they are made. Timed is a frame's way through the batch: noising, network, guidance, re-noising. The published
image preprocessing is left out in its favour. The two take turns frame by frame, so that a busy machine slows both alike; the
figure is the median frame in process CPU time. Without the package, ours runs alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from _common import ROOT
from slipstream.core import Conditioning, DiffusersDenoiser
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.stream import StreamBatch, StreamConfig
from torch import Tensor

STEPS = {1: [45], 2: [32, 45], 4: [0, 16, 32, 45]}
WARM_UP = 6
COUNTED = 20  # frames whose network calls and rows are counted


@dataclass(frozen=True)
class Setting:
    guidance: str
    steps: int
    batched: bool = True
    group: int = 1
    size: int = 8

    @property
    def label(self) -> str:
        mode = "batch" if self.batched else "sequential"
        return f"{self.guidance:10} N={self.steps} {mode:10} group {self.group} {self.size}x{self.size}"


def settings() -> list[Setting]:
    """Every setting that the published code can run, as recorded in tests/golden/stream/cases.json."""
    kinds = ("none", "self", "initialize", "full")
    found = [Setting(kind, steps) for steps in STEPS for kind in kinds]
    found += [Setting(kind, steps, batched=False) for steps in STEPS for kind in kinds[:3]]
    found += [Setting(kind, 1, group=2) for kind in ("none", "self", "full")]
    return found + [Setting(kind, 4, size=16) for kind in kinds]


class Network:
    """The UNet with a count of its calls and rows."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.calls, self.rows = unet, 0, 0

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.rows += len(x)
        return self.unet(x, *args, **kwargs)


def published(network: Network, setting: Setting, cond: Tensor, uncond: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return frame -> result of the published class, or None when it is not installed."""
    if not torch.cuda.is_available():  # it times itself with CUDA events whatever the device
        torch.cuda.Event = lambda **_: SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 0.0)  # type: ignore[assignment, misc]
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    try:
        from diffusers import DDIMScheduler
        from streamdiffusion import StreamDiffusion
    except ImportError:
        return None
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    pipe = SimpleNamespace(
        device=torch.device("cpu"), vae_scale_factor=1, scheduler=scheduler, text_encoder=None, unet=network, vae=None,
        encode_prompt=lambda **_: (cond, uncond),
    )  # fmt: skip
    stream = StreamDiffusion(
        pipe, STEPS[setting.steps], torch.float32, setting.size, setting.size, True, setting.batched, setting.group,
        setting.guidance,
    )  # fmt: skip
    stream.prepare("", "", 50, 1.2, 1.0)

    @torch.no_grad()
    def frame(latents: Tensor) -> Tensor:
        return stream.predict_x0_batch(stream.add_noise(latents, stream.init_noise[0], 0))

    return frame


def ours(model: DiffusersDenoiser, setting: Setting, cond: Tensor, uncond: Tensor) -> StreamBatch:
    config = StreamConfig(
        t_index_list=STEPS[setting.steps], guidance=setting.guidance, cfg_scale=1.2, frame_group=setting.group,
        consistency=True,
    )  # fmt: skip
    return StreamBatch(model, Conditioning(cond), Conditioning(uncond), config)


def timed(run: Callable[[Tensor], Any], frame: Tensor) -> float:
    """Return milliseconds of process CPU time per frame."""
    begun = time.process_time()
    run(frame)
    return 1000 * (time.process_time() - begun) / len(frame)


def compare(setting: Setting, unet: Any, count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    cond, uncond = torch.randn(2, 1, 7, 16, generator=generator)
    frames = [torch.randn(setting.group, 4, setting.size, setting.size, generator=generator) for _ in range(count)]
    network = Network(unet)
    theirs = published(network, setting, cond, uncond)
    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    stream = ours(model, setting, cond, uncond)
    lag = setting.steps - 1
    for frame in frames[:WARM_UP]:
        got = stream.push(frame)
        expected = theirs(frame) if theirs else None
    comparable = theirs and setting.batched and not (setting.guidance == "self" and setting.steps == 1)
    if comparable and got:
        error = float((torch.cat([f.latents for f in got]) - expected).abs().max() / expected.abs().max())  # type: ignore[union-attr, operator]
        assert error < 1e-4, (setting, error)
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    runs = {"theirs": theirs, "ours": stream.push}
    for i, frame in enumerate(frames):
        for name in sorted(runs, reverse=bool(i % 2)):  # who goes first alternates
            if (run := runs[name]) is not None:
                times[name].append(timed(run, frame))
    stream.drain()
    return {"setting": setting.label, **costs(setting, unet, cond, uncond, frames[:COUNTED], lag)} | {
        "upstream_ms": statistics.median(times["theirs"]) if theirs else None,
        "ours_ms": statistics.median(times["ours"]),
    }


def costs(setting: Setting, unet: Any, cond: Tensor, uncond: Tensor, frames: list[Tensor], lag: int) -> dict[str, int]:
    """Count network calls and rows for all frames to come out: the published batch needs `lag` frames more to push them."""
    network, model = Network(unet), DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    theirs, stream = published(network, setting, cond, uncond), ours(model, setting, cond, uncond)
    if theirs:
        for frame in frames + frames[:1] * (lag if setting.batched else 0):
            theirs(frame)
    out = sum(len(stream.push(frame)) for frame in frames) + len(stream.drain())
    assert out == sum(len(f) for f in frames)
    return {"upstream_calls": network.calls, "upstream_rows": network.rows, "calls": model.calls, "rows": model.rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(1)
    unet = UNet2DConditionModel.from_pretrained(ROOT / "tests" / "golden" / "stream" / "unet").eval()
    rows = []
    print(f"{args.frames} frames; upstream -> ours: network calls, rows, CPU ms per frame (median)")
    for setting in settings():
        row = compare(setting, unet, args.frames)
        rows.append(row)
        upstream = row["upstream_ms"]
        ours_ms = row["ours_ms"]
        speed = f"{upstream:6.2f} -> {ours_ms:6.2f} ms  {upstream / ours_ms:.2f}x" if upstream else "not installed"
        print(
            f"{row['setting']:48} calls {row['upstream_calls']:4} -> {row['calls']:4}  rows {row['upstream_rows']:4} -> "
            f"{row['rows']:4}  {speed}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if any(row["upstream_ms"] for row in rows):
        print(f"slowest ratio {min(r['upstream_ms'] / r['ours_ms'] for r in rows):.2f}x")


if __name__ == "__main__":
    main()
