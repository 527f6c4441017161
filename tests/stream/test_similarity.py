"""The similarity filter: its probability rule, its counter, and what the block-wise comparison notices."""

from __future__ import annotations

import pytest
import torch
from slipstream.stream import SimilarityFilter
from slipstream.stream.similarity import select, similarity


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_still_scene_is_processed_now_and_then() -> None:
    chooser = SimilarityFilter(0.98, max_skip=10, rng=lambda: 0.5)
    assert [i for i in range(40) if chooser.keep(picture())] == [0, 12, 24, 36]


@pytest.mark.parametrize(("cosine", "probability"), [(1.0, 1.0), (0.99, 0.5), (0.98, 0.0), (0.5, 0.0), (-1.0, 0.0)])
def test_probability_rule(cosine, probability) -> None:
    assert SimilarityFilter(0.98).skip_probability(cosine) == pytest.approx(probability)


def test_threshold_one_skips_nothing() -> None:
    chooser = SimilarityFilter(1.0)
    assert all(chooser.keep(picture()) for _ in range(20))


def test_share_of_skips_follows_the_probability() -> None:
    chooser = SimilarityFilter(0.9, max_skip=10**6, seed=3)
    base = picture()
    chooser.keep(base)
    noise = picture(1)
    near = base + 0.33 * noise
    probability = chooser.skip_probability(similarity(near, base))
    assert 0.2 < probability < 0.8
    kept = 0
    for _ in range(2000):
        chooser.reference = base
        kept += chooser.keep(near)
    assert kept / 2000 == pytest.approx(1 - probability, abs=0.04)


def test_the_counter_starts_anew_at_every_processed_frame() -> None:
    """Otherwise isolated skips add up and force a frame at a random moment, as in the published filter."""
    draws = iter([0.0, 1.0, 0.0, 1.0, 0.0])
    ours = SimilarityFilter(0.98, max_skip=1, rng=lambda: next(draws))
    still, counters = picture(), []
    for _ in range(6):
        # A draw of 0 skips; a draw of 1 is above any probability and processes.
        ours.keep(still)
        counters.append(ours.skips)
    assert max(counters) == 1


def test_same_seed_same_choice_and_no_global_randomness() -> None:
    import random

    frames = torch.stack([picture() + 0.2 * picture(i) for i in range(30)])
    first = select(frames, SimilarityFilter(0.9, seed=5))
    random.seed(123)
    assert select(frames, SimilarityFilter(0.9, seed=5)) == first
    assert select(frames, SimilarityFilter(0.9, seed=6)) != first


def test_small_moving_things_count_in_blocks() -> None:
    base = torch.full((3, 64, 64), 0.5)
    moved = base.clone()
    moved[:, 10:14, 20:24] = -0.5
    assert similarity(moved, base) > 0.99
    assert similarity(moved, base, blocks=8) < 0.6
    assert similarity(base, base, blocks=8) == pytest.approx(1.0)
    assert SimilarityFilter(0.98, blocks=8).skip_probability(similarity(moved, base, 8)) == 0


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0])
def test_flat_pictures(value) -> None:
    flat = torch.full((3, 7, 5), value)
    for blocks in (1, 3, 64):
        assert similarity(flat, flat, blocks) == pytest.approx(1.0 if value or blocks > 1 else 0.0)
    if value == 0:
        assert similarity(flat, torch.full_like(flat, 0.5), 4) < 0.01


def test_another_size_is_processed() -> None:
    chooser = SimilarityFilter(rng=lambda: 0.5)
    assert chooser.keep(picture())
    assert not chooser.keep(picture())
    assert chooser.keep(torch.zeros(3, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.1}, "`threshold` between 0 and 1, but got 1.1"),
        ({"max_skip": -1}, "`max_skip`"),
        ({"blocks": 0}, "`blocks`"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        SimilarityFilter(**settings)


def test_bad_pictures() -> None:
    chooser = SimilarityFilter()
    with pytest.raises(ValueError, match="of shape"):
        chooser.keep(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="finite"):
        chooser.keep(torch.full((3, 8, 8), float("nan")))
    assert chooser.keep(torch.zeros(1, 3, 8, 8))
