"""The count of operators that docs/stream.md states."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_operators_fall_by_a_third_at_equal_numbers() -> None:
    run = subprocess.run(
        [sys.executable, "stream_ops.py", "--check"], cwd=ROOT / "benchmarks", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    lines = {line[:22].strip(): line for line in run.stdout.splitlines()}
    for name in ("SD-Turbo, 2 rows", "SDXL-Turbo, 2 rows", "SD-Turbo + TAESD"):
        before, after = (int(n) for n in lines[name].split("operators ")[1].split(" (")[0].split(" -> "))
        assert after <= 0.65 * before, lines[name]
