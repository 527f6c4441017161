"""Editing in the draft mode on flow models: the host's own networks at a tiny size, queued like any other graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from slipstream_tests.host.test_edit import EDIT, MOVE, assert_untouched, box, node, pixels

FAMILIES = ["lumina2", "flux", "sd3", "qwen_image"]
QUIET = {**EDIT, "hold_object": 0.5}


def base(
    family: str, size: tuple[int, int] = (128, 128), override: bool = False, weights: str = "float32"
) -> dict[str, Any]:
    """Image "i" (a red box on blue), its mask "mask", the photo "inv" on a tiny MODEL "f"."""
    graph = {
        "f": node("ProbeTinyFlow", family=family, override=override, weights=weights),
        "blue": node("EmptyImage", width=size[0], height=size[1], batch_size=1, color=0x2D55D7),
        "red": node("EmptyImage", width=size[0], height=size[1], batch_size=1, color=0xDC2828),
        "i": node("ImageCompositeMasked", destination=["blue", 0], source=["red", 0], x=0, y=0, resize_source=False, mask=["mask", 0]),
        "inv": node(
            "SlipstreamInvert", model=["f", 0], vae=["f", 1], image=["i", 0], positive=["f", 2], steps=6, megapixels=1.0, memory="auto",
        ),
    }  # fmt: skip
    box(graph, "mask", 24, 40, 32, 32, size)
    return graph


def finished(graph: dict[str, Any], out: str = "out") -> dict[str, Any]:
    graph["save"] = node("SaveImage", images=[out, 0], filename_prefix="edit")
    graph["orig"] = node("SaveImage", images=["i", 0], filename_prefix="orig")
    graph["maskimage"] = node("MaskToImage", mask=[out, 2])
    graph["savemask"] = node("SaveImage", images=["maskimage", 0], filename_prefix="mask")
    graph["report"] = node("ProbeFlowReport", model=["f", 0], image=[out, 0], latent=[out, 1])
    return graph


def edited(graph: dict[str, Any], **changes: Any) -> dict[str, Any]:
    graph["out"] = node(
        "SlipstreamEditSampler", model=["f", 0], vae=["f", 1], inversion=["inv", 0], tasks=["t", 0], positive=["f", 2],
        negative=["f", 3], **{**QUIET, **changes},
    )  # fmt: skip
    return finished(graph)


def harmonised(graph: dict[str, Any], hold_object: float = 0.7) -> dict[str, Any]:
    graph["out"] = node(
        "SlipstreamHarmonise", model=["f", 0], vae=["f", 1], image=["red", 0], background=["blue", 0], mask=["mask", 0],
        positive=["f", 2], negative=["f", 3], seed=1, steps=6, cfg=2.0, hold_object=hold_object, hold_seam=0.4, seam=8, megapixels=1.0,
    )  # fmt: skip
    return finished(graph)


def stock(graph: dict[str, Any]) -> dict[str, Any]:
    graph["latent"] = node("VAEEncode", pixels=["i", 0], vae=["f", 1])
    graph["k"] = node(
        "KSampler", model=["f", 0], positive=["f", 2], negative=["f", 3], latent_image=["latent", 0], seed=1, steps=1, cfg=1.0,
        sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    graph["seen"] = node("VAEDecode", samples=["k", 0], vae=["f", 1])
    graph["save"] = node("SaveImage", images=["seen", 0], filename_prefix="stock")
    return graph


def with_task(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "move":
        graph["t"] = node("SlipstreamMove", mask=["mask", 0], **MOVE, angle=30.0)
    elif kind == "paste":
        graph["t"] = node("SlipstreamPaste", reference=["inv", 0], mask=["mask", 0], **{**MOVE, "scale": 0.75})
    elif kind == "remove":
        graph["t"] = node("SlipstreamRemove", mask=["mask", 0])
    elif kind == "appearance":
        box(graph, "there", 80, 80, 32, 32)
        graph["t"] = node("SlipstreamAppearance", mask=["mask", 0], reference=["inv", 0], reference_mask=["there", 0])
    else:
        box(graph, "free", 8, 24, 88, 72)
        points = {"handles": '[{"x": 40, "y": 56}]', "targets": '[{"x": 64, "y": 60}]'}
        graph["t"] = node("SlipstreamDrag", mask=["free", 0], method=kind.split()[1], **points)
    return graph


@pytest.mark.parametrize("family", FAMILIES)
def test_a_move_on_every_family_leaves_the_rest_and_the_model_as_they_were(host: Any, report: Any, family: str) -> None:
    size = (128, 120) if family != "qwen_image" else (128, 128)
    result = host.run(edited(with_task(base(family, size, override=True), "move")))
    assert result.ok, result.explain()
    assert_untouched(result)
    assert np.abs(pixels(result, "orig").astype(int) - pixels(result, "save")).max() > 60
    seen = report(result)
    assert seen["finite"]
    assert seen["calls"] > 0  # an attention override of another node still acts
    assert seen["options"] == ["optimized_attention_override"]
    assert (seen["hooks"], seen["patches"]) == (0, 0)
    assert len(seen["shape"]) == (5 if family == "qwen_image" else 4)
    done = result.progress("out")
    assert done[-1] == (3, 3)  # of six steps; in the others the object and its plain ground are held


@pytest.mark.parametrize("family", ["lumina2", "flux", "qwen_image"])
@pytest.mark.parametrize("weights", ["fp8", "scaled fp8"])
def test_quantised_weights_edit_as_their_values_do(host: Any, report: Any, family: str, weights: str) -> None:
    if not host.run(stock(base(family, weights=weights))).ok:
        pytest.skip("this host's own KSampler cannot load these weights with this torch")
    seen = {}
    for kind in ("float32", weights):
        result = host.run(harmonised(base(family, weights=kind), hold_object=0.0))
        assert result.ok, result.explain()
        assert_untouched(result)
        assert report(result)["finite"]
        seen[kind] = pixels(result, "save").astype(int)
    difference = np.abs(seen["float32"] - seen[weights])
    assert 0 < difference.max()
    assert difference.mean() < 4  # of 255: random weights of 8 bits


@pytest.mark.parametrize("kind", ["paste", "remove", "appearance", "drag warp", "drag energy"])
def test_every_task_runs_on_a_flow_model(host: Any, report: Any, kind: str) -> None:
    result = host.run(edited(with_task(base("lumina2"), kind)))
    assert result.ok, result.explain()
    assert_untouched(result)
    assert np.abs(pixels(result, "orig").astype(int) - pixels(result, "save")).max() > 20
    assert report(result)["finite"]
    warnings = result.outputs["out"]["warnings"]
    assert any("by warp" in text for text in warnings) == (kind == "drag energy")


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_a_composition_is_harmonised(host: Any, report: Any, family: str) -> None:
    result = host.run(harmonised(base(family)))
    assert result.ok, result.explain()
    assert_untouched(result)
    assert np.abs(pixels(result, "orig").astype(int) - pixels(result, "save")).max() > 20
    assert report(result)["finite"]


def test_mode_fine_is_refused_with_the_reason_and_settings_without_effect_warn(host: Any, complaint: Any) -> None:
    graph = edited(with_task(base("lumina2"), "move"), guidance=0.5, noise=0.1, hold_fill=0.5)
    result = host.run(graph)
    assert result.ok, result.explain()
    warnings = result.outputs["out"]["warnings"]
    assert any("`guidance` and `noise` have no effect in mode draft" in text for text in warnings)
    graph["inv"]["inputs"]["mode"] = "fine"
    assert "mode draft" in complaint(graph)


def test_cancel_stops_a_draft_between_network_calls(host: Any) -> None:
    graph = edited(with_task(base("flux"), "move"), seed=77)
    graph["inv"]["inputs"]["steps"] = 200
    run = host.submit(graph)
    run.wait_for(lambda e: e.type == "progress" and e.data["node"] == "out" and e.data["value"] >= 2, timeout=200)
    run.interrupt()
    result = run.wait()
    assert result.status == "interrupted"
    assert result.progress("out")[-1][0] < 100
