"""Live Stream as a person uses it, in both renderers, with Chromium's fake camera: Start, type, move, lose, close, stop, start again.

Needs the Python package playwright and a Chromium. COMFYUI_FRONTEND names another frontend's `static` folder.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from slipstream_tests.host.conftest import load

pytest.importorskip("playwright.sync_api", reason="no playwright here")

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
GREEN = "a large yellow circle on a green background"
NODE = "() => { const n = window.__host.app.graph._nodes.find((n) => n.comfyClass === 'SlipstreamLiveStream'); "
VALUES = NODE + "return Object.fromEntries(n.widgets.map((w) => [w.name, w.value])) }"
SET = """([name, value]) => {
  const n = window.__host.app.graph._nodes.find((n) => n.comfyClass === 'SlipstreamLiveStream');
  const w = n.widgets.find((w) => w.name === name);
  w.value = value;
  w.callback?.(value);
}"""
CORNER = """() => {
  const canvas = document.querySelector('.slipstream-live canvas.output');
  return [...canvas.getContext('2d').getImageData(6, 6, 1, 1).data.slice(0, 3)];
}"""
DRAWN = """() => { window.__drawn ??= (() => {
    const context = document.querySelector('.slipstream-live canvas.output').getContext('2d'), draw = context.drawImage;
    let count = 0;
    context.drawImage = function (...given) { count += 1; return draw.apply(this, given); };
    return () => count;
  })();
  return window.__drawn(); }"""


MOVE = """() => {
  const slider = document.querySelector('.slipstream-live [data-setting=feedback]');
  slider.value = 0.2;
  slider.dispatchEvent(new Event('input'));
}"""
# The socket closes as it sends the next frame, as one that is lost.
LOSE = """() => {
  const send = WebSocket.prototype.send;
  WebSocket.prototype.send = function (data) {
    if (!this.url.includes('/slipstream/live/')) return send.call(this, data);
    WebSocket.prototype.send = send;
    this.close(4000);
  };
}"""
NOTE = """() => {
  window.__host.app.api.addEventListener('slipstream.live', ({ detail }) => { window.__stream = detail.stream; });
}"""
WATCH = """(id) => {
  [window.told, window.results] = [[], 0];
  window.socket = new WebSocket(`${location.origin.replace('http', 'ws')}/slipstream/live/${id}`);
  socket.binaryType = 'arraybuffer';
  socket.onmessage = ({ data }) => typeof data === 'string' ? told.push(JSON.parse(data)) : results++;
}"""


@pytest.fixture(params=["classic", "nodes 2.0"])
def opened(host: Any, request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, Any]]]:
    wanted, screenshot = request.param == "nodes 2.0", load("screenshot")
    settings = {"Comfy.VueNodes.Enabled": wanted}
    with screenshot.frontend(host.url, size=(1600, 950), settings=settings, flags=FLAGS) as (page, report):
        if wanted and (why := screenshot.lacks_nodes_2(page, report)):
            pytest.skip(why)
        screenshot.load_workflow(page, report, ROOT / "example_workflows" / "13 Paint over my webcam.json")
        assert not report["missing"]
        screenshot.fit(page)
        try:
            yield page, report
        finally:
            host.interrupt()
            wait_idle(host)


def wait_idle(host: Any) -> None:
    end = time.monotonic() + 60
    while any(host.queue().values()):
        assert time.monotonic() < end, "the host still runs"
        time.sleep(0.2)


def press(page: Any, name: str) -> None:
    page.locator(f".slipstream-live [data-act={name}]").first.click()


def says(page: Any) -> str:
    return str(page.locator(".slipstream-live .says").first.inner_text())


def more_frames(page: Any, count: int = 2) -> None:
    """Wait until so many more results are drawn."""
    page.wait_for_function(f"(n) => ({DRAWN})() >= n", arg=page.evaluate(DRAWN) + count, timeout=90_000, polling=200)


def until(page: Any, condition: str, arg: Any = None) -> None:
    page.wait_for_function(condition, arg=arg, timeout=60_000, polling=200)


def test_camera_to_screen(host: Any, opened: Any, request: pytest.FixtureRequest) -> None:
    page, report = opened
    press(page, "start")
    more_frames(page, 4)
    red = page.evaluate(CORNER)
    assert red[0] > red[1]

    # A prompt that is typed into the node's widget is seen, at the latest the crossfade and the frames on their way later.
    page.evaluate(SET, ["crossfade", 2])
    page.evaluate(SET, ["prompt", GREEN])
    until(page, f"() => {{ const [r, g] = ({CORNER})(); return g > r + 30 }}")
    # One that is moved in the panel is written into the node.
    page.locator(".slipstream-live summary").first.click()
    page.evaluate(MOVE)
    until(page, NODE + "return n.widgets.find((w) => w.name === 'feedback').value === 0.2 }")
    page.locator(".slipstream-live summary").first.click()
    readouts = page.locator(".slipstream-live .readouts").first.inner_text()
    assert "capture to display p50" in readouts
    assert "limited by" in readouts
    if folder := os.environ.get("SLIPSTREAM_SHOTS"):
        page.screenshot(
            path=f"{folder}/live-{report['frontend']}-{request.node.callspec.params['opened']}.png".replace(" ", "_")
        )

    # The connection is lost and comes back.
    page.evaluate(LOSE)
    until(page, "() => document.querySelector('.slipstream-live .says').textContent.includes('lost')")
    more_frames(page)

    # Loaded again, the page takes its stream up, with the values that were set.
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(load("screenshot").READY, timeout=90_000, polling=250)
    page.evaluate(load("screenshot").LISTEN)
    until(page, "() => Boolean(document.querySelector('.slipstream-live canvas.output'))")
    more_frames(page)
    before = page.evaluate(VALUES)
    press(page, "stop")
    until(page, "() => window.__host.ended")
    assert page.evaluate("() => [window.__host.ended, window.__host.error]") == ["success", None]
    assert says(page) == "Stopped."
    assert (before["prompt"], before["feedback"]) == (GREEN, 0.2)
    stored = page.evaluate(
        "() => window.__host.app.graph.serialize().nodes.find((n) => n.type === 'SlipstreamLiveStream').widgets_values"
    )
    assert GREEN in (stored.values() if isinstance(stored, dict) else stored)
    wait_idle(host)

    # Started again, cancelled by the host.
    page.evaluate("() => { window.__host.ended = null; }")
    press(page, "start")
    more_frames(page)
    host.interrupt()
    until(page, "() => document.querySelector('.slipstream-live .says').textContent.includes('Cancelled in ComfyUI.')")
    wait_idle(host)
    # The page is loaded again above, and a frontend may have an error of its own each time.
    assert not set(report["page_errors"]) - set(report["page_errors_at_start"])


def test_a_second_tab_watches_and_a_closed_one_pauses(host: Any, opened: Any) -> None:
    page, report = opened
    if "classic" not in str(page.evaluate("() => window.LiteGraph.vueNodesMode ? 'vue' : 'classic'")):
        pytest.skip("the same in both renderers")
    page.evaluate(NOTE)
    press(page, "start")
    more_frames(page)
    stream = page.evaluate("() => window.__stream")
    other = page.context.browser.new_context().new_page()
    other.goto(host.url + "/extensions/slip-stream.v0/live/page.html")
    other.evaluate(WATCH, stream)
    other.wait_for_function("() => window.results > 0", timeout=60_000)
    assert other.evaluate("() => told.find((m) => m.type === 'role').producer") is False
    page.close()
    other.wait_for_function("() => told.some((m) => m.type === 'paused' && m.reason === 'page closed')", timeout=60_000)
    other.evaluate("() => socket.send(JSON.stringify({ type: 'stop' }))")
    other.wait_for_function("() => told.some((m) => m.type === 'ended' && m.reason === 'Stopped.')", timeout=60_000)
    other.close()
    wait_idle(host)
    # The page is loaded again above, and a frontend may have an error of its own each time.
    assert not set(report["page_errors"]) - set(report["page_errors_at_start"])


def test_a_node_that_does_not_run_says_so(host: Any, opened: Any) -> None:
    page, _ = opened
    for mode, word in ((2, "muted"), (4, "bypassed")):
        page.evaluate(NODE.replace("() =>", "(mode) =>") + "n.mode = mode }", mode)
        press(page, "start")
        until(
            page,
            "(word) => document.querySelector('.slipstream-live .says').textContent.startsWith(`The node is ${word}`)",
            word,
        )
    assert not any(host.queue().values())
