"""Research: reuse between frames on the bundled student, what `stream.resting` leaves out and what that costs in the image.

    python benchmarks/cells_at_rest.py [--frames 100] [--only unseen] [--share 0.38] [--cells] [--strength 0.75] [--steps 1]

Clips of one object that moves over an image at rest, at most a tenth of the image moving from frame to frame. "seen" clips were looked at
while the method was made, and frames of some of them are its examples; "unseen" ones were not. Odd ones have camera grain. All use the
pocket-lcm student without guidance.

Printed are the share of 8 x 8 cells that moved; of the operations of dense passes, deciding and the first pass included; and differences
from the dense images, of 255: the mean over all frames, over the last tenth, the largest of a frame; "kept", what showing the first result
for all frames gives, and "every third", what computing each third frame and showing it three times gives, which takes a third of the
operations. Then the time of a pass; at the end a frame without any change, and the memory. Goal: at most 40 % of the operations, at most 1
of 255.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import slipstream
import torch
import torch.nn.functional as F
from _common import ROOT  # noqa: F401
from slipstream.stream import StreamBatch, StreamConfig
from slipstream.stream.clip import ball_clip
from slipstream.stream.resting import resting
from torch import Tensor

PROMPT = "a large yellow circle on a green background"
SEEN, UNSEEN = range(6), range(200, 212)


def background(number: int, generator: torch.Generator) -> Tensor:
    """Return an image at rest (128, 128, 3): a frame of the bundled clip, or soft colours with some texture."""
    if number % 4 < 2:
        return ball_clip(31)[0][30 * (number % 4)]
    soft, texture = (
        F.interpolate(torch.rand(1, 3, cells, cells, generator=generator), size=128, mode="bilinear")[0].permute(
            1, 2, 0
        )
        for cells in (5, 20)
    )
    return 0.8 * soft + 0.2 * texture


def square(frames: int) -> Tensor:
    """Return a large square that slides through a frame of the bundled clip (F, 128, 128, 3)."""
    clip = ball_clip(1)[0].repeat(frames, 1, 1, 1)
    for i in range(frames):
        left = 4 + 10 * i % 80
        clip[i, 72:112, left : left + 40] = torch.tensor([0.9, 0.8, 0.1])
    return clip


def object_clip(number: int, frames: int) -> Tensor:
    """Return a disc or a square (F, 128, 128, 3) of a size, colour, speed and way that `number` draws; it bounces off the sides."""
    generator = torch.Generator().manual_seed(1000 + number)
    image = background(number, generator)
    size, speed, angle, disc = (float(x) for x in torch.rand(4, generator=generator))
    size, speed, angle = 16 + 24 * size, 1 + 5 * speed, 2 * math.pi * angle
    colour, (x, y) = torch.rand(3, generator=generator), (30 + 68 * torch.rand(2, generator=generator)).tolist()
    dx, dy, axis, clip = speed * math.cos(angle), speed * math.sin(angle), torch.arange(128.0), []
    for _ in range(frames):
        across, down = (axis[None] - x).abs().expand(128, 128), (axis[:, None] - y).abs().expand(128, 128)
        distance = torch.hypot(across, down) if disc > 0.5 else torch.maximum(across, down)
        clip.append(torch.lerp(image, colour.expand_as(image), (size / 2 - distance + 0.5).clamp(0, 1)[..., None]))
        x, y = x + dx, y + dy
        dx = -dx if not size / 2 < x + dx < 128 - size / 2 else dx
        dy = -dy if not size / 2 < y + dy < 128 - size / 2 else dy
    grain = 0.008 * torch.randn((frames, 128, 128, 3), generator=generator) * (number % 2)
    return (torch.stack(clip) + grain).clamp(0, 1)


def clips(frames: int, only: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the clips, of those that are drawn the ones with at most a tenth moving."""
    if only != "unseen":
        yield "square", square(frames)
        yield "square down", square(frames).transpose(1, 2).flip(-1)
    if only != "seen":
        yield "unseen square", square(frames).flip(2).roll(1, -1)  # to the left, in other colours
    numbers = {"seen": SEEN, "unseen": UNSEEN, "all": [*SEEN, *UNSEEN]}[only]
    for number in numbers:
        clip = object_clip(number, frames)
        if moved(clip) <= 0.1:
            yield f"{'un' if number in UNSEEN else ''}seen {number}", clip


def moved(clip: Tensor, threshold: float = 0.06) -> float:
    """Return the share of 8 x 8 cells that moved, mean over the frames; the threshold is above the grain."""
    cells = F.max_pool2d((clip[1:] - clip[:-1]).abs().amax(-1), 8)
    return float((cells > threshold).float().mean())


def examples() -> Tensor:
    """Return the frames that tell the method what matters: of the bundled clip, and of seen clips."""
    return torch.cat([ball_clip(48)[0][::12], square(9)[::3], *(object_clip(i, 4)[::3] for i in (1, 2, 3))])


def stream_through(model: Any, cond: Any, config: StreamConfig, latents: Tensor) -> tuple[Tensor, float]:
    """Return denoised latents, and the median seconds of a pass."""
    stream, found, times = StreamBatch(model, cond, None, config), [], []
    for row in latents.split(1):
        start = time.perf_counter()
        found += stream.push(row)
        times.append(time.perf_counter() - start)
    found += stream.drain()
    return torch.cat([frame.latents for frame in found]), statistics.median(times)


def at_rest(model: Any, cond: Any, config: StreamConfig, latents: Tensor) -> str:
    """Return a line on a frame in which nothing changes, and on the memory that is kept."""
    network, stream = model.network, StreamBatch(model, cond, None, config)
    network.restart()
    for _ in range(config.steps):
        stream.push(latents)
    network.operations = type(network.operations)()
    stream.push(latents)
    kept, weights = (sum(x.nbytes for x in found) / 2**20 for found in (network._kept, network._weights))
    return f"at rest: operations {network.operations.share:.1%}; kept inputs {kept:.1f} MB, weights {weights:.1f} MB"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--only", choices=("all", "seen", "unseen"), default="all")
    parser.add_argument("--share", type=float, default=0.38)
    parser.add_argument("--cells", action="store_true", help="decide by cells, all channels at once")
    parser.add_argument("--strength", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    pipe = slipstream.load("pocket-lcm", device="cpu")
    cond, config = pipe.encode_text([PROMPT]), StreamConfig(strength=args.strength, steps=args.steps, guidance="none")
    model: Any = resting(pipe.model, cond, pipe.encode_image(examples()), config, args.share, args.cells)
    for name, clip in clips(args.frames, args.only):
        latents = torch.cat([pipe.encode_image(part) for part in clip.split(10)])
        model.network.restart()
        model.network.operations = type(model.network.operations)()
        (dense, usual), (reused, taken) = (stream_through(m, cond, config, latents) for m in (pipe.model, model))
        images = [255 * torch.cat([pipe.decode(part) for part in x.split(10)]) for x in (dense, reused)]
        third = images[0][torch.arange(len(clip)) // 3 * 3]
        off, kept, held = ((image - images[0]).abs().mean((1, 2, 3)) for image in (images[1], images[0][:1], third))
        print(
            f"{name:13} moved {moved(clip):4.1%}, operations {model.network.operations.share:5.1%}, difference {off.mean():.2f}, "
            f"last tenth {off[-max(len(off) // 10, 1) :].mean():.2f}, largest {off.max():.2f}, kept {kept.mean():5.2f}, "
            f"every third {held.mean():.2f}, pass {1000 * taken:.0f} ms, dense {1000 * usual:.0f} ms", flush=True,
        )  # fmt: skip
    print(at_rest(model, cond, config, pipe.encode_image(square(1))))


if __name__ == "__main__":
    main()
