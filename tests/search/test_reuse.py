"""A search of call reuse keeps its budget exactly, starts from a plan that is exact where it can be, and beats plain steps."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from slipstream.core import VE
from slipstream.core.layers import LayerMask
from slipstream.core.reuse import ReuseSpan
from slipstream.core.schedules import make_sigmas
from slipstream.search import Schedule, ScheduleError, SearchConfig, search
from slipstream.search.charts import search_chart
from slipstream.search.coefficients import Course, followed_weights, planned_weights, step_weights
from slipstream.search.engine import SearchStep
from slipstream.search.paths import Trajectory
from slipstream.search.report import result_text
from slipstream.search.space import Candidate, Space, candidate_of
from slipstream.search.starts import cheapest_extrapolated_path, extrapolated_jump_costs
from slipstream.search.strategies import cross, mutate
from slipstream_tests.search import jobs

SIGMAS = [8.0, 6.0, 4.5, 3.0, 2.0, 1.0, 0.5]


def trajectory(slope) -> tuple[Trajectory, torch.Tensor]:
    """The exact states of an ODE whose slope at sigma is `slope(sigma)`, for a batch of one with two values."""
    integral = lambda s: (slope(0) * s + (slope(1) - slope(0)) * s**2 / 2) * torch.ones(1, 2)  # noqa: E731
    states = [integral(s) for s in SIGMAS]
    denoised = [x - s * slope(s) for x, s in zip(states, SIGMAS)]
    return Trajectory(list(SIGMAS), states, denoised), integral(0.0)


def test_jumps_on_a_linear_slope_cost_nothing_and_straight_ones_do():
    costs = extrapolated_jump_costs(*trajectory(lambda s: 1 + 0.5 * s), VE)
    for h in range(7):
        for i in range(h + 1, 7):
            assert costs[h, i, i + 1 :].max() < 1e-5
    assert costs[0, 0, 3] > 0.1
    assert torch.isinf(costs[3, 2]).all()
    assert torch.isinf(costs[0, 3, 2])


def test_the_plan_begins_at_the_first_state_and_makes_the_calls_that_it_may():
    costs = extrapolated_jump_costs(*trajectory(lambda s: 1 + 0.5 * s), VE)
    for calls in (1, 2, 3, 7):
        path = cheapest_extrapolated_path(costs, calls)
        assert path[0] == 0
        assert len(path) == calls
        assert path == sorted(set(path))
    # On a linear slope the best second call is the next one: from there all is exact.
    assert cheapest_extrapolated_path(costs, 2) == [0, 1]


def test_planned_coefficients_are_exact_on_a_linear_slope():
    """Levels of the run itself: two slopes give any linear one, so each step lands on the run's own state."""
    course = Course.of(*trajectory(lambda s: torch.tensor([1 + 0.5 * s, 2 - 0.25 * s])))
    levels = [8.0, 6.0, 3.0, 1.0, 0.0]
    weights = planned_weights(course, levels, 2)
    assert [len(w) for w in weights] == [1, 2, 2, 2]
    x = course.state(6.0)
    for i in range(1, 4):
        slopes = (course.slope(levels[i]), course.slope(levels[i - 1]))
        x = x + (levels[i + 1] - levels[i]) * sum(w * d for w, d in zip(weights[i], slopes))
        torch.testing.assert_close(x, course.state(levels[i + 1]), atol=5e-3, rtol=0)


def test_slopes_that_are_the_same_share_the_weight_and_stay_small():
    slope = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert step_weights([slope, slope], 2 * slope) == pytest.approx((1.5, 0.5), abs=0.01)


def test_coefficients_on_the_way_mend_what_the_first_step_missed():
    path = jobs.make_path()
    levels = make_sigmas("karras", path.model.levels, 3)
    watch = Trajectory([], [], [])
    final = path.sample(make_sigmas("karras", path.model.levels, 16), range(4), watch=watch)
    course = Course.of(watch, final)
    error = {}
    for name, weights in {
        "euler": (),
        "planned": planned_weights(course, levels.tolist(), 2),
        "followed": followed_weights(path, course, levels.tolist(), 2, range(4)),
    }.items():
        spans = Candidate(tuple(levels.tolist()), weights=weights).reuse_spans()
        error[name] = float((path.sample(levels, range(4), reuse=spans) - final).pow(2).mean())
    assert error["followed"] < error["planned"] < 0.5 * error["euler"]


def test_a_course_comes_back_from_the_store_as_it_was():
    course = Course.of(*trajectory(lambda s: 1 + 0.5 * s))
    again = Course.unpack(course.pack())
    for name in ("sigmas", "states", "slopes"):
        assert torch.equal(getattr(course, name), getattr(again, name))


@pytest.mark.parametrize("kinds", [(None, "last", None, "last", "last"), (None, None, None, "linear", None)])
def test_a_schedule_s_spans_give_its_candidate_back(kinds):
    calls = kinds.count(None)
    weights = ((1.0,), (1.5, -0.5), (0.9, 0.2, -0.1), (1.0,))[:calls] if "last" in kinds else ()
    candidate = Candidate((8.0, 6.0, 4.0, 2.0, 1.0, 0.0), (), kinds, weights)
    assert candidate_of(candidate.levels, reuse=candidate.reuse_spans()) == candidate
    assert len(candidate.reuse_spans()) == (calls if weights else kinds.count("linear"))


def test_reused_steps_fill_the_widest_gaps():
    space = Space(torch.linspace(0.01, 10, 100, dtype=torch.float64), SearchConfig(steps=10, computed=3))
    fill = space.filled((99, 90, 30), "last")
    assert sum(count for count, _ in fill) == 7
    assert [count for count, _ in fill] == [0, 5, 2]
    candidate = space.candidate((99, 90, 30), (), fill)
    assert candidate.steps == 10
    assert [kind for kind in candidate.reuse if kind] == ["last"] * 7
    assert candidate.knots == (space.table[99], space.table[90], space.table[30], 0.0)
    assert list(candidate.levels) == sorted(set(candidate.levels), reverse=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = jobs.make_path()
    full = make_sigmas("karras", path.model.levels, 16)
    config = jobs.make_config(steps=16, computed=5, full=tuple(full.tolist()), evaluations=25)
    store = tmp_path_factory.mktemp("reuse") / "job.sqlite"
    return path, config, store, search(path, config, store=store)


def test_the_budget_is_exact_and_better_than_plain_steps(found):
    path, _, _, result = found
    schedule = result.schedule
    assert (schedule.steps, schedule.nfe, len(schedule.reuse)) == (16, 5, 5)
    assert [len(span.weights) for span in schedule.reuse] in ([1, 2, 2, 2, 2], [1, 2, 3, 3, 3])
    begin = path.calls
    path.sample(schedule.sigmas, [0], reuse=schedule.reuse)
    assert path.calls - begin == 5
    assert schedule.objective["value"] < 0.5 * min(result.baselines.values())


def test_fitted_coefficients_pay(found):
    path, config, _, result = found
    plain = search(path, dataclasses.replace(config, fit=False))
    assert {span.kind for span in plain.schedule.reuse} <= {"last", "linear"}
    assert (plain.schedule.nfe, len(plain.schedule.reuse)) == (5, 11)
    assert result.schedule.objective["value"] < 0.5 * plain.schedule.objective["value"]


def test_the_result_is_no_worse_than_what_is_given(found):
    """What a search with fewer calls found is returned where a hopeless search with more has nothing better."""
    path, config, _, fewer = found
    poor = dataclasses.replace(config, steps=20, computed=6, evaluations=1, fit=False, finalists=1)
    begun = search(path, poor, given={"five calls": fewer.schedule})
    value = begun.baselines["five calls"]
    assert value == pytest.approx(fewer.schedule.objective["value"])
    assert value < search(path, poor).schedule.objective["value"]
    assert begun.schedule.objective["value"] == value
    assert (begun.schedule.nfe, begun.schedule.reuse) == (5, fewer.schedule.reuse)
    assert begun.warnings[-1].startswith("No searched schedule was better than 'five calls'")


def test_a_search_begins_from_what_is_given(found):
    path, config, _, best = found
    made = candidate_of(best.schedule.levels, reuse=best.schedule.reuse)
    tight = dataclasses.replace(config, evaluations=14)
    scores = [search(path, tight, given=given).history[-1][1] for given in (None, {"list": torch.tensor(made.knots)})]
    assert scores[1] < scores[0]


def test_a_list_with_more_calls_is_a_start_and_no_rival(found):
    path, config, _, _ = found
    full = make_sigmas("karras", path.model.levels, 16)
    result = search(path, dataclasses.replace(config, evaluations=8), given={"full": full})
    assert "full" not in result.baselines
    assert result.schedule.nfe == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Schedule((8.0, 0.0), {"sigma_min": 0.1, "sigma_max": 8.0}, masks=(LayerMask(8.0, 1.0, ("a",)),)), "without layer masks"),
        (torch.tensor([700.0, 1.0, 0.0]), r"at most sigma .* but 'other' begins at 700\. It was made for another model"),
        (torch.tensor([1.0, 0.5]), "end at 0 to begin from, but 'other' ends at 0.5"),
        (torch.tensor([1.0, 2.0, 0.0]), "descend strictly"),
    ],
)  # fmt: skip
def test_what_cannot_be_begun_from_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        search(jobs.make_path(), jobs.make_config(evaluations=1), given={"other": given})


@pytest.mark.parametrize("fit", [None, False])
def test_evolution_keeps_the_budget_and_improves(fit):
    path = jobs.make_path()
    full = tuple(make_sigmas("karras", path.model.levels, 12).tolist())
    config = jobs.make_config(steps=12, computed=4, full=full, evaluations=60, strategy="evolution", fit=fit, pairs=16)
    result = search(path, config)
    assert (result.schedule.steps, result.schedule.nfe) == (12, 4)
    assert len(result.history) > 1
    assert result.schedule.objective["value"] <= min(result.baselines.values())


def test_children_reuse_as_many_steps_as_they_may():
    space = Space(torch.linspace(0.01, 10, 100, dtype=torch.float64), SearchConfig(steps=10, computed=4))
    rng = random.Random(0)
    parents = [((99, 70, 40, 10), (), space.filled((99, 70, 40, 10), kind)) for kind in ("linear", "last")]
    children = [cross(space, *parents, rng) for _ in range(100)]
    children += [mutate(space, rng.choice(parents), 0.5, 0.0, rng) for _ in range(100)]
    for genome, masks, fill in children:
        assert (len(genome), masks, len(fill)) == (4, (), 4)
        assert sum(count for count, _ in fill) == 6
        assert space.candidate(genome, masks, fill).steps == 10
        assert space.point_of(space.candidate(genome, masks, fill))[0] == genome
    assert len({fill for _, _, fill in children}) > 20
    assert len({genome for genome, _, _ in children}) > 50


def test_another_solver_keeps_its_own_coefficients():
    path = jobs.make_path(sampler="dpmpp_2m")
    config = jobs.make_config(steps=8, computed=4, evaluations=6)
    assert not any(span.weights for span in search(path, config).schedule.reuse)
    with pytest.raises(ValueError, match="Expected the sampler euler with `fit`, but got dpmpp_2m"):
        search(path, dataclasses.replace(config, fit=True))


def test_the_same_search_again_evaluates_nothing(found):
    _, config, store, result = found
    path = jobs.make_path()
    again = search(path, config, store=store)
    assert again.evaluated_now == 0
    assert path.calls == 5  # the calls of the winner are counted; no coefficient is fitted again
    assert again.schedule.levels == result.schedule.levels
    assert again.schedule.reuse == result.schedule.reuse


def test_the_profile_tells_what_other_budgets_come_to(found):
    result = found[3]
    counts, errors = zip(*result.profile)
    assert counts == (3, 4, 5, 6, 8, 10, 12)
    assert errors[-1] < 0.1 * errors[0]
    assert "3: " in result_text(result)
    plain, wide = (
        search_chart(SearchStep("final", 1, 1, 1.0, None), (8.0, 0.0), {}, p, 5) for p in ((), result.profile)
    )
    assert wide.shape[1] == plain.shape[1]
    assert wide.shape[2] > plain.shape[2]


def test_a_file_keeps_the_reuse_and_one_without_is_version_1(found, tmp_path):
    schedule = found[3].schedule
    for name in ("a.json", "a.safetensors"):
        assert Schedule.load(schedule.save(tmp_path / name)).reuse == schedule.reuse
    assert json.loads((tmp_path / "a.json").read_text())["version"] == 2
    plain = Schedule((1.0, 0.0), {"sigma_min": 0.1, "sigma_max": 1.0})
    assert plain.to_dict()["version"] == 1
    assert "reuse" not in plain.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_low": 5.0}, "sigma_low below sigma_high"),
        ({"kind": "cubic"}, r"Expected `reuse\[0\].kind` one of last, linear, fitted"),
        ({"weights": [1.0]}, r"no `weights` for last"),
        ({"kind": "fitted"}, r"1 to 4 `weights`"),
        ({"kind": "fitted", "weights": [1.0] * 5}, r"1 to 4 `weights`"),
        ({"kind": "fitted", "weights": [float("nan")]}, r"reuse\[0\].weights"),
        ({"kind": "fitted", "weights": "1"}, r"reuse\[0\].weights"),
        ({"more": 1}, "an object with sigma_high, sigma_low and kind"),
        ({"sigma_high": 1e9}, r"Expected `reuse\[0\].sigma_high`"),
        ({"sigma_high": 80.0}, "first step has nothing to reuse"),
        ({"sigma_high": 3.0}, r"`reuse\[0\]` around a level of the schedule, but got sigma 3 to 0"),
    ],
)
def test_a_bad_file_is_refused_by_field(change, message):
    data = Schedule((8.0, 4.0, 0.0), {"sigma_min": 0.1, "sigma_max": 8.0}, nfe=1).to_dict()
    data |= {"version": 2, "reuse": [{"sigma_high": 4.0, "sigma_low": 0.0, "kind": "last"} | change]}
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_dict(data)


def test_spans_that_overlap_are_refused():
    data = Schedule((8.0, 4.0, 2.0, 0.0), {"sigma_min": 0.1, "sigma_max": 8.0}, nfe=1).to_dict()
    spans = [
        {"sigma_high": 2.0, "sigma_low": 0.0, "kind": "last"},
        {"sigma_high": 4.0, "sigma_low": 1.0, "kind": "linear"},
    ]
    with pytest.raises(ScheduleError, match="without overlaps, but got one from sigma 4 to 1 and one from 2"):
        Schedule.from_dict({**data, "version": 2, "reuse": spans})
    spans[1]["sigma_low"] = 2.0
    assert len(Schedule.from_dict({**data, "version": 2, "reuse": spans}).reuse) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"computed": 0}, "Expected `computed`"),
        ({"computed": 5}, "Expected `computed`"),
        ({"computed": 2, "layers": True}, "`layers` off"),
        ({"computed": 2, "strategy": "published"}, "Expected a `strategy` other than published"),
        ({"full": (1.0, 2.0, 0.0)}, "descend strictly"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(steps=4, **changes)


def test_a_schedule_with_reuse_is_not_resampled():
    schedule = Schedule((8.0, 4.0, 0.0), {"sigma_min": 0.1, "sigma_max": 8.0}, nfe=1, reuse=(ReuseSpan(4.0, 0.0),))
    with pytest.raises(ValueError, match="Search again with the number of calls"):
        schedule.resample(4)
