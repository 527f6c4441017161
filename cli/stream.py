"""`slipstream stream`: a video, a folder of images or a webcam through a Stream Batch."""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.device import default_device
from ..core.graphs import ACCELERATIONS, accelerated
from ..core.images import cover, pad_to_multiple
from ..core.unused import Unused
from ..stream.batch import StreamFrame
from ..stream.config import GUIDANCE, RENOISE, StreamConfig
from ..stream.guidance import BLENDS
from ..stream.lanes import Width, room_for, width_of
from ..stream.prompts import PromptBlend, blended
from ..stream.queues import StreamThreads
from ..stream.similarity import SimilarityFilter
from ..stream.sinks import POSSIBLE, FrameSink, check_sink, open_sink
from ..stream.video import FrameSource, Stamp, is_webcam, open_source
from .options import (
    add_cfg,
    add_model,
    add_prompt,
    add_seed,
    add_size,
    add_steps,
    integer,
    load_pipeline,
    number,
    size_of,
)
from .progress import Progress

log = logging.getLogger(__name__)


def _one_step(v: Any) -> bool:
    return len(v.t_index.split(",")) == 1 if v.t_index else bool(v.steps == 1)


def _unguided(v: Any) -> bool:
    return bool(v.guidance == "none" or v.cfg_scale == 1)


# Of the options that `slipstream live` has too.
SHARED_UNUSED = (
    Unused("cfg_scale", lambda v: v.guidance == "none" and v.cfg_scale != 1, "with --guidance none. Choose another guidance."),
    Unused("guidance", lambda v: v.guidance != "none" and v.cfg_scale == 1, "at --cfg 1. Raise it, or choose none."),
    Unused("delta", _unguided, "without guidance. Choose self or onetime, and a --cfg above 1."),
    Unused("delta", lambda v: v.guidance == "full" and v.cfg_scale != 1, "with --guidance full. Choose self or onetime."),
    Unused("negative", lambda v: _unguided(v) or v.guidance == "self", "without onetime or full guidance. Choose one of them."),
    Unused("strength steps", lambda v: bool(v.t_index), "with --t-index, which lists the steps. Leave it out to use them."),
    Unused("renoise cross_frame", _one_step, "with one step. Use two or more."),
    Unused(
        "acceleration", lambda v: v.acceleration == "graph" and not (v.device or default_device()).startswith("cuda"),
        "as graph without CUDA. Leave it out, or choose compile.",
    ),
    Unused(
        "priority", lambda v: v.priority.isdigit() and acceleration_of(v) == "none",
        "as a number of lanes without recordings. Add --acceleration graph or compile.",
    ),
)  # fmt: skip
UNUSED = (
    *SHARED_UNUSED,
    Unused("fps", lambda v: not pathlib.Path(v.input).expanduser().is_dir(), "on a video or a webcam, whose times are kept."),
    Unused("drop", lambda v: is_webcam(v.input), "on a webcam, which always drops what is not taken in time."),
    Unused("blend", lambda v: len(v.prompt or ()) < 2, "on one prompt. Give --prompt again."),
    Unused("blocks", lambda v: v.similarity >= 1, "at --similarity 1, which skips nothing. Lower it."),
    Unused("feedback motion cross_frame frame_group", lambda v: v.max_frames == 1, "on one frame. Raise --max-frames."),
    Unused("graph", lambda v: not (v.device or default_device()).startswith("cuda"), "without CUDA. Leave it out."),
    Unused("graph", lambda v: v.acceleration != "none", "beside --acceleration, which says it. Leave it out."),
    Unused(
        "priority", lambda v: v.priority == "throughput" and v.frame_group > 1, "beside --frame-group, which says it. Leave it out.",
    ),
    Unused("priority", lambda v: v.max_frames == 1, "on one frame. Raise --max-frames."),
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Declare `stream`."""
    parser = subparsers.add_parser("stream", help="repaint a video, a folder of images or a webcam (StreamDiffusion)")
    parser.add_argument("--input", required=True, help='video file, folder of images, or "webcam" ("webcam:1" ...)')
    parser.add_argument("--out", "--output", required=True, help=POSSIBLE.replace("%", "%%"))
    add_prompt(
        parser, 'prompt; several are blended, each with its weight: "a red circle:0.7", or "a red circle:0..1" to move over the '
        "clip", action="append", metavar="TEXT[:WEIGHT]",
    )  # fmt: skip
    parser.add_argument("--blend", choices=BLENDS, default="linear", help="how; slerp is for two")
    add_size(parser, "size of the result (default: that of the input); sides of the input are cropped to fit")
    parser.add_argument("--fps", type=number(), default=25.0, help="of a folder of images")
    parser.add_argument("--max-frames", type=integer(0), default=0, help="stop after so many frames (default: all)")
    parser.add_argument(
        "--drop", action="store_true", help="treat a file like a camera: drop what is not taken in time"
    )
    add_method(parser.add_argument_group("method"))
    add_model(parser, "pocket-lcm")
    parser.arguments = {"weights": "--prompt", "threshold": "--similarity", "t_index_list": "--t-index"}
    parser.unused = UNUSED
    parser.set_defaults(run=run_stream)


def add_method(group: Any, live: bool = False) -> None:
    """Declare what `config_of` reads; frames of a `live` stream travel together only as its `priority` says."""
    default = StreamConfig()
    group.add_argument("--strength", type=number(), default=0.5, help="how much is repainted")
    add_steps(group, default.steps)
    group.add_argument("--t-index", help='instead of both: indices of the LCM grid, "32,45"')
    group.add_argument("--guidance", choices=GUIDANCE, default=default.guidance, help="kind of the guidance")
    add_cfg(group, default.cfg_scale)
    group.add_argument("--delta", type=number(), default=default.delta, help="trust in the residual, 0 to 1")
    group.add_argument(
        "--renoise", choices=RENOISE, default=default.renoise,
        help="noise between steps: the same for all frames, new each time, none, or what the frame holds already",
    )  # fmt: skip
    add_seed(group, default=default.seed)
    group.add_argument("--consistency", action="store_true", help="boundary scalings of LCM models")
    group.add_argument("--feedback", type=number(), default=0.0, help="share of the last result in a new frame")
    group.add_argument("--motion", type=number(), default=0.0, help="repaint fast frames less, 0 to 1")
    group.add_argument("--cross-frame", action="store_true", help="frames in flight attend to each other")
    group.add_argument(
        "--similarity", type=number(), default=1.0, help="skip frames alike beyond this, 0.98 for example"
    )
    group.add_argument(
        "--acceleration",
        choices=ACCELERATIONS,
        default="none",
        help="graph: record the networks as CUDA graphs; compile: compile them before (a minute at the first start, kept for the next)",
    )
    group.add_argument(
        "--priority", default="latency", metavar="latency|throughput|LANES",
        help="latency: each frame as soon as it is there, at one step in up to four recordings side by side on a large GPU; throughput: "
        "frames share a network call, up to four, for a delay of up to three; a number: so many calls side by side, which takes the "
        "memory of as many passes",
    )  # fmt: skip
    if live:
        return
    group.add_argument("--frame-group", type=integer(), default=default.frame_group, help="frames that travel together")
    group.add_argument("--blocks", type=integer(1), default=8, help="compare in so many parts across")
    group.add_argument("--graph", action="store_true", help="the same as --acceleration graph")


def config_of(args: argparse.Namespace) -> StreamConfig:
    """Return the config that the options ask for."""
    try:
        indices = [int(part) for part in args.t_index.split(",")] if args.t_index else None
    except ValueError:
        raise ValueError(
            f"Expected --t-index as numbers with commas, but got {args.t_index!r}. Example: 32,45."
        ) from None
    fast = acceleration_of(args) != "none"
    if fast and args.cross_frame:
        raise ValueError(
            "Expected --acceleration (or --graph) or --cross-frame, but got both. A recorded network cannot be changed: leave one out."
        )
    config = StreamConfig(
        t_index_list=indices, strength=None if indices else args.strength, steps=args.steps, guidance=args.guidance,
        cfg_scale=args.cfg_scale, delta=args.delta, renoise=args.renoise, seed=args.seed, frame_group=args.frame_group,
        consistency=args.consistency, feedback=args.feedback, motion=args.motion, cross_frame=args.cross_frame,
        static_rows=fast,
    )  # fmt: skip
    return config.changed(frame_group=max(args.frame_group, width_of(args.priority, config).group))


def acceleration_of(args: argparse.Namespace) -> str:
    """Return the acceleration that the options ask for."""
    return "graph" if args.graph and args.acceleration == "none" else str(args.acceleration)


def lanes_of(args: argparse.Namespace, config: StreamConfig, device: torch.device) -> Width:
    """Return how many lanes a stream has; a sentence where it is fewer than asked for."""
    width = width_of(args.priority, config, room_for(device, acceleration_of(args)))
    if width.reason:
        log.warning("--priority %s has no effect: %s.", args.priority, width.reason)
    return width


def run_stream(args: argparse.Namespace) -> int:
    """Run the command; frames that are finished are in the output whatever happens."""
    torch.backends.cudnn.benchmark = True  # all frames have one size
    config = config_of(args)
    texts, prompts = prompts_of(args.prompt or [""], args.blend)
    chooser = SimilarityFilter(args.similarity, blocks=args.blocks) if args.similarity < 1 else None
    check_sink(args.out, args.input)
    source = open_source(args.input, args.fps)
    total = min((n for n in (source.count, args.max_frames) if n > 0), default=0)
    if prompts.moves and (not total or source.live or args.drop):
        raise ValueError(
            "Expected --prompt weights that stay for an input that drops frames or has no known length, but got some that "
            "move. Give one number each, or the length with --max-frames."
        )
    sink = open_sink(args.out, source, live=source.live)
    frames, (height, width) = fitted(source, args)
    sink.check(height, width)
    pipe = load_pipeline(args)
    padded = ((pad_to_multiple(image, pipe.downscale), stamp) for image, stamp in frames)
    size = math.ceil(height / pipe.downscale) * pipe.downscale, math.ceil(width / pipe.downscale) * pipe.downscale
    at_work, cond = lanes_of(args, config, pipe.device), pipe.encode_text([""], size)
    pipe, models = accelerated(pipe, acceleration_of(args), config.rows, *size, cond, config.frame_group, at_work.lanes)
    encoded = pipe.encode_text([*texts, args.negative], size)
    *conds, uncond = (encoded.take([i]) for i in range(encoded.rows))
    batch = blended(models, conds, prompts, total, uncond, config, at_work.no_delay)
    try:
        with sink, Progress("frame") as progress:

            def publish(image: Tensor, stamp: Stamp, frame: StreamFrame) -> None:
                sink.write(image[:height, :width], stamp)
                progress.show(sink.written, total, pace(threads))

            threads = StreamThreads(
                padded, pipe.encode_image, batch, functools.partial(pipe.decode_async, dtype=torch.uint8), publish,
                chooser, live=source.live or args.drop, device=pipe.device,
            )  # fmt: skip
            cancelled = run_to_end(threads)
            log.info("%s", threads.statistics.text())
            if cancelled and not source.live:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept_in(sink)) from None
    print_place(sink)
    if source.problem:
        log.warning("%s: %s. What could be read is in %s.", args.input, source.problem, args.out)
    return 0


def kept_in(sink: FrameSink | None) -> str:
    """Return what a command that was cancelled says of its output."""
    return f"{sink.written} frames are in {sink.place}" if sink and sink.written and sink.place else ""


def print_place(sink: FrameSink | None) -> None:
    """Print where the frames are, as every command does of what it has written."""
    if sink and sink.written and sink.place:
        print(sink.place)


def pace(threads: StreamThreads) -> str:
    """Return frames per second and latency so far."""
    summary = threads.statistics.summary()
    return f"{summary['fps_out']:.1f} fps, latency {summary['latency_p50_ms']:.0f} ms"


def run_to_end(threads: StreamThreads) -> bool:
    """Wait for a stream; Ctrl-C ends it after the running pass and keeps what is finished. Returns whether that was so."""
    threads.start()
    try:
        threads.wait()
    except KeyboardInterrupt:
        threads.stop()
        threads.wait()
        return True
    return False


NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)"


def prompts_of(options: list[str], mode: str) -> tuple[list[str], PromptBlend]:
    """Return texts and weights of the --prompt options; a single one is taken as it stands, colons and all."""
    if len(options) == 1:
        return options, PromptBlend([1.0])
    texts, start, end = [], [], []
    for option in options:
        text, colon, weight = option.rpartition(":")
        found = re.fullmatch(rf"\s*({NUMBER})(?:\.\.({NUMBER}))?\s*", weight) if colon else None
        if colon and not found and re.fullmatch(r"[\s\d.,;%+-]*", weight):
            raise ValueError(
                f'Expected --prompt "TEXT:WEIGHT" or "TEXT:FROM..TO" with weights as numbers, but got {option!r}. '
                'Example: "a red circle:0.7".'
            )
        texts.append(text if found else option)
        first, last = (found[1], found[2]) if found else ("1", None)
        start.append(float(first))
        end.append(float(first if last is None else last))
    return texts, PromptBlend(start, end, mode)


def fitted(source: FrameSource, args: argparse.Namespace) -> tuple[Iterator[tuple[Tensor, Stamp]], tuple[int, int]]:
    """Return --max-frames frames of one size and that size (height, width), by default the first frame's."""
    frames = iter(source)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"Expected a frame in the input, but got none ({source.problem or 'it is empty'}).")
    height, width = size_of(args, (first[0].shape[0], first[0].shape[1]))
    chosen = itertools.islice(itertools.chain([first], frames), args.max_frames or None)
    return ((cover(image, height, width), stamp) for image, stamp in chosen), (height, width)
