"""Frames per second and delay of a stream on a GPU: from a uint8 frame in host memory to a uint8 frame in host memory.

    python benchmarks/stream_gpu.py                        # what matters first, for eight minutes; what was left out is named
    python benchmarks/stream_gpu.py --minutes 30 --json figures.json
    python benchmarks/stream_gpu.py --host ~/ComfyUI       # also the host's own UNet, beside that of diffusers
    python benchmarks/stream_gpu.py --rows 1 4             # also the UNet alone, by rows in a call, and its kinds of kernels
    python benchmarks/stream_gpu.py --only "sdxl compile"  # the settings whose name has this
    python benchmarks/stream_gpu.py --check                # does every path run? (tiny networks on the CPU, in a minute)
    python benchmarks/stream_gpu.py --profile trace.json   # the first setting under the profiler, for chrome://tracing

The networks have the published shapes and random weights; the VAE is a TAESD (diffusers' AutoencoderTiny). They run as a user runs
them: `Pipeline.encode_image` and `decode_async`, `StreamBatch` or `StreamLanes`, `StreamThreads`, `core.graphs.accelerated`. "graph" is
each network recorded as a CUDA graph, "compile" compiled before; `priority` is that of `slipstream stream`. "published" is the package
streamdiffusion 0.1.1 (`pip install --no-deps streamdiffusion==0.1.1`) on the same network, VAE and frames; a run without it ends with that.

"loop" is one thread that reads results two frames late, "threads" the five threads of `slipstream stream`. Delay is that of a camera at
half the rate: p50 and p95 from the frame in host memory to its result there. Stage times come from a second run with CUDA events. Peak is
the best fp16 matrix product of 8192^3 measured here; the fraction counts the multiply-adds of all networks. CPU is that of the five
threads: near the time of a frame, it is what limits. "steady" is a run after warm-up
in which torch raises when the host would wait for the device, and in which no memory may be asked of the device or pinned; the command
ends with 1 when a setting fails it. "ready" is the time until the first frame: recording, and compiling. Goals are printed at the end,
each with what was measured.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from _common import ROOT  # noqa: F401  makes `slipstream` importable from a checkout
from slipstream.core import Conditioning, DiffusersDenoiser, Pipeline
from slipstream.core.compiling import kept_folder
from slipstream.core.device import default_device
from slipstream.core.graphs import accelerated, replayed
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.core.transfer import Arrival, receive
from slipstream.stream import StreamBatch, StreamConfig, StreamFrame, StreamLanes
from slipstream.stream.lanes import room_for, width_of
from slipstream.stream.queues import StreamThreads, percentile

STEPS = {1: [35], 2: [35, 45], 4: [20, 28, 36, 45]}
LAG = 2  # frames that the GPU may be behind when a result is read
WARM_UP, FEW = 12, 20
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
class Setting:
    """What one line of the table runs."""

    model: str
    acceleration: str
    steps: int
    guidance: str = "self"
    priority: str = "latency"
    sequential: bool = False

    @property
    def label(self) -> str:
        kind = "sequential" if self.sequential else f"priority {self.priority}"
        return f"{self.model:5} {self.acceleration:8} N={self.steps} {self.guidance:7} {kind:19}"

    @property
    def name(self) -> str:
        return " ".join(self.label.split())


# What matters first. The first compiled one pays for the kernels that later ones find kept.
SETTINGS = [
    Setting("sd", "none", 1), Setting("sd", "none", 4), Setting("sd", "compile", 1),
    Setting("sd", "compile", 1, priority="throughput"), Setting("sd", "compile", 4), Setting("sd", "compile", 4, "full"),
    Setting("sd", "compile", 4, priority="throughput"), Setting("sd", "compile", 4, "full", priority="throughput"),
    Setting("sdxl", "compile", 2), Setting("sdxl", "compile", 2, priority="throughput"), Setting("sd", "compile", 1, priority="1"),
    Setting("sd", "compile", 1, priority="2"), Setting("sd", "compile", 4, priority="2"), Setting("sdxl", "compile", 2, priority="2"),
    Setting("sd", "graph", 1), Setting("sd", "graph", 4), Setting("sd", "compile", 2), Setting("sdxl", "none", 2),
    Setting("sdxl", "graph", 2), Setting("sd", "none", 4, sequential=True), Setting("sd", "compile", 4, "none"),
    Setting("sd", "compile", 4, "onetime"), Setting("sd", "compile", 2, priority="throughput"),
    Setting("sd", "graph", 1, priority="1"), Setting("sdxl", "compile", 4),
]  # fmt: skip
# (what, the setting, frames a second) on one H100 or H200
GOALS = [
    ("SD-Turbo N = 1, most frames", Setting("sd", "compile", 1, priority="throughput"), 300.0),
    ("SD-Turbo N = 1, least delay", Setting("sd", "compile", 1), 230.0),
    ("SD-Turbo N = 4", Setting("sd", "compile", 4, priority="throughput"), 140.0),
    ("SDXL-Turbo N = 2", Setting("sdxl", "compile", 2, priority="throughput"), 110.0),
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    setting: Setting
    fps: float
    threads_fps: float
    delay_p50_ms: float
    delay_p95_ms: float
    steady: str
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    ready_s: float
    tflop: float
    peak_share: float
    memory_gb: float
    cpu_ms: float

    @property
    def best(self) -> float:
        return max(self.fps, self.threads_fps)

    def text(self) -> str:
        return (
            f"{self.setting.label} fps: loop {self.fps:6.1f} threads {self.threads_fps:6.1f}  delay p50 {self.delay_p50_ms:6.1f} p95 "
            f"{self.delay_p95_ms:6.1f} ms  steady: {self.steady}  ms: encode {self.encode_ms:6.2f} denoise {self.denoise_ms:7.2f} decode "
            f"{self.decode_ms:6.2f}  ready {self.ready_s:5.1f} s  {self.tflop:6.3f} TFLOP/frame  {self.peak_share:5.1%} of peak  "
            f"{self.memory_gb:5.2f} GB  {self.cpu_ms:5.2f} ms of CPU a frame"
        )


def make_pipe(name: str, device: torch.device, small: bool) -> tuple[Pipeline, int]:
    """Return a pipeline of one shape with random weights and a tiny VAE, and the side of its images."""
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


class Runner:
    """One setting: frame on the host -> frame on the host, in one thread that waits for nothing but old results."""

    def __init__(self, pipe: Pipeline, size: int, setting: Setting) -> None:
        cond, uncond = make_cond(pipe, size), make_cond(pipe, size)
        config = StreamConfig(
            t_index_list=STEPS[setting.steps], guidance=setting.guidance, cfg_scale=1.0 if setting.guidance == "none" else 1.2,
            static_rows=setting.acceleration != "none" and not setting.sequential,
        )  # fmt: skip
        width = width_of(setting.priority, config, room_for(pipe.device, setting.acceleration))
        config, self.sequential = config.changed(frame_group=width.group), setting.sequential
        self.no_delay = width.no_delay
        begun = time.perf_counter()
        self.pipe, models = accelerated(
            pipe, setting.acceleration, config.rows, size, size, cond, width.group, width.lanes
        )
        self.ready = time.perf_counter() - begun
        self.models, self.make = models, functools.partial(StreamBatch, cond=cond, uncond=uncond, config=config)
        self.batch = self.new_batch()
        self.decode = functools.partial(self.pipe.decode_async, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(1)
        self.frames = [torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator) for _ in range(8)]
        self.coming: deque[Arrival] = deque()

    def new_batch(self) -> StreamBatch | StreamLanes:
        made = [self.make(model) for model in self.models]
        return made[0] if len(made) == 1 else StreamLanes(made, self.no_delay)

    def __call__(self, i: int, marks: list[Any] | None = None) -> int:
        """Push frame `i`; returns how many frames came out. `marks` collects an event after each stage."""
        _mark(marks)
        latents = self.pipe.encode_image(self.frames[i % len(self.frames)][None])
        _mark(marks)
        finished = self.batch.push(latents)
        if self.sequential:  # one step at a time, as without a Stream Batch
            finished += self.batch.drain()
        for frame in finished:
            receive(frame.ready, frame.latents)
        _mark(marks)
        if finished:
            self.coming.append(self.decode(torch.cat([frame.latents for frame in finished])))
        _mark(marks)
        while len(self.coming) > LAG:
            self.coming.popleft().get()
        return len(finished)

    def threads(self, count: int, rate: float = 0.0) -> tuple[float, float, float]:
        """Return frames a second, and p50 and p95 of the delay in ms, of `count` frames through `StreamThreads`.

        They come as fast as it goes, or from a camera of `rate`, after `WARM_UP` others: each thread chooses its kernels in its first pass.
        """
        if self.sequential:  # which it does not do
            return 0.0, 0.0, 0.0
        sent, came, out = dict[int, float](), list[tuple[float, float]](), 0

        def source() -> Iterator[tuple[torch.Tensor, int]]:
            i = 0
            while out < WARM_UP:
                yield self.frames[i % len(self.frames)], i
                time.sleep(0.001)
                i += 1
            begun = time.perf_counter()
            for k in range(count):
                if rate:
                    time.sleep(max(begun + k / rate - time.perf_counter(), 0))
                sent[i + k] = time.perf_counter()
                yield self.frames[k % len(self.frames)], i + k

        def sink(_: torch.Tensor, i: int, __: StreamFrame) -> None:
            nonlocal out
            out += 1
            if i in sent:
                came.append((time.perf_counter(), time.perf_counter() - sent[i]))

        parts = source(), self.pipe.encode_image, self.new_batch(), self.decode, sink
        with StreamThreads(*parts, live=bool(rate), device=self.pipe.device) as threads:
            threads.wait()
        delays = sorted(1000 * delay for _, delay in came)
        fps = (len(came) - 1) / max(came[-1][0] - came[0][0], 1e-9) if len(came) > 1 else 0.0
        return fps, percentile(delays, 50), percentile(delays, 95)


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
    while time.perf_counter() - begun < seconds or count < 2:
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


def stage_times(run: Runner, count: int) -> list[float]:
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


def counted_as(setting: Setting) -> Setting:
    """Return the setting in which the operations of a frame are counted: acceleration and priority change none of them."""
    return Setting(setting.model, "none", setting.steps, setting.guidance, sequential=True)


@functools.cache
def flops(pipe: Pipeline, size: int, setting: Setting) -> float:
    """Return the floating point operations of one frame in 10^12 (two for each multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    run = Runner(pipe, size, setting)
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


def measure(pipe: Pipeline, size: int, setting: Setting, seconds: float, peak: float) -> Row:
    cuda = pipe.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if setting.acceleration == "compile":
        torch.compiler.reset()  # after some shapes of one network torch gives up compiling and runs eagerly
    run = Runner(pipe, size, setting)
    fps = frames_per_second(run, seconds)
    verdict, times = steady(run), stage_times(run, FEW)
    count = max(int(fps * seconds / 2), FEW)
    begun = time.process_time()
    full, *_ = run.threads(count)
    cpu = 1000 * (time.process_time() - begun) / (count + WARM_UP)
    rate = max(full, fps) / 2
    _, *delays = run.threads(min(max(int(rate * seconds / 2), FEW), 200), rate)
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    work = flops(pipe, size, counted_as(setting))
    best = max(fps, full)
    return Row(setting, fps, full, *delays, verdict, *times, run.ready, work, work * best / peak, memory, cpu)


def published(pipe: Pipeline, size: int, steps: int, seconds: float) -> float | None:
    """Return frames a second of the published package, eager, on the same networks and frames; None where it is missing."""
    if importlib.util.find_spec("streamdiffusion") is None:
        return None
    from diffusers import DDIMScheduler
    from streamdiffusion import StreamDiffusion

    if pipe.device.type != "cuda":  # it times itself with CUDA events whatever the device
        torch.cuda.Event = lambda **_: SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 0.0)  # type: ignore[assignment, misc]
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    cond = make_cond(pipe, size).context
    inner = SimpleNamespace(
        device=pipe.device, vae_scale_factor=8, scheduler=scheduler, text_encoder=None, unet=pipe.model.unet, vae=pipe.vae,
        encode_prompt=lambda **_: (cond, cond), image_processor=None,
    )  # fmt: skip
    stream = StreamDiffusion(inner, STEPS[steps], pipe.dtype, size, size, True, True, 1, "self")
    stream.prepare("", "", 50, 1.2, 1.0)
    frames = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def frame(i: int) -> None:
        pixels = frames[i % 8].to(pipe.device).permute(2, 0, 1)[None].to(pipe.dtype) / 127.5 - 1
        latents = pipe.vae.encode(pixels).latents
        done = stream.predict_x0_batch(stream.add_noise(latents, stream.init_noise[0], 0))
        ((pipe.vae.decode(done).sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    with torch.no_grad():
        for i in range(WARM_UP):
            frame(i)
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds or count < 2:
            frame(count)
            count += 1
    return count / (time.perf_counter() - begun)


def host_rows(host: pathlib.Path, pipe: Pipeline, size: int, small: bool, seconds: float) -> list[str]:
    """Return rows a second of the host's own UNet, as it is and in its fused form, beside those of diffusers."""
    sys.path.insert(0, str(host.expanduser()))
    arguments, sys.argv = sys.argv, [sys.argv[0], *(["--cpu"] if pipe.device.type != "cuda" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
    from slipstream.nodes.host.fused import FusedNetwork

    sys.argv = arguments
    width, depth = (32, [1, 1]) if small else (320, [1, 1, 1, 1, 1, 1, 0, 0])
    shape = {"channel_mult": [1], "num_res_blocks": [2], "transformer_depth_output": [1] * 3} if small else {
        "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2] * 4, "transformer_depth_output": [1] * 9 + [0] * 3}  # fmt: skip
    tokens = pipe.model.unet.config.cross_attention_dim
    with pipe.device:
        network = UNetModel(
            image_size=32, in_channels=4, out_channels=4, model_channels=width, transformer_depth=depth, transformer_depth_middle=1,
            num_heads=-1, num_head_channels=32 if small else 64, use_spatial_transformer=True, context_dim=tokens,
            use_linear_in_transformer=True, legacy=False, dtype=pipe.dtype, **shape,
        ).eval().requires_grad_(False)  # fmt: skip
    put = {"device": pipe.device, "dtype": pipe.dtype}
    x, t, c = (
        torch.randn(1, 4, size // 8, size // 8, **put),
        torch.full((1,), 299.0, device=pipe.device),
        torch.randn(1, 77, tokens, **put),
    )
    sigma, items = torch.ones(1), [(object(), 0)]

    def ours(acceleration: str) -> Callable[[], torch.Tensor]:
        refused: list[str] = []
        fused, options = FusedNetwork(network, acceleration, tell=refused.append), dict[str, Any]()
        if refused:
            raise RuntimeError(f"{acceleration}: {refused[0]}")
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "benchmark", fused, options)

        def call() -> torch.Tensor:
            with fused.bound(sigma, items):
                return network(x, t, context=c, transformer_options=options)

        return call

    bound = pipe.model.bind(sigma, make_cond(pipe, size))
    runs: dict[str, Callable[[], Any]] = {
        "host's UNet as it is": lambda: network(x, t, context=c, transformer_options={}), "host's UNet, fused": ours("none"),
        "diffusers as it is": lambda: pipe.model.unet(x, t, c, return_dict=False)[0], "diffusers, fused": lambda: bound(x.float()),
    }  # fmt: skip
    if pipe.device.type == "cuda":
        runs["host's UNet, graph"] = ours("graph")
    runs["host's UNet, compile"] = ours("compile")
    with torch.inference_mode():
        return [f"{name:22} {_rate(call, pipe.device, seconds):7.1f} rows/s" for name, call in runs.items()]


def unet_rows(pipe: Pipeline, size: int, seconds: float, counts: list[int]) -> Iterator[str]:
    """Yield rows a second of the UNet alone, compiled and recorded, for each number of rows in a call, and where the time goes."""
    cond, side = make_cond(pipe, size), size // pipe.downscale
    for rows in counts:
        torch.compiler.reset()
        model = replayed(pipe.model, rows, side, side, cond, compiled=True)
        bound = model.bind(torch.linspace(1, 8, rows), cond.expand(rows))
        x = torch.randn(rows, 4, side, side, device=pipe.device)
        with torch.inference_mode():
            call = functools.partial(bound, x)
            rate, kinds = _rate(call, pipe.device, seconds), kernel_times(call) if pipe.device.type == "cuda" else ""
        yield f"UNet alone, compile, {rows} rows a call: {rate * rows:7.1f} rows/s, {1000 / rate:6.2f} ms a call: {kinds}"


# What the names of kernels have in them; the first that fits counts.
KINDS = {
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "normalisation": ("triton_red", "triton_per"),
    "pointwise": ("triton", "elementwise"),
    "convolution": ("fprop", "conv", "implicit"),
    "matrix product": ("gemm", "nvjet", "cutlass", "splitk"),
}


def kernel_times(call: Callable[[], Any], count: int = 3) -> str:
    """Return the milliseconds of a call on the device by kind of kernel, with how many there are."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    spent, number = Counter[str](), Counter[str]()
    for event in seen.key_averages():
        if event.self_device_time_total:
            name = event.key.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
            spent[kind] += event.self_device_time_total / 1000 / count
            number[kind] += event.count / count
    return ", ".join(f"{kind} {ms:.2f} ({number[kind]:.0f} kernels)" for kind, ms in spent.most_common())


def _rate(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    for _ in range(5):
        call()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or count < 2:
        call()
        count += 1
    wait()
    return count / (time.perf_counter() - begun)


def warm_start(pipe: Pipeline, size: int) -> str:
    """Compile a shape that was compiled before, as a new process would: from what is kept."""
    torch.compiler.reset()
    return f"warm start: compiled again from {kept_folder()} in {Runner(pipe, size, Setting('sd', 'compile', 1)).ready:.1f} s"


def ratios(rows: dict[Setting, Row], packages: dict[int, float]) -> list[str]:
    """Return the claims of Stream Batch, RCFG and speed as measured, and the goals."""
    lines = []
    for setting, row in rows.items():
        batch, full = rows.get(replace(setting, sequential=False)), rows.get(replace(setting, guidance="full"))
        if setting.sequential and batch:
            lines.append(f"{setting.label}: Stream Batch is {batch.fps / row.fps:.2f}x sequential")
        if setting.guidance == "self" and full and not setting.sequential:
            lines.append(f"{setting.label}: self-RCFG is {row.best / full.best:.2f}x full CFG (goal 1.9x at N = 4)")
        if (
            setting.acceleration == "none"
            and setting.model == "sd"
            and not setting.sequential
            and setting.steps in packages
        ):
            theirs = packages[setting.steps]
            lines.append(
                f"{setting.label}: {row.best / theirs:.2f}x the published package at {theirs:.1f} fps (goal 1.3x)"
            )
    for what, setting, goal in GOALS:
        found = rows.get(setting)
        lines.append(f"goal {what}: {goal:.0f} fps, " + (f"measured {found.best:.0f}" if found else "not measured"))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no further setting after so many (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default %(default)s)")
    parser.add_argument("--host", type=pathlib.Path, help="a checkout of ComfyUI, for its own UNet")
    parser.add_argument("--only", default="", help="a part of the names of the settings to run")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[], help="at the end the UNet alone, with so many rows a call"
    )
    parser.add_argument("--check", action="store_true", help="tiny networks on the CPU; nothing is compiled for true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--profile", type=pathlib.Path)
    args = parser.parse_args()
    if args.check:
        global WARM_UP, FEW
        WARM_UP, FEW = 1, 2
        args.device, args.seconds = "cpu", 0.02
        torch.compile = lambda function, **_: function  # type: ignore[assignment]
    return run(args, torch.device(args.device))


def run(args: argparse.Namespace, device: torch.device) -> int:
    torch.backends.cudnn.benchmark = True
    begun, peak = time.perf_counter(), matmul_peak(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    say(f"{name}, torch {torch.__version__}, fp16 matrix product {peak:.0f} TFLOP/s")
    pipes: dict[str, tuple[Pipeline, int]] = {}
    rows: dict[Setting, Row] = {}
    packages: dict[int, float] = {}
    chosen = [setting for setting in SETTINGS if args.only in setting.name]
    for i, setting in enumerate(chosen):
        if time.perf_counter() - begun > 60 * args.minutes:
            say(f"left out after {args.minutes:g} minutes: {', '.join(s.name for s in chosen[i:])}")
            break
        if setting.model not in pipes:
            pipes[setting.model] = make_pipe(setting.model, device, args.check)
        pipe, size = pipes[setting.model]
        if args.profile:
            profile_frames(Runner(pipe, size, setting), args.profile)
            return 0
        rows[setting] = measure(pipe, size, setting, args.seconds, peak)
        say(rows[setting].text())
        if setting.acceleration == "none" and setting.model == "sd" and not setting.sequential:
            packages |= beside(pipe, size, setting.steps, args)
        if setting == SETTINGS[2]:
            say(warm_start(pipe, size))
            for line in host_rows(args.host, pipe, size, args.check, args.seconds) if args.host else ():
                say(line)
    for line in unet_rows(*pipes["sd"], args.seconds, args.rows) if args.rows and "sd" in pipes else ():
        say(line)
    if not packages:
        say(
            "PUBLISHED PACKAGE: NOT MEASURED, so nothing here is beside it. pip install --no-deps streamdiffusion==0.1.1"
        )
    say("\n".join(ratios(rows, packages)))
    if args.json:
        found = {"device": name, "peak": peak, "published": packages, "rows": [asdict(row) for row in rows.values()]}
        args.json.write_text(json.dumps(found, indent=1))
    failed = [row for row in rows.values() if row.steady.startswith("FAIL")]
    say(f"steady: {len(failed)} of {len(rows)} settings fail" if device.type == "cuda" else "steady: needs a GPU")
    say(f"{time.perf_counter() - begun:.0f} s in all")
    return 1 if failed else 0


def beside(pipe: Pipeline, size: int, steps: int, args: argparse.Namespace) -> dict[int, float]:
    """Measure the published package; one that fails does not end a run on a GPU, which is dear, but that of --check."""
    try:
        theirs = published(pipe, size, steps, args.seconds)
    except Exception as error:
        if args.check:
            raise
        say(f"PUBLISHED PACKAGE: FAILED at N = {steps}: {type(error).__name__}: {error}")
        return {}
    if theirs is not None:
        say(f"published package, eager, N={steps} self: {theirs:.1f} fps")
    return {} if theirs is None else {steps: theirs}


def say(text: str) -> None:
    print(text, flush=True)


def profile_frames(run: Runner, path: pathlib.Path) -> None:
    """Write a trace of some steady frames and print where the time goes."""
    from torch.profiler import ProfilerActivity, profile

    for i in range(12):
        run(i)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.pipe.device.type == "cuda" else [])
    with profile(activities=kinds) as recorded_run:
        for i in range(5):
            run(i)
    recorded_run.export_chrome_trace(str(path))
    key = "cuda_time_total" if run.pipe.device.type == "cuda" else "cpu_time_total"
    print(recorded_run.key_averages().table(sort_by=key, row_limit=25))


if __name__ == "__main__":
    sys.exit(main())
