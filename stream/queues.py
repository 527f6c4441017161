"""Queues, statistics and threads of a stream: capture, encode, denoise, decode and publish overlap.

Live input is latest-wins: what the model cannot take in time is dropped at the entrance and counted, so latency never grows.
Output is bounded and drops its oldest frame. A file is read with back-pressure instead and loses nothing.
"""

from __future__ import annotations

import contextvars
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..core.checks import check_integer
from ..core.doctor import limited_by
from ..core.tensors import check_image, unchecked_pixels
from ..core.transfer import Arrival, receive
from .batch import StreamBatch, StreamFrame
from .similarity import SimilarityFilter

T = TypeVar("T")
STAGES = ("capture", "encode", "denoise", "decode", "publish")
WINDOW = 600
AHEAD = 1  # decoded frames that a GPU may be behind: it must not starve, and what is begun must not pile up


class FrameQueue(Generic[T]):
    """A bounded queue between two threads: when full, `put` drops the oldest item (live) or waits (not live)."""

    def __init__(self, size: int = 1, live: bool = True) -> None:
        check_integer("size", size, 1)
        self.size, self.live = size, live
        self.dropped = 0
        self._items: deque[T] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T) -> bool:
        """Add `item`; returns False when the queue is closed and the item was not taken."""
        with self._changed:
            if not self.live:
                self._changed.wait_for(lambda: self._closed or len(self._items) < self.size)
            if self._closed:
                return False
            if len(self._items) >= self.size:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._changed.notify_all()
            return True

    def __iter__(self) -> Iterator[T]:
        """Give items in order until the queue is closed and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._items)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item

    def close(self) -> None:
        """Refuse further items; those inside can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._items)


class Statistics:
    """Readouts of a running stream over the last `WINDOW` frames; safe to read from any thread.

    The time of a stage is what its thread spends; a GPU works on after it. Rates are those of the last `seconds`.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._arrivals: deque[float] = deque(maxlen=WINDOW)
        self._departures: deque[float] = deque(maxlen=WINDOW)
        self._latencies: deque[float] = deque(maxlen=WINDOW)
        self._stages: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in STAGES}
        self.frames_in = self.frames_out = self.skipped = 0
        self.queues: tuple[FrameQueue[Any], FrameQueue[Any]] | None = None  # input and output, for their drop counters

    def arrived(self) -> None:
        with self._lock:
            self.frames_in += 1
            self._arrivals.append(time.perf_counter())

    def left(self, latency: float, skipped: bool) -> None:
        with self._lock:
            self.frames_out += 1
            self.skipped += skipped
            self._departures.append(time.perf_counter())
            self._latencies.append(latency)

    def spent(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._stages[stage].append(seconds)

    def summary(self) -> dict[str, float]:
        """Return frames in, out, dropped and skipped, fps in and out, ms per stage and latency percentiles in ms."""
        with self._lock:
            ordered = sorted(self._latencies)
            report: dict[str, float] = {
                "frames_in": self.frames_in,
                "frames_out": self.frames_out,
                "dropped_in": self.queues[0].dropped if self.queues else 0,
                "dropped_out": self.queues[1].dropped if self.queues else 0,
                "skipped": self.skipped,
                "fps_in": self.rate(self._arrivals),
                "fps_out": self.rate(self._departures),
            }
            report |= {f"{name}_ms": 1000 * seconds for name, seconds in self._means().items()}
            report |= {f"latency_p{p}_ms": 1000 * percentile(ordered, p) for p in (50, 95, 99)}
            return report

    def _means(self) -> dict[str, float]:
        return {name: sum(t) / max(len(t), 1) for name, t in self._stages.items()}

    def rate(self, times: deque[float]) -> float:
        """Return how many of `times` (perf_counter) there are a second."""
        oldest = -math.inf if self.seconds == math.inf else time.perf_counter() - self.seconds
        recent = [t for t in tuple(times) if t >= oldest]
        return (len(recent) - 1) / max(recent[-1] - recent[0], 1e-9) if len(recent) > 1 else 0.0

    def limit(self, rate: float = math.inf) -> str:
        """Return what limits the stream, in words: a stage, or the source where it gives fewer frames a second, `rate`."""
        with self._lock:
            spent = {name: s for name, s in self._means().items() if s and name != "capture"}
        if spent and rate < 0.9 / max(spent.values()):
            return f"source: gives {rate:.1f} frames per second"
        return limited_by(spent)

    def text(self) -> str:
        """Return the summary in one line."""
        s = self.summary()
        return (
            f"{s['frames_out']:.0f} of {s['frames_in']:.0f} frames, {s['fps_out']:.1f} fps (in {s['fps_in']:.1f}), latency "
            f"p50 {s['latency_p50_ms']:.0f} / p95 {s['latency_p95_ms']:.0f} / p99 {s['latency_p99_ms']:.0f} ms, encode "
            f"{s['encode_ms']:.1f} + denoise {s['denoise_ms']:.1f} + decode {s['decode_ms']:.1f} ms, dropped "
            f"{s['dropped_in'] + s['dropped_out']:.0f}, skipped {s['skipped']:.0f}"
        )


def percentile(ordered: list[float], percent: float) -> float:
    """Return the nearest-rank percentile of ascending values, 0 for none."""
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] if ordered else 0.0


@dataclass(frozen=True)
class Item:
    """What travels between the threads: `data` is an image (or what makes it), latents (None for a skipped frame), or what
    `decode` returned.

    `ready` is the CUDA event after which `data` may be read.
    """

    data: Any
    meta: Any
    captured: float
    frame: StreamFrame | None = None
    ready: Any = None


class Lane:
    """One thread's CUDA stream, so that its work overlaps with the others'; nothing on a CPU.

    Between `start` and `finish`, both called where the stream is used from, its work comes after and before what is done there.
    """

    def __init__(self, device: torch.device | str | None) -> None:
        cuda = device is not None and torch.device(device).type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None

    def start(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def finish(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def work(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def receive(self, item: Item) -> None:
        """Let this lane's work wait for the item's data, without stalling the thread."""
        receive(item.ready, item.data, None if item.frame is None else item.frame.latents)

    def mark(self) -> Any:
        return None if self.stream is None else self.stream.record_event()


class StreamThreads:
    """Runs a stream in five threads: `source` -> encode -> `batch` -> decode -> `sink`.

    Args:
        source: gives (image (H, W, 3) in [0, 1] or uint8, meta) pairs; its end ends the stream. An image in pinned memory is
            uploaded from where it is: leave it alone. In its place a function may make it, called only if it is not dropped.
        encode: image (1, H, W, 3) -> latents (1, C, h, w), scaled as the model takes them.
        batch: the `StreamBatch`; prompts and settings may be updated while it runs.
        decode: latents -> image (1, H, W, 3), or one that is on its way to the host (`Pipeline.decode_async`).
        sink: called with (image (H, W, 3), meta, StreamFrame) in order; its return value is ignored.
        chooser: leaves out frames that changed little; they come out as repeats.
        live: drop what the model cannot take in time; off, the source waits and no frame is lost.
        queue: frames that may wait before each thread.
        device: give the model's CUDA device for a stream per thread.
        statistics: where its readouts go, by default its own.

    The threads run in the context (`contextvars`) in which they were made.
    """

    def __init__(
        self, source: Iterable[tuple[Tensor | Callable[[], Tensor], Any]], encode: Callable[[Tensor], Tensor], batch: StreamBatch,
        decode: Callable[[Tensor], Tensor | Arrival], sink: Callable[[Tensor, Any, StreamFrame], Any],
        chooser: SimilarityFilter | None = None, live: bool = True, queue: int = 2,
        device: torch.device | str | None = None, statistics: Statistics | None = None,
    ) -> None:  # fmt: skip
        self.source, self.encode, self.batch, self.decode, self.sink = source, encode, batch, decode, sink
        self.chooser = chooser
        self.statistics = statistics or Statistics()
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._context = contextvars.copy_context()
        # Live frames wait in one place only, the latest-wins slot at the entrance.
        self._images: FrameQueue[Item] = FrameQueue(1 if live else queue, live)
        self._latents: FrameQueue[Item] = FrameQueue(1 if live else queue, live=False)
        self._denoised: FrameQueue[Item] = FrameQueue(queue, live=False)
        self._results: FrameQueue[Item] = FrameQueue(max(queue, 4), live)
        self.statistics.queues = self._images, self._results
        self._lanes = {name: Lane(device) for name in STAGES}
        self._size: torch.Size | None = None
        self._shown: Tensor | Arrival | None = None
        stages = (
            ("capture", self._capture, (), self._images),
            ("encode", self._encode, self._images, self._latents),
            ("denoise", self._denoise, self._latents, self._denoised),
            ("decode", self._decode, self._denoised, self._results),
            ("publish", self._publish, self._results, None),
        )
        self._threads = [
            threading.Thread(target=self._run, args=stage, name=f"slipstream-{stage[0]}", daemon=True)
            for stage in stages
        ]

    def start(self) -> StreamThreads:
        for lane in self._lanes.values():
            lane.start()
        for thread in self._threads:
            thread.start()
        return self

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """End the stream after the pass that is running; frames that are finished still come out."""
        self._stop.set()
        self._images.close()

    def wait(self, timeout: float | None = None) -> dict[str, float]:
        """Wait for the end and return the statistics; raises what ended the stream, with its traceback."""
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(end - time.monotonic(), 0))
        if self.running:
            raise TimeoutError(f"The stream still runs after {timeout} s. Call stop() first.")
        for lane in self._lanes.values():
            lane.finish()
        if self.error is not None:
            raise self.error
        return self.statistics.summary()

    def __enter__(self) -> StreamThreads:
        return self.start()

    def __exit__(self, *exc: Any) -> None:
        self.stop()
        for thread in self._threads:
            # A camera that gives no more frames holds its thread for ever; that one is a daemon and may be left behind.
            thread.join(5.0 if thread.name.endswith("capture") else None)
        for lane in self._lanes.values():
            lane.finish()

    def _run(
        self, name: str, stage: Callable[..., Any], inbox: Iterable[Item], outbox: FrameQueue[Item] | None
    ) -> None:
        """Run one thread; whatever goes wrong ends the input, and what is already further down comes out."""
        try:
            with torch.no_grad(), self._lanes[name].work():
                self._context.copy().run(stage, inbox, outbox)
        except BaseException as error:
            self.error = self.error or error
            self._stop.set()
            self._images.close()
        finally:
            for queue in (inbox, outbox):
                if isinstance(queue, FrameQueue):
                    queue.close()

    def _capture(self, inbox: Any, outbox: FrameQueue[Item]) -> None:
        frames = iter(self.source)
        while not self._stop.is_set():
            begun = time.perf_counter()
            pair = next(frames, None)
            now = time.perf_counter()
            if pair is None:
                return
            self.statistics.arrived()
            self.statistics.spent("capture", now - begun)
            if not outbox.put(Item(*pair, captured=now)):
                return

    def _encode(self, inbox: Iterable[Item], outbox: FrameQueue[Item]) -> None:
        for item in inbox:
            begun = time.perf_counter()
            image = item.data() if callable(item.data) else item.data
            if self._size is not None and image.shape != self._size:
                raise ValueError(
                    f"Expected frames of size {tuple(self._size)} as at the start, but got {tuple(image.shape)}. Resize them."
                )
            self._size = image.shape
            check_image(image, finite=image.device.type == "cpu")
            skip = self.chooser is not None and not self.chooser.keep(unchecked_pixels(image))
            latents = None if skip else self.encode(image[None])
            self.statistics.spent("encode", time.perf_counter() - begun)
            if not outbox.put(replace(item, data=latents, ready=self._lanes["encode"].mark())):
                return

    def _denoise(self, inbox: Iterable[Item], outbox: FrameQueue[Item]) -> None:
        lane, batch = self._lanes["denoise"], self.batch
        for item in inbox:
            if self._stop.is_set() and self.error is None:
                return
            begun = time.perf_counter()
            lane.receive(item)
            frames = batch.skip(item) if item.data is None else batch.push(item.data, [item])
            self.statistics.spent("denoise", time.perf_counter() - begun)
            self._pass_on(frames, outbox)
        while batch.in_flight and not (self._stop.is_set() and self.error is None):
            self._pass_on(batch.advance(), outbox)

    def _pass_on(self, frames: list[StreamFrame], outbox: FrameQueue[Item]) -> None:
        ready = self._lanes["denoise"].mark()
        for frame in frames:
            item: Item = frame.meta
            outbox.put(replace(item, data=None, frame=replace(frame, meta=item.meta), ready=ready))

    def _decode(self, inbox: Iterable[Item], outbox: FrameQueue[Item]) -> None:
        ahead: deque[Any] = deque()
        for item in inbox:
            begun = time.perf_counter()
            self._lanes["decode"].receive(item)
            assert item.frame is not None
            if not item.frame.repeated or self._shown is None:
                self._shown = self.decode(item.frame.latents)
            self.statistics.spent("decode", time.perf_counter() - begun)
            ready = self._lanes["decode"].mark()
            outbox.put(replace(item, data=self._shown, ready=ready))
            if ready is not None:
                ahead.append(ready)
            if len(ahead) > AHEAD:
                ahead.popleft().synchronize()

    def _publish(self, inbox: Iterable[Item], outbox: Any) -> None:
        for item in inbox:
            begun = time.perf_counter()
            if item.ready is not None:
                item.ready.synchronize()
            self._lanes["publish"].receive(item)
            assert item.frame is not None
            image = item.data.get() if isinstance(item.data, Arrival) else item.data
            now = time.perf_counter()
            frame = replace(item.frame, arrived=item.captured, latency=now - item.captured)
            self.sink(image[0], item.meta, frame)
            self.statistics.left(frame.latency, frame.repeated)
            self.statistics.spent("publish", time.perf_counter() - begun)
