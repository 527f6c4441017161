"""torch.compile for networks: what it compiles is kept in a folder of ours, and whoever waits is told for what and how long."""

from __future__ import annotations

import logging
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def compiling(what: str, tell: Callable[[str], None] = log.info) -> Iterator[None]:
    """Within the context torch keeps what it compiles in `kept_folder`; `tell` gets a sentence at once, every ten seconds, and at the end.

    Another process, and a later start, take from there what they need: a tenth of the time.
    """
    before, folder, begun, done = os.environ.get(VARIABLE), kept_folder(), time.perf_counter(), threading.Event()
    tell(f"Compiling {what}: up to a minute on a GPU the first time, a few seconds when it is in {folder} already.")

    def tick() -> None:
        while not done.wait(TICK):
            tell(f"Compiling {what}: {time.perf_counter() - begun:.0f} s so far.")

    thread = threading.Thread(target=tick, name="slipstream-compiling", daemon=True)
    os.environ[VARIABLE] = str(folder)
    thread.start()
    try:
        yield
        tell(f"Compiled {what} in {time.perf_counter() - begun:.0f} s.")
    finally:
        done.set()
        thread.join()
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
