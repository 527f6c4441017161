"""Every family of models in the host: rows, odd sizes and levels of all, and every technique on those that differ in kind.

The networks are the host's own at a tiny size (tiny_models.py); one process tries all (family_checks.py).
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Where every technique is tried; of the others the calls and the levels. `FAMILIES=all` tries everything everywhere.
WHOLE = ("playground", "cosmos predict2", "flux kontext", "qwen-edit", "wan i2v")
CHEAP = ("rows", "odd size", "levels", "other channels")


pytestmark = pytest.mark.timeout(900)  # the host is imported, and thirty networks are built


@pytest.fixture(scope="module")
def lines(inside: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line for each family and check: family, column of the README's table, check, what was said."""
    everything = os.environ.get("FAMILIES") == "all"
    arguments = [] if everything else [f"--whole={','.join(WHOLE)}", f"--cheap={','.join(CHEAP)}"]
    return inside("family_checks.py", *arguments)


@pytest.fixture(scope="module")
def said(lines: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    return {(line["family"], line["check"]): line["said"] for line in lines}


def test_all_families_do_what_is_promised(said: dict[tuple[str, str], str]) -> None:
    wrong = {" ".join(key): what for key, what in said.items() if what != "yes" and key not in REFUSED}
    assert not wrong, json.dumps(wrong, indent=1)
    assert len({family for family, _ in said}) >= 28


# What is refused in one sentence, with what the sentence names; a newer host may pad an odd size.
REFUSED: dict[tuple[str, str], str] = {
    ("wan i2v", "Stream Frames"): "a video",
    ("wan i2v", "Edit"): "a video",
    ("wan i2v", "Harmonise"): "a video",
    ("pixart", "odd size"): "multiple of 2",
    ("cosmos predict2", "odd size"): "multiple of 2",
    ("hunyuan video", "odd size"): "multiple of 2",
}


def test_what_is_refused_is_refused_in_one_sentence(said: dict[tuple[str, str], Any]) -> None:
    for key, named in REFUSED.items():
        padded = key[1] == "odd size" and said.get(key) == "yes"
        if key in said and not padded:
            assert said[key].startswith("refused: Expected "), (key, said[key])
            assert named in said[key]
            assert "\n" not in said[key]


def test_the_table_of_the_readme_is_what_was_found(lines: list[dict[str, Any]]) -> None:
    """Cell by cell, for what was tried here; `family_checks.py --table` prints all of it."""
    table = [
        line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")
    ]
    columns = next(line for line in table if line[0].startswith("SD1.5, SD2"))
    cells = {(row[0], column): cell for row in table for column, cell in zip(columns, row[1:])}
    tried = [line for line in lines if line["check"] not in CHEAP]
    assert {line["column"] for line in lines} == set(columns)
    for line in tried:
        cell = cells[line["check"], line["column"]]
        refused = line["said"].startswith("refused")
        assert (f"{line['family']} refused" in cell) == refused, line
        assert refused or cell.startswith("yes"), line
