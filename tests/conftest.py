"""Make `slipstream` importable without installing it, under its one public name, and the repository's tools as `slipstream_tools`."""

from __future__ import annotations

import gc
import importlib.util
import os
import pathlib
import sys
from typing import Any

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


def load_package(name: str, folder: pathlib.Path) -> None:
    """Import `folder` as the package `name` by path, unless it is importable already from that very folder."""
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def load_benchmark(name: str) -> Any:
    """Import a script of benchmarks/ under its own name, which has its neighbours on its path."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


# The root on sys.path would shadow the host's `nodes` module and make every package importable twice.
sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
load_package("slipstream", ROOT)
load_package("slipstream_tests", ROOT / "tests")
if (ROOT / "tools" / "__init__.py").exists():
    load_package("slipstream_tools", ROOT / "tools")

# Values are compared, so tests and the processes they start run on the CPU wherever there is a GPU; those of the devices name theirs.
os.environ["SLIPSTREAM_DEVICE"] = "cpu"
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
if os.environ.get("SLIPSTREAM_PRETEND_CUDA"):
    # Finds without a GPU what would go to one by default, as on the CPU build of torch it fails.
    torch.cuda.is_available = lambda: True
    torch.cuda.mem_get_info = lambda *_: (70 * 2**30, 80 * 2**30)
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, lambda *_: None  # torch.compile keeps it

# The bundled network is tiny: more threads cost more than they give, and results stay the same on every machine.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and what tests start: the other core has tests of its own


# What importing and collecting make lives to the end, and is a million objects: every collection would visit them. Later ones come at
# every 20,000 new objects instead of 700: the tests make few cycles, and those that look for them collect themselves.
gc.disable()
gc.set_threshold(20_000)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


# What a reason to skip contains, and what is said of it at the end: nobody reads a list of skips.
UNTESTED = {
    "no ComfyUI here": "in a real ComfyUI, as there is no checkout with its .venv at COMFYUI_PATH or ~/ComfyUI. Nothing is known about "
    "the nodes in the host.",
    "no browser here": "in a browser, as there is no playwright or no Chromium. Nothing is known about what a person sees.",
    "no Chromium here": "of the canvas and the live panel, as there is no Chromium at CHROMIUM or on the PATH.",
    "no Firefox here": "of the canvas and the live panel in Firefox, as there is none at FIREFOX or on the PATH.",
}  # fmt: skip


def pytest_terminal_summary(terminalreporter: Any) -> None:
    # Here and not beside the host tests: with several workers only this file is loaded where the summary is written.
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for reason, what in UNTESTED.items():
        count = sum(reason in text for text in skipped)
        if count:
            terminalreporter.write_line(f"WARNING: {count} tests were SKIPPED {what}", red=True, bold=True)


GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def golden_path() -> pathlib.Path:
    return GOLDEN


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    return ROOT
