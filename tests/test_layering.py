"""Dependencies point one way: {nodes, cli} -> {cow, stream, search, edit, lmd} -> core; the host is imported in nodes/ only."""

from __future__ import annotations

import ast
import pathlib

import pytest

TECHNIQUES = {"cow", "stream", "search", "edit", "lmd"}
USERS = {name: {name, "core", *TECHNIQUES} for name in ("nodes", "cli")}
LAYERS = {**{name: {name, "core"} for name in TECHNIQUES}, "core": {"core"}, **USERS}
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "server",
    "execution",
    "latent_preview",
}
ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(p for name in LAYERS for p in (ROOT / name).rglob("*.py"))
# Published code rides in tests/reference only: what a user runs never imports it, or anything else from here.
NOT_SHIPPED = {"tests", "slipstream_tests", "tools", "slipstream_tools", "benchmarks"}


def imports(path: pathlib.Path) -> list[tuple[int, str]]:
    """Return (relative level, dotted name) of every import statement."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
            if node.level and not node.module:
                found += [(node.level, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path: pathlib.Path) -> None:
    parts = path.relative_to(ROOT).parts
    layer, depth = parts[0], len(parts) - 1
    for level, name in imports(path):
        top = name.split(".")[0]
        if level == 0:
            assert top not in LAYERS, f"{path}: absolute import of our own folder {name}"
            assert layer == "nodes" or top not in HOST, f"{path}: imports the host outside nodes/"
            assert top not in NOT_SHIPPED, f"{path}: imports {name}, which is not part of the package"
        elif level > depth and top not in ("", "__version__"):
            assert top in LAYERS[layer], f"{path}: {layer} must not import {name}"


def within(path: pathlib.Path) -> set[pathlib.Path]:
    """Return the files of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [base / alias.name for alias in node.names]
            found |= {
                name.with_suffix(".py") if name.with_suffix(".py") in FILES else base.with_suffix(".py")
                for name in names
            }
    return found & set(FILES)


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph = {path: within(path) for path in FILES}
    while done := {path for path, needs in graph.items() if not needs & set(graph)}:
        graph = {path: needs for path, needs in graph.items() if path not in done}
    # What is left hangs in a circle; packages may import from their own modules.
    assert not graph, sorted(str(path.relative_to(ROOT)) for path in graph)


def test_every_folder_is_listed_for_packaging() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    packages = {".".join(("slipstream", *p.parent.relative_to(ROOT).parts)) for p in FILES if p.name == "__init__.py"}
    assert all(f'"{package}"' in text for package in packages), packages


def test_requirements_equal_the_dependencies() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("dependencies = [", 1)[1].split("]", 1)[0]
    dependencies = [line.strip().strip('",') for line in block.splitlines() if line.strip()]
    assert (ROOT / "requirements.txt").read_text().split() == dependencies
    assert not any(d.startswith("torch") or "==" in d for d in dependencies)


def test_the_root_modules_import_nothing_that_is_not_shipped() -> None:
    for path in ROOT.glob("*.py"):
        assert not {name.split(".")[0] for _, name in imports(path)} & NOT_SHIPPED, path


def real_edges() -> set[tuple[str, str]]:
    """Return (who, whom) of every import between the layers, and from the host."""
    edges = set()
    for path in FILES:
        parts = path.relative_to(ROOT).parts
        for level, name in imports(path):
            top = name.split(".")[0]
            if level == 0 and top in HOST:
                edges.add((parts[0], "host"))
            elif level > len(parts) - 1 and top in LAYERS and top != parts[0]:
                edges.add((parts[0], top))
    return edges


def test_the_drawing_shows_the_imports() -> None:
    drawing = (ROOT / "docs" / "architecture.md").read_text().split("```mermaid", 1)[1].split("```", 1)[0]
    arrows = [line.split("-->") for line in drawing.splitlines() if "-->" in line]
    drawn = {
        (who.strip(), whom.strip()) for ends in arrows for who in ends[0].split("&") for whom in ends[1].split("&")
    }
    assert drawn == real_edges()
