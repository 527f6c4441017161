"""Our caches follow the host's own: POST /free empties them."""

from __future__ import annotations

import sys
from typing import Any

from ...core.cache import CACHES

ROUTES = ("/free", "/api/free")


def follow_host() -> None:
    """Listen to the running host's answers, where there is a host: what it is asked to free, we free too."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    signal = getattr(getattr(server, "app", None), "on_response_prepare", None)
    if signal is not None and not signal.frozen:
        signal.append(_after)


async def _after(request: Any, response: Any) -> None:
    if request.method == "POST" and request.path in ROUTES and response.status == 200:
        asked = await request.json()
        free(bool(asked.get("free_memory")), bool(asked.get("unload_models")))


def free(free_memory: bool, unload_models: bool) -> None:
    """Forget what every cache holds, or only leave the device, as the host does with its own."""
    for cache in list(CACHES):
        if free_memory:
            cache.clear()
        elif unload_models:
            cache.leave_device()
