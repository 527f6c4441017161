"""Maps between pixels and cells: closed forms, no wrap-around, sub-pixel, odd sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from slipstream.core.tensors import fill
from slipstream.edit import Drag, Move
from slipstream.edit.geometry import Affine, Canvas, Photo, bent, centre_of, depth, freedom, sample_at
from slipstream.edit.pixels import draft, fit, hard_edged, to_size
from slipstream.edit.placing import lay_out, place, uncovered
from slipstream_tests.edit.small import box, picture


def test_the_inverse_undoes_scale_and_shift() -> None:
    points = torch.rand(7, 2) * 50
    map_ = Affine((10.0, 20.0), 1.7, (3.5, -8.0))
    forward = (points - torch.tensor([10.0, 20.0])) * 1.7 + torch.tensor([10.0, 20.0]) + torch.tensor([3.5, -8.0])
    torch.testing.assert_close(map_.inverse(forward), points)


@pytest.mark.parametrize("angle", [-270.0, -33.0, 0.0, 12.5, 90.0, 180.0, 360.0])
def test_forward_and_inverse_undo_each_other_at_any_angle(angle: float) -> None:
    points = torch.rand(7, 2) * 50
    map_ = Affine((10.0, 20.0), 1.7, (3.5, -8.0), angle)
    torch.testing.assert_close(map_.inverse(map_.forward(points)), points)


def test_a_positive_angle_turns_clockwise_about_the_centre() -> None:
    map_ = Affine((10.0, 20.0), 2.0, (1.0, 0.0), 90.0)
    right, down = torch.tensor([13.0, 20.0]), torch.tensor([11.0, 26.0])  # y points down
    assert torch.equal(map_.forward(right), down)


@pytest.mark.parametrize(
    ("angle", "expected"), [(90.0, (12, 20, 28, 44)), (180.0, (8, 24, 32, 40)), (-270.0, (12, 20, 28, 44)), (360.0, (8, 24, 32, 40))]
)  # fmt: skip
def test_quarter_turns_move_the_mask_and_the_image_exactly(angle: float, expected: tuple[int, ...]) -> None:
    canvas, mask = Canvas((64, 96), (8, 12), 8), box(8, 24, 32, 40)
    placed = place(Move(mask, angle=angle), canvas, canvas)
    assert torch.equal(placed.target.round(decimals=4), box(*expected))
    image = torch.rand(1, 3, 64, 96)
    drafted, _ = draft([image], [canvas.size], [(0, placed)])
    top, left, bottom, right = expected
    turned = torch.rot90(image[..., 8:32, 24:40], -round(angle / 90), (-2, -1))
    torch.testing.assert_close(drafted[..., top:bottom, left:right], turned, atol=1e-4, rtol=0)


def test_a_turn_by_any_angle_keeps_the_area_and_the_centre() -> None:
    canvas, mask = Canvas((64, 96), (8, 12), 8), box(20, 30, 44, 66)
    target = place(Move(mask, 4.0, -2.0, 0.75, angle=30.0), canvas, canvas).target
    assert float(target.sum()) == pytest.approx(24 * 36 * 0.75**2, rel=0.01)
    centroid = (canvas.pixel_centres() * target[..., None]).sum((0, 1)) / target.sum()
    torch.testing.assert_close(centroid, torch.tensor([48.0 + 4, 32.0 - 2]), atol=0.05, rtol=0)


GROUND, INK = (0.25, 0.5, 0.75), (0.875, 0.125, 0.0)


def drawing(over: int = 1) -> torch.Tensor:
    """A flat box on a flat ground (1, 64, 96, 3), `over`-fold antialiased."""
    covered = box(20 * over, 30 * over, 44 * over, 66 * over, (64 * over, 96 * over))
    if over > 1:
        covered = torch.nn.functional.avg_pool2d(covered.roll(over // 2, 1)[None], over)[0]
    return torch.tensor(GROUND) + covered[None, ..., None] * (torch.tensor(INK) - torch.tensor(GROUND))


@pytest.mark.parametrize("move", [{"angle": 30.0}, {"dx": 3.4, "dy": -2.7}, {"scale": 1.37}])
def test_a_drawing_keeps_its_hard_edges_where_they_go(move: dict[str, float]) -> None:
    """Every pixel is ink or ground, and ink exactly where the moved box covers its centre, but for the four corners."""
    photo = Photo(Canvas((64, 96), (8, 12), 8), drawing())
    drafted = lay_out([Move(box(20, 30, 44, 66), **move)], photo).draft()
    assert drafted is not None
    ink = (drafted[0] - torch.tensor(INK)).abs().amax(-1)[0] < 1e-5
    ground = (drafted[0] - torch.tensor(GROUND)).abs().amax(-1)[0] < 1e-5
    assert bool((ink | ground).all())
    shift = (move.get("dx", 0.0), move.get("dy", 0.0))
    origin = Affine((48.0, 32.0), move.get("scale", 1.0), shift, move.get("angle", 0.0)).inverse(
        photo.canvas.pixel_centres()
    )
    wanted = (origin[..., 0] > 30) & (origin[..., 0] < 66) & (origin[..., 1] > 20) & (origin[..., 1] < 44)
    assert int((ink != wanted).sum()) <= 4


def test_an_antialiased_drawing_and_a_photo_stay_smooth() -> None:
    mask = box(20, 30, 44, 66)
    assert hard_edged(drawing(), mask)
    assert hard_edged(torch.cat([drawing()[:, :32], 1 - drawing()[:, 32:]], 1), mask)  # several colours
    assert not hard_edged(drawing(4), mask)
    assert not hard_edged(torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0)), mask)
    assert not hard_edged(torch.full((1, 64, 96, 3), 0.5), mask)  # nothing to tell by
    # A cut-out photo on white: the flat ground says nothing about the object.
    cut = torch.where(mask[None, ..., None] > 0.5, torch.rand(1, 64, 96, 3), torch.ones(3))
    assert not hard_edged(cut, mask)


def test_a_turn_about_the_image_carries_the_object_round() -> None:
    canvas = Canvas((64, 64), (8, 8), 8)
    target = place(Move(box(8, 8, 16, 16, (64, 64)), about="image", angle=90.0), canvas, canvas).target
    assert torch.equal(target.round(decimals=4), box(8, 48, 16, 56, (64, 64)))


@pytest.mark.parametrize(("dx", "dy"), [(16.0, 8.0), (-16.0, 0.0), (5.0, -3.0)])
def test_a_shift_by_whole_pixels_moves_the_mask_exactly(dx: float, dy: float) -> None:
    canvas, mask = Canvas((64, 96), (8, 12), 8), box()
    placed = place(Move(mask, dx, dy), canvas, canvas)
    expected = box(16 + int(dy), 16 + int(dx), 40 + int(dy), 40 + int(dx))
    assert torch.equal(placed.target.round(decimals=4), expected)
    assert torch.equal(placed.vacated.round(decimals=4), mask * (1 - expected))


def test_a_shift_by_half_a_pixel_is_a_soft_edge_of_one_half() -> None:
    canvas = Canvas((64, 96), (8, 12), 8)
    target = place(Move(box(), 0.5, 0.0), canvas, canvas).target
    assert target[20, 16] == pytest.approx(0.5, abs=1e-4)
    assert target[20, 40] == pytest.approx(0.5, abs=1e-4)
    assert float(target.sum()) == pytest.approx(24 * 24, abs=0.1)


def test_scaling_is_about_the_objects_centre_or_the_pictures() -> None:
    canvas, mask = Canvas((64, 96), (8, 12), 8), box(8, 8, 24, 24)
    own = place(Move(mask, scale=2.0), canvas, canvas).target
    assert torch.equal((own > 0.5).float(), box(0, 0, 32, 32))
    about_picture = place(Move(mask, scale=0.5, about="image"), canvas, canvas).target
    assert torch.equal((about_picture > 0.5).float(), box(20, 28, 28, 36))
    assert centre_of(mask, "object") == (16.0, 16.0)


def test_nothing_wraps_round_the_border() -> None:
    canvas = Canvas((64, 96), (8, 12), 8)
    target = place(Move(box(16, 64, 40, 90), 20.0, 0.0), canvas, canvas).target
    assert float(target[:, :60].sum()) == 0
    assert float(target.sum()) == pytest.approx(24 * 12, abs=0.1)  # the rest left the image


def test_cells_hold_the_covered_share_and_padding_is_not_covered() -> None:
    canvas = Canvas((60, 90), (8, 12), 8)
    shares = canvas.to_grid(torch.ones(60, 90))
    assert float(shares[0, 0, 0, 0]) == 1
    assert float(shares[0, 0, 7, 0]) == pytest.approx(0.5)  # 4 of 8 rows
    assert float(shares[0, 0, 0, 11]) == pytest.approx(0.25)  # 2 of 8 columns


def test_a_cell_reads_where_its_content_comes_from() -> None:
    values = Canvas((64, 96), (8, 12), 8).cell_centres().permute(2, 0, 1)[None]  # a map that tells its own coordinates
    points = torch.tensor([[[33.0, 21.0], [50.5, 40.25]]])
    assert torch.allclose(sample_at(values, points, (64, 96))[0, :, 0].T, points[0])


def test_a_bend_is_exact_at_its_points_and_still_at_the_edge_of_the_mask() -> None:
    mask = box(8, 8, 56, 88)
    pairs = [((30.5, 30.5), (42.5, 34.5)), ((60.5, 30.5), (60.5, 30.5))]
    targets = [target for _, target in pairs]
    pixels = Canvas((64, 96), (8, 12), 8).pixel_centres()
    points = bent(pixels, pairs, freedom(mask, targets))
    for (hx, hy), (tx, ty) in pairs:
        torch.testing.assert_close(points[int(ty), int(tx)], torch.tensor([hx, hy]), atol=1e-3, rtol=0)
    assert torch.equal(points[mask == 0], pixels[mask == 0])


def test_one_pair_carries_everything_deep_inside() -> None:
    mask = box(8, 8, 56, 88)
    pairs = [((30.5, 30.5), (40.5, 30.5))]
    pixels = Canvas((64, 96), (8, 12), 8).pixel_centres()
    found, inner = bent(pixels, pairs, freedom(mask, [pairs[0][1]])), (slice(24, 40), slice(24, 72))
    torch.testing.assert_close(found[inner], pixels[inner] + torch.tensor([-10.0, 0.0]))


def test_depth_counts_pixels_from_the_edge_but_not_from_the_pictures_border() -> None:
    deep = depth(box(0, 8, 20, 30), 64)
    assert (deep[5, 8], deep[5, 10], deep[0, 19], deep[19, 19], deep[40, 40]) == (1, 3, 11, 1, 0)
    assert float(depth(torch.ones(9, 9), 64).min()) == 64


def test_torn_and_folded_areas_count_as_uncovered() -> None:
    canvas = Canvas((64, 96), (8, 12), 8)
    still = canvas.pixel_centres()
    assert not bool(uncovered(still).any())
    assert bool(uncovered(still * torch.tensor([0.3, 1.0])).all())  # three times as wide
    assert bool(uncovered(still * torch.tensor([-1.0, 1.0])).all())  # mirrored
    placed = place(Drag(box(8, 8, 56, 88), [((30.0, 30.0), (34.0, 30.0))]), canvas, canvas)
    assert bool((placed.target[box(8, 8, 56, 88) == 0] == 0).all())
    assert bool(placed.removed.any())


@pytest.mark.parametrize("shift", [(0, -20), (8, -20), (20, 0)])
def test_what_stays_at_the_edge_of_a_drag_is_not_seen_twice(shift: tuple[int, int]) -> None:
    """A white square is pulled through the sky; the ground, at the edge of the mask and below, stays where it is."""
    image, ground = torch.tensor([0.2, 0.4, 1.0]).expand(1, 96, 96, 3).clone(), 74
    image[:, ground:] = torch.tensor([0.2, 1.0, 0.2])
    image[:, 50:58, 44:52] = 1.0
    (dx, dy), canvas = shift, Canvas((96, 96), (12, 12), 8)
    mask = torch.zeros(96, 96)
    mask[4:76, 8:88] = 1
    task = Drag(mask, [((48.0, 54.0), (48.0 + dx, 54.0 + dy))])
    made = lay_out([task], Photo(canvas, image)).draft()
    assert made is not None
    drafted = made[0][0]
    assert float((drafted[54 + dy, 48 + dx] - 1).abs().max()) < 0.05
    green = drafted[..., 1] - drafted[..., 2] > 0.2
    assert not bool(green[: ground - 2].any())
    assert bool(green[ground:].all())


@pytest.mark.parametrize("size", [(64, 96), (61, 97), (40, 33), (9, 200)])
def test_any_size_fits_and_comes_back(size: tuple[int, int]) -> None:
    image = torch.rand(1, *size, 3)
    padded, canvas = fit(image, 8)
    assert padded.shape[1] % 8 == 0
    assert padded.shape[2] % 8 == 0
    assert canvas.size == size
    assert torch.equal(to_size(padded, size), image)


def test_a_large_picture_is_reduced_with_one_factor_and_keeps_its_coordinates() -> None:
    padded, canvas = fit(torch.rand(1, 200, 310, 3), 8, max_pixels=100 * 155)
    assert canvas.cell == pytest.approx(16, rel=0.01)
    assert canvas.grid == (padded.shape[1] // 8, padded.shape[2] // 8)
    again, same = fit(torch.rand(1, 200, 310, 3), 8, like=canvas)
    assert (same.grid, tuple(again.shape)) == (canvas.grid, tuple(padded.shape))
    assert to_size(padded, (200, 310)).shape == (1, 200, 310, 3)


def test_fill_keeps_what_is_known_and_is_exact_for_a_constant() -> None:
    values, known = torch.rand(1, 3, 20, 30), torch.ones(1, 1, 20, 30)
    known[..., 5:12, 8:20] = 0
    filled = fill(values, known)
    assert torch.equal(filled[..., :5, :], values[..., :5, :])
    constant = fill(torch.full((1, 3, 20, 30), 0.4) * known, known)
    torch.testing.assert_close(constant, torch.full((1, 3, 20, 30), 0.4))


def test_the_draft_carries_the_object_and_leaves_no_trace_of_it() -> None:
    canvas, image = Canvas((64, 96), (8, 12), 8), picture()
    placed = place(Move(box(), 40.0, 10.0), canvas, canvas)
    drafted, _ = draft([image.movedim(-1, 1)], [canvas.size], [(0, placed)])
    red = drafted[0, 0] > 0.5
    assert torch.equal(red, box(26, 56, 50, 80) > 0)
    torch.testing.assert_close(drafted[0, 2, 20, 20:36], image[0, 2, 20:36, 2], atol=0.06, rtol=0)


@pytest.mark.parametrize(("dx", "scale"), [(0.5, 1.0), (0.0, 0.6), (0.0, 1.7), (-10.25, 1.0), (-30.0, 1.0)])
def test_a_carried_object_brings_no_fringe_of_its_surroundings(dx: float, scale: float) -> None:
    canvas, image = Canvas((64, 96), (8, 12), 8), torch.zeros(1, 3, 64, 96)
    image[:, 1] = 1  # green all around
    image[..., 16:40, 16:40] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    grey = torch.full_like(image, 0.5)
    placed = place(Move(box(), dx, scale=scale), canvas, canvas)
    drafted, _ = draft([grey, image], [canvas.size] * 2, [(1, replace(placed, removed=torch.zeros(64, 96)))])
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    expected = 0.5 + placed.target * (red - 0.5)
    assert 0 < float(placed.target.mean()) < 1
    torch.testing.assert_close(drafted[0], expected, atol=1e-5, rtol=0)
