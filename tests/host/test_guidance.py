"""Patches on the MODEL that act around the network, in every technique: each row as the host's own guider guides it alone."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from graph import node
from PIL import Image

SLG = {"double_layers": "0", "single_layers": "0", "start_percent": 0.0, "end_percent": 1.0}
# (node, its inputs, whether it acts at cfg 1)
STOCK: dict[str, tuple[dict[str, Any], bool]] = {
    "RescaleCFG": ({"multiplier": 0.9}, False),
    "PerturbedAttentionGuidance": ({"scale": 3.0}, True),
    "SelfAttentionGuidance": ({"scale": 0.8, "blur_sigma": 2.0}, True),
    "APG": ({"eta": 0.5, "norm_threshold": 5.0, "momentum": 0.0}, True),
    "TCFG": ({}, False),
    "FreSca": ({"scale_low": 0.8, "scale_high": 1.5, "freq_cutoff": 5}, False),
    "Mahiro": ({}, False),
    "CFGZeroStar": ({}, False),
    "CFGNorm": ({"strength": 0.8}, True),
    "Epsilon Scaling": ({"scaling_factor": 1.05}, True),
    "CFGOverride": ({"cfg": 5.0, "start_percent": 0.0, "end_percent": 0.5}, True),
    "NAGuidance": ({"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}, True),
}
OURS = {"function": False, "call": False, "estimates": False, "cfg": True}


def prompts() -> dict[str, Any]:
    return {
        "1": node("SlipstreamLoadModel", model="pocket"),
        "p": node("CLIPTextEncode", clip=["1", 1], text="a large red circle on a blue background"),
        "n": node("CLIPTextEncode", clip=["1", 1], text=""),
    }


@pytest.mark.parametrize("cfg", [4.0, 1.0])
@pytest.mark.parametrize("patch", [*STOCK, *OURS])
def test_each_row_is_guided_as_the_host_guides_it_alone(host, object_info, report, patch, cfg) -> None:
    if patch in STOCK and patch not in object_info:
        pytest.skip(f"this host has no {patch}")
    graph = prompts()
    if patch in STOCK:
        graph["m"] = node(patch, model=["1", 0], **STOCK[patch][0])
    else:
        graph["m"] = node("ProbePatch", model=["1", 0], kind=patch)
    graph["g"] = node(
        "ProbeGuided", model=["m", 0], plain=["1", 0], positive=["p", 0], negative=["n", 0], cfg=cfg
    )  # fmt: skip
    found = report(host.run(graph))
    assert found["difference"] < 1e-4
    acts_at_one = STOCK[patch][1] if patch in STOCK else OURS[patch]
    assert (found["effect"] > 1e-3) == (cfg != 1 or acts_at_one)


def sampled(
    guidance: str, split: bool, empty: bool = False, foreign: bool = False, delta: float = 0.5
) -> dict[str, Any]:
    """A latent sampled in 6 steps in one node "o", or in two by SplitSigmas; `foreign`: the first by the stock CFGGuider."""
    graph = prompts()
    graph["i"] = node("EmptyImage", width=128, height=128, batch_size=2, color=0x1A3B64)
    graph["e"] = node("EmptyLatentImage", width=128, height=128, batch_size=2)
    if not empty:
        graph["e"] = node("VAEEncode", pixels=["i", 0], vae=["1", 2])
    graph["z"] = node("RandomNoise", noise_seed=3)
    graph["s"] = node("BasicScheduler", model=["1", 0], scheduler="normal", steps=6, denoise=1.0)
    graph["eu"] = node("KSamplerSelect", sampler_name="euler")
    prompt = {"model": ["1", 0], "positive": ["p", 0], "negative": ["n", 0]}
    graph["g"] = node("SlipstreamRCFGGuider", **prompt, guidance=guidance, guidance_scale=1.4, delta=delta)
    shared = {"sampler": ["eu", 0], "guider": ["g", 0]}
    if not split:
        graph["o"] = node("SamplerCustomAdvanced", **shared, noise=["z", 0], sigmas=["s", 0], latent_image=["e", 0])
        return graph
    graph["sp"] = node("SplitSigmas", sigmas=["s", 0], step=3)
    graph["dn"] = node("DisableNoise")
    graph["cfg"] = node("CFGGuider", **prompt, cfg=3.0)
    first = {**shared, "guider": ["cfg" if foreign else "g", 0]}
    graph["o1"] = node("SamplerCustomAdvanced", **first, noise=["z", 0], sigmas=["sp", 0], latent_image=["e", 0])
    graph["o"] = node("SamplerCustomAdvanced", **shared, noise=["dn", 0], sigmas=["sp", 1], latent_image=["o1", 0])
    return graph


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("guidance", ["full", "self", "onetime"])
def test_sampling_in_two_parts_is_sampling_in_one(host, report, guidance, empty) -> None:
    whole, parts = sampled(guidance, split=False, empty=empty), sampled(guidance, split=True, empty=empty)
    graph = {**parts, "whole": whole["o"], "c": node("ProbeCompare", one=["whole", 0], other=["o", 0])}
    before = len(host.log())
    found = report(host.run(graph))
    assert found["difference"] < 1e-4 * found["largest"]
    assert ("the earlier part's `onetime` is used" in host.log()[before:]) == (guidance == "self" and empty)


@pytest.mark.parametrize("guidance", ["self", "onetime"])
def test_a_first_part_by_another_guider_warns(host, guidance) -> None:
    graph = sampled(guidance, split=True, foreign=True, delta=0.25)
    graph["d"] = node("VAEDecode", samples=["o", 0], vae=["1", 2])
    graph["out"] = node("PreviewImage", images=["d", 0])
    before = len(host.log())
    assert host.run(graph).ok
    assert "noise of an earlier part" in host.log()[before:]


@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
def test_a_step_cache_is_left_out_of_a_stream_with_a_warning(host, cache) -> None:
    """It knows the steps of one image; the rows of a stream change places in every pass."""
    found = []
    for patched in (False, True):
        graph = prompts()
        settings = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        graph["m"] = node(cache, model=["1", 0], **settings)
        graph["i"] = node("EmptyImage", width=128, height=128, batch_size=3, color=0x1A3B64)
        graph["s"] = node(
            "SlipstreamStreamFrames", model=["m" if patched else "1", 0], positive=["p", 0], negative=["n", 0], vae=["1", 2],
            frames=["i", 0], strength=0.6, steps=3, guidance="none", guidance_scale=1.2, seed=2,
        )  # fmt: skip
        graph["out"] = node("PreviewImage", images=["s", 0])
        before = len(host.log())
        result = host.run(graph)
        assert result.ok, result.explain()
        assert (f"{cache} has no effect here" in host.log()[before:]) == patched
        found.append([np.asarray(Image.open(io.BytesIO(file.read()))) for file in result.files])
    assert len(found[0]) == 3
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_a_running_average_over_frames_warns(host, momentum) -> None:
    graph = prompts()
    graph["m"] = node("APG", model=["1", 0], eta=1.0, norm_threshold=5.0, momentum=momentum)
    graph["i"] = node("EmptyImage", width=64, height=64, batch_size=2, color=0x1A3B64)
    graph["s"] = node(
        "SlipstreamStreamFrames", model=["m", 0], positive=["p", 0], negative=["n", 0], vae=["1", 2], frames=["i", 0],
        strength=0.6, steps=2, guidance="full", guidance_scale=2.0, seed=2,
    )  # fmt: skip
    graph["out"] = node("PreviewImage", images=["s", 0])
    before = len(host.log())
    result = host.run(graph)
    assert result.ok, result.explain()
    assert ("APG keeps a running average" in host.log()[before:]) == (momentum != 0)


@pytest.mark.parametrize("guidance", ["full", "self"])
def test_a_patch_of_the_negative_call_warns_where_there_is_none(host, guidance) -> None:
    graph = sampled(guidance, split=False)
    graph["slg"] = node(
        "SkipLayerGuidanceDiTSimple",
        model=["1", 0],
        double_layers="7",
        single_layers="",
        start_percent=0.0,
        end_percent=1.0,
    )
    graph["g"]["inputs"]["model"] = ["slg", 0]
    graph["d"] = node("VAEDecode", samples=["o", 0], vae=["1", 2])
    graph["out"] = node("PreviewImage", images=["d", 0])
    before = len(host.log())
    result = host.run(graph)
    assert result.ok, result.explain()
    assert ("SkipLayerGuidanceDiTSimple acts on the call" in host.log()[before:]) == (guidance == "self")


@pytest.mark.parametrize(
    "sampler", ["euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp"]
)
@pytest.mark.parametrize("guidance", ["full", "self", "onetime", "none"])
def test_cfg_pp_samplers_get_the_negative_estimate(host, report, sampler, guidance) -> None:
    """They read `uncond_denoised`, and residual guidance gives its own."""
    graph = sampled(guidance, split=False)
    graph["eu"] = node("KSamplerSelect", sampler_name=sampler)
    scale = 1.0 if guidance == "none" else 1.4
    graph["cfg"] = node("CFGGuider", model=["1", 0], positive=["p", 0], negative=["n", 0], cfg=scale)
    graph["stock"] = {**graph["o"], "inputs": {**graph["o"]["inputs"], "guider": ["cfg", 0]}}
    graph["c"] = node("ProbeCompare", one=["stock", 0], other=["o", 0])
    found = report(host.run(graph))
    assert (found["difference"] < 1e-3 * found["largest"]) == (guidance in ("full", "none"))
