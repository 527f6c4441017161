"""The live panel in a page without a host, with the browser's fake camera, on the route that ComfyUI mounts too (`live_checks.js`)."""

from __future__ import annotations

import asyncio
import pathlib
import threading
from typing import Any

import pytest
from slipstream.stream.live import wire
from slipstream.stream.live.session import LiveStream
from slipstream.stream.live.settings import LiveSettings
from slipstream.stream.queues import percentile
from slipstream_tests.analytic import constant_cond
from slipstream_tests.stream.test_live import SIZE, Running
from slipstream_tests.web.test_canvas import BROWSERS, ROOT, opened

aiohttp = pytest.importorskip("aiohttp")
CHECKS = 24
CAMERAS = {"Chromium": 2, "Firefox": 1}  # that are no cameras
PACKED = [(1, 1, 0.5, "x"), (2, 2**40 + 3, 12345.678, "body"), (3, 7, 1e9, "")]
VALUES = [[3.0, 1.0, 2.0], [5.0], [float(i) for i in range(40, 0, -1)]]


class Again(Running):
    """A stream of the same name whenever one ends; its prompt is a brightness."""

    def _run(self) -> None:
        self.open = True
        while self.open:
            super()._run()
            self.streams.close(self.live)
            self.gate.error = None
            self.live = LiveStream(LiveSettings(guidance="none", steps=1), SIZE, note="a toy", id=self.live.id)
            if self.open:
                self.streams.open(self.live)

    def _apply(self, old: LiveSettings, new: LiveSettings) -> None:
        try:
            value = float(new.prompt or 0)
        except ValueError:
            raise ValueError("Expected `prompt` to be a number here.") from None
        self.batch.update(**new.updates())
        if new.prompt != old.prompt:
            self.batch.fade(constant_cond(value), new.crossfade)

    def close(self) -> None:
        self.open = False
        super().close()


def cases(running: Running, name: str) -> dict[str, Any]:
    return {
        "cameras": CAMERAS[name],
        "id": running.live.id,
        "size": [SIZE[1], SIZE[0]],
        "packed": [[*head, body, wire.pack(wire.Head(*head), body.encode()).hex()] for *head, body in PACKED],
        "percentiles": [[values, p, percentile(sorted(values), p)] for values in VALUES for p in (0, 50, 95, 99)],
    }


async def visit(running: Running, name: str, profile: pathlib.Path) -> list[list[str]]:
    """Open the page in a browser and return what it found."""
    from aiohttp import web
    from slipstream.stream.live.routes import PATH, connect

    results: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    transports: list[Any] = []

    async def join(request: Any) -> Any:
        transports.append(request.transport)
        return await connect(request, running.streams)

    async def abort(request: Any) -> Any:
        for transport in transports:
            transport.abort()
        transports.clear()
        return web.Response()

    async def fail(request: Any) -> Any:
        running.gate.error = ZeroDivisionError("a worker failed")
        return web.Response()

    async def take(request: Any) -> Any:
        results.set_result(await request.json())
        return web.Response()

    async def given(request: Any) -> Any:
        return web.json_response(cases(running, name))

    app = web.Application()
    app.router.add_get(PATH, join)
    app.router.add_get("/cases.json", given)
    for path, answer in (("/abort", abort), ("/fail", fail), ("/results", take)):
        app.router.add_post(path, answer)
    app.router.add_static("/", ROOT)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    page = f"http://127.0.0.1:{runner.addresses[0][1]}/tests/web/live.html"
    try:
        browser = opened(name, page, profile)
    except BaseException:
        await runner.cleanup()
        raise
    try:
        return await asyncio.wait_for(results, 200)
    finally:
        browser.kill()
        browser.wait()
        await runner.cleanup()


@pytest.mark.parametrize("name", BROWSERS)
def test_the_panel_in_a_page_without_a_host(tmp_path: pathlib.Path, name: str) -> None:
    running = Again(note="a toy")
    try:
        results = asyncio.run(visit(running, name, tmp_path))
    finally:
        running.close()
    wrong = "\n\n".join(f"{name}\n{error}" for name, error in results if error)
    assert not wrong, wrong
    assert len(results) >= CHECKS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("slipstream-")]
