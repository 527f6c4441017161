"""Masks are built, not drawn: a model with an idle block pays for a step more by it; a model without one keeps its network."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from slipstream.core.layers import Layer
from slipstream.search import search
from slipstream.search.config import SearchConfig
from slipstream.search.engine import Search
from slipstream.search.evaluation import Task
from slipstream.search.masking import _runs, cheapest, proposals
from slipstream.search.objectives import Paired
from slipstream.search.space import Space
from slipstream.search.store import Store
from slipstream_tests.search import jobs
from torch import Tensor

COSTS = {"idle": 0.3, "small": 0.1, "vital": 0.3}


class Skipping:
    """The toy model with three blocks: one does nothing, one little, one everything."""

    def __init__(self, model: Any, harm: dict[str, float]) -> None:
        self.model, self.harm, self.skipped = model, harm, frozenset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self.model(x, sigma, cond) + 100 * sum(self.harm[n] for n in self.skipped)

    def layers(self, *args: Any) -> tuple[Layer, ...]:
        return tuple(Layer(name, "residual", cost) for name, cost in COSTS.items())

    @contextmanager
    def skipping(self, names: Collection[str]) -> Iterator[None]:
        self.skipped = frozenset(names)
        try:
            yield
        finally:
            self.skipped = frozenset()


def path_with(idle: float, small: float = 0.0002) -> Any:
    path = jobs.make_path()
    path.model = Skipping(path.model, {"idle": idle, "small": small, "vital": 1.0})
    return path


def test_an_idle_block_pays_for_a_step_more() -> None:
    config = jobs.make_config(layers=True, evaluations=120, max_skip=0.7)
    result = search(path_with(0.0), config)
    alone = search(path_with(0.0), jobs.make_config(evaluations=120))
    assert result.schedule.steps == 4
    skipped = [name for mask in result.schedule.masks for name in mask.skip]
    assert "vital" not in skipped
    assert 4 - sum(COSTS[n] for n in skipped) <= 3 + 1e-9
    assert result.schedule.objective["value"] < 0.8 * alone.schedule.objective["value"]


def test_blocks_in_a_row_are_proposed() -> None:
    """Each block alone does harm, so that a chain would not begin with the best run, and the least harmful run is found."""
    costs = {f"b{i}": 0.1 for i in range(6)}
    space = Space(jobs.make_path().table(), jobs.make_config(layers=True, max_skip=0.7), costs)
    alone = {"b0": 9.0, "b1": 1.0, "b2": 9.0, "b3": 2.0, "b4": 2.0, "b5": 9.0}
    runs = _runs(space, alone)
    assert runs[0] == runs[1] == {"b3", "b4"}  # the shares of two blocks; b1 is better alone, but has worse neighbours
    assert runs[2] == {"b1", "b2", "b3"}  # of three
    assert all(max(order) - min(order) == len(order) - 1 for run in runs for order in [[int(n[1:]) for n in run]])
    assert all(len(run) <= space.most_skipped() for run in runs)
    assert _runs(space, {**alone, "b3": float("inf"), "b1": float("inf")})[0] == {"b4", "b5"}
    assert _runs(space, dict.fromkeys(alone, float("inf"))) == []


def test_where_every_block_matters_the_full_network_is_returned() -> None:
    result = search(path_with(1.0, 1.0), jobs.make_config(layers=True, evaluations=80, max_skip=0.7))
    assert result.schedule.masks == ()
    assert any("none is returned" in w for w in result.warnings)


def test_probes_cost_a_share_of_the_pairs_and_are_never_the_result() -> None:
    path = path_with(0.0)
    engine = Search(Task(path, Paired(), jobs.make_config(layers=True)), Store())
    longer = engine.space.repair([999, 600, 300, 50], 4)
    ask = next(proposals(engine.space, [longer]))
    assert ask.probe
    scores = engine._resolve(ask, {})
    assert all(s < float("inf") for s in scores)
    assert engine.scores == {}
    assert [record[-1].pairs for record in engine.counted.values()] == [48 // 4]
    assert engine.calls == 4  # one batch of a quarter of the pairs


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_masks_are_those_of_a_search_through_all(seed: int) -> None:
    space = Space(jobs.make_path().table(), SearchConfig(steps=2, layers=True, max_skip=0.9), COSTS)
    draw = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)).tolist()
    options = [frozenset({"small"}), frozenset({"idle"}), frozenset({"idle", "small", "vital"})]
    damage = [[(0.0, frozenset()), *zip(row, options)] for row in draw]
    allowed = [
        (sum(harm for harm, _ in choice), tuple(piece for _, piece in choice))
        for choice in itertools.product(*damage)
        if sum(COSTS[n] for _, piece in choice for n in piece) >= 1 - 1e-9
    ]
    found = cheapest(space, damage, 1.0)
    assert found[0] == min(allowed)[1]
    assert all(space.cost(masks, 3) <= 2 + 1e-9 for masks in found)
    assert cheapest(space, damage, 2.2) == []


def test_stretched_schedules_keep_their_ends_and_their_pace() -> None:
    space = Space(jobs.make_path().table(), SearchConfig(steps=3, layers=True), COSTS)
    assert space.resized((999, 666, 333), 4) == (999, 749, 500, 250)
    assert space.resized((999, 749, 500, 250), 3) == (999, 666, 333)
    open_end = Space(jobs.make_path().table(), SearchConfig(steps=2, terminal_zero=False), COSTS)
    assert open_end.resized((999, 500, 1), 4) == (999, 666, 334, 1)
    single = Space(jobs.make_path().table(), SearchConfig(steps=1), COSTS)
    assert single.resized((999,), 2) == (999, 500)


def test_a_table_without_room_for_a_step_more_is_searched_without_masks() -> None:
    config = jobs.make_config(layers=True, evaluations=14, steps=9, min_gap=110)
    result = search(path_with(0.0), config)
    assert result.schedule.steps <= 9
