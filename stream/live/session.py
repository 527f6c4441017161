"""One live stream: what its clients send and get, and the threads between. Knows no web server; see routes.py."""

from __future__ import annotations

import functools
import hmac
import json
import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.images import cover, encode_jpeg, read_encoded
from ...core.tensors import image_to_bytes
from ...core.transfer import Lane
from ..batch import StreamBatch, StreamFrame
from ..lanes import StreamLanes
from ..queues import WINDOW, FrameQueue, Statistics, StreamThreads
from ..similarity import SimilarityFilter
from . import wire
from .settings import LiveSettings

MAX_CLIENTS = 16  # of a stream
MAX_STREAMS = 16  # at once
FRAMES_PER_SECOND = 240  # of a producer; more are left out
TEXTS_PER_SECOND = 100
ANSWERS_PER_SECOND = 20  # to messages that are refused
GRACE = 30.0  # seconds until a stream ends whose producer was lost
PAUSE = 600.0  # and one whose producer closed its page
REPORTS = 0.5  # seconds between statistics
OUTSIDE = 2  # frames (or groups) on their way besides those that are denoised: one is encoded, one decoded
LEAST_WAIT, MOST_WAIT = 0.2, 5.0  # seconds
LOOK = 0.02  # seconds until a look whether a pass has made room, of which nobody tells
RECENT = 4.0  # seconds that rates are measured over


class Client(Protocol):
    """One connection. `offer` keeps the newest result only, and both may be called from any thread."""

    def offer(self, message: bytes) -> None: ...

    def tell(self, message: str) -> None: ...


@dataclass(eq=False)
class Member:
    """A connected client: `key` lets the same page come back in its own place; `sequence` is that of its last frame."""

    client: Client
    key: str
    sequence: int = -1
    times: dict[str, deque[float]] = field(default_factory=dict)

    def within(self, kind: str, per_second: int) -> bool:
        """Count a message and tell whether it is one of the first `per_second` within a second."""
        now = time.monotonic()
        times = self.times.setdefault(kind, deque(maxlen=per_second))
        if len(times) == per_second and now - times[0] < 1:
            return False
        times.append(now)
        return True


@dataclass(frozen=True)
class Pushed:
    """A frame as it came."""

    head: wire.Head
    body: bytes


class LiveStream:
    """A stream with an unguessable `id`, one producer and some viewers.

    Frames come in by `receive`; `run` takes them through a `StreamBatch` until someone stops it. What is changed by clients
    waits in `settings` until `run` takes it over. All methods may be called from any thread.

    Args:
        settings: at the start.
        size: (height, width) of the frames that go through the model; others are cropped to its proportions and resized.
        keep: last frames that are kept for `images`.
        note: one sentence for those who look, for example what the model is.
        without: settings that have no effect here, by name, and why.
        wait: seconds until it ends when nobody comes.
    """

    def __init__(
        self, settings: LiveSettings, size: tuple[int, int] = (512, 512), keep: int = 1, note: str = "",
        without: Mapping[str, str] | None = None, id: str = "", wait: float = PAUSE,
    ) -> None:  # fmt: skip
        self.settings, self.size, self.note, self.without = settings, size, note, dict(without or {})
        self.id = id or secrets.token_urlsafe(24)
        self.kept: deque[Tensor] = deque(maxlen=max(keep, 1))
        self.statistics = Statistics(RECENT)
        self.refused: Counter[str] = Counter()
        self.ended = ""  # why, when it has ended
        self._inbox: FrameQueue[Pushed] = FrameQueue(1)
        self._members: list[Member] = []
        self._producer: Member | None = None
        self._lock = threading.RLock()
        self._deadline: float | None = time.monotonic() + wait
        self._applied = settings
        self._changed = threading.Condition(self._lock)
        self._begun = self._shown = 0
        self._batch: StreamBatch | StreamLanes | None = None
        self._seen = torch.zeros(*size, 3, dtype=torch.uint8)  # the last frame that could be read
        self._news = ""
        self._received: deque[float] = deque(maxlen=WINDOW)
        self._reported, self._published, self._patience = 0.0, time.monotonic(), LEAST_WAIT

    # -- clients

    def join(self, client: Client, key: str = "", view: bool = False) -> Member:
        """Add a client; the first one that does not only `view` is the producer.

        Raises ValueError when there are too many, or it has ended.
        """
        with self._lock:
            if self.ended:
                raise ValueError(f"Expected a stream that runs, but this one has ended: {self.ended}")
            # A page that lost its connection comes back before the server knows that it was lost.
            before = next((m for m in self._members if key and hmac.compare_digest(m.key.encode(), key.encode())), None)
            if before is not None:
                self.leave(before, lost=True)
            if len(self._members) >= MAX_CLIENTS:
                raise ValueError(
                    f"Expected at most {MAX_CLIENTS} clients of a stream, but got one more. Close another."
                )
            member = Member(client, key)
            self._members.append(member)
            self._tell(
                member,
                "hello",
                settings=self.settings.as_json(),
                size=self.size[::-1],
                note=self._news or self.note,
                without=self.without,
            )
            (self.view if view else self.produce)(member)
            return member

    def produce(self, member: Member) -> bool:
        """Make a client the producer if there is none, and tell it which it is."""
        with self._lock:
            if self._producer is None and member in self._members:
                self._producer, self._deadline = member, None
            own = self._producer is member
            self._tell(member, "role", producer=own)
            return own

    def view(self, member: Member) -> None:
        """Let somebody else send frames, a program that pushes for example."""
        with self._lock:
            if self._producer is member:
                self._producer, self._deadline = None, time.monotonic() + PAUSE
            self._tell(member, "role", producer=False)

    def leave(self, member: Member, lost: bool) -> None:
        """Remove a client. Without its producer a stream pauses, and ends after a grace: sooner when it was `lost`."""
        with self._lock:
            if member in self._members:
                self._members.remove(member)
            if self._producer is member:
                self._producer = None
                self._deadline = time.monotonic() + (GRACE if lost else PAUSE)
                self._tell_all("paused", reason="connection lost" if lost else "page closed")

    def receive(self, member: Member, message: bytes | str) -> None:
        """Take one message of a client; one that is not understood is counted and answered."""
        try:
            if isinstance(message, bytes):
                self._frame(member, message)
            else:
                self._text(member, message)
        except ValueError as error:
            self.refuse(member, "malformed", str(error))

    def refuse(self, member: Member, kind: str, reason: str) -> bool:
        """Count what is refused; tell why, and return True, unless too much is."""
        with self._lock:
            self.refused[kind] += 1
        answered = member.within("answers", ANSWERS_PER_SECOND)
        if answered:
            self._tell(member, "refused", kind=kind, reason=reason)
        return answered

    def _frame(self, member: Member, message: bytes) -> None:
        if self._producer is not member:
            self.refuse(
                member, "viewer", "Expected frames of the producer, but got one of a viewer. Another page sends."
            )
            return
        if not member.within("frames", FRAMES_PER_SECOND):
            self.refuse(member, "rate", f"Expected at most {FRAMES_PER_SECOND} frames per second, but got more.")
            return
        head, body = wire.unpack(message, (wire.FRAME,))
        if head.sequence <= member.sequence:
            self.refuse(member, "replayed", f"Expected a frame after {member.sequence}, but got {head.sequence}.")
            return
        member.sequence = head.sequence
        self._received.append(time.perf_counter())
        self._inbox.put(Pushed(head, body))

    def _text(self, member: Member, message: str) -> None:
        if not member.within("texts", TEXTS_PER_SECOND):
            self.refuse(member, "rate", f"Expected at most {TEXTS_PER_SECOND} messages per second, but got more.")
            return
        found = wire.read_text(message)
        kind = found.pop("type")
        if kind == "set":
            self._set(member, found)
        elif kind == "stop":
            self.end("Stopped.")
        elif kind == "produce":
            self.produce(member)
        elif kind == "view":
            self.view(member)
        else:
            raise ValueError(f"Expected a message of type set, stop, produce or view, but got {kind[:40]!r}.")

    def _set(self, member: Member, updates: Mapping[str, Any]) -> None:
        """Change settings; one that is refused is answered with the settings that hold."""
        try:
            self.set(updates)
        except ValueError as error:
            if self.refuse(member, "setting", str(error)):
                self._tell(member, "settings", settings=self.settings.as_json())

    def set(self, updates: Mapping[str, Any]) -> None:
        """Change settings from the next pass on; raises ValueError for a bad one, and changes nothing then."""
        with self._changed:
            refused = next((name for name in updates if name in self.without), None)
            if refused is not None:
                raise ValueError(f"`{refused}` has no effect here: {self.without[refused]}")
            self.settings = self.settings.changed(updates)
            self._tell_all("settings", settings=self.settings.as_json())
            for text in self.settings.warnings(updates) if len(updates) == 1 else ():
                self._tell_all("warning", reason=text)
            self._changed.notify_all()

    def tell(self, text: str, bad: bool = False) -> None:
        """Tell everybody something that is no answer, such as that a network is being compiled; `bad`: that something has no effect."""
        with self._lock:
            self._news = text
            self._tell_all("warning" if bad else "note", reason=text)

    def end(self, reason: str) -> None:
        """End the stream and tell everybody why; the first reason stays."""
        with self._changed:
            if self.ended:
                return
            self.ended = reason
            self.statistics.seconds = math.inf  # what is reported from now on is of the whole run, or its end
            self._inbox.close()
            self._tell_all("ended", reason=reason)
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        """Whether it has ended and the clients know."""
        with self._lock:
            return bool(self.ended)

    def _tell(self, member: Member, type: str, /, **values: Any) -> None:
        member.client.tell(json.dumps({"type": type, **values}))

    def _tell_all(self, type: str, /, **values: Any) -> None:
        for member in self._members:
            self._tell(member, type, **values)

    # -- frames

    def frames(self) -> Iterator[tuple[Callable[[], Tensor], wire.Head]]:
        """Yield the newest frame, over and over, until the stream ends.

        No more of them are on their way than keeps every thread at work: what waits in queues would be old when it is shown.
        """
        frames = iter(self._inbox)
        while True:
            self._await_room()
            pushed = next(frames, None)
            if pushed is None:
                return
            self._begun += 1
            yield functools.partial(self._read, pushed), pushed.head

    def _await_room(self) -> None:
        """Wait until another frame may go in; if nothing comes out for long, one goes in anyway."""
        end = time.monotonic() + self._patience
        with self._changed:
            while not self._changed.wait_for(lambda: self.ended or self._on_their_way < self._room, LOOK):
                if time.monotonic() > end:
                    return

    @property
    def _room(self) -> int:
        if self._batch is None:
            return OUTSIDE
        # Fewer steps than before leave more frames in flight than there are places, which only new ones push out.
        return max(self._batch.capacity, self._batch.in_flight) + OUTSIDE * self._batch.config.frame_group

    @property
    def _on_their_way(self) -> int:
        return self._begun - sum(queue.dropped for queue in self.statistics.queues or ()) - self._shown

    def _read(self, pushed: Pushed) -> Tensor:
        """Decode a frame; one that cannot be read is refused, and the one before it takes its place (black at the start)."""
        try:
            self._seen = image_to_bytes(cover(read_encoded(pushed.body, wire.MAX_PIXELS), *self.size))
        except ValueError as error:
            with self._lock:
                if self._producer is not None:
                    self.refuse(self._producer, "malformed", str(error))
        return self._seen

    def publish(self, image: Tensor, head: wire.Head, frame: StreamFrame) -> None:
        """Send a result (H, W, 3) to everybody; a repeated one as its head alone."""
        if frame.repeated:
            message = wire.pack(head._replace(kind=wire.REPEAT))
        else:
            image = image_to_bytes(image[: self.size[0], : self.size[1]])
            message = wire.pack(head._replace(kind=wire.RESULT), encode_jpeg(image))
        with self._lock:
            if not frame.repeated:
                self.kept.append(image.clone())
            members = list(self._members)
            now = time.monotonic()
            self._published, self._patience = now, min(max(LEAST_WAIT, 3 * (now - self._published)), MOST_WAIT)
            self._shown += 1
            self._changed.notify_all()
        for member in members:
            member.client.offer(message)

    def images(self) -> Tensor:
        """Return the last results as IMAGE (B, H, W, 3) in [0, 1]; none gives B = 0."""
        with self._lock:
            found = list(self.kept)
        return torch.stack(found).float() / 255 if found else torch.zeros(0, *self.size, 3)

    # -- the run

    def run(
        self, batch: StreamBatch | StreamLanes, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Any],
        apply: Callable[[LiveSettings, LiveSettings], None], check: Callable[[], None] = lambda: None,
        device: torch.device | None = None, why: Callable[[BaseException], str] = lambda e: f"{type(e).__name__}: {e}",
        lanes: Mapping[str, Lane] | None = None,
    ) -> None:  # fmt: skip
        """Run frames through `batch` until the stream ends; another end is sent to all clients and raised.

        `device` and `lanes` are those of `StreamThreads`.

        `apply(old, new)` takes changed settings over; its ValueError is sent to all clients, and the old ones stay. It and `check`, called
        about twenty times a second, run in this thread. `why` gives the text of an error for the clients.
        """
        chooser, self._batch = LiveFilter(self, batch), batch
        threads = StreamThreads(
            self.frames(), encode, batch, decode, self.publish, queue=1, device=device, statistics=self.statistics,
            lanes=lanes,
        )  # fmt: skip
        threads.chooser = chooser.wanted
        try:
            with threads:
                try:
                    while not self.ended and threads.error is None:
                        check()
                        self._take_over(apply, chooser)
                        threads.chooser = chooser.wanted
                        self._look()
                finally:
                    self._inbox.close()
            threads.wait()
        except BaseException as error:
            self.end(why(error).splitlines()[0].rstrip(": "))
            raise

    def _take_over(self, apply: Callable[[LiveSettings, LiveSettings], None], chooser: LiveFilter) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.settings is not self._applied or bool(self.ended), timeout=0.05)
            old, new = self._applied, self.settings
        if new is old or self.ended:
            return
        try:
            apply(old, new)
            chooser.renew()
        except ValueError as error:
            with self._changed:
                self.settings = new = old
                self._tell_all("refused", kind="setting", reason=str(error))
                self._tell_all("settings", settings=old.as_json())
        self._applied = new

    def _look(self) -> None:
        """Send statistics now and then, and end a stream whose producer does not come back."""
        now = time.monotonic()
        with self._lock:
            if self._deadline is not None and now > self._deadline:
                self.end("The page that sent frames did not come back.")
            if now - self._reported >= REPORTS and self._members:
                self._reported = now
                self._tell_all("statistics", **self.report())

    def report(self) -> dict[str, Any]:
        """Return the statistics: those of the threads, what was refused, and which stage limits."""
        rate = self.statistics.rate(self._received)
        return {
            **{name: round(value, 2) for name, value in self.statistics.summary().items()},
            "fps_in": round(rate, 2),
            "dropped": self._inbox.dropped + sum(queue.dropped for queue in self.statistics.queues or ()),
            "clients": len(self._members),
            "refused": dict(self.refused),
            "limit": self.statistics.limit(rate),
        }

    def text(self) -> str:
        """Return the statistics as lines."""
        refused = ", ".join(f"{count} {kind}" for kind, count in self.refused.items())
        report = self.report()
        lines = [
            self.statistics.text(),
            f"{report['dropped']} frames came faster than they were taken",
            f"limited by {report['limit'] or 'nothing: no frame came'}",
            *([f"refused messages: {refused}"] if refused else []),
            f"ended: {self.ended}",
        ]
        return "\n".join(lines)


class LiveFilter(SimilarityFilter):
    """The similarity filter of a live stream: its threshold moves, and a frame is processed after each change of a setting."""

    def __init__(self, live: LiveStream, batch: StreamBatch | StreamLanes) -> None:
        super().__init__(1.0, blocks=8)
        self.live, self.batch = live, batch

    @property
    def wanted(self) -> LiveFilter | None:
        """The filter, where it can skip anything."""
        return self if self.live.settings.similarity < 1 else None

    def renew(self) -> None:
        """Process the next frame, whatever it looks like."""
        self.reference = None

    def keep(self, image: Tensor) -> bool:
        self.threshold = self.live.settings.similarity
        if getattr(self.batch, "moving", False):
            self.renew()
            return True
        return super().keep(image)


def described(device: torch.device, dtype: torch.dtype, acceleration: str = "none") -> str:
    """Return a note on where a stream runs, with what to expect of it, or what would make it faster."""
    hint = " A CPU makes a few frames a second: the rate below is measured." if device.type == "cpu" else ""
    if device.type == "cuda" and acceleration == "none":
        hint = " For several times as many frames a second set `acceleration` to graph or compile."
    return f"On {device}, {str(dtype).removeprefix('torch.')}.{hint}"


class Streams:
    """The live streams of a process, by their ids."""

    def __init__(self) -> None:
        self._streams: dict[str, LiveStream] = {}
        self._lock = threading.Lock()

    def open(self, stream: LiveStream) -> LiveStream:
        """Let clients find a stream; raises ValueError when there are too many."""
        with self._lock:
            if len(self._streams) >= MAX_STREAMS:
                raise ValueError(
                    f"Expected at most {MAX_STREAMS} live streams at once, but got one more. Stop another."
                )
            self._streams[stream.id] = stream
            return stream

    def close(self, stream: LiveStream) -> None:
        """End a stream, if it has not ended, and forget it."""
        stream.end("Stopped.")
        with self._lock:
            self._streams.pop(stream.id, None)

    def find(self, id: str) -> LiveStream | None:
        with self._lock:
            return self._streams.get(id)


STREAMS = Streams()
