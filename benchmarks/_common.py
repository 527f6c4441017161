"""Let benchmark scripts import `slipstream` (the package) and `slipstream_tools` (the repository's tools) without installing."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "out"


def load_package(name: str, folder: pathlib.Path) -> None:
    """Import `folder` under `name` by path, unless it is imported already."""
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


load_package("slipstream", ROOT)
load_package("slipstream_tools", ROOT / "tools")
# tests/reference holds the published code of some techniques, to compare with.
load_package("slipstream_tests", ROOT / "tests")
