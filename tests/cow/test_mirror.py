"""A mirrored subject is the subject of the mirrored photo."""

from __future__ import annotations

import torch
from slipstream.cow.canvas import place, plain_background


def test_a_mirrored_subject_is_that_of_the_mirrored_photo() -> None:
    image, keep = torch.rand(1, 24, 32, 3), torch.zeros(1, 24, 32)
    keep[:, 4:20, 3:12] = 1
    ground = plain_background(64, 64)
    mirrored = place(image, keep, ground, x=0.25, y=1.0, mirror=True)
    other = place(image.flip(2), keep.flip(2), ground, x=0.25, y=1.0)
    assert torch.equal(mirrored.image, other.image)
    assert torch.equal(mirrored.keep, other.keep)
    plain = place(image, keep, ground, x=0.25, y=1.0)
    assert torch.equal(mirrored.keep.any(1), plain.keep.any(1))  # it keeps its place
    assert not torch.equal(mirrored.image, plain.image)
