"""One digest for everything that a cached result depends on: tensors by content, models by which object and state they are."""

from __future__ import annotations

import hashlib
import itertools
import types
import uuid
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_tokens: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_counter = itertools.count()


def token(value: Any) -> int:
    """Return a number for this very object, never given to another one in this process (unlike `id`)."""
    try:
        if value not in _tokens:
            _tokens[value] = next(_counter)
        return _tokens[value]
    except TypeError:  # it cannot be hashed or watched: nothing computed from it is ever taken for the same
        return next(_counter)


def digest(*values: Any) -> str:
    """Return a digest of `values` that is equal when a computation from them would be.

    Tensors count by content, numbers, strings and containers by value, modules by object and weight versions. An object
    with an `identity` attribute counts by that, any other by which object it is.
    """
    state = hashlib.sha256()
    for part in _parts(values):
        state.update(part)
        state.update(b"|")
    return state.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        plain = value.detach().to("cpu").contiguous()
        yield f"{tuple(plain.shape)} {plain.dtype}".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, uuid.UUID, torch.dtype, torch.device)
    ):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield f"{type(value).__name__} {len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, dict):
        yield f"dict {len(value)}".encode()
        for key, item in value.items():
            yield from _parts((key, item))
    elif hasattr(value, "identity"):
        yield from _parts(value.identity)
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        yield from _parts([getattr(value, f.name) for f in fields(value)])
    elif isinstance(value, types.MethodType):
        yield from _parts(("method", value.__self__, value.__func__))
    else:
        yield f"object {token(value)}".encode()
        if isinstance(value, nn.Module):
            # In-place training or merging shows in the versions; weights made in inference mode have none.
            yield str(sum(p._version for p in value.parameters() if not p.is_inference())).encode()
