"""Make the help images that need a host: python tools/make_node_images.py [NAME ...] (COMFYUI_PATH, COMFYUI_PYTHON; default all).

Nodes are photographed in the real frontend, edits are run, the panel of Live Stream sees Chromium's fake camera. The other images of the
help pages come from make_cow_images, make_lmd_images, make_search_images and make_stream_images.
"""

from __future__ import annotations

import io
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import slipstream
import torch
from PIL import Image, ImageOps

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "host")]
import comfy_host  # noqa: E402
import make_workflows  # noqa: E402
import screenshot  # noqa: E402

edits = make_workflows.load_module(ROOT / "tools" / "workflows" / "edit.py")
stock = make_workflows.load_module(ROOT / "tools" / "workflows" / "host.py")
ASTRONAUT = ROOT / "assets" / "astronaut.jpg"
FOLDER = ROOT / "web" / "docs" / "img"
# Nodes whose help shows the node itself: what they give is a value, not an image.
NODES = {
    "SlipstreamAddSchedule": "add_schedule",
    "SlipstreamApplyCallReuse": "apply_call_reuse",
    "SlipstreamApplyLayerMask": "apply_layer_mask",
    "SlipstreamDoctor": "doctor",
    "SlipstreamEmptyLatent": "empty_latent",
    "SlipstreamInfluenceImages": "influence_images",
    "SlipstreamInvert": "invert",
    "SlipstreamLoadSchedule": "load_schedule",
    "SlipstreamReferenceObjective": "reference_objective",
    "SlipstreamResampleSchedule": "resample_schedule",
    "SlipstreamSaveSchedule": "save_schedule",
    "SlipstreamSelfObjective": "self_objective",
}
TASKS = ("SlipstreamMove", "SlipstreamPaste", "SlipstreamAppearance", "SlipstreamDrag")
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
ADD = """async (type) => {
  const app = window.__host.app, node = window.LiteGraph.createNode(type);
  await app.loadGraphData({nodes: [], links: [], groups: [], version: 0.4}, true, true);
  app.graph.add(node);
  node.pos = [0, 0];
  node.setSize([380, Math.max(node.size[1], node.computeSize()[1])]);
  const ds = app.canvas.ds;
  ds.scale = 1;
  ds.offset[0] = 120; ds.offset[1] = 140;
  app.canvas.deselectAll?.();
  app.graph.setDirtyCanvas(true, true);
  const at = app.canvas.canvas.getBoundingClientRect();
  return [at.left + 110, at.top + 110, 400, node.size[1] + 40];
}"""


def row(images: Sequence[Image.Image], name: str, height: int = 300, gap: int = 6) -> None:
    """Save images beside each other as web/docs/img/NAME.jpg."""
    shown = [ImageOps.contain(image.convert("RGB"), (4 * height, height)) for image in images]
    sheet = Image.new("RGB", (sum(i.width for i in shown) + gap * (len(shown) - 1), height), "white")
    left = 0
    for image in shown:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    sheet.save(FOLDER / f"{name}.jpg", quality=88)
    print(f"{name}.jpg", sheet.size)


def remove(g: Any) -> None:
    def task(g: Any, photo: Any) -> Any:
        return g.add("SlipstreamRemove", image=photo["IMAGE"], canvas=edits._drawing({"outline": edits.CLOUD}))

    edits._photo_workflow(g, "remove", "What goes", task, "")


def badge(g: Any) -> None:
    """The badge of the astronaut's suit moves and shrinks."""

    def task(g: Any, photo: Any) -> Any:
        drawing = edits._drawing({"brush": [[172, 384]], "width": 80}, size=(512, 512))
        return g.add("SlipstreamMove", image=photo["IMAGE"], canvas=drawing, dx=-62.0, dy=40.0, scale=0.8)

    edits._photo_workflow(g, "badge", "What moves", task, "")
    next(node for node in g.nodes if node.type == "LoadImage").widgets["image"] = ASTRONAUT.name


def previewed(describe: Callable[[Any], None]) -> Callable[[Any], None]:
    """A description with Edit Preview beside its task."""

    def build(g: Any) -> None:
        describe(g)
        named = {node.type: node for node in reversed(g.nodes)}
        task = next(named[type] for type in TASKS if type in named)
        g.add("SlipstreamEditPreview", image=named["LoadImage"], tasks=task)

    return build


# What is run for an image: photo, preview if there is one, and result; or what Before and After gives; or what is saved.
RUNS: dict[str, Callable[[Any], None]] = {
    "remove": remove,
    "edit_preview": previewed(edits.edit_move),
    "edit_move": edits.edit_move,
    "edit_paste": previewed(edits.edit_paste),
    "edit_appearance": previewed(edits.edit_appearance),
    "edit_drag": previewed(edits.edit_drag),
    "edit_photo": previewed(badge),
    "before_after": badge,
    "harmonise": edits.harmonise,
    "load_model": stock.text_to_image,
}
SHEETS, SAVED = ("before_after", "harmonise"), ("load_model",)


def made(host: Any, name: str) -> list[Image.Image]:
    """Run what a help image shows; returns its parts."""
    g = make_workflows.Graph(host.object_info(), name)
    RUNS[name](g)
    g.sections = []
    result = host.run(make_workflows.host_graph.to_api(g.build(), host.object_info()))
    assert result.ok, result.explain()
    found: dict[str, list[Image.Image]] = {}
    for file in result.files:
        found.setdefault(g.nodes[int(file.node) - 1].type, []).append(Image.open(io.BytesIO(file.read())))
    if name in SHEETS:
        return found["SlipstreamBeforeAfter"]
    if name in SAVED:
        return found["SaveImage"]
    photo = next(node for node in g.nodes if node.type == "LoadImage").widgets["image"]
    source = ASTRONAUT if photo == ASTRONAUT.name else pathlib.Path(os.environ["COMFYUI_PATH"]) / edits.PHOTO
    return [Image.open(source), *found.get("SlipstreamEditPreview", []), *found["SaveImage"]]


def example_clip() -> None:
    """Four frames of the clip, and below them the mask of the ball."""
    frames, mask, _ = slipstream.NODE_CLASS_MAPPINGS["SlipstreamExampleClip"]().load("bouncing ball", 20)
    both = torch.cat([frames, mask[..., None].expand(-1, -1, -1, 3)], 1)[::5]
    row([Image.fromarray((255 * each).round().byte().numpy()) for each in both], "example_clip", height=256, gap=0)


def canvas(host: Any) -> None:
    """The photo and the canvas of the example that moves an object, as it opens."""
    with screenshot.frontend(host.url, size=(1600, 900)) as (page, report):
        screenshot.load_workflow(page, report, ROOT / "example_workflows" / "01 Move an object in a photo.json")
        page.wait_for_timeout(4000)
        clip = {"x": 415, "y": 125, "width": 720, "height": 600}  # photo and canvas
        row([Image.open(io.BytesIO(page.screenshot(clip=clip)))], "canvas", height=600)


def photograph(host: Any, wanted: set[str]) -> None:
    with screenshot.frontend(host.url, size=(900, 1000), settings={"Comfy.VueNodes.Enabled": False}) as (page, _):
        for type, name in NODES.items():
            if name not in wanted:
                continue
            x, y, width, height = page.evaluate(ADD, type)
            page.wait_for_timeout(900)
            clip = {"x": x, "y": y, "width": width, "height": min(height, 990 - y)}
            shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
            shot.quantize(64).save(FOLDER / f"{name}.png", optimize=True)
            print(f"{name}.png", shot.size)


def live_panel(host: Any) -> None:
    with screenshot.frontend(host.url, size=(1600, 1300), flags=CAMERA) as (page, report):
        screenshot.load_workflow(page, report, ROOT / "example_workflows" / "13 Paint over my webcam.json")
        screenshot.fit(page)
        panel = page.locator(".slipstream-live").first
        panel.locator("[data-act=start]").click()
        panel.locator("summary").first.click()
        page.wait_for_timeout(15_000)
        shot = Image.open(io.BytesIO(panel.screenshot())).convert("RGB")
        panel.locator("[data-act=stop]").click()
        row([shot], "live_stream", height=450)


def main(names: list[str]) -> None:
    known = {*NODES.values(), *RUNS, "live_stream", "example_clip", "canvas"}
    if unknown := set(names) - known:
        raise SystemExit(f"Expected names among {sorted(known)}, but got {sorted(unknown)}.")
    wanted = set(names) or known
    if "example_clip" in wanted:
        example_clip()
    with comfy_host.ComfyHost([("slipstream", ROOT)]) as host:
        host.upload_image(pathlib.Path(os.environ["COMFYUI_PATH"]) / edits.PHOTO)
        host.upload_image(ASTRONAUT)
        for name in RUNS:
            if name in wanted:
                row(made(host, name), name)
        if wanted & set(NODES.values()):
            photograph(host, wanted)
        if "live_stream" in wanted:
            live_panel(host)
        if "canvas" in wanted:
            canvas(host)


if __name__ == "__main__":
    main(sys.argv[1:])
