"""Frames per second of a stream on a GPU: from a uint8 frame in host memory to a uint8 frame in host memory.

    python benchmarks/stream_gpu.py                        # SD-Turbo and SDXL-Turbo shapes, 512 x 512, fp16: one table
    python benchmarks/stream_gpu.py --models sd --steps 1 4 --modes graph
    python benchmarks/stream_gpu.py --device cpu --small   # does everything run? (tiny networks, 64 x 64, fp32)
    python benchmarks/stream_gpu.py --profile trace.json   # one setting under the profiler, for chrome://tracing

The networks have the published shapes and random weights; the VAE is a TAESD (diffusers' AutoencoderTiny). They run as a user
runs them: `Pipeline.encode_image` and `decode_async`, `StreamBatch`, `StreamThreads`, `replayed_pipeline`. Modes: "eager";
"compiled" (torch.compile of each network); "graph" (each network recorded as a CUDA graph); "both" (compiled, then recorded).

"loop" is one thread that reads results two frames late, "threads" the five threads of `slipstream stream`. Stage times come from
a second run with CUDA events. Peak is the best fp16 matrix product of 8192^3 measured here; the fraction counts the
multiply-adds of all networks. "steady" is a run after warm-up in which torch raises when the host would wait for the device, and
in which no memory may be asked of the device or pinned; the command ends with 1 when a setting fails it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import pathlib
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch
from _common import ROOT  # noqa: F401  makes `slipstream` importable from a checkout
from slipstream.core import Conditioning, DiffusersDenoiser, Pipeline
from slipstream.core.device import default_device
from slipstream.core.graphs import replayed_pipeline
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.core.transfer import Arrival
from slipstream.stream import StreamBatch, StreamConfig
from slipstream.stream.queues import StreamThreads

STEPS = {1: [35], 2: [35, 45], 4: [20, 28, 36, 45]}
LAG = 2  # frames that the GPU may be behind when a result is read
WARM_UP = 12
SD = {
    "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
    "use_linear_projection": True, "sample_size": 64,
}  # fmt: skip
SDXL = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "sample_size": 64,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SMALL = {
    "block_out_channels": (32, 64), "attention_head_dim": 8, "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    mode: str
    steps: int
    guidance: str
    sequential: bool
    fps: float
    threads_fps: float
    steady: str
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    tflop: float
    peak_share: float
    memory_gb: float

    def text(self) -> str:
        kind = "sequential" if self.sequential else "stream batch"
        return (
            f"{self.model:5} {self.mode:8} N={self.steps} {self.guidance:7} {kind:12} fps: loop {self.fps:6.1f} threads "
            f"{self.threads_fps:6.1f}  steady: {self.steady}  ms: encode "
            f"{self.encode_ms:6.2f} denoise {self.denoise_ms:7.2f} decode {self.decode_ms:6.2f}  {self.tflop:6.3f} TFLOP/frame  "
            f"{self.peak_share:5.1%} of peak  {self.memory_gb:5.2f} GB"
        )


def make_pipe(name: str, device: torch.device, small: bool) -> tuple[Pipeline, int]:
    """Return a pipeline of one shape with random weights and a tiny VAE, and the side of its pictures."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    torch.manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    config = {**(SDXL if name == "sdxl" else SD), **(SMALL if small else {})}
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    with device:
        unet = UNet2DConditionModel(**config)
        channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4} if small else {}
        vae = AutoencoderTiny(**channels)
    unet, vae = (net.to(dtype, memory_format=layout).eval().requires_grad_(False) for net in (unet, vae))
    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    return Pipeline(model, [], vae, device, dtype), 64 if small else 512


def make_cond(pipe: Pipeline, size: int) -> Conditioning:
    put = {"device": pipe.device, "dtype": pipe.dtype}
    context = torch.randn(1, 77, pipe.model.unet.config.cross_attention_dim, **put)
    if not pipe.model.takes_time_ids:
        return Conditioning(context)
    ids = torch.full((1, 6), float(size), device=pipe.device)
    return Conditioning(context, torch.randn(1, 1280, **put), {"time_ids": ids})


def prepared(pipe: Pipeline, mode: str, rows: int, size: int, cond: Conditioning) -> Pipeline:
    """Return `pipe` with its networks as `mode` says."""
    if mode in ("graph", "both"):
        return replayed_pipeline(pipe, rows, size, size, cond, compiled=mode == "both")
    if mode == "compiled":
        pipe = copy.copy(pipe)
        pipe.model, pipe.vae = copy.copy(pipe.model), copy.copy(pipe.vae)
        pipe.model.network = torch.compile(pipe.model.network, dynamic=False)
        pipe.vae.encode, pipe.vae.decode = (torch.compile(f, dynamic=False) for f in (pipe.vae.encode, pipe.vae.decode))
    return pipe


class Runner:
    """One setting: frame on the host -> frame on the host, in one thread that waits for nothing but old results."""

    def __init__(self, pipe: Pipeline, size: int, mode: str, steps: int, guidance: str, sequential: bool) -> None:
        cond, uncond = make_cond(pipe, size), make_cond(pipe, size)
        config = StreamConfig(
            t_index_list=STEPS[steps], guidance=guidance, cfg_scale=1.0 if guidance == "none" else 1.2,
            static_rows=mode != "eager" and not sequential,
        )  # fmt: skip
        self.sequential = sequential
        self.pipe = prepared(pipe, mode, config.rows, size, cond)
        self.new_batch = functools.partial(StreamBatch, self.pipe.model, cond, uncond, config)
        self.batch = self.new_batch()
        self.decode = functools.partial(self.pipe.decode_async, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(1)
        self.frames = [torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator) for _ in range(8)]
        self.coming: deque[Arrival] = deque()

    def __call__(self, i: int, marks: list[Any] | None = None) -> int:
        """Push frame `i`; returns how many frames came out. `marks` collects an event after each stage."""
        _mark(marks)
        latents = self.pipe.encode_image(self.frames[i % len(self.frames)][None])
        _mark(marks)
        finished = self.batch.push(latents)
        if self.sequential:  # one step at a time, as without a Stream Batch
            finished += self.batch.drain()
        _mark(marks)
        self.coming.extend(self.decode(frame.latents) for frame in finished)
        _mark(marks)
        while len(self.coming) > LAG:
            self.coming.popleft().get()
        return len(finished)

    def threads(self, count: int) -> float:
        """Return the rate of `count` frames through `StreamThreads`; 0 for one step at a time, which it does not do."""
        if self.sequential:
            return 0.0
        source = ((self.frames[i % len(self.frames)], i) for i in range(count))
        parts = source, self.pipe.encode_image, self.new_batch(), self.decode, lambda *_: None
        with StreamThreads(*parts, live=False, device=self.pipe.device) as threads:
            return threads.wait()["fps_out"]


def _mark(marks: list[Any] | None) -> None:
    if marks is None:
        return
    if torch.cuda.is_available():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append(event)
    else:
        marks.append(time.perf_counter())


def frames_per_second(run: Runner, seconds: float) -> float:
    """Return the steady rate; the GPU stays at most `LAG` frames behind."""
    for i in range(WARM_UP):
        run(i)
    _synchronize(run)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or count < 5:
        count += run(count)
    _synchronize(run)
    return count / (time.perf_counter() - begun)


def _synchronize(run: Runner) -> None:
    if run.pipe.device.type == "cuda":
        torch.cuda.synchronize()


def steady(run: Runner, count: int = 50) -> str:
    """Return "pass" when `count` frames after warm-up neither make the host wait nor take memory, "-" without CUDA, or the reason."""
    for i in range(WARM_UP):
        run(i)
    if run.pipe.device.type != "cuda":
        return "-"
    _synchronize(run)
    before = allocations()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(count):
            run(i)
    except RuntimeError as error:
        return f"FAIL ({str(error).splitlines()[0]})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    grown = {name: after - before[name] for name, after in allocations().items() if after != before[name]}
    return f"FAIL ({', '.join(f'{n} {name}' for name, n in grown.items())})" if grown else "pass"


def allocations() -> dict[str, int]:
    """Return how often memory was asked of the driver so far: cudaMalloc, and pinned blocks where torch counts them."""
    device = torch.cuda.memory_stats()
    known = "num_device_alloc" if "num_device_alloc" in device else "segment.all.allocated"  # before torch 2.2
    found = {"device allocations": device[known]}
    if hasattr(torch.cuda, "host_memory_stats"):
        found["pinned allocations"] = torch.cuda.host_memory_stats()["num_host_alloc"]
    return found


def stage_times(run: Runner, count: int = 20) -> list[float]:
    """Return median milliseconds of encode, denoise and decode."""
    rows = []
    for i in range(count):
        marks: list[Any] = []
        run(i, marks)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            rows.append([a.elapsed_time(b) for a, b in zip(marks, marks[1:])])
        else:
            rows.append([1000 * (b - a) for a, b in zip(marks, marks[1:])])
    return [statistics.median(column) for column in zip(*rows)]


def flops(pipe: Pipeline, size: int, steps: int, guidance: str) -> float:
    """Return the floating point operations of one frame in 10^12 (two for each multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    run = Runner(pipe, size, "eager", steps, guidance, sequential=True)
    with FlopCounterMode(display=False) as counter:
        run(0)
    return counter.get_total_flops() / 1e12


def matmul_peak(device: torch.device) -> float:
    """Return the best measured fp16 matrix product in TFLOP/s."""
    if device.type != "cuda":
        return float("nan")
    size, best = 8192, 0.0
    a, b = (torch.randn(size, size, device=device, dtype=torch.float16) for _ in range(2))
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 5 * 2 * size**3 / start.elapsed_time(end) / 1e9)
    return best


def measure(
    name: str, pipe: Pipeline, size: int, mode: str, steps: int, guidance: str, sequential: bool, seconds: float, peak: float
) -> Row:  # fmt: skip
    cuda = pipe.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if mode in ("compiled", "both"):
        torch.compiler.reset()  # after some shapes of one network torch gives up compiling and runs eagerly
    run = Runner(pipe, size, mode, steps, guidance, sequential)
    fps = frames_per_second(run, seconds)
    verdict, times, threads_fps = steady(run), stage_times(run), run.threads(max(int(fps * seconds / 2), 20))
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    work = flops(pipe, size, steps, guidance)
    return Row(
        name, mode, steps, guidance, sequential, fps, threads_fps, verdict, *times, work, work * fps / peak, memory
    )


def settings(steps: list[int], modes: list[str]) -> list[tuple[str, int, str, bool]]:
    """Return (mode, steps, guidance, sequential): self at every N, the comparisons at the largest N."""
    found = [(mode, n, "self", False) for mode in modes for n in steps]
    most = max(steps)
    found += [(mode, most, kind, False) for mode in modes for kind in ("none", "onetime", "full")]
    return found + [(mode, n, "self", True) for mode in modes[:1] for n in steps if n > 1]


def ratios(rows: list[Row]) -> list[str]:
    """Return the claims of Stream Batch and RCFG as measured."""
    found = {(r.model, r.mode, r.steps, r.guidance, r.sequential): r.fps for r in rows}
    lines = []
    for (model, mode, n, kind, sequential), fps in found.items():
        batch, full = found.get((model, mode, n, kind, False)), found.get((model, mode, n, "full", False))
        if sequential and batch:
            lines.append(f"{model} {mode} N={n}: Stream Batch is {batch / fps:.2f}x sequential")
        if kind == "self" and full and not sequential:
            lines.append(f"{model} {mode} N={n}: self-RCFG is {fps / full:.2f}x full CFG")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--models", nargs="+", default=["sd", "sdxl"], choices=["sd", "sdxl"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4], choices=list(STEPS))
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled", "graph", "both"])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--profile", type=pathlib.Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    peak = matmul_peak(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, fp16 matrix product {peak:.0f} TFLOP/s")
    rows: list[Row] = []
    for model in args.models:
        pipe, size = make_pipe(model, device, args.small)
        if args.profile:
            profile(Runner(pipe, size, args.modes[0], args.steps[0], "self", False), args.profile)
            return 0
        for setting in settings(args.steps, args.modes):
            rows.append(measure(model, pipe, size, *setting, args.seconds, peak))
            print(rows[-1].text(), flush=True)
    print("\n".join(ratios(rows)))
    if args.json:
        args.json.write_text(json.dumps({"device": name, "peak": peak, "rows": [asdict(r) for r in rows]}, indent=1))
    failed = [row for row in rows if row.steady.startswith("FAIL")]
    print(f"steady: {len(failed)} of {len(rows)} settings fail" if device.type == "cuda" else "steady: needs a GPU")
    return 1 if failed else 0


def profile(run: Runner, path: pathlib.Path) -> None:
    """Write a trace of some steady frames and print where the time goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for i in range(12):
        run(i)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.pipe.device.type == "cuda" else [])
    with record(activities=kinds) as recorded_run:
        for i in range(5):
            run(i)
    recorded_run.export_chrome_trace(str(path))
    key = "cuda_time_total" if run.pipe.device.type == "cuda" else "cpu_time_total"
    print(recorded_run.key_averages().table(sort_by=key, row_limit=25))


if __name__ == "__main__":
    sys.exit(main())
