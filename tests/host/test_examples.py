"""Every example workflow fits the nodes of a real host, and the pack's files are served where the frontend looks for them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = sorted(p.stem for p in (ROOT / "example_workflows").glob("*.json"))
PACK = "slip-stream.v0"


@pytest.mark.parametrize("name", NAMES)
def test_values_fit_every_node(example: Callable[..., Any], object_info: dict[str, Any], name: str) -> None:
    for node in example(name).values():
        info = object_info[node["class_type"]]
        assert set(info["input"].get("required", {})) <= set(node["inputs"])


def test_every_node_is_registered(host: Any) -> None:
    import slipstream

    assert set(host.pack_nodes(PACK)) == set(slipstream.NODE_CLASS_MAPPINGS)


def test_the_pack_imports_quickly_and_lazily(host: Any) -> None:
    # The host logs one decimal; diffusers and transformers alone take seconds.
    assert host.pack_import_seconds()[PACK] <= 2.0


def test_examples_and_help_are_served(host: Any) -> None:
    names = {p.stem for p in (ROOT / "example_workflows").glob("*.json")}
    assert set(host.get("/workflow_templates")[PACK]) == names
    assert host.request("GET", f"/api/workflow_templates/{PACK}/text_to_image.jpg")[0] == 200
    assert host.request("GET", f"/extensions/{PACK}/docs/SlipstreamLoadModel.md")[0] == 200
