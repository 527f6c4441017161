"""One place to tell a user that a setting has no effect: on the node, in its outputs and report, and in the host's log.

`web/warnings.js` shows them in the browser. A node's warnings are also its `ui` output "warnings": the host keeps them with
the cached result and writes them into the history, with or without a browser.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ...core.compiling import nobody
from ..unused import unused

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


def progress_text() -> Callable[[str], None]:
    """Return a function that shows a line of text on the node that runs now, from any thread; nothing where the host cannot."""
    owner, server = _OWNER.get(), getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    send = getattr(server, "send_progress_text", None)
    if owner is None or server is None or send is None:
        return nobody
    return lambda text: send(text, owner.node_id, server.client_id)


def warn_of_stretch(node: str, name: str, mask: Tensor, latents: Tensor) -> None:
    """Warn when a MASK (..., H, W) has other proportions than the latents (B, C, h, w) that it is resized to."""
    (height, width), (rows, columns) = mask.shape[-2:], latents.shape[-2:]
    if abs(height * columns / (width * rows) - 1) > 0.05:
        warn(
            node,
            f"`{name}` of {width} x {height} is stretched to the proportions of the latent, {columns} x {rows} cells. "
            "Connect a mask of the image that was encoded.",
        )


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
def _owner(owner: Owner | None) -> Iterator[None]:
    token = _OWNER.set(owner)
    try:
        yield
    finally:
        _OWNER.reset(token)


def collecting(class_type: str, node: type[Any], title: str) -> type[Any]:
    """Make a node class warn of inputs without effect (its UNUSED), and return its warnings; returns the class.

    They become `ui` output and, where the node has one, part of its report.
    """
    function = getattr(node, node.FUNCTION)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        executing = _executing()
        owner = Owner(executing, class_type) if executing is not None else None
        with _owner(owner):
            for text in unused(node, {k: v for k, v in bound.arguments.items() if k != "self"}):
                warn(title, text)
            returned = function(*args, **kwargs)
        return returned if owner is None else with_warnings(returned, node.RETURN_NAMES, owner.texts)

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
        report = "\n".join([result[at], *(f"Warning: {text}" for text in texts if text not in result[at])])
        ui = {key: [report] if list(shown) == [result[at]] else shown for key, shown in (ui or {}).items()}
        result = (*result[:at], report, *result[at + 1 :])
    return {"ui": {**(ui or {}), KEY: list(texts)}, "result": result}
