"""Noise is an argument: the same seed gives the same numbers, and one phase's draws never shift another's."""

from __future__ import annotations

import pytest
import torch
from slipstream.core import ReplayNoise, SeededNoise

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


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_bad_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="`seed`"):
        SeededNoise(seed)  # type: ignore[arg-type]


def test_the_largest_seed_of_the_host_is_fine() -> None:
    assert SeededNoise(2**64 - 1).fork("x")(LIKE).shape == LIKE.shape
