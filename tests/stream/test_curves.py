"""Values that move over the frames of a clip."""

from __future__ import annotations

import pytest
from slipstream.stream.curves import read_curve, value_at


def test_even_between_keys_and_held_outside() -> None:
    curve = read_curve("strength_curve", " 2: 0.2 ,6:.6, 7: 1 ")
    assert [value_at(curve, i) for i in range(9)] == pytest.approx([0.2, 0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 1, 1])
    assert [value_at([(3, 0.5)], i) for i in (0, 3, 9)] == [0.5] * 3
    assert not read_curve("strength_curve", " ")


@pytest.mark.parametrize(
    "text", ["0.5", "0: x", "3: 0.1, 3: 0.2", "3: 0.1, 1: 0.2", "0: -1", "0: 0.1,", "0: 0.1; 3: 2", "-1: 0.3", "0: nan"]
)
def test_others_are_refused_by_name(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"Expected `strength_curve` as frames that ascend, .* Example: 0: 0\.3, 24: 0\.8\."
    ):
        read_curve("strength_curve", text)
