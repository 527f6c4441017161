"""Research: where nothing moved, keep what the network computed for the frame before. What does a UNet make of it?

    python benchmarks/cells_at_rest.py [--frames 12]

On the bundled student (pocket-lcm, strength 0.75, no guidance, one step) and two clips over a still frame: a square that slides, and the
ball of the bundled clip. Two ways:

- "window": the network sees only a window around what moved, and the last result stays elsewhere.
- "cells": in every block of the network, cells that did not move keep their features of the frame before; those that moved, and so many
  cells around them as `margin` says, are computed from the mixture. Counted is the share of a block's operations that its computed cells
  have (attention: their queries); the mixture itself is computed densely here, as the question is the image.

Printed are the share of cells that moved, of the dense operations, and the mean difference from the dense result, of 255. "stale" keeps the
first result for all frames. Goal: at most 10 % moved, 40 % of the operations, 1 of 255.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import slipstream
import torch
import torch.nn.functional as F
from _common import ROOT  # noqa: F401
from slipstream.core.fused import FusedUnet, Prepared, _Walk, fused_unet
from slipstream.stream.clip import ball_clip
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

GRAIN = 4  # cells of latents in one of the coarsest level


def scenes(count: int) -> Iterator[tuple[str, Tensor]]:
    """Yield clips (F, 128, 128, 3) over one frame of the bundled clip: a square that slides, and the ball of the clip."""
    balls, masks = ball_clip(max(count, 2))
    square, ball = (balls[:1].expand(count, -1, -1, -1).clone() for _ in range(2))
    for i in range(count):
        left = 4 + 10 * i % 80
        square[i, 72:112, left : left + 40] = torch.tensor([0.9, 0.8, 0.1])
        ball[i] = torch.where(masks[i, ..., None] > 0.5, balls[i], ball[i])
    yield "square", square
    yield "ball", ball


def window(before: Tensor, now: Tensor, margin: int, threshold: float = 0.02) -> tuple[slice, slice, float] | None:
    """Return rows and columns of latents around what moved between two frames (128, 128, 3), and the share of cells that moved."""
    moved = (now - before).abs().amax(-1).unflatten(0, (16, 8)).unflatten(2, (16, 8)).amax((1, 3)) > threshold
    if not moved.any():
        return None
    sides = []
    for axis in (1, 0):
        found = moved.any(axis).nonzero().flatten()
        low = max(int(found[0]) - margin, 0) // GRAIN * GRAIN
        high = min(-(-(int(found[-1]) + 1 + margin) // GRAIN) * GRAIN, 16)
        sides.append(slice(low, high))
    return sides[0], sides[1], float(moved.float().mean())


def moved_cells(before: Tensor, now: Tensor, threshold: float = 0.02) -> Tensor:
    """Return which cells of the latents (16, 16) moved between two frames (128, 128, 3)."""
    return (now - before).abs().amax(-1).unflatten(0, (16, 8)).unflatten(2, (16, 8)).amax((1, 3)) > threshold


class Resting:
    """A fused UNet whose blocks keep the features of cells that did not move."""

    def __init__(self, fused: FusedUnet) -> None:
        self.fused, self.kept, self.work = fused, dict[int, Tensor](), [0.0, 0.0]

    def __call__(self, x: Tensor, times: Tensor, texts: Tensor, moved: Tensor | None) -> Tensor:
        """Return the output for `x` (1, 4, 16, 16); `moved` (16, 16) are the cells to compute, None for all."""
        parts, walk, self.at = self.fused.parts, _Walk(self.fused, times, texts, None), 0
        x = self._keep(lambda: parts.conv_in(x), moved)
        skips = [x]
        for steps in parts.inputs:
            x = self._steps(walk, steps, x, None, moved)
            skips.append(x)
        x = self._steps(walk, parts.middle, x, None, moved)
        for steps in parts.outputs:
            x = self._steps(walk, steps, torch.cat((x, skips.pop()), 1), skips[-1].shape[2:] if skips else None, moved)
        return self._keep(lambda: parts.out(x), moved)

    def _steps(self, walk: _Walk, steps: list[Any], x: Tensor, size: Any, moved: Tensor | None) -> Tensor:
        for step in steps:
            x = self._keep(lambda x=x, step=step: walk([step], x, size), moved)  # type: ignore[misc]
        return x

    def _keep(self, run: Callable[[], Tensor], moved: Tensor | None) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            new = run()
        share = 1.0
        if moved is not None:
            active = F.adaptive_max_pool2d(moved[None, None].float(), new.shape[2:])
            new, share = torch.where(active > 0, new, self.kept[self.at]), float(active.mean())
        self.work[0] += share * counter.get_total_flops()
        self.work[1] += counter.get_total_flops()
        self.kept[self.at], self.at = new, self.at + 1
        return new


def compare(pipe: slipstream.core.Pipeline, clip: Tensor, way: str, margin: int) -> dict[str, float]:
    """Denoise frames densely and by `way`, at one step; the noise of a cell is the same in all."""
    model, cond = pipe.model, pipe.encode_text(["a large yellow circle on a green background"])
    fused, sigma = fused_unet(model.unet), model.levels.t_to_sigma(torch.tensor([0.75 * 999])).float()
    assert fused is not None
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    tensors = Prepared(fused, model.network_time(sigma), **model.network_condition(cond)).tensors()
    resting = Resting(fused)

    def denoised(latents: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        x = (
            latents + sigma * noise[..., : latents.shape[2], : latents.shape[3]]
            if latents.shape[2:] == (16, 16)
            else latents
        )
        return model.prediction.denoised(run(model.prediction.network_input(x, sigma)), x, sigma)

    def dense(x: Tensor) -> Tensor:
        return fused(x, *tensors)  # type: ignore[no-any-return]

    latents = pipe.encode_image(clip)
    shown = first = denoised(latents[:1], lambda x: resting(x, *tensors[:2], None))
    resting.work, found = [0.0, 0.0], []
    for i in range(1, len(clip)):
        moved, now = moved_cells(clip[i - 1], clip[i]), latents[i : i + 1]
        if way == "cells":
            wide = F.max_pool2d(moved[None].float(), 2 * margin + 1, 1, margin)[0] > 0
            shown = denoised(now, lambda x: resting(x, *tensors[:2], wide))  # noqa: B023
        else:
            place = window(clip[i - 1], clip[i], margin)
            assert place is not None
            noisy, shown = now + sigma * noise, shown.clone()
            with FlopCounterMode(display=False) as counter:
                part = noisy[..., place[0], place[1]]
                shown[..., place[0], place[1]] = denoised_part(model, part, sigma, lambda x: fused(x, *tensors))
            resting.work[0] += counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                dense(noisy)
            resting.work[1] += counter.get_total_flops()
        images = [255 * pipe.decode(x) for x in (denoised(now, dense), shown, first)]
        found.append((float(moved.float().mean()), *(float((image - images[0]).abs().mean()) for image in images[1:])))
    means = [statistics.mean(column) for column in zip(*found)]
    return {"moved": means[0], "difference": means[1], "stale": means[2], "work": resting.work[0] / resting.work[1]}


def denoised_part(model: Any, x: Tensor, sigma: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what the network makes of a part of noisy latents."""
    return model.prediction.denoised(run(model.prediction.network_input(x, sigma)), x, sigma)  # type: ignore[no-any-return]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12)
    args = parser.parse_args()
    pipe = slipstream.load("pocket-lcm", device="cpu")
    for name, clip in scenes(args.frames):
        for way, margins in (("cells", (0, 1, 2, 3)), ("window", (2, 4))):
            for margin in margins:
                r = compare(pipe, clip, way, margin)
                print(
                    f"{name:6} {way:6} margin {margin}: moved {r['moved']:4.0%}, operations {r['work']:4.0%}, difference "
                    f"{r['difference']:5.2f}, stale {r['stale']:5.2f}", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
