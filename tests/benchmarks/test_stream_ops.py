"""The count of operators that docs/stream.md states."""

from __future__ import annotations

import pytest
import torch
from slipstream_tests.conftest import load_benchmark


def test_operators_fall_by_a_third_at_equal_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["stream_ops.py", "--check"])
    with torch.random.fork_rng():
        assert load_benchmark("stream_ops").main() == 0
    lines = {line[:22].strip(): line for line in capsys.readouterr().out.splitlines()}
    for name in ("SD-Turbo, 2 rows", "SDXL-Turbo, 2 rows", "SD-Turbo + TAESD"):
        before, after = (int(n) for n in lines[name].split("operators ")[1].split(" (")[0].split(" -> "))
        assert after <= 0.65 * before, lines[name]
