from __future__ import annotations

import math

import pytest
import torch
from slipstream.lmd import mask_ratio, mask_schedule
from slipstream.lmd.tokens import from_tokens, lowest, masked_count, to_tokens, tokens_touched
from slipstream_tests.noisy_masks import NOISY, noisy

SIXTH = 1 / 6


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("linear", {0: 0.15, SIXTH: 0.25, 1 / 3: 0.35, 0.5: 0.45, 2 / 3: 0.55, 1: 0.75}),
        ("piecewise", {0: 0.15, 1 / 12: 0.275, SIXTH: 0.40, 0.25: 0.40, 1 / 3: 0.40, 0.5: 0.575, 2 / 3: 0.75, 1: 0.75}),
        ("fixed", {0: 0.75, 0.5: 0.75, 1: 0.75}),
        ("cosine", {0: 0.15, 2 / 3: 0.75, 0.9: 0.75, 1: 0.75}),
    ],
)
def test_ratios_equal_the_published_points(kind: str, points: dict[float, float]) -> None:
    for fraction, expected in points.items():
        assert mask_ratio(kind, fraction) == pytest.approx(expected, abs=1e-12)


def test_cosine_follows_its_formula_inside_the_ramp() -> None:
    # f(s) / f(0) at half of the ramp, with cos^2(a) written as (1 + cos(2a)) / 2.
    ratio = (1 + math.cos(0.508 / 1.008 * math.pi)) / (1 + math.cos(0.008 / 1.008 * math.pi))
    assert mask_ratio("cosine", 1 / 3) == pytest.approx(0.15 + 0.60 * (1 - ratio), abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "piecewise", "cosine"])
def test_ratios_never_leave_their_bounds_nor_fall(kind: str) -> None:
    ratios = [mask_ratio(kind, k / 600, 0.2, 0.9) for k in range(601)]
    assert min(ratios) == pytest.approx(0.2)
    assert max(ratios) == pytest.approx(0.9)
    assert all(b >= a - 1e-12 for a, b in zip(ratios, ratios[1:]))


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
def test_a_schedule_of_seven_steps_hits_the_published_points(direction: str) -> None:
    ratios = mask_schedule(7, "piecewise", direction=direction).ratios
    expected = [0.15, 0.40, 0.40, 0.575, 0.75, 0.75, 0.75]
    assert ratios == pytest.approx(expected if direction == "increasing" else expected[::-1], abs=1e-12)


@pytest.mark.parametrize(("height", "width", "patch"), [(16, 16, 2), (16, 24, 4), (15, 17, 4), (5, 3, 3)])
@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
def test_nested_masks_grow_or_shrink_by_whole_patches(height: int, width: int, patch: int, direction: str) -> None:
    schedule = mask_schedule(9, "linear", 0.0, 1.0, direction, patch, seed=3, height=height, width=width)
    masks = schedule.masks if direction == "increasing" else schedule.masks.flip(0)
    assert masks.shape == (9, height, width)
    assert (masks[1:] >= masks[:-1]).all()
    assert masks[0].sum() == 0
    assert masks[-1].min() == 1
    tokens = -(-height // patch) * -(-width // patch)
    counts = tokens_touched(masks, patch).flatten(1).sum(1).tolist()
    assert counts == [masked_count(tokens, k / 8) for k in range(9)]


def test_free_masks_keep_the_counts_but_are_not_nested() -> None:
    schedule = mask_schedule(4, "fixed", high=0.5, nested=False, seed=1)
    assert schedule.masks.flatten(1).sum(1).tolist() == [128.0] * 4
    assert not torch.equal(schedule.masks[0], schedule.masks[1])


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = mask_schedule(3, seed=5).masks
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, mask_schedule(3, seed=5).masks)
    assert not torch.equal(first, mask_schedule(3, seed=6).masks)


def test_a_region_confines_masks_and_its_patches_are_what_ratios_count() -> None:
    region = torch.zeros(16, 16)
    region[4:8, 3:9] = 1  # touches columns 2..9: 4 patches of 2, and 2 rows of patches
    masks = mask_schedule(3, "linear", 0.0, 1.0, "increasing", 2, region=region).masks
    assert masks.flatten(1).sum(1).tolist() == [0.0, 4 * 4.0, 8 * 4.0]
    assert masks[-1, 4:8, 2:10].min() == 1
    empty = mask_schedule(3, "fixed", high=1.0, region=torch.zeros(16, 16)).masks
    assert empty.sum() == 0


@pytest.mark.parametrize("kind", NOISY)
def test_a_noisy_region_is_the_clean_one(kind: str) -> None:
    region = torch.zeros(64, 96)
    region[16:40, 8:64] = 1
    schedules = [mask_schedule(4, height=8, width=12, region=r) for r in (region, noisy(region, kind))]
    assert torch.equal(schedules[0].masks, schedules[1].masks)
    assert schedules[1].masks.any()


def test_counts_are_those_of_exact_arithmetic() -> None:
    assert [masked_count(10, r) for r in (0.0, 0.1, 0.7, 0.9, 1.0)] == [0, 1, 7, 9, 10]
    assert masked_count(49, 0.75) == 37  # int(49 * 0.25) = 12 visible
    assert lowest(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 2).tolist() == [[False, True, True, False]]


def test_tokens_survive_a_round_trip() -> None:
    latents = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    tokens = to_tokens(latents, 2)
    assert tokens.shape == (2, 12, 12)
    assert torch.equal(from_tokens(tokens, 2, 6, 8), latents)
    # Token 1 is the second patch of the first row.
    assert torch.equal(tokens[0, 1], latents[0, :, 0:2, 2:4].flatten())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "`steps` between 1 and 10000, but got 0"),
        ({"steps": 2.0}, "`steps` to be an integer"),
        ({"kind": "square"}, "`kind` to be one of"),
        ({"low": -0.1}, "`low` between 0 and 1"),
        ({"low": 0.8, "high": 0.5}, "`high` between 0.8 and 1"),
        ({"direction": "up"}, "`direction` to be one of"),
        ({"patch": 17}, "`patch` between 1 and 16"),
        ({"seed": -1}, "`seed` between 0"),
        ({"region": torch.full((4, 4), torch.nan)}, "`region` to be finite"),
    ],
)
def test_bad_values_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_schedule(**{"steps": 3, **arguments})
