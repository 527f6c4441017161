"""Queues, statistics and threads of a stream: capture, encode, denoise, decode and publish overlap.

Live input is latest-wins: what the model cannot take in time is dropped at the entrance and counted, so latency never grows.
Output is bounded and drops its oldest frame. A file is read with back-pressure instead and loses nothing.
"""

from __future__ import annotations

import contextvars
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..core.checks import check_integer
from ..core.doctor import limited_by
from ..core.tensors import check_image, unchecked_pixels
from ..core.transfer import DEVICE_WORK, Arrival, Lane, receive
from .batch import StreamBatch, StreamFrame
from .lanes import StreamLanes
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

    The time of a stage is what its thread spends; a GPU works on after it. Rates and times are those of the last `seconds`.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._arrivals: deque[float] = deque(maxlen=WINDOW)
        self._departures: deque[float] = deque(maxlen=WINDOW)
        # Pairs: when it was, and how long it took.
        self._latencies: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._stages: dict[str, deque[tuple[float, float]]] = {name: deque(maxlen=WINDOW) for name in STAGES}
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
            now = time.perf_counter()
            self._departures.append(now)
            self._latencies.append((now, latency))

    def spent(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._stages[stage].append((time.perf_counter(), seconds))

    def summary(self) -> dict[str, float]:
        """Return frames in, out, dropped and skipped, fps in and out, ms per stage and latency percentiles in ms."""
        with self._lock:
            ordered = sorted(self._recent(self._latencies))
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
        recent = {name: self._recent(times) for name, times in self._stages.items()}
        return {name: sum(times) / max(len(times), 1) for name, times in recent.items()}

    @property
    def _oldest(self) -> float:
        return -math.inf if self.seconds == math.inf else time.perf_counter() - self.seconds

    def _recent(self, pairs: deque[tuple[float, float]]) -> list[float]:
        oldest = self._oldest
        return [value for at, value in tuple(pairs) if at >= oldest]

    def rate(self, times: deque[float]) -> float:
        """Return how many of `times` (perf_counter) there are a second."""
        oldest = self._oldest
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

    `ready` is the CUDA event after which `data` may be read; `row` is the place of the image in what `decode` returned.
    """

    data: Any
    meta: Any
    captured: float
    frame: StreamFrame | None = None
    ready: Any = None
    row: int = 0


class StreamThreads:
    """Runs a stream in five threads: `source` -> encode -> `batch` -> decode -> `sink`.

    Args:
        source: gives (image (H, W, 3) in [0, 1] or uint8, meta) pairs; its end ends the stream. An image in pinned memory is
            uploaded from where it is: leave it alone. In its place a function may make it, called only if it is not dropped.
        encode: images (B, H, W, 3) -> latents (B, C, h, w), scaled as the model takes them; B is `frame_group`, at the end less.
        batch: the `StreamBatch` or `StreamLanes`; prompts and settings may be updated while it runs.
        decode: latents (B, C, h, w) -> images (B, H, W, 3), or such that are on their way to the host (`Pipeline.decode_async`);
            frames that leave together are decoded together.
        sink: called with (image (H, W, 3), meta, StreamFrame) in order; its return value is ignored.
        chooser: leaves out frames that changed little; they come out as repeats.
        live: drop what the model cannot take in time; off, the source waits and no frame is lost.
        queue: frames that may wait before each thread.
        device: give the model's CUDA device for a stream per thread.
        statistics: where its readouts go, by default its own.
        lanes: the CUDA stream of each of some threads, by the name of its stage, in place of one of its own.

    The threads run in the context (`contextvars`) in which they were made.
    """

    def __init__(
        self, source: Iterable[tuple[Tensor | Callable[[], Tensor], Any]], encode: Callable[[Tensor], Tensor],
        batch: StreamBatch | StreamLanes,
        decode: Callable[[Tensor], Tensor | Arrival], sink: Callable[[Tensor, Any, StreamFrame], Any],
        chooser: SimilarityFilter | None = None, live: bool = True, queue: int = 2,
        device: torch.device | str | None = None, statistics: Statistics | None = None,
        lanes: Mapping[str, Lane] | None = None,
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
        self._denoised: FrameQueue[list[Item]] = FrameQueue(queue, live=False)
        self._results: FrameQueue[Item] = FrameQueue(max(queue, 4), live)
        self.statistics.queues = self._images, self._results
        self._lanes = {name: (lanes or {}).get(name) or Lane(device) for name in STAGES}
        self._size: torch.Size | None = None
        self._shown: tuple[Tensor | Arrival, int] | None = None
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

    def _run(self, name: str, stage: Callable[..., Any], inbox: Iterable[Any], outbox: FrameQueue[Any] | None) -> None:
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
        for items in self._grouped(inbox):
            begun = time.perf_counter()
            kept = [self._wanted(item) for item in items]
            images = [image for image in kept if image is not None]
            with DEVICE_WORK.beside():
                latents = iter(
                    self.encode(images[0][None] if len(images) == 1 else torch.stack(images)).split(1) if images else ()
                )
                ready = self._lanes["encode"].mark()
            self._spent("encode", begun, len(items))
            for item, image in zip(items, kept):
                if not outbox.put(replace(item, data=None if image is None else next(latents), ready=ready)):
                    return

    def _grouped(self, inbox: Iterable[Item]) -> Iterator[list[Item]]:
        """Yield items as they enter the model: as many at once as travel together, the rest at the end."""
        items: list[Item] = []
        for item in inbox:
            items.append(item)
            if len(items) >= self.batch.config.frame_group:
                yield items
                items = []
        if items:
            yield items

    def _wanted(self, item: Item) -> Tensor | None:
        """Return the image of an item, None where it is alike enough to be skipped."""
        image: Tensor = item.data() if callable(item.data) else item.data
        if self._size is not None and image.shape != self._size:
            raise ValueError(
                f"Expected frames of size {tuple(self._size)} as at the start, but got {tuple(image.shape)}. Resize them."
            )
        self._size = image.shape
        check_image(image, finite=image.device.type == "cpu")
        return None if self.chooser is not None and not self.chooser.keep(unchecked_pixels(image)) else image

    def _spent(self, stage: str, begun: float, frames: int) -> None:
        """Take note of the time of a stage, for each of some frames."""
        seconds = (time.perf_counter() - begun) / max(frames, 1)
        for _ in range(frames):
            self.statistics.spent(stage, seconds)

    def _denoise(self, inbox: Iterable[Item], outbox: FrameQueue[list[Item]]) -> None:
        lane, batch = self._lanes["denoise"], self.batch
        for item in inbox:
            if self._stop.is_set() and self.error is None:
                return
            begun = time.perf_counter()
            with DEVICE_WORK.beside():
                receive(item.ready, item.data)
                frames = batch.skip(item) if item.data is None else batch.push(item.data, [item])
            self.statistics.spent("denoise", time.perf_counter() - begun)
            self._pass_on(frames, lane, outbox)
        while batch.in_flight and not (self._stop.is_set() and self.error is None):
            with DEVICE_WORK.beside():
                frames = batch.advance()
            self._pass_on(frames, lane, outbox)

    def _pass_on(self, frames: list[StreamFrame], lane: Lane, outbox: FrameQueue[list[Item]]) -> None:
        """Hand on frames; those that one pass has finished stay together."""
        mark = lane.mark()
        ready = [frame.ready or mark for frame in frames]
        items = [replace(f.meta, data=None, frame=replace(f, meta=f.meta.meta), ready=r) for f, r in zip(frames, ready)]
        for _, together in itertools.groupby(items, key=lambda item: id(item.ready)):
            outbox.put(list(together))

    def _decode(self, inbox: Iterable[list[Item]], outbox: FrameQueue[Item]) -> None:
        ahead: deque[Any] = deque()
        for items in inbox:
            begun = time.perf_counter()
            with DEVICE_WORK.beside():
                shown = self._decoded(items)
                ready = self._lanes["decode"].mark()
            self._spent("decode", begun, len(items))
            for item, (image, row) in zip(items, shown):
                outbox.put(replace(item, data=image, row=row, ready=ready))
            if ready is not None:
                ahead.append(ready)
            if len(ahead) > AHEAD:
                ahead.popleft().synchronize()

    def _decoded(self, items: list[Item]) -> list[tuple[Tensor | Arrival, int]]:
        """Return for each item what its image is in, and where: a repeated frame has that of the frame before it."""
        frames = [item.frame for item in items if item.frame is not None]
        new = [i for i, frame in enumerate(frames) if not frame.repeated or (self._shown is None and i == 0)]
        latents = [frames[i].latents for i in new]
        receive(items[0].ready, *latents)
        image = self.decode(latents[0] if len(latents) == 1 else torch.cat(latents)) if latents else None
        shown = []
        for i in range(len(frames)):
            if image is not None and i in new:
                self._shown = image, new.index(i)
            assert self._shown is not None
            shown.append(self._shown)
        return shown

    def _publish(self, inbox: Iterable[Item], outbox: Any) -> None:
        for item in inbox:
            begun = time.perf_counter()
            if item.ready is not None:
                item.ready.synchronize()
            assert item.frame is not None
            with DEVICE_WORK.beside():
                receive(item.ready, item.data)
                image = item.data.get() if isinstance(item.data, Arrival) else item.data
            now = time.perf_counter()
            frame = replace(item.frame, arrived=item.captured, latency=now - item.captured)
            self.sink(image[item.row], item.meta, frame)
            self.statistics.left(frame.latency, frame.repeated)
            self.statistics.spent("publish", time.perf_counter() - begun)
