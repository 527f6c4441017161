"""What is drawn by hand becomes the mask that its JSON says."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from slipstream.core.drawing import Drawing, Shape, paint, read_drawing


def painted(*shapes: dict[str, Any], size: tuple[int, int] = (80, 60), under: float = 0.0) -> torch.Tensor:
    drawing = read_drawing(json.dumps({"size": list(size), "shapes": shapes}))
    assert drawing.size == (size[1], size[0])
    return paint(drawing, torch.full((size[1], size[0]), under))


def test_a_box_covers_its_pixels_in_any_order_of_its_corners() -> None:
    wanted = torch.zeros(60, 80)
    wanted[10:30, 20:50] = 1
    assert torch.equal(painted({"box": [20, 10, 50, 30]}), wanted)
    assert torch.equal(painted({"box": [50, 30, 20, 10]}), wanted)
    assert not painted({"box": [20, 10, 20, 30]}).any()


def test_a_box_beyond_the_image_is_cut_off() -> None:
    assert painted({"box": [-20, -10, 900, 900]}).all()
    assert not painted({"box": [100, 10, 120, 20]}).any()


@pytest.mark.parametrize("width", [1, 7, 24])
def test_a_dot_is_a_disc(width: int) -> None:
    mask = painted({"brush": [[40, 30]], "width": width})
    ys, xs = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    distance = torch.hypot(xs - 40, ys - 30)
    assert mask[distance < width / 2 - 1].all()
    assert not mask[distance > width / 2 + 1].any()
    assert mask.any()


def test_a_stroke_is_all_that_lies_within_half_its_width() -> None:
    start, end, width = torch.tensor([15.0, 20.0]), torch.tensor([60.0, 40.0]), 14
    mask = painted({"brush": [start.tolist(), end.tolist()], "width": width})
    ys, xs = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    pixels = torch.stack([xs, ys], -1)
    along = ((pixels - start) @ (end - start) / (end - start).square().sum()).clamp(0, 1)
    distance = (pixels - start - along[..., None] * (end - start)).norm(dim=-1)
    assert mask[distance < width / 2 - 1].all()
    assert not mask[distance > width / 2 + 1].any()


def test_an_outline_is_filled() -> None:
    mask = painted({"outline": [[10, 10], [70, 10], [10, 50]]})
    assert math.isclose(float(mask.sum()), 60 * 40 / 2, rel_tol=0.06)
    assert mask[15, 15]
    assert not mask[45, 65]


def test_shapes_are_painted_and_erased_in_their_order() -> None:
    box, hole, dot = {"box": [10, 10, 70, 50]}, {"erase": [[40, 30]], "width": 20}, {"brush": [[40, 30]], "width": 6}
    assert not painted(box, hole)[30, 40]
    assert painted(box, hole, dot)[30, 40]
    assert torch.equal(painted(hole, box), painted(box))


def test_a_connected_mask_lies_below_and_keeps_its_soft_edge() -> None:
    mask = painted({"box": [0, 0, 10, 10]}, {"erase": [[70, 50]], "width": 10}, under=0.5)
    assert mask[5, 5] == 1
    assert mask[50, 70] == 0
    assert mask[30, 40] == 0.5


def test_an_empty_text_is_an_empty_drawing() -> None:
    assert read_drawing(" ") == Drawing()
    assert read_drawing('{"shapes": []}') == Drawing()
    mask = torch.rand(4, 5)
    assert torch.equal(paint(Drawing(), mask), mask)
    assert read_drawing('{"shapes": [{"box": [1, 2, 3, 4]}]}') == Drawing((Shape("box", ((1, 2), (3, 4))),))


@pytest.mark.parametrize(
    "text",
    [
        "a circle", "[1, 2]", '{"shapes": 3}', '{"shapes": [{"circle": [1, 2]}]}', '{"shapes": [{"box": [1, 2, 3]}]}',
        '{"shapes": [{"brush": [[1, 2]]}]}', '{"shapes": [{"brush": [], "width": 3}]}', '{"shapes": [{"outline": [[NaN, 1]]}]}',
        '{"size": [1e999, 4], "shapes": []}', '{"shapes": [{"brush": [[1' + "0" * 400 + ', 2]], "width": 3}]}', "[" * 20000,
        '{"size": [0, 4], "shapes": []}', '{"size": [4], "shapes": []}', '{"shapes": [{"box": [1, 2, 3, 4], "brush": [[1, 2]]}]}',
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expected `canvas` as JSON such as .*Clear it, or draw again"):
        read_drawing(text)
