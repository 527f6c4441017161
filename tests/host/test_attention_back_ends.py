"""The host's attention back ends: what we sample is the same with the one that a GPU uses as with the one of a CPU.

A host on a CPU takes sub-quadratic attention. Appearance in mode fine is left out: its gradient magnifies a photo's change of 1e-7 to 11
of 255 in single pixels. Sage and flash attention need a GPU and packages of their own.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from slipstream_tests.host import conftest, test_edit, test_edit_flow, test_stream

SMALL_SCENE = {
    "SlipstreamSeedCanvas.width": 128, "SlipstreamSeedCanvas.height": 128, "SlipstreamSeedCanvas.scale": 0.15,
    "BasicScheduler.steps": 6,
}  # fmt: skip
POCKET = {"SlipstreamLoadModel.model": "pocket"}  # a UNet; the drafts are transformers
GRAPHS = ("move, fine", "draft, lumina2", "draft, flux", "stream", "scene", "rounds")


@pytest.fixture(scope="module", params=["pytorch", "split"])
def other(request: pytest.FixtureRequest, checkout: tuple[str, str], host_models: Any) -> Iterator[Any]:
    """A host that is started with another attention."""
    models = {kind: [str(host_models / kind)] for kind in conftest.MODEL_KINDS}
    packs = [(conftest.PACK_NAME, conftest.ROOT), ("zz-probe", conftest.HERE / "probe_pack")]
    args = [f"--use-{request.param}-cross-attention"]
    comfyui, python = checkout
    with conftest.comfy_host.ComfyHost(packs, comfyui=comfyui, python=python, models=models, args=args) as running:
        yield running


def graph_of(kind: str, host: Any, example: Any) -> dict[str, Any]:
    match kind.split(", "):
        case [task, "fine"]:
            return test_edit.task_graph(task)
        case ["draft", family]:
            return test_edit_flow.harmonised(test_edit_flow.base(family), hold_object=0.3)
        case ["stream"]:
            graph = test_stream.base()
            test_stream.add_stream(graph, test_stream.loaded(host, graph, test_stream.clip(3)), steps=2)
            return graph
        case ["scene"]:
            return example("Grow a scene around a subject", {**POCKET, **SMALL_SCENE})
    return example("Repaint a masked area in rounds", {**POCKET, "SlipstreamMaskedRegenerate.steps": 4})


def images(host: Any, graph: dict[str, Any]) -> dict[str, np.ndarray]:
    result = host.run(graph)
    assert result.ok, result.explain()
    found: dict[str, list[np.ndarray]] = {}
    for file in result.files:
        if file.type == "output" and file.filename.endswith(".png"):
            found.setdefault(file.node, []).append(np.asarray(Image.open(io.BytesIO(file.read()))).astype(int))
    return {node: np.stack(images) for node, images in found.items()}


@pytest.mark.parametrize("kind", GRAPHS)
def test_another_attention_gives_the_same_image(host: Any, other: Any, example: Any, kind: str) -> None:
    ours, theirs = (images(each, graph_of(kind, each, example)) for each in (host, other))
    assert ours
    assert ours.keys() == theirs.keys()
    for name, image in ours.items():
        assert np.abs(image - theirs[name]).max() <= 2, name
