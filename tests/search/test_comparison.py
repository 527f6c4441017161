from __future__ import annotations

import math

import pytest
import torch
from slipstream.core.progress import Step
from slipstream.search import LayerMask, Paired, Schedule, compare
from slipstream.search.charts import comparison_chart, search_chart
from slipstream.search.comparison import Comparison, Interval, Row, interval
from slipstream.search.engine import SearchStep
from slipstream_tests.search import jobs
from torch import Tensor


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
    said = [(step.phase, step.index) for step in steps]
    # Many steps begin, then a schedule is scored.
    assert said == [part for i in range(3) for part in (("teacher", i), ("compare", i + 1))]
    assert {step.total for step in steps} == {3}
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
    for history in ((), ((1, 0.5),), ((1, 0.5), (4, 1e-7)), ((1, -0.1), (3, -0.2)), ((1, 0.0),)):
        step = SearchStep("search", 4, 10, 14.6, best=0.1, history=history, baselines={"karras": 0.4, "beta": math.inf})
        image = search_chart(step, (14.6, 1.0, 0.0), {"karras": (14.6, 0.03, 0.0)})
        assert image.shape == (1, 500, 960, 3)
        assert 0 <= image.min() < 0.5 < image.max() <= 1
    assert search_chart(SearchStep("teacher", 0, 1, 1.0), (), {}).shape == (1, 500, 960, 3)


def accent(image: Tensor) -> Tensor:
    return ((image[0] - torch.tensor([0x0B, 0x72, 0x85]) / 255).abs().amax(-1) < 0.03).nonzero().float()


def test_a_better_score_is_drawn_lower_and_the_best_level_where_it_lies() -> None:
    """The left panel's curve ends as much lower as its score is better; on a log axis equal factors are equal lengths."""
    ends = []
    for best in (0.1, 0.01):
        history = ((1, 1.0), (50, best))
        step = SearchStep("search", 99, 100, 14.6, best=best, history=history, baselines={"a": 0.001}, evaluated=99)
        dots = accent(search_chart(step, (14.6, 1.0, 0.1, 0.0), {}))
        left = dots[dots[:, 1] < 500]
        ends.append((left[:, 0].min().item(), left[left[:, 1] > left[:, 1].max() - 8][:, 0].mean().item()))
    (top, middle), (_, low) = ends
    assert (low - top) / (middle - top) == pytest.approx(2, rel=0.05)
    right = dots[dots[:, 1] > 560]
    columns = right[:, 1].round().unique()
    first, last = (right[right[:, 1] == c][:, 0].mean() for c in (columns[5], columns[-6]))
    assert last - first > 200


@pytest.mark.parametrize("means", [(0.1, 0.2), (0.0, 0.0), (-0.1, 0.4), (math.inf, 1.0), (math.inf, math.inf), (0.001, 90.0)])  # fmt: skip
def test_comparisons_whatever_the_numbers(means: tuple[float, float]) -> None:
    rows = tuple(Row("x" * (20 * i), (1.0, 0.0), 1, {"o": Interval(m, 0.1)}) for i, m in enumerate(means))
    assert comparison_chart(Comparison(rows, ("o",), 4, 3)).shape[1:] == (218, 760, 3)
    single = tuple(Row("x", (1.0, 0.0), 1, {"o": Interval(m, math.inf), "p": Interval(m, 0.1)}) for m in means)
    assert comparison_chart(Comparison(single, ("o", "p"), 4, 1)).shape[1:] == (218, 1220, 3)


def test_the_best_schedule_is_the_one_in_colour() -> None:
    scores = {"a": 0.1, "b": 0.2, "c": 0.4}
    rows = tuple(Row(n, (1.0, 0.0), 1, {"o": Interval(m, math.inf)}) for n, m in scores.items())
    dots = accent(comparison_chart(Comparison(rows, ("o",), 4, 1)))
    assert dots[:, 0].max() - dots[:, 0].min() < 30
    assert dots[:, 0].mean() < 120


def test_paired_is_the_default() -> None:
    path = jobs.make_path()
    assert compare(path, {"a": path.stock(3)["beta"]}, pairs=2, repeats=1).objectives == (Paired().id,)
