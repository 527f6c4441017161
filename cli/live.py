"""`slipstream live`: the panel without ComfyUI, on the same route. `slipstream push`: frames of a file or a camera to a live stream."""

from __future__ import annotations

import argparse
import logging
import math
import urllib.parse
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..core.compiling import nobody
from ..core.denoiser import Conditioning
from ..core.diffusers_model import NetworkDenoiser
from ..core.graphs import Tell, accelerated
from ..core.images import pad_to_multiple
from ..core.pipeline import Pipeline
from ..core.unused import Unused
from ..stream.config import StreamConfig
from ..stream.lanes import room_for, width_of
from ..stream.live.client import WATCHED, Pushed, control
from ..stream.live.client import push as push_frames
from ..stream.live.osc import OscServer
from ..stream.live.server import Server
from ..stream.live.session import STREAMS, LiveStream, described
from ..stream.live.settings import LiveSettings, read_indices
from ..stream.prompts import PromptBlend, blended
from ..stream.sinks import POSSIBLE, check_sink, open_sink
from ..stream.video import is_webcam, open_source
from .options import add_model, add_prompt, checked, integer, load_pipeline, number, parse_size
from .progress import Progress
from .stream import SHARED_UNUSED, add_method, config_of, kept_in, print_place

log = logging.getLogger(__name__)
PORT = 8189
LOOPBACK = "127.0.0.1"


def add_parser(subparsers: Any) -> None:
    """Declare `live` and `push`."""
    parser = subparsers.add_parser("live", help="camera to screen in a browser: a page with live settings")
    add_prompt(parser, "prompt at the start; typed in the page while it runs")
    parser.add_argument(
        "--size",
        type=checked(parse_size),
        metavar="WIDTHxHEIGHT",
        help="of a frame (default 512x512; 128x128 with a bundled model)",
    )
    parser.add_argument("--host", default=LOOPBACK, help="address to serve at; another one is reachable by others")
    parser.add_argument("--port", type=integer(0, 65535), default=PORT, help="default %(default)s; 0 takes a free one")
    _add_osc(parser)
    parser.add_argument("--once", action="store_true", help="end with the first stream")
    add_method(parser.add_argument_group("method"), live=True)
    add_model(parser, "pocket-lcm")
    parser.arguments = {"threshold": "--similarity", "t_index_list": "--t-index", "guidance_scale": "--cfg"}
    parser.unused = (
        *SHARED_UNUSED,
        Unused("osc_host", lambda v: v.osc is None, "without --osc. Give its port."),
    )
    parser.set_defaults(run=run_live, frame_group=1, graph=False)
    _add_push(subparsers)
    parser = subparsers.add_parser("osc", help="change the settings of a live stream, here or in ComfyUI, over OSC")
    _add_url(parser)
    _add_osc(parser, required=True)
    parser.set_defaults(run=run_osc)


def _add_osc(parser: Any, required: bool = False) -> None:
    text = "take live settings over OSC: /slipstream/strength 0.4"
    parser.add_argument("--osc", type=integer(1, 65535), metavar="PORT", required=required, help=text)
    parser.add_argument("--osc-host", default=LOOPBACK, help="address of --osc")


def _add_url(parser: Any) -> None:
    text = "of the stream, as its panel shows it: http://.../slipstream/live/ID"
    parser.add_argument("--host", required=True, metavar="URL", help=text)


def _add_push(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "push", help="send a video or a camera to a live stream, and store or show what comes back"
    )
    _add_url(parser)
    parser.add_argument(
        "--input", help='video file, folder of images, or "webcam" (default: only what others send comes back)'
    )
    parser.add_argument("--out", "--output", help=f"{POSSIBLE} (default: nothing is stored)".replace("%", "%%"))
    parser.add_argument("--fps", type=number(0.01), default=25.0, help="of a folder of images")
    parser.add_argument("--loop", action="store_true", help="begin again at the end, until the stream ends")
    parser.add_argument("--prompt", help="set the prompt first")
    parser.add_argument("--strength", type=number(), help="set the strength first")
    parser.unused = (
        Unused("fps loop", lambda v: not v.input, "without --input. Leave it out."),
        Unused("fps", lambda v: is_webcam(v.input or ""), "on a webcam. Leave it out."),
    )
    parser.set_defaults(run=run_push)


def settings_of(args: argparse.Namespace) -> LiveSettings:
    """Return what the options say of the live settings."""
    return LiveSettings(
        prompt=args.prompt or "", negative=args.negative, strength=args.strength, steps=args.steps,
        t_index_list=read_indices(args.t_index or ""), guidance=args.guidance, guidance_scale=args.cfg_scale, delta=args.delta,
        seed=args.seed, feedback=args.feedback, motion=args.motion, similarity=args.similarity,
    )  # fmt: skip


def run_live(args: argparse.Namespace) -> int:
    """Run the command until Ctrl-C: each time the page starts, a stream runs on the model that stays loaded."""
    size = args.size or ((128, 128) if args.model.startswith("pocket") else (512, 512))
    settings, base = settings_of(args), config_of(args)
    with ExitStack() as stack:
        server = stack.enter_context(Server(args.host, args.port))
        stream = LiveStream(settings, size)
        current = [stream]
        if args.osc is not None:
            stack.enter_context(OscServer(args.osc_host, args.osc, lambda: current[0]))
        pipe = load_pipeline(args)
        networks = Networks(pipe, args.acceleration, args.priority)
        log.info("The panel is at %s/#%s (Ctrl-C ends it).", server.url, stream.id)
        log.info(
            "slipstream push --host %s/slipstream/live/%s --input clip.mp4 --output out.mp4", server.url, stream.id
        )
        while True:
            current[0] = LiveStream(
                settings, size, note=described(pipe.device, pipe.dtype, args.acceleration), id=stream.id, wait=math.inf
            )
            STREAMS.open(current[0])
            try:
                run_one(current[0], networks, base)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(current[0].statistics.text()) from None
            except (ValueError, RuntimeError) as error:  # told in the page; the next start begins again
                log.error("%s", error)
                if args.once:
                    raise
            finally:
                STREAMS.close(current[0])
            log.info("%s", current[0].text())
            settings = current[0].settings
            if args.once:
                return 0


class Networks:
    """The networks of live streams, recorded for what their settings ask, and again when they ask for another number of rows."""

    def __init__(self, pipe: Pipeline, acceleration: str = "none", priority: str = "latency") -> None:
        self.pipe, self.acceleration, self.priority = pipe, acceleration, priority
        self.fast = pipe
        self.models: list[NetworkDenoiser] = []
        self._recorded: tuple[object, ...] = ()

    def fit(
        self, config: StreamConfig, size: tuple[int, int], cond: Conditioning, lanes: int, tell: Tell = nobody
    ) -> list[NetworkDenoiser]:
        """Record what is not yet, and return the models, one for each lane."""
        wanted = (config.rows, config.frame_group, size, cond.context.shape[1:], lanes)
        if wanted != self._recorded:
            self.fast, self.models = accelerated(
                self.pipe, self.acceleration, config.rows, *size, cond, config.frame_group, lanes, tell=tell
            )
            self._recorded = wanted
        return self.models


def run_one(live: LiveStream, networks: Networks, base: StreamConfig) -> None:
    """Run one live stream; `base` holds what its settings do not."""
    pipe, (height, width) = networks.pipe, live.size
    padded = math.ceil(height / pipe.downscale) * pipe.downscale, math.ceil(width / pipe.downscale) * pipe.downscale

    def prompts(settings: LiveSettings) -> tuple[Any, Any]:
        encoded = pipe.encode_text([settings.prompt, settings.negative], padded)
        return encoded.take([0]), encoded.take([1])

    def grouped(settings: LiveSettings) -> StreamConfig:
        config = base.changed(**settings.updates())
        return config.changed(frame_group=width_of(networks.priority, config).group)

    def encode(image: Tensor) -> Tensor:
        return networks.fast.encode_image(pad_to_multiple(image, pipe.downscale))

    def decode(latents: Tensor) -> Any:
        return networks.fast.decode_async(latents, dtype=torch.uint8)

    (cond, uncond), config = prompts(live.settings), grouped(live.settings)
    at_work = width_of(networks.priority, config, room_for(pipe.device, networks.acceleration))
    if at_work.reason:
        text = f"--priority {networks.priority} has no effect: {at_work.reason}."
        log.warning(text)
        live.tell(text, bad=True)
    models = networks.fit(config, padded, cond, at_work.lanes, live.tell)
    batch = blended(models, [cond], PromptBlend([1.0]), 0, uncond, config, at_work.no_delay)

    def apply(old: LiveSettings, new: LiveSettings) -> None:
        (cond, uncond), config = prompts(new), grouped(new)
        batch.update(None, uncond, **new.updates(), frame_group=config.frame_group)
        if new.prompt != old.prompt:
            batch.fade(cond, new.crossfade)
        batch.use(networks.fit(config, padded, cond, batch.lanes, live.tell))

    live.run(batch, encode, decode, apply, device=pipe.device)


def run_push(args: argparse.Namespace) -> int:
    """Run the command; what has come back is in the output whatever happens."""
    url = stream_url(args.host)
    if not args.input and args.out is None:
        raise ValueError(
            "Expected --input, --output or both, but got none of them. Name what is sent, or where results go."
        )
    settings = {name: getattr(args, name) for name in ("prompt", "strength") if getattr(args, name) is not None}
    if args.out is not None:
        check_sink(args.out, args.input or "")
    source = open_source(args.input, args.fps) if args.input else None
    sink = open_sink(args.out, source or WATCHED, live=True) if args.out is not None else None
    found, endless = Pushed(), source is None or source.live or args.loop
    try:
        with ExitStack() as stack:
            if sink is not None:
                stack.enter_context(sink)
            progress = stack.enter_context(Progress("frame"))

            def show(pushed: Pushed) -> None:
                nonlocal found
                found = pushed
                progress.show(
                    pushed.shown, 0 if source is None or endless else source.count, pushed.report.get("limit", "")
                )

            try:
                found = push_frames(url, source, sink, settings, args.loop, show)
            except KeyboardInterrupt:
                if not endless:
                    raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept_in(sink)) from None
    print_place(sink)
    log.info("%s%s", found.text(), f"; {found.ended}" if found.ended else "")
    if source is not None and source.problem:
        log.warning("%s: %s. What could be read was sent.", args.input, source.problem)
    return 0


def run_osc(args: argparse.Namespace) -> int:
    """Run the command until the stream ends."""
    log.info("%s", control(stream_url(args.host), lambda remote: OscServer(args.osc_host, args.osc, lambda: remote)))
    return 0


def stream_url(host: str) -> str:
    """Return the address of a stream's route of what a user gave: that, or the page with the stream's name behind #."""
    parts = urllib.parse.urlsplit(host if "://" in host else f"http://{host}")
    path = f"/slipstream/live/{parts.fragment}" if parts.fragment else parts.path
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.netloc or not path.strip("/"):
        raise ValueError(
            f"Expected `host` to be the address of a stream, but got {host!r}. The panel shows it: http://HOST:PORT/slipstream/live/ID."
        )
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
