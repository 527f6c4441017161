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
    ("value", "higher", "go"), [(2.0, True, True), (0.5, True, False), (2.0, False, False), (0.5, False, True)]
)
def test_a_figure_beyond_its_limit_is_a_no_go(whole: Any, value: float, higher: bool, go: bool) -> None:
    assert whole.Figure("a", "b", (value, value), "c", (), 1.0, higher).go is go


def test_the_page_has_every_figure_its_verdict_and_what_was_not_measured(whole: Any) -> None:
    figures = [
        whole.Figure("Move", "dB", (50.0, 52.0), "paste", (40.0,), 49.0, True),
        whole.Figure("COW", "rows", (80.0,), "plain", (40.0,), 60.0, False),
    ]
    page = whole.page(figures, ["stream"], "a machine")
    assert "| Move | dB | 51 [50, 52] | paste | 40 | >= 49 | go |" in page
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
    assert page.startswith(whole.page([], [], "").split("Machine")[0])
    assert "**no-go**" not in page
