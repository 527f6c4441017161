"""One place to tell a user that a setting has no effect: in the host's log and as text under the running node."""

from __future__ import annotations

import logging

logger = logging.getLogger("slipstream")


def warn(node: str, text: str) -> None:
    """Log "node: text" and show it under the node that is running, when a browser is listening.

    Args:
        node: display name of our node.
        text: one sentence with the remedy: "`eta` has no effect with preserve on. Turn one of them off."
    """
    logger.warning("%s: %s", node, text)
    try:
        from comfy_execution.utils import get_executing_context
        from server import PromptServer
    except ImportError:  # hosts without an execution context: the log line is what there is
        return
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(f"Warning: {text}", context.node_id)
