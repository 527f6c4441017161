"""A missing matplotlib never loses what a node found."""

from __future__ import annotations

import logging
import pathlib
import sys
import types
from typing import Any

import pytest
from slipstream.nodes import lmd, search
from slipstream.nodes.host import native, search_path
from slipstream_tests.search import jobs


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, Any]]:
    """A host of progress bars alone; returns what they were told."""
    told: list[tuple[int, int, Any]] = []

    class ProgressBar:
        def __init__(self, total: int) -> None: ...

        def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
            told.append((value, total, preview))

    comfy, utils, management = (types.ModuleType(f"comfy{n}") for n in ("", ".utils", ".model_management"))
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = lambda: None  # type: ignore[attr-defined]
    comfy.utils, comfy.model_management = utils, management  # type: ignore[attr-defined]
    for module in (comfy, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return told


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def searched(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> Any:
    monkeypatch.setattr(search_path, "HostPath", lambda *_: jobs.make_path())
    monkeypatch.setattr(search, "user_folder", lambda kind: folder)
    monkeypatch.setattr(native, "warn_of_latents", lambda *_, **__: None)
    guider = types.SimpleNamespace(model_patcher=None)
    return search.SearchSchedule().search(
        guider, None, {"samples": None}, 2, 12, 0.0, search.PAIRED, 8, 0, "auto", False, 16
    )


def test_a_search_without_matplotlib_keeps_its_result_and_says_so_in_one_sentence(
    shown: list, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = searched(monkeypatch, tmp_path / "a")
    drawn = [preview for *_, preview in shown if preview is not None]
    assert drawn
    assert drawn[-1][1].size == (960, 500)
    shown.clear()
    without_matplotlib(monkeypatch)
    with caplog.at_level(logging.WARNING):
        schedule, sigmas, chart, report = searched(monkeypatch, tmp_path / "b")
    assert schedule.levels == expected[0].levels
    assert "12 schedules tried" in report
    assert len(sigmas) == 3
    assert chart.shape[2:] == (640, 3)
    bar = [value for value, total, _ in shown if total == 12]  # it begins again at 0 after each many-step run
    assert bar[bar.index(1) - 1 :][:13] == list(range(13))
    assert all(preview is None for *_, preview in shown)
    said = [r.message for r in caplog.records if "pip install matplotlib" in r.message]
    assert len(set(said)) == 1


def test_masks_are_made_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    without_matplotlib(monkeypatch)
    masks, chart = lmd.MaskSchedule().make(3, "linear", 0.1, 0.7, "decreasing", 64, 64, 16, True, 0)
    assert masks.shape == (3, 64, 64)
    assert chart.shape[2:] == (640, 3)
