"""torch.compile for networks: what it compiles is kept in a folder of ours, with a line on what is compiled and for how long."""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TICK = 10.0  # seconds between two messages


def kept_folder() -> pathlib.Path:
    """Return where compiled kernels are kept: the user's own choice for torch, else `slipstream/compiled` in the cache of the system."""
    chosen = pathlib.Path(os.environ.get(VARIABLE) or tempfile.gettempdir())
    # torch writes its own default there, a folder that does not outlive the machine's next start.
    if pathlib.Path(tempfile.gettempdir()) not in (chosen, chosen.parent):
        return chosen
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "slipstream" / "compiled"


def nobody(text: str) -> None:
    """Tell nobody: what is said is in the log all the same."""


@contextmanager
def compiling(what: str, tell: Callable[[str], None] = nobody) -> Iterator[None]:
    """Within the context torch keeps what it compiles in `kept_folder`; the log, and whoever waits, get a sentence now and then.

    `tell` gets it at once, every ten seconds, and at the end. Another process, and a later start, take what they need from the folder.
    """
    before, folder, begun, done = os.environ.get(VARIABLE), kept_folder(), time.perf_counter(), threading.Event()

    def say(text: str) -> None:
        log.info(text)
        tell(text)

    say(f"Compiling {what}: up to a minute on a GPU the first time, a few seconds when it is in {folder} already.")

    def tick() -> None:
        while not done.wait(TICK):
            say(f"Compiling {what}: {time.perf_counter() - begun:.0f} s so far.")

    thread = threading.Thread(target=tick, name="slipstream-compiling", daemon=True)
    os.environ[VARIABLE] = str(folder)
    thread.start()
    try:
        yield
        say(f"Compiled {what} in {time.perf_counter() - begun:.0f} s.")
    finally:
        done.set()
        thread.join()
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


@functools.cache
def function_for(function: Callable[..., Tensor], *shape: Hashable) -> FunctionType:
    """Return a copy of `function` to compile for one shape: torch gives up on a function after eight, and runs it eagerly."""
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def compiled_for(function: Callable[..., Tensor], owner: Any, *given: Tensor) -> Callable[..., Tensor]:
    """Return `function(owner, ...)` compiled for tensors of the shapes of `given`; owners of one kind share what is compiled."""
    shape = tuple((tuple(tensor.shape), tensor.dtype, tensor.device.type) for tensor in given)
    return functools.partial(torch.compile(function_for(function, *shape), dynamic=False), owner)
