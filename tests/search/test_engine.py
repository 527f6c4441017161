from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest
import torch
from slipstream.core.denoiser import FLOW, Conditioning
from slipstream.core.progress import Step
from slipstream.search import ModelPath, Paired, ReferenceImages, SelfDistribution, search
from slipstream.search.engine import Search, SearchStep
from slipstream.search.evaluation import Task, judged, limits_of, rung_sizes
from slipstream.search.objectives import against
from slipstream.search.space import Candidate
from slipstream.search.store import Rung, Store
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.search import jobs
from torch import Tensor


class Raw:
    """The latents themselves, as vectors."""

    id = "raw"

    def of_latents(self, latents: Tensor) -> Tensor:
        return latents.flatten(1)

    def of_images(self, images: list[Tensor]) -> Tensor:
        return torch.stack(list(images))


def reference(count: int = 5000) -> ReferenceImages:
    return ReferenceImages(list(jobs.mixtures().ring().draw(count, 3).float()), Raw())


@pytest.fixture(scope="module")
def found():  # type: ignore[no-untyped-def]
    config = jobs.make_config(steps=4, pairs=1000, holdout_pairs=1000, evaluations=60, teacher_steps=60)
    return search(jobs.make_path(batch=1000), config, reference())


def test_the_searched_schedule_is_the_known_optimum_of_the_toy(found) -> None:  # type: ignore[no-untyped-def]
    """9 modes in 2-D, 4 steps: timesteps 999, 444, 214, 48 with Frechet distance 0.0266, a sixth of even timesteps'."""
    assert found.schedule.timesteps[0] == 999
    assert found.schedule.timesteps[1:] == pytest.approx((444, 214, 48), abs=15)
    path = jobs.make_path(seed=99, batch=20_000)
    score = against(Raw().of_images(list(jobs.mixtures().ring().draw(50_000, 4).float())), Raw(), "frechet")
    searched, even = (score(path.sample(s, range(20_000))) for s in (found.schedule.sigmas, path.stock(4)["uniform"]))
    assert searched < 0.030
    assert even / searched > 5.5
    assert found.schedule.objective["value"] < min(found.baselines.values())


def test_a_result_says_where_it_comes_from(found) -> None:  # type: ignore[no-untyped-def]
    schedule = found.schedule
    assert schedule.model["name"] == "ring"
    assert (schedule.sampler, schedule.cfg_scale, schedule.nfe, schedule.steps) == ("euler", 1.0, 4, 4)
    assert schedule.objective["id"].startswith("reference-frechet/raw/5000-")
    assert "ays_sd15" in schedule.objective["baselines"]
    assert schedule.search["evaluations"] == found.evaluations == 60
    assert schedule.sigmas[-1] == 0
    assert found.history == tuple(sorted(found.history, key=lambda p: -p[1]))


def test_same_seed_same_result_other_seed_other_pairs() -> None:
    results = [search(jobs.make_path(), jobs.make_config(evaluations=25)) for _ in range(2)]
    assert results[0].schedule.levels == results[1].schedule.levels
    assert results[0].history == results[1].history
    other = search(jobs.make_path(seed=8), jobs.make_config(evaluations=25))
    assert other.history != results[0].history


def test_the_batch_size_does_not_change_the_samples() -> None:
    sigmas = jobs.make_path().stock(3)["karras"]
    for sampler in ("euler", "euler_ancestral"):
        whole = jobs.make_path(sampler=sampler, batch=64).sample(sigmas, range(10))
        parts = jobs.make_path(sampler=sampler, batch=3).sample(sigmas, range(10))
        torch.testing.assert_close(whole, parts)
        torch.testing.assert_close(jobs.make_path(sampler=sampler).sample(sigmas, [7]), whole[7:8])


def test_memory_running_out_halves_the_batch() -> None:
    path = jobs.make_path(batch=16)
    model = path.model

    class Small:
        def __getattr__(self, name: str) -> object:
            return getattr(model, name)

        def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            if len(x) > 5:
                raise torch.OutOfMemoryError
            return model(x, sigma, cond)

    path.model = Small()
    sigmas = path.stock(3)["karras"]
    torch.testing.assert_close(path.sample(sigmas, range(16)), jobs.make_path().sample(sigmas, range(16)))
    assert path.batch == 4


@pytest.mark.parametrize("strategy", ["auto", "coordinate", "evolution", "published"])
def test_every_strategy_keeps_its_budget_and_returns_no_worse_than_stock(strategy: str) -> None:
    result = search(jobs.make_path(), jobs.make_config(strategy=strategy, evaluations=60))
    assert result.evaluations <= 60
    assert result.schedule.objective["value"] <= min(result.baselines.values())


def test_published_evaluates_fifty_per_generation_and_stops_after_ten() -> None:
    result = search(
        jobs.make_path(), jobs.make_config(strategy="published", evaluations=100_000, pairs=4, teacher_steps=8)
    )
    assert 500 <= result.evaluations <= 550  # D9: all generations are ranked


def test_the_budget_in_network_calls() -> None:
    result = search(jobs.make_path(), jobs.make_config(evaluations=None, calls=60, halving=False))
    assert 60 <= result.calls <= 63  # the evaluation that crosses the line is finished
    assert result.evaluations == 20


def test_the_budget_in_seconds_counts_what_earlier_runs_spent(tmp_path: pathlib.Path) -> None:
    config = jobs.make_config(evaluations=None, seconds=0.3)
    first = search(jobs.make_path(0.005), config, store=tmp_path / "a.sqlite")
    again = search(jobs.make_path(0.005), config, store=tmp_path / "a.sqlite")
    assert first.seconds >= 0.3
    assert again.evaluated_now == 0
    assert again.schedule.levels == first.schedule.levels


def test_one_step_leaves_nothing_to_search() -> None:
    result = search(jobs.make_path(), jobs.make_config(steps=1, evaluations=5))
    assert result.schedule.steps == 1
    assert any("nothing to search" in w for w in result.warnings)


def test_more_steps_than_the_model_has() -> None:
    with pytest.raises(ValueError, match="fit the model's 1000 levels"):
        search(jobs.make_path(), jobs.make_config(steps=900, min_gap=2))


@pytest.mark.parametrize(
    ("masked", "plain", "stock", "returned"),
    [(0.5, 0.6, 0.7, "masked"), (0.6, 0.5, 0.7, "plain"), (0.5, 0.5, 0.7, "plain"), (0.5, 0.6, 0.4, "stock")],
)
def test_a_mask_is_returned_only_when_it_is_better_on_held_out_pairs(
    masked: float, plain: float, stock: float, returned: str
) -> None:
    engine = Search(Task(jobs.make_path(), Paired(), jobs.make_config()), Store())
    engine.baselines = {"some": Candidate((14.0, 5.0, 0.5, 0.0))}
    with_mask = Candidate((14.6, 3.0, 1.0, 0.0), (frozenset(), frozenset({"a"}), frozenset()))
    without = Candidate((14.6, 4.0, 1.0, 0.0))
    engine.path.sample = lambda *_, **__: torch.zeros(1)  # type: ignore[method-assign]
    result = engine._result([(with_mask, masked), (without, plain)], {"some": stock})
    assert result.schedule.levels[1] == {"masked": 3.0, "plain": 4.0, "stock": 5.0}[returned]
    assert bool(result.schedule.masks) == (returned == "masked")


def test_finalists_are_no_near_copies_of_each_other() -> None:
    engine = Search(Task(jobs.make_path(), Paired(), jobs.make_config()), Store())  # three finalists
    made = [
        engine.space.candidate(g)
        for g in ((999, 500, 100), (999, 505, 95), (999, 400, 100), (999, 519, 100), (999, 500, 30))
    ]
    assert engine._apart(made) == [made[0], made[2], made[4]]
    masked = Candidate(made[0].levels, (frozenset({"a"}), frozenset(), frozenset()))
    assert engine._apart([made[0], masked, made[1]]) == [
        made[0],
        masked,
        made[1],
    ]  # another mask is no copy; room is used
    assert engine._apart(made[:1]) == made[:1]


def test_a_model_with_few_levels() -> None:
    path = jobs.make_path()
    few = path.table()[::50]
    path.table = lambda: few  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="fit the model's 20 levels"):
        search(path, jobs.make_config(steps=21))
    assert search(path, jobs.make_config(steps=20, evaluations=3)).schedule.steps == 20


class Nothing:
    id, needs_teacher = "nothing", False

    def prepare(self, bank: object):  # type: ignore[no-untyped-def]
        return lambda latents: float("nan")


def test_an_objective_that_is_always_nan() -> None:
    with pytest.raises(ValueError, match="'nothing' to give a finite score"):
        search(jobs.make_path(), jobs.make_config(), Nothing())


class SometimesNan(Paired):
    def prepare(self, bank):  # type: ignore[no-untyped-def]
        score = super().prepare(bank)
        seen: list[float] = []

        def broken(latents: Tensor) -> float:
            seen.append(score(latents))
            return float("nan") if len(seen) % 2 else seen[-1]

        return broken


def test_nan_is_worst_never_best() -> None:
    result = search(jobs.make_path(), jobs.make_config(halving=False, evaluations=30, seed=1), SometimesNan())
    assert math.isfinite(result.schedule.objective["value"])
    assert all(math.isfinite(s) for _, s in result.history)


def test_a_sampler_that_ignores_sigmas() -> None:
    path = jobs.make_path()
    own = path.stock(3)["karras"]
    sample = path.sample
    path.sample = lambda sigmas, *args, **kwargs: sample(own, *args, **kwargs)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="ignores its sigmas"):
        search(path, jobs.make_config())


def test_a_callback_that_raises_ends_the_search_and_the_store_keeps_all(tmp_path: pathlib.Path) -> None:
    expected = search(jobs.make_path(), jobs.make_config())

    class StopError(Exception):
        pass

    def stop(step: Step) -> None:
        if step.phase == "search" and step.index == 12:
            raise StopError

    with pytest.raises(StopError):
        search(jobs.make_path(), jobs.make_config(), store=tmp_path / "a.sqlite", callback=stop)
    result = search(jobs.make_path(), jobs.make_config(), store=tmp_path / "a.sqlite")
    assert result.schedule.levels == expected.schedule.levels
    assert result.evaluated_now == expected.evaluated_now - 12


def test_progress_counts_up_and_carries_the_best_so_far() -> None:
    steps: list[SearchStep] = []
    result = search(jobs.make_path(), jobs.make_config(), callback=steps.append)
    assert steps[0].phase == "teacher"
    searched = [s for s in steps if s.phase == "search"]
    assert [s.index for s in searched] == list(range(1, 41))
    assert all(s.total == 40 for s in searched)
    assert searched[-1].best == result.history[-1][1]
    assert searched[-1].baselines.keys() >= {"karras", "beta"}
    # A many-step run is announced when it begins: the one that the search aims at, and that on held-out pairs.
    at = [i for i, step in enumerate(steps) if step.phase == "teacher"]
    assert at[-1] > steps.index(searched[-1])
    assert steps[-1].phase == "final"
    assert steps[-1].index == steps[-1].total


def test_the_teacher_runs_once_and_is_kept(tmp_path: pathlib.Path) -> None:
    path = jobs.make_path()
    search(path, jobs.make_config(evaluations=11), store=tmp_path / "a.sqlite")
    again = jobs.make_path()
    search(again, jobs.make_config(evaluations=11), store=tmp_path / "a.sqlite")
    assert again.calls == 3  # only the calls per sample of the winner are counted again


def test_searching_costs_what_the_pairs_cost() -> None:
    """Teacher: 30 calls for the search pairs, 30 for the held-out ones, 30 for the states of the first eight."""
    path, store = jobs.make_path(), Store()
    engine = Search(Task(path, Paired(), jobs.make_config(halving=False, evaluations=15)), store)
    engine.run()
    assert engine.calls == 45
    assert path.calls == 90 + 15 * 3 + store.count("holdout 48") * 3 + 3


def test_halving_spends_less_and_finds_no_worse() -> None:
    full = search(jobs.make_path(batch=12), jobs.make_config(halving=False, evaluations=40))
    halved = search(jobs.make_path(batch=12), jobs.make_config(evaluations=40))
    assert halved.calls < 0.9 * full.calls
    assert halved.schedule.objective["value"] <= full.schedule.objective["value"] * 1.02


def test_a_free_first_level_and_a_free_end() -> None:
    free = search(jobs.make_path(), jobs.make_config(pin_first=False, evaluations=60, steps=2))
    assert free.schedule.steps == 2
    ends = search(jobs.make_path(), jobs.make_config(terminal_zero=False, evaluations=30, steps=3))
    assert ends.schedule.steps == 3


def test_a_stock_schedule_that_begins_lower_is_not_returned_with_the_first_level_pinned(monkeypatch: Any) -> None:
    free = search(jobs.make_path(), jobs.make_config(pin_first=False, evaluations=60, steps=2)).schedule.levels
    stock = jobs.SlowPath.stock
    monkeypatch.setattr(jobs.SlowPath, "stock", lambda path, steps: {**stock(path, steps), "low": torch.tensor(free)})
    pinned = search(jobs.make_path(), jobs.make_config(evaluations=20, steps=2))
    assert pinned.baselines["low"] < pinned.schedule.objective["value"]
    assert free[0] < pinned.schedule.levels[0] == jobs.make_path().model.sigma_max
    asked = search(jobs.make_path(), jobs.make_config(evaluations=20, steps=2), given={"mine": torch.tensor(free)})
    assert asked.schedule.levels == pytest.approx(free, rel=1e-6)


def test_flow_models() -> None:
    model = GaussianDenoiser(std=0.5, space=FLOW)
    path = ModelPath(model, constant_cond(), size=(1, 2, 2), batch=64)
    result = search(path, jobs.make_config(evaluations=30))
    assert result.schedule.levels[0] == 1.0
    assert result.schedule.is_flow
    assert result.schedule.objective["value"] <= min(result.baselines.values())


def test_self_distribution_as_the_last_word() -> None:
    result = search(
        jobs.make_path(), jobs.make_config(pairs=64, holdout_pairs=200), Paired(), SelfDistribution(Raw(), "mmd")
    )
    assert result.schedule.objective["id"] == "self-mmd/raw"
    assert result.schedule.search["objective"] == "paired/latents"


def test_rungs_and_limits() -> None:
    assert rung_sizes(16, True) == (4, 8, 16)
    assert rung_sizes(16, False) == (16,)
    assert rung_sizes(5, True) == (5,)
    record = tuple(Rung(n, s, 0.1, 1) for n, s in ((4, 1.0), (8, 2.0), (16, 1.5)))
    assert limits_of(record, 0.4, 3) == pytest.approx((1.4, 2.4, math.inf))
    assert limits_of(record[:1], 0.4, 3) == (math.inf,) * 3
    assert limits_of(tuple(Rung(4, -1.0, 0, 0) for _ in range(3)), 0.5, 3)[:2] == (-0.5, -0.75)
    assert judged(record, (1.4, 1.9, math.inf), 3) == (math.inf, record[:2], True)
    assert judged(record, (math.inf,) * 3, 3) == (1.5, record, True)
    assert judged(record[:2], (math.inf,) * 3, 3)[2] is False
    nan = (Rung(4, math.inf, 0.1, 1),)
    assert judged(nan, (math.inf,) * 3, 3) == (math.inf, nan, True)


def test_an_executor_needs_a_factory() -> None:
    with pytest.raises(ValueError, match="Expected `factory`"):
        search(jobs.make_path(), jobs.make_config(), executor=object())


def test_no_candidate_is_sampled_twice() -> None:
    engine = Search(Task(jobs.make_path(), Paired(), jobs.make_config(halving=False)), Store())
    engine.run()
    assert engine.dispatch.evaluated == len(engine.counted) + engine.store.count("holdout 48")
