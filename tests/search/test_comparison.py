from __future__ import annotations

import math

import pytest
import torch
from slipstream.core.progress import Step
from slipstream.search import LayerMask, Paired, Schedule, compare
from slipstream.search.comparison import Comparison, Interval, Row, interval
from slipstream.search.engine import SearchStep
from slipstream.search.plots import Axis, comparison_chart, round_numbers, search_chart, spread
from slipstream_tests.search import jobs


def test_intervals() -> None:
    assert interval([1.0, 2.0, 3.0]) == Interval(2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert interval([5.0]).half == math.inf
    assert str(interval([5.0])) == "5"
    assert interval([1.0, math.inf]).mean == math.inf


def test_more_steps_are_better_and_calls_are_told() -> None:
    path = jobs.make_path()
    entries = {f"{n} steps": path.stock(n)["beta"] for n in (2, 8, 4)}
    result = compare(path, entries, pairs=32, repeats=2)
    assert [r.name for r in result.rows] == ["8 steps", "4 steps", "2 steps"]
    assert [r.nfe for r in result.rows] == [8, 4, 2]
    table = result.table()
    assert table.split("\n")[1].startswith("8 steps")
    assert "32 pairs x 2 repeats" in table


def test_heun_costs_more_calls() -> None:
    path = jobs.make_path(sampler="heun")
    assert compare(path, {"a": path.stock(3)["beta"]}, pairs=2, repeats=1).rows[0].nfe == 5


def test_compare_uses_pairs_of_its_own_and_reports_progress() -> None:
    steps: list[Step] = []
    path = jobs.make_path()
    first = compare(path, {"a": path.stock(3)["beta"]}, pairs=4, repeats=3, callback=steps.append)
    assert [s.index for s in steps] == [1, 2, 3]
    assert first == compare(path, {"a": path.stock(3)["beta"]}, pairs=4, repeats=3)


def test_bad_entries() -> None:
    path = jobs.make_path()
    with pytest.raises(ValueError, match="at least one schedule"):
        compare(path, {})
    with pytest.raises(ValueError, match="descend strictly"):
        compare(path, {"a": torch.tensor([1.0, 2.0, 0.0])})
    with pytest.raises(ValueError, match="Expected `pairs`"):
        compare(path, {"a": path.stock(3)["beta"]}, pairs=0)


def test_a_schedule_with_a_mask_needs_a_model_that_can_skip() -> None:
    path = jobs.make_path()
    masked = Schedule((14.6, 1.0, 0.0), {}, masks=(LayerMask(1.0, 0.0, ("mid",)),))
    with pytest.raises(ValueError, match="whose blocks can be skipped"):
        compare(path, {"a": masked}, pairs=2)


def test_charts_are_pictures_whatever_the_numbers() -> None:
    for history in ((), ((1, 0.5),), ((1, 0.5), (4, 1e-7)), ((1, -0.1), (3, -0.2))):
        step = SearchStep("search", 4, 10, 14.6, best=0.1, history=history, baselines={"karras": 0.4, "beta": math.inf})
        image = search_chart(step, (14.6, 1.0, 0.0), {"karras": (14.6, 0.03, 0.0)})
        assert image.shape == (1, 420, 900, 3)
        assert 0 <= image.min() < 0.5 < image.max() <= 1
    assert search_chart(SearchStep("teacher", 0, 1, 1.0), (), {}).shape == (1, 420, 900, 3)


@pytest.mark.parametrize("means", [(0.1, 0.2), (0.0, 0.0), (-0.1, 0.4), (math.inf, 1.0), (math.inf, math.inf), (0.001, 90.0)])  # fmt: skip
def test_bars_whatever_the_numbers(means: tuple[float, float]) -> None:
    rows = tuple(Row("x" * (20 * i), (1.0, 0.0), 1, {"o": Interval(m, 0.1)}) for i, m in enumerate(means))
    assert comparison_chart(Comparison(rows, ("o",), 4, 3)).shape[1:] == (156, 610, 3)


def test_axes() -> None:
    axis = Axis(0.01, 10, 100, 0, log=True)
    assert 100 > axis(0.01) > axis(0.1) > axis(10) > 0
    assert axis(0.1) - axis(1) == pytest.approx(axis(1) - axis(10))
    assert set(axis.ticks()) >= {0.01, 0.1, 1.0, 10.0}
    assert all(1 < len(Axis(a, b, 0, 1, log=True).ticks()) <= 9 for a, b in ((0.01, 10), (0.5, 0.6), (1e-6, 1e3)))
    assert round_numbers(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert spread([10.0, 9.0, 0.0], -5) == [10.0, 5.0, 0.0]


def test_paired_is_the_default() -> None:
    path = jobs.make_path()
    assert compare(path, {"a": path.stock(3)["beta"]}, pairs=2, repeats=1).objectives == (Paired().id,)
