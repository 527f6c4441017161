"""A method that does not keep its object alive."""

from __future__ import annotations

import gc
import weakref

import pytest
from slipstream.core.lifetime import weakly


class Holder:
    def __init__(self, weak: bool) -> None:
        self.part = weakly(self.double) if weak else self.double

    def double(self, x: int, plus: int = 0) -> int:
        return 2 * x + plus


@pytest.mark.parametrize("weak", [True, False])
def test_it_is_the_method_and_keeps_nothing(weak: bool) -> None:
    holder = Holder(weak)
    alive = weakref.ref(holder)
    assert holder.part(3, plus=1) == 7
    gc.disable()
    try:
        del holder
        assert (alive() is None) == weak
    finally:
        gc.enable()
