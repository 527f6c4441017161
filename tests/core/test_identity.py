"""Digests: equal for equal content, different for anything that changes a computation."""

from __future__ import annotations

import torch
from slipstream.core.denoiser import Conditioning
from slipstream.core.identity import digest, token
from torch import nn


def test_tensors_count_by_content_shape_and_dtype():
    x = torch.arange(6.0)
    assert digest(x) == digest(x.clone())
    others = [x + 1e-6, x.reshape(2, 3), x.double(), x.half(), x[:5]]
    assert len({digest(x), *map(digest, others)}) == 6


def test_containers_and_conditionings():
    cond = Conditioning(torch.ones(1, 2, 3), extra={"ids": torch.zeros(1, 6)})
    same = Conditioning(torch.ones(1, 2, 3), extra={"ids": torch.zeros(1, 6)})
    assert digest([cond, 1.5, None]) == digest([same, 1.5, None])
    assert digest([cond, 1.5, None]) != digest([same, 1.5, 0])
    assert digest([1], 2) != digest([1, 2])
    assert digest("1") != digest(1)


def test_objects_count_by_which_one_they_are_and_modules_by_state():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.load_state_dict(one.state_dict())
    assert digest(one) == digest(one)
    assert digest(one) != digest(two)
    before = digest(one)
    with torch.no_grad():
        one.weight.add_(1)
    assert digest(one) != before


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        layer = nn.Linear(2, 2)
        layer.weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    assert digest(layer) == digest(layer)


def test_a_token_is_never_given_twice():
    seen = set()
    for _ in range(50):
        seen.add(token(nn.Identity()))  # gone at once, so that the next one may get its address
    assert len(seen) == 50


def test_an_identity_attribute_decides():
    class Model:
        identity = ("pocket", 3)

    assert digest(Model()) == digest(Model())


def test_what_cannot_be_watched_is_never_the_same():
    class Bare:
        __slots__ = ()

    bare = Bare()
    assert digest(bare) != digest(bare)
