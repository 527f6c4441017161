"""The server of `slipstream live`: the route that ComfyUI mounts too, and the panel as a page of its own."""

from __future__ import annotations

import asyncio
import pathlib
import threading
from typing import Any

from .session import STREAMS, Streams

WEB = pathlib.Path(__file__).resolve().parents[2] / "web" / "live"


def import_aiohttp() -> Any:
    """Return aiohttp; raises ValueError with the remedy when it is not installed."""
    try:
        import aiohttp
        import aiohttp.web
    except ImportError as error:
        raise ValueError(
            "Expected aiohttp for a live stream, but it is not installed. Run: pip install aiohttp"
        ) from error
    return aiohttp


class Server:
    """Serves the panel at /#ID, and the streams, from a thread of its own within its context; `port` 0 takes a free one.

    Raises ValueError when the address is not free.
    """

    def __init__(self, host: str, port: int, streams: Streams = STREAMS) -> None:
        self.host, self.port, self.streams = host, port, streams
        self._aiohttp = import_aiohttp()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="slipstream-server", daemon=True)
        self._runner: Any = None

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def __enter__(self) -> Server:
        self._thread.start()
        try:
            self._call(self._start())
        except OSError as error:
            self._end()
            raise ValueError(
                f"Expected `port` to be free on {self.host}, but {self.port} cannot be used ({error.strerror or error}). Choose another."
            ) from error
        return self

    async def _start(self) -> None:
        from .routes import PATH, connect

        web = self._aiohttp.web
        app = web.Application()
        app.router.add_get(PATH, lambda request: connect(request, self.streams))
        for file in ("page.html", *sorted(path.name for path in WEB.glob("*.js"))):
            app.router.add_get("/" if file == "page.html" else f"/{file}", _file(web, WEB / file))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port).start()
        self.port = self._runner.addresses[0][1]

    def __exit__(self, *exc: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._runner is not None:
            self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def _file(web: Any, path: pathlib.Path) -> Any:
    async def answer(request: Any) -> Any:
        # Named here, because some systems call JavaScript plain text, which browsers do not run.
        kind = "text/html" if path.suffix == ".html" else "text/javascript"
        return web.FileResponse(path, headers={"Cache-Control": "no-cache", "Content-Type": f"{kind}; charset=utf-8"})

    return answer
