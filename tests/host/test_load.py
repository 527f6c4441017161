"""Prompts of every technique in turn on one host, as benchmarks/load.py sends a thousand to two."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest

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
