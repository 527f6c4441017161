"""Make the help images that need a host: python tools/make_node_images.py [NAME ...] (COMFYUI_PATH, COMFYUI_PYTHON; default all).

Nodes are photographed in the real frontend, edits are run, the panel of Live Stream sees Chromium's fake camera. The other images of the
help pages come from make_cow_pictures, make_lmd_pictures, make_search_pictures and make_stream_pictures.
"""

from __future__ import annotations

import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageOps

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "host")]
import comfy_host  # noqa: E402
import make_workflows  # noqa: E402
import screenshot  # noqa: E402

edits = make_workflows.load_module(ROOT / "tools" / "workflows" / "edit.py")
FOLDER = ROOT / "web" / "docs" / "img"
# Nodes whose help shows the node itself: what they give is a value, not an image.
NODES = {
    "SlipstreamAddSchedule": "add_schedule",
    "SlipstreamApplyCallReuse": "apply_call_reuse",
    "SlipstreamApplyLayerMask": "apply_layer_mask",
    "SlipstreamDoctor": "doctor",
    "SlipstreamInfluenceImages": "influence_images",
    "SlipstreamInvert": "invert",
    "SlipstreamLoadSchedule": "load_schedule",
    "SlipstreamReferenceObjective": "reference_objective",
    "SlipstreamResampleSchedule": "resample_schedule",
    "SlipstreamSaveSchedule": "save_schedule",
    "SlipstreamSelfObjective": "self_objective",
}
EDITS = ("remove", "edit_preview")
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


def edit_preview(g: Any) -> None:
    """The example that moves the arm, with its preview between photo and result."""
    edits.edit_move(g)
    named = {node.type: node for node in g.nodes}
    g.add("SlipstreamEditPreview", image=named["LoadImage"], tasks=named["SlipstreamMove"])


def edited(host: Any, name: str) -> list[Image.Image]:
    """Run an edit of the host's example photo; returns photo, preview if there is one, and result."""
    g = make_workflows.Graph(host.object_info(), name)
    {"remove": remove, "edit_preview": edit_preview}[name](g)
    g.sections = []
    result = host.run(make_workflows.host_graph.to_api(g.build(), host.object_info()))
    assert result.ok, result.explain()
    kinds = {str(node.id): node.type for node in g.nodes}
    found = {kinds[f.node]: Image.open(io.BytesIO(f.read())) for f in result.files if f.filename.endswith(".png")}
    photo = Image.open(pathlib.Path(os.environ["COMFYUI_PATH"]) / edits.PHOTO)
    return [photo, *(found[kind] for kind in ("SlipstreamEditPreview", "SaveImage") if kind in found)]


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
    known = {*NODES.values(), *EDITS, "live_stream"}
    if unknown := set(names) - known:
        raise SystemExit(f"Expected names among {sorted(known)}, but got {sorted(unknown)}.")
    wanted = set(names) or known
    with comfy_host.ComfyHost([("slipstream", ROOT)]) as host:
        host.upload_image(pathlib.Path(os.environ["COMFYUI_PATH"]) / edits.PHOTO)
        for name in EDITS:
            if name in wanted:
                row(edited(host, name), name)
        if wanted & set(NODES.values()):
            photograph(host, wanted)
        if "live_stream" in wanted:
            live_panel(host)


if __name__ == "__main__":
    main(sys.argv[1:])
