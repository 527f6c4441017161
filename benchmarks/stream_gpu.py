"""Frames per second of a stream on a GPU: from a uint8 frame in host memory to a uint8 frame in host memory.

    python benchmarks/stream_gpu.py                        # SD-Turbo and SDXL-Turbo shapes, 512 x 512, fp16: one table
    python benchmarks/stream_gpu.py --models sd --steps 1 4 --modes graph
    python benchmarks/stream_gpu.py --device cpu --small   # does everything run? (tiny networks, 64 x 64, fp32)
    python benchmarks/stream_gpu.py --profile trace.json   # one setting under the profiler, for chrome://tracing

The networks have the published shapes and random weights; the VAE is a TAESD (diffusers' AutoencoderTiny). Modes: "eager";
"compiled" (torch.compile of each network); "graph" (each network recorded as a CUDA graph); "both" (compiled, then recorded).
Timed is a long run without any wait inside: the CPU prepares frames ahead, results are read two frames late. Stage times
come from a second run with CUDA events. Peak is the best fp16 matrix product of 8192^3 measured here; the fraction counts the
multiply-adds of all networks.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from _common import ROOT  # noqa: F401  makes `slipstream` importable from a checkout
from slipstream.core import Conditioning, DiffusersDenoiser
from slipstream.core.graphs import record_cuda, replayed
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.stream import StreamBatch, StreamConfig
from torch import Tensor

STEPS = {1: [35], 2: [35, 45], 4: [20, 28, 36, 45]}
LAG = 2  # frames that the GPU may be behind when a result is read
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
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    tflop: float
    peak_share: float
    memory_gb: float

    def text(self) -> str:
        kind = "sequential" if self.sequential else "stream batch"
        return (
            f"{self.model:5} {self.mode:8} N={self.steps} {self.guidance:7} {kind:12} {self.fps:7.1f} fps  ms: encode "
            f"{self.encode_ms:6.2f} denoise {self.denoise_ms:7.2f} decode {self.decode_ms:6.2f}  {self.tflop:6.3f} TFLOP/frame  "
            f"{self.peak_share:5.1%} of peak  {self.memory_gb:5.2f} GB"
        )


class Networks:
    """UNet and tiny VAE of one shape, with random weights, and functions from pixels to latents and back."""

    def __init__(self, name: str, device: torch.device, small: bool) -> None:
        from diffusers import AutoencoderTiny, UNet2DConditionModel

        torch.manual_seed(0)
        self.name, self.device = name, device
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.size = 64 if small else 512
        config = {**(SDXL if name == "sdxl" else SD), **(SMALL if small else {})}
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        with device:
            unet = UNet2DConditionModel(**config)
            channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4} if small else {}
            vae = AutoencoderTiny(**channels)
        self.unet = unet.to(self.dtype, memory_format=layout).eval().requires_grad_(False)
        self.vae = vae.to(self.dtype, memory_format=layout).eval().requires_grad_(False)
        self.width = config["cross_attention_dim"]
        self.model = DiffusersDenoiser(self.unet, scaled_linear_alphas_cumprod())

    def cond(self) -> Conditioning:
        context = torch.randn(1, 77, self.width, device=self.device, dtype=self.dtype)
        if self.name != "sdxl":
            return Conditioning(context)
        ids = torch.full((1, 6), float(self.size), device=self.device)
        return Conditioning(context, torch.randn(1, 1280, device=self.device, dtype=self.dtype), {"time_ids": ids})

    def encode(self, frame: Tensor) -> Tensor:
        """uint8 (H, W, 3) on the device -> latents (1, 4, h, w)."""
        pixels = frame.permute(2, 0, 1)[None].to(self.dtype).mul(2 / 255).sub(1)
        return self.vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (1, 4, h, w) -> uint8 (H, W, 3) on the device."""
        pixels = self.vae.decode(latents.to(self.dtype)).sample[0].permute(1, 2, 0)
        return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def recorded(function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """Return `function` as a CUDA graph for inputs like `example`."""
    fixed = example.clone()
    replay, output = record_cuda(lambda: function(fixed))

    def run(x: Tensor) -> Tensor:
        fixed.copy_(x, non_blocking=True)
        replay()
        return output.clone()

    return run


class Runner:
    """One setting: frame on the host -> frame on the host, nothing waited for inside."""

    def __init__(self, nets: Networks, mode: str, steps: int, guidance: str, sequential: bool) -> None:
        self.nets, self.sequential, self.steps = nets, sequential, steps
        cond, uncond = nets.cond(), nets.cond()
        scale = 1.0 if guidance == "none" else 1.2
        config = StreamConfig(
            t_index_list=STEPS[steps], guidance=guidance, guidance_scale=scale, static_rows=mode != "eager"
        )
        latents = nets.size // 8
        rows = 1 if sequential else steps
        rows = rows * 2 if guidance == "full" else rows + (guidance == "onetime")
        model, self.encode, self.decode = nets.model, nets.encode, nets.decode
        if mode in ("compiled", "both"):
            self.encode, self.decode = (
                torch.compile(nets.encode, dynamic=False),
                torch.compile(nets.decode, dynamic=False),
            )
        if mode == "compiled":
            model = DiffusersDenoiser(nets.unet, scaled_linear_alphas_cumprod())
            model.unet = torch.compile(nets.unet, dynamic=False)
        if mode in ("graph", "both") and nets.device.type == "cuda":
            model = replayed(nets.model, rows, latents, latents, cond, compiled=mode == "both")
            frame = torch.zeros(nets.size, nets.size, 3, dtype=torch.uint8, device=nets.device)
            with torch.inference_mode():
                self.encode = recorded(self.encode, frame)
                self.decode = recorded(
                    self.decode, torch.zeros(1, 4, latents, latents, device=nets.device, dtype=nets.dtype)
                )
        self.batch = StreamBatch(model, cond, uncond, config)
        pinned = nets.device.type == "cuda"
        generator = torch.Generator().manual_seed(1)
        shape = (nets.size, nets.size, 3)
        self.frames = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(8)]
        self.frames = [frame.pin_memory() for frame in self.frames] if pinned else self.frames
        self.outputs = [torch.empty_like(self.frames[0], pin_memory=pinned) for _ in range(LAG + 1)]

    @torch.inference_mode()
    def __call__(self, i: int, marks: list[Any] | None = None) -> bool:
        """Push frame `i`; returns whether a frame came out. `marks` collects an event after each stage."""
        _mark(marks)
        latents = self.encode(self.frames[i % len(self.frames)].to(self.nets.device, non_blocking=True))
        _mark(marks)
        finished = self.batch.push(latents)
        if self.sequential:  # one step at a time, as without a Stream Batch
            finished += self.batch.drain()
        _mark(marks)
        for frame in finished:
            self.outputs[i % len(self.outputs)].copy_(self.decode(frame.latents), non_blocking=True)
        _mark(marks)
        return bool(finished)


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
    cuda = run.nets.device.type == "cuda"
    waiting: deque[Any] = deque()
    for i in range(12):
        run(i)
    if cuda:
        torch.cuda.synchronize()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or count < 5:
        count += run(count)
        if cuda:
            waiting.append(torch.cuda.Event())
            waiting[-1].record()
            if len(waiting) > LAG:
                waiting.popleft().synchronize()
    if cuda:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begun)


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


def flops(nets: Networks, steps: int, guidance: str) -> float:
    """Return the floating point operations of one frame in 10^12 (two for each multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    run = Runner(nets, "eager", steps, guidance, sequential=True)
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


def measure(nets: Networks, mode: str, steps: int, guidance: str, sequential: bool, seconds: float, peak: float) -> Row:
    if nets.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = Runner(nets, mode, steps, guidance, sequential)
    fps = frames_per_second(run, seconds)
    times = stage_times(run)
    memory = torch.cuda.max_memory_allocated() / 2**30 if nets.device.type == "cuda" else 0.0
    work = flops(nets, steps, guidance)
    return Row(nets.name, mode, steps, guidance, sequential, fps, *times, work, work * fps / peak, memory)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
        nets = Networks(model, device, args.small)
        if args.profile:
            profile(Runner(nets, args.modes[0], args.steps[0], "self", False), args.profile)
            return
        for setting in settings(args.steps, args.modes):
            rows.append(measure(nets, *setting, args.seconds, peak))
            print(rows[-1].text(), flush=True)
    print("\n".join(ratios(rows)))
    if args.json:
        args.json.write_text(json.dumps({"device": name, "peak": peak, "rows": [asdict(r) for r in rows]}, indent=1))


def profile(run: Runner, path: pathlib.Path) -> None:
    """Write a trace of some steady frames and print where the time goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for i in range(12):
        run(i)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.nets.device.type == "cuda" else [])
    with record(activities=kinds) as recorded_run:
        for i in range(5):
            run(i)
    recorded_run.export_chrome_trace(str(path))
    key = "cuda_time_total" if run.nets.device.type == "cuda" else "cpu_time_total"
    print(recorded_run.key_averages().table(sort_by=key, row_limit=25))


if __name__ == "__main__":
    main()
