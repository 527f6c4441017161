"""Write example_workflows/NAME.json (UI format, laid out) and NAME.jpg from short Python descriptions.

Usage, with a real host (COMFYUI_PATH, COMFYUI_PYTHON; default ~/ComfyUI and its .venv):

    python tools/make_workflows.py                   # every description in tools/workflows/
    python tools/make_workflows.py host cow          # those of tools/workflows/host.py and cow.py
    python tools/make_workflows.py cow --run         # also run each one and save the last node's images as thumbnail

A description is a function in tools/workflows/<technique>.py that takes a `Graph`; the file's `WORKFLOWS` maps the names of
the example files to them. Those are what a person reads in the template browser: a number for the order and a job. `TRIED` maps names of
workflows that the tests alone run, for nodes that no example shows; they lie in tests/host/workflows/.

    def text_to_image(g):
        model = g.add("SlipstreamLoadModel", model="pocket")
        prompt = g.add("CLIPTextEncode", clip=model, text="a large red circle on a blue background", title="Prompt")
        blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")
        latent = g.add("SlipstreamEmptyLatent", model=model)
        samples = g.add("KSampler", model=model, positive=prompt, negative=blank, latent_image=latent, seed=7, cfg=3.0)
        image = g.add("VAEDecode", samples=samples, vae=model)
        g.add("SaveImage", images=image, filename_prefix="slipstream")
        g.note("Made by the bundled model. Press **Run**.")

    WORKFLOWS = {"12 Draw with the bundled model": text_to_image}

- A socket takes a node (its first output of the socket's type is used) or `node["NAME"]` / `node[1]` (output by name or index).
- A widget that is not given gets the node's default; unknown names and missing sockets raise ValueError.
- `column=N` moves a node to another column (default: as far right as its consumers allow, loaders far left);
  `title=`, `color="#232"` and `mode=4` (bypassed) go to the node as they are.
- `g.upload("assets/photo.jpg")` returns the name for LoadImage and puts the file, ours or the host's, there before a `--run`.
- `g.note(text)` is the Read-me note: it comes first.
- `g.section("1 Your photo", [a, b], [c], row=0)` lays nodes out in columns inside a frame, beside the sections before it in this row;
  `size=(width, height)` of a node gives it more room. A workflow without sections gets them by its types of nodes: what goes in,
  what our nodes do, the result, and the rest below.
- `g.on_checkpoint(url, "2 GB", CLIPTextEncode={"text": "..."})` makes a variant of what was described for a checkpoint of the host.
- `g.app([(node, "widget")], [node])` makes an app of it too, NAME.app.json: a form of these widgets beside what these nodes show.
- `g.blueprint("Edit a photo", "...", [photo, saved], [(node, "widget")])` makes one node of
  all but the nodes outside: subgraphs/NAME.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHOWN, TESTED = ROOT / "example_workflows", ROOT / "tests" / "host" / "workflows"
COLUMN, GAP, WIDTH = 90, 64, 300  # a node's title lies above its place, and frontends differ by some pixels a node
# The first screen of 1600 x 950 shows this width of a workflow, beside the side bar; its corner lies below the tabs.
SCREEN, CORNER = 1440, (110, 130)
VIEW = "slipstreamView"  # web/view.js opens an example that has it at its stored view
LIVE_PROMPT = "a large yellow circle on a green background"
EXTRA_HEIGHT = {
    "SlipstreamEditPreview": 280,
    "SlipstreamBeforeAfter": 300,
    "SlipstreamAppearance": 680,
    "SlipstreamMove": 340,
    "SlipstreamPaste": 340,
    "SlipstreamRemove": 340,
    "SlipstreamDrag": 340,
    "SlipstreamSeedCanvas": 600,
    "SlipstreamLiveStream": 300,
    "SlipstreamSearchSchedule": 240,  # its chart while it runs
    "SlipstreamCowSampler": 40,
    "PreviewAny": 110,
    "SlipstreamStretchMap": 280,
    "SlipstreamInfluenceProfile": 280,
    "SlipstreamInfluenceImages": 280,
    "SaveImage": 280,
    "PreviewImage": 280,
    "LoadImage": 300,
    "LoadVideo": 310,
    "LoadImageMask": 300,
}


LOADER = "CheckpointLoaderSimple"
INPUTS = (
    "CLIPTextEncode",
    "SlipstreamEmptyLatent",
    "LoadImage",
    "SlipstreamLoadModel",
    "SlipstreamExamplePhoto",
    "SlipstreamExampleClip",
)


def load_module(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


host_graph = load_module(ROOT / "tests" / "host" / "graph.py")
blueprints = load_module(ROOT / "tools" / "blueprints.py")


@dataclass(eq=False)
class Output:
    """One output socket of a node."""

    node: Node
    slot: int
    type: str


@dataclass(eq=False)
class Node:
    """One node of a `Graph`; `node[i]` and `node["NAME"]` are its outputs."""

    id: int
    type: str
    info: dict[str, Any]
    widgets: dict[str, Any]
    sockets: dict[str, Output]
    look: dict[str, Any] = field(default_factory=dict)
    column: int | None = None
    given: tuple[int, int] | None = None

    def outputs(self) -> list[Output]:
        return [Output(self, i, str(kind)) for i, kind in enumerate(self.info["output"])]

    def __getitem__(self, key: int | str) -> Output:
        names = self.info["output_name"]
        if isinstance(key, str) and key not in names:
            raise ValueError(f"Expected an output of {self.type} among {names}, but got {key!r}.")
        return self.outputs()[names.index(key) if isinstance(key, str) else key]

    def of_type(self, kind: str) -> Output:
        for output in self.outputs():
            if output.type == kind or "*" in (kind, output.type) or output.type in kind.split(","):
                return output
        raise ValueError(f"Expected an output of type {kind} from {self.type}, but got {self.info['output']}.")

    @property
    def size(self) -> list[int]:
        inputs = host_graph.all_inputs(self.info)
        sockets = [name for name, spec in inputs.items() if not host_graph.is_widget(spec)]
        height = 16 + 21 * max(len(sockets), len(self.info["output"])) + EXTRA_HEIGHT.get(self.type, 0)
        # Nodes 2.0 has higher widgets, a line with the name of the pack, and a button for inputs that are advanced.
        height += 32 if self.type.startswith("Slipstream") else 6
        height += 36 * any((spec + [{}])[1].get("advanced") for spec in inputs.values())
        for name in host_graph.widget_names(self.info):
            options = (inputs[name] + [{}])[1] if name in inputs else {}
            height += 90 if options.get("multiline") else 28
        width, least = self.given or (WIDTH, 0)
        return [width, max(height, least)]


class Graph:
    """A workflow that is being described."""

    def __init__(self, object_info: dict[str, Any], name: str = "") -> None:
        self.object_info = object_info
        self.title = (
            re.sub(r"^\d+ ", "", name).replace("_", " ").capitalize() if "_" in name else re.sub(r"^\d+ ", "", name)
        )
        self.nodes: list[Node] = []
        self.notes: list[tuple[str, int]] = []
        self.sections: list[tuple[str, tuple[list[Node], ...], int]] = []
        self.uploads: list[str] = []
        self.linear: dict[str, Any] = {}
        self.plan: Any = None

    def add(
        self,
        type: str,
        *,
        column: int | None = None,
        title: str = "",
        size: tuple[int, int] | None = None,
        **values: Any,
    ) -> Node:
        """Add a node; sockets take nodes or outputs, widgets take values."""
        if type not in self.object_info:
            raise ValueError(f"Expected a node type that the host knows, but got {type!r}.")
        info = self.object_info[type]
        inputs = host_graph.all_inputs(info)
        look = {k: values.pop(k) for k in ("color", "bgcolor", "mode") if k in values and k not in inputs}
        unknown = set(values) - set(inputs)
        if unknown:
            raise ValueError(f"Expected inputs of {type} among {sorted(inputs)}, but got {sorted(unknown)}.")
        widgets, sockets = {}, {}
        for name, spec in inputs.items():
            given = values.get(name)
            if isinstance(given, (Node, Output)):
                kind = "COMBO" if isinstance(spec[0], list) else str(spec[0])
                sockets[name] = given.of_type(kind) if isinstance(given, Node) else given
            if host_graph.is_widget(spec):
                widgets[name] = host_graph.default_of(spec) if given is None or name in sockets else given
            elif name not in sockets and name in info["input"].get("required", {}):
                raise ValueError(f"Expected a value for the socket `{name}` of {type}, but got none.")
        node = Node(len(self.nodes) + 1, type, info, widgets, sockets, {**look, "title": title or None}, column, size)
        self.nodes.append(node)
        return node

    def note(self, text: str, height: int = 0) -> None:
        if not self.notes and not text.startswith("#"):
            text = f"# {self.title}\n\n{text}"
        self.notes.append((text, max(height, 90 + 22 * (len(text) // 34))))

    def section(self, title: str, *columns: list[Node], row: int = 0) -> None:
        self.sections.append((title, columns, row))

    def app(self, inputs: list[tuple[Node, str]], outputs: list[Node]) -> None:
        """Make a form of widgets of it, beside what the output nodes show."""
        self.linear = {
            "inputs": [[node.id, widget] for node, widget in inputs],
            "outputs": [node.id for node in outputs],
        }

    def blueprint(
        self,
        name: str,
        description: str,
        outside: list[Node],
        widgets: list[tuple[Node, str]],
    ) -> None:
        """Make one sub-graph node of it too: all but the nodes `outside`, with these widgets."""
        shown = tuple((node.id, widget) for node, widget in widgets)
        self.plan = blueprints.Blueprint(name, description, frozenset(node.id for node in outside), shown)

    def on_checkpoint(self, url: str, size: str, **widgets: dict[str, Any]) -> None:
        """Load the checkpoint at `url` with the host's own node in place of Load Model; `widgets` by the titles or types of nodes.

        The frontend offers the download where the file is missing.
        """
        file = url.rsplit("/", 1)[1]
        for node in self.nodes:
            node.widgets.update(widgets.get(node.look["title"] or node.type, {}))
            if node.type == "SlipstreamLoadModel":
                node.type, node.info, node.widgets = LOADER, self.object_info[LOADER], {"ckpt_name": file}
                models = [{"name": file, "url": url, "directory": "checkpoints"}]
                node.look["properties"] = {"Node name for S&R": LOADER, "models": models}
        text = self.notes[0][0].split("\n\n", 1)[1].split("\n\n**Your own model**")[0]
        self.notes = []
        self.note(
            f"# {self.title}\n\n{text}\n\n**The model**: {file} ({size}) belongs into models/checkpoints. ComfyUI offers the download "
            "where it is missing. Any other checkpoint of its kind works: choose it in *Load Checkpoint*. The size follows the model."
        )
        self.linear, self.plan = {}, None

    def upload(self, path: str) -> str:
        self.uploads.append(path)
        return pathlib.Path(path).name

    def columns(self) -> dict[Node, int]:
        """Return each node's column: consumers right of producers, nodes without inputs next to their first consumer."""
        depth: dict[Node, int] = {}
        for node in self.nodes:
            depth[node] = max((depth[s.node] + 1 for s in node.sockets.values()), default=0)
        for node in reversed(self.nodes):
            users = [n for n in self.nodes if any(s.node is node for s in n.sockets.values())]
            if users and not node.info["name"].endswith(("LoadModel", "CheckpointLoaderSimple")):
                depth[node] = max(depth[node], min(depth[u] for u in users) - 1)
            depth[node] = depth[node] if node.column is None else node.column
        return depth

    def build(self) -> dict[str, Any]:
        """Return the UI-format workflow."""
        columns, links, outgoing = self.columns(), [], {}
        for node in self.nodes:
            for name, source in node.sockets.items():
                links.append([len(links) + 1, source.node.id, source.slot, node.id, name, source.type])
                outgoing.setdefault((source.node.id, source.slot), []).append(len(links))
        boxes, right = self._note_boxes()
        self.sections = self.sections or self._by_role(columns)
        placed, frames = self._sectioned(right)
        drawn = [self._node(node, placed[node], links, outgoing, order) for order, node in enumerate(self.nodes)]
        drawn += [note_node(len(drawn) + 1 + i, text, box) for i, ((text, _), box) in enumerate(zip(self.notes, boxes))]
        slots = {(n["id"], s["name"]): i for n in drawn for i, s in enumerate(n["inputs"])}
        for link in links:
            link[4] = slots[(link[3], link[4])]
        view = first_view([*boxes, *placed.values(), *(box for _, box in frames)])
        return {
            "last_node_id": len(drawn), "last_link_id": len(links), "nodes": drawn, "links": links,
            "groups": [group_frame(title, box, i) for i, (title, box) in enumerate(frames)],
            "config": {}, "extra": {"ds": view, VIEW: True, **self._linear()}, "version": 0.4,
        }  # fmt: skip

    def _linear(self) -> dict[str, Any]:
        return {"linearData": self.linear} if self.linear else {}

    def _note_boxes(self) -> tuple[list[list[int]], int]:
        """Return the boxes of the notes, one below the other, and where the nodes begin right of them."""
        boxes, top = [], 80
        for _, height in self.notes:
            boxes.append([60, top, WIDTH, height])
            top += height + GAP
        return boxes, 60 + (WIDTH + COLUMN if boxes else 0)

    def _by_role(self, columns: dict[Node, int]) -> list[tuple[str, tuple[list[Node], ...], int]]:
        """Return sections by what nodes do; within one, nodes follow their links."""
        roles: dict[str, list[Node]] = {"1 What goes in": [], "2 What happens": [], "3 Result": [], "How": []}
        for node in sorted(self.nodes, key=lambda node: columns[node]):
            shows = node.type.startswith(("Save", "Preview"))
            ours = node.type.startswith("Slipstream")
            role = 0 if node.type in INPUTS else 2 if shows else 1 if ours else 3
            list(roles.values())[role].append(node)
        return [(title, stacked(nodes), int(title == "How")) for title, nodes in roles.items() if nodes]

    def _sectioned(self, left: int) -> tuple[dict[Node, list[int]], list[tuple[str, list[int]]]]:
        """Return the boxes of the nodes in their sections, and those of the sections, one row below the other."""
        boxes: dict[Node, list[int]] = {}
        frames = []
        top = 80
        for row in sorted({row for *_, row in self.sections}):
            x, lowest = left, top
            for title, columns, at in self.sections:
                if at != row:
                    continue
                start, end = x, top
                for nodes in columns:
                    y = top + 70
                    for node in nodes:
                        boxes[node] = [x + 20, y, *node.size]
                        y += node.size[1] + GAP
                    x += max(node.size[0] for node in nodes) + 50
                    end = max(end, y - GAP + 20)
                frames.append((title, [start, top, x - start - 10, end - top]))
                x, lowest = x + 20, max(lowest, end)
            top = lowest + 50
        lost = [node.type for node in self.nodes if node not in boxes]
        if lost:
            raise ValueError(f"Expected every node in a section, but got none for {lost}.")
        return boxes, frames

    def _node(
        self, node: Node, box: list[int], links: list[list[Any]], outgoing: dict[Any, Any], order: int
    ) -> dict[str, Any]:
        incoming = {k[4]: k[0] for k in links if k[3] == node.id}
        specs = host_graph.all_inputs(node.info)
        values = [node.widgets.get(name, default) for name, default in host_graph.widgets(node.info)]
        inputs = []
        for name, spec in specs.items():
            kind = "COMBO" if isinstance(spec[0], list) else spec[0]
            entry = {"name": name, "type": kind, "link": incoming.get(name)}
            if host_graph.is_widget(spec):
                entry["widget"] = {"name": name}
            elif name not in node.info["input"].get("required", {}):
                entry["shape"] = 7
            inputs.append(entry)
        # Sockets first: the frontend draws them above the widgets and numbers link slots by this list.
        inputs.sort(key=lambda entry: "widget" in entry)
        outputs = [
            {"name": name, "type": kind, "links": outgoing.get((node.id, i)) or None, "slot_index": i}
            for i, (name, kind) in enumerate(zip(node.info["output_name"], node.info["output"]))
        ]
        look = {k: v for k, v in node.look.items() if v is not None}
        return {
            "id": node.id, "type": node.type, "pos": box[:2], "size": box[2:], "flags": {}, "order": order,
            "mode": 0, "inputs": inputs, "outputs": outputs, "properties": {"Node name for S&R": node.type},
            "widgets_values": values, **look,
        }  # fmt: skip


def stacked(nodes: list[Node], most: int = 880) -> tuple[list[Node], ...]:
    """Return nodes in columns that are not much higher than the screen."""
    columns: list[list[Node]] = []
    height = most
    for node in nodes:
        height += node.size[1] + GAP
        if height > most:
            columns.append([])
            height = node.size[1] + GAP
        columns[-1].append(node)
    return tuple(columns)


def note_node(id: int, text: str, box: list[int]) -> dict[str, Any]:
    return {
        "id": id, "type": "MarkdownNote", "pos": box[:2], "size": box[2:], "flags": {}, "order": id, "mode": 0,
        "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text], "color": "#432", "bgcolor": "#653",
    }  # fmt: skip


def group_frame(title: str, box: list[int], id: int) -> dict[str, Any]:
    return {"id": id + 1, "title": title, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}}


def first_view(boxes: list[list[int]]) -> dict[str, Any]:
    """Return the stored view: all of the width where text stays readable, from the top left corner."""
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    across = max(b[0] + b[2] for b in boxes) - left
    scale = round(min(1.0, max(0.7, SCREEN / across)), 2)
    return {"scale": scale, "offset": [round(CORNER[0] / scale - left), round(CORNER[1] / scale - top)]}


def thumbnail(files: list[Any], path: pathlib.Path, parts: int) -> None:
    """Save a square JPEG of what Before and After shows of `parts` images: four whole, else the last one with the others as insets."""
    from PIL import Image
    from slipstream.core.captions import GAP

    files = [f for f in files if f.filename.endswith((".png", ".jpg", ".webp"))]
    # Before and After is the preview with the largest id; other examples have what they save.
    files = [f for f in files if f.type == "temp"] or files
    last = max(files, key=lambda f: int(f.node)).node
    sheet = Image.open(io.BytesIO([f for f in files if f.node == last][-1].read())).convert("RGB")
    count = parts if parts in (2, 3) else 1
    step = (sheet.width + GAP) // count
    square([sheet.crop((at * step, 0, (at + 1) * step - GAP, sheet.height)) for at in range(count)], path)


def square(each: list[Any], path: pathlib.Path, size: int = 400) -> None:
    """Save the last image as a square JPEG, with the others as insets."""
    from PIL import Image, ImageOps

    corner = (0.0, 0.5)  # captions and the names of a chart stand on the left
    made = ImageOps.fit(each[-1], (size, size), Image.Resampling.LANCZOS, centering=corner)
    for at, image in enumerate(each[:-1]):
        inset = ImageOps.fit(image, (size // 3, size // 3), Image.Resampling.LANCZOS, centering=corner)
        left = size - inset.width - 14 if at else 8
        made.paste(ImageOps.expand(inset, 3, "white"), (left, size - inset.height - 14))
    made.save(path, quality=88)


def badge(path: pathlib.Path) -> None:
    """Save the thumbnail of a variant: that of the example that it was made from, with the name of its model."""
    from PIL import Image, ImageDraw, ImageFont

    job, model = path.stem[3:].rsplit(", ", 1)
    (bundled,) = path.parent.glob(f"[0-9][0-9] {job}.jpg")
    image = Image.open(bundled).convert("RGB")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(34)
    width = draw.textlength(model, font) + 32
    draw.rounded_rectangle((image.width - width - 12, 12, image.width - 12, 64), 10, fill="#1f6feb")
    draw.text((image.width - 12 - width / 2, 38), model, "white", font, anchor="mm")
    image.save(path.with_suffix(".jpg"), quality=88)


def live_frames(host: Any, prompt: dict[str, Any], clip: pathlib.Path, frame: int = 20, count: int = 16) -> list[Any]:
    """Push one frame of a clip into a live workflow, type another prompt; returns that frame and the result after `count` of them."""
    import itertools
    import tempfile
    import threading

    from PIL import Image
    from slipstream.stream.live import client
    from slipstream.stream.video import open_source

    pixels, _ = next(itertools.islice(open_source(str(clip)), frame, None))
    sent, back = Image.fromarray(pixels.numpy()), []

    class Sink:
        def check(self, height: int, width: int) -> None: ...

        def write(self, image: Any, stamp: Any) -> None:
            back.append(image)
            if len(back) == count:
                running.interrupt()

    with tempfile.TemporaryDirectory() as folder:
        sent.save(pathlib.Path(folder) / "frame.png")
        running = host.submit(prompt)
        stream = running.wait_for(lambda event: event.type == "slipstream.live", timeout=120).data["stream"]
        url = f"{host.url}/slipstream/live/{stream}"
        pushing = threading.Thread(
            target=client.push,
            args=(url, open_source(folder, 10), Sink()),
            kwargs={"loop": True, "settings": {"prompt": LIVE_PROMPT}},
        )
        pushing.start()
        running.wait(120)
        pushing.join()
    last = back[-1] if not back[-1].is_floating_point() else (255 * back[-1]).round().byte()
    return [sent, Image.fromarray(last.numpy())]


def collect(names: list[str]) -> dict[pathlib.Path, Callable[[Graph], None]]:
    """Return the descriptions of the named techniques, or of all, by the file that each is written to."""
    paths = sorted((ROOT / "tools" / "workflows").glob("*.py"))
    unknown = set(names) - {p.stem for p in paths}
    if unknown:
        raise SystemExit(f"no description tools/workflows/{sorted(unknown)[0]}.py")
    found: dict[pathlib.Path, Callable[[Graph], None]] = {}
    for path in paths:
        if names and path.stem not in names:
            continue
        module = load_module(path)
        for folder, described in ((SHOWN, module.WORKFLOWS), (TESTED, getattr(module, "TRIED", {}))):
            found.update({folder / f"{name}.json": describe for name, describe in described.items()})
    return found


def write(workflow: dict[str, Any], path: pathlib.Path) -> None:
    """Write a workflow, and beside it the app that it makes."""
    path.write_text(json.dumps(workflow, indent=1) + "\n")
    if "linearData" in workflow["extra"]:
        app = {**workflow, "extra": {**workflow["extra"], "linearMode": True}}
        path.with_suffix(".app.json").write_text(json.dumps(app, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("techniques", nargs="*", help="files of tools/workflows/ without .py (default: all)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these examples")
    parser.add_argument("--run", action="store_true", help="run each workflow and save its last image as thumbnail")
    args = parser.parse_args(argv)
    home = pathlib.Path("~/ComfyUI").expanduser()
    os.environ.setdefault("COMFYUI_PATH", str(home))
    os.environ.setdefault("COMFYUI_PYTHON", str(pathlib.Path(os.environ["COMFYUI_PATH"]) / ".venv" / "bin" / "python"))
    comfy_host = load_module(ROOT / "tests" / "host" / "comfy_host.py")
    failed = 0
    with comfy_host.ComfyHost([("slipstream", ROOT)]) as host:
        info = host.object_info()
        for path, describe in collect(args.techniques).items():
            if args.only and path.stem not in args.only:
                continue
            graph = Graph(info, path.stem)
            describe(graph)
            workflow = graph.build()
            write(workflow, path)
            if graph.plan:
                file = ROOT / "subgraphs" / f"{graph.plan.name}.json"
                file.write_text(json.dumps(blueprints.blueprint_of(workflow, graph.plan), indent=1) + "\n")
            print(f"{path.relative_to(ROOT)}: {len(graph.nodes)} nodes")
            for upload in graph.uploads:
                host.upload_image(
                    next(r / upload for r in (ROOT, pathlib.Path(os.environ["COMFYUI_PATH"])) if (r / upload).is_file())
                )
            if any(node.type == LOADER for node in graph.nodes):  # its model is not here
                badge(path)
                continue
            if args.run and any(node.type == "SlipstreamLiveStream" for node in graph.nodes):
                square(
                    live_frames(host, host_graph.to_api(workflow, info), ROOT / "assets" / "ball.mp4"),
                    path.with_suffix(".jpg"),
                )
            elif args.run:
                result = host.run(host_graph.to_api(workflow, info))
                print(f"  {result.status} in {result.seconds:.1f} s, {len(result.files)} files")
                if not result.ok:
                    failed += 1
                    print(result.explain())
                elif result.files and path.parent == SHOWN:
                    shown = [node for node in graph.nodes if node.type == "SlipstreamBeforeAfter"]
                    parts = (
                        sum(name in shown[-1].sockets for name in ("before", "after", "third", "fourth"))
                        if shown
                        else 1
                    )
                    thumbnail(result.files, path.with_suffix(".jpg"), parts)
                    if graph.linear:
                        shutil.copy(path.with_suffix(".jpg"), path.with_suffix(".app.jpg"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
