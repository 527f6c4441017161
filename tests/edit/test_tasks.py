"""Bad input: each mistake gives one sentence that names the argument and the remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from slipstream.edit import Appearance, Drag, EditConfig, Move, Paste, Tasks, edit, invert
from slipstream.edit.preview import preview
from slipstream_tests.edit import small
from slipstream_tests.edit.small import box
from slipstream_tests.noisy_masks import NOISY, noisy

POINTS = [((24.0, 24.0), (40.0, 30.0))]


@pytest.fixture(scope="module")
def inverted() -> Any:
    return small.inverted()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Move(torch.zeros(8, 8)), "empty mask"),
        (lambda: Move(torch.full((8, 8), math.nan)), "finite"),
        (lambda: Move(torch.ones(2, 8, 8)), "one mask"),
        (lambda: Move(None), "tensor"),  # type: ignore[arg-type]
        (lambda: Move(box(), scale=0.0), "scale"),
        (lambda: Move(box(), scale=1000.0), "scale"),
        (lambda: Move(box(), dx=math.inf), "dx"),
        (lambda: Move(box(), about="corner"), "about"),
        (lambda: Move(box(), angle=400.0), "angle"),
        (lambda: Move(box(), angle=math.nan), "angle"),
        (lambda: Drag(box(), []), "at least one pair"),
        (lambda: Drag(box(), [((1.0, 2.0), (1.0, 2.0))]), "away from its handle"),
        (lambda: Drag(box(), [((1.0, 2.0), (9.0, 9.0)), ((5.0, 5.0), (9.0, 9.0))]), "cannot land on one point"),
        (lambda: Drag(box(), [((math.nan, 2.0), (9.0, 9.0))]), "finite"),
        (lambda: Drag(box(), [(1.0, 2.0)]), "pairs"),  # type: ignore[list-item]
        (lambda: Drag(box(), POINTS, "magic"), "method"),
        (lambda: Tasks.of([]), "at least one"),
        (lambda: Tasks.of([1]), "at least one"),  # type: ignore[list-item]
    ],
)
def test_impossible_tasks_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (lambda: Move(torch.ones(32, 48)), "image's size 96 x 64"),
        (lambda: Move(box(), dx=500.0), "moved out by"),
        (lambda: Drag(box(), [((24.0, 24.0), (300.0, 24.0))]), "points within 96 x 64"),
        (lambda: Drag(box(), [((24.0, 24.0), (60.0, 24.0))]), "targets within `mask`"),
        (
            lambda: Move(box(), 30.0) + Move(box(0, 46, 8, 54), 0.0, 20.0) + Move(box(44, 46, 60, 62), 0.0, -20.0),
            "separate targets",
        ),
        (lambda: Move(box(), 30.0) + Move(box(18, 18, 40, 40), 0.0, 20.0), "different objects"),
        (lambda: Move(box(), 30.0) + Drag(box(10, 10, 44, 44), POINTS), "different objects"),
    ],
)
def test_tasks_that_do_not_fit_the_picture_or_each_other_are_refused(tasks: Any, message: str, inverted: Any) -> None:
    model, inversion = inverted
    with pytest.raises(ValueError, match=message):
        edit(model, inversion, tasks(), config=small.FAST)


def test_an_appearance_of_an_object_that_moves_is_refused(inverted: Any) -> None:
    model, inversion = inverted
    with pytest.raises(ValueError, match="Move it first"):
        edit(model, inversion, Move(box(), 30.0) + Appearance(box(), inversion, box()), config=small.FAST)


def test_a_mask_of_the_reference_is_checked_against_the_reference(inverted: Any) -> None:
    model, inversion = inverted
    with pytest.raises(ValueError, match="image's size"):
        edit(model, inversion, Paste(inversion, torch.ones(10, 10)), config=small.FAST)


def test_an_object_partly_out_of_the_picture_is_cut_and_said(inverted: Any) -> None:
    model, inversion = inverted
    result = edit(model, inversion, Move(box(), dx=64.0), config=small.FAST.replace(energy_scale=0.0))
    assert any("33% of the object" in note for note in result.notes)
    assert bool(torch.isfinite(result.latents).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"), ({"steps": 2.5}, "steps"), ({"schedule": "x"}, "schedule"), ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"energy_scale": math.nan}, "energy_scale"), ({"travel": (0.6, 0.2)}, "travel"), ({"anchor_fill": (0.0, 2.0)}, "anchor_fill"),
        ({"travel": 0.5}, "travel"), ({"eta": 2.0}, "eta"), ({"feather": -1}, "feather"), ({"memory": "disk"}, "memory"),
        ({"w_edit": -1.0}, "w_edit"), ({"mode": "best"}, "mode"),
    ],
)  # fmt: skip
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditConfig(**change)


def test_fractions_give_the_published_step_numbers_at_50_steps() -> None:
    config = EditConfig(steps=50)
    assert config.guided == {*range(10), *range(10, 30, 2)}
    assert [i for i in range(50) if config.passes(i) > 1] == [22, 24, 26, 28]
    assert sum(config.passes(i) for i in range(50)) == 58


def test_the_last_step_never_travels() -> None:
    """Nothing leads back up from level 0 (the published code ends above it)."""
    config = EditConfig(steps=7, travel=(0.6, 1.0))
    assert [config.passes(i) for i in range(7)] == [1, 1, 1, 1, 3, 1, 1]


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(2, 4, 8, 12), "one image"), (torch.full((1, 4, 8, 12), math.nan), "finite"), (torch.zeros(4, 8, 12), "latents"),
    ],
)  # fmt: skip
def test_latents_are_checked(latents: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        invert(small.network(), latents, small.cond(), small.FAST)


def test_models_that_mode_fine_cannot_edit_with_are_refused() -> None:
    from slipstream.core import DiffusersDenoiser
    from slipstream_tests.analytic import GaussianDenoiser

    flow, fine = DiffusersDenoiser(small.network().unet, prediction_type="flow"), small.FAST.replace(mode="fine")
    with pytest.raises(ValueError, match="flow model"):
        invert(flow, torch.zeros(1, 4, 8, 12), small.cond(), fine)
    with pytest.raises(ValueError, match=r"shows its features.*mode draft"):
        invert(GaussianDenoiser(), torch.zeros(1, 4, 8, 12), small.cond(), fine)


def test_an_inversion_of_another_schedule_is_refused(inverted: Any) -> None:
    model, inversion = inverted
    with pytest.raises(ValueError, match="with the 7 steps"):
        edit(model, inversion, Move(box(), 30.0), config=small.FAST.replace(steps=7))


def test_a_canvas_of_another_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="canvas"):
        invert(small.network(), torch.zeros(1, 4, 9, 12), small.cond(), small.FAST, small.CANVAS)


@pytest.mark.parametrize("kind", NOISY)
def test_masks_are_clean_when_they_enter(kind: str) -> None:
    mask = noisy(box(), kind)
    for task in (Move(mask, 8.0), Drag(mask, [((20.0, 20.0), (24.0, 20.0))])):
        assert torch.equal(task.mask, box())
    filled = Move(box(), 8.0, fill_from=mask)
    assert filled.fill_from is not None
    assert torch.equal(filled.fill_from, box())


def test_a_soft_edge_keeps_its_weight() -> None:
    mask = box()
    mask[16, 16:40] = 0.5
    assert torch.equal(Move(mask, 8.0).mask, mask)


def test_a_move_of_the_whole_image_leaves_nothing_to_fill_from() -> None:
    with pytest.raises(ValueError, match="`mask` that leaves a part of the image free"):
        preview(small.picture(), [Move(torch.full((64, 96), 0.95), 8.0)])
