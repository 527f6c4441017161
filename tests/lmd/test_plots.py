from __future__ import annotations

import math

import pytest
import torch
from slipstream.lmd import influence, mask_schedule, stretch_map
from slipstream.lmd.charts import (
    influence_chart,
    influence_heat_maps,
    influence_report,
    loss_chart,
    schedule_chart,
    stretch_charts,
    stretch_report,
)
from slipstream.lmd.plots import COLOURS, SIGNED, Line, colour_map, heat_map, line_chart, ticks, tiles, to_image


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3, 17) == [0, 5, 10, 15]
    assert ticks(0, 0.003)[1] == pytest.approx(0.0005)


def test_a_curve_is_drawn_where_its_values_are() -> None:
    chart = to_image(line_chart([Line("a", [0, 1], [1, 1])], "t", "x", "y"))[0]
    curve = (chart - torch.tensor(COLOURS[0]) / 255).abs().amax(-1) < 0.02
    rows = curve.nonzero()[:, 0]
    # y runs from 0 at row 348 to 1.05 at row 54: 1 lies at row 68.
    assert rows.float().mean() == pytest.approx(68, abs=1.5)
    assert curve.any(0).sum() > 500


def test_values_that_are_not_finite_leave_a_gap() -> None:
    whole = to_image(line_chart([Line("a", [0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0])], "t", "x", "y"))
    gap = to_image(line_chart([Line("a", [0, 1, 2, 3], [1.0, math.inf, math.nan, 1.0])], "t", "x", "y"))
    assert (whole != gap).any()
    assert to_image(line_chart([Line("a", [0.0], [math.nan])], "t", "x", "y")).shape == (1, 400, 640, 3)
    assert to_image(line_chart([], "t", "x", "y")).shape == (1, 400, 640, 3)


def test_colours_run_from_end_to_end() -> None:
    values = torch.tensor([[-5.0, -1.0, 0.0, 1.0, 5.0]])
    colours = colour_map(values, -1, 1, SIGNED)[0].tolist()
    assert colours[0] == colours[1] == list(SIGNED[0])
    assert colours[2] == list(SIGNED[2])
    assert colours[3] == colours[4] == list(SIGNED[-1])


def test_heat_maps_keep_the_aspect_and_take_odd_sizes() -> None:
    for shape in ((16, 16), (3, 50), (50, 3), (1, 1)):
        picture = heat_map(torch.rand(shape), "t", 0, 1, outline=torch.ones(shape), under=torch.rand(7, 9, 3))
        assert min(picture.size) > 60


def test_many_masks_are_thinned_out() -> None:
    few, many = (tiles(torch.zeros(n, 8, 8), ["x"] * n, "t") for n in (3, 500))
    assert few.height < many.height < 700


def test_every_chart_of_this_technique_draws() -> None:
    assert to_image(schedule_chart(mask_schedule(5, height=9, width=16))).shape[-1] == 3
    assert to_image(loss_chart([1.0], 10)).shape == (1, 400, 640, 3)
    assert to_image(loss_chart([1 / (k + 1) for k in range(1234)], 2000)).shape == (1, 400, 640, 3)
    run = torch.rand(3, 1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(8, 8)
    mask[2, 2] = 1
    profile = influence(run, 2 * run, mask)
    assert to_image(influence_chart(profile)).shape[1] > 600
    assert to_image(influence_chart(influence(run, run, mask))).shape[1] > 600
    assert influence_report(influence(run[:1], run[:1], mask)) == (
        "step 1: reach 0.00 cells to 1/e, 0.00 to 10 %; 0% of the difference lies outside; mean inside 0"
    )
    result = stretch_map(torch.zeros(2, 2, 8, 8))
    pictures = stretch_charts(result, torch.rand(2, 8, 8, 3))
    assert len({picture.size for picture in pictures}) == 1
    assert to_image(pictures[1]).shape[1] > 300
    assert len(influence_heat_maps(profile)) == 3
    assert to_image(loss_chart([0.5, 0.4], 10, start=7)).shape == (1, 400, 640, 3)
    assert (
        stretch_report(result).splitlines()[1] == "map 2: largest stretch x1.00, median x1.00; 0.00% of the cells fold"
    )
