"""The live route under load: frames, clients, and what our own part costs the server's CPU. No model: what is measured is the way.

python benchmarks/live_soak.py                      # CPU of a 512 x 512 frame; 8 clients, one of them slow; 2,000 frames
python benchmarks/live_soak.py --frames 100000      # does it run for ever? memory and speed over time, on small frames
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import threading
import time
from typing import Any

import torch
from _common import ROOT  # noqa: F401  makes `slipstream` importable from a checkout
from slipstream.core import VE, Conditioning
from slipstream.core.images import encode_jpeg
from slipstream.core.schedules import DiscreteLevels, scaled_linear_alphas_cumprod
from slipstream.stream import BlendedStream, PromptBlend, StreamConfig
from slipstream.stream.live import session, wire
from slipstream.stream.live.server import Server
from slipstream.stream.live.session import LiveStream, Streams
from slipstream.stream.live.settings import LiveSettings
from stream_soak import resident
from torch import Tensor

CLIENTS = 8
WINDOW = 6  # frames that are sent before one has come back


class Nothing:
    """Gives the frame back: the cheapest denoiser there is."""

    space = VE
    levels = DiscreteLevels(scaled_linear_alphas_cumprod())
    sigma_min, sigma_max = levels.sigma_min, levels.sigma_max
    calls = rows = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return x


def serve(size: int) -> tuple[LiveStream, threading.Thread, Streams]:
    """Return a stream that runs in a thread; its latents are an 8 x 8 part of the frame, and its result is the frame."""
    streams = Streams()
    settings = LiveSettings(guidance="none", steps=1)
    live = streams.open(LiveStream(settings, (size, size), keep=4))
    batch = BlendedStream(
        Nothing(), [Conditioning(torch.zeros(1, 1, 1))], PromptBlend([1.0]), 0, None, StreamConfig(**settings.updates())
    )  # type: ignore[arg-type]
    frame: list[Tensor] = []

    def encode(image: Tensor) -> Tensor:
        frame[:] = [image]
        return image[:, :8, :8, [0, 1, 2, 0]].movedim(-1, 1).float()

    def apply(old: LiveSettings, new: LiveSettings) -> None:
        batch.update(**new.updates())
        batch.fade(Conditioning(torch.zeros(1, 1, 1)), new.crossfade)

    thread = threading.Thread(target=lambda: live.run(batch, encode, lambda latents: frame[0], apply))
    thread.start()
    return live, thread, streams


def produce(url: str, size: int, count: int, window: int) -> None:
    """Send so many frames, each as soon as there is room, change a setting now and then, and send what is malformed."""

    async def main() -> None:
        import aiohttp

        image = encode_jpeg(
            torch.randint(0, 255, (size // 8, size // 8, 3), dtype=torch.uint8)
            .repeat_interleave(8, 0)
            .repeat_interleave(8, 1)
        )
        async with aiohttp.ClientSession() as http, http.ws_connect(url, max_msg_size=1 << 24) as socket:
            back = asyncio.Semaphore(window)

            async def read() -> None:
                async for message in socket:
                    if isinstance(message.data, bytes):
                        back.release()

            reader = asyncio.create_task(read())
            for n in range(1, count + 1):
                try:
                    await asyncio.wait_for(back.acquire(), 1.0)
                except asyncio.TimeoutError:  # latest wins: one was dropped
                    pass
                await socket.send_bytes(wire.pack(wire.Head(wire.FRAME, n, 1000 * time.perf_counter()), image))
                if n % 97 == 0:
                    await socket.send_str(
                        json.dumps({"type": "set", "seed": n, "strength": 0.3 + n % 5 / 10, "prompt": str(n)})
                    )
                if n % 501 == 0:
                    for bad in (
                        b"",
                        b"SLIP",
                        wire.pack(wire.Head(wire.FRAME, 1, 0.0), image),
                        wire.pack(wire.Head(wire.FRAME, n, 0.0), b"x"),
                    ):
                        await socket.send_bytes(bad)
                    await socket.send_str("{")
            await socket.send_str('{"type": "stop"}')
            await asyncio.wait_for(reader, 20)

    asyncio.run(main())


def watch(url: str, slow: float, shown: Any) -> None:
    """Take what comes; a slow client waits so many seconds after each message."""

    async def main() -> None:
        import aiohttp

        async with aiohttp.ClientSession() as http, http.ws_connect(url, max_msg_size=1 << 24) as socket:
            # A client that is too slow to answer a ping in time is taken for lost.
            with contextlib.suppress(aiohttp.ClientError):
                async for message in socket:
                    if isinstance(message.data, bytes):
                        shown.value += 1
                        await asyncio.sleep(slow)

    asyncio.run(main())


def run(size: int, count: int, clients: int, window: int = WINDOW) -> dict[str, float]:
    """Run `count` frames with one producer and `clients` - 1 viewers, the last of them slow; the clients are other processes."""
    context = multiprocessing.get_context("spawn")
    live, thread, streams = serve(size)
    with Server("127.0.0.1", 0, streams) as server:
        url = f"{server.url}/slipstream/live/{live.id}"
        counts = [context.Value("i", 0) for _ in range(clients - 1)]
        viewers = [
            context.Process(target=watch, args=(url, 0.5 if i == clients - 2 else 0.0, counts[i]))
            for i in range(clients - 1)
        ]
        producer = context.Process(target=produce, args=(url, size, count, window))
        producer.start()
        while not live.report()["clients"]:
            time.sleep(0.05)
        for viewer in viewers:
            viewer.start()
        first, shown, cpu, begun, wall = 0.0, 0, 0.0, time.process_time(), time.perf_counter()
        step = max(count // 10, 1)
        while thread.is_alive():
            thread.join(0.25)
            done = live.statistics.frames_out
            if done >= shown + step:
                gc.collect()
                first = first or resident()
                seconds, cpu = time.perf_counter() - wall, time.process_time() - begun
                print(
                    f"{done:7} frames  {resident():7.1f} MB  {done / seconds:6.0f} fps  {1000 * cpu / done:5.2f} ms CPU a frame",
                    flush=True,
                )
                shown = done
        cpu, done = time.process_time() - begun, live.statistics.frames_out
        grown = resident() - first
        for process in (producer, *viewers):
            process.join(20)
            process.kill()
    streams.close(live)
    print(live.text())
    print(f"results taken by the viewers: {', '.join(str(c.value) for c in counts)}" if counts else "no viewers")
    return {"frames": done, "cpu_ms": 1000 * cpu / max(done, 1), "grown_mb": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=0, help="of the long run (default: none)")
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    session.FRAMES_PER_SECOND = 2000  # the producer is as fast as it can
    if args.frames:
        found = run(64, args.frames, 2)
        print(f"{found['frames']:.0f} frames; memory grew by {found['grown_mb']:.1f} MB after the first tenth")
        return
    print(f"== one client, {args.size} x {args.size}: CPU of the server a frame, decode to send")
    alone = run(args.size, 500, 1)
    print(f"{alone['cpu_ms']:.2f} ms of CPU a frame (goal: below 8)")
    print(f"== {CLIENTS} clients, one of them slow")
    run(args.size, 1000, CLIENTS)


if __name__ == "__main__":
    main()
