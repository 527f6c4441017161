"""What a person sees in a browser, in both renderers: a warning stands on its node until the node runs without it; seeds stay.

Needs the Python package playwright and a Chromium. COMFYUI_FRONTEND names another frontend's `static` folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from slipstream_tests.host import conftest
from slipstream_tests.host.test_warnings import PICTURE, canvas

screenshot = conftest.load("screenshot")
FRONTEND = os.environ.get("COMFYUI_FRONTEND", "")
RENDERERS = {"classic": False, "nodes 2.0": True}

SHOWN = """() => window.__host.app.graph._nodes.flatMap((n) =>
  (n.widgets ?? []).filter((w) => w.name === 'slipstream_warnings').map((w) => [n.type, w.value]))"""
# What can be seen beside toasts: inside the window, with a size, and topmost in its middle.
VISIBLE = """() => [...document.querySelectorAll('[role=alert]')].filter((e) => !e.closest('.p-toast, ol')).filter((e) => {
  const box = e.getBoundingClientRect(), [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
  return box.width > 20 && box.height > 10 && e.contains(document.elementFromPoint(x, y));
}).map((e) => e.innerText)"""
# Toasts that stand now; PrimeVue's until 1.49, a list of their own in later frontends. NOTE keeps the highest number.
TOASTS = """() => [...document.querySelectorAll('.p-toast-message, ol > li')]
  .filter((e) => e.innerText.includes('has no effect')).length"""
NOTE = f"""() => {{
  window.__toasts = 0;
  const note = () => {{ window.__toasts = Math.max(window.__toasts, ({TOASTS})()); }};
  new MutationObserver(note).observe(document.body, {{ childList: true, subtree: true }});
}}"""
VALUES = "() => window.__host.app.graph.serialize().nodes.map((n) => [n.id, n.widgets_values])"
SIZES = "() => window.__host.app.graph.serialize().nodes.map((n) => [n.id, Math.round(n.size[1])])"
SET = """([type, name, value]) => {
  const widget = window.__host.app.graph._nodes.find((n) => n.type === type).widgets.find((w) => w.name === name);
  widget.value = value;
  widget.callback?.(value);
}"""
WIDGETS = """(type) => Object.fromEntries(window.__host.app.graph._nodes.find((n) => n.type === type).widgets
  .filter((w) => w.serialize !== false && w.options?.serialize !== false).map((w) => [w.name, w.value]))"""
FRESH = "(type) => (window.LiteGraph.createNode(type).widgets ?? []).map((w) => w.name)"


def reason() -> str | None:
    """Return why there is no browser to test with, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "no browser here: pip install playwright"
    try:
        screenshot.find_chromium()
    except RuntimeError as error:
        return f"no browser here: {error}"
    return None


pytestmark = pytest.mark.skipif(reason() is not None, reason=str(reason()))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    comfyui, python = conftest.find_host() or pytest.skip("no ComfyUI here")
    args = ["--front-end-root", FRONTEND] if FRONTEND else []
    pack = (conftest.PACK_NAME, conftest.ROOT)
    with conftest.comfy_host.ComfyHost([pack], comfyui=comfyui, python=python, args=args) as host:
        yield host.url


@pytest.fixture(params=RENDERERS)
def opened(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    settings = {"Comfy.VueNodes.Enabled": RENDERERS[request.param]}
    with screenshot.frontend(url, settings=settings) as (page, report):
        yield page, report
        assert not report["page_errors"]


@pytest.fixture
def page(opened: Any) -> Any:
    return opened[0]


def run(page: Any) -> None:
    page.evaluate("() => { window.__host.ended = null; window.__host.app.queuePrompt(0); }")
    page.wait_for_function("() => window.__host.ended", timeout=120_000, polling=200)
    assert page.evaluate("() => window.__host.ended") == "success"
    page.wait_for_timeout(1000)


def test_a_warning_stays_until_the_setting_is_mended(opened: Any, request: pytest.FixtureRequest) -> None:
    page, report = opened
    if "2.0" in request.node.name and (why := screenshot.lacks_nodes_2(page, report)):
        pytest.skip(why)
    page.evaluate("async (prompt) => { await window.__host.app.loadApiJson(prompt, 'warnings'); }", canvas())
    page.wait_for_timeout(1000)
    page.evaluate(SET, ["SlipstreamSeedCanvas", "control_after_generate", "fixed"])
    screenshot.fit(page)
    page.evaluate(NOTE)
    before = page.evaluate(VALUES)
    run(page)
    assert page.evaluate(SHOWN) == [["SlipstreamSeedCanvas", PICTURE]]
    assert page.evaluate("() => window.__toasts") == 1
    page.wait_for_function(f"() => ({TOASTS})() === 0", timeout=30_000, polling=200)
    run(page)  # cached: the node does not run again
    screenshot.fit(page)
    folder = os.environ.get("SLIPSTREAM_SHOTS")
    if folder:
        renderer = "vue" if "2.0" in request.node.name else "classic"
        page.screenshot(path=f"{folder}/{report['frontend']}-{renderer}.png")
    assert page.evaluate(SHOWN) == [["SlipstreamSeedCanvas", PICTURE]]
    early = screenshot.early_nodes_2(page, report)  # there a toast has to do
    assert [text.split("\u26a0 ")[-1] for text in page.evaluate(VISIBLE)] == ([] if early else [PICTURE])
    assert page.evaluate(VALUES) == before, "the workflow is saved with the warning"
    sizes = page.evaluate(SIZES)
    page.evaluate(SET, ["SlipstreamSeedCanvas", "background", "picture"])
    run(page)
    assert page.evaluate(SHOWN) == []
    assert page.evaluate(VISIBLE) == []
    # Nodes 2.0 lays nodes out by itself, so a saved height may be a little less.
    assert all(saved <= mended for (_, saved), (_, mended) in zip(sizes, page.evaluate(SIZES), strict=True))


@pytest.mark.parametrize(
    ("example", "type", "at"),
    [("Find my fastest schedule", "SlipstreamSearchSchedule", 6), ("latent_fill", "SlipstreamTrainLatentFill", 14)],
)
def test_seeds_of_resumable_work_have_no_control(page: Any, example: str, type: str, at: int) -> None:
    """A fresh node has none, and a workflow that was saved with one keeps all its values."""
    assert "control_after_generate" not in page.evaluate(FRESH, type)
    assert "control_after_generate" in page.evaluate(FRESH, "SlipstreamMaskedRegenerate")
    workflow = json.loads(conftest.workflow_file(example).read_text())
    found = []
    for control in (None, "randomize"):
        for node in workflow["nodes"]:
            if node["type"] == type and control:
                node["widgets_values"].insert(at, control)
        page.evaluate(screenshot.LOAD, workflow)
        page.wait_for_timeout(500)
        found.append(page.evaluate(WIDGETS, type))
    assert found[0] == found[1]
    assert len(found[0]) >= at
