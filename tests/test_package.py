"""The pack loads as ComfyUI loads it, installs under its one public name, and is collected by pytest from anywhere."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from slipstream import __version__

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Each costs a second or more at the start of the host, or is not there at all.
LAZY = "diffusers transformers matplotlib scipy av ray torchvision huggingface_hub comfy aiohttp pythonosc pyvirtualcam".split()

# What ComfyUI does with a folder of custom_nodes; the module's name is its path, with "." replaced.
LOAD_LIKE_THE_HOST = """
import importlib.util, json, os, sys
path = sys.argv[1]
name = path.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, os.path.join(path, "__init__.py"))
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
print(json.dumps({
    "nodes": {id: cls.__module__ for id, cls in module.NODE_CLASS_MAPPINGS.items()},
    "titles": module.NODE_DISPLAY_NAME_MAPPINGS,
    "web": module.WEB_DIRECTORY,
    "name": name,
    "loaded": sorted({m.split(".")[0] for m in sys.modules}),
    "path": sys.path,
}))
"""

# What an editable install maps: the one public name to the repository's root.
IMPORT_BY_NAME = """
import importlib.util, pathlib, sys
root = pathlib.Path(sys.argv.pop(1))
spec = importlib.util.spec_from_file_location("slipstream", root / "__init__.py", submodule_search_locations=[str(root)])
sys.modules["slipstream"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def python(
    code: str, *args: object, cwd: pathlib.Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "PYTEST", "COMFYUI"))}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_the_host_can_load_a_folder_of_any_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "custom_nodes").mkdir()
    link = tmp_path / "custom_nodes" / "Comfy-UI.Slipstream-v1.0"
    link.symlink_to(ROOT, target_is_directory=True)
    found = json.loads(python(LOAD_LIKE_THE_HOST, link, cwd=tmp_path).stdout)
    assert found["nodes"]
    assert set(found["titles"]) == set(found["nodes"])
    assert all(id.startswith("Slipstream") for id in found["nodes"])
    assert all(module.startswith(found["name"] + ".nodes.") for module in found["nodes"].values())
    assert (link / found["web"]).is_dir()
    assert not set(LAZY) & set(found["loaded"]), "imported at start-up"
    assert str(ROOT) not in found["path"]
    assert str(link) not in found["path"]


def test_the_public_name_and_the_command(tmp_path: pathlib.Path) -> None:
    """One process for all, as each loads torch: imports, `--help`, and a mistake that becomes one sentence."""
    code = """
import argparse, contextlib, types
import slipstream, slipstream.cli, slipstream.core, slipstream.cow, slipstream.edit, slipstream.lmd, slipstream.search, slipstream.stream
from slipstream.core.denoiser import VE
assert VE is slipstream.core.VE and callable(slipstream.load) and slipstream.__version__
with contextlib.suppress(ImportError):
    import nodes
    raise SystemExit("our folders are importable by their bare names")
with contextlib.suppress(SystemExit):
    slipstream.cli.main(["--help"])
loaded = set(LAZY) & set(sys.modules)
assert not loaded, loaded

def add_parser(subparsers):
    subparsers.add_parser("fail").set_defaults(run=lambda args: slipstream.load("missing.safetensors"))

sys.modules["slipstream.cli.fail"] = module = types.ModuleType("slipstream.cli.fail")
module.add_parser = add_parser
slipstream.cli.COMMANDS = ("fail",)
raise SystemExit(slipstream.cli.main(["fail"]))
"""
    found = python(IMPORT_BY_NAME + f"LAZY = {LAZY}" + code, ROOT, cwd=tmp_path, check=False)
    assert "usage: slipstream" in found.stdout
    wanted = "slipstream fail: Expected a model file at missing.safetensors, but found none. Check the path.\n"
    assert found.stderr == wanted
    assert found.returncode == 2


def test_an_installation_has_every_file(tmp_path: pathlib.Path) -> None:
    """Installed from a copy, because a build writes beside its sources."""
    pytest.importorskip("setuptools")

    def ignored(folder: str, names: list[str]) -> list[str]:
        unused = {"tests", "tools", "benchmarks", "docs", "build", "out"} if pathlib.Path(folder) == ROOT else set()
        return [name for name in names if name.startswith(".") or name in unused | {"__pycache__"}]

    copy = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    installed = target / "slipstream"
    packages = {p.parent.relative_to(ROOT) for p in ROOT.glob("*/**/__init__.py") if p.parts[len(ROOT.parts)][0] != "."}
    packages = {p for p in packages if p.parts[0] not in ("tests", "tools", "benchmarks", "build", "out")}
    for package in packages:
        wanted = {p.name for p in (ROOT / package).glob("*.py")}
        assert wanted == {p.name for p in (installed / package).glob("*.py")}, package
    for data in ("pocket", "pocket_flow", "web"):
        wanted = {p.relative_to(ROOT) for p in (ROOT / data).rglob("[!.]*") if p.is_file()}
        assert not {p for p in wanted if not (installed / p).is_file()}, data
    assert list((installed / "pocket").rglob("*.safetensors"))
    code = "import slipstream.core; print(slipstream.__file__, slipstream.__version__)"
    found = python(code, cwd=tmp_path, PYTHONPATH=str(target))
    assert found.stdout.split() == [str(installed / "__init__.py"), __version__]


@pytest.mark.parametrize(("cwd", "argument"), [(ROOT, None), (ROOT / "tests", None), (ROOT.parent, ROOT.name)])
def test_pytest_collects_from_anywhere(cwd: pathlib.Path, argument: str | None) -> None:
    """Only two files: collecting all would import every test a second time."""
    wanted = ("test_layering.py", "test_package.py", "conftest.py", "__init__.py")
    folders = [f"--ignore={p}" for p in (ROOT / "tests").iterdir() if p.name not in wanted]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *folders]
    done = subprocess.run(
        [*command, *([argument] if argument else [])], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_layering" in done.stdout
    assert "test_package" in done.stdout
