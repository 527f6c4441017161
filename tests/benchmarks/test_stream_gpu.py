"""The benchmark for a GPU runs on the CPU as far as it can: every setting, every path."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.timeout(400)
def test_every_path_runs(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "stream_gpu.py", "--check", "--json", str(tmp_path / "figures.json")]
    run = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    for line in (
        "warm start: compiled again",
        "priority throughput",
        "priority 2",
        "self-RCFG is",
        "Stream Batch is",
        "steady: needs a GPU",
    ):
        assert line in run.stdout, run.stdout
    there = importlib.util.find_spec("streamdiffusion") is not None
    for steps in (1, 4):
        assert (f"published package, eager, N={steps}" in run.stdout) == there
    assert ("PUBLISHED PACKAGE: NOT MEASURED" in run.stdout) == (not there)
    assert "not measured" not in run.stdout
    assert "left out after" not in run.stdout
    assert (tmp_path / "figures.json").exists()
