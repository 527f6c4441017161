"""Frames side by side: several Stream Batches, each with a recording and a CUDA stream of its own, that take frames in turn.

One pass of a small network does not fill a GPU. Two ways lead out: lanes, in which passes of different frames run at the same time,
and groups (`StreamConfig.frame_group`), in which several frames share a pass. Both give the images of a single Stream Batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_choice, check_integer
from ..core.denoiser import Denoiser
from ..core.transfer import Lane, mark, receive
from .batch import StreamBatch, StreamFrame
from .config import StreamConfig

PRIORITIES = ("latency", "throughput")
FULL = 4  # frames in a network call, or calls of one row side by side, at which a large GPU is busy
ROWS = 16  # of a network call at most, for the memory of a pass
PROCESSORS = 32  # of a GPU, that one of those is for: an H200 has 132
MOST = 8  # lanes
CHOICES = (*PRIORITIES, "1", "2", "3", "4")  # where one is chosen from a list


@dataclass(frozen=True)
class Width:
    """How many frames are at work at once: `lanes` passes side by side, of `group` frames each; `reason` why not more.

    `no_delay` tells that lanes are used only while no frame waits for one behind it.
    """

    lanes: int = 1
    group: int = 1
    reason: str = ""
    no_delay: bool = False

    @property
    def delay(self) -> int:
        """Frames that a frame waits for at most, because they enter with it."""
        return self.group - 1


ALONE = Width()


def room_for(device: torch.device, acceleration: str) -> int:
    """Return how many passes of one row a device has room for side by side: 1 to `FULL` where they are recorded on CUDA, else 1."""
    if device.type != "cuda" or acceleration == "none":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(max(processors // PROCESSORS, 1), FULL)


def width_of(priority: str | int, config: StreamConfig, room: int = 1) -> Width:
    """Return what a priority means for a stream.

    "latency": each frame alone, as soon as it is there; at one step in `room` lanes (see `room_for`), which no frame waits for.
    "throughput": as many frames in a call as fill a GPU (see `group_of`). A number: so many lanes. Frames that depend on each other go one
    by one.
    """
    if priority == "latency":
        alone = config.stages > 1 or coupled(config)
        return Width(lanes=1 if alone else room, no_delay=True)
    if isinstance(priority, str) and not priority.isdigit():
        check_choice("priority", priority, PRIORITIES)
        wanted = Width(group=group_of(config.stages))
    else:
        check_integer("priority", int(priority), 1, MOST)
        wanted = Width(lanes=int(priority))
    tie = coupled(config) if (wanted.lanes, wanted.group) != (1, 1) else ""
    return Width(reason=f"{tie}, so frames go one by one") if tie else wanted


def group_of(steps: int) -> int:
    """Return how many frames share a network call for the most frames a second: four, fewer with more than four steps."""
    return min(max(ROWS // max(steps, 1), 1), FULL)


def coupled(config: StreamConfig) -> str:
    """Return which setting makes the image of a frame depend on others, "" for none."""
    for name in ("feedback", "motion", "cross_frame"):
        if getattr(config, name):
            return f"`{name}` ties each frame to others"
    return (
        "`renoise` fresh draws noise in the order of the passes"
        if config.renoise == "fresh" and config.stages > 1
        else ""
    )


class StreamLanes:
    """Stream Batches side by side, with the interface of one: frames go to them in turn and come out in order.

    A frame waits for N - 1 later frames of its own lane. Frames that come out name the event after which other CUDA streams may read
    them (`StreamFrame.ready`): none waits for another lane.

    Args:
        batches: of one config, each with a model of its own: recordings of one network share its weights, not their memory.
        no_delay: frames that depend on each other, or take several steps, go through the first lane alone. Else the former raise
            ValueError, and the latter wait for frames of their own lane.
    """

    def __init__(self, batches: Sequence[StreamBatch], no_delay: bool = False) -> None:
        self.batches, self.no_delay = tuple(batches), no_delay
        self._check(batches[0].config)
        self._lanes = [Lane(getattr(batch.model, "device", None)) for batch in batches]
        self._lock = threading.RLock()
        self._entered: list[deque[int]] = [deque() for _ in batches]  # numbers of the frames in each lane, oldest first
        self._done: dict[int, StreamFrame] = {}
        self._skipped: dict[int, tuple[Any, float]] = {}
        self._arrived = self._pushed = self._next = 0
        self._newest: StreamFrame | None = None
        for lane in self._lanes:
            lane.start()

    @property
    def config(self) -> StreamConfig:
        return self.batches[0].config

    @property
    def cond(self) -> Any:
        return self.batches[0].cond

    @property
    def passes(self) -> int:
        return sum(batch.passes for batch in self.batches)

    @property
    def lanes(self) -> int:
        """Lanes that take the next frames."""
        alone = self.no_delay and (self.config.stages > 1 or coupled(self.config))
        return 1 if alone else len(self.batches)

    def _check(self, config: StreamConfig) -> None:
        tie = "" if self.no_delay or len(self.batches) == 1 else coupled(config)
        if tie:
            raise ValueError(
                f"Expected frames that do not depend on each other for several lanes, but {tie}. Use one lane."
            )

    @property
    def capacity(self) -> int:
        return sum(batch.capacity for batch in self.batches[: self.lanes])

    @property
    def in_flight(self) -> int:
        """Frames that were pushed or skipped and have not come out yet."""
        return self._arrived - self._next

    def push(self, latents: Tensor, meta: Any = None, cond: Any = None, uncond: Any = None) -> list[StreamFrame]:
        """See `StreamBatch.push`."""
        with self._lock:
            if not isinstance(latents, Tensor) or len(latents) <= 1:
                self._push(latents, meta, cond, uncond)
                return self._hand_out()
            metas = meta if isinstance(meta, list) else [meta] * len(latents)
            for i, row in enumerate(latents.split(1)):
                own = (c if c is None or c.rows == 1 else c.take([i % c.rows]) for c in (cond, uncond))
                self._push(row, metas[i], *own)
            return self._hand_out()

    def _push(self, latents: Tensor, meta: Any, cond: Any, uncond: Any) -> None:
        turn = self._pushed // self.config.frame_group % self.lanes
        ready = mark(latents, cond, uncond)

        def work(batch: StreamBatch) -> list[StreamFrame]:
            receive(ready, latents, cond, uncond)
            return batch.push(latents, meta, cond, uncond)

        self._work(turn, work)

    def _work(self, turn: int, work: Callable[[StreamBatch], list[StreamFrame]]) -> None:
        """Run `work` on a lane's CUDA stream and keep what it finished; a frame that entered counts also when its pass failed."""
        batch, lane, found, before = (
            self.batches[turn],
            self._lanes[turn],
            list[StreamFrame](),
            self.batches[turn].in_flight,
        )
        try:
            with lane.work():
                found = work(batch)
                event = lane.mark() if found else None
        finally:
            for _ in range(batch.in_flight + len(found) - before):
                self._entered[turn].append(self._arrived)
                self._arrived, self._pushed = self._arrived + 1, self._pushed + 1
        for frame in found:
            number = self._entered[turn].popleft()
            self._done[number] = replace(frame, id=number, ready=event)

    def _hand_out(self) -> list[StreamFrame]:
        """Return what is finished and in its turn."""
        finished, now = [], time.perf_counter()
        while self._next in self._done or (self._next in self._skipped and self._newest is not None):
            if self._next in self._done:
                frame = self._done.pop(self._next)
                self._newest = replace(frame, latency=now - frame.arrived)
                finished.append(self._newest)
            else:
                assert self._newest is not None
                meta, arrived = self._skipped.pop(self._next)
                finished.append(
                    replace(
                        self._newest,
                        id=self._next,
                        meta=meta,
                        age=0,
                        arrived=arrived,
                        latency=now - arrived,
                        repeated=True,
                    )
                )
            self._next += 1
        return finished

    def _advance(self) -> None:
        busy = [turn for turn, batch in enumerate(self.batches) if batch.in_flight]
        if busy:
            self._work(min(busy, key=lambda turn: self._entered[turn][0]), StreamBatch.advance)

    def advance(self) -> list[StreamFrame]:
        """Run one pass for the oldest frame in flight, without a new one, and return what finished."""
        with self._lock:
            self._advance()
            return self._hand_out()

    def skip(self, meta: Any = None) -> list[StreamFrame]:
        """See `StreamBatch.skip`."""
        with self._lock:
            if not self._arrived:
                raise ValueError("Expected a frame before the first skip, but got none. Push the first frame.")
            self._advance()
            self._skipped[self._arrived] = meta, time.perf_counter()
            self._arrived += 1
            return self._hand_out()

    def drain(self) -> list[StreamFrame]:
        """Finish all frames in flight and return them; the stream can be pushed to again."""
        with self._lock:
            while any(batch.in_flight for batch in self.batches):
                self._advance()
            return self._hand_out()

    def clear(self) -> None:
        """Drop all frames in flight and the memory of earlier ones."""
        with self._lock:
            for batch in self.batches:
                batch.clear()
            for numbers in self._entered:
                numbers.clear()
            self._done.clear()
            self._skipped.clear()
            self._next, self._newest = self._arrived, None

    def use(self, models: Sequence[Denoiser]) -> None:
        """Run the next passes on other models, one for each lane."""
        with self._lock:
            for batch, model in zip(self.batches, models):
                batch.use([model])

    def update(self, cond: Any = None, uncond: Any = None, **settings: Any) -> None:
        """See `StreamBatch.update`; raises ValueError also for a setting that ties frames together."""
        with self._lock:
            self._check(self.config.changed(**settings))
            for batch in self.batches:
                batch.update(cond, uncond, **settings)
