"""The web route of live streams, for ComfyUI's server and for `slipstream live`. Needs aiohttp, the host's own server library."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from . import wire
from .session import STREAMS, LiveStream, Member, Streams

log = logging.getLogger(__name__)
PATH = "/slipstream/live/{stream}"
HEARTBEAT = 10.0  # seconds; a page that does not answer is lost
TEXTS_KEPT = 32
LARGEST = 4 * wire.MAX_FRAME  # what is larger ends the connection before it is in memory
CLOSED = (1000, 1001)  # codes of a page that closed the connection


class Outbox:
    """What waits to be sent to one client: the newest result, and a few texts."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event, self._lock = asyncio.Event(), threading.Lock()
        self._result: bytes | None = None
        self._texts: deque[str] = deque(maxlen=TEXTS_KEPT)

    def offer(self, message: bytes) -> None:
        with self._lock:
            self._result = wire.newest(self._result, message)
        self._wake()

    def tell(self, message: str) -> None:
        with self._lock:
            self._texts.append(message)
        self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the server's loop has ended
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()

    def take(self) -> list[str | bytes]:
        """Take all that waits."""
        with self._lock:
            found: list[str | bytes] = [*self._texts, *([self._result] if self._result else [])]
            self._texts.clear()
            self._result = None
        return found


def same_origin(headers: Any) -> bool:
    """Whether a request comes from a page of this server, or from a program, which names no origin."""
    origin = headers.get("Origin")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()


async def connect(request: Any, streams: Streams = STREAMS) -> Any:
    """Serve one client of the stream that the path names."""
    from aiohttp import web

    if not same_origin(request.headers):
        return web.Response(status=403, text="Expected a page of this server, but got one of another origin.")
    stream = streams.find(request.match_info["stream"])
    if stream is None:
        return web.Response(status=404, text="Expected a live stream that runs, but there is none of this name.")
    socket = web.WebSocketResponse(max_msg_size=LARGEST, heartbeat=HEARTBEAT, compress=False)
    await socket.prepare(request)
    outbox = Outbox()
    try:
        member = stream.join(outbox, request.query.get("key", "")[:100], "view" in request.query)
    except ValueError as error:
        await socket.close(code=1013, message=str(error).encode()[:120])
        return socket
    sender = asyncio.create_task(_send(socket, outbox, stream))
    try:
        await _receive(socket, stream, member)
    finally:
        stream.leave(member, lost=socket.close_code not in CLOSED)
        sender.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await sender
    return socket


async def _receive(socket: Any, stream: LiveStream, member: Member) -> None:
    async for message in socket:
        if isinstance(message.data, (bytes, str)):
            stream.receive(member, message.data)


async def _send(socket: Any, outbox: Outbox, stream: LiveStream) -> None:
    """Send what waits; a client that is slow gets fewer frames, as only the newest one waits."""
    with suppress(ConnectionError):
        over = False
        while not socket.closed and not over:
            await outbox.wait()
            over = stream.over  # looked at first: what is said at the end is in the outbox then
            for message in outbox.take():
                await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))
        await socket.close(code=1000)
