from __future__ import annotations

import pathlib
from functools import partial

import pytest
from PIL import Image
from slipstream.cli import main
from slipstream.core import load
from slipstream.search import Schedule, SearchConfig, compare

SMALL = ["--size", "32", "32", "--pairs", "2"]


@pytest.fixture(autouse=True)
def _short_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run to compare with has 8 steps instead of 50, which no option sets and nothing here depends on."""
    monkeypatch.setattr("slipstream.cli.search.SearchConfig", partial(SearchConfig, teacher_steps=8))
    monkeypatch.setattr("slipstream.cli.search.compare", partial(compare, teacher_steps=8))


def test_search_writes_a_schedule_and_goes_on(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, chart, store = tmp_path / "s.json", tmp_path / "c.png", tmp_path / "s.sqlite"
    command = ["search", *SMALL, "--steps", "2", "--store", str(store), "--out", str(out), "--chart", str(chart)]
    assert main([*command, "--evaluations", "12"]) == 0
    text = capsys.readouterr().out
    assert "12 schedules tried" in text
    assert "* this schedule" in text
    assert Schedule.load(out).steps == 2
    assert Image.open(chart).size == (960, 500)
    assert main([*command, "--evaluations", "13"]) == 0
    assert "13 schedules tried" in capsys.readouterr().out

    assert main(["compare", *SMALL, str(out), "ays_sd15_10", "--repeats", "1", "--chart", str(chart)]) == 0
    text = capsys.readouterr().out
    assert "Align Your Steps, SD 1.5" in text
    assert text.split("schedule     steps")[1].split("\n")[1].startswith("ays_sd15_10")  # ten steps against two


def test_a_search_begins_from_lists_and_reproduces_one(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.json"
    command = ["search", *SMALL, "--evaluations", "9", "--out", str(out), "--steps", "3", "--computed", "2"]
    assert main([*command, "--full", "14.6, 3.0, 0.7", "--begin", "14.6 1.5", "--begin", "ays_sd15_10"]) == 0
    text = capsys.readouterr().out
    assert "14.6 1.5" in text
    assert "ays_sd15_10" not in text  # ten calls are no rival of two
    assert Schedule.load(out).nfe == 2


def test_the_first_level_is_searched_when_asked_for(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["search", *SMALL, "--steps", "1", "--evaluations", "8", "--out", str(tmp_path / "one.json")]
    assert main(command) == 0
    assert "nothing to search" in capsys.readouterr().out  # one step that starts at the highest level leaves no choice
    stock = Schedule.load(tmp_path / "one.json").sigmas[0]
    assert main([*command, "--search-first-level"]) == 0
    assert "8 schedules tried" in capsys.readouterr().out
    assert Schedule.load(tmp_path / "one.json").sigmas[0] not in (stock, load("pocket").model.sigma_max)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search", "--steps", "0"], "Expected `steps`"),
        (["search", "--evaluations", "0"], "Expected a budget"),
        (["search", "--objective", "reference-frechet"], "--reference: Expected `reference`"),
        (["search", "--model", "/nowhere"], "nowhere"),
        (["search", "--full", "carras"], "--full: Expected a schedule file or a preset, but carras"),
        (["search", "--begin", "1,0.5,0.7"], "--begin: Expected `sigmas` that descend strictly"),
        (["search", "--begin", "1 0.5 0,3,"], "--begin: Expected `sigmas` that descend strictly"),
        (["search", "--out", "/nowhere/a.json"], "--out: Expected `out`"),
        (["search", "--out", "/"], "--out: Expected `out`"),
        (["search", "--chart", "chart.sqlite"], "Expected an image name"),
        (["search", *SMALL, "--store", "/dev/null/a.sqlite"], "Expected `store`"),
        (["compare"], "at least one schedule"),
        (["compare", "no_such_file.json"], "no_such_file.json"),
        (["search", "--sampler", "dpm_adaptive"], "Expected `sampler`"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert "--ray" in capsys.readouterr().out
