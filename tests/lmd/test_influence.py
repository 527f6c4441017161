from __future__ import annotations

import math

import pytest
import torch
from slipstream.lmd import influence
from slipstream.lmd.influence import distance_to, reach_of, recorded
from slipstream_tests.noisy_masks import NOISY, noisy


def point(height: int = 65, width: int = 65) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[height // 2, width // 2] = 1
    return mask


def line(height: int = 8, width: int = 64) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[:, 0] = 1
    return mask


def runs(difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two runs of S steps whose mean absolute difference is `difference` (S, H, W), with batch 2 and mixed signs."""
    base = torch.randn(len(difference), 2, 3, *difference.shape[1:], generator=torch.Generator().manual_seed(0))
    sign = torch.tensor([1.0, -1.0, 1.0]).reshape(3, 1, 1)
    return base, base + sign * difference[:, None, None]


def test_equal_runs_have_no_influence() -> None:
    run = torch.randn(3, 2, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    result = influence(run, run.clone(), point(16, 24))
    for part in (result.mean, result.heat, result.reach_e, result.reach_10, result.outside):
        assert not part.any()
    assert result.mean.shape[0] == 3


@pytest.mark.parametrize("kind", NOISY)
def test_a_noisy_mask_is_measured_from_what_it_paints(kind: str) -> None:
    run = runs(torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(2)))
    mask = torch.zeros(16, 24)
    mask[4:9, 5:9] = 1
    clean, found = influence(*run, mask), influence(*run, noisy(mask, kind))
    assert all(torch.equal(a, b) for a, b in zip(vars(clean).values(), vars(found).values()))


@pytest.mark.parametrize("width", [2.0, 5.0, 8.0])
def test_a_gaussian_of_known_width_gives_its_reach(width: float) -> None:
    mask = line()
    gaussian = torch.exp(-(distance_to(mask) ** 2) / (2 * width**2))[None]
    result = influence(*runs(gaussian), mask)
    # exp(-d^2 / 2 w^2) = 1/e at d = w sqrt(2), = 0.1 at d = w sqrt(2 ln 10).
    assert result.reach_e.item() == pytest.approx(width * math.sqrt(2), abs=0.05)
    assert result.reach_10.item() == pytest.approx(width * math.sqrt(2 * math.log(10)), abs=0.05)


def test_a_gaussian_whose_reach_is_a_whole_cell_is_exact() -> None:
    mask = line()
    gaussian = torch.exp(-((distance_to(mask) / 7) ** 2))[None]
    assert influence(*runs(gaussian), mask).reach_e.item() == pytest.approx(7, abs=1e-4)


def test_around_a_point_the_rings_give_the_same_reach() -> None:
    mask = point()
    gaussian = torch.exp(-(distance_to(mask) ** 2) / (2 * 6.0**2))[None]
    assert influence(*runs(gaussian), mask).reach_e.item() == pytest.approx(6 * math.sqrt(2), abs=0.1)


def test_an_exponential_is_exact_at_every_length() -> None:
    mask = line()
    lengths = torch.tensor([1.3, 4.7, 11.9])
    fall = torch.exp(-distance_to(mask) / lengths[:, None, None])
    result = influence(*runs(fall), mask)
    assert torch.allclose(result.reach_e, lengths, rtol=1e-3)
    assert torch.allclose(result.reach_10, lengths * math.log(10), rtol=1e-3)


def test_a_change_everywhere_never_falls_and_its_share_outside_is_the_area() -> None:
    mask = torch.zeros(10, 20)
    mask[:5, :4] = 1
    result = influence(*runs(torch.full((1, 10, 20), 0.3)), mask)
    assert torch.isinf(result.reach_e).all()
    assert result.outside.item() == pytest.approx(180 / 200, abs=1e-5)
    assert torch.allclose(result.mean, torch.tensor(0.3), atol=1e-5)


def test_a_change_inside_only_reaches_nothing_beyond_the_first_ring() -> None:
    mask = torch.zeros(10, 20)
    mask[:5, :4] = 1
    result = influence(*runs(mask[None]), mask)
    assert result.outside.item() == pytest.approx(0, abs=1e-6)
    assert 0 < result.reach_e.item() <= 1


def test_a_change_only_elsewhere_has_no_reach() -> None:
    assert torch.isinf(reach_of(torch.arange(3.0), torch.tensor([0.0, 0.0, 1.0]), 0.1))


def test_distances_equal_those_between_all_pairs() -> None:
    mask = (torch.rand(13, 21, generator=torch.Generator().manual_seed(3)) > 0.97).float()
    cells = torch.stack(torch.meshgrid(torch.arange(13.0), torch.arange(21.0), indexing="ij"), -1).reshape(-1, 2)
    pairs = torch.cdist(cells, cells[mask.flatten() > 0], compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose(distance_to(mask), pairs.amin(1).reshape(13, 21), atol=1e-5)


def test_a_mask_of_pixels_is_brought_to_the_cells() -> None:
    mask = torch.zeros(80, 160)
    mask[:40, :32] = 1
    small = torch.zeros(10, 20)
    small[:5, :4] = 1
    change = runs(torch.exp(-distance_to(small))[None])
    assert torch.equal(influence(*change, mask).mean, influence(*change, small).mean)


def test_steps_are_profiled_one_by_one() -> None:
    mask = line()
    fall = torch.exp(-distance_to(mask) / 4)
    both = influence(*runs(torch.stack([fall, 0 * fall])), mask)
    assert both.reach_e[0].item() == pytest.approx(4, rel=1e-3)
    assert both.reach_e[1].item() == 0


def test_bad_input_is_refused_by_name() -> None:
    run = torch.zeros(2, 1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"one shape .* but got .*2, 1, 1, 8, 8.* and .*1, 1, 1, 8, 8"):
        influence(run, run[:1], torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"at least one painted cell"):
        influence(run, run, torch.zeros(8, 8))
    with pytest.raises(ValueError, match=r"`after` to be finite"):
        influence(run, run + torch.nan, torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"at least one step"):
        recorded([])
