"""Would int8 or fp8 linear layers pass the gate, SSIM of 0.96 against full precision? Simulated on the CPU, where nothing gets faster.

    python benchmarks/stream_quantised.py [--frames 24] [--json FILE]
    python benchmarks/stream_quantised.py --speed         # on a GPU: how long the products of a pass take in each format
    python benchmarks/stream_quantised.py --speed --check    # does every path run? on the CPU, a few rows

The bundled clip goes through the bundled student (pocket-lcm) with every linear layer as it is, and with its weights, or weights and
inputs, rounded: weights by output channel, inputs by token or (fp8, e4m3) by tensor, as kernels for these formats take them.
Convolutions, attention and the VAE stay as they are. SSIM is that of `whole.py`, windows of 7 x 7, of each frame.

`--speed` times the matrix products of a pass of SD-Turbo's and SDXL-Turbo's UNet, by the kernels that torch has: fp16, int8
(`torch._int_mm`) and fp8 with a scale for each row (`torch._scaled_mm`). Rounding the inputs and scaling the int8 result come on top.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import ROOT  # noqa: F401  makes `slipstream` importable from a checkout
from slipstream.core import load
from slipstream.core.pipeline import Pipeline
from slipstream.stream import StreamBatch, StreamConfig
from slipstream.stream.clip import ball_clip
from torch import Tensor
from torch.overrides import TorchFunctionMode
from whole import ssim

GATE = 0.96
PROMPT = "a large red circle on a blue background"
Round = Callable[[Tensor], Tensor]


def int8(x: Tensor) -> Tensor:
    """Round to 8 bits, with a scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


def fp8(x: Tensor, dim: int | None = None) -> Tensor:
    """Round to float8 e4m3, whose largest value is 448, with a scale for each row (`dim` -1) or one for all."""
    most = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = most.clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def rows_fp8(x: Tensor) -> Tensor:
    return fp8(x, -1)


def same(x: Tensor) -> Tensor:
    return x


# name -> how weights and inputs of linear layers are rounded
FORMATS: dict[str, tuple[Round, Round]] = {
    "int8 weights": (int8, same), "int8 weights and inputs": (int8, int8),
    "fp8 weights": (rows_fp8, same), "fp8 weights and inputs": (rows_fp8, fp8), "fp8, inputs by token too": (rows_fp8, rows_fp8),
}  # fmt: skip


class Rounded(TorchFunctionMode):
    """Within it every linear layer has rounded weights and inputs."""

    def __init__(self, weights: Round, inputs: Round) -> None:
        super().__init__()
        self.weights, self.inputs, self.calls = weights, inputs, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        x, weight, *bias = args
        return func(self.inputs(x), self.weights(weight), *bias, **(kwargs or {}))


def run(
    pipe: Pipeline, frames: Tensor, settings: dict[str, Any], format: tuple[Round, Round] = (same, same)
) -> tuple[Tensor, int]:
    cond = pipe.encode_text([PROMPT])
    latents = pipe.encode_image(frames)
    with Rounded(*format) as rounded:
        pipe.model.refresh()
        stream = StreamBatch(pipe.model, cond, None, StreamConfig(**settings))
        finished = [f for frame in latents.split(1) for f in stream.push(frame)] + stream.drain()
    return pipe.decode(torch.cat([f.latents for f in finished])), rounded.calls


class Shapes(TorchFunctionMode):
    """Within it the shapes of linear layers are counted: (rows, inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[tuple[int, int, int]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight = args[:2]
            self.found[x.numel() // x.shape[-1], weight.shape[1], weight.shape[0]] += 1
        return func(*args, **(kwargs or {}))


def linear_shapes(name: str, rows: int) -> Counter[tuple[int, int, int]]:
    """Return how often each product occurs in a pass of a UNet, what depends on prompt and level left out."""
    from diffusers import UNet2DConditionModel
    from slipstream.core.fused import fused_unet
    from stream_gpu import SD, SDXL

    config = SDXL if name == "sdxl" else SD
    with torch.device("meta"):
        fused = fused_unet(UNet2DConditionModel(**config).eval().requires_grad_(False))
        assert fused is not None
        sample = torch.empty(rows, 4, 64, 64)
        times = torch.empty(rows, sum(fused.widths), 1, 1)
        texts = torch.empty(rows, 2 * 77 * sum(fused.sizes))
        with Shapes() as shapes:
            fused(sample, times, texts)
    return shapes.found


def products(m: int, k: int, n: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Return a product (m, k) x (k, n) in each format."""
    x, weight = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    x16, w16, x8, w8 = (
        *(t.to(torch.float16) for t in (x, weight)),
        *(t.to(torch.float8_e4m3fn) for t in (x, weight)),
    )
    xi, wi = ((20 * t).clamp(-127, 127).to(torch.int8) for t in (x, weight))
    ones = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
    scaled = functools.partial(torch._scaled_mm, x8, w8.t(), *ones, out_dtype=torch.bfloat16, use_fast_accum=True)
    return {"fp16": lambda: F.linear(x16, w16), "int8": lambda: torch._int_mm(xi, wi.t()), "fp8": scaled}


def microseconds(call: Callable[[], Tensor], device: torch.device, count: int) -> float:
    """Return the median time of a call on the device; on the CPU, where only the path is tried, 0."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return 0.0
    graph = torch.cuda.CUDAGraph()  # without the time that the CPU takes to begin a kernel
    with torch.cuda.graph(graph):
        for _ in range(20):
            call()
    times = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / 20)
    return statistics.median(times)


def speed(check: bool) -> None:
    """Print how long the products of a pass take together in each format, and those that take longest in fp16."""
    device = torch.device("cpu" if check else "cuda")
    for name, rows in (("sd", 4), ("sdxl", 4)):
        total, parts = Counter[str](), []
        for (m, k, n), count in linear_shapes(name, rows).items():
            made = products(32 if check else m, k, n, device)
            each = {format: microseconds(call, device, 20) for format, call in made.items()}
            total.update({format: count * us for format, us in each.items()})
            parts.append((count * each["fp16"], f"{count} of {m} x {k} x {n}: " + _listed(each, "us")))
        print(f"{name}, {rows} rows a call, all products: " + _listed({f: us / 1000 for f, us in total.items()}, "ms"))
        for _, text in sorted(parts, reverse=True)[:6]:
            print(f"  {text}", flush=True)


def _listed(values: dict[str, float], unit: str) -> str:
    return ", ".join(f"{name} {value:.2f} {unit}" for name, value in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--speed", action="store_true", help="the products of a pass, timed on a GPU")
    parser.add_argument("--check", action="store_true", help="with --speed: every path on the CPU, nothing timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.speed:
        return speed(args.check)
    pipe, (frames, _) = load("pocket-lcm", device="cpu"), ball_clip(args.frames)
    found = []
    print("| steps, strength | linear layers | SSIM, mean | least | gate |\n| --- | --- | --- | --- | --- |")
    for steps, strength in ((1, 0.5), (2, 0.7), (4, 0.9)):
        settings = {"steps": steps, "strength": strength, "guidance": "none"}
        plain, _ = run(pipe, frames, settings)
        for name, format in FORMATS.items():
            images, calls = run(pipe, frames, settings, format)
            assert calls, "no linear layer was rounded"
            values = [ssim(a[None], b[None]) for a, b in zip(plain, images)]
            mean, least = sum(values) / len(values), min(values)
            print(
                f"| {steps}, {strength} | {name} | {mean:.4f} | {least:.4f} | {'holds' if least >= GATE else 'fails'} |",
                flush=True,
            )
            found.append({"steps": steps, "strength": strength, "format": name, "mean": mean, "least": least})
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
