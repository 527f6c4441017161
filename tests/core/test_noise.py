"""Noise is an argument: the same seed gives the same numbers, and one phase's draws never shift another's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from slipstream.core import ReplayNoise, SeededNoise
from slipstream.core.noise import StackedNoise
from slipstream.lmd import RegenerateConfig, TrainConfig
from slipstream.search import SearchConfig
from slipstream.stream import StreamConfig

LIKE = torch.zeros(2, 4, 8, 8)


def test_the_same_seed_gives_the_same_draws() -> None:
    one, other = SeededNoise(7), SeededNoise(7)
    first = one(LIKE)
    assert torch.equal(first, other(LIKE))
    second = one(LIKE)
    assert torch.equal(second, other(LIKE))
    assert not torch.equal(first, second)
    assert not torch.equal(first, SeededNoise(8)(LIKE))


def test_it_is_standard_normal_and_takes_shape_and_dtype() -> None:
    noise = SeededNoise(0)(torch.zeros(100, 100, 10, dtype=torch.float64))
    assert noise.dtype == torch.float64
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert torch.equal(noise, SeededNoise(0)(torch.zeros(100, 100, 10)).double()), "the numbers depend on the dtype"


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    SeededNoise(1)(LIKE)
    assert torch.equal(torch.rand(3), wanted)


def test_forks_are_independent_of_order_and_of_each_other() -> None:
    source = SeededNoise(7)
    start, cycle = source.fork("start")(LIKE), source.fork("cycle")(LIKE)
    used = SeededNoise(7)
    used(LIKE)
    assert torch.equal(used.fork("cycle")(LIKE), cycle), "earlier draws shifted a fork"
    plain, other_seed = SeededNoise(7)(LIKE), SeededNoise(8).fork("start")(LIKE)
    rows = torch.stack([t.flatten() for t in (start, cycle, plain, other_seed)])
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert float(correlation.abs().max()) < 0.15


def test_a_replay_gives_what_was_recorded() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    noise = ReplayNoise(tensors)
    assert torch.equal(noise(torch.empty(2, dtype=torch.float64)), torch.ones(2, dtype=torch.float64))
    assert torch.equal(noise.fork("another phase")(torch.empty(3)), torch.zeros(3))
    with pytest.raises(ValueError, match="at most 2 draws"):
        noise(torch.empty(3))
    with pytest.raises(ValueError, match=r"noise 0 of shape \(3,\), but got \(2,\)"):
        ReplayNoise(tensors)(torch.empty(3))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 15, 17), (3,), (2, 4, 3, 3)])
def test_a_row_is_the_same_in_a_batch_of_any_size(shape: tuple[int, ...]) -> None:
    """In every draw, not only the first; the second size is no multiple of what the generator makes at once."""
    sources = {rows: SeededNoise(7).fork("phase") for rows in (1, 2, 5)}
    for _ in range(3):
        draws = {rows: source(torch.empty(rows, *shape)) for rows, source in sources.items()}
        assert torch.equal(draws[5][:2], draws[2])
        assert torch.equal(draws[5][:1], draws[1])
        assert not torch.equal(draws[5][0], draws[5][1])


def test_the_first_draw_is_the_hosts() -> None:
    """comfy.sample.prepare_noise draws the batch in one go, row by row for `batch_index`."""
    whole = torch.randn(LIKE.shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(SeededNoise(7)(LIKE), whole)
    odd = torch.Generator().manual_seed(7)
    rows = torch.cat([torch.randn(1, 4, 15, 17, generator=odd) for _ in range(4)])
    assert torch.equal(SeededNoise(7, [3, 1, 3])(torch.empty(3, 4, 15, 17)), rows[[3, 1, 3]])


def test_rows_hold_in_every_draw_and_fork() -> None:
    whole, part = SeededNoise(7), SeededNoise(7, [2, 0])
    like = torch.empty(3, 4, 8, 8)
    for _ in range(2):
        assert torch.equal(part(like[:2]), whole(like)[[2, 0]])
    assert torch.equal(part.fork("x")(like[:2]), whole.fork("x")(like)[[2, 0]])
    with pytest.raises(ValueError, match="`rows` with one index for each row of the batch 3"):
        part(like)


def test_a_stack_gives_each_part_its_own_source() -> None:
    like = torch.empty(4, 4, 8, 8)
    stacked = StackedNoise([SeededNoise(1), SeededNoise(2)])
    assert torch.equal(stacked(like), torch.cat([SeededNoise(s)(like[:2]) for s in (1, 2)]))
    forked = torch.cat([SeededNoise(s).fork("x")(like[:2]) for s in (1, 2)])
    assert torch.equal(stacked.fork("x")(like), forked)


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int32, int])
def test_seeds_of_numpy_are_plain_integers(kind: type) -> None:
    assert type(SeededNoise(kind(7)).seed) is int
    assert torch.equal(SeededNoise(kind(7)).fork("x")(LIKE), SeededNoise(7).fork("x")(LIKE))
    for config in (
        StreamConfig(seed=kind(7)), RegenerateConfig(mask_seed=kind(7)), TrainConfig(seed=kind(7)), SearchConfig(seed=kind(7)),
    ):  # fmt: skip
        assert json.dumps(getattr(config, "mask_seed" if hasattr(config, "mask_seed") else "seed")) == "7"


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64 - 1])
def test_large_seeds_differ(seed: int) -> None:
    assert not torch.equal(SeededNoise(seed)(LIKE), SeededNoise(seed - 1)(LIKE))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_bad_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="`seed`"):
        SeededNoise(seed)  # type: ignore[arg-type]


def test_the_largest_seed_of_the_host_is_fine() -> None:
    assert SeededNoise(2**64 - 1).fork("x")(LIKE).shape == LIKE.shape
