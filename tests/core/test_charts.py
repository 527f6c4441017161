from __future__ import annotations

import sys
import threading

import pytest
import torch
from slipstream.core.charts import (
    LiveChart,
    NoChart,
    chart_or_notice,
    check_drawing,
    figure,
    log_scale,
    spread,
    styled,
    to_image,
)
from torch import Tensor


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def curve(height: float) -> Tensor:
    drawn = figure(200, 100, tidy=False)
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set_ylim(0, 1)
    axes.axhline(height, color="red", linewidth=2)
    return to_image(drawn)


def test_a_figure_has_its_size_in_pixels_and_its_values_their_place() -> None:
    image = curve(0.25)
    assert image.shape == (1, 100, 200, 3)
    red = (image[0] - torch.tensor([1.0, 0.0, 0.0])).abs().amax(-1) < 0.1
    assert red.nonzero()[:, 0].float().mean() == pytest.approx(75, abs=1)
    assert red.any(0).sum() >= 198


@pytest.mark.parametrize(("low", "high"), [(0.01, 10), (0.5, 0.6), (1e-6, 1e3), (1, 5), (0.9, 12)])
def test_log_axes_have_a_few_plain_numbers(low: float, high: float) -> None:
    drawn = figure(300, 300)
    axes = styled(drawn.subplots(), "t", "x", "y")
    log_scale(axes.yaxis, low, high)
    axes.set_ylim(low, high)
    to_image(drawn)
    inside = [t for t in axes.yaxis.get_majorticklocs() if low <= t <= high]
    assert 2 <= len(inside) <= 10
    assert not any(
        "e" in label.get_text() or "$" in label.get_text() for label in axes.get_yticklabels() if low >= 0.01
    )
    assert not any(label.get_text() for label in axes.yaxis.get_minorticklabels())


def test_labels_are_spread_in_their_order() -> None:
    assert spread([], 1) == []
    assert spread([0.0, 5.0], 1) == [0.0, 5.0]
    assert spread([1.0, 1.0, 1.0], 1) == pytest.approx([0.0, 1.0, 2.0])


def test_threads_draw_side_by_side() -> None:
    alone = [curve(i / 10) for i in range(1, 9)]
    together: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: curve((i + 1) / 10)})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[i], together[i]) for i in range(8))


def test_drawing_leaves_pyplot_and_global_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    curve(0.5)
    assert dict(matplotlib.rcParams) == before
    assert "slipstream" not in getattr(sys.modules.get("matplotlib.pyplot"), "__name__", "")


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_there_is_a_sentence_and_a_notice() -> None:
    with pytest.raises(
        NoChart, match=r"Expected matplotlib to draw a chart, but it is not installed\. pip install matplotlib"
    ):
        check_drawing()
    said: list[str] = []
    image = chart_or_notice(lambda: curve(0.5), said.append)
    assert len(said) == 1
    assert image.shape[0] == 1
    assert image.shape[2:] == (640, 3)
    assert (image < 0.5).any()


@pytest.mark.usefixtures("without_matplotlib")
def test_a_live_chart_without_matplotlib_says_so_once() -> None:
    said: list[str] = []
    live = LiveChart(said.append)
    assert [live(lambda: curve(0.5), last) for last in (False, False, True)] == [None, None, None]
    assert len(said) == 1


def test_a_live_chart_is_drawn_now_and_then_and_at_the_end() -> None:
    live, count = LiveChart(pytest.fail), []

    def draw() -> Tensor:
        count.append(1)
        return torch.zeros(1, 4, 6, 3)

    assert live(draw).size == (6, 4)
    assert all(live(draw) is None for _ in range(100))
    assert live(draw, last=True) is not None
    assert len(count) == 2
