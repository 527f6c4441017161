"""Taps: what one thread asks of the modules of a network, unseen by every other user of that network.

A request maps keys to handlers. The key is a module, or whatever an adapter stands in for one with. A handler takes the place
of the call: `handler(call, *args, **kwargs)`, where `call` is the module itself or the handler of an earlier request. Threads
without a request, copies of the network, and torch.compile get the plain module.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Handler = Callable[..., Any]
Request = Mapping[Any, Handler]


class _Thread(threading.local):
    requests: tuple[Request, ...] = ()


_thread = _Thread()
_lock = threading.Lock()
_users: Counter[nn.Module] = Counter()  # contexts that need a module's tap; those without are not in it


class Tapped(nn.Module):
    """Mixed into the class of a module while some thread has a request for it: looks up the calling thread's handlers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__
        return (call if torch.compiler.is_compiling() else through(self, call))(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the plain class.
        reduced: Any = super().__reduce_ex__(protocol)
        return object.__new__, (plain_type(self),), *reduced[2:]


@functools.cache
def _tapped(kind: Any) -> type[nn.Module]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (Tapped, kind), names)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Return the class of `module` as it is without taps."""
    kind = type(module)
    return kind.__bases__[1] if kind.__bases__[0] is Tapped else kind


def through(key: Any, call: Handler) -> Handler:
    """Return `call` with the calling thread's handlers for `key` around it, that of the latest request outermost."""
    for request in _thread.requests:
        if key in request:
            call = functools.partial(request[key], call)
    return call


def active() -> tuple[Request, ...]:
    """Return the calling thread's requests, for `resumed`."""
    return _thread.requests


@contextmanager
def requested(request: Request) -> Iterator[None]:
    """Within the context the calling thread has one request more. Whoever runs the keys must ask `through`."""
    _thread.requests = (*_thread.requests, request)
    try:
        yield
    finally:
        # Not "the requests from before": contexts may end in another order than that in which they began.
        _thread.requests = tuple(r for r in _thread.requests if r is not request)


@contextmanager
def routed(request: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Within the context, calls of these modules by this thread go to their handlers; nothing of it stays afterwards."""
    with _taps(request), requested(dict(request)):
        yield


@contextmanager
def resumed(requests: tuple[Request, ...]) -> Iterator[None]:
    """Within the context the calling thread has just these `requests`, for work put off to later or to another thread."""
    before, _thread.requests = _thread.requests, requests
    try:
        with _taps(key for request in requests for key in request if isinstance(key, nn.Module)):
            yield
    finally:
        _thread.requests = before


@contextmanager
def _taps(modules: Iterable[nn.Module]) -> Iterator[None]:
    modules = tuple(modules)
    with _lock:
        for module in modules:
            if not isinstance(module, Tapped):
                module.__class__ = _tapped(type(module))  # type: ignore[arg-type]
        _users.update(modules)
    try:
        yield
    finally:
        with _lock:
            _users.subtract(modules)
            for module in set(modules):
                if not _users[module]:
                    del _users[module]
                    module.__class__ = plain_type(module)
