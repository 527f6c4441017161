"""What each stability option of a stream does to flicker, on a scene at rest and on a moving one.

    python benchmarks/stream_flicker.py [--frames 12] [--json FILE]

Both clips carry fresh camera grain in every frame. At rest: one frame of assets/ball.mp4; flicker is the mean absolute
difference of neighbouring results. Moving: an image panned by whole pixels, so that its motion is known exactly; the warp error
is the mean absolute difference between a result and the one before, moved by the known shift, in the part that both show.
"trail" is how much of the moving scene's earlier position is left (mean difference to the result without the option). Values
are of 255. The network is the bundled student (pocket-lcm).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import torch
from _common import ROOT
from slipstream.core import load
from slipstream.core.pipeline import Pipeline
from slipstream.stream import StreamBatch, StreamConfig
from slipstream.stream.video import VideoSource
from slipstream_tools.pocket.scenes import Item, Scene, render
from torch import Tensor

SIZE, SHIFT, GRAIN = 128, 2, 0.01
BASE = {"strength": 0.7, "steps": 2, "guidance": "none"}
OPTIONS: dict[str, dict[str, Any]] = {
    "default (fixed noise)": {},
    "fresh noise": {"renoise": "fresh"},
    "ddim": {"renoise": "ddim"},
    "feedback 0.3": {"feedback": 0.3},
    "feedback 0.6": {"feedback": 0.6},
    "motion 0.5": {"motion": 0.5},
    "motion 1.0": {"motion": 1.0},
    "cross-frame": {"cross_frame": True},
    "cross-frame, feedback 0.3": {"cross_frame": True, "feedback": 0.3},
}


def grainy(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (images + GRAIN * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def still_clip(count: int) -> Tensor:
    frame = next(iter(VideoSource(str(ROOT / "assets" / "ball.mp4"))))[0] / 255
    return grainy(frame[None].expand(count, -1, -1, -1))


def moving_clip(count: int) -> Tensor:
    """Frames (count, H, W, 3): a window that moves to the right over a wide scene by `SHIFT` pixels a frame."""
    wide = SIZE + SHIFT * count
    item = Item("circle", "red", "large", "center", 0.22, 0.5, 0.5)
    wide_image = (render([Scene("blue", (item,))], wide)[0] + 1) / 2
    top = (wide - SIZE) // 2
    return grainy(
        torch.stack(
            [wide_image[:, top : top + SIZE, SHIFT * i : SHIFT * i + SIZE].movedim(0, -1) for i in range(count)]
        )
    )


def run(pipe: Pipeline, frames: Tensor, cond: Any, uncond: Any, settings: dict[str, Any]) -> tuple[Tensor, int]:
    stream = StreamBatch(pipe.model, cond, uncond, StreamConfig(**{**BASE, **settings}))
    before = pipe.model.rows
    finished = [f for frame in pipe.encode_image(frames).split(1) for f in stream.push(frame)] + stream.drain()
    return pipe.decode(torch.cat([f.latents for f in finished])) * 255, pipe.model.rows - before


def flicker(results: Tensor) -> float:
    return float((results[1:] - results[:-1]).abs().mean())


def warp_error(results: Tensor) -> float:
    """The scene moves to the left by `SHIFT` pixels from frame to frame."""
    return float((results[1:, :, :-SHIFT] - results[:-1, :, SHIFT:]).abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load("pocket-lcm")
    cond, uncond = pipe.encode_text(["a large yellow circle on a green background"]), pipe.encode_text([""])
    still, moving = still_clip(args.frames), moving_clip(args.frames)
    print(f"input: flicker {flicker(still * 255):.2f}, warp error {warp_error(moving * 255):.2f}")
    rows: list[dict[str, Any]] = []
    plain: Tensor | None = None
    for name, settings in OPTIONS.items():
        at_rest, _ = run(pipe, still, cond, uncond, settings)
        in_motion, cost = run(pipe, moving, cond, uncond, settings)
        plain = in_motion if plain is None else plain
        trail = float((in_motion - plain).abs().mean())
        rows.append(
            {"option": name, "flicker": flicker(at_rest), "warp": warp_error(in_motion), "trail": trail, "rows": cost}
        )
        numbers = f"flicker {rows[-1]['flicker']:6.2f}  warp error {rows[-1]['warp']:6.2f}  trail {trail:6.2f}"
        print(f"{name:28} {numbers}  rows {cost}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
