"""Import this first in a script that the host's Python runs: the host at COMFYUI_PATH and the pack become importable, on the CPU."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys

ARGUMENTS, sys.argv = sys.argv[1:], [sys.argv[0], "--cpu"]  # the host reads the others as its own
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, os.path.expanduser(os.environ.get("COMFYUI_PATH", ".")))
if importlib.util.find_spec("slipstream") is None:  # whatever the checkout's folder is called
    spec = importlib.util.spec_from_file_location(
        "slipstream", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["slipstream"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
