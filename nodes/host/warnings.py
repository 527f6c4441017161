"""One place to tell a user that a setting has no effect: on the node, in its outputs and report, and in the host's log.

`web/warnings.js` shows them in the browser. A node's warnings are also its `ui` output "warnings": the host keeps them with
the cached result and writes them into the history, with or without a browser.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

logger = logging.getLogger("slipstream")
KEY, EVENT, REPORT = "warnings", "slipstream.warning", "report"


@dataclass
class Owner:
    """The node that warnings belong to (its class "" where that is not one of ours), and its warnings in this execution."""

    node_id: str
    class_type: str
    texts: list[str] = field(default_factory=list)
    identity: ClassVar[str] = ""  # a result does not depend on it


_OWNER: ContextVar[Owner | None] = ContextVar("slipstream_warnings", default=None)


def warn(node: str, text: str) -> None:
    """Log "node: text", and show it on the node that it belongs to: the one that runs, or whose SAMPLER or GUIDER runs.

    Args:
        node: display name of our node.
        text: one sentence with the remedy, inputs in backticks: "`eta` has no effect with preserve on. Turn one of them off."
    """
    logger.warning("%s: %s", node, text)
    executing = _executing()
    # Nobody owns a patch that another pack's node made from our functions: shown where it runs.
    owner = _OWNER.get() or (Owner(executing, "") if executing is not None else None)
    if owner is None or text in owner.texts:
        return
    owner.texts.append(text)
    try:
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if server is not None and server.client_id is not None:
        ids = {"node": owner.node_id, "class_type": owner.class_type, "by": executing or owner.node_id}
        server.send_sync(EVENT, {**ids, "title": node, "text": text}, server.client_id)


def _executing() -> str | None:
    """Return the id of the node that the host executes now; None outside an execution."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    context = get_executing_context()
    return None if context is None else str(context.node_id)


def owned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which may run inside another node later, with its warnings shown on the node that runs now."""
    owner = _OWNER.get()

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if owner is None:
            return function(*args, **kwargs)
        with _owner(Owner(owner.node_id, owner.class_type)):
            return function(*args, **kwargs)

    return run


@contextmanager
def _owner(owner: Owner) -> Iterator[None]:
    token = _OWNER.set(owner)
    try:
        yield
    finally:
        _OWNER.reset(token)


def collecting(class_type: str, node: type[Any]) -> type[Any]:
    """Make a node class return its warnings as `ui` output and, where it has one, in its report; returns the class."""
    function = getattr(node, node.FUNCTION)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        executing = _executing()
        if executing is None:
            return function(*args, **kwargs)
        owner = Owner(executing, class_type)
        with _owner(owner):
            return with_warnings(function(*args, **kwargs), node.RETURN_NAMES, owner.texts)

    setattr(node, node.FUNCTION, run)
    # Newer hosts then send the `ui` output of a cached node again, although it is no output node.
    node.HAS_INTERMEDIATE_OUTPUT = True
    return node


def with_warnings(returned: Any, names: tuple[str, ...], texts: list[str]) -> Any:
    """Return what a node function returned, with warnings in its `ui` output and in the output called "report".

    A `ui` output always gets the entry, because the host merges those of a list of inputs by the keys of the first.
    """
    ui, result = (returned.get("ui"), returned.get("result", ())) if isinstance(returned, dict) else (None, returned)
    if not texts and ui is None:
        return returned
    if texts and REPORT in names:
        at = names.index(REPORT)
        report = "\n".join([result[at], *(f"Warning: {text}" for text in texts)])
        ui = {key: [report] if list(shown) == [result[at]] else shown for key, shown in (ui or {}).items()}
        result = (*result[:at], report, *result[at + 1 :])
    return {"ui": {**(ui or {}), KEY: list(texts)}, "result": result}
