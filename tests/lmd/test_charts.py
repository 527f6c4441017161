from __future__ import annotations

import math

import pytest
import torch
from slipstream.lmd import influence, mask_schedule, stretch_map
from slipstream.lmd.charts import (
    _tiled,
    heat_map,
    influence_chart,
    influence_heat_maps,
    influence_report,
    loss_chart,
    schedule_chart,
    stretch_charts,
    stretch_report,
)
from slipstream.lmd.influence import InfluenceProfile


def test_heat_maps_keep_the_aspect_and_take_odd_sizes() -> None:
    assert heat_map(torch.rand(16, 16), "t", 0, 1).shape == (1, 580, 500, 3)
    assert heat_map(torch.rand(16, 32), "t", 0, 1).shape == (1, 360, 500, 3)
    for shape in ((3, 50), (50, 3), (1, 1)):
        picture = heat_map(torch.rand(shape), "t", 0, 1, outline=torch.ones(shape), under=torch.rand(7, 9, 3))
        assert min(picture.shape[1:3]) > 60


def test_each_cell_has_its_colour_and_row_zero_is_on_top() -> None:
    values = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    image = heat_map(values, "t", 0, 1)[0]
    cells = [image[56 + 110 + 220 * y, 30 + 110 + 220 * x] for y in (0, 1) for x in (0, 1)]
    dark, bright = torch.tensor([68, 1, 84]) / 255, torch.tensor([253, 231, 37]) / 255
    for cell, expected in zip(cells, (dark, bright, bright, dark)):
        torch.testing.assert_close(cell, expected, atol=0.01, rtol=0)


def test_values_beyond_the_scale_take_its_ends() -> None:
    image = heat_map(torch.tensor([[-5.0, 5.0]]), "t", -1, 1, "RdBu_r")[0]
    middle = 56 + 55
    assert image[middle, 60, 2] > image[middle, 60, 0]  # blue
    assert image[middle, 440, 0] > image[middle, 440, 2]  # red


def test_an_outline_is_white_in_black() -> None:
    mask = torch.zeros(4, 4)
    mask[1:3, 1:3] = 1
    plain, outlined = (heat_map(torch.full((4, 4), 0.5), "t", 0, 1, outline=m)[0] for m in (None, mask))
    changed = (plain != outlined).any(-1).nonzero().float()
    assert changed.min(0).values.tolist() == pytest.approx([56 + 110, 30 + 110], abs=5)
    assert changed.max(0).values.tolist() == pytest.approx([56 + 330, 30 + 330], abs=5)
    edge = outlined[56 + 220, 30 + 104 : 30 + 116]
    assert edge.min() < 0.1
    assert edge.min(-1).values.max() > 0.9
    assert torch.equal(
        heat_map(torch.ones(4, 4), "t", 0, 1, outline=torch.zeros(4, 4)), heat_map(torch.ones(4, 4), "t", 0, 1)
    )


def test_many_masks_are_thinned_out() -> None:
    few, many = (schedule_chart(mask_schedule(n, "linear", patch=16)) for n in (3, 500))
    assert few.shape[1] < many.shape[1] < 1200


def test_masks_of_pixels_are_drawn_no_larger_than_a_tile() -> None:
    tiles, columns = _tiled(torch.ones(6, 512, 2048))
    assert columns == 6
    assert tiles.size < 1e6, "enlarged eight times, six masks of 512 x 512 took 46 s and gigabytes"


def test_values_that_are_not_finite_are_left_out() -> None:
    assert loss_chart([math.nan], 10).shape == (1, 460, 800, 3)
    assert loss_chart([], 10).shape == (1, 460, 800, 3)
    whole = (math.inf, 3.0)
    profile = InfluenceProfile(
        torch.arange(3.0), torch.rand(2, 3), torch.zeros(2, 4, 4), torch.tensor(whole), torch.tensor([math.inf] * 2), torch.ones(2)
    )  # fmt: skip
    assert influence_chart(profile).shape == (1, 820, 1040, 3)


def test_every_chart_of_this_technique_draws() -> None:
    assert schedule_chart(mask_schedule(5, height=9, width=16)).shape[-1] == 3
    assert schedule_chart(mask_schedule(1, "fixed", height=64, width=8)).shape[-1] == 3
    assert loss_chart([1 / (k + 1) for k in range(1234)], 2000, start=7).shape == (1, 460, 800, 3)
    run = torch.rand(3, 1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(8, 8)
    mask[2, 2] = 1
    profile = influence(run, 2 * run, mask)
    assert influence_chart(profile).shape == (1, 820, 1040, 3)
    assert influence_chart(influence(run, run, mask)).shape == (1, 820, 1040, 3)
    assert influence_chart(influence(run[:1], run[:1], mask)).shape == (1, 460, 1040, 3)
    assert influence_report(influence(run[:1], run[:1], mask)) == (
        "step 1: reach 0.00 cells to 1/e, 0.00 to 10 %; 0% of the difference lies outside; mean inside 0"
    )
    assert influence_report(profile, "pixels").splitlines()[2].startswith("image 3: reach ")
    everywhere = influence(run[:1], 2 * run[:1], torch.ones(8, 8))
    assert influence_report(everywhere).startswith("step 1: reach beyond the image to 1/e, beyond the image to 10 %;")
    assert influence_heat_maps(profile).shape == (3, 580, 500, 3)
    result = stretch_map(torch.zeros(2, 2, 8, 8))
    assert stretch_charts(result, torch.rand(2, 8, 8, 3)).shape == (2, 580, 500, 3)
    assert (
        stretch_report(result).splitlines()[1] == "map 2: largest stretch x1.00, median x1.00; 0.00% of the pixels fold"
    )
