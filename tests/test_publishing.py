"""What the registry sends to users is enough to run, and what it must not send is left out; the files of the repository are valid."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import xml.etree.ElementTree as ET

import pytest
from slipstream import __version__
from slipstream_tools.checkers import sent, tracked

from .test_package import LOAD_LIKE_THE_HOST, ROOT, python

NOT_SENT = {"tests", "tools", "benchmarks", ".ci", ".github"}
USED = ("pocket", "pocket_flow", "assets", "web", "locales", "subgraphs", "example_workflows", "search/presets")
CHECKOUT = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="no git checkout here: what publishing packs is not known"
)
WORKFLOWS = sorted((ROOT / ".github").glob("workflows/*.yml"))


@CHECKOUT
def test_only_what_a_user_needs_is_sent() -> None:
    files = sent()
    assert not {f for f in files if f.split("/")[0] in NOT_SENT or f.startswith("docs/img/")}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= files
    code = {f for f in tracked() if f.endswith(".py") and f.split("/")[0] not in NOT_SENT}
    assert code <= files
    for folder in USED:
        assert {f for f in tracked() if f.startswith(f"{folder}/")} <= files, folder


@CHECKOUT
def test_what_is_sent_loads_in_the_host(tmp_path: pathlib.Path) -> None:
    pack = tmp_path / "custom_nodes" / "slipstream"
    for name in sent():
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, pack / name)
    found = json.loads(python(LOAD_LIKE_THE_HOST, pack, cwd=tmp_path).stdout)
    assert found["nodes"]
    assert {p.stem for p in (pack / "web" / "docs").glob("*.md")} == set(found["nodes"])


def test_the_version_is_in_one_place() -> None:
    version = re.findall(r'^version = "(\d+\.\d+\.\d+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version == [__version__]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert __version__ not in (ROOT / "__init__.py").read_text()


def test_the_icon_fits_the_registry() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    name = re.search(r'^Icon = "https://raw\.githubusercontent\.com/[^"]+/main/([^"]+)"$', text, re.MULTILINE)
    assert name
    icon = ET.parse(ROOT / name[1]).getroot()
    assert icon.get("width") == icon.get("height") == "400"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_are_valid(path: pathlib.Path) -> None:
    text = path.read_text()
    assert "\t" not in text
    yaml = pytest.importorskip("yaml")
    flow = yaml.safe_load(text)
    # YAML 1.1 reads the key `on` as true.
    assert flow["name"]
    assert flow.get("on", flow.get(True))
    for job in flow["jobs"].values():
        assert job["runs-on"]
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
