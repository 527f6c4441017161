"""What every node owes its user: id, category, texts, tooltips, legal defaults, a help page, an example that runs as it is."""

from __future__ import annotations

import inspect
import json
import pathlib
import re
import sys
import types
from typing import Any

import pytest
import slipstream
from slipstream_tests.host import graph

ROOT = pathlib.Path(slipstream.__file__).resolve().parent
NODES: dict[str, type[Any]] = slipstream.NODE_CLASS_MAPPINGS
FOLDERS = (ROOT / "example_workflows", ROOT / "tests" / "host" / "workflows")
WORKFLOWS = {p.stem: json.loads(p.read_text()) for folder in FOLDERS for p in sorted(folder.glob("*.json"))}
each_node = pytest.mark.parametrize("id", NODES)
each_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def inputs_of(node: type[Any]) -> dict[str, Any]:
    return graph.all_inputs({"input": node.INPUT_TYPES()})


def options_of(spec: Any) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def check_value(where: str, spec: Any, value: Any) -> None:
    """Assert that a widget's value is one that the host would accept."""
    options, kind = options_of(spec), spec[0]
    if isinstance(kind, list):
        # Files and models differ from machine to machine: an empty list is the host's to fill.
        assert not kind or value in kind, f"{where}: {value!r} is not among {kind}"
        return
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if kind in types:
        assert isinstance(value, types[kind]), f"{where}: {value!r} is no {kind}"  # type: ignore[arg-type]
    if kind in ("INT", "FLOAT"):
        low, high = options.get("min", float("-inf")), options.get("max", float("inf"))
        assert low <= value <= high, f"{where}: {value} is not between {low} and {high}"


def test_there_are_nodes() -> None:
    assert "SlipstreamLoadModel" in NODES
    assert set(NODES) == set(slipstream.NODE_DISPLAY_NAME_MAPPINGS)


@each_node
def test_identity(id: str) -> None:
    node = NODES[id]
    assert re.fullmatch(r"Slipstream[A-Z][A-Za-z]+", id)
    assert re.fullmatch(r"slipstream/[a-z ]+(/advanced)?", node.CATEGORY)
    assert slipstream.NODE_DISPLAY_NAME_MAPPINGS[id].strip()
    assert len(node.DESCRIPTION) > 40
    assert node.DESCRIPTION.rstrip().endswith((".", "!", ")"))


@each_node
def test_a_node_is_found_by_what_people_type(id: str) -> None:
    words = NODES[id].SEARCH_ALIASES
    assert len(words) > 1
    assert all(word == word.lower().strip() and word for word in words)
    assert "slipstream" not in slipstream.NODE_DISPLAY_NAME_MAPPINGS[id].lower()  # the frontend has a badge for that


@each_node
def test_outputs_are_named_and_explained(id: str) -> None:
    node = NODES[id]
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    assert all(text.strip() for text in node.OUTPUT_TOOLTIPS)
    assert node.RETURN_TYPES or getattr(node, "OUTPUT_NODE", False), "a node without outputs must be an output node"


@each_node
def test_every_input_has_a_tooltip_and_a_legal_default(id: str) -> None:
    for name, spec in inputs_of(NODES[id]).items():
        options = options_of(spec)
        assert options.get("tooltip", "").strip(), f"{id}.{name} has no tooltip"
        if "default" in options:
            check_value(f"{id}.{name}", spec, options["default"])
        if spec[0] in ("INT", "FLOAT") and not options.get("forceInput"):
            assert {"default", "min", "max"} <= set(options), f"{id}.{name} needs a default and a range"


@each_node
def test_the_function_takes_exactly_the_inputs(id: str) -> None:
    node = NODES[id]
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    hidden = node.INPUT_TYPES().get("hidden", {})
    assert set(parameters) - {"self"} == {*inputs_of(node), *hidden}
    for name in node.INPUT_TYPES().get("optional", {}):
        assert parameters[name].default is not inspect.Parameter.empty, f"{id}.{name} is optional but has no default"


def test_choices_are_the_registries_of_the_library() -> None:
    from slipstream.core import SAMPLERS, SCHEDULES
    from slipstream.lmd import SIZES
    from slipstream.lmd.mask_schedule import DIRECTIONS, KINDS
    from slipstream.lmd.training import FAMILIES

    regenerate, train = inputs_of(NODES["SlipstreamMaskedRegenerate"]), inputs_of(NODES["SlipstreamTrainLatentFill"])
    for spec, registry in (
        (regenerate["sampler_name"], SAMPLERS),
        (regenerate["schedule"], SCHEDULES),
        (regenerate["kind"], KINDS),
        (regenerate["direction"], DIRECTIONS),
        (train["size"], SIZES),
        (train["ratio"], ["random", *KINDS]),
        (train["masks"], ["mixed", *FAMILIES]),
    ):
        assert set(spec[0]) == set(registry)


def test_listing_the_nodes_writes_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/object_info calls INPUT_TYPES of every node, also on hosts whose folders are read only."""
    host = types.ModuleType("folder_paths")
    host.models_dir = str(tmp_path / "models")  # type: ignore[attr-defined]
    host.get_user_directory = lambda: str(tmp_path / "user")  # type: ignore[attr-defined]
    host.get_input_directory = lambda: str(tmp_path / "input")  # type: ignore[attr-defined]
    host.get_folder_paths = lambda kind: [str(tmp_path / kind)]  # type: ignore[attr-defined]
    host.get_filename_list = lambda kind: []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", host)
    for node in NODES.values():
        node.INPUT_TYPES()
    assert not list(tmp_path.iterdir())


@each_node
def test_help_page(id: str) -> None:
    page = ROOT / "web" / "docs" / f"{id}.md"
    assert page.is_file(), f"web/docs/{id}.md is missing"
    text = page.read_text()
    assert len(text) > 200
    pictures = shown_in(page)
    assert pictures, f"{id}.md has no image"
    for picture in pictures:
        assert (page.parent / picture).is_file(), f"{id}.md shows {picture}, which is missing"


@each_node
def test_the_table_of_a_help_page_names_each_input(id: str) -> None:
    """A page without a table describes its inputs in sentences."""
    _, _, table = (ROOT / "web" / "docs" / f"{id}.md").read_text().partition("| input |")
    rows = re.findall(r"^\| ([^|]+?) \|", table.partition("\n\n")[0], re.MULTILINE)
    named = [
        name.strip(" `")
        for row in rows
        if not row.startswith("---")
        for name in row.replace("(optional)", "").split(",")
    ]
    assert not rows or sorted(named) == sorted(inputs_of(NODES[id]))


def shown_in(page: pathlib.Path) -> list[str]:
    return [name.removeprefix("./") for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))]


def test_no_help_page_borrows_the_image_of_another() -> None:
    shown = [name for page in sorted((ROOT / "web" / "docs").glob("*.md")) for name in shown_in(page)]
    assert sorted(set(shown)) == sorted(shown)


@each_node
def test_a_workflow_uses_it(id: str) -> None:
    """An example, or a workflow that the host tests run."""
    assert any(node["type"] == id for w in WORKFLOWS.values() for node in w["nodes"]), f"no workflow uses {id}"


EXAMPLES = sorted(p.stem for p in FOLDERS[0].glob("*.json"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_a_human_name_and_a_square_thumbnail(name: str) -> None:
    from PIL import Image

    assert re.fullmatch(r"\d\d [A-Z][a-z, ]+(, SD(1\.5|XL| Turbo))?(\.app)?", name), (
        "the template browser shows the file's name"
    )
    with Image.open(FOLDERS[0] / f"{name}.jpg") as image:
        assert image.width == image.height >= 400


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_size_of_the_bundled_model_is_typed(name: str) -> None:
    """Sizes come from the image or from the model, so that another model needs no other number."""
    for node in WORKFLOWS[name]["nodes"]:
        sockets = {socket["name"]: socket["link"] is not None for socket in node["inputs"]}
        typed = [key for key in ("width", "height", "megapixels") if key in sockets and not sockets[key]]
        own = graph.widget_values(node, {"input": NODES[node["type"]].INPUT_TYPES()}) if node["type"] in NODES else {}
        assert all(own.get(key) == 0 for key in typed), f"{node['type']} has a size of its own"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_note_says_how_to_use_a_model_of_ones_own(name: str) -> None:
    """Load Model lists checkpoints too, so one choice makes an example of the bundled model one of SD1.5 or SDXL."""
    nodes = WORKFLOWS[name]["nodes"]
    notes = "".join(node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    (loader,) = [node for node in nodes if node["type"].endswith(("LoadModel", "Loader", "LoaderSimple"))]
    if ", SD" not in name:
        assert loader["type"] == "SlipstreamLoadModel"
        assert re.search(r"\*\*Your own model\*\*: .*\*Load Model\*", notes)
        return
    # A variant names its checkpoint as the frontend asks for it, which then offers the download.
    (model,) = loader["properties"]["models"]
    assert loader["type"] == "CheckpointLoaderSimple"
    assert loader["widgets_values"] == [model["name"]]
    assert model["directory"] == "checkpoints"
    assert re.fullmatch(
        r"https://huggingface\.co/(stabilityai|Comfy-Org)/[\w.-]+/resolve/main/" + re.escape(model["name"]),
        model["url"],
    )
    assert model["name"] in notes
    assert "bundled" not in notes


@pytest.mark.parametrize("path", sorted((ROOT / "subgraphs").glob("*.json")), ids=lambda p: p.stem)
def test_a_blueprint_is_one_node_whose_links_are_whole(path: pathlib.Path) -> None:
    blueprint = json.loads(path.read_text())
    (outer,), (inner,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"]
    assert inner["name"] == outer["title"] == path.stem
    # Frontend 1.58 draws no canvas of an inner node on the sub-graph.
    assert not any(socket["name"].endswith("canvas") for node in inner["nodes"] for socket in node["inputs"])
    nodes = {node["id"]: node for node in inner["nodes"]}
    links = {link["id"]: link for link in inner["links"]}
    ends = ((-10, inner["inputs"]), (-20, inner["outputs"]))
    for link in links.values():
        assert (
            link["origin_id"] == -10 or link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
        )
        assert link["target_id"] == -20 or nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
    for node in nodes.values():
        assert all(socket["link"] is None or socket["link"] in links for socket in node["inputs"])
        for name, spec in (
            graph.all_inputs({"input": NODES[node["type"]].INPUT_TYPES()}).items() if node["type"] in NODES else ()
        ):
            socket = next(each for each in node["inputs"] if each["name"] == name)
            needed = not graph.is_widget(spec) and name in NODES[node["type"]].INPUT_TYPES().get("required", {})
            assert not needed or socket["link"] in links
    for end, ports in ends:
        for at, port in enumerate(ports):
            own = [
                i
                for i, k in links.items()
                if (k["origin_id"], k["origin_slot"]) == (end, at) or (k["target_id"], k["target_slot"]) == (end, at)
            ]
            assert sorted(own) == sorted(port["linkIds"])
    for node in (node for node in nodes.values() if node["type"] in NODES):
        info = {"input": NODES[node["type"]].INPUT_TYPES()}
        assert len(node["widgets_values"]) == len(graph.widget_names(info))
        for name, value in graph.widget_values(node, info).items():
            check_value(f"{path.stem}: {name}", graph.all_inputs(info)[name], value)
    for id, widget in outer["properties"]["proxyWidgets"]:
        assert widget in {socket["name"] for socket in nodes[int(id)]["inputs"]}


def test_apps_are_the_headline_examples_with_a_form() -> None:
    apps = [name for name in EXAMPLES if name.endswith(".app")]
    assert [name[:2] for name in apps] == ["01", "02", "03"]
    for name in apps:
        app, plain = WORKFLOWS[name], WORKFLOWS[name.removesuffix(".app")]
        assert app["nodes"] == plain["nodes"]
        assert app["extra"]["linearMode"] is True
        assert "linearMode" not in plain["extra"]
        nodes = {node["id"]: node for node in app["nodes"]}
        for id, widget in app["extra"]["linearData"]["inputs"]:
            assert widget in {socket["name"] for socket in nodes[id]["inputs"]}
        assert all(nodes[id]["type"].startswith(("Save", "Slipstream")) for id in app["extra"]["linearData"]["outputs"])


@each_workflow
def test_example_values_fit_our_nodes(name: str) -> None:
    for node in WORKFLOWS[name]["nodes"]:
        if not node["type"].startswith("Slipstream"):
            continue
        assert node["type"] in NODES, f"{name} uses {node['type']}, which does not exist"
        info = {"input": NODES[node["type"]].INPUT_TYPES()}
        assert len(node.get("widgets_values", [])) == len(graph.widget_names(info)), (
            f"{name}: {node['type']} is outdated"
        )
        for key, value in graph.widget_values(node, info).items():
            check_value(f"{name}: {node['type']}.{key}", graph.all_inputs(info)[key], value)
        known = set(graph.all_inputs(info))
        assert {socket["name"] for socket in node["inputs"]} <= known, f"{name}: {node['type']} has unknown sockets"


@each_workflow
def test_example_links_are_whole(name: str) -> None:
    workflow = WORKFLOWS[name]
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, slot, target, socket, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][socket]["link"] == link
        assert nodes[source]["outputs"][slot]["type"] == kind
    for id, node in nodes.items():
        required = NODES[node["type"]].INPUT_TYPES().get("required", {}) if node["type"] in NODES else {}
        open_sockets = [
            socket["name"]
            for socket in node["inputs"]
            if socket["name"] in required and "widget" not in socket and socket["link"] is None
        ]
        assert not open_sockets, f"{name}: node {id} ({node['type']}) lacks {open_sockets}"
