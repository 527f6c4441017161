"""A first-time user's way with mouse and keyboard: own photo, paint, pull, Run; and what becomes of the drawing afterwards.

Needs the Python package `playwright` and a Chromium. COMFYUI_FRONTEND names another frontend's `static` folder. Both renderers are
tried; a frontend without Nodes 2.0 is tried in the classic one.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw
from slipstream_tests.host.conftest import load, workflow_file

pytest.importorskip("playwright.sync_api", reason="no playwright here")

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOVE_EXAMPLE = workflow_file("Move an object in a photo")
SIZE = (320, 240)
BALL, PLACE = (70, 90, 130, 150), (230, 120)  # box around the ball, and where its centre goes
MOVE = "() => { const n = window.__host.app.graph._nodes.find((n) => n.comfyClass === 'SlipstreamMove'); return "
VALUES = MOVE + "Object.fromEntries(n.widgets.map((w) => [w.name, w.value])) }"
VUE = "() => Boolean(window.LiteGraph.vueNodesMode) ? 'vue' : 'classic'"
RECTANGLES = """() => {
  const app = window.__host.app, scale = app.canvas.ds.scale;
  return app.graph._nodes.map((n) => {
    const drawn = document.querySelector(`[data-node-id="${n.id}"]`)?.getBoundingClientRect();
    const [width, height] = drawn ? [drawn.width / scale, drawn.height / scale - 30] : n.size;
    return [n.title, n.pos[0], n.pos[1] - 30, n.pos[0] + width, n.pos[1] + height];
  });
}"""


def photo() -> Image.Image:
    """A red ball on blue, as no model has seen it."""
    image = Image.new("RGB", SIZE, (45, 85, 215))
    ImageDraw.Draw(image).ellipse([75, 95, 125, 145], fill=(220, 40, 40))
    return image


@pytest.fixture(params=["classic", "nodes 2.0"])
def browser(host: Any, request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, Any]]]:
    wanted, screenshot = request.param == "nodes 2.0", load("screenshot")
    with screenshot.frontend(host.url, size=(1600, 950), settings={"Comfy.VueNodes.Enabled": wanted}) as (
        page,
        report,
    ):
        if wanted and (why := screenshot.lacks_nodes_2(page, report)):
            pytest.skip(why)
        yield page, report
        if folder := os.environ.get("SLIPSTREAM_SHOTS"):
            page.screenshot(path=f"{folder}/{request.node.name}-{report['frontend']}.png".replace(" ", "_"))


class Hands:
    """What a person does with the canvas of the Move node; counts the actions."""

    def __init__(self, page: Any) -> None:
        self.page, self.actions = page, 0
        self.root = page.locator(".slipstream-canvas").first

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place on the screen of a pixel of the photo, which is fitted into the stage with a margin of 6."""
        stage = self.root.locator("canvas")
        box, inner = stage.bounding_box(), stage.evaluate("(e) => [e.clientWidth, e.clientHeight]")
        shown = box["width"] / inner[0]
        scale = min((inner[0] - 12) / SIZE[0], (inner[1] - 12) / SIZE[1]) * shown
        return box["x"] + box["width"] / 2 + (x - SIZE[0] / 2) * scale, box["y"] + box["height"] / 2 + (
            y - SIZE[1] / 2
        ) * scale

    def press(self, button: str) -> None:
        self.actions += 1
        self.root.locator(f"[data-act={button}]").click()

    def key(self, name: str) -> None:
        """Press a key; it goes to whatever has the focus."""
        self.actions += 1
        self.page.keyboard.press(name)
        self.page.wait_for_timeout(300)

    def pull(self, *points: tuple[float, float]) -> None:
        self.actions += 1
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.at(*point), steps=4)
        self.page.mouse.up()
        self.page.wait_for_timeout(300)


def template_browser(page: Any) -> Any:
    """Open the template browser by its button."""

    def listed(route: Any) -> None:
        # A package of the host's own templates that is newer than the host has no list at this place, and old frontends then show none.
        answer = route.fetch()
        route.fulfill(response=answer) if answer.ok else route.fulfill(json=[])

    page.route("**/templates/index*.json", listed)
    page.locator("button[aria-label^='Templates']").first.click()
    return page.get_by_role("dialog")


def open_template(page: Any, words: str, name: str) -> None:
    """Find a template by typing in the template browser, and open it, as a person does."""
    dialog = template_browser(page)
    dialog.locator("input").first.click()
    page.keyboard.type(words)
    dialog.get_by_text(name, exact=True).first.click()
    page.wait_for_function("() => window.__host.app.graph._nodes.some((n) => n.type === 'LoadImage')", polling=200)
    page.wait_for_timeout(2500)


# Where the button that opens the file chooser of Load Image is on the screen.
UPLOAD = """() => {
  const app = window.__host.app, n = app.graph._nodes.find((n) => n.type === 'LoadImage');
  const drawn = document.querySelector(`[data-node-id="${n.id}"]`);
  if (drawn) {
    const button = [...drawn.querySelectorAll('button')].find(
      (b) => /choose file/.test(b.textContent) || b.querySelector('[class*=folder]'));
    const file = drawn.querySelector('input[type=file]');
    const at = (button ?? file?.parentElement ?? drawn).getBoundingClientRect();
    return [at.left + at.width / 2, at.top + at.height / 2];
  }
  const widget = n.widgets.find((w) => w.type === 'button'), ds = app.canvas.ds, at = app.canvas.canvas.getBoundingClientRect();
  const y = n.pos[1] + widget.last_y + 10, x = n.pos[0] + n.size[0] / 2;
  return [at.left + (x + ds.offset[0]) * ds.scale, at.top + (y + ds.offset[1]) * ds.scale];
}"""
# The image that Before and After shows: its size, and its corners on the screen.
RESULT = """() => {
  const app = window.__host.app, n = app.graph._nodes.find((n) => n.type === 'SlipstreamBeforeAfter');
  const drawn = document.querySelector(`[data-node-id="${n.id}"]`);
  if (drawn) {
    const image = drawn.querySelector('img'), box = image?.getBoundingClientRect();
    return image && image.complete && [image.naturalWidth, image.naturalHeight, box.left, box.top, box.right, box.bottom];
  }
  const image = n.imgs?.[0], ds = app.canvas.ds, at = app.canvas.canvas.getBoundingClientRect();
  const [x, y] = [(n.pos[0] + ds.offset[0]) * ds.scale + at.left, (n.pos[1] + ds.offset[1]) * ds.scale + at.top];
  return image && [image.naturalWidth, image.naturalHeight, x, y, x + n.size[0] * ds.scale, y + n.size[1] * ds.scale];
}"""


def choose_photo(page: Any, folder: pathlib.Path) -> None:
    """Load a photo through the file chooser of Load Image."""
    file = folder / "ball.png"
    photo().save(file)
    with page.expect_file_chooser() as chooser:
        page.mouse.click(*page.evaluate(UPLOAD))
    with page.expect_response(lambda answer: file.name in answer.url and "channel=rgb" in answer.url, timeout=60_000):
        chooser.value.set_files(str(file))  # the canvas asks for the photo that it shows from now on
    page.wait_for_timeout(1500)


def load_photo(page: Any, host: Any) -> None:
    """Give Load Image the photo of a phone that was held upright: stored on its side, and turned by its EXIF."""
    file, name, exif = io.BytesIO(), "phone.jpg", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo().transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif)
    host.upload_image(file.getvalue(), name)
    page.evaluate(
        """(name) => {
          const node = window.__host.app.graph._nodes.find((n) => n.type === 'LoadImage');
          const widget = node.widgets.find((w) => w.name === 'image');
          if (Array.isArray(widget.options?.values)) widget.options.values.push(name);
          widget.value = name;
          widget.callback?.(name);
        }""",
        name,
    )
    page.wait_for_timeout(1500)


def test_from_a_photo_of_ones_own_to_a_moved_object(host: Any, browser: Any, tmp_path: pathlib.Path) -> None:
    """With mouse and keyboard alone: template, photo, then at most six actions until the result stands on the screen."""
    page, report = browser
    screenshot = load("screenshot")
    open_template(page, "move an object", MOVE_EXAMPLE.stem)
    stored = json.loads(MOVE_EXAMPLE.read_text())["extra"]
    assert page.evaluate("() => window.__host.app.canvas.ds.scale") == pytest.approx(stored["ds"]["scale"]), (
        "a view that can be read"
    )
    assert "slipstreamView" in stored
    assert "slipstreamView" not in page.evaluate("() => window.__host.app.graph.serialize().extra")
    choose_photo(page, tmp_path)
    hands, began = Hands(page), time.monotonic()
    hands.press("clear")
    hands.key("r")  # the tool Box
    hands.pull(BALL[:2], (100, 120), BALL[2:])
    hands.pull((100, 120), (150, 110), (PLACE[0] - 10, PLACE[1]))
    hands.key("Shift+ArrowRight")  # ten pixels more
    values = page.evaluate(VALUES)
    assert json.loads(values["canvas"]) == {"size": list(SIZE), "shapes": [{"box": pytest.approx(BALL, abs=1)}]}
    assert (values["dx"], values["dy"]) == (pytest.approx(130, abs=2), pytest.approx(0, abs=2))
    assert (values["scale"], values["angle"]) == (1, 0)
    hands.actions += 1
    screenshot.click_run(page)
    assert screenshot.wait_for_run(page, report, 400) == "success", report["run"]
    assert hands.actions <= 6
    assert time.monotonic() - began < 120
    page.wait_for_function(RESULT, polling=200)
    page.wait_for_timeout(500)
    page.screenshot(
        path=os.environ.get("SLIPSTREAM_SHOTS", str(tmp_path)) + f"/moved-{report['frontend']}-{page.evaluate(VUE)}.png"
    )
    width, height, left, top, right, bottom = page.evaluate(RESULT)
    assert (width, height) == (
        2 * round(320 * 256 / 240) + 6,
        256,
    )  # before and after, at the least height of a caption
    assert 0 <= left < right <= (1920 if screenshot.early_nodes_2(page, report) else 1600), (
        "on the screen without a pan"
    )
    assert 0 <= top < bottom <= 950
    moved_only(saved(host), PLACE)
    # On second thoughts: the last step is taken back, and Run is pressed by its key while the canvas has the focus.
    page.evaluate("() => { window.__host.ended = null; }")
    page.mouse.click(*hands.at(5, 5))
    hands.key("Control+z")
    assert page.evaluate(VALUES) == {**values, "dx": values["dx"] - 10}
    with page.expect_response(screenshot.queued_prompt):
        page.keyboard.press("Control+Enter")
    assert screenshot.wait_for_run(page, report, 400) == "success", report["run"]
    moved_only(saved(host), (PLACE[0] - 10, PLACE[1]))
    assert not report["page_errors"]


def moved_only(result: np.ndarray, place: tuple[int, int]) -> None:
    """Check that the ball lies at a place, has left the one where it was, and that nothing else changed."""
    before = np.asarray(photo()).astype(int)
    assert result.shape == before.shape
    assert result[place[1], place[0], 0] > 150
    assert result[120, 100, 0] < 120
    far = np.ones(before.shape[:2], bool)
    for x, y in ((100, 120), place):
        far[max(0, y - 50) : y + 50, max(0, x - 50) : x + 50] = False
    assert np.array_equal(result[far], before[far])


def saved(host: Any) -> np.ndarray:
    """Return the image that the last run saved."""
    last = list(host.history().values())[-1]
    (file,) = [f for ui in last["outputs"].values() for f in ui.get("images", []) if f["type"] == "output"]
    image = Image.open(io.BytesIO(host.view(file["filename"], file["subfolder"])))
    return np.asarray(image.convert("RGB")).astype(int)


def test_what_was_drawn_is_kept(host: Any, browser: Any) -> None:
    page, report = browser
    screenshot = load("screenshot")
    screenshot.load_workflow(page, report, MOVE_EXAMPLE)
    load_photo(page, host)
    hands = Hands(page)
    # Of a drawing that was made on another image it is said, and an undo ends at what the workflow was saved with.
    assert "Drawn on 768 x 768 pixels" in hands.root.locator(".says").text_content()
    before = page.evaluate(VALUES)
    page.mouse.click(*hands.at(5, 5))
    hands.key("Control+z")
    assert page.evaluate(VALUES) == before
    hands.key("ArrowRight")
    hands.key("Control+z")
    assert page.evaluate(VALUES) == before, "an undo keeps the size that the drawing was made on"
    # The wheel zooms the canvas that has the focus, and leaves the graph as it is.
    zoom = "() => window.__host.app.canvas.ds.scale"
    graph_zoom = page.evaluate(zoom)
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(300)
    assert page.evaluate(zoom) == graph_zoom
    hands.key("0")
    hands.press("clear")
    hands.press("brush")
    hands.pull((85, 120), (115, 120))
    hands.press("place")
    hands.pull((100, 120), (160, 100))
    drawn = page.evaluate(VALUES)
    assert json.loads(drawn["canvas"])["size"] == list(SIZE)
    assert (drawn["dx"], drawn["dy"]) == (pytest.approx(60, abs=2), pytest.approx(-20, abs=2))
    # The knob lies 26 points of the stage above the box.
    knob = hands.root.locator("canvas").evaluate("(e) => 26 * e.getBoundingClientRect().width / e.clientWidth")
    top = hands.at(160, 100 - drawn_half(drawn))
    page.mouse.move(top[0], top[1] - knob)
    page.mouse.down()
    page.mouse.move(*hands.at(240, 60), steps=4)
    page.mouse.move(*hands.at(240, 100), steps=4)
    page.mouse.up()
    page.wait_for_timeout(300)
    turned = page.evaluate(VALUES)
    assert turned["angle"] == pytest.approx(90, abs=2)
    page.keyboard.press("Control+z")
    assert page.evaluate(VALUES) == drawn
    page.keyboard.press("Control+Shift+Z")
    page.keyboard.press("Shift+ArrowDown")
    nudged = page.evaluate(VALUES)
    assert (nudged["dy"], nudged["angle"]) == (drawn["dy"] + 10, turned["angle"])

    # Copy and paste: the copy has the drawing, and another one of its own.
    copies = page.evaluate(
        MOVE
        + """(() => {
          const app = window.__host.app;
          app.canvas.selectNode ? app.canvas.selectNode(n) : app.canvas.select(n);
          app.canvas.copyToClipboard([n]);
          app.canvas.pasteFromClipboard();
          const moves = app.graph._nodes.filter((n) => n.comfyClass === 'SlipstreamMove');
          return moves.map((n) => n.widgets.find((w) => w.name === 'canvas').value);
        })() }"""
    )
    assert copies == [nudged["canvas"]] * 2

    # Nothing is shown of an input that is not connected any more; the hint names what to do.
    unlinked = page.evaluate(
        MOVE
        + """(async () => {
          const at = n.inputs.findIndex((i) => i.name === 'image'), link = n.inputs[at].link;
          const graph = window.__host.app.graph, loader = graph._nodes.find((n) => n.type === 'LoadImage');
          const says = n.widgets.find((w) => w.name === 'canvas').element.querySelector('.says');
          n.disconnectInput(at);
          await new Promise((done) => setTimeout(done, 800));
          const said = says.textContent;
          loader.connect(0, n, at);
          await new Promise((done) => setTimeout(done, 1500));
          return [link != null, said, says.textContent.includes('right')];
        })() }"""
    )
    assert unlinked == [True, "Connect `image`.", True]

    # Saved and loaded, also inside a sub-graph, where it shows the photo from outside.
    stored = page.evaluate("() => window.__host.app.graph.serialize()")
    screenshot.load_workflow(page, report, stored)
    assert page.evaluate(VALUES) == nudged
    inside = page.evaluate(
        MOVE
        + """(async () => {
          const app = window.__host.app;
          if (!app.graph.convertToSubgraph) return null;
          const { subgraph } = app.graph.convertToSubgraph(new Set([n]));
          const inner = subgraph.nodes[0];
          await new Promise((done) => setTimeout(done, 1500));
          const widget = inner.widgets.find((w) => w.name === 'canvas');
          const stored = JSON.parse(JSON.stringify(app.graph.serialize()));
          return [inner.comfyClass, widget.value, Boolean(widget.element.querySelector('.says').textContent.includes('right')), stored];
        })() }"""
    )
    if inside is not None:
        assert inside[:3] == ["SlipstreamMove", nudged["canvas"], True]
        screenshot.load_workflow(page, report, inside[3])
        again = page.evaluate(
            "() => window.__host.app.graph._nodes.find((n) => n.subgraph).subgraph.nodes[0].widgets.find((w) => w.name === 'canvas').value"
        )
        assert again == nudged["canvas"]
    assert not report["page_errors"]


class Fingers:
    """Touches of the canvas of the first node that has one."""

    def __init__(self, page: Any, hands: Hands) -> None:
        self.page, self.hands, self.session = page, hands, page.context.new_cdp_session(page)
        self.session.send("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})

    def put(self, kind: str, *points: tuple[float, float]) -> None:
        places = [self.hands.at(*point) for point in points]
        touches = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(places)]
        self.session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
        self.page.wait_for_timeout(30)

    def pull(self, *points: tuple[float, float]) -> None:
        self.put("touchStart", points[0])
        for point in points[1:]:
            self.put("touchMove", point)
        self.put("touchEnd")
        self.page.wait_for_timeout(300)

    def pinch(self, *points: tuple[float, float]) -> None:
        """The first finger moves a little before the second is there, as fingers do."""
        self.put("touchStart", points[0])
        self.put("touchMove", (points[0][0] + 6, points[0][1] + 4))
        self.put("touchStart", (points[0][0] + 6, points[0][1] + 4), points[1])
        for i in range(1, 5):
            self.put("touchMove", (points[0][0] - 10 * i, points[0][1]), (points[1][0] + 10 * i, points[1][1]))
        self.put("touchEnd")
        self.page.wait_for_timeout(300)


def test_fingers_draw_and_a_pinch_zooms_the_canvas_and_nothing_else(host: Any, browser: Any) -> None:
    page, report = browser
    screenshot = load("screenshot")
    screenshot.load_workflow(page, report, MOVE_EXAMPLE)
    load_photo(page, host)
    hands = Hands(page)
    fingers = Fingers(page, hands)
    hands.press("clear")
    hands.press("box")
    fingers.pull(BALL[:2], (100, 120), BALL[2:])
    fingers.pull((100, 120), (110, 118), (130, 110))
    drawn = page.evaluate(VALUES)
    assert json.loads(drawn["canvas"])["shapes"] == [{"box": pytest.approx(BALL, abs=1)}]
    assert (drawn["dx"], drawn["dy"]) == (pytest.approx(30, abs=2), pytest.approx(-10, abs=2))
    graph = "() => { const ds = window.__host.app.canvas.ds; return [ds.scale, ...ds.offset] }"
    stage = hands.root.locator("canvas")
    before, shown = page.evaluate(graph), stage.screenshot()
    fingers.pinch((120, 110), (180, 110))
    assert page.evaluate(VALUES) == drawn
    assert page.evaluate(graph) == before
    assert stage.screenshot() != shown, "zoomed"

    screenshot.load_workflow(page, report, workflow_file("Pull points of a photo"))
    load_photo(page, host)
    hands = Hands(page)
    fingers.hands = hands
    assert "Drawn on 768 x 768" in hands.root.locator(".says").text_content()
    hands.press("clear")
    fingers.pull((100, 120), (120, 120), (150, 125))
    fingers.pinch((40, 40), (80, 40))
    pulled = page.evaluate(VALUES.replace("SlipstreamMove", "SlipstreamDrag"))
    ((handle, target),) = zip(json.loads(pulled["handles"]), json.loads(pulled["targets"]))
    near = functools.partial(pytest.approx, abs=2)
    assert (handle, target) == ({"x": near(100), "y": near(120)}, {"x": near(150), "y": near(125)})
    assert json.loads(pulled["canvas"]) == {"size": list(SIZE), "shapes": []}
    assert not report["page_errors"]


def drawn_half(values: dict[str, Any]) -> float:
    """Half the height of the stroke that was painted."""
    return json.loads(values["canvas"])["shapes"][0]["width"] / 2


def test_no_example_has_nodes_that_overlap(browser: Any) -> None:
    page, report = browser
    screenshot = load("screenshot")
    wrong = []
    for path in sorted((ROOT / "example_workflows").glob("*.json")):
        screenshot.load_workflow(page, report, path)
        screenshot.fit(page)
        boxes = page.evaluate(RECTANGLES)
        for i, (a, *first) in enumerate(boxes):
            for b, *second in boxes[:i]:
                if all(first[k] < second[k + 2] and second[k] < first[k + 2] for k in (0, 1)):
                    wrong.append(f"{path.stem}: {a} and {b}")
    assert not wrong, "\n".join(wrong)
