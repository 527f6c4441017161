"""Points are read in every form that people have them in, and written in one."""

from __future__ import annotations

import pytest
from slipstream.core.points import read_pairs, read_points, write_points


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("", []), ("[]", []), ('[{"x": 12, "y": 8.5}]', [(12, 8.5)]), ("[[1, 2], [3, 4]]", [(1, 2), (3, 4)]), ("[[1, 2]]", [(1, 2)]),
        ('{"positive": [{"x": 5, "y": 6}], "negative": [{"x": 0, "y": 0}]}', [(5, 6)]), ('{"x": 7, "y": 8}', [(7, 8)]),
        ('[[{"x": 1, "y": 2}, {"x": 3, "y": 4}]]', [(1, 2), (3, 4)]), ("12, 8", [(12, 8)]),
        ("1,2 3,-4; .5,6\n7,8", [(1, 2), (3, -4), (0.5, 6), (7, 8)]),
    ],
)  # fmt: skip
def test_points(text: str, points: list[tuple[float, float]]) -> None:
    assert read_points(text) == points
    assert read_points(write_points(points)) == points


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("", []), ("60, 60 -> 90, 60", [((60, 60), (90, 60))]), ("1,2:3,4 5,6:7,8", [((1, 2), (3, 4)), ((5, 6), (7, 8))]),
        ("1,2->3,4\n\n5,6->7,8", [((1, 2), (3, 4)), ((5, 6), (7, 8))]), ("[[[1, 2], [3, 4]]]", [((1, 2), (3, 4))]),
        ('[[{"x": 1, "y": 2}, {"x": 9, "y": 9}, {"x": 3, "y": 4}], [[5, 6], [7, 8]]]', [((1, 2), (3, 4)), ((5, 6), (7, 8))]),
    ],
)  # fmt: skip
def test_pairs(text: str, pairs: list[object]) -> None:
    assert read_pairs(text) == pairs


@pytest.mark.parametrize(
    "text", ["here", "12", "1,2 3", '[{"x": 1}]', "[1, 2]", '["ab", "cd"]', "{", '{"points": 3}', "1,2 -> 3,4"]
)
def test_what_is_no_list_of_points_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="Expected `handles` as a JSON list of points in pixels"):
        read_points(text, "handles")


@pytest.mark.parametrize(
    "text", ["here", "1,2", "1,2 -> 3", "1,2 -> 3,4 5", "[[1, 2], [3, 4]]", '[[{"x": 1, "y": 2}]]', "[1, 2]"]
)
def test_what_is_no_list_of_arrows_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="Expected `points` as lines of 'x, y -> x, y'"):
        read_pairs(text)
