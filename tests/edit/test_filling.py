"""What is left behind is filled by a copy that fits: patterns continue exactly, gradients smoothly, and no other object is copied in."""

from __future__ import annotations

import math

import pytest
import torch
from slipstream.core.tensors import fill
from slipstream.edit.completion import _levels, completed
from slipstream.edit.filling import refilled
from torch import Tensor

SIZE = 160


def grid(size: int = SIZE) -> tuple[Tensor, Tensor]:
    ys, xs = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    return ys, xs


def two_colours(where: Tensor) -> Tensor:
    dark, light = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.9, 0.8, 0.1])
    return torch.where(where[..., None], light, dark).movedim(-1, 0)[None]


def disc(y: float, x: float, radius: float, size: int = SIZE) -> Tensor:
    ys, xs = grid(size)
    return ((ys - y) ** 2 + (xs - x) ** 2 < radius**2).float()


def patterns() -> dict[str, Tensor]:
    ys, xs = grid()
    return {
        "plain": two_colours(xs < 0),
        "upright stripes": two_colours((xs // 9) % 2 == 0),
        "slanted stripes": two_colours(((xs + ys) // 12) % 2 == 0),
        "waves": two_colours(((xs + 5 * torch.sin(2 * math.pi * ys / 40)).floor() // 10) % 2 == 0),
        "checkers": two_colours(((xs // 11) + (ys // 11)) % 2 == 0),
        "dots": two_colours((xs % 16 - 8) ** 2 + (ys % 16 - 8) ** 2 < 16),
    }


@pytest.mark.parametrize("name", patterns())
@pytest.mark.parametrize("at", [(80, 80), (30, 120), (12, 40)])
def test_a_pattern_goes_on_exactly(name: str, at: tuple[int, int]) -> None:
    truth, hole = patterns()[name], disc(*at, 18)
    photo = torch.where(hole > 0, torch.tensor([1.0, 0.0, 1.0])[:, None, None], truth)
    out, sure = refilled(photo, [hole])
    assert torch.equal(out, truth)
    assert bool((sure[hole > 0] == 1).all())
    assert not bool(sure[disc(*at, 24) == 0].any())


def test_a_gradient_goes_on_smoothly() -> None:
    ys, xs = grid()
    truth = torch.stack([xs / SIZE, ys / SIZE, 0.5 + 0.2 * torch.sin(xs / 50)])[None]
    hole = disc(70, 90, 20)
    photo = torch.where(hole > 0, 1.0, truth)
    error = (refilled(photo, [hole])[0] - truth).abs().amax()
    assert float(error) < 0.03


def test_shaded_stripes_keep_both_stripes_and_shade() -> None:
    ys, xs = grid()
    truth = two_colours((xs // 9) % 2 == 0) * (0.9 + 0.1 * ys / SIZE)
    hole = disc(80, 60, 16)
    out, _ = refilled(torch.where(hole > 0, 0.0, truth), [hole])
    assert float((out - truth).abs().amax()) < 0.03


def test_no_other_object_is_copied_into_the_hole() -> None:
    """On a plain ground every shift fits around the hole: also one that would bring a smaller object along."""
    truth = two_colours(grid()[1] < 0).clone()
    for other in (disc(30, 30, 10), disc(120, 40, 8), disc(40, 130, 12)):
        truth = torch.where(other > 0, torch.tensor([0.9, 0.1, 0.1])[:, None, None], truth)
    hole = disc(90, 100, 22)
    out, _ = refilled(torch.where(hole > 0, 1.0, truth), [hole])
    assert torch.equal(out, truth)


def test_an_object_that_touches_the_hole_does_not_bleed_into_it() -> None:
    truth = two_colours((grid()[1] // 9) % 2 == 0)
    truth = torch.where(disc(80, 112, 12) > 0, torch.tensor([0.9, 0.1, 0.1])[:, None, None], truth)
    hole = disc(80, 80, 18)
    out, _ = refilled(torch.where(hole > 0, 1.0, truth), [hole])
    assert torch.equal(out, truth)


def test_a_plain_ground_goes_on_where_another_object_takes_up_much_of_the_edge() -> None:
    truth = two_colours(grid()[1] < 0)
    truth = torch.where(
        grid()[0] < 64, torch.tensor([0.9, 0.8, 0.1])[:, None, None], truth
    )  # a third of the hole's edge
    hole = disc(80, 80, 18) * (grid()[0] >= 64)
    out, sure = refilled(torch.where(hole > 0, 1.0, truth), [hole])
    assert torch.equal(out[..., 66:, :], truth[..., 66:, :])
    assert bool((sure[hole > 0] == 1).all())


def test_several_holes_are_filled_from_what_is_none() -> None:
    truth = two_colours((grid()[1] // 9) % 2 == 0)
    holes = [disc(40, 40, 15), disc(44, 76, 15), disc(120, 100, 20)]
    gone = torch.stack(holes).amax(0)
    out, sure = refilled(torch.where(gone > 0, 0.5, truth), holes)
    assert torch.equal(out, truth)
    assert bool((sure[gone > 0] == 1).all())


def test_where_no_copy_fits_the_fill_has_the_texture_of_its_surroundings_and_is_not_sure() -> None:
    noise = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    hole = disc(80, 80, 20)
    out, sure = refilled(noise, [hole])
    assert not bool(sure.any())
    inside = disc(80, 80, 18) > 0
    assert float(out[..., inside].std()) > 0.3 * float(noise[..., inside].std())  # a smooth fill: 0.05
    assert torch.equal(out, refilled(noise, [hole])[0])


def crossing() -> tuple[Tensor, Tensor]:
    """Return a hole across the slanted border between two grounds of light that changes, and the image."""
    ys, xs = grid()
    below = (ys > 75 + xs / 8)[None]
    sky, hill = (torch.tensor(c)[:, None, None] for c in ((0.2, 0.5, 0.9), (0.3, 0.6, 0.2)))
    truth = torch.where(below, hill * (0.7 + 0.3 * xs / SIZE), sky * (0.6 + 0.4 * ys / SIZE))[None]
    return disc(88, 84, 20), truth


def test_a_border_goes_on_through_a_hole_patch_by_patch() -> None:
    hole, truth = crossing()
    known = 1 - torch.nn.functional.max_pool2d(hole[None, None], 3, 1, 1)
    photo = torch.where(hole > 0, 1.0, truth)
    errors = [
        float((out - truth)[..., hole > 0].square().mean().sqrt())
        for out in (completed(photo, known[0, 0] == 0, known[0, 0] > 0), fill(photo, known))
    ]
    assert errors[0] < 0.3 * errors[1]  # measured 0.026 and 0.118


def test_what_is_carried_does_not_come_up_behind_itself() -> None:
    ys, xs = grid()
    ground = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 0.3
    carried = ((xs > 100) & (xs < 140) & (ys > 50) & (ys < 110)).float()
    photo = torch.where(carried > 0, torch.tensor([1.0, 0.0, 0.0])[:, None, None], ground)
    hole = ((xs > 70) & (xs < 98) & (ys > 50) & (ys < 110)).float()
    out, _ = refilled(photo, [hole], carried)
    assert float(out[:, 0][..., hole > 0].max()) < 0.5


def test_a_hole_without_any_whole_patch_around_it_is_filled_smoothly() -> None:
    photo = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(12, 12, dtype=torch.bool)
    hole[4:8, 4:8] = True
    torch.testing.assert_close(
        completed(photo, hole, ~hole), torch.where(hole, fill(photo, (~hole).float()[None, None]), photo)
    )


def test_nothing_changes_outside_and_without_holes() -> None:
    photo = patterns()["dots"]
    assert refilled(photo, [])[0] is photo
    hole = disc(80, 80, 10)
    out, _ = refilled(photo, [hole])
    outside = torch.nn.functional.max_pool2d(hole[None, None], 3, 1, 1)[0, 0] == 0
    assert torch.equal(out[..., outside], photo[..., outside])


@pytest.mark.parametrize("size", [(3, 5), (1, 40), (24, 24)])
def test_small_and_narrow_images(size: tuple[int, int]) -> None:
    hole = torch.zeros(size)
    hole[size[0] // 2, size[1] // 2] = 1
    out, _ = refilled(torch.full((1, 4, *size), 0.25), [hole])
    assert torch.equal(out, torch.full((1, 4, *size), 0.25))


def test_a_wide_shallow_hole_is_reduced_too_so_that_its_patches_are_soon_compared() -> None:
    """A drag leaves stripes; all their patches against all others of a photo took 6 of 9 seconds."""
    ys, _ = grid(400)
    hole = (ys > 100) & (ys < 200) & (ys % 20 < 8)
    levels = _levels(torch.rand(1, 3, 400, 400), hole, ~hole)
    assert len(levels) > 1
    assert len(levels[-1].centres) * len(levels[-1].sources) < 1 << 23
