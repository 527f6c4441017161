from __future__ import annotations

import random

import pytest
from slipstream.core.layers import LayerMask
from slipstream.core.schedules import DiscreteLevels, FlowLevels, scaled_linear_alphas_cumprod, table_of
from slipstream.search.config import SearchConfig
from slipstream.search.space import Candidate, Space, candidate_of

TABLE = table_of(DiscreteLevels(scaled_linear_alphas_cumprod()))


def space(**changes: object) -> Space:
    return Space(TABLE, SearchConfig(**{"steps": 4, **changes}))


def legal(genome: tuple[int, ...], s: Space) -> bool:
    gaps = [a - b for a, b in zip(genome, genome[1:])]
    return all(g >= s.gap for g in gaps) and 0 <= genome[-1] and genome[0] <= s.top


@pytest.mark.parametrize("pin_first", [True, False])
@pytest.mark.parametrize("terminal_zero", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4, 30])
def test_repair_makes_anything_legal(steps: int, pin_first: bool, terminal_zero: bool) -> None:
    s = space(steps=steps, pin_first=pin_first, terminal_zero=terminal_zero)
    rng = random.Random(0)
    for _ in range(100):
        genome = s.repair([rng.randint(-500, 1500) for _ in range(rng.randint(0, 40))])
        assert legal(genome, s)
        assert len(genome) == s.count == steps + (not terminal_zero)
        assert s.repair(genome) == genome
        if pin_first:
            assert genome[0] == 999
        assert s.candidate(genome).steps == steps


def test_random_and_snap() -> None:
    s = space()
    assert s.snap(s.candidate((999, 700, 300, 20)).sigmas) == (999, 700, 300, 20)
    assert s.snap([9.0, 3.0, 1.0, 0.1, 0.0])[0] == 999  # pinned
    assert len({s.random(random.Random(i)) for i in range(50)}) == 50
    assert all(legal(s.random(random.Random(i)), s) for i in range(50))


def test_collapsed_levels_are_spread() -> None:
    s = space(min_gap=10)
    assert s.repair([999, 9, 9, 9]) == (999, 20, 10, 0)  # room is made downwards first, then upwards


def test_too_many_steps_for_the_table() -> None:
    with pytest.raises(ValueError, match="fit the model's 1000 levels"):
        space(steps=200, min_gap=10)
    with pytest.raises(ValueError, match="Expected `steps` between 1 and 1000, but got 2000"):
        space(steps=2000)
    flow = Space(table_of(FlowLevels(3.0)), SearchConfig(steps=4))
    assert flow.candidate(flow.repair([999, 600, 300, 10])).levels[0] == 1.0


def test_a_candidate_is_known_by_levels_and_masks() -> None:
    plain = Candidate((2.0, 1.0, 0.0))
    assert Candidate((2.0, 1.0, 0.0), (frozenset(), frozenset())) == plain
    assert Candidate((2.0, 1.0, 0.0), (frozenset("ab"), frozenset())).key == "2 1 0 | a,b ; "
    masked = Candidate((2.0, 1.0, 0.0), (frozenset(), frozenset({"x"})))
    assert masked.layer_masks() == (LayerMask(1.0, 0.0, ("x",)),)
    assert candidate_of([2.0, 1.0, 0.0], masked.layer_masks()) == masked


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("steps", 2.5), ("evaluations", 0), ("seconds", 0.0), ("seconds", float("nan")), ("calls", 0),
        ("pairs", 0), ("strategy", "best"), ("max_skip", 1.0), ("teacher_steps", 1), ("seed", -1), ("min_gap", 0),
    ],
)  # fmt: skip
def test_bad_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"Expected `{field}`"):
        SearchConfig(**{field: value})


def test_a_budget_is_needed() -> None:
    with pytest.raises(ValueError, match="Expected a budget"):
        SearchConfig(evaluations=None)
    assert SearchConfig(evaluations=None, seconds=5).identity() == SearchConfig(evaluations=99).identity()
