"""The progress display of every command."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

EVERY = 10.0  # seconds between lines where there is no terminal


class Counted(Protocol):
    """A finished step: `index` of `total`, counted from 1. The steps of `core`, of a training and of a search are such."""

    @property
    def index(self) -> int: ...

    @property
    def total(self) -> int: ...


def phase_of(step: Any) -> str:
    return str(getattr(step, "phase", ""))


class Progress:
    """A callback that draws tqdm's bar on a terminal; elsewhere, and without tqdm, a line now and then. Writes to stderr.

    Args:
        unit: what is counted.
        note: what is shown beside a step; by default its phase.
    """

    def __init__(self, unit: str = "step", note: Callable[[Any], str] = phase_of) -> None:
        self.unit, self.note = unit, note
        self.bar: Any = None
        self.shown = time.monotonic()
        self.line = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def __call__(self, step: Counted) -> None:
        self.show(step.index, step.total, self.note(step))

    def show(self, index: int, total: int, note: str = "") -> None:
        """Show that `index` of `total` are done; a `total` of 0 is not known. Another total, or a lower index, starts again."""
        tqdm = _tqdm()
        if tqdm is None:
            self._lines(index, total, note)
            return
        if self.bar is not None and (self.bar.total != (total or None) or index < self.bar.n):
            self._close()
        if self.bar is None:
            self.bar = tqdm(total=total or None, unit=self.unit, file=sys.stderr, mininterval=0.2)
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(index - self.bar.n)

    def _lines(self, index: int, total: int, note: str) -> None:
        self.line = f"{index}/{total or '?'} {self.unit}s{', ' if note else ''}{note}"
        if index == total or time.monotonic() - self.shown > EVERY:
            self._print()

    def _print(self) -> None:
        print(self.line, file=sys.stderr, flush=True)
        self.line, self.shown = "", time.monotonic()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        elif self.line:
            self._print()


def _tqdm() -> Any:
    """Return tqdm where it is installed and stderr is a terminal, else None."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
