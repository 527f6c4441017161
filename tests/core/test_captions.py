"""Images side by side with captions: sizes, places, and pixels that are left as they are."""

from __future__ import annotations

import pytest
import torch
from PIL import ImageFont
from slipstream.core import captions
from slipstream.core.captions import GAP, captioned, font, sheet, to_height, undrawn


def test_an_image_keeps_its_pixels_outside_its_caption() -> None:
    image = torch.full((2, 256, 300, 3), 0.5)
    drawn = captioned(image, "Before")
    changed = (drawn != image).any(-1)
    assert changed.any()
    assert not changed[:, 64:].any()  # in the upper corner
    assert not changed[:, :, 200:].any()
    assert drawn.max() > 0.95  # white letters on a dark plate
    assert drawn.min() < 0.15
    assert bool((image == 0.5).all()), "the input is not written to"
    assert captioned(image, " ") is image


def test_letters_grow_with_the_row_that_they_are_seen_in() -> None:
    image = torch.full((1, 256, 600, 3), 0.5)

    def lines(across: int) -> int:
        return int((captioned(image, "Before", across) != image).any(-1).any(-1).sum())

    assert lines(2 * 256) == lines(0)
    assert lines(4 * 256) == pytest.approx(2 * lines(0), rel=0.15)


def test_a_long_caption_is_read_whole_beside_a_panorama() -> None:
    image = torch.full((1, 400, 400, 3), 0.5)
    plate = (captioned(image, "The photo before the edit", 6000) != image).any(-1)[0]
    assert 0.8 * 400 < int(plate.any(0).sum()) <= 400
    assert not plate[:, -1].any() or int(plate.any(1).sum()) < 100
    short = (captioned(image, "A", 6000) != image).any(-1)[0]
    assert int(short.any(1).sum()) < 0.25 * 400


def test_letters_that_pillow_has_not_are_drawn_by_a_font_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    own, asked = font(20), list[str]()
    assert undrawn(own, "Before | After 123") == ""
    assert "\uffff" in undrawn(own, "Apr\uffff")
    fonts = {"b.ttf": font(21), "c.ttf": font(22)}
    lacks = {id(own): "xyz", id(fonts["b.ttf"]): "z", id(fonts["c.ttf"]): "yz"}

    def system(name: str, size: int) -> object:
        asked.append(name)
        if name not in fonts:
            raise OSError
        return fonts[name]

    monkeypatch.setattr(captions, "FONTS", ("a.ttf", "b.ttf", "c.ttf"))
    monkeypatch.setattr(ImageFont, "load_default", lambda size: own)
    monkeypatch.setattr(ImageFont, "truetype", system)
    monkeypatch.setattr(captions, "undrawn", lambda letters, text: lacks[id(letters)] if text == "xyz" else "")
    assert font(20, "xyz") is fonts["b.ttf"]
    assert asked == ["a.ttf", "b.ttf", "c.ttf"]
    assert font(20, "plain") is own
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("count", "size"), [(2, (256, 2 * 256 + GAP)), (3, (256, 3 * 256 + 2 * GAP)), (4, (512 + GAP, 512 + GAP))]
)
def test_two_and_three_stand_in_a_row_and_four_in_a_square(count: int, size: tuple[int, int]) -> None:
    images = [torch.full((1, 256, 256, 3), 0.1 * (i + 1)) for i in range(count)]
    made = sheet(images, [])
    assert made.shape == (1, *size, 3)
    assert made[0, 5, 5, 0] == pytest.approx(0.1)
    assert made[0, -5, -5, 0] == pytest.approx(0.1 * count)
    assert made[0, 5, 256 + GAP // 2, 0] == 1


def test_sizes_and_lengths_of_batches_may_differ() -> None:
    clip, image = torch.rand(3, 128, 64, 3), torch.full((1, 320, 320, 4), 0.25)
    made = sheet([clip, image], ["a", "b"])
    assert made.shape == (3, 320, 160 + GAP + 320, 3)
    assert bool((made[:, -1, -1] == 0.25).all())
    assert to_height(clip, 128) is clip
    wide = torch.full((1, 8, 100, 3), 0.5)  # a caption that is larger than its image is cut
    assert captioned(wide, "a caption that is much too long").shape == wide.shape
