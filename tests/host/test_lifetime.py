"""What a run has made is gone when it ends, without waiting for a collection of garbage.

A clone of a MODEL that lives on in a cycle is found by the host as a leak when its parents are gone, and it then collects garbage at
every prompt; a denoiser that does holds the memory of its recordings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)


def test_nothing_of_a_run_lives_on(inside: Callable[..., list[dict[str, Any]]]) -> None:
    seen, *lines = inside("lifetime_checks.py")
    assert seen["left"] == ["ModelPatcher"], "what lives on would not be seen"
    assert len(lines) >= 20
    assert not [line for line in lines if line["left"] or line["said"].startswith("WRONG")]
