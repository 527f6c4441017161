"""Faults in the middle of our nodes in the host: benchmarks/faults.py tries every heavy point of every node, this a few of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

NODES = (
    "RCFG Guider, onetime",
    "Cow Sampler",
    "Stream Frames",
    "Live Stream",
    "Edit, draft",
    "Harmonise",
    "Apply Call Reuse",
)


@pytest.mark.timeout(600)
def test_cancel_full_memory_and_errors_leave_nothing_behind(inside: Callable[..., list[dict[str, Any]]]) -> None:
    lines = inside("fault_checks.py", "--most=2", *NODES)
    assert {(line["node"], line["fault"]) for line in lines} == {
        (node, fault) for node in NODES for fault in ("cancel", "out of memory", "error")
    }
    assert all(line["tried"] == 2 for line in lines)
    assert not [line for line in lines if line["wrong"]]
