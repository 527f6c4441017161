"""Blocks of transformers: found by what they return, left out without being computed. U-Nets: tests/search/test_golden.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slipstream.core.layers import ATTENTION, RESIDUAL, TRANSFORMER, LayerMask, blocks_of, measure, skipped_at, skipping
from torch import Tensor, nn

TOKENS, WIDTH = 6, 16


class Double(nn.Module):
    """Image and text as many tokens, given by name, returned in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        return text + 0.3 * self.text(image), image + 0.3 * self.image(text) + level


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, level: Tensor, options: dict[str, Any]) -> Tensor:
        x += 0.3 * self.mix(x)
        return x


class Last(nn.Module):
    """Returns None for a stream that nobody reads any more, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, *args: Tensor) -> list[Tensor | None]:
        return [None, args[1] + 0.3 * self.mix(args[0])]


class Modulation(nn.Module):
    """Of the shape of its input, but nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(x))


class Wider(Modulation):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 2 * WIDTH)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.modulation = nn.ModuleList([Modulation()])
        self.wider = nn.ModuleList([Wider()])
        self.double_blocks = nn.ModuleList([Double(), Double()])
        self.single_blocks = nn.ModuleDict({"a": InPlace(), "b": InPlace()})
        self.last = nn.ModuleList([Last()])
        self.alone = Modulation()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        image, text = self.embedder(x), x.flip(1) + 1
        level = self.modulation[0](torch.ones(1, WIDTH)).mean() + self.wider[0](x).mean()
        for block in self.double_blocks:
            text, image = block(image=image, text=text, level=level)
        for block in self.single_blocks.values():
            image = block(image, level, {})
            self.seen.append(image.clone())
        return self.alone(self.last[0](text, image)[1])


@pytest.fixture
def net() -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer().eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


SKIPPABLE = ["double_blocks.0", "double_blocks.1", "single_blocks.a", "single_blocks.b", "last.0"]


def test_blocks_are_what_returns_its_input_with_something_added(net: Transformer, x: Tensor) -> None:
    assert set(blocks_of(net)) == {*SKIPPABLE, "modulation.0", "wider.0"}
    plain = net(x)
    layers = measure(net, lambda: net(x))
    assert [(layer.name, layer.kind) for layer in layers] == [(name, TRANSFORMER) for name in SKIPPABLE]
    cost = {layer.name: layer.cost for layer in layers}
    assert cost["double_blocks.0"] == pytest.approx(2 * cost["single_blocks.a"])
    total = 2 * WIDTH * WIDTH * (2 * TOKENS * (1 + 2 * 2 + 2 + 1 + 1 + 2) + 1)  # every product of the call
    assert cost["last.0"] == pytest.approx(2 * WIDTH * WIDTH * 2 * TOKENS / total)
    assert torch.equal(net(x), plain)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("name", SKIPPABLE)
def test_a_skipped_block_gives_back_what_came_in(net: Transformer, x: Tensor, name: str, measured: bool) -> None:
    """Also in the call in which it is met for the first time, when it writes to its input, and when its inputs look alike."""
    if measured:
        measure(net, lambda: net(x))
    with skipping(net, [name]):
        first, found = net(x), net(x)
    block = blocks_of(net)[name].module
    for layer in block.children():  # adding nothing is the same
        layer.weight.zero_()
        layer.bias.zero_()
    if name.startswith("double"):
        block.forward = lambda image, text, level: (text, image)
    expected = net(x)
    assert torch.equal(first, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SKIPPABLE)
def test_a_block_is_computed_once_to_see_what_it_returns_and_then_never(net: Transformer, x: Tensor, name: str) -> None:
    calls: list[str] = []
    blocks_of(net)[name].module.register_forward_hook(lambda *_: calls.append(name))
    with skipping(net, [name]):
        net(x)
        assert len(calls) == 1
        net(x)
        net(x + 1)
    with skipping(net, [name]):
        net(x)
    assert len(calls) == 1
    net(x)
    assert len(calls) == 2


def test_the_block_after_a_skipped_one_sees_its_input(net: Transformer, x: Tensor) -> None:
    net(x)
    (_, _), plain = net.seen, list(net.seen)
    net.seen.clear()
    with skipping(net, ["single_blocks.b"]):
        net(x)
    assert torch.equal(net.seen[0], plain[0])
    assert torch.equal(net.seen[1], plain[0])
    assert not torch.equal(plain[1], plain[0])


def test_blocks_that_cannot_be_skipped_are_refused_in_a_sentence(net: Transformer, x: Tensor) -> None:
    with (
        skipping(net, ["wider.0"]),
        pytest.raises(ValueError, match=r"Expected `skip` .* same shapes, but got a Wider"),
    ):
        net(x)
    with pytest.raises(
        ValueError, match=r"names 'down_blocks.0'. It was made for another model; this one has 7 blocks"
    ):
        skipping(net, ["down_blocks.0"])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.skip_connection = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.skip_connection(x) + self.layers(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.ModuleList([Modulation()])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(self.inner[0](self.qkv(x).chunk(3, -1)[0]))


def test_a_unet_s_blocks_are_known_by_their_parts_whatever_their_classes_are_called(x: Tensor) -> None:
    net = nn.Sequential(nn.Sequential(Residual(), Attention()), nn.ModuleList([Modulation()])[0], Residual())
    assert {name: block.kind for name, block in blocks_of(net).items()} == {
        "0.0": RESIDUAL,
        "0.1": ATTENTION,
        "2": RESIDUAL,
    }
    with skipping(net, ["0.0", "0.1"]):
        assert torch.equal(net(x), net[2](net[1](net[0][0].skip_connection(x))))


def test_masks_hold_for_an_interval_of_sigma() -> None:
    masks = [LayerMask(4.0, 1.0, ("a", "b")), LayerMask(2.0, 0.0, ("c",))]
    assert skipped_at(masks, 4.0) == {"a", "b"}
    assert skipped_at(masks, 2.0) == {"a", "b", "c"}
    assert skipped_at(masks, 1.0) == {"c"}
    assert skipped_at(masks, 4.1) == frozenset()
