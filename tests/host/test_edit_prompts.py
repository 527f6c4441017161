"""Photo editing with every kind of CONDITIONING that stock nodes make: it works as in the host, or one sentence says why not."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from graph import node
from PIL import Image
from safetensors.torch import save_file

SIZE = 128
PROMPTS = {"p": "a red square on a blue background", "p2": "a green star"}


def mask(graph: dict[str, Any], name: str, left: int, width: int) -> None:
    graph[name + "0"] = node("SolidMask", value=0.0, width=SIZE, height=SIZE)
    graph[name + "1"] = node("SolidMask", value=1.0, width=width, height=SIZE)
    graph[name] = node(
        "MaskComposite", destination=[name + "0", 0], source=[name + "1", 0], x=left, y=0, operation="add"
    )


def masked(graph: dict[str, Any], name: str, cond: str, left: int, width: int, bounds: bool = False) -> None:
    mask(graph, name + "m", left, width)
    area = "mask bounds" if bounds else "default"
    graph[name] = node(
        "ConditioningSetMask", conditioning=[cond, 0], mask=[name + "m", 0], strength=1.0, set_cond_area=area
    )


def area(graph: dict[str, Any], name: str, cond: str, x: int, width: int) -> None:
    graph[name] = node("ConditioningSetArea", conditioning=[cond, 0], width=width, height=SIZE, x=x, y=0, strength=1.0)


def span(graph: dict[str, Any], name: str, cond: str, start: float, end: float) -> None:
    graph[name] = node("ConditioningSetTimestepRange", conditioning=[cond, 0], start=start, end=end)


def combined(graph: dict[str, Any], first: str, second: str) -> str:
    graph["c"] = node("ConditioningCombine", conditioning_1=[first, 0], conditioning_2=[second, 0])
    return "c"


def prompt(graph: dict[str, Any], kind: str, other: str = "p2") -> str:
    """Add a CONDITIONING of one kind, made of "p" and `other`, and return its name."""
    if kind == "combine":
        return combined(graph, "p", other)
    if kind == "average":
        graph["c"] = node(
            "ConditioningAverage", conditioning_to=["p", 0], conditioning_from=[other, 0], conditioning_to_strength=0.5
        )
        return "c"
    if kind == "concat":
        graph["c"] = node("ConditioningConcat", conditioning_to=["p", 0], conditioning_from=[other, 0])
        return "c"
    if kind == "two masks":
        masked(graph, "a", "p", 0, 64)
        masked(graph, "b", other, 64, 64)
        return combined(graph, "a", "b")
    if kind == "bounds and whole":
        masked(graph, "a", other, 40, 56, bounds=True)
        return combined(graph, "a", "p")
    if kind == "two areas":  # of one size, so that the host runs them in one call
        area(graph, "a", "p", 0, 64)
        area(graph, "b", other, 64, 64)
        return combined(graph, "a", "b")
    if kind == "area and whole":
        area(graph, "a", other, 24, 72)
        return combined(graph, "a", "p")
    if kind == "schedule":
        span(graph, "a", "p", 0.0, 0.4)
        span(graph, "b", other, 0.4, 1.0)
        return combined(graph, "a", "b")
    assert kind == "default"
    masked(graph, "a", other, 64, 64)
    graph["c"] = node("ConditioningSetDefaultCombine", cond=["a", 0], cond_DEFAULT=["p", 0])
    return "c"


KINDS = (
    "combine", "average", "concat", "two masks", "bounds and whole", "two areas", "area and whole", "schedule", "default",
)  # fmt: skip


def base(memory: str = "bank") -> dict[str, Any]:
    """The graph of shared case 18: a red square on blue, moved; its prompts are named by `run`."""
    graph = {
        "m": node("SlipstreamLoadModel", model="pocket"),
        **{name: node("CLIPTextEncode", clip=["m", 1], text=text) for name, text in PROMPTS.items()},
        "n": node("CLIPTextEncode", clip=["m", 1], text=""),
        "bg": node("EmptyImage", width=SIZE, height=SIZE, batch_size=1, color=0x1A33C1),
        "sq": node("EmptyImage", width=48, height=48, batch_size=1, color=0xE6195A),
        "i": node("ImageCompositeMasked", destination=["bg", 0], source=["sq", 0], x=40, y=40, resize_source=False),
        "k0": node("SolidMask", value=0.0, width=SIZE, height=SIZE),
        "k1": node("SolidMask", value=1.0, width=48, height=48),
        "k": node("MaskComposite", destination=["k0", 0], source=["k1", 0], x=40, y=40, operation="add"),
        "inv": node(
            "SlipstreamInvert", model=["m", 0], vae=["m", 2], image=["i", 0], positive=["p", 0], steps=6, megapixels=1.0,
            memory=memory, mode="fine",
        ),
        "t": node("SlipstreamMove", mask=["k", 0], dx=24.0, dy=0.0, scale=1.0, about="object"),
        "ed": node(
            "SlipstreamEditSampler", model=["m", 0], vae=["m", 2], inversion=["inv", 0], tasks=["t", 0], positive=["p", 0],
            negative=["n", 0], seed=0, cfg=3.0, guidance=0.1, hold_object=0.2, hold_fill=0.2, noise=0.4, feather=4, low_memory=False,
        ),
        "out": node("SaveImage", images=["ed", 0], filename_prefix="prompts"),
    }  # fmt: skip
    return graph


def pixels(result: Any) -> np.ndarray:
    assert result.ok, result.explain()
    (file,) = [f for f in result.files if f.node == "out"]
    return np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")).astype(int)


def edited(
    host: Any, graph: dict[str, Any], positive: str, negative: str = "n", slots: tuple[int, int] = (0, 0)
) -> np.ndarray:
    graph["inv"]["inputs"]["positive"] = graph["ed"]["inputs"]["positive"] = [positive, slots[0]]
    graph["ed"]["inputs"]["negative"] = [negative, slots[1]]
    return pixels(host.run(graph))


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


@pytest.fixture(scope="module")
def plain(host: Any) -> np.ndarray:
    return edited(host, base(), "p")


@pytest.mark.parametrize("kind", KINDS)
def test_bank_and_row_agree_and_the_second_prompt_counts(host: Any, kind: str, plain: np.ndarray) -> None:
    images = {}
    for memory in ("bank", "row"):
        graph = base(memory)
        images[memory] = edited(host, graph, prompt(graph, kind))
    assert apart(images["bank"], images["row"]) <= 1
    assert apart(images["bank"], plain) > 8
    assert np.array_equal(images["bank"][:, :24], plain[:, :24])  # untouched as ever


@pytest.mark.parametrize("kind", ["combine", "average", "two masks", "schedule", "default"])
def test_one_prompt_in_parts_is_that_prompt(host: Any, kind: str, plain: np.ndarray) -> None:
    """The host averages prompts by weight: parts with one text over the whole image are the text."""
    graph = base()
    assert apart(edited(host, graph, prompt(graph, kind, "p")), plain) <= 1


def test_the_negative_may_be_combined_too(host: Any, plain: np.ndarray) -> None:
    graph = base()
    area(graph, "a", "p2", 24, 72)
    graph["both"] = node("ConditioningCombine", conditioning_1=["a", 0], conditioning_2=["n", 0])
    assert apart(edited(host, graph, "p", "both"), plain) > 8


def controlled(strength: float, end: float = 1.0) -> dict[str, Any]:
    graph = base()
    graph["net"] = node("ProbeTinyControlNet", model=["m", 0])
    graph["ctl"] = node(
        "ControlNetApplyAdvanced", positive=["p", 0], negative=["n", 0], control_net=["net", 0], image=["i", 0],
        strength=strength, start_percent=0.0, end_percent=end,
    )  # fmt: skip
    return graph


@pytest.mark.parametrize("memory", ["bank", "row"])
@pytest.mark.parametrize("sides", ["both", "positive", "negative"])
@pytest.mark.parametrize("end", [1.0, 0.5])
def test_a_control_net_on_either_side(host: Any, sides: str, end: float, memory: str, plain: np.ndarray) -> None:
    positive, negative = ("ctl" if sides != "negative" else "p"), ("ctl" if sides != "positive" else "n")
    slots = (0, int(sides != "positive"))
    off, graph = controlled(0.0, end), controlled(1.0, end)
    graph["inv"]["inputs"]["memory"] = memory
    assert apart(edited(host, off, positive, negative, slots), plain) <= 1
    assert apart(edited(host, graph, positive, negative, slots), plain) > 4


def test_lora_hooks(host: Any, host_models: pathlib.Path, plain: np.ndarray) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"
    up, down = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4, 64) * 0.3
    save_file(
        {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down},
        host_models / "loras" / "edit_hook.safetensors",
    )
    images = {}
    for strength in (0.0, 2.0):
        graph = base()
        graph["h"] = node("CreateHookLoraModelOnly", lora_name="edit_hook.safetensors", strength_model=strength)
        graph["c"] = node(
            "ConditioningSetProperties", cond_NEW=["p", 0], hooks=["h", 0], strength=1.0, set_cond_area="default"
        )
        images[strength] = edited(host, graph, "c")
    assert apart(images[0.0], plain) <= 1
    assert apart(images[2.0], plain) > 4


@pytest.mark.parametrize("memory", ["bank", "row"])
def test_gligen(host: Any, memory: str, plain: np.ndarray) -> None:
    images = []
    for box in (1, 9):
        graph = base(memory)
        graph["c"] = node("ProbeGligen", conditioning=["p", 0], box=box)
        images.append(edited(host, graph, "c"))
    assert apart(images[0], plain) > 4
    assert apart(images[0], images[1]) > 4


def inpainting(memory: str) -> dict[str, Any]:
    graph = base(memory)
    graph["tiny"] = node("ProbeTinyNative", shape="inpaint", dtype="float32")
    graph["ip"] = node(
        "InpaintModelConditioning", positive=["p", 0], negative=["n", 0], vae=["m", 2], pixels=["i", 0], mask=["k", 0],
        noise_mask=False,
    )  # fmt: skip
    graph["other"] = {**graph["ip"], "inputs": {**graph["ip"]["inputs"], "positive": ["p2", 0]}}
    for id in ("inv", "ed"):
        graph[id]["inputs"]["model"] = ["tiny", 0]
    graph["inv"]["inputs"]["positive"], graph["ed"]["inputs"]["negative"] = ["ip", 0], ["ip", 1]
    return graph


@pytest.mark.parametrize("memory", ["bank", "row"])
def test_an_inpaint_model_asks_the_positive_prompt(host: Any, memory: str) -> None:
    images = []
    for name in ("ip", "other"):
        graph = inpainting(memory)
        graph["ed"]["inputs"]["positive"] = [name, 0]
        images.append(pixels(host.run(graph)))
    assert apart(*images) > 4


def test_a_paste_of_another_size_into_an_inpaint_model_is_refused(host: Any) -> None:
    graph = inpainting("bank")
    graph["ed"]["inputs"]["positive"] = ["ip", 0]
    graph["small"] = node("EmptyImage", width=64, height=96, batch_size=1, color=0x40C040)
    graph["whole"] = node("SolidMask", value=1.0, width=64, height=96)
    graph["ip2"] = {**graph["ip"], "inputs": {**graph["ip"]["inputs"], "pixels": ["small", 0], "mask": ["whole", 0]}}
    graph["inv2"] = {
        **graph["inv"],
        "inputs": {**graph["inv"]["inputs"], "image": ["small", 0], "positive": ["ip2", 0]},
    }
    graph["t"] = node(
        "SlipstreamPaste", reference=["inv2", 0], mask=["whole", 0], dx=8.0, dy=0.0, scale=0.5, about="object"
    )
    result = host.run(graph)
    assert result.status == "error"
    assert "the same size" in result.explain()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("area", "for the whole image"), ("mask", "for the whole image"), ("first half", "at every step"),
        ("second half", "at every step"), ("gap", "at every step"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["positive of Invert", "positive of Edit", "negative of Edit"])
def test_prompts_that_leave_something_without_any_are_refused_before_sampling(
    host: Any, kind: str, message: str, where: str
) -> None:
    graph = base()
    if kind == "area":
        area(graph, "c", "p", 0, 64)
    elif kind == "mask":
        masked(graph, "c", "p", 0, 64)
    elif kind == "gap":
        span(graph, "a", "p", 0.0, 0.4)
        span(graph, "b", "p2", 0.6, 1.0)
        combined(graph, "a", "b")
    else:
        span(graph, "c", "p", *((0.0, 0.5) if kind == "first half" else (0.5, 1.0)))
    name, id = where.split(" of ")
    graph[{"Invert": "inv", "Edit": "ed"}[id]]["inputs"][name] = ["c", 0]
    result = host.run(graph)
    assert result.status == "error"
    assert f"Expected `{name}` with a prompt {message}" in result.explain()
    assert "Conditioning (Combine)" in result.explain()
    assert not result.progress("inv" if id == "Invert" else "ed")


def test_a_negative_is_checked_at_cfg_1_where_a_patch_asks_it(host: Any) -> None:
    graph = base()
    span(graph, "c", "n", 0.0, 0.5)
    graph["ed"]["inputs"].update(negative=["c", 0], cfg=1.0)
    assert host.run(graph).ok
    graph["patched"] = node("SelfAttentionGuidance", model=["m", 0], scale=0.5, blur_sigma=2.0)
    for id in ("inv", "ed"):
        graph[id]["inputs"]["model"] = ["patched", 0]
    assert "Expected `negative` with a prompt at every step" in host.run(graph).explain()
