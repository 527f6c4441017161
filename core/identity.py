"""What a result depends on, as one digest: values and code by content, weights by some values of each, never by address.

Two objects that were built from equal parts have one identity. What cannot be named (a lock's state, a socket, a generator) is
listed in `Identity.unnamed`, and nothing that depends on it may be taken from a cache.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 64  # values of each weight that count
SMALL = 4096  # a weight of no more values counts whole
LIMIT = 200_000  # parts of one identity; more means that a patch holds half of the program
LOCKS = (type(threading.Lock()), type(threading.RLock()))
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Identity:
    """`digest` is equal for equal parts; `unnamed` are the parts that could not be named, as "where: what"."""

    digest: str
    unnamed: tuple[str, ...] = ()

    @property
    def warning(self) -> str:
        """One sentence for the user that names what cannot be named, empty when all can."""
        if not self.unnamed:
            return ""
        return (
            f"Nothing can be reused from an earlier run, because Slipstream cannot compare {', '.join(self.unnamed)}."
        )


def identify(*values: Any) -> Identity:
    """Return the identity of what a computation from `values` depends on.

    Tensors count by content, modules and `Weights` by some values of each tensor, functions by code and closure, objects by an
    `identity` attribute when they have one, else by class and state. Further kinds are registered with `parts`.
    """
    namer = _Namer(set())
    name = namer.name(values, "")
    if namer.written:  # the readers of a variable that another function writes may have come before the writer
        namer = _Namer(namer.written)
        name = namer.name(values, "")
    return Identity(name.hex(), tuple(namer.unnamed))


def has_identity(value: Any) -> bool:
    """Whether an object has an attribute `identity` of what its results depend on."""
    if isinstance(value, (type, nn.Module, types.ModuleType)):
        return False
    own = getattr(value, "__dict__", {}).get("identity", getattr(type(value), "identity", None))
    return own is not None and not callable(own)


@dataclass(frozen=True, eq=False)
class Weights:
    """Marks tensors anywhere in `value` as weights: some values of each count."""

    value: Any


@dataclass(frozen=True)
class Bag:
    """Parts whose order does not count."""

    parts: list[tuple[str, Any]]


Parts = bytes | Bag | Sequence[tuple[str, Any]] | None


@functools.singledispatch
def parts(value: Any) -> Parts:
    """Return what a value consists of: bytes, or (label, part) pairs; None when it cannot be named.

    The state of an object is what pickle would keep of it. Register a class to leave out what a run writes into its objects.
    """
    try:
        reduced = value.__reduce_ex__(2)
    except Exception:
        return None
    if isinstance(reduced, str):
        return f"{type(value).__module__} {reduced}".encode()
    state = [None if part is None else list(part) if i > 2 else part for i, part in enumerate(reduced[:5])]
    return [("", type(value)), *((f"{i}", part) for i, part in enumerate(state))]


@parts.register(type(None))
@parts.register(bool)
@parts.register(int)
@parts.register(float)
@parts.register(complex)
@parts.register(str)
@parts.register(bytes)
@parts.register(torch.dtype)
@parts.register(torch.device)
def _(value: Any) -> Parts:
    return f"{type(value).__name__} {value!r}".encode()


@parts.register(list)
@parts.register(tuple)
def _(value: Sequence[Any]) -> Parts:
    return [("", type(value)), *((f"[{i}]", item) for i, item in enumerate(value))]


@parts.register(set)
@parts.register(frozenset)
def _(value: set[Any]) -> Parts:
    return Bag([("", item) for item in value])


@parts.register(dict)
def _(value: dict[Any, Any]) -> Parts:
    return Bag([("", type(value)), *((f".{key}", _Pair(key, item)) for key, item in value.items())])


@dataclass(frozen=True, eq=False)
class _Pair:
    key: Any
    item: Any


@parts.register(_Pair)
def _(value: _Pair) -> Parts:
    return [("", value.key), ("", value.item)]


@parts.register(Tensor)
def _(value: Tensor) -> Parts:
    if value.is_meta:
        return None
    if hasattr(type(value), "__tensor_flatten__"):  # quantised weights: tensors and a scale behind a tensor's face
        names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        return [("", type(value)), ("", context), *((name, getattr(value, name)) for name in names)]
    plain = value.detach().to("cpu").contiguous()
    return _face(plain) + plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_empty(value: Any) -> bool:
    """Whether a value is a container or a tensor that holds nothing; a tensor without dimensions holds one number."""
    return not value.numel() if isinstance(value, Tensor) else hasattr(value, "__len__") and not len(value)


@parts.register(torch.Generator)
def _(value: torch.Generator) -> Parts:
    return [("", value.get_state())]


@parts.register(np.ndarray)
def _(value: np.ndarray) -> Parts:
    return None if value.dtype.hasobject else f"{value.shape} {value.dtype}".encode() + value.tobytes()


@parts.register(weakref.ref)
def _(value: weakref.ref[Any]) -> Parts:
    return [("", value())]


@parts.register(types.ModuleType)
def _(value: types.ModuleType) -> Parts:
    return value.__name__.encode()


@parts.register(types.BuiltinFunctionType)
def _(value: types.BuiltinFunctionType) -> Parts:
    return [("", value.__qualname__), ("", value.__self__)]


@parts.register(types.MethodType)
def _(value: types.MethodType) -> Parts:
    return [("", value.__self__), ("", value.__func__)]


@parts.register(type)
def _(value: type) -> Parts:
    """A class counts by name; one that a function made also by its bases and functions, which may hold a closure."""
    name = _full_name(value)
    if "<locals>" not in name:
        return name.encode()
    own = [(f".{k}", v) for k, v in vars(value).items() if isinstance(v, types.FunctionType)]
    return [("", name), ("", list(value.__bases__)), *own]


@parts.register(types.CodeType)
def _(value: types.CodeType) -> Parts:
    return [("", value.co_code), ("", value.co_consts), ("", value.co_names), ("", value.co_freevars)]


for _lock in LOCKS:
    parts.register(_lock, lambda value: b"lock")


@dataclass(frozen=True, eq=False)
class _Layer:
    """One module without its weights and the modules below it."""

    module: nn.Module


@parts.register(nn.Module)
def _(value: nn.Module) -> Parts:
    named = [*value.named_parameters(), *value.named_buffers()]
    return [
        ("", weights_parts(named)),
        *((f".{name}" if name else "", _Layer(module)) for name, module in value.named_modules()),
    ]


@parts.register(_Layer)
def _(value: _Layer) -> Parts:
    """Class and attributes: adapters keep their scale there, and patches replace `forward`."""
    state = {k: v for k, v in vars(value.module).items() if k not in ("_parameters", "_buffers", "_modules")}
    plain = {
        k: v
        for k, v in state.items()
        if isinstance(v, PLAIN) or (type(v) is tuple and all(isinstance(i, PLAIN) for i in v))
    }
    rest = {k: v for k, v in state.items() if k not in plain and not _is_empty(v)}
    if isinstance(config := rest.get("_internal_dict"), dict):  # diffusers: with a list whose order changes by process
        rest["_internal_dict"] = {k: v for k, v in config.items() if k != "_use_default_values"}
    face = f"{_full_name(type(value.module))} {sorted((k, repr(v)) for k, v in plain.items())}".encode()
    if not rest:
        return face
    # Hooks are kept under numbers that are never given twice.
    rest |= {k: list(v.values()) for k, v in rest.items() if k.endswith("_hooks") and isinstance(v, dict)}
    return [("", face), ("", type(value.module)), *((f".{k}", _Pair(k, v)) for k, v in sorted(rest.items()))]


def weights_parts(named: Iterable[tuple[str, Tensor]]) -> Parts:
    """Return what named weights count by: name, shape, format and some values of each."""
    pairs = list(named)
    flat = [(n, t) for n, t in pairs if not hasattr(type(t), "__tensor_flatten__") and not t.is_meta]
    values = sampled_bytes([t for _, t in flat], whole=SMALL)
    found = hashlib.sha256()
    for (name, tensor), part in zip(flat, values):
        found.update(name.encode() + _face(tensor) + part)
    return [
        ("", found.digest()),
        *((f".{n}", t) for n, t in pairs if t.is_meta or hasattr(type(t), "__tensor_flatten__")),
    ]


def weights_digest(weights: Iterable[Tensor]) -> str:
    """Return a short hash of some values of each weight, in milliseconds, for files that people exchange.

    Neither order nor names, shapes nor the number format count, so that a network has one hash under the library's and the host's
    module names.
    """
    values = sampled_bytes(list(weights), torch.float16)
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(v).digest() for v in values))).hexdigest()[:16]


def sampled_bytes(tensors: Sequence[Tensor], dtype: torch.dtype | None = None, whole: int = 0) -> list[bytes]:
    """Return `SAMPLES` evenly spaced values of each tensor as bytes (all of one with up to `whole`); one copy from each device."""
    picked = [_picked(t.detach(), len_of(t, whole)) for t in tensors]
    picked = [(p if dtype is None else p.to(dtype)).contiguous().reshape(-1).view(torch.uint8) for p in picked]
    found: list[bytes] = [b""] * len(picked)
    for device in {p.device for p in picked}:
        index = [i for i, p in enumerate(picked) if p.device == device]
        block = torch.cat([picked[i] for i in index]).cpu().numpy().tobytes()
        begin = 0
        for i in index:
            found[i] = block[begin : begin + len(picked[i])]
            begin += len(picked[i])
    return found


def len_of(tensor: Tensor, whole: int) -> int:
    return max(tensor.numel(), 1) if tensor.numel() <= whole else SAMPLES


def _picked(tensor: Tensor, count: int) -> Tensor:
    step = max(1, tensor.numel() // count)
    if tensor.is_contiguous():
        return tensor.reshape(-1)[::step][:count]
    # A copy of a channels-last weight would cost as much as all its values.
    index = torch.arange(0, tensor.numel(), step, device=tensor.device)[:count]
    return tensor[torch.unravel_index(index, tensor.shape)]


def _full_name(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _face(tensor: Tensor) -> bytes:
    return f"{tuple(tensor.shape)} {tensor.dtype} ".encode()


@functools.lru_cache(4096)
def _code_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the free variables that a function or one inside it writes, and the globals that it reads and never writes."""
    written, read, stored = set(), set(), set()
    for step in dis.get_instructions(code):
        if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:
            written.add(step.argval)
        elif step.opname == "LOAD_GLOBAL":
            read.add(step.argval)
        elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            stored.add(step.argval)
    for inner in (c for c in code.co_consts if isinstance(c, types.CodeType)):
        below, names = _code_names(inner)
        written |= below & set(code.co_freevars)
        read |= names
    return frozenset(written), frozenset(read - stored)


# Numbers that a function's own run changes, as they were when the function was first seen.
_FIRST: weakref.WeakKeyDictionary[types.FunctionType, dict[str, bytes]] = weakref.WeakKeyDictionary()


class _Namer:
    """Names values by the names of their parts (a Merkle tree); `written` are the cells that functions write as they run."""

    def __init__(self, written: set[int]) -> None:
        self.known, self.written = written, set(written)
        self.unnamed: dict[str, None] = {}
        self.names: dict[tuple[int, bool], bytes] = {}
        self.held: list[Any] = []  # or a later object could get an address that is known already
        self.open: dict[int, int] = {}
        self.sampling = False

    def name(self, value: Any, where: str) -> bytes:
        if isinstance(value, PLAIN):
            return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).digest()
        key = (id(value), self.sampling)
        if key in self.names:
            return self.names[key]
        if id(value) in self.open:  # a circle: how far up it closes is all there is to say
            return hashlib.sha256(f"circle {len(self.open) - self.open[id(value)]}".encode()).digest()
        self.held.append(value)
        if len(self.held) > LIMIT:
            self.unnamed[f"something with more than {LIMIT} parts"] = None
            return b"unnamed"
        self.open[id(value)] = len(self.open)
        try:
            found = self._name(value, where)
        finally:
            del self.open[id(value)]
        self.names[key] = found
        return found

    def _name(self, value: Any, where: str) -> bytes:
        if isinstance(value, Identity):
            self.unnamed |= dict.fromkeys(value.unnamed)
            return bytes.fromhex(value.digest)
        if isinstance(value, Weights):
            before, self.sampling = self.sampling, True
            found = self.name(value.value, where)
            self.sampling = before
            return found
        if isinstance(value, types.FunctionType):
            return self._join("function", self._function(value), where)
        if has_identity(value):
            return self.name(value.identity, where)
        consists = weights_parts([("", value)]) if self.sampling and isinstance(value, Tensor) else parts(value)
        if consists is None:
            return self._refuse(value, where)
        if isinstance(consists, bytes):
            return hashlib.sha256(consists).digest()
        if isinstance(consists, Bag):
            return hashlib.sha256(b"bag" + b"".join(sorted(self._each(consists.parts, where)))).digest()
        return self._join("", consists, where)

    def _each(self, pairs: Iterable[tuple[str, Any]], where: str) -> Iterator[bytes]:
        return (self.name(part, where + label) for label, part in pairs)

    def _join(self, kind: str, pairs: Iterable[tuple[str, Any]], where: str) -> bytes:
        return hashlib.sha256(kind.encode() + b"".join(self._each(pairs, where))).digest()

    def _refuse(self, value: Any, where: str) -> bytes:
        self.unnamed[f"{where.lstrip('.') or 'a value'} ({_full_name(type(value))})"] = None
        return b"unnamed"

    def _function(self, value: types.FunctionType) -> list[tuple[str, Any]]:
        """A function counts by code, defaults, closure, and the plain globals and functions of its module that it reads."""
        code = value.__code__
        written, read = _code_names(code)
        cells = dict(zip(code.co_freevars, value.__closure__ or ()))
        self.written |= {id(cells[name]) for name in written}
        self.held += cells.values()
        found: list[tuple[str, Any]] = [
            ("", _full_name(value)), ("", code), ("", value.__defaults__), ("", value.__kwdefaults__),
        ]  # fmt: skip
        found += [(f".{name}", self._cell(value, name, cell)) for name, cell in cells.items()]
        for name in sorted(read & value.__globals__.keys()):
            used = value.__globals__[name]
            if isinstance(used, PLAIN) or (
                isinstance(used, types.FunctionType) and used.__module__ == value.__module__
            ):
                found.append((f".{name}", _Pair(name, used)))
        return found

    def _cell(self, function: types.FunctionType, name: str, cell: types.CellType) -> Any:
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            return b"empty"
        if id(cell) not in self.known:
            return content
        # What a patch notes down as it runs is no setting; a number that it counts down begins as one.
        begun = repr(content).encode() if isinstance(content, (bool, int, float, str)) else b"state of a run"
        return _FIRST.setdefault(function, {}).setdefault(name, begun)
