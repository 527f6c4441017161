"""How long things live: objects that hold themselves stay, with their weights and recordings, until garbage is collected."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound method as a function that does not keep its object alive; it is called only while somebody else does.

    For what the object holds itself: options that are its own, or parts that report to it.
    """
    found = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        alive = found()
        assert alive is not None
        return alive(*args, **kwargs)

    return call
