"""One byte-bounded cache for models, prompt embeddings and inversions: device, then host memory, then out."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import pathlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from .files import stamp
from .identity import Identity, identify

log = logging.getLogger(__name__)

T = TypeVar("T")
GIB = 1 << 30


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a tensor, module, dataclass, dict, list or tuple, however nested, in a fixed order.

    Of anything else those in its `held_tensors`, where it has that.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        yield from tensors_in([getattr(value, f.name) for f in fields(value)])
    else:
        yield from getattr(value, "held_tensors", ())


def footprint(value: Any) -> tuple[int, int]:
    """Return the bytes that the tensors of `value` take on devices and in host memory; a shared tensor counts once."""
    unique = {id(t): t for t in tensors_in(value)}.values()
    on_host = sum(t.nbytes for t in unique if t.device.type == "cpu")
    return sum(t.nbytes for t in unique) - on_host, on_host


def devices_of(value: Any) -> list[torch.device]:
    return [t.device for t in tensors_in(value)]


def moved(value: T, devices: Sequence[torch.device]) -> T:
    """Return a copy of `value` with its tensors on `devices`, given in the order of `tensors_in`; tensors already there are shared.

    `value` itself stays as it is: whoever still computes with it must not find its weights on another device.
    """
    memo: dict[int, Any] = {}
    for tensor, device in zip(tensors_in(value), devices):
        if id(tensor) not in memo:
            there = tensor if tensor.device == device else tensor.detach().to(device)
            is_new_parameter = isinstance(tensor, nn.Parameter) and there is not tensor
            memo[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_new_parameter else there
    return copy.deepcopy(value, memo)


def is_finite(value: Any) -> bool:
    """Whether no tensor in `value` holds NaN or infinity."""
    # The extremes are found in one pass without a copy, and NaN is one.
    tensors = (t for t in tensors_in(value) if t.is_floating_point() and t.numel() and not t.is_meta)
    return all(bool(torch.stack(torch.aminmax(t)).isfinite().all()) for t in tensors)


@dataclass
class _Entry:
    value: Any
    device_bytes: int
    host_bytes: int
    # Where the tensors belong while the entry is parked in host memory, else None.
    homes: list[torch.device] | None = None
    users: WeakSet[Any] = field(default_factory=WeakSet)


class Cache:
    """A thread-safe least-recently-used cache with one bound for device bytes and one for host bytes.

    What exceeds `device_bytes` is copied to host memory, what exceeds `host_bytes` is forgotten. A value that somebody still
    holds is never built again, even when the cache has forgotten it. A function as a bound is asked when the first value lies
    there.

    Args:
        finite: give values with NaN or infinity, but do not keep them.
        stamp: tells whether a value is still as it was built; one that its users have changed is built again.
    """

    def __init__(
        self, name: str, device_bytes: int | Callable[[], int], host_bytes: int | Callable[[], int], finite: bool = False,
        stamp: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.finite, self.stamp = name, finite, stamp
        self._device_bytes, self._host_bytes = device_bytes, host_bytes
        self._lock = threading.RLock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # oldest first
        self._alive: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
        self._building: WeakValueDictionary[Hashable, _KeyLock] = WeakValueDictionary()
        self._stamps: dict[Hashable, Any] = {}
        self._cleared = 0
        CACHES.add(self)

    @property
    def device_bytes(self) -> int:
        """The bound for bytes on devices."""
        if callable(self._device_bytes):
            self._device_bytes = self._device_bytes()
        return self._device_bytes

    @property
    def host_bytes(self) -> int:
        """The bound for bytes in host memory."""
        if callable(self._host_bytes):
            self._host_bytes = self._host_bytes()
        return self._host_bytes

    def get(
        self, key: Hashable, build: Callable[[], T], user: Any = None, warn: Callable[[str], object] = log.warning
    ) -> T:
        """Return the value of `key`, built once however many threads ask; a failed build is tried again by the next caller.

        An `Identity` with parts that cannot be named is no key: the value is built, and `warn` gets one sentence. `user`: see
        `hold`.
        """
        if isinstance(key, Identity) and key.unnamed:
            warn(key.warning)
            return build()
        with self._lock:
            building = self._building.setdefault(key, _KeyLock())
            cleared = self._cleared
        with building.lock:
            value = self._find(key, user)
            if value is None:
                value = build()
                # What was asked for before the cache was emptied belongs to what was to go.
                if cleared == self._cleared and (not self.finite or is_finite(value)):
                    self._stamps[key] = None if self.stamp is None else self.stamp(value)
                    self._put(key, value, user)
            return value

    def hold(self, key: Hashable, user: Any) -> None:
        """Mark the value of `key` as in use while `user` lives: moving it would free nothing, so it is only forgotten."""
        with self._lock:
            if key in self._entries:
                self._entries[key].users.add(user)

    def used(self) -> tuple[int, int]:
        """Return the bytes kept on devices and in host memory."""
        with self._lock:
            entries = self._entries.values()
            return sum(e.device_bytes for e in entries), sum(e.host_bytes for e in entries)

    def __repr__(self) -> str:
        on_device, on_host = (
            f"{used / GIB:.2f} of {bound / GIB:.2f} GiB"
            for used, bound in zip(self.used(), (self.device_bytes, self.host_bytes))
        )
        return f"<cache of {len(self)} {self.name}: {on_device} on devices, {on_host} in host memory>"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def clear(self) -> None:
        """Forget everything, and do not keep what is being built."""
        with self._lock:
            self._cleared += 1
            self._entries.clear()
            self._stamps.clear()

    def leave_device(self) -> int:
        """Move everything off the device and return the bytes given up there."""
        with self._lock:
            before, _ = self.used()
            self._shrink(0, self.host_bytes)
            return before - self.used()[0]

    def _find(self, key: Hashable, user: Any) -> Any:
        with self._lock:
            entry, value = self._entries.pop(key, None), self._alive.get(key)
            if value is None and entry is not None:
                value = entry.value
            if value is not None and self.stamp is not None and self.stamp(value) != self._stamps.get(key):
                self._alive.pop(key, None)
                return None
            if value is None:
                return None
            if entry is not None and entry.value is value and entry.homes is not None:
                value = moved(value, entry.homes)
            # Measured again: what is kept may have grown.
            self._put(key, value, user, *([] if entry is None else entry.users))
            return value

    def _put(self, key: Hashable, value: Any, *users: Any) -> None:
        with self._lock:
            entry = self._entries[key] = _Entry(value, *footprint(value))
            entry.users.update(user for user in users if user is not None)
            self._entries.move_to_end(key)
            try:
                self._alive[key] = value
            except TypeError:  # tuples, lists and dicts cannot be referenced weakly
                pass
            self._shrink(self.device_bytes if self.used()[0] else 0, self.host_bytes)

    def _shrink(self, device_bytes: int, host_bytes: int) -> None:
        for key in list(self._entries):
            if self.used()[0] <= device_bytes:
                break
            if self._entries[key].device_bytes:
                self._park(key)
        for key in list(self._entries):
            if self.used()[1] <= host_bytes:
                break
            if self._entries[key].host_bytes:
                del self._entries[key]

    def _park(self, key: Hashable) -> None:
        """Move one entry to host memory, or forget it where that frees nothing or does not fit."""
        entry = self._entries[key]
        if entry.users or entry.device_bytes + entry.host_bytes > self.host_bytes:
            del self._entries[key]
            return
        homes = devices_of(entry.value)
        value = moved(entry.value, [torch.device("cpu")] * len(homes))
        self._entries[key] = _Entry(value, *footprint(value), homes)


class _KeyLock:
    """A lock that a WeakValueDictionary can hold: it goes when no thread wants its key."""

    def __init__(self) -> None:
        self.lock = threading.RLock()


def host_memory() -> int:
    """Return the bytes of host memory that this process may use: the machine's, or its container's."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except AttributeError:
        total = _windows_memory()
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(pathlib.Path(limit).read_text()))
        except (OSError, ValueError):  # no container, or one without a limit ("max")
            continue
    return int(total)


def _windows_memory() -> int:
    import ctypes

    status = (
        ctypes.c_uint64 * 8
    )()  # MEMORYSTATUSEX: its own size and the load, then counters, of which the first is the total
    ctypes.c_uint32.from_buffer(status).value = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status[1])


def device_memory() -> int:
    """Return the bytes of memory of the CUDA card, or of host memory where there is none."""
    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else host_memory()


def share(memory: Callable[[], int], part: float) -> Callable[[], int]:
    """Return a bound for `Cache`: a part of a memory, asked for when it is needed."""
    return lambda: int(memory() * part)


CACHES: WeakSet[Cache] = WeakSet()

# The largest models are half of what they run on; prompts and inversions must leave room for them.
MODELS = Cache("models", share(device_memory, 3 / 4), share(host_memory, 1 / 2), stamp=identify)
PROMPTS = Cache("prompt embeddings", share(device_memory, 1 / 64), share(host_memory, 1 / 64), finite=True)
INVERSIONS = Cache("inversions", share(device_memory, 1 / 16), share(host_memory, 1 / 8), finite=True)
# A search keeps its teacher runs in its own store on disk: they must survive the process.


def fingerprint(*paths: pathlib.Path) -> str:
    """Return a digest of files that changes when one is replaced: path, size, time and the bytes at both ends.

    The first 64 kB of a safetensors file are its table of contents, the last are weights; reading all of it would cost seconds.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(stamp(path).encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()
