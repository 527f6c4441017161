"""The canvas: place, scale, snap, backgrounds, and original pixels pasted back."""

from __future__ import annotations

import pytest
import torch
from slipstream.core import SeededNoise
from slipstream.core.masks import grow
from slipstream.cow.canvas import (
    canvas_size,
    image_background,
    noise_background,
    on_scene,
    padded,
    paste_back,
    paste_mask,
    place,
    plain_background,
)
from slipstream_tests.noisy_masks import NOISY, noisy

GREY = plain_background(64, 96)


def photo(batch: int = 1, height: int = 50, width: int = 40) -> torch.Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(1))


def subject(top: int = 10, left: int = 8, height: int = 24, width: int = 16) -> torch.Tensor:
    mask = torch.zeros(1, 50, 40)
    mask[:, top : top + height, left : left + width] = 1
    return mask


def test_pixels_and_mask_at_scale_one_are_the_photos_own():
    canvas = place(photo(), subject(), GREY, x=0.5, y=0.5)
    kept = canvas.keep[0] == 1
    assert kept.sum() == 24 * 16
    torch.testing.assert_close(canvas.image[0][kept], photo()[0, 10:34, 8:24].reshape(-1, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(canvas.image[0][~kept], GREY[0][~kept])


@pytest.mark.parametrize("x", [0.0, 0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("y", [0.0, 0.33, 0.77])
def test_the_corner_snaps_to_the_latent_grid(x, y):
    canvas = place(photo(), subject(), GREY, x=x, y=y)
    rows, columns = canvas.keep[0].any(1).nonzero()[0], canvas.keep[0].any(0).nonzero()[0]
    assert int(rows) % 8 == 0
    assert int(columns) % 8 == 0


def test_the_far_edges_are_touched():
    canvas = place(photo(), subject(height=21, width=13), GREY, x=1.0, y=1.0)
    assert canvas.keep[0, -1].any()
    assert canvas.keep[0, :, -1].any()


@pytest.mark.parametrize("scale", [0.43, 0.5, 1.7])
def test_the_cut_out_has_no_fringe_of_what_the_mask_hides(scale):
    rows, columns = torch.meshgrid(torch.arange(50) - 24.5, torch.arange(40) - 19.5, indexing="ij")
    disc = (rows**2 + columns**2 < 17**2).float()[None]
    red, green = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    canvas = place(torch.where(disc[..., None] == 1, red, green), disc, GREY, scale=scale)
    soft = (canvas.keep > 0) & (canvas.keep < 1)
    assert soft.any()
    expected = GREY + canvas.keep[..., None] * (red - GREY)
    torch.testing.assert_close(canvas.image, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(canvas.photo[soft], red.expand(int(soft.sum()), 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", NOISY)
def test_black_and_white_that_are_not_exact_give_the_same_canvas(kind):
    masks = subject(), noisy(subject(), kind)
    for clean, found in zip(*(vars(place(photo(), mask, GREY, scale=1.5)).values() for mask in masks)):
        assert torch.equal(clean, found)


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0])
def test_scale_keeps_the_proportions(scale):
    canvas = place(photo(), subject(), GREY, scale=scale)
    box = canvas.keep[0] > 0.5
    height, width = int(box.any(1).sum()), int(box.any(0).sum())
    assert (height, width) == (24 * scale, 16 * scale)


def test_a_canvas_smaller_than_the_subject_says_which_scale_fits():
    message = r"at least 80 x 120 pixels for the subject at `scale` 5.0, but got 96 x 64. .* a scale of at most 2.666"
    with pytest.raises(ValueError, match=message):
        place(photo(), subject(), GREY, scale=5.0)
    assert place(photo(), subject(), GREY, scale=2.666).keep.any()


@pytest.mark.parametrize("size", [(52, 40), (49, 43), (52, 44)])
def test_a_subject_as_large_as_its_photo_fits_the_canvas_that_follows_the_photo(size):
    height, width, filling = canvas_size(size)
    assert (height, width) != size
    image = photo(height=size[0], width=size[1])
    canvas = place(image, torch.ones(1, *size), plain_background(height, width), filling=filling)
    top, left = max(0, size[0] - height), max(0, size[1] - width)
    assert int(canvas.keep.sum()) == min(size[0], height) * min(size[1], width)
    torch.testing.assert_close(canvas.image[canvas.keep == 1], image[0, top:, left:].reshape(-1, 3), atol=1e-6, rtol=0)


def test_the_scale_that_fits_counts_as_the_one_that_was_given():
    height, width, filling = canvas_size((50, 40), width=80)
    wide = torch.ones(1, 50, 40)
    with pytest.raises(
        ValueError, match=r"for the subject at `scale` 3.0, but got 80 x 96. .* a scale of at most 0.96\."
    ):
        place(photo(), wide, plain_background(height, width), scale=3.0, filling=filling)
    assert place(photo(), wide, plain_background(height, width), scale=1.0, filling=filling).keep.any()
    with pytest.raises(ValueError, match="Expected `keep` with at least one painted pixel"):
        place(photo(), torch.zeros(1, 50, 40), GREY)


def test_soft_masks_stay_soft_and_a_mask_of_another_size_is_resized():
    soft = subject() * 0.5
    assert float(place(photo(), soft, GREY).keep.max()) == pytest.approx(0.5)
    large = subject().repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(place(photo(), large, GREY).keep, place(photo(), subject(), GREY).keep)


def test_each_picture_of_a_batch_has_its_own_subject():
    masks = torch.cat([subject(), subject(0, 0, 8, 8)])
    canvas = place(photo(2), masks, GREY)
    assert canvas.image.shape == (2, 64, 96, 3)
    assert [int((k == 1).sum()) for k in canvas.keep] == [24 * 16, 64]
    assert place(photo(2), subject(), GREY).keep.shape == (2, 64, 96)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"keep": subject() * 0}, "`keep` with at least one painted pixel"),
        ({"keep": subject() * float("nan")}, "`keep` to be finite"),
        ({"keep": subject().expand(3, -1, -1)}, "`keep` with 1 or 1 masks, but got 3"),
        ({"image": photo()[..., :2]}, "`image` of shape"),
        ({"x": 1.5}, "`x` between 0 and 1, but got 1.5. It is a share of the free space"),
        ({"scale": 0.0}, "`scale` between 0.001 and 100, but got 0.0"),
    ],
)
def test_bad_input(more, message):
    with pytest.raises(ValueError, match=message):
        place(**{"image": photo(), "keep": subject(), "background": GREY, **more})


@pytest.mark.parametrize(("height", "width"), [(63, 90), (61, 96), (64, 97)])
def test_a_canvas_of_any_size_is_padded_to_whole_cells(height, width):
    """In the corner, where the subject touches the edges that are repeated."""
    canvas = place(photo(), subject(), plain_background(height, width), x=1.0, y=1.0)
    whole = padded(canvas, 8)
    assert canvas.image.shape == (1, height, width, 3)
    assert whole.image.shape == (1, 64, -(-width // 8) * 8, 3)
    assert whole.keep.shape == whole.image.shape[:3]
    assert torch.equal(whole.image[:, :height, :width], canvas.image)
    assert torch.equal(whole.keep[:, :height, :width], canvas.keep)
    assert torch.equal(whole.photo[:, :height, :width], canvas.photo)
    assert bool((whole.keep[:, -1, width - 2] == 1).all())
    assert padded(whole, 8).image is whole.image


@pytest.mark.parametrize("scale", [0.37, 0.5, 1.3])
def test_resizing_keeps_the_inside_fully_kept(scale):
    keep = place(photo(), subject(), GREY, scale=scale).keep
    assert int((keep == 1).sum()) > 0.6 * int((keep > 0).sum())


# Backgrounds


def test_plain_colours():
    assert plain_background(8, 8, "#ff0080")[0, 0, 0].tolist() == pytest.approx([1, 0, 128 / 255])
    assert float(GREY.mean()) == pytest.approx(128 / 255)
    for wrong in ("grey", "#12345", "#gggggg"):
        with pytest.raises(ValueError, match="`colour` as #rrggbb"):
            plain_background(8, 8, wrong)


def test_noise_comes_from_the_seed():
    one, two = noise_background(8, 8, SeededNoise(1)), noise_background(8, 8, SeededNoise(1))
    assert torch.equal(one, two)
    assert not torch.equal(one, noise_background(8, 8, SeededNoise(2)))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (16, 160)])
def test_a_picture_fills_the_canvas(height, width):
    striped = torch.zeros(1, 40, 60, 3)
    striped[:, :, 30:] = 1
    filled = image_background(striped, height, width)
    assert filled.shape == (1, height, width, 3)
    assert float(filled.mean()) == pytest.approx(0.5, abs=0.02)


# Pasting back


def test_original_pixels_come_back_exactly_inside_the_mask():
    canvas = place(photo(), subject(), GREY)
    other = torch.full_like(canvas.image, 0.25)
    pasted = paste_back(other, canvas)
    kept = canvas.keep == 1
    assert torch.equal(pasted[kept], canvas.photo[kept])
    assert torch.equal(pasted[canvas.keep == 0], other[canvas.keep == 0])


def test_softness_fades_inside_the_edge_only():
    keep = torch.zeros(1, 64, 64)
    keep[:, 16:48, 16:48] = 1
    soft = paste_mask(keep, 4)
    assert (soft <= keep).all()
    assert float(soft[0, 32, 32]) == pytest.approx(1)
    edge = soft[0, 32, 16:28]
    assert (edge[1:] >= edge[:-1] - 1e-6).all()
    assert float(edge[0]) < 0.2


def test_softness_leaves_a_subject_that_touches_the_border_whole():
    keep = torch.zeros(1, 64, 64)
    keep[:, 32:, 16:48] = 1
    assert float(paste_mask(keep, 4)[0, 63, 32]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("sides", "pixels", "wanted"),
    [
        ((0, 0), None, (480, 640, 1.0)),
        ((0, 0), 320 * 240, (240, 320, 0.5)),
        ((0, 0), 4 * 640 * 480, (960, 1280, 2.0)),
        ((320, 0), None, (240, 320, 0.5)),
        ((0, 960), 100, (960, 1280, 2.0)),
        ((64, 96), 100, (96, 64, 1.0)),
    ],
)
def test_a_side_of_0_follows_the_photo_and_the_model(sides, pixels, wanted):
    assert canvas_size((480, 640), *sides, pixels) == wanted


def test_a_photo_of_any_size_gives_whole_latent_cells():
    height, width, filling = canvas_size((333, 517), pixels=256**2)
    assert height % 8 == width % 8 == 0
    assert abs(height * width / 256**2 - 1) < 0.05
    assert filling == pytest.approx(256 / (333 * 517) ** 0.5)


def test_a_subject_on_its_scene():
    """Own pixels inside, the scene beyond `reach`, and between them what is beyond: a second outline there is gone."""
    scene, keep = torch.full((2, 32, 40, 3), 0.25), torch.zeros(1, 32, 40)
    keep[:, 10:20, 12:24] = 1
    scene[:, 7:23, 9:27] = 0.9  # the scene's own, larger outline
    scene[1, 28:] = 0.6
    out = on_scene(scene, torch.full((1, 32, 40, 3), 0.1), keep, reach=4)
    inside = keep[0] == 1
    assert (out[:, inside] == 0.1).all()
    torch.testing.assert_close(out[0][~inside], torch.full_like(out[0][~inside], 0.25))
    assert torch.equal(out[1, 28:], scene[1, 28:])


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("wide", [1, 5, 8])
def test_an_outline_is_filled_as_far_as_it_looks_like_the_subject(side, wide):
    """Up to an eighth of the side; another object beside it, which extends beyond that, stays as it is."""
    keep, photo = torch.zeros(1, side, side), torch.full((1, side, side, 3), 0.9)
    middle = slice(side // 2 - 5, side // 2 + 5)
    keep[:, middle, middle] = 1
    scene = torch.full((1, side, side, 3), 0.2)
    scene[grow(keep, wide) == 1] = 0.8
    torch.testing.assert_close(on_scene(scene, photo, keep, 4), torch.where(keep[..., None] == 1, photo, 0.2))
    scene[:, :, : side // 2 - 5 - 6] = torch.tensor([1.0, 0.0, 0.0])
    out = on_scene(scene, photo, keep, 4)
    assert torch.equal(out[:, :, : side // 2 - 5 - 7], scene[:, :, : side // 2 - 5 - 7])


def test_a_subject_with_nothing_beyond_it_leaves_the_scene_as_it_is():
    scene, keep = torch.rand(2, 32, 32, 3), torch.ones(2, 32, 32)
    keep[:, :3] = 0
    photo = torch.rand(2, 32, 32, 3)
    out = on_scene(scene, photo, keep)
    assert torch.equal(out[:, :3], scene[:, :3])
    assert torch.equal(out[:, 3:], photo[:, 3:])


def test_a_soft_edge_on_a_scene_mixes_photo_and_scene():
    keep = torch.zeros(1, 32, 32)
    keep[:, 10:20, 10:20], keep[:, 10] = 1, 0
    keep[:, 10, 10:20] = 0.5
    out = on_scene(torch.zeros(1, 32, 32, 3), torch.ones(1, 32, 32, 3), keep)
    torch.testing.assert_close(out[..., 0], keep)
