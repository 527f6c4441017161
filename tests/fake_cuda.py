"""A CUDA device that needs none: tensors that say "cuda:0", compute on the CPU, and refuse what would make a GPU wait.

Within `FakeCuda` every torch function that touches a `DeviceTensor` runs on the host tensor inside it, with these rules:

- reading a value, or copying from or to memory that is not pinned, raises `HostWaitError`: on a GPU the host would stand still;
- a copy to pinned memory arrives when an event recorded after it is waited for; until then the memory holds rubbish;
- streams and events keep vector clocks: using what another stream wrote without waiting for it raises `RaceError`, and so does
  using another stream's memory without `record_stream`, because it might be given away while it is still in use;
- new device memory is counted.

`fake_cuda(may_wait=True)` allows the host to wait, for code that does; what is left are the rules of every device: tensors of one
operation are on it (only indices and single values of binary operations may come from the host), or it raises as CUDA does; and
none is float64, which Apple's MPS and many XPUs lack.

Values are real, so whatever runs here can be compared with the same run on the CPU. Thread-local: one thread only.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda:0")
FACTORIES = ("empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "empty_strided")
IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
READING = (
    "item",
    "tolist",
    "numpy",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__array__",
    "__contains__",
    "equal",
)
# What takes a single value (no dimensions) or indices from host memory; everything else wants all tensors on the device.
SCALARS = tuple(
    "add sub mul div true_divide floor_divide remainder fmod pow maximum minimum fmax fmin atan2 hypot eq ne lt le gt ge where "
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor masked_fill fill copysign rsub multiply divide subtract "
    "iadd isub imul itruediv ipow radd rmul rtruediv rpow truediv floordiv mod and or xor iand ior".split()
)
INDICES = ("__getitem__", "__setitem__", "index_put_", "index_put")
# What CUDA kernels cannot do without telling the host how large the result is, or what is in it.
WAITING_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "is_nonzero")
METADATA = ("is_contiguous", "is_floating_point", "is_inference", "size", "stride", "dim", "numel", "__len__", "data_ptr",
            "storage_offset", "element_size", "untyped_storage", "is_complex", "__hash__", "ndimension", "get_device")  # fmt: skip


class HostWaitError(AssertionError):
    """The host would wait for the device."""


class RaceError(AssertionError):
    """Two streams would touch the same memory in no certain order."""


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on the device; `inner` has its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def record_stream(self, stream: Stream) -> None:  # torch asks for a true stream before it asks the mode
        Stream.machine.memory[_address(self.inner)].recorded.add(stream)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} reached the dispatcher: is FakeCuda active in this thread?")


class Clock(Counter):  # type: ignore[type-arg]
    """How far each stream had come at some point."""

    def covers(self, stamp: tuple[Stream, int]) -> bool:
        return self[stamp[0]] >= stamp[1]


class Stream:
    """A fake torch.cuda.Stream."""

    machine: FakeCuda

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = DEVICE
        self.clock = Clock()

    __hash__ = object.__hash__

    def tick(self) -> tuple[Stream, int]:
        self.clock[self] += 1
        return self, self.clock[self]

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.clock = Clock(self.clock)
        return event

    def wait_event(self, event: Event) -> None:
        assert event.clock is not None, "an event that was never recorded"
        self.clock |= event.clock

    def wait_stream(self, other: Stream) -> None:
        self.clock |= other.clock

    def synchronize(self) -> None:
        raise HostWaitError("stream.synchronize()")


class Event:
    """A fake torch.cuda.Event."""

    def __init__(self, **_: Any) -> None:
        self.clock: Clock | None = None

    def record(self, stream: Stream | None = None) -> None:
        (stream or Stream.machine.current).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Stream.machine.current).wait_event(self)

    def synchronize(self) -> None:
        assert self.clock is not None, "an event that was never recorded"
        Stream.machine.arrive(self.clock)


class Memory:
    """Who touched one storage last, and who may."""

    def __init__(self, home: Stream | None) -> None:
        self.home = home  # None: there before the stream began, and to the end
        self.written: tuple[Stream, int] | None = None
        self.read: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()


class Watch(TorchDispatchMode):
    """Sees the kernels that a torch function is made of."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in WAITING_OPS:
            raise HostWaitError(name)
        if name.startswith(("index", "_index_put")) and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in _leaves(args[1])
        ):
            raise HostWaitError(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


class FakeCuda(TorchFunctionMode):
    """The machine: see the module. `bytes` and `blocks` count new device memory, `pinned` host memory, `waits` events waited for."""

    def __init__(self, may_wait: bool = False) -> None:
        super().__init__()
        Stream.machine = self
        self.may_wait = may_wait
        self.current = self.default = Stream()
        self.memory: dict[int, Memory] = {}
        self.alive: WeakSet[DeviceTensor] = WeakSet()
        self.pinned: dict[int, torch.Tensor] = {}  # kept alive: an address must stay what it is
        self.arriving: list[tuple[tuple[Stream, int], torch.Tensor, torch.Tensor]] = []
        self.leaving: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.blocks = self.bytes = self.waits = 0

    # -- what tests ask

    def put(self, tensor: torch.Tensor) -> DeviceTensor:
        """Return `tensor` as one that was on the device from the start (weights)."""
        device = DeviceTensor(tensor.detach().clone())
        self.memory[_address(device.inner)] = Memory(None)
        self.alive.add(device)
        return device

    def put_module(self, module: torch.nn.Module) -> torch.nn.Module:
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                table.update({name: self.put(t.data) for name, t in table.items() if t is not None})
        return module

    def live_bytes(self) -> int:
        """Return the device memory that somebody still holds."""
        return sum({_address(t.inner): t.inner.untyped_storage().nbytes() for t in self.alive}.values())

    def arrive(self, clock: Clock) -> None:
        """The host has waited for `clock`: copies before it are in host memory."""
        self.waits += 1
        for source, copy in self.leaving:
            assert torch.equal(source, copy), "pinned memory was overwritten while its upload may have been running"
        still = []
        for stamp, target, value in self.arriving:
            if clock.covers(stamp):
                target.copy_(value)
            else:
                still.append((stamp, target, value))
        self.arriving = still

    # -- torch functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        special = getattr(self, f"_{name}", None) if not name.startswith("__") else None
        if special is not None and name in (
            "to",
            "cpu",
            "cuda",
            "copy_",
            "pin_memory",
            "is_pinned",
            "type_as",
        ):
            return special(*args, **kwargs)
        devices = [t for t in _leaves((args, kwargs)) if isinstance(t, DeviceTensor)]
        pin = kwargs.pop("pin_memory", False)
        wanted = kwargs.get("device")
        if not devices and (wanted is None or torch.device(wanted).type != "cuda"):
            result = func(*args, **kwargs)
            return self._pin(result) if pin else result
        if name == "__get__":
            return self._attribute(func, args[0])
        if name in READING and devices:
            return self._read(func, name, args, kwargs)
        if name == "_has_compatible_shallow_copy_type":  # Module.to: parameters are replaced
            return False
        if name == "as_tensor" and isinstance(args[0], torch.Tensor) and (devices or self.may_wait):
            return self._to(args[0], *args[1:], **kwargs)
        if name in ("tensor", "as_tensor", "from_numpy") and not devices and not self.may_wait:
            raise HostWaitError(f"torch.{name}(..., device='cuda'): memory that is not pinned")
        return self._run(func, name, devices, args, kwargs, wanted)

    def _read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in ("numpy", "__array__") and self.may_wait:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if not self.may_wait:
            raise HostWaitError(name)
        self._check_mixing(name, (args, kwargs))
        return func(*_mapped(DeviceTensor, lambda t: t.inner, args), **kwargs)

    def _check_mixing(self, name: str, arguments: Any) -> None:
        """Raise for an operation on device memory that is given host tensors which its kernel could not read."""
        if name in ("grad", "backward"):  # a graph may lead from one device to the other
            return
        for tensor in _leaves(arguments):
            if isinstance(tensor, torch.Generator):
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, DeviceTensor):
                continue
            plain = name.strip("_")
            if tensor.ndim and not self.may_wait:
                raise HostWaitError(f"{name} of device memory and a host tensor of shape {tuple(tensor.shape)}")
            if self.may_wait and not (plain in SCALARS and not tensor.ndim) and name not in INDICES:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name} with a "
                    f"host tensor of shape {tuple(tensor.shape)})"
                )

    def _attribute(self, func: Any, tensor: DeviceTensor) -> Any:
        what = func.__self__.__name__
        if what in ("device", "is_cuda", "is_cpu", "is_meta"):
            return {"device": DEVICE, "is_cuda": True, "is_cpu": False, "is_meta": False}[what]
        found = func(tensor.inner)
        return self._wrapped(found, [tensor]) if isinstance(found, torch.Tensor) else found

    def _run(self, func: Any, name: str, devices: list[DeviceTensor], args: Any, kwargs: Any, wanted: Any) -> Any:
        if devices or not isinstance(next(iter(args), None), torch.Tensor):
            self._check_mixing(name, (args, kwargs) if devices else kwargs)
        if wanted is not None:
            kwargs["device"] = wanted if torch.device(wanted).type == "cpu" and not devices else torch.device("cpu")
        inner_args, inner_kwargs = _mapped(DeviceTensor, lambda t: t.inner, (args, kwargs))
        if name in METADATA:
            return func(*inner_args, **inner_kwargs)
        for tensor in devices:
            self._touch(tensor.inner, writes=False)
        if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            self._touch(devices[0].inner, writes=True)
        with contextlib.nullcontext() if self.may_wait else Watch():
            result = func(*inner_args, **inner_kwargs)
        return self._wrapped(result, devices)

    def _wrapped(self, result: Any, inputs: list[DeviceTensor]) -> Any:
        for given in inputs:
            if result is given.inner:
                return given
        known = {_address(t.inner) for t in inputs}
        return _mapped(torch.Tensor, lambda t: self._device_tensor(t, _address(t) in known), result)

    def _device_tensor(self, inner: torch.Tensor, view: bool = False) -> DeviceTensor:
        if self.may_wait and inner.dtype == torch.float64:
            raise TypeError("Cannot convert to a device tensor of float64: the device does not support it.")
        if not view:
            self.blocks += 1
            self.bytes += inner.untyped_storage().nbytes()
            self.memory[_address(inner)] = Memory(self.current)
            self.memory[_address(inner)].written = self.current.tick()
        tensor = DeviceTensor(inner)
        self.alive.add(tensor)
        return tensor

    # -- order of the streams

    def _touch(self, inner: torch.Tensor, writes: bool) -> None:
        memory, stream = self.memory[_address(inner)], self.current
        if memory.written is not None and not stream.clock.covers(memory.written):
            raise RaceError(
                f"memory of shape {tuple(inner.shape)} is used before what another stream wrote there is done"
            )
        if memory.home not in (None, stream) and stream not in memory.recorded:
            raise RaceError(f"memory of shape {tuple(inner.shape)} of another stream is used without record_stream")
        if writes:
            for other, tick in memory.read.items():
                if not stream.clock.covers((other, tick)):
                    raise RaceError(
                        f"memory of shape {tuple(inner.shape)} is overwritten while another stream reads it"
                    )
            memory.written = stream.tick()
        else:
            memory.read[stream] = stream.tick()[1]

    # -- copies

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned[_address(tensor)] = tensor
        return tensor

    def _is_pinned(self, tensor: torch.Tensor, *_: Any) -> bool:
        return not isinstance(tensor, DeviceTensor) and _address(tensor) in self.pinned

    def _pin_memory(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        assert not isinstance(tensor, DeviceTensor), "only host memory can be pinned"
        return tensor if self._is_pinned(tensor) else self._pin(tensor.clone(memory_format=torch.preserve_format))

    def _upload(self, source: torch.Tensor, dtype: torch.dtype, non_blocking: bool) -> torch.Tensor:
        """Return the values for the device; what is not pinned, or has to be laid out again first, makes the host wait."""
        if self.may_wait:
            return source.to(dtype, copy=True)
        if not (non_blocking and self._is_pinned(source) and source.is_contiguous() and source.dtype == dtype):
            raise HostWaitError(
                f"upload of {tuple(source.shape)} {source.dtype} from memory that is not pinned, or not as it is"
            )
        self.leaving.append((source, source.clone()))
        return source.clone()

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        device, dtype, non_blocking, rest = _parse_to(tensor, args, kwargs)
        here = isinstance(tensor, DeviceTensor)
        if here == (device.type == "cuda"):
            if not here:
                return tensor.to(dtype, **rest)
            if tensor.inner.dtype == dtype and not rest.get("copy"):
                return tensor
            return self._run(torch.Tensor.to, "to", [tensor], (tensor, dtype), rest, None)
        if here and self.may_wait:
            self._touch(tensor.inner, writes=False)
            return tensor.inner.to(dtype, copy=True)
        if here:
            raise HostWaitError(f"copy of {tuple(tensor.inner.shape)} to host memory that is not pinned")
        return self._device_tensor(self._upload(tensor, dtype, non_blocking))

    def _cpu(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._to(tensor, "cpu")

    def _cuda(self, tensor: torch.Tensor, device: Any = None, non_blocking: bool = False) -> Any:
        return self._to(tensor, DEVICE, non_blocking=non_blocking)

    def _type_as(self, tensor: torch.Tensor, other: torch.Tensor) -> Any:
        return self._to(tensor, other)

    def _copy_(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        to_device, from_device = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
        if to_device and not from_device:
            self._touch(target.inner, writes=True)
            target.inner.copy_(self._upload(source, target.dtype, non_blocking))
        elif from_device and not to_device and self.may_wait and not non_blocking:
            self._touch(source.inner, writes=False)
            target.copy_(source.inner)
        elif from_device and not to_device:
            if not (
                non_blocking and self._is_pinned(target) and target.is_contiguous() and source.inner.is_contiguous()
            ):
                raise HostWaitError(f"copy of {tuple(target.shape)} to host memory that is not pinned")
            self._touch(source.inner, writes=False)
            self.arriving.append((self.current.tick(), target, source.inner.to(target.dtype, copy=True)))
            target.fill_(float("nan") if target.is_floating_point() else 77)
        elif to_device:
            self._touch(source.inner, writes=False)
            self._touch(target.inner, writes=True)
            target.inner.copy_(source.inner)
        else:
            target.copy_(source)
        return target


def _leaves(value: Any) -> Iterator[Any]:
    """Every value in nested lists, tuples and dictionaries (torch's own walk takes most of the time of a test)."""
    if isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _mapped(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """Return `value` with every `kind` in nested lists, tuples and dictionaries changed."""
    if isinstance(value, kind):
        return change(value)
    if type(value) is dict:
        return {name: _mapped(kind, change, part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(kind, change, part) for part in value)
    return tree_map_only(kind, change, value) if isinstance(value, tuple) else value


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor.untyped_storage())


def _parse_to(tensor: torch.Tensor, args: Any, kwargs: Any) -> tuple[torch.device, torch.dtype, bool, dict[str, Any]]:
    device: Any = DEVICE if isinstance(tensor, DeviceTensor) else torch.device("cpu")
    dtype = tensor.inner.dtype if isinstance(tensor, DeviceTensor) else tensor.dtype
    flags = []
    for value in [*args, kwargs.pop("device", None), kwargs.pop("dtype", None)]:
        if isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            flags.append(value)
        elif value is not None:
            device = torch.device(value)
    return device, dtype, kwargs.pop("non_blocking", flags[:1] == [True]), kwargs


@contextlib.contextmanager
def fake_cuda(may_wait: bool = False) -> Iterator[FakeCuda]:
    """Give a machine, with torch.cuda's streams and events replaced, and check at the end that no upload was disturbed."""
    machine = FakeCuda(may_wait)

    @contextlib.contextmanager
    def stream(chosen: Stream | None) -> Iterator[None]:
        before, machine.current = machine.current, chosen or machine.current
        try:
            yield
        finally:
            machine.current = before

    def refuse(what: str) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise HostWaitError(what)

        return fail

    with pytest.MonkeyPatch.context() as patch:
        for name, fake in {
            "Stream": Stream, "Event": Event, "stream": stream, "current_stream": lambda device=None: machine.current,
            "default_stream": lambda device=None: machine.default,
            "synchronize": (lambda *_: None) if may_wait else refuse("torch.cuda.synchronize()"),
            "device": lambda device: contextlib.nullcontext(),
            "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
            "get_allocator_backend": lambda: "native",
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, fake)
        with machine:
            yield machine
    machine.arrive(Clock())
