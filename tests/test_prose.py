"""Words that nobody should read: review.md's thirty sentences and their kind, in documents, help, tooltips, messages and comments."""

from __future__ import annotations

import ast
import pathlib
import re
import tokenize
from collections.abc import Iterator

import pytest
import slipstream

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("core", "cow", "stream", "search", "edit", "lmd", "cli", "nodes")
# What to write instead stands behind each.
FORBIDDEN = {
    r"say(s|ing)? so\b|\bsaid so": "with a warning",
    r"go(es)? on\b|went on": "continues, resumes",
    r"anew\b": "again",
    r"of itself\b|by itself\b|by themselves": "alone, automatically",
    r"(is|are|was|were|be|it's) told\b": "sees, reads, the timestep says",
    r"in force\b": "are kept, act",
    r"pictures?\b": "image",
    r"shall\b": "plain present tense",
    r"hangs? on\b": "depends on",
    r"stands? and falls?": "depends on",
    r"whatever it may|as soon as it may|as it may\b": "name the condition",
    r"in (the caller's|our|many people's) hands": "name who does what",
    r"of worth\b|per mille\b": "is unreliable, near 0",
    r"has no say\b": "is ignored",
    r"no (longer )?good at\b": "does not support",
    r"honest\b": "drop it",
    r"a (?=[aeio])(?!one\b|once\b)": "an",
}
ANY = re.compile("|".join(rf"\b(?:{each})" for each in FORBIDDEN), re.IGNORECASE)
# Names of inputs, choices, files, types and titles that are quoted as they are.
QUOTED = re.compile(r"`[^`]*`|```.*?```|\]\([^)]*\)|\*[^*\n]+\*", re.DOTALL)


def documents() -> list[pathlib.Path]:
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    return [*found, *sorted((ROOT / "docs").glob("**/*.md")), *sorted((ROOT / "web" / "docs").glob("*.md"))]


def wrong(text: str) -> list[str]:
    """Return the forbidden words of a text, each with what stands around it."""
    plain = QUOTED.sub(" ", text)
    return [" ".join(plain[max(0, m.start() - 40) : m.end() + 20].split()) for m in ANY.finditer(plain)]


@pytest.mark.parametrize("document", documents(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_documents(document: pathlib.Path) -> None:
    assert not wrong(document.read_text())


def shown_texts(value: object) -> Iterator[str]:
    """Yield tooltips within what INPUT_TYPES returns."""
    if isinstance(value, dict):
        if isinstance(value.get("tooltip"), str):
            yield value["tooltip"]
        for inner in value.values():
            yield from shown_texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from shown_texts(inner)


@pytest.mark.parametrize("id", slipstream.NODE_CLASS_MAPPINGS)
def test_nodes(id: str) -> None:
    node = slipstream.NODE_CLASS_MAPPINGS[id]
    texts = [node.DESCRIPTION, *node.OUTPUT_TOOLTIPS, *shown_texts(node.INPUT_TYPES())]
    assert not [found for text in texts for found in wrong(text)]


@pytest.mark.parametrize("id", slipstream.NODE_CLASS_MAPPINGS)
def test_tooltips_are_sentences(id: str) -> None:
    for text in shown_texts(slipstream.NODE_CLASS_MAPPINGS[id].INPUT_TYPES()):
        assert text.rstrip().endswith((".", ")")), text
        assert not text.startswith(("Of ", "For the rest")), text


def messages(tree: ast.Module) -> Iterator[str]:
    """Yield the texts of exceptions that are raised, of warnings, and of options of the command line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield from literals(node.exc)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("warn", "warning", "info", "append", "print", "Unused"):
                yield from literals(node)
            yield from (
                text for key in node.keywords if key.arg in ("help", "description") for text in literals(key.value)
            )


def literals(node: ast.AST) -> Iterator[str]:
    return (
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str) and " " in n.value
    )


SOURCES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_messages(source: pathlib.Path) -> None:
    assert not [found for text in messages(ast.parse(source.read_text())) for found in wrong(text)]


def notes(source: pathlib.Path) -> Iterator[str]:
    """Yield docstrings, and comments of several lines as one text."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
    with tokenize.open(source) as file:
        comments = [token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
    lines = {token.start[0]: token.string.lstrip("# ") for token in comments}
    for first in (number for number in lines if number - 1 not in lines):
        end = next(number for number in range(first, first + len(lines) + 1) if number not in lines)
        yield "\n".join(lines[number] for number in range(first, end))


TOOLS = [p for folder in ("benchmarks", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("source", [*SOURCES, *TOOLS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_docstrings_and_comments(source: pathlib.Path) -> None:
    assert not [found for text in notes(source) for found in wrong(text)]


def test_the_words_are_found() -> None:
    assert wrong("A run goes on and says so.") == ["A run goes on and says so.", "A run goes on and says so."]
    assert wrong("The picture of `goes on` is an image.") == ["The picture of is an image."]
    assert not wrong("It continues with a warning: `background` picture, *picture*, `anew`.".replace(" picture,", ""))
