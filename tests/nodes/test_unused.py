"""Every input that can be without effect warns by its name; nothing warns at the defaults; new inputs cannot forget."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import slipstream
import torch
from slipstream.core.identity import Identity
from slipstream.edit import Appearance, EditConfig, Move
from slipstream.nodes.edit import HostInversion
from slipstream.nodes.unused import unused
from slipstream_tests.host import graph

NODES: dict[str, type[Any]] = slipstream.NODE_CLASS_MAPPINGS
TITLES: dict[str, str] = slipstream.NODE_DISPLAY_NAME_MAPPINGS
WIRED = object()  # any connected socket
FRAMES, ONE = torch.zeros(3, 8, 8, 3), torch.zeros(1, 8, 8, 3)
MASK = torch.ones(8, 8)
MOVE = [Move(MASK, dx=2)]
# What Invert gives in mode draft.
DRAFTED = HostInversion(None, [], Identity(""), EditConfig(mode="draft"))
APPEARANCE = [Appearance(MASK, None, MASK)]  # type: ignore[arg-type]

# (node, settings beside the defaults, the input that has no effect)
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("SeedCanvas", {"colour": "#ff0000", "background": "noise"}, "colour"),
    ("SeedCanvas", {"colour": "#ff0000", "background": "picture", "picture": WIRED}, "colour"),
    ("SeedCanvas", {"picture": WIRED}, "picture"),
    ("SeedCanvas", {"invert_keep": True}, "invert_keep"),
    ("SeedCanvas", {"model": WIRED, "width": 64}, "model"),
    ("CowSampler", {"repel": 2.0}, "repel"),
    ("CowSampler", {"preserve": 0.5, "follow": "between"}, "preserve"),
    ("CowSampler", {"repel": 0.0, "suppress": WIRED}, "suppress"),
    ("CowSampler", {"vae": WIRED}, "vae"),
    ("CowSampler", {"photo": ONE}, "photo"),
    ("CowSampler", {"repel": 0.0, "enhance": WIRED}, "enhance"),
    ("RCFGGuider", {"guidance": "none", "guidance_scale": 2.0}, "guidance_scale"),
    ("RCFGGuider", {"guidance": "full", "guidance_scale": 1.0}, "guidance"),
    ("RCFGGuider", {"guidance": "self", "guidance_scale": 1.0}, "guidance"),
    ("RCFGGuider", {"guidance": "none", "delta": 0.3}, "delta"),
    ("RCFGGuider", {"guidance": "full", "delta": 0.3}, "delta"),
    ("RCFGGuider", {"guidance_scale": 1.0, "delta": 0.3}, "delta"),
    ("StreamFrames", {"sigmas": torch.tensor([2.0, 1.0, 0.0]), "strength": 0.7}, "strength"),
    ("StreamFrames", {"sigmas": torch.tensor([2.0, 1.0, 0.0]), "steps": 4}, "steps"),
    ("StreamFrames", {"sigmas": torch.tensor([2.0, 1.0, 0.0]), "strength_curve": "0: 0.3"}, "strength_curve"),
    ("StreamFrames", {"strength_curve": "0: 0.3, 2: 0.5", "strength": 0.7}, "strength"),
    ("StreamFrames", {"frames": ONE, "strength_curve": "0: 0.3"}, "strength_curve"),
    ("StreamFrames", {"guidance": "none", "guidance_scale": 2.0}, "guidance_scale"),
    ("StreamFrames", {"guidance": "full", "guidance_scale": 1.0}, "guidance"),
    ("StreamFrames", {"guidance": "onetime", "guidance_scale": 1.0}, "guidance"),
    ("StreamFrames", {"guidance": "none", "delta": 0.5}, "delta"),
    ("StreamFrames", {"guidance": "full", "delta": 0.5}, "delta"),
    ("StreamFrames", {"guidance_scale": 1.0, "delta": 0.5}, "delta"),
    *(("StreamFrames", {"steps": 1, "renoise": kind}, "renoise") for kind in ("fresh", "ddim", "none")),
    ("StreamFrames", {"sigmas": torch.tensor([2.0, 0.0]), "renoise": "fresh"}, "renoise"),
    ("StreamFrames", {"steps": 1, "cross_frame": True}, "cross_frame"),
    ("StreamFrames", {"sigmas": torch.tensor([2.0]), "cross_frame": True}, "cross_frame"),
    ("StreamFrames", {"frames": ONE, "cross_frame": True}, "cross_frame"),
    ("StreamFrames", {"frames": ONE, "feedback": 0.5}, "feedback"),
    ("StreamFrames", {"frames": ONE, "motion": 0.5}, "motion"),
    ("StreamFrames", {"frames": ONE, "priority": "throughput"}, "priority"),
    ("StreamFrames", {"steps": 9, "priority": "throughput"}, "priority"),
    ("StreamFrames", {"priority": "2"}, "priority"),
    ("StreamFrames", {"cross_frame": True, "acceleration": "graph"}, "acceleration"),
    ("LiveStream", {"prompt": "x"}, "prompt"),
    ("LiveStream", {"negative_prompt": "x"}, "negative_prompt"),
    ("LiveStream", {"t_index_list": "32,45", "strength": 0.7}, "strength"),
    ("LiveStream", {"t_index_list": "32,45", "steps": 4}, "steps"),
    ("LiveStream", {"guidance": "none", "guidance_scale": 2.0}, "guidance_scale"),
    ("LiveStream", {"guidance": "full", "guidance_scale": 1.0}, "guidance"),
    ("LiveStream", {"guidance": "none", "delta": 0.5}, "delta"),
    ("LiveStream", {"guidance": "full", "delta": 0.5}, "delta"),
    ("LiveStream", {"steps": 9, "priority": "throughput"}, "priority"),
    ("LiveStream", {"t_index_list": "5,10,15,20,25,30,35,40,45", "priority": "throughput"}, "priority"),
    ("LiveStream", {"priority": "3"}, "priority"),
    ("StreamFrames", {"max_skip": 3}, "max_skip"),
    ("StreamFrames", {"blocks": 1}, "blocks"),
    ("StreamFrames", {"filter_seed": 3}, "filter_seed"),
    ("SimilarityFilter", {"similarity": 1.0, "max_skip": 3}, "max_skip"),
    ("SimilarityFilter", {"similarity": 1.0, "blocks": 1}, "blocks"),
    ("SimilarityFilter", {"similarity": 1.0, "filter_seed": 3}, "filter_seed"),
    ("BlendPrompts", {"weight_end": 0.5}, "weight_end"),
    ("BlendPrompts", {"weight_end": 0.5, "frames": ONE}, "weight_end"),
    ("BlendPrompts", {"mode": "slerp", "weight": 0.0}, "mode"),
    ("BlendPrompts", {"mode": "slerp", "weight": 1.0, "frames": FRAMES}, "mode"),
    ("Move", {"about": "image", "dx": 3.0}, "about"),
    ("Move", {"fill_from": WIRED}, "fill_from"),
    ("Move", {"about": "image", "dx": 3.0, "angle": 360.0}, "about"),
    ("Move", {"fill_from": WIRED, "scale": 2.0}, "fill_from"),
    ("Paste", {"about": "image", "dx": 3.0}, "about"),
    ("EditSampler", {"low_memory": True, "guidance": 0.0}, "low_memory"),
    *(("EditSampler", {name: 0.7, "inversion": DRAFTED}, name) for name in ("guidance", "noise")),
    ("EditSampler", {"low_memory": True, "inversion": DRAFTED}, "low_memory"),
    ("EditSampler", {"hold_object": 0.5, "tasks": APPEARANCE}, "hold_object"),
    ("EditSampler", {"hold_fill": 0.5, "tasks": APPEARANCE}, "hold_fill"),
    *(("MaskSchedule", {"kind": "fixed", name: value}, name) for name, value in (("low", 0.3), ("direction", "increasing"))),
    *(
        ("MaskSchedule", {"steps": 1, name: value}, name)
        for name, value in (("kind", "linear"), ("low", 0.3), ("direction", "increasing"), ("nested", False))
    ),
    *(
        ("MaskedRegenerate", {"masks": FRAMES[..., 0], name: value}, name)
        for name, value in (
            ("rounds", 2), ("kind", "linear"), ("low", 0.3), ("high", 0.9), ("direction", "increasing"), ("patch", 2),
            ("nested", False),
        )
    ),
    *(("MaskedRegenerate", {"kind": "fixed", name: value}, name) for name, value in (("low", 0.3), ("direction", "increasing"))),
    *(
        ("MaskedRegenerate", {"rounds": 1, name: value}, name)
        for name, value in (("kind", "linear"), ("low", 0.3), ("direction", "increasing"), ("nested", False))
    ),
    ("MaskedRegenerate", {"rounds": 1, "strength_end": 0.3}, "strength_end"),
    ("MaskedRegenerate", {"masks": ONE[..., 0], "strength_end": 0.3}, "strength_end"),
    ("TrainLatentFill", {"images": WIRED, "folder": "photos"}, "folder"),
    ("LatentFill", {"fill": WIRED, "fill_name": "other.safetensors"}, "fill_name"),
    ("StretchMap", {"edit": WIRED, "points": "1, 1 -> 2, 2"}, "points"),
    ("StretchMap", {"edit": WIRED, "window": 5.0}, "window"),
    ("StretchMap", {"points": "1, 1 -> 2, 2", "window": 5.0}, "window"),
    ("StretchMap", {"radius": 9.0}, "radius"),
    ("StretchMap", {"edit": WIRED, "radius": 9.0}, "radius"),
    ("SearchSchedule", {"custom_objective": WIRED, "objective": "same look as many steps"}, "objective"),
    ("SearchSchedule", {"clip": WIRED}, "clip"),
    ("SearchSchedule", {"steps": 6, "computed": 6, "fit": False}, "computed"),
    ("CompareSchedules", {"clip": WIRED, "prompts": " \n"}, "clip"),
    ("ReferenceObjective", {"clip_vision": WIRED}, "clip_vision"),
    ("ReferenceObjective", {"images": WIRED, "folder": "photos"}, "folder"),
    ("ReferenceObjective", {"inception_weights": "fid.pth"}, "inception_weights"),
    ("SelfObjective", {"clip_vision": WIRED, "features": "latent"}, "clip_vision"),
    ("BeforeAfter", {"fourth": WIRED}, "fourth"),
    ("Doctor", {"positive": WIRED}, "positive"),
    ("Doctor", {"positive": WIRED, "model": WIRED}, "positive"),
]  # fmt: skip

# The other inputs: each changes the result in every state, or its node warns of it while it runs (tests of that node).
ALWAYS = {
    "LoadModel": "model",
    "Doctor": "model vae",
    "ExamplePhoto": "photo",
    "ExampleClip": "clip frames model",
    "EmptyLatent": "width height batch_size",
    "SeedCanvas": "keep mirror canvas width height scale x y background noise_seed softness",
    "CowSampler": "cycles follow start low high range_unit inversion_cfg eta final_eta noise_limit",
    "SimilarityFilter": "similarity",
    "StreamFrames": "sigmas seed similarity consistency on_interrupt",
    "LiveStream": "clip width height seed crossfade feedback motion similarity keep panel t_index_list on_interrupt acceleration",
    "BlendPrompts": "weight frames",
    "Invert": "steps megapixels memory mode",
    "Move": "dx dy scale angle tasks mask image canvas",
    "Paste": "dx dy scale angle tasks mask image canvas",
    "Remove": "mask tasks image canvas",
    "Appearance": "mask reference_mask tasks image canvas reference_canvas",
    "BeforeAfter": "captions third",
    "Drag": "handles targets method tasks mask image canvas",
    "EditSampler": "seed cfg feather",
    "Harmonise": "seed steps cfg hold_object hold_seam seam megapixels background",
    "MaskSchedule": "steps high width height patch seed region",
    "MaskedRegenerate": "seed steps cfg sampler_name schedule strength candidates mask masks",
    "TrainLatentFill": (
        "name steps batch learning_rate size width height patch ratio masks mirror resume seed images"
    ),
    "LatentFill": "fill",
    "InfluenceProfile": "other_latent other_guider other_sampler",
    "StretchMap": "edit",
    "SearchSchedule": (
        "steps evaluations minutes pairs seed strategy layers batch custom_objective prompts search_first_level sigmas fit schedules"
    ),
    "CompareSchedules": (
        "stock_steps pairs repeats objective seed batch schedule sigmas schedules custom_objective prompts"
    ),
    "AddSchedule": "name sigmas schedule schedules levels",
    "LoadSchedule": "file steps guider sampler",
    "SaveSchedule": "name overwrite",
    "ResampleSchedule": "steps",
    "ReferenceObjective": "features distance images",
    "SelfObjective": "features distance",
}  # fmt: skip


def values_of(id: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All inputs of a node at their defaults, optional sockets open, with settings on top."""
    declared = NODES[id].INPUT_TYPES()
    values = {
        name: graph.default_of(list(spec))
        for name, spec in declared.get("required", {}).items()
        if graph.is_widget(spec)
    }
    values |= {name: WIRED for name, spec in declared.get("required", {}).items() if not graph.is_widget(spec)}
    for name, spec in declared.get("optional", {}).items():
        values[name] = graph.default_of(list(spec)) if graph.is_widget(spec) else None
    values |= {"frames": FRAMES} if id == "SlipstreamStreamFrames" else {}
    values |= {"tasks": MOVE} if id == "SlipstreamEditSampler" else {}
    return values | settings


def named(id: str, settings: dict[str, Any]) -> set[str]:
    """The inputs that the warnings of a node call without effect."""
    found: set[str] = set()
    for text in unused(NODES[f"Slipstream{id}"], values_of(f"Slipstream{id}", settings)):
        assert re.fullmatch(r"(`\w+`(, | and )?)+ (has|have) no effect .+\.", text), text
        found.update(re.findall(r"`(\w+)`", text.split(" no effect ")[0]))
    return found


@pytest.mark.parametrize("id", NODES)
def test_the_defaults_warn_of_nothing(id: str) -> None:
    assert not list(unused(NODES[id], values_of(id, {})))


@pytest.mark.parametrize(("id", "settings", "name"), CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_an_input_without_effect_is_named(id: str, settings: dict[str, Any], name: str) -> None:
    assert name in named(id, settings)


def test_every_rule_has_a_case() -> None:
    cases: dict[str, set[str]] = {}
    for id, _, name in CASES:
        cases.setdefault(f"Slipstream{id}", set()).add(name)
    for id, node in NODES.items():
        for rule in getattr(node, "UNUSED", ()):
            for name in rule.inputs.split():
                state = [s for i, s, n in CASES if f"Slipstream{i}" == id and n == name]
                assert any(rule.when(SimpleNamespace(**values_of(id, s))) for s in state), f"{id}: {name} {rule.why}"


@pytest.mark.parametrize("id", NODES)
def test_no_input_is_forgotten(id: str) -> None:
    declared = NODES[id].INPUT_TYPES()
    open_inputs = {n for n, spec in declared.get("required", {}).items() if graph.is_widget(spec)} | set(
        declared.get("optional", {})
    )
    ruled = {name for rule in getattr(NODES[id], "UNUSED", ()) for name in rule.inputs.split()}
    always = set(ALWAYS.get(id.removeprefix("Slipstream"), "").split())
    assert always.isdisjoint(ruled)
    assert open_inputs == always | ruled, (
        "a new input: when has it no effect? Give it a rule in UNUSED, or list it here"
    )


@pytest.mark.parametrize(
    ("id", "settings", "names"),
    [
        ("StreamFrames", {"guidance": "none", "guidance_scale": 1.0}, ()),
        ("StreamFrames", {"steps": 1, "renoise": "fresh", "cross_frame": True}, ("renoise", "cross_frame")),
        ("StreamFrames", {"steps": 1, "sigmas": torch.tensor([2.0, 1.0, 0.0]), "renoise": "fresh"}, ("steps",)),
        ("SimilarityFilter", {"similarity": 1.0, "max_skip": 3, "blocks": 1}, ("max_skip", "blocks")),
        ("MaskedRegenerate", {"masks": FRAMES[..., 0], "kind": "fixed", "low": 0.3}, ("kind", "low")),
        ("Move", {"fill_from": WIRED, "scale": 0.5}, ()),
        ("Move", {"fill_from": WIRED, "dx": 1.0}, ()),
    ],
)
def test_rules_together(id: str, settings: dict[str, Any], names: tuple[str, ...]) -> None:
    assert named(id, settings) == set(names)


def test_a_node_warns_when_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    node = NODES["SlipstreamSimilarityFilter"]()
    with caplog.at_level(logging.WARNING):
        node.choose(FRAMES, 1.0, 3, 8, 0)
    assert caplog.messages == [
        "Similarity Filter: `max_skip` has no effect at `similarity` 1, which skips nothing. Lower it."
    ]


def test_a_move_by_nothing_warns(caplog: pytest.LogCaptureFixture) -> None:
    move = NODES["SlipstreamMove"]()
    move.make(0.0, 0.0, 1.0, "object", mask=MASK[None])
    assert "Move / Resize Object: the object stays as it is" in caplog.text
    caplog.clear()
    move.make(1.0, 0.0, 1.0, "object", mask=MASK[None])
    assert not caplog.text
