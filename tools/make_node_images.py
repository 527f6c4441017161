"""Photograph nodes in the real frontend into web/docs/img: python tools/make_node_images.py URL (of a host that runs the pack)."""

from __future__ import annotations

import importlib.util
import io
import pathlib
import sys

from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
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


def main(url: str) -> None:
    spec = importlib.util.spec_from_file_location("screenshot", ROOT / "tests" / "host" / "screenshot.py")
    assert spec is not None
    assert spec.loader is not None
    screenshot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(screenshot)
    with screenshot.frontend(url, size=(900, 1000), settings={"Comfy.VueNodes.Enabled": False}) as (page, _):
        for type, name in NODES.items():
            x, y, width, height = page.evaluate(ADD, type)
            page.wait_for_timeout(900)
            clip = {"x": x, "y": y, "width": width, "height": min(height, 990 - y)}
            shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
            shot.quantize(64).save(FOLDER / f"{name}.png", optimize=True)
            print(f"{name}.png", shot.size)


if __name__ == "__main__":
    main(sys.argv[1])
