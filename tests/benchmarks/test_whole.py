"""The table of `make bench`: verdicts, intervals, quality measures, and a page that says what is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slipstream_tests.conftest import load_benchmark


@pytest.fixture(scope="module")
def whole() -> Any:
    return load_benchmark("whole")


@pytest.mark.parametrize(
    ("key", "value", "go"),
    [
        ("edit background", 51.0, True), ("edit background", 49.0, False), ("edit rows", 21.0, False), ("edit rows", 19.0, True),
        ("reuse", 1.9, True), ("reuse", 2.1, False), ("lmd hole", 4.1, True), ("lmd hole", 3.9, False),
    ],
)  # fmt: skip
def test_a_figure_beyond_its_limit_is_a_no_go(whole: Any, key: str, value: float, go: bool) -> None:
    """Limits are numbers, or multiples of the alternative in the same run: here of 4."""
    assert whole.Figure(key, "a", "b", (value, value), "c", (3.0, 5.0)).go is go


def test_a_limit_may_be_a_multiple_of_something_else_than_the_alternative(whole: Any) -> None:
    assert whole.Figure("harmonise", "a", "b", (4.0,), "c", (100.0,), base=10.0).go
    assert not whole.Figure("harmonise", "a", "b", (6.0,), "c", (100.0,), base=10.0).go


def test_the_page_has_every_figure_its_verdict_and_what_was_not_measured(whole: Any) -> None:
    figures = [
        whole.Figure("edit background", "Move", "dB", (50.0, 52.0), "paste", (40.0,)),
        whole.Figure("cow rows", "COW", "rows", (80.0,), "plain", (40.0,)),
    ]
    page = whole.page(figures, ["stream"], "a machine")
    assert "| Move | dB | 51 [50, 52] | paste | 40 | >= 50 | go |" in page
    assert "| COW | rows | 80 | plain | 40 | <= 60 | **no-go** |" in page
    assert "Not measured in this run: stream." in page
    assert "Machine: a machine." in page


def test_an_interval_holds_its_mean_and_narrows_with_more_values(whole: Any) -> None:
    few, many = (whole.bounds([0.0, 1.0] * n) for n in (3, 300))
    assert few[0] < many[0] < 0.5 < many[1] < few[1]


def test_ssim_is_one_of_an_image_itself_and_less_of_another(whole: Any) -> None:
    image = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert whole.ssim(image, image) == pytest.approx(1, abs=1e-5)
    assert whole.ssim(image, image.flip(1)) < 0.5


def test_the_committed_page_is_that_of_the_command(whole: Any) -> None:
    page = whole.PAGE.read_text()
    assert page.startswith(whole.page([], [], "").split("Commit")[0])
    assert all(f"| {key} | {limit.said()} |" in page for key, limit in whole.LIMITS.items())
    assert "**no-go**" not in page
