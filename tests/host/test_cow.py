"""Cyclic One-Way Diffusion in a real host: the example, agreement with the library, progress, interrupt, bad input."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from slipstream.core import SeededNoise, load
from slipstream.core.images import read_image
from slipstream.core.masks import grow
from slipstream.core.schedules import DiscreteLevels, simple
from slipstream.cow import CowConfig, generate
from slipstream.cow.canvas import on_scene, paste_back, place, plain_background
from slipstream.cow.photos import PHOTOS

PROMPT = "a small white star at the top on a blue background"
PROMPT_NODE = "4"
SMALL = {
    "SlipstreamLoadModel.model": "pocket", f"{PROMPT_NODE}.text": PROMPT,
    "SlipstreamSeedCanvas.width": 128, "SlipstreamSeedCanvas.height": 128, "SlipstreamSeedCanvas.scale": 0.15,
    "SlipstreamCowSampler.cycles": 2, "BasicScheduler.steps": 10, "CFGGuider.cfg": 3.0,
}  # fmt: skip


@pytest.fixture
def prompt(example):
    return lambda **changes: example(
        "Grow a scene around a subject", {**SMALL, **{k.replace("__", "."): v for k, v in changes.items()}}
    )


def picture(result: Any) -> np.ndarray:
    assert result.ok, result.explain()
    (file,) = [f for f in result.files if f.type == "output"]
    return np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")).astype(int)


def test_host_and_library_agree(host, prompt):
    """The same canvas, levels and seed: at most 2 of 255 apart, at every pixel."""
    got = picture(host.run(prompt(RandomNoise__noise_seed=5)))
    image, mask = (read_image(p) for p in PHOTOS["astronaut"])
    canvas = place(image, mask[..., 0], plain_background(128, 128), 0.15, 0.5, 1.0)
    pipe = load("pocket")
    cond, uncond = pipe.encode_text([PROMPT]), pipe.encode_text([""])
    assert isinstance(pipe.model.levels, DiscreteLevels)

    def redraw(denoised: Any) -> Any:
        return pipe.encode_image(on_scene(pipe.decode(denoised), canvas.photo, canvas.keep))

    result = generate(
        pipe.model, pipe.encode_image(canvas.image), canvas.keep, cond, uncond, CowConfig(cfg_scale=3.0, cycles=2),
        SeededNoise(5), sigmas=simple(pipe.model.levels, 10), redraw=redraw,
    )  # fmt: skip
    ours = (paste_back(pipe.decode(result.latents), canvas, 1)[0] * 255).round().int().numpy()
    assert np.abs(got - ours).max() <= 2
    inside = (grow(canvas.keep, -4)[0] == 1).numpy()
    original = (canvas.photo[0] * 255).round().int().numpy()
    assert inside.sum() > 500
    assert np.abs(got - original)[inside].max() <= 1


def test_photo_and_vae_redraw_the_edge(host, prompt):
    """Without them the image is another; a photo of another size is resized, and where they have no effect there is a warning."""
    redrawn = picture(host.run(prompt(RandomNoise__noise_seed=5)))
    graph = prompt(RandomNoise__noise_seed=5)
    (sampler,) = [n["inputs"] for n in graph.values() if n["class_type"] == "SlipstreamCowSampler"]
    graph["half"] = {
        "class_type": "ImageScale",
        "inputs": {"image": sampler["photo"], "upscale_method": "area", "width": 64, "height": 64, "crop": "disabled"},
    }
    sampler["photo"] = ["half", 0]
    assert np.abs(picture(host.run(graph)) - redrawn).mean() < 4
    del sampler["photo"]
    result = host.run(graph)
    assert "`vae` has no effect without `photo`" in str(result.warnings)
    assert np.abs(picture(result) - redrawn).max() > 20
    result = host.run(prompt(RandomNoise__noise_seed=5, SlipstreamCowSampler__follow="mostly pixels"))
    assert "`vae` and `photo` have no effect: the subject is not kept to the end" in str(result.warnings)


def test_the_same_seed_gives_the_same_picture_after_other_runs(host, prompt):
    first = picture(host.run(prompt(RandomNoise__noise_seed=11)))
    other = picture(host.run(prompt(RandomNoise__noise_seed=12)))
    host.free()
    again = picture(host.run(prompt(RandomNoise__noise_seed=11)))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 20


def test_progress_counts_all_phases_and_shows_previews(host, prompt):
    result = host.run(prompt(RandomNoise__noise_seed=20, **{"SlipstreamCowSampler.inversion_cfg": 1.3}))
    assert result.ok, result.explain()
    (node,) = [
        n for n in {e.data.get("node") for e in result.events if e.type == "progress"} if result.progress(n)[-1][1] > 5
    ]
    steps = result.progress(node)
    totals = {total for _, total in steps}
    assert max(totals) >= 10
    assert steps[-1][0] == steps[-1][1]
    values = [value for value, total in steps if total == max(totals)]
    assert values == sorted(values)
    sampling = [p for p in result.previews if p.data.get("node_id") == node]
    assert len(sampling) >= 2
    assert Image.open(io.BytesIO(sampling[-1].data["image"])).size[0] > 0


def test_another_seed_does_not_invert_again(host, prompt):
    """The second run's progress starts behind the inversion: those steps were found in the cache."""
    changes = {"SlipstreamCowSampler.inversion_cfg": 1.21}
    starts = []
    for seed in (30, 31):
        result = host.run(prompt(RandomNoise__noise_seed=seed, **changes))
        assert result.ok, result.explain()
        counts = [result.progress(n) for n in {e.data.get("node") for e in result.events if e.type == "progress"}]
        longest = max(counts, key=lambda c: max(total for _, total in c))
        total = max(t for _, t in longest)
        starts.append(min(value for value, t in longest if t == total and value > 0))
    assert starts[0] == 1
    assert starts[1] > 4


def test_interrupt_stops_and_the_host_goes_on(host, prompt, cancelled):
    long = prompt(RandomNoise__noise_seed=40, **{"SlipstreamCowSampler.cycles": 400})
    result, before, late = cancelled(long, lambda e: e.type == "progress" and e.data.get("value", 0) >= 12)
    assert result.status == "interrupted"
    assert before >= 12
    assert late <= 1  # the host is asked after each call; one may have begun in between
    assert host.run(prompt(RandomNoise__noise_seed=41)).ok


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BasicScheduler.steps": 2}, "at least one step between noise levels"),
        ({"SlipstreamSeedCanvas.scale": 1.0}, "Expected a canvas of at least"),
        ({"SlipstreamSeedCanvas.colour": "blue"}, "Expected `colour` as #rrggbb"),
        ({"SlipstreamSeedCanvas.background": "picture"}, "Expected `picture`"),
        ({"SlipstreamCowSampler.low": 0.7}, "Expected `low` below `high`"),
        ({"SlipstreamCowSampler.high": 3.0}, "Expected `high` between 0 and 1.0"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_host_stays_usable(complaint, prompt, changes, message):
    assert message in complaint(prompt(**changes))


def rewired(graph: dict[str, Any], kind: str, **inputs: Any) -> dict[str, Any]:
    (name,) = [k for k, n in graph.items() if n["class_type"] == kind]
    graph[name]["inputs"].update(inputs)
    return graph


def test_empty_masks_and_empty_latents_are_refused(host, prompt):
    graph = prompt()
    graph["empty"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 128, "height": 128}}
    result = host.run(rewired(graph, "SlipstreamCowSampler", keep=["empty", 0]))
    assert "empty mask in row 0" in result.explain()
    graph = prompt()
    graph["blank"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    result = host.run(rewired(graph, "SamplerCustomAdvanced", latent_image=["blank", 0]))
    assert "Expected the encoded canvas as `latent_image`, but got an empty latent" in result.explain()
    graph = prompt()
    graph["three"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 128, "height": 128}}
    graph["many"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["rgb", 0], "amount": 3}}
    graph["rgb"] = {"class_type": "MaskToImage", "inputs": {"mask": ["three", 0]}}
    graph["masks"] = {"class_type": "ImageToMask", "inputs": {"image": ["many", 0], "channel": "red"}}
    result = host.run(rewired(graph, "SlipstreamCowSampler", keep=["masks", 0]))
    assert "`keep_mask` with 1 or 1 masks, but got 3" in result.explain()


def test_sigmas_that_do_not_descend_are_refused(host, prompt):
    graph = prompt()
    (scheduler,) = [k for k, n in graph.items() if n["class_type"] == "BasicScheduler"]
    graph["flipped"] = {"class_type": "FlipSigmas", "inputs": {"sigmas": [scheduler, 0]}}
    result = host.run(rewired(graph, "SamplerCustomAdvanced", sigmas=["flipped", 0]))
    assert "`sigmas` to descend strictly" in result.explain()


def test_suppress_enhance_batches_and_a_flow_model_run(host, prompt):
    graph = prompt(RandomNoise__noise_seed=50)
    (text,) = [k for k, n in graph.items() if n["class_type"] == "CLIPTextEncode" and n["inputs"]["text"] == ""]
    (sampler,) = [k for k, n in graph.items() if n["class_type"] == "SlipstreamCowSampler"]
    graph["other"] = {"class_type": "CLIPTextEncode", "inputs": {**graph[text]["inputs"], "text": "a green star"}}
    graph[sampler]["inputs"]["suppress"] = ["other", 0]
    repelled = picture(host.run(graph))
    plain = picture(host.run(prompt(RandomNoise__noise_seed=50)))
    assert np.abs(repelled - plain).max() > 10

    graph = prompt()
    (loader,) = [k for k, n in graph.items() if n["class_type"] == "SlipstreamLoadModel"]
    graph["flow"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": [loader, 0], "shift": 3.0}}
    for kind in ("CFGGuider", "BasicScheduler"):
        rewired(graph, kind, model=["flow", 0])
    assert picture(host.run(graph)).shape == (128, 128, 3)


def test_every_setting_has_a_tooltip_and_sane_defaults(host):
    for node in ("SlipstreamSeedCanvas", "SlipstreamCowSampler", "SlipstreamExamplePhoto"):
        info = host.object_info(node)[node] if node in host.object_info(node) else host.object_info(node)
        for specs in info["input"].values():
            for spec in specs.values():
                assert spec[1]["tooltip"]
        assert info["description"]
        assert len(info["output_tooltips"]) == len(info["output"])
