"""Photo editing in a real host: every task queued, gradients in inference mode, refusals, preview, interrupt, library equality."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import slipstream
import torch
from PIL import Image
from slipstream.core import SeededNoise
from slipstream.edit import EditConfig, Move, edit, finish, fit, invert

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPT = "a large red circle on the left on a blue background"
EDIT = {
    "seed": 5, "cfg": 2.0, "guidance": 0.1, "hold_object": 0.9, "hold_fill": 0.4, "noise": 0.4, "feather": 4, "low_memory": False,
}  # fmt: skip
MOVE = {"dx": 40.0, "dy": 8.0, "scale": 1.0, "about": "object"}


def node(type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": type, "inputs": inputs}


def box(
    graph: dict[str, Any], name: str, x: int, y: int, width: int, height: int, size: tuple[int, int] = (128, 128)
) -> None:
    graph[name + "0"] = node("SolidMask", value=0.0, width=size[0], height=size[1])
    graph[name + "1"] = node("SolidMask", value=1.0, width=width, height=height)
    graph[name] = node("MaskComposite", destination=[name + "0", 0], source=[name + "1", 0], x=x, y=y, operation="add")


def base(size: tuple[int, int] = (128, 128), steps: int = 8, model: list[Any] | None = None) -> dict[str, Any]:
    """Picture "i" (a red box on blue), its mask "mask", the inversion "inv"."""
    graph = {
        "1": node("SlipstreamLoadModel", model="pocket"),
        "p": node("CLIPTextEncode", clip=["1", 1], text=PROMPT),
        "n": node("CLIPTextEncode", clip=["1", 1], text=""),
        "blue": node("EmptyImage", width=size[0], height=size[1], batch_size=1, color=0x2D55D7),
        "red": node("EmptyImage", width=size[0], height=size[1], batch_size=1, color=0xDC2828),
        "i": node("ImageCompositeMasked", destination=["blue", 0], source=["red", 0], x=0, y=0, resize_source=False, mask=["mask", 0]),
        "inv": node(
            "SlipstreamInvert", model=model or ["1", 0], vae=["1", 2], image=["i", 0], positive=["p", 0], steps=steps,
            megapixels=1.0, memory="auto", mode="fine",
        ),
    }  # fmt: skip
    box(graph, "mask", 24, 40, 32, 32, size)
    return graph


def finished(graph: dict[str, Any], tasks: str, model: list[Any] | None = None, **changes: Any) -> dict[str, Any]:
    graph["out"] = node(
        "SlipstreamEditSampler", model=model or ["1", 0], vae=["1", 2], inversion=["inv", 0], tasks=[tasks, 0], positive=["p", 0],
        negative=["n", 0], **{**EDIT, **changes},
    )  # fmt: skip
    graph["save"] = node("SaveImage", images=["out", 0], filename_prefix="edit")
    graph["orig"] = node("SaveImage", images=["i", 0], filename_prefix="orig")
    graph["maskimage"] = node("MaskToImage", mask=["out", 2])
    graph["savemask"] = node("SaveImage", images=["maskimage", 0], filename_prefix="mask")
    return graph


def pixels(result: Any, id: str) -> np.ndarray:
    (file,) = [f for f in result.files if f.node == id]
    import io

    return np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))


def assert_untouched(result: Any) -> None:
    before, after, mask = (pixels(result, id) for id in ("orig", "save", "savemask"))
    # The saved mask has 8 bits: its seam may be below 1/255 for as far as it is feathered.
    reach = torch.nn.functional.max_pool2d(
        torch.from_numpy(mask[..., 0].copy()).float()[None], 2 * EDIT["feather"] + 1, 1, EDIT["feather"]
    )
    outside = (reach[0] == 0).numpy()
    assert outside.mean() > 0.1
    assert np.array_equal(before[outside], after[outside])


def task_graph(kind: str) -> dict[str, Any]:
    graph = base()
    handles, targets = '[{"x": 40, "y": 56}]', '[{"x": 64, "y": 60}]'
    if kind == "move":
        graph["t"] = node("SlipstreamMove", mask=["mask", 0], **MOVE)
    elif kind == "two moves":
        box(graph, "small", 96, 96, 16, 16)
        graph["t0"] = node("SlipstreamMove", mask=["mask", 0], **MOVE)
        graph["t"] = node("SlipstreamMove", mask=["small", 0], tasks=["t0", 0], **{**MOVE, "dx": -60.0, "dy": 8.0})
    elif kind == "paste":
        box(graph, "there", 24, 40, 32, 32)
        graph["t"] = node("SlipstreamPaste", reference=["inv", 0], mask=["there", 0], **{**MOVE, "scale": 0.75})
    elif kind == "remove":
        graph["t"] = node("SlipstreamRemove", mask=["mask", 0])
    elif kind == "appearance":
        box(graph, "there", 80, 80, 32, 32)
        graph["t"] = node("SlipstreamAppearance", mask=["mask", 0], reference=["inv", 0], reference_mask=["there", 0])
    else:
        box(graph, "free", 8, 24, 88, 72)
        graph["t"] = node("SlipstreamDrag", mask=["free", 0], handles=handles, targets=targets, method=kind.split()[1])
    return finished(graph, "t")


@pytest.mark.parametrize("kind", ["move", "two moves", "paste", "remove", "appearance", "drag warp", "drag energy"])
def test_every_task_runs_and_leaves_the_rest_untouched(host: Any, kind: str) -> None:
    result = host.run(task_graph(kind))
    assert result.ok, result.explain()
    assert_untouched(result)
    before, after = pixels(result, "orig"), pixels(result, "save")
    assert np.abs(before.astype(int) - after).max() > 60
    done = result.progress("out")
    assert done[-1][0] == done[-1][1]
    assert result.previews


def test_an_edit_is_prepared_once_and_each_task_placed_once(host: Any, report: Any) -> None:
    graph = task_graph("two moves")
    inputs = {k: graph["out"]["inputs"][k] for k in ("model", "vae", "inversion", "tasks", "positive", "negative")}
    for id in ("out", "save", "orig", "maskimage", "savemask"):
        del graph[id]
    graph["count"] = node("ProbeCountPreparations", **inputs)
    assert report(host.run(graph)) == {"GuidedEdit": 1, "place": 2, "draft": 1}


def test_the_node_equals_the_library(host: Any) -> None:
    result = host.run(task_graph("move"))
    assert result.ok, result.explain()
    image = torch.from_numpy(pixels(result, "orig").copy())[None].float() / 255
    pipe = slipstream.load("pocket", dtype=torch.float32)
    config = EditConfig(
        mode="fine",
        steps=8,
        cfg_scale=2.0,
        energy_scale=0.1,
        anchor_object=(0.0, 0.9),
        anchor_fill=(0.0, 0.4),
        eta=0.4,
        feather=4,
    )
    mask = torch.zeros(128, 128)
    mask[40:72, 24:56] = 1
    padded, canvas = fit(image, pipe.downscale)
    cond, uncond = pipe.encode_text([PROMPT]), pipe.encode_text([""])
    inversion = invert(pipe.model, pipe.encode_image(padded), cond, config, canvas, image)
    made = edit(
        pipe.model, inversion, Move(mask, 40.0, 8.0), cond, uncond, config, SeededNoise(5), encode=pipe.encode_image
    )
    ours = (finish(image, made, pipe.decode)[0] * 255).round().numpy()
    # The host computes in its own dtype; on a CPU that is float32 here and there.
    assert np.abs(ours - pixels(result, "save").astype(float)).max() <= 3


def test_editing_again_costs_only_the_sampling(host: Any) -> None:
    graph = task_graph("move")
    assert host.run(graph).ok
    graph["t"]["inputs"]["dx"] = 30.0
    again = host.run(graph)
    assert again.ok, again.explain()
    assert "inv" in again.cached_nodes
    assert "out" in again.executed_nodes


def test_a_photo_that_was_inverted_before_is_not_inverted_again(host: Any) -> None:
    first, second = task_graph("move"), task_graph("move")
    for graph, steps in ((first, 9), (second, 9)):
        graph["inv"]["inputs"]["steps"] = steps
    assert host.run(first).progress("inv")
    assert host.run(task_graph("drag warp")).ok
    second["inv"]["inputs"]["megapixels"] = 0.9  # another call of the node, the same work
    again = host.run(second)
    assert again.ok, again.explain()
    assert "inv" in again.executed_nodes
    assert not again.progress("inv")


def test_the_same_seed_gives_the_same_picture_after_other_work(host: Any) -> None:
    first = host.run(task_graph("move"))
    assert host.run(task_graph("drag energy")).ok
    changed = task_graph("move")
    changed["out"]["inputs"]["seed"] = 6
    assert host.run(changed).ok
    again = host.run(task_graph("move"))
    assert np.array_equal(pixels(first, "save"), pixels(again, "save"))


def test_an_odd_size_comes_back_as_it_was(host: Any) -> None:
    graph = base((150, 109))
    graph["t"] = node("SlipstreamMove", mask=["mask", 0], **MOVE)
    result = host.run(finished(graph, "t"))
    assert result.ok, result.explain()
    assert pixels(result, "save").shape == (109, 150, 3)
    assert_untouched(result)


def test_the_preview_samples_nothing(host: Any) -> None:
    graph = base()
    graph["t"] = node("SlipstreamMove", mask=["mask", 0], **MOVE)
    graph["pre"] = node("SlipstreamEditPreview", image=["i", 0], tasks=["t", 0])
    graph["a"] = node("SaveImage", images=["pre", 0], filename_prefix="preview")
    graph["b"] = node("SaveImage", images=["pre", 1], filename_prefix="draft")
    result = host.run(graph)
    assert result.ok, result.explain()
    assert "inv" not in result.executed_nodes
    assert "1" not in result.executed_nodes
    drafted = pixels(result, "b")
    assert drafted[60, 80, 0] > 200  # the object in its new place
    assert drafted[56, 40, 0] < 80  # and gone from the old one


def test_what_is_drawn_on_the_canvas_is_the_object_and_the_preview_runs_alone(host: Any, tells_again: bool) -> None:
    drawing = json.dumps({"size": [128, 128], "shapes": [{"box": [24, 40, 56, 72]}]})
    tasks = {
        "masked": node("SlipstreamMove", mask=["mask", 0], **MOVE),
        "drawn": node("SlipstreamMove", image=["i", 0], canvas=drawing, **MOVE),
        "typed": node("SlipstreamMove", canvas=drawing, **MOVE),
        "pulled": node("SlipstreamDrag", handles="40,56 -> 50,56", targets="", method="warp", image=["i", 0]),
    }
    graph = {**base(), **tasks}
    for name in tasks:
        graph[f"{name} preview"] = node("SlipstreamEditPreview", image=["i", 0], tasks=[name, 0])
    result = host.run(graph)
    assert result.ok, result.explain()
    assert "inv" not in result.executed_nodes
    shown = {name: pixels(result, f"{name} preview") for name in tasks}
    assert np.array_equal(shown["masked"], shown["drawn"])
    assert np.array_equal(shown["masked"], shown["typed"])
    assert (shown["pulled"] != shown["masked"]).any()
    for name, roles in (("masked", ["mask"]), ("drawn", ["image"]), ("pulled", ["image"])):
        if tells_again or name in result.executed_nodes:
            assert [entry["role"] for entry in result.outputs[name]["slipstream_canvas"]] == roles
    assert "slipstream_canvas" not in result.outputs.get("typed", {})


def test_an_object_that_was_never_painted_is_said_with_the_remedy(complaint: Any) -> None:
    graph = task_graph("move")
    del graph["t"]["inputs"]["mask"]
    assert "Paint the object on the canvas" in complaint(graph)


def test_interrupt_stops_between_network_calls_and_leaves_the_host_usable(host: Any) -> None:
    graph = task_graph("drag energy")
    graph["inv"]["inputs"]["steps"] = 60
    run = host.submit(graph)
    run.wait_for(lambda e: e.type == "progress" and e.data["node"] == "out" and e.data["value"] == 3, timeout=200)
    run.interrupt()
    result = run.wait()
    assert result.status == "interrupted"
    done, total = result.progress("out")[-1]
    assert done < total / 2
    assert host.run(task_graph("move")).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(m=node("ProbePatchAttention", model=["1", 0], kind="attn1_replace")), "another node has replaced it"),
        (lambda g: g.update(m=node("ModelSamplingSD3", model=["1", 0], shift=3.0)), "flow model"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_with_the_reason(host: Any, change: Any, message: str) -> None:
    graph = task_graph("move")
    change(graph)
    for id in ("inv", "out"):
        graph[id]["inputs"]["model"] = ["m", 0]
    result = host.run(graph)
    assert result.status == "error"
    assert message in result.explain()


def test_quantised_weights_are_refused_with_the_reason(host: Any) -> None:
    graph = base()
    graph["m"] = node("ProbeTinyNative", shape="sd15", dtype="float8")
    graph["look"] = node("ProbeFeatures", model=["m", 0], positive=["p", 0], checkpoint=False)
    result = host.run(graph | {"mask": graph["mask"]})
    assert result.status == "error"
    assert "weight" in result.explain()


def test_an_inversion_of_another_model_is_refused(host: Any) -> None:
    graph = task_graph("move")
    graph["other"] = node("ProbeTinyNative", shape="sd15", dtype="float32")
    graph["out"]["inputs"]["model"] = ["other", 0]
    result = host.run(graph)
    assert result.status == "error"
    assert "another MODEL" in result.explain()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"handles": "12; 40"}, "JSON list of points"), ({"handles": "[]", "targets": "[]"}, "at least one pair"),
        ({"targets": '[{"x": 900, "y": 60}]'}, "points within"),
        ({"targets": '[{"x": 64, "y": 60}, {"x": 66, "y": 60}]'}, "Pair them up"),
        ({"targets": '[{"x": 40, "y": 56}]'}, "away from its handle"),
    ],
)  # fmt: skip
def test_bad_points_name_the_remedy(complaint: Any, inputs: dict[str, str], message: str) -> None:
    graph = task_graph("drag warp")
    graph["t"]["inputs"].update(inputs)
    assert message in complaint(graph)


def test_an_object_cut_by_the_border_is_said(host: Any) -> None:
    graph = task_graph("move")
    graph["t"]["inputs"]["dx"] = 88.0
    result = host.run(graph)
    assert result.ok, result.explain()
    assert "outside the image" in json.dumps(result.outputs["out"])


def test_an_image_prompt_is_kept_to_its_steps_and_freeu_is_left_out(host: Any) -> None:
    plain = pixels(host.run(task_graph("drag energy")), "save")
    images = {}
    for kind in ("attn2_output", "freeu"):
        graph = task_graph("drag energy")
        graph["m"] = node("ProbePatchAttention", model=["1", 0], kind=kind)
        for id in ("inv", "out"):
            graph[id]["inputs"]["model"] = ["m", 0]
        result = host.run(graph)
        assert result.ok, result.explain()
        images[kind] = pixels(result, "save")
    assert np.array_equal(plain, images["freeu"])
    assert not np.array_equal(plain, images["attn2_output"])
    assert "has no effect on an edit" in host.log()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("shape", "layers"), [("sd15", 6), ("sdxl", 6), ("pocket", 6)])
def test_features_and_gradients_of_native_models_in_inference_mode(
    host: Any, report: Any, shape: str, layers: int, checkpoint: bool
) -> None:
    graph = base()
    model = ["1", 0]
    if shape != "pocket":
        graph["m"] = node("ProbeTinyNative", shape=shape, dtype="float32")
        model = ["m", 0]
    look = node("ProbeFeatures", model=model, positive=["p", 0], checkpoint=checkpoint)
    found = report(host.run({k: graph[k] for k in ("1", "p", "m") if k in graph} | {"look": look}))
    assert [s[-2:] for s in found["shapes"]] == [[8, 8], [16, 16]]  # half and full latent size
    assert found["same"]
    assert found["analytic"] == pytest.approx(found["numeric"], rel=2e-2)
    assert len(found["layers"]) >= layers
    assert found["unchanged"] < 1e-3
    everything, inputs = found["saved"]
    assert inputs < 0.5 * everything
