"""Live streams in the host: their route on its server, and the news of a stream to the page that queued it."""

from __future__ import annotations

import sys
from typing import Any

from ...stream.live.session import LiveStream

EVENT = "slipstream.live"


def _server() -> Any:
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def mount() -> None:
    """Add the route to the running host's server, where there is a host."""
    routes = getattr(_server(), "routes", None)
    if routes is None:
        return
    from ...stream.live.routes import PATH, connect

    routes.get(PATH)(connect)


def announce(stream: LiveStream, node_id: str | None) -> None:
    """Tell the page that queued the run which stream its node has: nobody else learns its id."""
    server = _server()
    if server is not None and server.client_id is not None:
        server.send_sync(EVENT, {"node": node_id, "stream": stream.id}, server.client_id)
