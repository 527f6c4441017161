"""Every Python block of README and docs/ runs as printed, one block after the other, in a folder of its own."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[str]:
    return BLOCK.findall(text)


DOCUMENTS = [
    path.relative_to(ROOT)
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("web/docs/**/*.md"))]
    if python_blocks(path.read_text())
]


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder like a fresh clone's with a photo, a mask and a clip of the reader's own."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "out").mkdir()
    photo = Image.open(ROOT / "assets" / "astronaut.jpg").resize((128, 128))
    photo.save(tmp_path / "photo.png")
    mask = torch.zeros(128, 128, dtype=torch.uint8)
    mask[40:80, 40:80] = 255
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    for i in range(12):
        (tmp_path / "frames").mkdir(exist_ok=True)
        photo.rotate(i).save(tmp_path / "frames" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_documents_have_examples() -> None:
    assert pathlib.Path("README.md") in DOCUMENTS
    assert len(DOCUMENTS) >= 6


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_the_examples_run_as_printed(document: pathlib.Path, folder: pathlib.Path) -> None:
    names: dict[str, object] = {}
    for number, block in enumerate(python_blocks((ROOT / document).read_text()), 1):
        exec(compile(block, f"{document}, block {number}", "exec"), names)


PLACE = re.compile(r"`([a-z_0-9/]+\.py)`((?:,? `\w+`)*)")


def test_architecture_names_what_exists() -> None:
    """A file and the names after it: "`core/masks.py` `painted`, `clean`"."""
    places = PLACE.findall((ROOT / "docs" / "architecture.md").read_text())
    assert len(places) > 20
    for file, names in places:
        code = (ROOT / file).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^ *(async def|def|class) {name}\b", code, re.MULTILINE), f"{file} has no {name}"


def test_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`([\w./]+(?:/|\.py|\.md|\.toml))`", text)
    assert len(paths) > 25
    assert not [path for path in paths if not (ROOT / path).exists()]


LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("document", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: pathlib.Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert not [link for link in links if not (document.parent / link).exists()]


def test_the_index_lists_every_document() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").glob("**/*.md")]
    assert not [page for page in pages if page != "index.md" and f"({page})" not in text]
