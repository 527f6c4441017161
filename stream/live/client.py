"""A client in Python: frames of a video or a camera up, results into a file. The protocol is in docs/live.md."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor

from ...core.checks import printable
from ...core.images import cover, encode_jpeg, read_encoded
from ...core.tensors import image_to_bytes
from ..queues import percentile
from ..sinks import FrameSink
from ..video import FrameSource, Stamp
from . import wire
from .routes import LARGEST
from .server import import_aiohttp

log = logging.getLogger(__name__)
LAST = 3.0  # seconds that the results of the last frames are waited for
KEPT = 1024  # frames on their way whose times are known; older ones were dropped


class Watched:
    """What others send, as a source that sinks know; its own frames are none."""

    path, problem, live, has_sound, count = "", "", True, False, 0
    rate = base_rate = Fraction(30)
    time_base = Fraction(1, 1000)

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]:
        return iter(())


WATCHED = Watched()


@dataclass
class Pushed:
    """What became of a push: frames sent and shown, delays in ms, and why it ended."""

    sent: int = 0
    shown: int = 0
    delays: list[float] = field(default_factory=list)
    ended: str = ""
    report: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return it in one line."""
        if not self.sent:
            return f"{self.shown} frames came"
        ordered = sorted(self.delays)
        return (
            f"{self.sent} frames sent, {self.shown} came back, {self.sent - self.shown} were dropped; from sent to shown p50 "
            f"{percentile(ordered, 50):.0f} / p95 {percentile(ordered, 95):.0f} ms; limited by {self.report.get('limit') or 'nothing'}"
        )


def push(
    url: str, source: FrameSource | None, sink: FrameSink | None = None, settings: dict[str, Any] | None = None, loop: bool = False,
    progress: Callable[[Pushed], None] = lambda pushed: None,
) -> Pushed:  # fmt: skip
    """Send the frames of `source` at its own pace to the stream at `url`, and write what comes back to `sink`.

    Args:
        url: as the panel shows it: http://host:port/slipstream/live/ID.
        source: None sends nothing: what others send is shown until the stream ends.
        settings: live settings to set first.
        loop: begin again at the end of a file.

    Raises:
        ValueError: the stream cannot be reached or has a producer already, or refuses a setting.
    """
    return asyncio.run(_Push(url, source, sink, settings or {}, loop, progress).run())


def control(url: str, opened: Callable[[Remote], AbstractContextManager[Any]]) -> str:
    """Join the stream at `url` as one more viewer: `opened(remote)` is entered while it runs. Returns why it ended.

    Raises:
        ValueError: the stream cannot be reached.
    """

    async def visit() -> str:
        async with connected(url, view=True) as socket:
            with opened(Remote(socket, asyncio.get_running_loop())):
                async for message in socket:
                    found = json.loads(message.data) if isinstance(message.data, str) else {"type": ""}
                    if found["type"] in ("refused", "warning"):
                        log.warning("%s", printable(found["reason"]))
                    elif found["type"] == "ended":
                        return str(found["reason"])
        return "The connection was lost."

    return asyncio.run(visit())


@dataclass(frozen=True)
class Remote:
    """A stream of another process, whose settings can be changed from any thread."""

    socket: Any
    loop: asyncio.AbstractEventLoop

    def set(self, updates: Mapping[str, Any]) -> None:
        """Send changed settings; what the stream says of them is logged."""
        asyncio.run_coroutine_threadsafe(self.socket.send_str(json.dumps({"type": "set", **updates})), self.loop)


@asynccontextmanager
async def connected(url: str, view: bool = False) -> AsyncIterator[Any]:
    """Connect to the stream at `url`, only to `view` it or to send frames; raises ValueError where there is none."""
    aiohttp = import_aiohttp()
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, params={"view": "1"} if view else {}, max_msg_size=LARGEST) as socket,
        ):
            yield socket
    except aiohttp.ClientError as error:
        status = getattr(error, "status", None)
        reason = "there is no stream of this name" if status == 404 else getattr(error, "message", "") or str(error)
        raise ValueError(
            f"Expected `host` to be the address of a running live stream, but {url} is not: {reason}."
        ) from None


class _Push:
    def __init__(
        self, url: str, source: FrameSource | None, sink: FrameSink | None, settings: dict[str, Any], *how: Any
    ) -> None:
        self.url, self.source, self.sink, self.settings = url, source, sink, settings
        self.loop, self.progress = how
        self.found = Pushed()
        self.size: tuple[int, int] | None = None
        self.producer = False
        self.begun, self.answered, self.all_back = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.stamps: dict[int, Stamp] = {}
        self.first = 0.0  # the time at which the first result came
        self.last: Tensor | None = None

    async def run(self) -> Pushed:
        async with connected(self.url, view=self.source is None) as socket:
            await self._talk(socket)
        return self.found

    async def _talk(self, socket: Any) -> None:
        reader = asyncio.create_task(self._read(socket))
        try:
            await self._until(reader, self.begun, 20)
            if not self.producer and self.source is not None:
                raise ValueError(
                    "Expected to be the one that sends frames, but another client does. Choose Pushed frames in its panel, or stop it."
                )
            if self.settings:
                await socket.send_str(json.dumps({"type": "set", **self.settings}))
                await self._until(reader, self.answered, 20)
            if self.source is None:
                await reader
                return
            sender = asyncio.create_task(self._send(socket, self.source))
            await asyncio.wait([reader, sender], return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
                await self._until(reader, self.all_back, LAST)
            sender.cancel()
        finally:
            await socket.close()
            await asyncio.gather(reader)

    @staticmethod
    async def _until(reader: asyncio.Task[None], event: asyncio.Event, seconds: float) -> None:
        """Wait for an event, or that reading ends; raises what ended it."""
        waiting = asyncio.create_task(event.wait())
        await asyncio.wait([reader, waiting], return_when=asyncio.FIRST_COMPLETED, timeout=seconds)
        waiting.cancel()
        if reader.done():
            reader.result()

    async def _read(self, socket: Any) -> None:
        async for message in socket:
            if isinstance(message.data, str):
                self._told(json.loads(message.data))
            else:
                self._shown(*wire.unpack(message.data, (wire.RESULT, wire.REPEAT)))
            if self.found.ended:
                return

    def _told(self, message: dict[str, Any]) -> None:
        if message["type"] == "hello":
            self.size = (message["size"][1], message["size"][0])
            if self.sink is not None:
                self.sink.check(*self.size)
        elif message["type"] == "role":
            self.producer = message["producer"]
            self.begun.set()
        elif message["type"] == "settings":
            self.answered.set()
        elif message["type"] == "statistics":
            self.found.report = message
        elif message["type"] == "refused" and not self.found.sent:
            raise ValueError(message["reason"])
        elif message["type"] == "ended":
            self.found.ended = message["reason"]

    def _shown(self, head: wire.Head, body: bytes) -> None:
        now = time.perf_counter()
        if self.source is None:  # the number and the time are those of another client
            self.first = self.first or now
            stamp: Stamp | None = Stamp(round(1000 * (now - self.first)), WATCHED.time_base)
        else:
            self.found.delays.append(1000 * now - head.captured)
            del self.found.delays[:-KEPT]
            stamp = self.stamps.pop(head.sequence, None)
        self.found.shown += 1
        self.last = read_encoded(body) if body else self.last
        if self.sink is not None and stamp is not None and self.last is not None:
            self.sink.write(self.last, stamp)
        self.progress(self.found)
        if head.sequence == self.found.sent:
            self.all_back.set()

    async def _send(self, socket: Any, source: FrameSource) -> None:
        """Send frames when their time has come; a camera's own when they are there."""
        begun, frames = time.perf_counter(), self._frames(source)
        while (pair := await asyncio.to_thread(next, frames, None)) is not None:
            data, stamp, seconds = pair
            if not source.live:
                await asyncio.sleep(max(0.0, begun + seconds - time.perf_counter()))
            self.found.sent += 1
            self.all_back.clear()
            self.stamps[self.found.sent] = stamp
            self.stamps.pop(self.found.sent - KEPT, None)
            await socket.send_bytes(wire.pack(wire.Head(wire.FRAME, self.found.sent, 1000 * time.perf_counter()), data))

    def _frames(self, source: FrameSource) -> Iterator[tuple[bytes, Stamp, float]]:
        assert self.size is not None
        offset = 0.0
        while True:
            end = 0.0
            for image, stamp in source:
                yield encode_jpeg(image_to_bytes(cover(image, *self.size)), 92), stamp, offset + stamp.seconds
                end = stamp.end(source.rate)
            if not self.loop or end == 0:
                return
            offset += end
