"""Live streams in the host: their route on its server, and the news of a stream to the page that queued it."""

from __future__ import annotations

import logging
import sys
from typing import Any

from ...stream.live.session import PAUSE, LiveStream

log = logging.getLogger(__name__)

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
    """Tell the page that queued the run which stream its node has: nobody else learns its id.

    Where no page did, and so nobody can look, the log tells it, with what to do.
    """
    server = _server()
    if server is None:
        return
    if server.client_id in server.sockets:
        server.send_sync(EVENT, {"node": node_id, "stream": stream.id}, server.client_id)
        return
    log.warning(
        "Live Stream: no page queued this run, or it is closed. It ends in %d minutes, unless frames come: slipstream push --host "
        "http://127.0.0.1:%s/slipstream/live/%s --input clip.mp4 --output out.mp4", PAUSE / 60, server.port, stream.id,
    )  # fmt: skip
