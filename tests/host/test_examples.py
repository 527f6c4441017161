"""Every example workflow runs in a real host as it is, and the pack's files are served where the frontend looks for them.

Searches, trainings and long samplings are cut short here. EXAMPLES_AS_SAVED=1 runs every example as a user does (up to two
minutes each on a CPU).
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from slipstream.stream.live import client
from slipstream.stream.video import open_source
from slipstream_tests.host import graph

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The headline examples on checkpoints that people download, which are not here: the kind of each, and the size of its images.
VARIANTS = {
    "Move an object in a photo, SD1.5": ("SD15", 768),  # of the photo
    "Paint over my webcam, SD Turbo": ("SD20", 512),
    "Grow a scene around a subject, SDXL": ("SDXL", 256),
}
FILES = {p.stem[3:] for p in (ROOT / "example_workflows").glob("[0-9][0-9] *.json") if not p.stem.endswith(".app")}
EXAMPLES = sorted(FILES - set(VARIANTS))
# What no example shows runs too.
NAMES = [*EXAMPLES, *sorted(p.stem for p in (ROOT / "tests" / "host" / "workflows").glob("*.json"))]
RUNNING = [name for name in NAMES if name != "Paint over my webcam"]  # that one waits for a page: test_live_browser.py
PACK = "slip-stream.v0"
AS_SAVED = bool(os.environ.get("EXAMPLES_AS_SAVED"))
AT_MOST = {
    "SlipstreamEmptyLatent": {"batch_size": 2},
    "KSampler": {"steps": 4},
    "BasicScheduler": {"steps": 10},
    "SlipstreamInvert": {"steps": 8},
    "SlipstreamCowSampler": {"cycles": 1},
    "SlipstreamMaskSchedule": {"steps": 2},
    "SlipstreamMaskedRegenerate": {"steps": 2, "rounds": 2},
    "SlipstreamTrainLatentFill": {"steps": 5, "batch": 2},
    "SlipstreamSearchSchedule": {"evaluations": 4, "pairs": 2},
    "SlipstreamCompareSchedules": {"pairs": 2, "repeats": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_values_fit_every_node(example: Callable[..., Any], object_info: dict[str, Any], name: str) -> None:
    for node in example(name).values():
        info = object_info[node["class_type"]]
        assert set(info["input"].get("required", {})) <= set(node["inputs"])


def with_loader(prompt: dict[str, Any], loader: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt with another node in place of Load Model; of that, only what every loader gives is connected."""
    (old,) = [id for id, node in prompt.items() if node["class_type"] == "SlipstreamLoadModel"]
    used = [
        value[1]
        for node in prompt.values()
        for value in node["inputs"].values()
        if isinstance(value, list) and value[0] == old
    ]
    assert max(used) < 3, "a size of Load Model would be lost with it"
    return {**prompt, old: loader}


@pytest.mark.parametrize(
    ("type", "key"), [("SlipstreamLoadModel", "model"), ("CheckpointLoaderSimple", "ckpt_name")], ids=str
)
def test_a_checkpoint_takes_the_place_of_the_bundled_model(
    host: Any, host_models: pathlib.Path, example: Callable[..., Any], type: str, key: str
) -> None:
    """The host takes every example with a checkpoint in it, and the first thing that fails is reading this empty one."""
    file = host_models / "checkpoints" / "mine.safetensors"
    file.write_bytes(b"")
    try:
        for name in EXAMPLES:
            prompt = with_loader(example(name), {"class_type": type, "inputs": {key: file.name}})
            running = host.submit(prompt)  # PromptRejected where a value or a link does not fit
            result = running.wait(60)
            assert (result.status, running.node_errors) == ("error", {}), name
            assert type in result.explain(), f"{name}: {result.explain()}"
    finally:
        file.unlink()


def cut_short(prompt: dict[str, Any]) -> dict[str, Any]:
    for node in prompt.values():
        for key, most in ({} if AS_SAVED else AT_MOST.get(node["class_type"], {})).items():
            node["inputs"][key] = min(node["inputs"][key], most)
    return prompt


@pytest.fixture(scope="session")
def checkpoint(host: Any, host_models: pathlib.Path) -> Iterator[Callable[[str], str]]:
    """Return a function that gives the name of a tiny checkpoint which the host's own loader takes for one of a family."""
    files: dict[str, pathlib.Path] = {}

    def make(kind: str, name: str = "") -> str:
        file = host_models / "checkpoints" / (name or f"tiny_{kind}.safetensors")
        if file.name not in files:
            made = host.run({"a": graph.node("ProbeTinyCheckpoint", kind=kind, file=str(file))})
            assert made.ok, made.explain()
            files[file.name] = file
        return file.name

    yield make
    for file in files.values():
        file.unlink()


# One of each kind of size: of a photo, a clip, a canvas and a latent.
SIZED = [
    "Move an object in a photo", "Repaint a clip", "Grow a scene around a subject", "Make a collage one image",
    "Draw with the bundled model",
]  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", EXAMPLES if AS_SAVED else SIZED)
def test_it_runs_on_a_checkpoint_of_the_host(
    host: Any, example: Callable[..., Any], checkpoint: Callable[[str], str], name: str
) -> None:
    """With nothing but the loader changed: SD1.5 has 512 pixels where the bundled model has 128."""
    loader = graph.node("CheckpointLoaderSimple", ckpt_name=checkpoint("SD15"))
    prompt = cut_short(example(name, {"SlipstreamExampleClip.frames": 2} if name == "Repaint a clip" else {}))
    result = host.run(with_loader(prompt, loader), timeout=880)
    assert result.ok, result.explain()
    assert not any("made for" in text for _, text in result.warnings)


class Sink:
    """Takes what a live stream gives back and ends it, once: a second cancel would stop the nodes after it."""

    def __init__(self, running: Any) -> None:
        self.running, self.sizes, self.ended = running, set(), False

    def check(self, height: int, width: int) -> None:
        self.sizes.add((width, height))

    def write(self, image: Any, stamp: Any) -> None:
        if not self.ended:
            self.ended = True
            self.running.interrupt()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "kind", "side"), [(name, *made) for name, made in VARIANTS.items()])
def test_a_variant_runs_on_its_checkpoint(
    host: Any,
    example: Callable[..., Any],
    checkpoint: Callable[..., str],
    tmp_path: pathlib.Path,
    name: str,
    kind: str,
    side: int,
) -> None:
    prompt = cut_short(example(name, {"CLIPTextEncode.text": "a"}))
    for node in prompt.values() if kind == "SDXL" else ():  # its own 1024 pixels are tried below
        node["inputs"].update(dict.fromkeys(node["inputs"].keys() & {"width", "height"}, side))
    (loader,) = [node for node in prompt.values() if node["class_type"] == "CheckpointLoaderSimple"]
    checkpoint(kind, loader["inputs"]["ckpt_name"])
    running = host.submit(prompt)
    sink = Sink(running)
    if kind == "SD20":
        Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
        stream = running.wait_for(lambda event: event.type == "slipstream.live", timeout=120).data["stream"]
        url, frames = f"{host.url}/slipstream/live/{stream}", open_source(str(tmp_path), 10)
        pushing = threading.Thread(target=client.push, args=(url, frames, sink), kwargs={"loop": True}, daemon=True)
        pushing.start()
    result = running.wait(500)
    assert result.ok, result.explain()
    for file in result.files:
        sink.sizes.add(Image.open(io.BytesIO(file.read())).size)
    assert (side, side) in sink.sizes


@pytest.mark.parametrize(("kind", "side"), [("SD15", 512), ("SDXL", 1024)])
def test_the_canvas_has_the_size_of_the_checkpoint(
    host: Any, example: Callable[..., Any], checkpoint: Callable[[str], str], kind: str, side: int
) -> None:
    loader = graph.node("CheckpointLoaderSimple", ckpt_name=checkpoint(kind))
    prompt = with_loader(example("Grow a scene around a subject"), loader)
    kept = ("CheckpointLoaderSimple", "SlipstreamExamplePhoto", "SlipstreamSeedCanvas")
    result = host.run({id: node for id, node in prompt.items() if node["class_type"] in kept})
    assert result.ok, result.explain()
    sizes = [Image.open(io.BytesIO(file.read())).size for file in result.files if file.slot == "images"]
    assert sizes == [(side, side)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNNING)
def test_it_runs_and_every_output_node_shows_something(
    host: Any, example: Callable[..., Any], object_info: dict[str, Any], name: str
) -> None:
    prompt = cut_short(example(name))
    result = host.run(prompt, timeout=880)
    assert result.ok, result.explain()
    if AS_SAVED:  # an edit that was cut short may have no guided step
        assert not any("no effect" in text for _, text in result.warnings)
    for id, node in prompt.items():
        if object_info[node["class_type"]]["output_node"]:
            assert any(result.outputs.get(id, {}).values()), f"{node['class_type']} shows nothing"
    assert all(len(file.read()) > 100 for file in result.files)


def test_comfy_lint_finds_nothing(
    example: Callable[..., Any],
    object_info: dict[str, Any],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A public checker of prompts against /object_info."""
    cli = pytest.importorskip("comfy_lint.cli", reason="comfy-lint is not installed")
    (tmp_path / "info.json").write_text(json.dumps(object_info))
    files = [tmp_path / f"{name}.json" for name in NAMES]
    for file in files:
        prompt = example(file.stem)
        for (
            node
        ) in prompt.values():  # the checker does not know that a choice may have inputs of its own ("format.codec")
            node["inputs"] = {name: value for name, value in node["inputs"].items() if "." not in name}
        file.write_text(json.dumps(prompt))
    code = cli.main(["--schema-cache", str(tmp_path / "info.json"), "--strict", *map(str, files)])
    assert code == 0, capsys.readouterr().out


def test_every_node_is_registered(host: Any) -> None:
    import slipstream

    assert set(host.pack_nodes(PACK)) == set(slipstream.NODE_CLASS_MAPPINGS)


def test_the_pack_imports_quickly_and_lazily(host: Any) -> None:
    # The host logs one decimal; diffusers and transformers alone take seconds.
    assert host.pack_import_seconds()[PACK] <= 2.0  # KeyError where the host's log has no such line


def test_blueprints_are_served(host: Any) -> None:
    status, _, body = host.request("GET", "/global_subgraphs")
    if status != 200:
        pytest.skip("this host has no blueprints yet")
    ours = {each["name"] for each in json.loads(body).values() if each["info"]["node_pack"] == f"custom_nodes.{PACK}"}
    assert ours == {p.stem for p in (ROOT / "subgraphs").glob("*.json")}


def test_examples_and_help_are_served(host: Any) -> None:
    names = {p.stem for p in (ROOT / "example_workflows").glob("*.json")}
    assert set(host.get("/workflow_templates")[PACK]) == names
    assert (
        host.request("GET", f"/api/workflow_templates/{PACK}/01%20Move%20an%20object%20in%20a%20photo.app.jpg")[0]
        == 200
    )
    assert host.request("GET", f"/extensions/{PACK}/docs/SlipstreamLoadModel.md")[0] == 200
