"""A changed input of any node is computed again, and an equal one is not: every node and every input, found by themselves.

Network calls are counted, never seconds. The MODEL of each run is new to the host's cache, so that all that answers is ours.
"""

from __future__ import annotations

import itertools
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from graph import all_inputs, default_of, is_widget, node

Graph = dict[str, Any]
RUNS = itertools.count(time.time_ns() // 10**6)  # a host may have answered other runs
SIZE = 96
POCKET = pathlib.Path(__file__).resolve().parents[2] / "pocket" / "vae"

# Only the host keeps what these return, and it compares every input. The module of a node that is listed here wrongly is found
# in tests/nodes/test_kept.py; those that sample are run twice below.
KEPT_BY_THE_HOST = {
    "SlipstreamAddSchedule", "SlipstreamAppearance", "SlipstreamApplyCallReuse", "SlipstreamApplyLayerMask", "SlipstreamBeforeAfter",
    "SlipstreamBlendPrompts",
    "SlipstreamDoctor", "SlipstreamDrag", "SlipstreamEditPreview", "SlipstreamEmptyLatent",
    "SlipstreamExampleClip", "SlipstreamExamplePhoto",
    "SlipstreamInfluenceImages",
    "SlipstreamLiveStream",
    "SlipstreamLatentFill", "SlipstreamLoadModel", "SlipstreamLoadSchedule", "SlipstreamMaskSchedule", "SlipstreamMove",
    "SlipstreamPaste", "SlipstreamRemove", "SlipstreamReferenceObjective", "SlipstreamResampleSchedule", "SlipstreamSaveSchedule",
    "SlipstreamSeedCanvas", "SlipstreamSelfObjective", "SlipstreamSimilarityFilter", "SlipstreamStretchMap",
}  # fmt: skip


@dataclass(frozen=True)
class Same:
    """An input that does not change what the node keeps, and why."""

    why: str


@dataclass(frozen=True)
class Kept:
    """A node that keeps results: the graph around it (the node is "it"), the output that needs it, and other values of each input.

    A change maps "it.input" to a value, and the name of a node to that node.
    """

    inputs: dict[str, Any]
    end: list[Any]
    graph: Graph = field(default_factory=dict)
    changes: dict[str, Graph | Same] = field(default_factory=dict)


def base(run: int, fresh: int) -> Graph:
    prompts = {
        "p": "a large red circle on a blue background",
        "p2": "a small yellow star",
        "n": "",
        "n2": "a green square",
    }
    return {
        "load": node("SlipstreamLoadModel", model="pocket"),
        "lcm": node("SlipstreamLoadModel", model="pocket-lcm"),
        "m": node("ProbeCount", model=["load", 0], name="identity", run=run),
        "m2": node("ProbeCount", model=["lcm", 0], name="identity", run=run),
        **{name: node("CLIPTextEncode", clip=["load", 1], text=text) for name, text in prompts.items()},
        "i0": node("EmptyImage", width=SIZE, height=SIZE, batch_size=1, color=fresh % 0x1000000),
        "square": node("EmptyImage", width=24, height=24, batch_size=1, color=0xE6195A),
        "i": node("ImageCompositeMasked", destination=["i0", 0], source=["square", 0], x=16, y=16, resize_source=False),
        "i2": node("ImageInvert", image=["i", 0]),
        "big": node("ImageScale", image=["i", 0], upscale_method="bilinear", width=128, height=128, crop="disabled"),
        "vae2": node("ProbeFolderVae", folder=str(POCKET), scale=0.5),
        "k0": node("SolidMask", value=0.0, width=SIZE, height=SIZE),
        "k1": node("SolidMask", value=1.0, width=24, height=24),
        "k": node("MaskComposite", destination=["k0", 0], source=["k1", 0], x=16, y=16, operation="add"),
        "k2": node("MaskComposite", destination=["k0", 0], source=["k1", 0], x=24, y=16, operation="add"),
        "l": node("VAEEncode", pixels=["i", 0], vae=["load", 2]),
        "l2": node("VAEEncode", pixels=["i2", 0], vae=["load", 2]),
        "noise": node("RandomNoise", noise_seed=1),
        "s": node("KSamplerSelect", sampler_name="euler"),
        "s2": node("KSamplerSelect", sampler_name="heun"),
        "sigmas": node("BasicScheduler", model=["m", 0], scheduler="normal", steps=5, denoise=1.0),
        "few": node("BasicScheduler", model=["m", 0], scheduler="normal", steps=2, denoise=1.0),
        "sigmas2": node("BasicScheduler", model=["m", 0], scheduler="karras", steps=5, denoise=1.0),
        "g": node("CFGGuider", model=["m", 0], positive=["p", 0], negative=["n", 0], cfg=3.0),
        "control": node("ProbeTinyControlNet", model=["load", 0]),
    }  # fmt: skip


# ------------------------------------------------------------------------------------- what a MODEL and a CONDITIONING can hold


def patch(type: str, **inputs: Any) -> Graph:
    return {"x": node(type, model=["m", 0], **inputs)}


def patches(lora: str) -> dict[str, Graph]:
    """Return graphs that make a patched MODEL "x"."""
    return {
        "FreeU": patch("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
        "FreeU, other strength": patch("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.3),
        "PAG": patch("PerturbedAttentionGuidance", scale=3.0),
        "PAG, other scale": patch("PerturbedAttentionGuidance", scale=4.0),
        "ToMe": patch("TomePatchModel", ratio=0.3),
        "ToMe, other ratio": patch("TomePatchModel", ratio=0.5),
        "CFGZeroStar": patch("CFGZeroStar"),
        "RescaleCFG": patch("RescaleCFG", multiplier=0.7),
        "RescaleCFG, other multiplier": patch("RescaleCFG", multiplier=0.8),
        "v-prediction": patch("ModelSamplingDiscrete", sampling="v_prediction", zsnr=False),
        "v-prediction, zsnr": patch("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True),
        "LoRA": patch("LoraLoaderModelOnly", lora_name=lora, strength_model=1.0),
        "LoRA, weaker": patch("LoraLoaderModelOnly", lora_name=lora, strength_model=0.5),
        "image prompt": patch("ProbeImagePrompt", weight=1.0, by_level=False, start=0.0, end=1.0),
        "image prompt, weaker": patch("ProbeImagePrompt", weight=0.5, by_level=False, start=0.0, end=1.0),
        "image prompt, shorter": patch("ProbeImagePrompt", weight=1.0, by_level=False, start=0.0, end=0.5),
        "function": patch("ProbePatch", kind="function"),
        "wrapper": patch("ProbePatch", kind="call"),
    }  # fmt: skip


def conditionings(lora: str) -> dict[str, Graph]:
    """Return graphs that make a CONDITIONING "c" which covers the whole image at every step."""

    def placed(type: str, **inputs: Any) -> Graph:
        both = node("ConditioningCombine", conditioning_1=["p", 0], conditioning_2=["part", 0])
        return {"part": node(type, conditioning=["p2", 0], **inputs), "c": both}

    def area(x: int, strength: float) -> Graph:
        return placed("ConditioningSetArea", width=64, height=SIZE, x=x, y=0, strength=strength)

    def mask(name: str, strength: float, bounds: str) -> Graph:
        return placed("ConditioningSetMask", mask=[name, 0], strength=strength, set_cond_area=bounds)

    def span(end: float) -> Graph:
        return placed("ConditioningSetTimestepRange", start=0.0, end=end)

    def control(image: str, strength: float, end: float) -> Graph:
        inputs = {"image": [image, 0], "strength": strength, "start_percent": 0.0, "end_percent": end}
        return {
            "c": node(
                "ControlNetApplyAdvanced", positive=["p", 0], negative=["n", 0], control_net=["control", 0], **inputs
            )
        }

    def hook(strength: float, **more: Any) -> Graph:
        made = node("CreateHookLoraModelOnly", lora_name=lora, strength_model=strength)
        keyframe = node("CreateHookKeyframe", strength_mult=0.5, start_percent=0.5)
        scheduled = node("SetHookKeyframes", hooks=["hook", 0], hook_kf=["keyframe", 0])
        inputs = {"cond_NEW": ["p", 0], "hooks": ["hook", 0], "strength": 1.0, "set_cond_area": "default", **more}
        return {
            "hook": made,
            "keyframe": keyframe,
            "later": scheduled,
            "c": node("ConditioningSetProperties", **inputs),
        }

    def average(share: float) -> Graph:
        inputs = {"conditioning_to": ["p", 0], "conditioning_from": ["p2", 0], "conditioning_to_strength": share}
        return {"c": node("ConditioningAverage", **inputs)}

    return {
        "another prompt": {"c": node("CLIPTextEncode", clip=["load", 1], text="a small yellow star on grey")},
        "combined": {"c": node("ConditioningCombine", conditioning_1=["p", 0], conditioning_2=["p2", 0])},
        "joined": {"c": node("ConditioningConcat", conditioning_to=["p", 0], conditioning_from=["p2", 0])},
        "average": average(0.5), "average, other weight": average(0.6),
        "area": area(0, 1.0), "area, elsewhere": area(32, 1.0), "area, weaker": area(0, 0.5),
        "mask": mask("k", 1.0, "default"), "mask, elsewhere": mask("k2", 1.0, "default"), "mask, weaker": mask("k", 0.5, "default"),
        "mask, its bounds": mask("k", 1.0, "mask bounds"),
        "range": span(0.5), "range, longer": span(0.7),
        "ControlNet": control("i", 1.0, 1.0), "ControlNet, other image": control("i2", 1.0, 1.0),
        "ControlNet, weaker": control("i", 0.5, 1.0), "ControlNet, shorter": control("i", 1.0, 0.6),
        "GLIGEN": {"c": node("ProbeGligen", conditioning=["p", 0], box=1)},
        "GLIGEN, other box": {"c": node("ProbeGligen", conditioning=["p", 0], box=9)},
        "hook": hook(1.0), "hook, weaker": hook(0.5), "hook, scheduled": hook(1.0, hooks=["later", 0]),
    }  # fmt: skip


def guiders(lora: str) -> dict[str, Graph]:
    """Return graphs that replace the GUIDER "g"."""

    def cfg(**inputs: Any) -> Graph:
        return {
            "g": node(
                "CFGGuider", **{"model": ["m", 0], "positive": ["p", 0], "negative": ["n", 0], "cfg": 3.0, **inputs}
            )
        }

    def rcfg(guidance: str, scale: float = 3.0, delta: float = 0.5) -> Graph:
        prompts = {"positive": ["p", 0], "negative": ["n", 0]}
        inputs = {"guidance": guidance, "guidance_scale": scale, "delta": delta}
        return {"g": node("SlipstreamRCFGGuider", model=["m", 0], **prompts, **inputs)}

    def dual(scale: float, style: str) -> Graph:
        prompts = {"cond1": ["p", 0], "cond2": ["p2", 0], "negative": ["n", 0]}
        inputs = {"cfg_conds": scale, "cfg_cond2_negative": 4.0, "style": style}
        return {"g": node("DualCFGGuider", model=["m", 0], **prompts, **inputs)}

    return {
        "another negative": cfg(negative=["n2", 0]), "another cfg": cfg(cfg=4.0), "another model": cfg(model=["m2", 0]),
        "RCFG onetime": rcfg("onetime"), "RCFG onetime, delta": rcfg("onetime", delta=1.0), "RCFG full": rcfg("full"),
        "RCFG none": rcfg("none"), "RCFG onetime, scale": rcfg("onetime", 2.0),
        "DualCFG": dual(8.0, "regular"), "DualCFG, scale": dual(3.0, "regular"), "DualCFG, nested": dual(8.0, "nested"),
        **{name: {**graph, **cfg(model=["x", 0])} for name, graph in patches(lora).items()},
        **{name: {**graph, **cfg(positive=["c", 0])} for name, graph in conditionings(lora).items()},
    }  # fmt: skip


def of_it(graphs: dict[str, Graph], input: str, name: str) -> dict[str, Graph]:
    return {kind: {**graph, f"it.{input}": [name, 0]} for kind, graph in graphs.items()}


# ------------------------------------------------------------------------------------------------------------------ the nodes

FREE = Same("each run samples with it")
SAMPLED = node(
    "SamplerCustomAdvanced",
    noise=["noise", 0],
    guider=["g", 0],
    sampler=["it", 0],
    sigmas=["sigmas", 0],
    latent_image=["l", 0],
)
INVERSION = node(
    "SlipstreamInvert",
    model=["m", 0],
    vae=["load", 2],
    image=["i", 0],
    positive=["p", 0],
    steps=3,
    megapixels=1.0,
    memory="row",
    mode="fine",
)
LONGER = {**INVERSION, "inputs": {**INVERSION["inputs"], "steps": 6}}
MOVE = node("SlipstreamMove", mask=["k", 0], dx=16.0, dy=0.0, scale=1.0, about="object")
OBJECTIVE = {"vae": ["load", 2], "features": "pixels", "distance": "paired"}

KEPT: dict[str, Kept] = {
    "SlipstreamInvert": Kept(
        INVERSION["inputs"], ["it", 0],
        changes={
            "model": {"it.model": ["m2", 0]}, "vae": {"it.vae": ["vae2", 0]}, "image": {"it.image": ["i2", 0]},
            "positive": {"it.positive": ["p2", 0]}, "steps": {"it.steps": 4},
            "megapixels": {"it.image": ["big", 0], "it.megapixels": 0.01}, "memory": {"it.memory": "bank"},
            "mode": Same("draft calls nothing, so there is nothing to keep"),
        },
    ),
    "SlipstreamCowSampler": Kept(
        {"keep": ["k", 0], "start": "canvas", "inversion_cfg": 3.0, "cycles": 1, "low": 0.3, "high": 0.6},
        ["sample", 0], {"sample": SAMPLED},
        {
            "inversion_cfg": {"it.inversion_cfg": 2.0}, "high": {"it.high": 0.75}, "start": {"it.start": "noise"},
            "range_unit": {"it.range_unit": "noise level", "it.low": 0.0, "it.high": 0.05},
            **dict.fromkeys(("keep", "cycles", "preserve", "low", "eta", "final_eta", "noise_limit", "repel"), FREE),
            **dict.fromkeys(("suppress", "enhance", "follow", "vae", "photo"), FREE),
        },
    ),
    "SlipstreamEditSampler": Kept(
        {"model": ["m", 0], "vae": ["load", 2], "inversion": ["inversion", 0], "tasks": ["move", 0], "positive": ["p", 0],
         "negative": ["n", 0], "guidance": 0.1},
        ["it", 0], {"inversion": LONGER, "move": MOVE},
        {
            "model": {"m": node("ProbeCount", model=["lcm", 0], name="identity", run=0)},
            "inversion": {"inversion": {**LONGER, "inputs": {**LONGER["inputs"], "image": ["i2", 0]}}},
            **dict.fromkeys(
                ("vae", "tasks", "positive", "negative", "seed", "cfg", "guidance", "hold_object", "hold_fill", "noise", "feather",
                 "low_memory"), FREE,
            ),
        },
    ),
    "SlipstreamSearchSchedule": Kept(
        {"guider": ["g", 0], "sampler": ["s", 0], "latent_image": ["l", 0], "steps": 1, "evaluations": 1, "pairs": 2,
         "sigmas": ["few", 0]},
        ["it", 0],
        changes={
            "guider": {"g": node("BasicGuider", model=["m", 0], conditioning=["p", 0])},
            "sampler": {"it.sampler": ["s2", 0]},
            "latent_image": {"l": node("EmptyLatentImage", width=48, height=SIZE, batch_size=1)},
            "steps": {"it.steps": 2}, "evaluations": Same("a budget"),
            "minutes": Same("a budget"), "objective": {"it.objective": "same look as many steps"}, "pairs": {"it.pairs": 3},
            "seed": {"it.seed": 32}, "strategy": {"it.strategy": "coordinate"},
            "layers": {"it.layers": True}, "batch": Same("how many are sampled together does not change any"),
            "custom_objective": {"o": node("SlipstreamSelfObjective", **OBJECTIVE), "it.custom_objective": ["o", 0]},
            "clip": {"it.clip": ["load", 1], "it.prompts": "a small yellow star"},
            "prompts": {"it.clip": ["load", 1], "it.prompts": "a small yellow star\na green square"},
            "search_first_level": {"it.search_first_level": True}, "computed": {"it.steps": 3, "it.computed": 2},
            "fit": {"it.steps": 3, "it.computed": 2, "it.fit": False},
            "sigmas": {"it.sigmas": ["sigmas2", 0]},
            "schedules": Same("where a search begins changes which schedules are tried, not what one comes to"),
        },
    ),
}  # fmt: skip
# These sample, and keep nothing: run twice, they sample twice.
SAMPLING: dict[str, Kept] = {
    "SlipstreamStreamFrames": Kept(
        {"model": ["m", 0], "positive": ["p", 0], "negative": ["n", 0], "vae": ["load", 2], "frames": ["i", 0]}, ["it", 0]
    ),
    "SlipstreamHarmonise": Kept(
        {"model": ["m", 0], "vae": ["load", 2], "image": ["i", 0], "mask": ["k", 0], "positive": ["p", 0], "negative": ["n", 0]},
        ["it", 0],
    ),
    "SlipstreamMaskedRegenerate": Kept(
        {"model": ["m", 0], "positive": ["p", 0], "negative": ["n", 0], "latent": ["l", 0], "steps": 1, "rounds": 1}, ["it", 0]
    ),
    "SlipstreamCompareSchedules": Kept(
        {"guider": ["g", 0], "sampler": ["s", 0], "latent_image": ["l", 0], "sigmas": ["sigmas", 0], "pairs": 2, "repeats": 1},
        ["it", 0],
    ),
    "SlipstreamInfluenceProfile": Kept(
        {"noise": ["noise", 0], "guider": ["g", 0], "sampler": ["s", 0], "sigmas": ["sigmas", 0], "latent": ["l", 0], "mask": ["k", 0],
         "other_latent": ["l2", 0]},
        ["it", 0],
    ),
}  # fmt: skip
RCFG = {"model": ["m", 0], "positive": ["p", 0], "negative": ["n", 0], "guidance": "onetime"}
SPLIT = {
    "halves": node("SplitSigmas", sigmas=["sigmas", 0], step=2), "none": node("DisableNoise"),
    "g1": node("SlipstreamRCFGGuider", **RCFG, guidance_scale=1.4, delta=0.5),
    "one": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["g1", 0], sampler=["s", 0], sigmas=["halves", 0],
                latent_image=["l", 0]),
    "two": node("SamplerCustomAdvanced", noise=["none", 0], guider=["it", 0], sampler=["s", 0], sigmas=["halves", 1],
                latent_image=["one", 0]),
}  # fmt: skip
# Tested below by other means.
OTHERS: dict[str, Kept] = {
    "SlipstreamRCFGGuider": Kept(
        RCFG, ["two", 0], SPLIT,
        {"model": {"it.model": ["m2", 0]}, "negative": {"it.negative": ["n2", 0]}, "guidance": {"it.guidance": "full"},
         **dict.fromkeys(("positive", "guidance_scale", "delta"), Same("the anchor is the negative prompt's estimate"))},
    ),
    "SlipstreamTrainLatentFill": Kept(
        {"model": ["m", 0], "vae": ["load", 2], "images": ["i", 0], "steps": 2, "batch": 1, "width": 64,
         "height": 64, "patch": 2},
        ["it", 0],
        changes={
            "vae": {"it.vae": ["vae2", 0]}, "images": {"it.images": ["i2", 0]}, "steps": {"it.steps": 3}, "batch": {"it.batch": 2},
            "learning_rate": {"it.learning_rate": 0.01}, "size": {"it.size": "medium"}, "width": {"it.width": 80},
            "height": {"it.height": 80}, "patch": {"it.patch": 1}, "ratio": {"it.ratio": "cosine"}, "masks": {"it.masks": "half"},
            "mirror": {"it.mirror": False}, "seed": {"it.seed": 5}, "name": {"it.name": "another identity"}, "resume": {"it.resume": False},
            "model": Same("only the kind of its latents counts"), "folder": Same("images are wired"),
        },
    ),
}  # fmt: skip

Calls = Callable[[str, Graph], int]


@pytest.fixture
def graph_of(object_info: dict[str, Any]) -> Callable[[str, Graph], Graph]:
    """Return a function that makes the prompt of a node with changes, with its network calls as "calls".

    In each test the image and the seed are new, so that nothing of an earlier test answers.
    """
    fresh = next(RUNS)

    def make(name: str, changes: Graph) -> Graph:
        kept = (KEPT | SAMPLING | OTHERS)[name]
        specs = all_inputs(object_info[name])
        inputs = {k: default_of(spec) for k, spec in specs.items() if is_widget(spec)} | kept.inputs
        inputs |= {"seed": fresh} if "seed" in specs else {}
        inputs |= {"name": f"identity {fresh}"} if "name" in specs else {}
        inputs |= {k.removeprefix("it."): v for k, v in changes.items() if k.startswith("it.")}
        number = next(RUNS)
        graph = {**base(number, fresh), **kept.graph, "it": node(name, **inputs)}
        graph |= {k: v for k, v in changes.items() if not k.startswith("it.")}
        for each in graph.values():
            if each["class_type"] in ("ProbeCount", "ProbeEdited"):
                each["inputs"]["run"] = number
        graph["calls"] = node("ProbeCounted", after=kept.end, name="identity")
        return graph

    return make


@pytest.fixture
def calls(host: Any, graph_of: Callable[[str, Graph], Graph], report: Callable[[Any], Any]) -> Calls:
    """Return a function that runs a node with changes and counts the rows of its network calls."""

    def run(name: str, changes: Graph) -> int:
        return sum(report(host.run(graph_of(name, changes))))

    return run


def test_every_node_and_every_input_is_known(object_info: dict[str, Any]) -> None:
    ours = {name for name in object_info if name.startswith("Slipstream")}
    listed = [*KEPT_BY_THE_HOST, *KEPT, *SAMPLING, *OTHERS]
    assert sorted(ours) == sorted(listed), "say in this file who keeps the results of a new node"
    for name, kept in (KEPT | OTHERS).items():
        assert set(all_inputs(object_info[name])) == set(kept.changes), f"say what a changed input of {name} does"


@pytest.mark.parametrize("name", SAMPLING)
def test_a_node_that_keeps_nothing_samples_in_every_run(calls: Calls, name: str) -> None:
    first = calls(name, {})
    assert first > 0
    assert calls(name, {}) == first


@pytest.mark.parametrize("name", KEPT)
def test_every_input_counts(calls: Calls, name: str) -> None:
    changes = {input: change for input, change in KEPT[name].changes.items() if not isinstance(change, Same)}
    assert not stale(calls, name, changes)


SAMPLED_ANYWAY = {"SlipstreamCowSampler", "SlipstreamEditSampler"}  # in every run, beside what they keep


def stale(calls: Calls, name: str, changes: dict[str, Graph]) -> list[str]:
    """Return the changes in which a node takes what it kept of another run."""
    first, kept = calls(name, {}), calls(name, {})
    assert first > kept, "nothing is kept"
    anew = {change: calls(name, graph) for change, graph in changes.items()}
    # A search samples its winner once more to count its calls, in as many steps as it has.
    again = {change: calls(name, graph) if name in SAMPLED_ANYWAY else 2 * kept for change, graph in changes.items()}
    found = [change for change in changes if anew[change] <= again[change]]
    assert calls(name, {}) == kept
    return found


def cow_guiders(lora: str) -> dict[str, Graph]:
    """Return the guiders in which Cow Sampler inverts in another way: it does so at a cfg of its own."""
    return {k: v for k, v in guiders(lora).items() if not k.startswith(("another cfg", "RCFG", "DualCFG"))}


def objectives(lora: str) -> dict[str, Graph]:
    """Return graphs that make an objective "o"."""

    def own(**changes: Any) -> Graph:
        return {"o": node("SlipstreamSelfObjective", **{**OBJECTIVE, **changes})}

    def reference(other: str, features: str = "pixels") -> Graph:
        images = node("ImageBatch", image1=["i", 0], image2=[other, 0])
        inputs = {
            "vae": ["load", 2],
            "features": features,
            "distance": "frechet",
            "folder": "",
            "images": ["images", 0],
        }
        return {"images": images, "o": node("SlipstreamReferenceObjective", **inputs)}

    return {
        "own": own(), "own, another VAE": own(vae=["vae2", 0]), "own, latent": own(features="latent"), "own, mmd": own(distance="mmd"),
        "references": reference("i0"), "references, others": reference("i2"), "references, latent": reference("i0", "latent"),
    }  # fmt: skip


WITHIN: dict[str, tuple[str, Callable[[str], dict[str, Graph]]]] = {
    "MODEL of Invert": ("SlipstreamInvert", lambda lora: of_it(patches(lora), "model", "x")),
    "CONDITIONING of Invert": ("SlipstreamInvert", lambda lora: of_it(conditionings(lora), "positive", "c")),
    "GUIDER of Cow Sampler": ("SlipstreamCowSampler", cow_guiders),
    "objective of Search Schedule": (
        "SlipstreamSearchSchedule",
        lambda lora: of_it(objectives(lora), "custom_objective", "o"),
    ),
    "GUIDER of Search Schedule": ("SlipstreamSearchSchedule", guiders),
}


@pytest.mark.parametrize("where", WITHIN)
def test_every_part_within_counts(calls: Calls, lora: str, where: str) -> None:
    name, changes = WITHIN[where]
    assert not stale(calls, name, changes(lora))


def test_a_part_of_a_sampling_takes_an_anchor_of_its_own_model_and_negative_prompt_only(calls: Calls) -> None:
    kept = OTHERS["SlipstreamRCFGGuider"]
    taken = calls("SlipstreamRCFGGuider", {})
    assert calls("SlipstreamRCFGGuider", {"it.positive": ["p2", 0], "it.delta": 1.0, "it.guidance_scale": 2.0}) == taken
    for change in kept.changes.values():
        assert isinstance(change, Same) or calls("SlipstreamRCFGGuider", change) > taken


def test_a_training_is_taken_up_with_equal_inputs_only(host: Any, graph_of: Callable[[str, Graph], Graph]) -> None:
    """With another value of an input it is refused, or trained from the start."""

    def steps(changes: Graph) -> int | str:
        result = host.run(graph_of("SlipstreamTrainLatentFill", changes))
        return len(result.progress("it")) if result.ok else result.explain()

    assert steps({}) == 2
    assert steps({}) == 0
    for input, change in OTHERS["SlipstreamTrainLatentFill"].changes.items():
        found = 0 if isinstance(change, Same) else steps(change)
        if isinstance(found, str):
            assert "begun with these settings and images" in found, input
        else:
            assert (found > 0) != isinstance(change, Same), f"{input}: a stale fill"


COUNTED = node("ProbeCount", model=["edited", 0], name="identity")


def test_weights_that_are_edited_in_place_count(calls: Calls) -> None:
    for name in ("SlipstreamInvert", "SlipstreamSearchSchedule"):
        calls(name, {})
        kept = calls(name, {})
        twice, half = ({"edited": node("ProbeEdited", whose=["load", 0], factor=f), "m": COUNTED} for f in (2.0, 0.5))
        try:
            edited = calls(name, twice)
        finally:
            again = calls(name, half)
        assert edited > kept
        assert again == kept


def test_free_forgets_what_is_kept(host: Any, calls: Calls) -> None:
    first = calls("SlipstreamInvert", {})
    assert first > 0
    assert calls("SlipstreamInvert", {}) == 0
    host.free(unload_models=True, free_memory=False)
    assert calls("SlipstreamInvert", {}) == 0
    host.free()
    assert calls("SlipstreamInvert", {}) == first


@pytest.mark.parametrize("name", ["SlipstreamInvert", "SlipstreamCowSampler", "SlipstreamSearchSchedule"])
def test_one_run_of_nan_is_not_kept(
    host: Any, graph_of: Callable[[str, Graph], Graph], calls: Calls, name: str
) -> None:
    spoiled = graph_of(name, {"m": node("ProbeCount", model=["load", 0], name="identity", spoiled=True)})
    host.run(spoiled)  # an error, or a result that is not finite
    first = calls(name, {})
    assert first > calls(name, {}), "the sound run computed everything, and is kept"
