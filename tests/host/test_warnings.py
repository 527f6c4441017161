"""A node's warnings reach a person: on the node that they belong to, in the history, in its report, cached or not."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

import pytest
from slipstream_tests.host.graph import node

PICTURE = "`picture` has no effect on this `background`. Choose `picture`."


def canvas(**values: Any) -> dict[str, Any]:
    """A canvas whose `picture` has no effect while `background` is colour."""
    inputs = {
        "invert_keep": False, "width": 64, "height": 64, "scale": 0.1, "x": 0.5, "y": 1.0, "background": "colour",
        "colour": "#808080", "noise_seed": 0, "softness": 2, **values,
    }  # fmt: skip
    photo = node("SlipstreamExamplePhoto", photo="astronaut")
    return {
        "photo": photo,
        "canvas": node("SlipstreamSeedCanvas", image=["photo", 0], keep=["photo", 1], picture=["photo", 0], **inputs),
    }


def blend(weight_end: float) -> dict[str, Any]:
    """A node that is no output node; its `weight_end` has no effect without frames."""
    return {
        "m": node("SlipstreamLoadModel", model="pocket"),
        "p": node("CLIPTextEncode", clip=["m", 1], text="a red circle"),
        "q": node("CLIPTextEncode", clip=["m", 1], text="a blue circle"),
        "blend": node(
            "SlipstreamBlendPrompts", first=["p", 0], second=["q", 0], weight=0.5, mode="linear", weight_end=weight_end
        ),
        "show": node("PreviewAny", source=["blend", 0]),
    }


def recorded(result: Any, name: str) -> list[str]:
    return result.outputs.get(name, {}).get("warnings", [])


def test_a_warning_is_sent_and_recorded_and_a_mended_setting_clears_it(host: Any) -> None:
    result = host.run(canvas(softness=3))
    assert result.warnings == [("canvas", PICTURE)]
    assert recorded(result, "canvas") == [PICTURE]
    assert f"Place Subject: {PICTURE}" in host.log()
    again = host.run(canvas(softness=3))
    assert "canvas" in again.cached_nodes
    assert recorded(again, "canvas") == [PICTURE]
    mended = host.run(canvas(softness=3, background="picture"))
    assert not mended.warnings
    assert not recorded(mended, "canvas")


def test_a_node_without_ui_output_of_its_own_records_them_too(host: Any, tells_again: bool) -> None:
    text = "`weight_end` has no effect without a clip. Connect `frames`."
    first, again = host.run(blend(0.25)), host.run(blend(0.25))
    assert first.warnings == [("blend", text)]
    assert "blend" in again.cached_nodes
    assert recorded(first, "blend") == [text]
    assert recorded(again, "blend") == ([text] if tells_again else [])
    assert "blend" not in host.run(blend(1.0)).outputs


def test_a_list_of_inputs_may_warn_in_some_of_its_runs(host: Any) -> None:
    graph = canvas()
    graph["names"] = node("ProbeStrings", values=json.dumps(["picture", "colour", "noise"]))
    graph["canvas"]["inputs"]["background"] = ["names", 0]
    result = host.run(graph)
    assert result.ok, result.explain()
    assert recorded(result, "canvas") == [PICTURE, PICTURE]


def test_a_guider_warns_on_its_own_node_while_another_one_runs_it(host: Any) -> None:
    graph = {
        **blend(1.0),
        "guider": node(
            "SlipstreamRCFGGuider", model=["m", 0], positive=["p", 0], negative=["q", 0], guidance="self",
            guidance_scale=1.5, delta=1.0,
        ),
        "noise": node("RandomNoise", noise_seed=1),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["m", 0], scheduler="normal", steps=1, denoise=1.0),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "run": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["euler", 0], sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "show": node("PreviewAny", source=["run", 0]),
    }  # fmt: skip
    result = host.run(graph)
    assert result.ok, result.explain()
    ((owner, text),) = result.warnings
    assert owner == "guider"
    assert "the latent is empty" in text
    (event,) = [e for e in result.events if e.type == "slipstream.warning"]
    assert event.data["by"] == "run"
    assert event.data["class_type"] == "SlipstreamRCFGGuider"


def test_a_warning_stands_in_the_report(host: Any) -> None:
    graph = {
        "photo": node("SlipstreamExamplePhoto", photo="astronaut"),
        "map": node("SlipstreamStretchMap", image=["photo", 0], points="60, 60 -> 90, 60", radius=48.0, window=3.0),
        "show": node("PreviewAny", source=["map", 2]),
    }
    graph["map"]["inputs"]["window"] = 5.0  # smoothing of the optical flow, which a drag written by hand does not use
    result = host.run(graph)
    assert result.ok, result.explain()
    assert result.outputs["show"]["text"][0].splitlines()[-1].startswith("Warning: `window` has no effect")


@pytest.mark.parametrize("cached", [False, True])
def test_the_history_has_them_when_no_browser_listens(host: Any, tells_again: bool, cached: bool) -> None:
    body = {"prompt": canvas(softness=5), "prompt_id": str(uuid.uuid4())}
    id = host.post("/prompt", body)["prompt_id"]
    end = time.monotonic() + 60
    while id not in host.history(id) and time.monotonic() < end:
        time.sleep(0.1)
    outputs = host.history(id)[id]["outputs"]
    if cached and not tells_again:
        assert "canvas" not in outputs
    else:
        assert outputs["canvas"]["warnings"] == [PICTURE]


def test_the_script_that_shows_them_is_served(host: Any) -> None:
    assert any(path.endswith("/warnings.js") for path in host.get("/extensions"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"colour": "grey"}, "`colour` as #rrggbb, but got 'grey'"), ({"scale": 99.0}, "bigger than max of 16.0")],
)
def test_a_bad_value_is_refused_before_anything_runs(
    host: Any, complaint: Any, settings: dict[str, Any], message: str
) -> None:
    ran = len(host.history())
    assert message in complaint(canvas(**settings))
    assert len(host.history()) == ran


def test_an_input_that_is_validated_by_us_keeps_its_range(complaint: Any) -> None:
    graph = canvas()
    graph["cow"] = node(
        "SlipstreamCowSampler", keep=["canvas", 1], cycles=1, preserve=1.0, low=0.4, high=2000.0, range_unit="noise level",
        inversion_cfg=1.0, eta=1.0, final_eta=0.1, noise_limit=1.0, repel=1.0,
    )  # fmt: skip
    graph["show"] = node("PreviewAny", source=["cow", 0])
    assert "`high` between 0.0 and 1000.0, but got 2000.0" in complaint(graph)
