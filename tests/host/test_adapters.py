"""Our adapters inside a real host: the contract of `Denoiser`, rows of conditioning, SAMPLER, GUIDER, interrupt."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from graph import node
from safetensors.torch import save_file

TEXTS = ("a large red circle on a blue background", "a small green square")
SAMPLING: dict[str, dict[str, Any]] = {
    "eps": {},
    "v": {"class_type": "ModelSamplingDiscrete", "inputs": {"sampling": "v_prediction", "zsnr": False}},
    "x0": {"class_type": "ModelSamplingDiscrete", "inputs": {"sampling": "x0", "zsnr": False}},
    "flow": {"class_type": "ModelSamplingSD3", "inputs": {"shift": 3.0}},
}


def base(sampling: str = "eps", batch: int = 1, width: int = 128) -> dict[str, Any]:
    """Return a prompt with model "m", text encoder "1", conditioning "p" and "n", and an empty latent "l"."""
    patch = SAMPLING[sampling]
    graph = {
        "1": node("SlipstreamLoadModel", model="pocket"),
        "p": node("CLIPTextEncode", clip=["1", 1], text=TEXTS[0]),
        "n": node("CLIPTextEncode", clip=["1", 1], text=TEXTS[1]),
        "l": node("EmptyLatentImage", width=width, height=128, batch_size=batch),
    }
    if patch:
        graph["m"] = {"class_type": patch["class_type"], "inputs": {**patch["inputs"], "model": ["1", 0]}}
    return graph


def model_of(graph: dict[str, Any]) -> list[Any]:
    return ["m", 0] if "m" in graph else ["1", 0]


def advanced(graph: dict[str, Any], name: str, sampler: list[Any], guider: list[Any], latent: str = "l") -> None:
    """Add a SamplerCustomAdvanced called `name`, with its noise and sigmas."""
    graph["noise"] = node("RandomNoise", noise_seed=7)
    graph["sigmas"] = node("BasicScheduler", model=model_of(graph), scheduler="simple", steps=8, denoise=1.0)
    graph[name] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=guider, sampler=sampler, sigmas=["sigmas", 0],
        latent_image=[latent, 0],
    )  # fmt: skip


def add_guiders(graph: dict[str, Any]) -> None:
    inputs = {"model": model_of(graph), "positive": ["p", 0], "negative": ["n", 0], "cfg": 3.0}
    graph["guider"], graph["ours"] = node("CFGGuider", **inputs), node("ProbeGuider", **inputs)
    graph["euler"] = node("KSamplerSelect", sampler_name="euler")
    graph["sampler"] = node("ProbeSampler", sleep=0.0, replaces=False, fail=False)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_contract(host: Any, report: Any, sampling: str) -> None:
    graph = base(sampling)
    graph["c"] = node("ProbeContract", model=model_of(graph), positive=["p", 0], negative=["n", 0], latent=["l", 0])
    found = report(host.run(graph))
    assert found.pop("space") == ("flow" if sampling == "flow" else "ve")
    found.pop("sigma_max")
    assert {name: text for name, text in found.items() if text != "ok"} == {}
    assert len(found) == 8


def rows_graph(**extra: Any) -> dict[str, Any]:
    graph = {**base(), **extra}
    positive = ["c", 0] if "c" in extra else ["p", 0]
    graph["r"] = node("ProbeRows", model=["1", 0], positive=positive, negative=["n", 0], latent=["l", 0])
    return graph


def test_rows_of_two_prompts_are_one_call(host: Any, report: Any) -> None:
    found = report(host.run(rows_graph()))
    assert found["calls"] == 1
    assert found["difference"] < 1e-4 < found["effect"]


def test_combined_prompts_keep_their_rows(host: Any, report: Any) -> None:
    found = report(
        host.run(rows_graph(c=node("ConditioningCombine", conditioning_1=["p", 0], conditioning_2=["n", 0])))
    )
    assert found["calls"] == 2  # the combined prompt (two entries, one batch), the plain one
    assert found["difference"] < 1e-4 < found["effect"]


def test_area_prompts_keep_their_rows(host: Any, report: Any) -> None:
    area = node("ConditioningSetArea", conditioning=["p", 0], width=64, height=128, x=0, y=0, strength=1.0)
    both = node("ConditioningCombine", conditioning_1=["a", 0], conditioning_2=["n", 0])
    found = report(host.run(rows_graph(a=area, c=both)))
    assert found["difference"] < 1e-4 < found["effect"]


def test_time_ranges_hold_for_each_row(host: Any, report: Any) -> None:
    late = node("ConditioningSetTimestepRange", conditioning=["p", 0], start=0.5, end=1.0)
    early = node("ConditioningSetTimestepRange", conditioning=["n", 0], start=0.0, end=0.5)
    both = node("ConditioningCombine", conditioning_1=["a", 0], conditioning_2=["b", 0])
    found = report(host.run(rows_graph(a=late, b=early, c=both)))
    assert found["calls"] >= 3  # levels must not mix where a range decides
    assert found["difference"] < 1e-4 < found["effect"]


@pytest.mark.parametrize("sampling", ["eps", "v", "flow"])
def test_sampler_and_guider_equal_the_hosts(host: Any, report: Any, sampling: str) -> None:
    for sampler, guider in (("sampler", "guider"), ("euler", "ours")):
        graph = base(sampling, batch=2, width=160)
        add_guiders(graph)
        advanced(graph, "stock", ["euler", 0], ["guider", 0])
        advanced(graph, "mine", [sampler, 0], [guider, 0])
        # The host starts from noise at a slightly larger scale at the top level, so compare from the second level down.
        graph["split"] = node("SplitSigmas", sigmas=["sigmas", 0], step=1)
        for name in ("stock", "mine"):
            graph[name]["inputs"]["sigmas"] = ["split", 1]
        graph["c"] = node("ProbeCompare", one=["stock", 0], other=["mine", 0])
        found = report(host.run(graph))
        assert found["shape"] == [2, 4, 16, 20]
        assert found["difference"] <= 1e-4 * max(1.0, found["largest"]), (sampler, guider, found)


def test_guider_keeps_the_users_cfg_patches(host: Any, report: Any) -> None:
    differences = []
    for multiplier in (0.0, 0.9):
        graph = base()
        graph["m"] = node("RescaleCFG", model=["1", 0], multiplier=multiplier)
        add_guiders(graph)
        advanced(graph, "stock", ["euler", 0], ["guider", 0])
        graph["stock"]["inputs"]["guider"] = ["guider", 0]
        graph["plain"] = {**graph["stock"], "inputs": {**graph["stock"]["inputs"], "guider": ["unpatched", 0]}}
        graph["unpatched"] = {**graph["guider"], "inputs": {**graph["guider"]["inputs"], "model": ["1", 0]}}
        advanced(graph, "mine", ["euler", 0], ["ours", 0])
        for other in ("stock", "plain"):
            graph["c"] = node("ProbeCompare", one=["mine", 0], other=[other, 0])
            differences.append(report(host.run(graph))["difference"])
    # At 0 the patch changes nothing; at 0.9 ours follows the patched stock guider and differs from the unpatched one.
    assert max(differences[:3]) < 1e-3 < differences[3]


def test_a_prompt_prepared_during_sampling_is_the_same(host: Any, report: Any) -> None:
    graph = base()
    graph["r"] = node("ProbeLive", model=["1", 0], positive=["p", 0], negative=["n", 0], latent=["l", 0])
    assert report(host.run(graph))["difference"] < 1e-5


def test_lora_hooks_on_a_prompt_hold_for_its_rows(host: Any, host_models: pathlib.Path, report: Any) -> None:
    up, down = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4, 64) * 0.3
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"
    save_file(
        {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, host_models / "loras" / "hook.safetensors"
    )
    hook = node("CreateHookLoraModelOnly", lora_name="hook.safetensors", strength_model=2.0)
    hooked = node("ConditioningSetProperties", cond_NEW=["p", 0], hooks=["h", 0], strength=1.0, set_cond_area="default")
    found = report(host.run(rows_graph(h=hook, c=hooked)))
    assert found["difference"] < 1e-4 < found["effect"]
    # The hook itself shows: the same rows without it come out otherwise.
    graph = {**base(), "h": hook, "c": hooked}
    add_guiders(graph)
    graph["ours"]["inputs"]["positive"] = graph["guider"]["inputs"]["positive"] = ["c", 0]
    advanced(graph, "stock", ["euler", 0], ["guider", 0])
    advanced(graph, "mine", ["euler", 0], ["ours", 0])
    graph["cmp"] = node("ProbeCompare", one=["stock", 0], other=["mine", 0])
    assert report(host.run(graph))["difference"] < 1e-3


def test_denoised_output_is_there(host: Any, report: Any) -> None:
    graph = base()
    add_guiders(graph)
    advanced(graph, "mine", ["sampler", 0], ["guider", 0])
    graph["c"] = node("ProbeCompare", one=["mine", 0], other=["mine", 1])
    assert report(host.run(graph))["difference"] == 0


def test_progress_and_previews_of_our_sampler(host: Any) -> None:
    graph = base()
    add_guiders(graph)
    graph["sampler"]["inputs"]["sleep"] = 0.06
    advanced(graph, "mine", ["sampler", 0], ["guider", 0])
    graph["d"] = node("ProbeDump", latent=["mine", 0], model=["1", 0])
    result = host.run(graph)
    assert result.ok, result.explain()
    assert result.progress("mine")[-1] == (8, 8)
    assert len(result.previews) >= 4
    assert result.previews[0].data["image"][:2] == b"\xff\xd8"


def test_interrupt_ends_within_one_network_call(host: Any, report: Any) -> None:
    graph = base()
    add_guiders(graph)
    graph["sampler"]["inputs"]["sleep"] = 0.3
    advanced(graph, "mine", ["sampler", 0], ["guider", 0])
    graph["d"] = node("ProbeDump", latent=["mine", 0], model=["1", 0])
    run = host.submit(graph)
    run.wait_for(lambda e: e.type == "progress" and e.data["value"] == 2, timeout=120)
    run.interrupt()
    result = run.wait()
    assert result.status == "interrupted"
    assert result.progress("mine")[-1][0] <= 4  # of 8: the step that ran, and one for the message to arrive
    test_rows_of_two_prompts_are_one_call(host, report)


def test_noise_mask_warns_when_the_sampler_replaces(host: Any) -> None:
    graph = base()
    add_guiders(graph)
    graph["sampler"]["inputs"]["replaces"] = True
    graph["mask"] = node("SolidMask", value=1.0, width=128, height=128)
    graph["ml"] = node("SetLatentNoiseMask", samples=["l", 0], mask=["mask", 0])
    advanced(graph, "mine", ["sampler", 0], ["guider", 0], latent="ml")
    graph["d"] = node("ProbeDump", latent=["mine", 0], model=["1", 0])
    result = host.run(graph)
    assert result.ok, result.explain()
    assert "noise mask is ignored" in host.log()
    assert any("noise mask is ignored" in text for _, text in result.warnings)


def test_an_error_inside_leaves_the_host_usable(host: Any, report: Any) -> None:
    graph = base()
    add_guiders(graph)
    graph["sampler"]["inputs"]["fail"] = True
    advanced(graph, "mine", ["sampler", 0], ["guider", 0])
    graph["d"] = node("ProbeDump", latent=["mine", 0], model=["1", 0])
    result = host.run(graph)
    assert result.status == "error"
    assert result.error["exception_message"].startswith("Expected `probe` to work")
    test_rows_of_two_prompts_are_one_call(host, report)
