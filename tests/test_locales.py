"""The second language is complete: every name, input and tooltip of every node, and what the frontend makes of their letters."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
from typing import Any

import pytest
import slipstream

ROOT = pathlib.Path(slipstream.__file__).resolve().parent
LANGUAGES = sorted(p.stem for p in (ROOT / "tools" / "locales").glob("*.json"))
NODES, TITLES = slipstream.NODE_CLASS_MAPPINGS, slipstream.NODE_DISPLAY_NAME_MAPPINGS
SPEC = importlib.util.spec_from_file_location("make_locales", ROOT / "tools" / "make_locales.py")
assert SPEC is not None
assert SPEC.loader is not None
make_locales = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_locales)
each_language = pytest.mark.parametrize("language", LANGUAGES)


def table(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "tools" / "locales" / f"{language}.json").read_text(encoding="utf-8"))


def test_there_is_a_second_language() -> None:
    assert LANGUAGES


@each_language
def test_nothing_is_left_in_english(language: str) -> None:
    """Translate what this lists in tools/locales, then run tools/make_locales.py."""
    assert not make_locales.missing(NODES, TITLES, table(language))


@each_language
def test_what_the_frontend_reads_is_up_to_date(language: str) -> None:
    path = ROOT / "locales" / language / "nodeDefs.json"
    assert path.read_text(encoding="utf-8") == make_locales.written(table(language))
    made = json.loads(path.read_text(encoding="utf-8"))
    assert set(made) == set(NODES)
    for id, node in NODES.items():
        assert set(made[id]["inputs"]) == set(make_locales.inputs_of(node))
        assert len(made[id]["outputs"]) == len(node.RETURN_TYPES)


@each_language
def test_no_letter_has_a_meaning_of_its_own(language: str) -> None:
    """The frontend's messages take |, @ and braces as their syntax."""
    wrong = [text for kind in table(language).values() for text in kind.values() if re.search(r"[|@{}]", text)]
    assert not wrong


def test_a_changed_text_is_missing() -> None:
    full = table(LANGUAGES[0])
    kept = {**full, "texts": {k: v for k, v in full["texts"].items() if k != "The photo."}}
    assert make_locales.missing(NODES, TITLES, kept)[0] == "texts: The photo."
