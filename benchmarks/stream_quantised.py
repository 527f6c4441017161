"""Would int8 or fp8 linear layers pass the gate, SSIM of 0.96 against full precision? Simulated on the CPU, where nothing gets faster.

    python benchmarks/stream_quantised.py [--frames 24] [--json FILE]

The bundled clip goes through the bundled student (pocket-lcm) with every linear layer as it is, and with its weights, or weights and
inputs, rounded: weights by output channel, inputs by token (int8) or by tensor (fp8, e4m3), as kernels for these formats take them.
Convolutions, attention and the VAE stay as they are. SSIM is that of `whole.py`, windows of 7 x 7, of each frame.
"""

from __future__ import annotations

import argparse
import json
import pathlib
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
    "fp8 weights": (rows_fp8, same), "fp8 weights and inputs": (rows_fp8, fp8),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
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
