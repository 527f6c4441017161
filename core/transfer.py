"""Between host memory, a device and its streams, so that neither the host nor the device waits for the other.

Pinned memory comes from torch's own pool: it keeps a block until the copy that uses it is done, then gives it out again, so a
steady stream allocates none and no block is ever overwritten too early.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import tensors_in
from .checks import refuse_non_finite


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return `tensor` on `device`, in `dtype`; nothing waits on the way from host memory to a CUDA device.

    A tensor that is pinned already is read where it is: leave it alone until the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Laid out and cast on the wrong side, it would travel from memory that is not pinned.
        tensor = tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


@dataclass(frozen=True, eq=False)
class Arrival:
    """A tensor on its way to host memory.

    `bad` counts NaN and infinite values in each tensor of `checked` (name and shape); `ready` is the CUDA event after which both
    can be read, None when they can be now.
    """

    tensor: Tensor
    bad: Tensor
    checked: tuple[tuple[str, tuple[int, ...]], ...] = ()
    ready: Any = None

    def wait(self) -> None:
        """Wait for this tensor, and for nothing that was begun after it."""
        if self.ready is not None:
            self.ready.synchronize()

    def get(self) -> Tensor:
        """Return the tensor in host memory; raises ValueError for values that are not finite."""
        self.wait()
        for (name, shape), count in zip(self.checked, self.bad.tolist()):
            refuse_non_finite(name, count, shape)
        return self.tensor


def to_host(tensor: Tensor, **checked: Tensor) -> Arrival:
    """Begin to copy `tensor` to host memory; NaN in the `checked` tensors is counted where they are and raised on arrival."""
    counts = [to_device((~torch.isfinite(t)).sum(), tensor.device) for t in checked.values()]
    bad = torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64, device=tensor.device)
    shapes = tuple((name, tuple(t.shape)) for name, t in checked.items())
    if not tensor.is_cuda:
        return Arrival(tensor.cpu(), bad.cpu(), shapes)
    copies = _to_pinned(tensor), _to_pinned(bad)
    return Arrival(*copies, shapes, torch.cuda.current_stream(tensor.device).record_event())


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor.contiguous(), non_blocking=True)


def mark(*values: Any) -> Any:
    """Return an event after everything the current stream was given so far, or None when `values` hold no CUDA tensor."""
    device = next((t.device for t in tensors_in(values) if t.is_cuda), None)
    return None if device is None else torch.cuda.current_stream(device).record_event()


def receive(ready: Any, *values: Any) -> None:
    """Let the current stream wait for the event `ready`, and keep the memory of `values` until it is done with them.

    For what another stream made: without it, memory that is let go there could be given out while it is still read here.
    """
    for tensor in tensors_in(values) if ready is not None else ():
        if tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device)
            stream.wait_event(ready)
            tensor.record_stream(stream)


class Lane:
    """A CUDA stream of a device, so that its work overlaps with that of others; nothing on a CPU.

    Between `start` and `finish`, both called where the stream is used from, its work comes after and before what is done there.
    `shared` takes the current stream of the device in place of a new one.
    """

    def __init__(self, device: torch.device | str | None, shared: bool = False) -> None:
        self.stream: Any = None
        if device is not None and torch.device(device).type == "cuda":
            self.stream = torch.cuda.current_stream(device) if shared else torch.cuda.Stream(device)

    def start(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def finish(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def work(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def mark(self) -> Any:
        return None if self.stream is None else self.stream.record_event()


class DeviceWork:
    """Threads that work with a device side by side, and at times one alone, which records a CUDA graph or moves weights.

    With the allocator cudaMallocAsync, ComfyUI's default on NVIDIA cards, torch takes whatever any thread allocates and frees meanwhile
    for a part of the recording. The recording fails, and freeing after that ends the process.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._beside = Counter[int]()  # how often each thread has entered
        self._waiting = 0
        self._alone = 0  # the thread that is

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Within the context no other thread is alone. Wait for no other thread in it, and for no lock that is held while one records."""
        me = threading.get_ident()
        with self._changed:
            inside = me in self._beside or me == self._alone
            self._changed.wait_for(lambda: inside or not (self._alone or self._waiting))
            self._beside[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._beside[me] -= 1
                self._beside += Counter()  # without those that have left
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context no other thread is inside; this one may be beside others before and after it."""
        me, mine = threading.get_ident(), 0
        try:
            with self._changed:
                mine = self._beside.pop(me, 0)
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: not (self._alone or self._beside))
                    self._alone = me
                finally:
                    self._waiting -= 1
            yield
        finally:
            with self._changed:
                if self._alone == me:  # not where the wait was cancelled
                    self._alone = 0
                if mine:
                    self._beside[me] = mine
                self._changed.notify_all()


DEVICE_WORK = DeviceWork()
