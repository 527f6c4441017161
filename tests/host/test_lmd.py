"""Mask schedules, masked regeneration, latent fill and the diagnostics in a real host."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from slipstream.lmd import latents_kind

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = "a large red circle on a blue background"
REGENERATE = {
    "seed": 3, "steps": 6, "cfg": 3.0, "sampler_name": "euler", "schedule": "uniform", "rounds": 1, "strength": 0.6,
    "strength_end": 0.0, "kind": "fixed", "low": 0.15, "high": 1.0, "direction": "decreasing", "patch": 2, "nested": True,
    "candidates": 1,
}  # fmt: skip
TRAIN = {
    "name": "t", "folder": "", "steps": 40, "batch": 4, "learning_rate": 0.002, "size": "small", "width": 128, "height": 128,
    "patch": 2, "ratio": "random", "masks": "mixed", "mirror": True, "resume": True, "seed": 0,
}  # fmt: skip


def node(type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": type, "inputs": inputs}


def base(batch: int = 1) -> dict[str, Any]:
    """Model "1", prompts "p" and "n", a sampled latent "x" and its image "i"."""
    return {
        "1": node("SlipstreamLoadModel", model="pocket"),
        "p": node("CLIPTextEncode", clip=["1", 1], text=TEXT),
        "n": node("CLIPTextEncode", clip=["1", 1], text=""),
        "e": node("EmptyLatentImage", width=128, height=128, batch_size=batch),
        "x": node(
            "KSampler", model=["1", 0], positive=["p", 0], negative=["n", 0], latent_image=["e", 0], seed=1, steps=4, cfg=3.0,
            sampler_name="euler", scheduler="normal", denoise=1.0,
        ),
        "i": node("VAEDecode", samples=["x", 0], vae=["1", 2]),
    }  # fmt: skip


def regenerate(latent: str = "x", **changes: Any) -> dict[str, Any]:
    inputs = {"model": ["1", 0], "positive": ["p", 0], "negative": ["n", 0], "latent": [latent, 0]}
    return node("SlipstreamMaskedRegenerate", **inputs, **{**REGENERATE, **changes})


def box(graph: dict[str, Any]) -> None:
    """Add mask "mask": the box x 32..80, y 48..96 of 128 x 128 pixels."""
    graph["off"] = node("SolidMask", value=0.0, width=128, height=128)
    graph["on"] = node("SolidMask", value=1.0, width=48, height=48)
    graph["mask"] = node("MaskComposite", destination=["off", 0], source=["on", 0], x=32, y=48, operation="add")


INSIDE = (slice(None), slice(None), slice(6, 12), slice(4, 10))


def dumped(result: Any, name: str) -> torch.Tensor:
    found = json.loads(result.outputs[name]["report"][0])
    return torch.tensor(found["values"]).reshape(found["shape"])


def text(result: Any, name: str) -> str:
    assert result.ok, result.explain()
    return result.outputs[name]["text"][0]


def message(result: Any) -> str:
    assert result.status == "error"
    return result.error["exception_message"]


def test_ratio_zero_is_the_input_and_costs_nothing(host: Any, report: Any) -> None:
    graph = {**base(2), "r": regenerate(low=0.0, high=0.0), "t": node("PreviewAny", source=["r", 2])}
    graph["c"] = node("ProbeCompare", one=["r", 0], other=["x", 0])
    result = host.run(graph)
    assert text(result, "t").startswith("0 network rows in 0 calls; 0% of the cells touched")
    assert report(result)["difference"] == 0


def test_a_latent_of_a_video_is_refused_by_name_on_a_model_of_images(host: Any) -> None:
    graph = {**base(), "v": node("EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=1)}
    graph |= {"r": regenerate("v"), "t": node("PreviewAny", source=["r", 2])}
    assert "a latent of images for this model, but got one of a video with 2 latent frames" in message(host.run(graph))


@pytest.mark.parametrize("cfg", [3.0, 1.0])
def test_ratio_one_equals_ksampler_with_the_same_seed(host: Any, report: Any, cfg: float) -> None:
    graph = {**base(2), "r": regenerate(cfg=cfg), "t": node("PreviewAny", source=["r", 2])}
    graph["k"] = node(
        "KSampler", model=["1", 0], positive=["p", 0], negative=["n", 0], latent_image=["x", 0], seed=3, steps=6, cfg=cfg,
        sampler_name="euler", scheduler="normal", denoise=0.6,
    )  # fmt: skip
    graph["c"] = node("ProbeCompare", one=["r", 0], other=["k", 0])
    result = host.run(graph)
    assert text(result, "t").startswith(f"{24 if cfg > 1 else 12} network rows in 6 calls; 100% of the cells touched")
    found = report(result)
    assert found["shape"] == [2, 4, 16, 16]
    assert found["difference"] <= 1e-4 * found["largest"]


@pytest.mark.parametrize(("steps", "denoise"), [(4, 0.6), (5, 1.0)])
@pytest.mark.parametrize("size", [(128, 128), (136, 120)], ids=["even", "odd"])
def test_ratio_one_equals_ksampler_for_a_latent_out_of_a_batch(
    host: Any, steps: int, denoise: float, size: tuple[int, int]
) -> None:
    """At (136, 120) a row is no multiple of 16 values: the host draws a batch in one go, and rows by `batch_index` one by one."""
    graph = base(3)
    graph["e"]["inputs"].update(width=size[0], height=size[1])
    graph["part"] = node("LatentFromBatch", samples=["x", 0], batch_index=1, length=2)
    for latent in ("x", "part"):
        graph[f"r{latent}"] = regenerate(latent, cfg=3.0, steps=steps, strength=denoise)
        graph[f"k{latent}"] = node(
            "KSampler", model=["1", 0], positive=["p", 0], negative=["n", 0], latent_image=[latent, 0], seed=3, steps=steps,
            cfg=3.0, sampler_name="euler", scheduler="normal", denoise=denoise,
        )  # fmt: skip
        graph[f"c{latent}"] = node("ProbeCompare", one=[f"r{latent}", 0], other=[f"k{latent}", 0])
    result = host.run(graph)
    assert result.ok, result.explain()
    for latent in ("x", "part"):
        found = json.loads(result.outputs[f"c{latent}"]["report"][0])
        assert found["difference"] <= 1e-4 * found["largest"]


@pytest.mark.parametrize("wire", ["mask", "noise_mask"])
def test_cells_outside_the_mask_are_bit_exact(host: Any, wire: str) -> None:
    graph = base(2)
    box(graph)
    if wire == "mask":
        graph["r"] = regenerate(mask=["mask", 0], rounds=2, candidates=2)
    else:
        graph["s"] = node("SetLatentNoiseMask", samples=["x", 0], mask=["mask", 0])
        graph["r"] = regenerate("s", rounds=2, candidates=2)
    for name, latent in (("before", "x"), ("after", "r")):
        graph[name] = node("ProbeDump", latent=[latent, 0], model=["1", 0])
    result = host.run(graph)
    assert result.ok, result.explain()
    before, after = dumped(result, "before"), dumped(result, "after")
    changed = after != before
    assert changed[INSIDE].float().mean() > 0.99
    changed[INSIDE] = False
    assert not changed.any()
    assert result.progress("r")[-1] == (12, 12)
    assert any(e.node == "r" for e in result.previews)


def test_a_schedule_of_masks_drives_the_rounds(host: Any) -> None:
    graph = base()
    graph["s"] = node(
        "SlipstreamMaskSchedule", steps=3, kind="linear", low=0.0, high=0.5, direction="increasing", width=128, height=128,
        patch=16, nested=True, seed=0,
    )  # fmt: skip
    graph["r"] = regenerate(masks=["s", 0], steps=2)
    graph["t"], graph["chart"] = node("PreviewAny", source=["r", 2]), node("PreviewImage", images=["s", 1])
    result = host.run(graph)
    # The first mask is empty: two rounds of two steps with guidance.
    assert text(result, "t").startswith("8 network rows in 4 calls; 50% of the cells touched")
    assert len(result.files) == 1


def test_cancel_stops_a_regeneration(host: Any, cancelled: Any) -> None:
    graph = {**base(), "r": regenerate(rounds=100, kind="fixed", steps=50, seed=99)}
    graph["d"] = node("ProbeDump", latent=["r", 0], model=["1", 0])
    result, before, late = cancelled(graph, lambda e: e.type == "progress" and e.data.get("node") == "r")
    assert result.status == "interrupted"
    assert before >= 1
    assert late <= 1  # the host is asked before each call; cancel may come right after


def test_bad_settings_reach_the_user_as_one_sentence(complaint: Any) -> None:
    graph = {**base(), "r": regenerate(low=0.9, high=0.5)}
    graph["d"] = node("ProbeDump", latent=["r", 0], model=["1", 0])
    assert "Expected `high` between 0.9 and 1, but got 0.5" in complaint(graph)


# ------------------------------------------------------------------------------------------------------------ latent fill


@pytest.fixture(scope="module")
def pictures(host: Any) -> str:
    """A folder below the host's input folder with six images of plain colours and a box."""
    folder = pathlib.Path(host.base) / "input" / "training"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        picture = np.full((140, 160, 3), rng.integers(0, 255, 3), dtype=np.uint8)
        picture[40:90, 50:100] = rng.integers(0, 255, 3)
        Image.fromarray(picture).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return "training"


def training(**changes: Any) -> dict[str, Any]:
    return {
        "1": node("SlipstreamLoadModel", model="pocket"),
        "f": node("SlipstreamTrainLatentFill", model=["1", 0], vae=["1", 2], **{**TRAIN, **changes}),
    }


def fills(host: Any) -> pathlib.Path:
    return pathlib.Path(host.base) / "models" / "latent_fill"


def weights(path: pathlib.Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, {k: v for k, v in file.metadata().items()}


def test_a_cancelled_training_resumes_to_the_same_fill(host: Any, pictures: str) -> None:
    whole = host.run(training(name="whole", folder=pictures))
    assert text(whole, "f").startswith("12 latents, 40 steps, error ")
    assert whole.progress("f")[-1] == (40, 40)
    assert any(e.node == "f" for e in whole.previews)  # the loss chart
    assert len(list((fills(host) / "cache").glob("*.safetensors"))) == 6
    assert "Leaving out broken.png" in host.log()

    run = host.submit(training(name="parts", folder=pictures))
    # The bar of the encoding runs to 7; the next one is the training's.
    run.wait_for(lambda e: e.type == "progress" and e.data["max"] == 40 and e.data["value"] >= 3, timeout=120)
    run.interrupt()
    assert run.wait().status == "interrupted"
    stopped, metadata = weights(fills(host) / "parts.safetensors")
    done = len(json.loads(metadata["losses"]))
    assert 3 <= done < 40
    assert any(name.startswith("train.") for name in stopped)

    resumed = host.run(training(name="parts", folder=pictures))
    assert resumed.ok, resumed.explain()
    first = next(value for value, most in resumed.progress("f") if most == 40)
    assert first == done + 1
    one, other = (weights(fills(host) / f"{name}.safetensors")[0] for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # The library names the same latents alike, so its files and these are interchangeable.
    vae = json.loads((ROOT / "pocket" / "vae" / "config.json").read_text())
    assert json.loads(metadata["config"])["latents"] == latents_kind(vae["latent_channels"], vae["scaling_factor"])


def test_a_finished_fill_fills_and_shows_in_the_list(host: Any, pictures: str) -> None:
    graph = {**base(2), **training(name="whole", folder=pictures)}
    box(graph)
    inputs = {"model": ["1", 0], "latent": ["x", 0], "mask": ["mask", 0]}
    graph["wired"] = node("SlipstreamLatentFill", **inputs, fill=["f", 0], fill_name="")
    graph["named"] = node("SlipstreamLatentFill", **inputs, fill_name="whole.safetensors")
    for name, latent in (("a", "wired"), ("b", "named"), ("before", "x")):
        graph[name] = node("ProbeDump", latent=[latent, 0], model=["1", 0])
    graph["k"] = node(
        "KSampler", model=["1", 0], positive=["p", 0], negative=["n", 0], latent_image=["named", 0], seed=1, steps=2, cfg=1.0,
        sampler_name="euler", scheduler="normal", denoise=0.5,
    )  # fmt: skip
    graph["d"] = node("ProbeDump", latent=["k", 0], model=["1", 0])
    result = host.run(graph)
    assert result.ok, result.explain()
    before, filled, after = dumped(result, "before"), dumped(result, "a"), dumped(result, "d")
    assert torch.equal(filled, dumped(result, "b"))
    changed = filled != before
    assert changed[INSIDE].all()
    changed[INSIDE] = False
    assert not changed.any()
    # The mask travels with the latent: the sampler leaves the rest alone too.
    outside = torch.ones_like(before, dtype=torch.bool)
    outside[INSIDE] = False
    assert torch.allclose(after[outside], before[outside], atol=1e-5)
    names = host.object_info("SlipstreamLatentFill")["input"]["required"]["fill_name"][0]
    assert "whole.safetensors" in names


def test_a_fill_of_another_size_or_a_missing_one_is_refused(host: Any, pictures: str) -> None:
    graph = base()
    graph["e"]["inputs"]["width"] = 192
    graph["mask"] = node("SolidMask", value=1.0, width=64, height=64)
    graph["f"] = node(
        "SlipstreamLatentFill", model=["1", 0], latent=["x", 0], mask=["mask", 0], fill_name="whole.safetensors"
    )
    graph["d"] = node("ProbeDump", latent=["f", 0], model=["1", 0])
    assert "of 16 x 16 cells, the size this fill was trained on, but got 16 x 24. Resize the image" in message(
        host.run(graph)
    )
    graph["f"]["inputs"]["fill_name"] = "gone.safetensors"
    assert "Train one first" in message(host.run(graph))
    (fills(host) / "bad.safetensors").write_bytes(b"rubbish")
    graph["f"]["inputs"]["fill_name"] = "bad.safetensors"
    assert "Expected `bad.safetensors` to be a latent fill, but got a damaged file" in message(host.run(graph))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"folder": "nowhere"}, "Expected `folder` to be a folder of images"),
        ({"folder": ""}, "Expected `folder` or `images`, but got neither"),
        ({"folder": "training", "name": "../x"}, "Expected `name` to be a plain file name, but got '../x'"),
        (
            {"folder": "training", "name": "whole", "batch": 5},
            "other values of batch. Use another name, or turn resume off",
        ),
        ({"folder": "training", "name": "new", "patch": 3}, "Expected `width` as a multiple of 24"),
    ],
)
def test_training_mistakes_are_explained(complaint: Any, pictures: str, changes: dict[str, Any], expected: str) -> None:
    assert expected in complaint(training(**changes))


# ------------------------------------------------------------------------------------------------------------ diagnostics


def influence(sampler: dict[str, Any], **others: Any) -> dict[str, Any]:
    graph = base()
    box(graph)
    graph["sampler"] = sampler
    graph["guider"] = node("CFGGuider", model=["1", 0], positive=["p", 0], negative=["n", 0], cfg=2.0)
    graph["noise"] = node("RandomNoise", noise_seed=7)
    graph["sigmas"] = node("BasicScheduler", model=["1", 0], scheduler="normal", steps=5, denoise=0.6)
    graph["r"] = node(
        "SlipstreamInfluenceProfile", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0], sigmas=["sigmas", 0],
        latent=["x", 0], mask=["mask", 0], **others,
    )  # fmt: skip
    graph["t"], graph["chart"] = node("PreviewAny", source=["r", 3]), node("PreviewImage", images=["r", 0])
    graph["heat"] = node("PreviewImage", images=["r", 1])
    return graph


EULER = node("KSamplerSelect", sampler_name="euler")
# A sampler of ours reports its steps by itself and calls the host back once, at the end.
OURS = node("ProbeSampler", sleep=0.0, replaces=False, fail=False)


@pytest.mark.parametrize("sampler", [EULER, OURS], ids=["stock", "ours"])
def test_equal_runs_have_no_influence_and_say_so(host: Any, sampler: dict[str, Any]) -> None:
    result = host.run(influence(sampler))
    *lines, warning = text(result, "t").splitlines()
    assert len(lines) == 5
    assert all(line.endswith("0% of the difference lies outside; mean inside 0") for line in lines)
    assert warning.startswith("Warning: both runs are the same")
    assert any("both runs are the same" in text for _, text in result.warnings)


@pytest.mark.parametrize("sampler", [EULER, OURS], ids=["stock", "ours"])
def test_another_start_reaches_as_far_in_a_stock_sampler_as_in_ours(host: Any, sampler: dict[str, Any]) -> None:
    graph = influence(sampler, other_latent=["changed", 0])
    graph["changed"] = node(
        "LatentCompositeMasked", destination=["x", 0], source=["e", 0], x=0, y=0, resize_source=False, mask=["mask", 0]
    )
    result = host.run(graph)
    lines = text(result, "t").splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("step 1: reach ")
    inside = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert all(value > 0.01 for value in inside)
    assert len([f for f in result.files if f.node == "heat"]) == 5
    # Euler is euler: the two ways of recording see the same estimates.
    expected = test_another_start_reaches_as_far_in_a_stock_sampler_as_in_ours.__dict__.setdefault("lines", lines)
    assert lines == expected


def test_an_edit_is_measured_in_pixels(host: Any) -> None:
    graph = base()
    box(graph)
    graph["white"] = node("EmptyImage", width=128, height=128, batch_size=1, color=0xFFFFFF)
    graph["edited"] = node(
        "ImageCompositeMasked",
        destination=["i", 0],
        source=["white", 0],
        x=0,
        y=0,
        resize_source=False,
        mask=["mask", 0],
    )
    graph["r"] = node("SlipstreamInfluenceImages", before=["i", 0], after=["edited", 0], mask=["mask", 0])
    graph["t"], graph["chart"] = node("PreviewAny", source=["r", 3]), node("PreviewImage", images=["r", 0])
    found = text(host.run(graph), "t")
    assert "pixels to 1/e" in found
    assert "0% of the difference lies outside" in found


def test_stretch_of_a_drag_and_of_frames(host: Any) -> None:
    graph = base(3)
    graph["drag"] = node("SlipstreamStretchMap", image=["i", 0], points="64, 64 -> 104, 64", radius=12.0, window=3.0)
    graph["flow"] = node("SlipstreamStretchMap", image=["i", 0], points="", radius=48.0, window=3.0)
    for name in ("drag", "flow"):
        graph[f"{name} report"], graph[f"{name} map"] = (
            node("PreviewAny", source=[name, 2]),
            node("PreviewImage", images=[name, 0]),
        )
    result = host.run(graph)
    drag, flow = text(result, "drag report").splitlines(), text(result, "flow report").splitlines()
    assert len(drag) == 1
    assert len(flow) == 2
    assert not drag[0].endswith(" 0.00% of the pixels fold")
    # sigma_max ahead of the handle: 1 + L / (r sqrt(e)) behind it.
    assert "largest stretch x3.02" in drag[0]
    graph["flow"]["inputs"]["image"] = ["one", 0]
    graph["one"] = node("ImageFromBatch", image=["i", 0], batch_index=0, length=1)
    assert "Expected two or more frames, `points` or `edit`" in message(host.run(graph))


def test_stretch_of_an_edits_drag(host: Any) -> None:
    graph = base()
    box(graph)
    drag = {"handles": '[{"x": 50, "y": 72}]', "method": "warp", "mask": ["mask", 0]}
    for name, target in (("near", 52), ("far", 76)):
        graph[f"{name} drag"] = node("SlipstreamDrag", targets=f'[{{"x": {target}, "y": 72}}]', **drag)
        graph[name] = node(
            "SlipstreamStretchMap", image=["i", 0], points="", radius=48.0, window=3.0, edit=[f"{name} drag", 0]
        )
        graph[f"{name} report"], graph[f"{name} map"] = (
            node("PreviewAny", source=[name, 2]),
            node("PreviewImage", images=[name, 0]),
        )
    result = host.run(graph)
    near, far = text(result, "near report"), text(result, "far report")
    assert near.endswith(" 0.00% of the pixels fold")
    assert not far.endswith(" 0.00% of the pixels fold")
