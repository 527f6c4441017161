"""Prompts of every technique in turn on one host, as benchmarks/load.py sends a thousand to two."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from graph import DEVICE
from slipstream_tests.host.conftest import find_host

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


def test_prompts_in_turn_leave_no_thread_and_no_part_file(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("slipstream_load", BENCHMARKS / "load.py")
    assert spec is not None
    assert spec.loader is not None
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    run = load.Load(host, 3 * len(load.KINDS), 0)
    run.run()
    assert not run.check()
    assert {kind: len(seconds) for kind, seconds in run.seconds.items()} == dict.fromkeys(load.KINDS, 3)
    assert not list(pathlib.Path(host.base).rglob(".part*"))


@pytest.mark.usefixtures("host")
def test_the_live_benchmark_runs_every_path(tmp_path: pathlib.Path) -> None:
    """A camera into Live Stream of a host of its own, with the host's UNet and TAESD; speeds are not judged."""
    command = [
        sys.executable,
        str(BENCHMARKS / "live_host.py"),
        "--device",
        DEVICE,
        "--check",
        "--json",
        str(tmp_path / "a.json"),
    ]
    checkout, python = find_host()  # type: ignore[misc]
    env = {**os.environ, "COMFYUI_PATH": str(checkout), "COMFYUI_PYTHON": str(python)}
    subprocess.run(command, check=True, timeout=240, env=env)
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["priority"] for row in found] == ["latency", "throughput"]
    assert all(row["fps"] > 0 and row["p50"] > 0 and row["limit"] for row in found)
