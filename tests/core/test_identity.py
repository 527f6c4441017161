"""Identities: equal for what was built from equal parts, different for anything that changes a computation."""

from __future__ import annotations

import enum
import functools
import os
import random
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slipstream
import torch
from slipstream.core.denoiser import Conditioning
from slipstream.core.identity import Identity, Weights, identify, sampled_bytes, weights_digest
from torch import nn


def test_tensors_count_by_content_shape_and_dtype():
    x = torch.arange(6.0)
    assert identify(x) == identify(x.clone())
    assert identify(x.reshape(2, 3)) == identify(x.reshape(3, 2).T.contiguous().reshape(2, 3).copy_(x.reshape(2, 3)))
    others = [x + 1e-6, x.reshape(2, 3), x.double(), x.half(), x[:5], x.bfloat16()]
    assert len({identify(x), *map(identify, others)}) == 7
    assert identify(x.to("meta")).unnamed


def test_containers_and_conditionings():
    cond = Conditioning(torch.ones(1, 2, 3), extra={"ids": torch.zeros(1, 6)})
    same = Conditioning(torch.ones(1, 2, 3), extra={"ids": torch.zeros(1, 6)})
    assert identify([cond, 1.5, None]) == identify([same, 1.5, None])
    assert identify([cond, 1.5, None]) != identify([same, 1.5, 0])
    assert identify([1], 2) != identify([1, 2])
    assert identify("1") != identify(1)
    assert identify({"a": 1, "b": 2}) == identify({"b": 2, "a": 1}) != identify({"a": 2, "b": 1})
    assert identify({1, 2}) == identify({2, 1})
    assert identify((1,)) != identify([1])


def networks() -> tuple[nn.Module, nn.Module]:
    one, two = (nn.Sequential(nn.Conv2d(3, 40, 9), nn.SiLU(), nn.Linear(4, 4)) for _ in range(2))
    two.load_state_dict(one.state_dict())
    return one, two


def rescale(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.5)


def assign(module: nn.Module) -> None:
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, assign=True)


EDITS: dict[str, Callable[[Any], object]] = {
    ".data edit": rescale,
    "assign": assign,
    "in place": lambda m: nn.init.zeros_(m[2].weight),
    "forward": lambda m: setattr(m[0], "forward", lambda x: x),
    "scale of an adapter": lambda m: setattr(m[2], "scaling", {"default": 0.5}),
    "hook": lambda m: m[1].register_forward_hook(lambda *args: args[-1]),
    "layer": lambda m: m.__setitem__(1, nn.ReLU()),
    "attribute": lambda m: setattr(m[0], "stride", (2, 2)),
    "format": lambda m: m.half(),
    "training": lambda m: m.train(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_modules_count_by_weights_and_state(edit: Callable[[Any], object]):
    one, two = (m.eval() for m in networks())
    before = identify(one)
    assert before == identify(two)
    edit(two)
    assert identify(two) != before
    assert identify(one) == before


def test_a_tensor_without_dimensions_is_an_attribute_like_any_other():
    """As the host's StableCascadeSampling holds one."""
    one, other = nn.Identity(), nn.Identity()
    one.shift, other.shift = torch.tensor(1.0), torch.tensor(2.0)
    assert identify(one) == identify(one) != identify(other)
    empty = nn.Identity()
    empty.shift = torch.zeros(0)
    assert identify(empty) == identify(nn.Identity())


def test_the_place_of_weights_does_not_count():
    one, two = networks()
    assert identify(one) == identify(two.to(memory_format=torch.channels_last))
    assert identify(torch.ones(2, 3, 70, 70)) == identify(
        torch.ones(2, 3, 70, 70).to(memory_format=torch.channels_last)
    )


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        layer = nn.Linear(2, 2)
        layer.weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    assert identify(layer) == identify(layer)


def test_some_values_of_each_weight_count():
    x = torch.arange(100_000.0)
    changed = x.clone()
    changed[1] += 1  # between two of the values that are looked at
    assert identify(Weights(x)) == identify(Weights(changed))
    assert identify(x) != identify(changed)
    assert identify(Weights(x)) != identify(Weights(x + 1))
    assert identify(Weights(x[:4000])) != identify(Weights(changed[:4000]))  # a small one counts whole
    assert [len(b) for b in sampled_bytes([x, x[:10], x[:0]])] == [256, 40, 0]


def test_one_short_hash_for_every_order_and_format():
    a, b = torch.randn(300, 30, generator=torch.manual_seed(0)).half().float(), torch.ones(7)
    assert weights_digest([a, b]) == weights_digest([b, a.half()]) == weights_digest([a.reshape(30, 300), b])
    assert weights_digest([a, b]) != weights_digest([a + 1, b])
    assert len(weights_digest([a])) == 16


def make_patch(strength: float, scale: torch.Tensor | None = None) -> Callable[[float], float]:
    def patch(x: float) -> float:
        return x * strength if scale is None else x * float(scale)

    return patch


def other_patch(strength: float, scale: torch.Tensor | None = None) -> Callable[[float], float]:
    def patch(x: float) -> float:
        return x + strength if scale is None else x * float(scale)

    return patch


def test_functions_count_by_code_and_closure():
    assert identify(make_patch(0.5)) == identify(make_patch(0.5)) != identify(make_patch(0.6))
    assert identify(make_patch(1, torch.ones(2))) != identify(make_patch(1, torch.zeros(2)))
    assert identify(make_patch(0.5)) != identify(other_patch(0.5))
    assert identify(lambda x: x + 1) != identify(lambda x: x + 2)
    assert (
        identify(functools.partial(max, 1))
        == identify(functools.partial(max, 1))
        != identify(functools.partial(max, 2))
    )
    assert identify(lambda x=1: x) != identify(lambda x=2: x)


STRENGTH = 1.0


def helped() -> float:
    return STRENGTH


def test_globals_of_a_function_count(monkeypatch: pytest.MonkeyPatch):
    def patch() -> float:
        return helped()

    before = identify(patch)
    monkeypatch.setattr(sys.modules[__name__], "STRENGTH", 2.0)
    assert identify(patch) != before


def make_counter(begin: float) -> tuple[Callable[[], float], Callable[[], Any]]:
    left, seen = begin, None

    def patch() -> float:
        nonlocal left, seen
        left, seen = left - 1, torch.ones(3)
        return left

    return lambda: seen, patch


def test_what_a_patch_notes_down_is_no_setting():
    """As ToMe and APG do: the reader may come before the writer."""
    one, other = make_counter(5), make_counter(6)
    before = identify(one)
    assert before == identify(make_counter(5)) != identify(other)
    one[1]()
    assert identify(one) == before


class Setting(enum.Enum):
    A = 1
    B = 2


@dataclass
class Config:
    strength: float
    mode: Setting = Setting.A


class Patch:
    def __init__(self, strength: float, tensor: torch.Tensor) -> None:
        self.strength, self.tensor, self.lock = strength, tensor, threading.Lock()

    def __call__(self, x: float) -> float:
        return x * self.strength


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "object": (lambda: Patch(1, torch.ones(2)), lambda: Patch(1, torch.zeros(2))),
    "method": (lambda: Patch(1, torch.ones(2)).__call__, lambda: Patch(2, torch.ones(2)).__call__),
    "slots": (lambda: Slotted(1), lambda: Slotted(2)),
    "dataclass": (lambda: Config(1), lambda: Config(1, Setting.B)),
    "path": (lambda: Path("a"), lambda: Path("b")),
    "array": (lambda: np.arange(3), lambda: np.arange(3.0)),
    "random state": (lambda: random.Random(1), lambda: random.Random(2)),
    "generator": (lambda: torch.Generator().manual_seed(1), lambda: torch.Generator().manual_seed(2)),
    "namespace": (lambda: types.SimpleNamespace(a=1), lambda: types.SimpleNamespace(a=2)),
    "class": (lambda: Config, lambda: Patch),
    "nested": (lambda: {"a": [Patch(1, torch.ones(1))]}, lambda: {"a": [Patch(1.5, torch.ones(1))]}),
}


@pytest.mark.parametrize(("make", "other"), CASES.values(), ids=CASES.keys())
def test_objects_count_by_class_and_state(make: Callable[[], Any], other: Callable[[], Any]):
    assert identify(make()) == identify(make()) != identify(other())
    assert not identify(make(), other()).unnamed


def test_a_class_that_a_function_made_counts_by_its_closure():
    def make(scale: float) -> Any:
        class Guider:
            def predict(self, x: float) -> float:
                return x * scale

        return Guider()

    assert identify(make(1)) == identify(make(1)) != identify(make(2))


def test_circles_end():
    def circle(value: int) -> list[Any]:
        ring: list[Any] = [value]
        ring.append(ring)
        return ring

    assert identify(circle(1)) == identify(circle(1)) != identify(circle(2))


def test_an_identity_attribute_decides():
    class Model:
        identity = ("pocket", 3)

        def __init__(self) -> None:
            self.calls = random.random()

    assert identify(Model()) == identify(Model())
    assert identify(Identity("ab", ("x",)), 1).unnamed == ("x",)


def test_what_cannot_be_named_is_listed_by_place_and_kind():
    with socket.socket() as open_socket:
        unnamed = identify({"patches": {"attn1": [make_patch(open_socket)]}}).unnamed  # type: ignore[arg-type]
    assert unnamed == ("[0].patches.attn1[0].strength (socket.socket)",)
    assert identify(x for x in "ab").unnamed
    assert "generator" in identify(x for x in "ab").warning
    assert identify(1).warning == ""


def test_another_process_gives_the_same_names(capsys: pytest.CaptureFixture[str]):
    """Here and in a process with other hashes of strings."""
    code = (
        "from slipstream.core.identity import identify; import slipstream;"
        "f = lambda s: (lambda x: x in {'a', 'b', 'c'} and s);"
        "print(hash('a'), identify(f(3), {'b', 'a'}, slipstream.load('pocket').decode).digest)"
    )
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    here = capsys.readouterr().out.split()
    command, seed = [sys.executable, "-c", code], "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert here[0] != there[0]
    assert here[1] == there[1]


def test_an_edited_network_is_not_handed_out_again_and_prompts_are_encoded_anew():
    pipe = slipstream.load("pocket")
    before = pipe.encode_text(["a red circle"]).context
    edited = pipe.text[0].encoder
    rescale(edited)
    assert (pipe.encode_text(["a red circle"]).context - before).abs().max() > 0.1
    fresh = slipstream.load("pocket")
    assert fresh.text[0].encoder is not edited
    assert fresh.model.unet is pipe.model.unet
    assert torch.equal(fresh.encode_text(["a red circle"]).context, before)
