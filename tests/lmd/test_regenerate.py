from __future__ import annotations

import pytest
import torch
from slipstream.core import CFG, FLOW, SAMPLERS, VE, Conditioning, SeededNoise, Step, make_sigmas, sample
from slipstream.lmd import RegenerateConfig, mask_schedule, regenerate
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.noisy_masks import NOISY, noisy

COND = constant_cond()


def latents_of(batch: int = 2, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(7))


def whole(**fields: object) -> RegenerateConfig:
    """One round that masks everything."""
    return RegenerateConfig(**{"rounds": 1, "kind": "fixed", "high": 1.0, "steps": 4, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("space", [VE, FLOW], ids=["ve", "flow"])
def test_ratio_zero_returns_the_input_bit_for_bit_and_calls_nothing(space: object) -> None:
    model, latents = GaussianDenoiser(space=space), latents_of()  # type: ignore[arg-type]
    result = regenerate(model, latents, COND, None, RegenerateConfig(low=0, high=0), SeededNoise(0))
    assert torch.equal(result.latents, latents)
    assert (model.calls, model.rows) == (0, 0)
    assert result.masks.sum() == 0


@pytest.mark.parametrize("space", [VE, FLOW], ids=["ve", "flow"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_ratio_one_equals_image_to_image_with_the_same_noise(space: object, sampler: str, strength: float) -> None:
    model, latents = GaussianDenoiser(0.5, 0.2, space), latents_of()  # type: ignore[arg-type]
    result = regenerate(model, latents, COND, None, whole(strength=strength, sampler=sampler), SeededNoise(3))
    source = SeededNoise(3)
    sigmas = make_sigmas("uniform", model.levels, 4, strength)
    # At sigma_max the host takes noise of the variance of a noised image: 1 + sigma^2.
    grown = (1 + sigmas[0] ** 2).sqrt() / sigmas[0] if space is VE and strength == 1 else 1
    start = model.space.add_noise(latents, grown * source(latents), sigmas[0])
    expected = sample(sampler, CFG(model, COND), start, sigmas, model.space, SeededNoise(3).fork("sampler 0"))
    torch.testing.assert_close(result.latents, expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(result.latents, latents)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("candidates", [1, 3])
def test_an_image_is_the_same_in_a_batch_of_any_size_and_as_its_row(sampler: str, candidates: int) -> None:
    config = RegenerateConfig(rounds=2, steps=2, sampler=sampler, candidates=candidates)
    latents = latents_of(3, 5, 7)
    run = lambda x, rows=None: regenerate(GaussianDenoiser(0.5), x, COND, None, config, SeededNoise(3, rows)).latents  # noqa: E731
    together = run(latents)
    torch.testing.assert_close(together[:1], run(latents[:1]))
    torch.testing.assert_close(together[[2, 1]], run(latents[[2, 1]], [2, 1]))


def test_the_schedule_may_be_given() -> None:
    latents, seen = latents_of(), []
    model = GaussianDenoiser(0.5)

    def levels(strength: float) -> torch.Tensor:
        seen.append(strength)
        return torch.tensor([3.0, 1.0, 0.0])

    found = regenerate(model, latents, COND, None, whole(steps=2, strength=0.4), SeededNoise(3), sigmas_of=levels)
    start = latents + 3 * SeededNoise(3)(latents)
    expected = sample("euler", CFG(model, COND), start, torch.tensor([3.0, 1.0, 0.0]), VE)
    assert seen == [0.4]
    torch.testing.assert_close(found.latents, expected)


def test_what_no_mask_touches_is_bit_exact_and_the_rest_changes() -> None:
    config = RegenerateConfig(rounds=3, low=0.2, high=0.6, steps=2)
    latents = latents_of()
    result = regenerate(GaussianDenoiser(), latents, COND, None, config, SeededNoise(0))
    touched = result.masks.amax(0)[:, None].expand_as(latents) > 0
    assert torch.equal(result.latents[~touched], latents[~touched])
    assert (result.latents[touched] != latents[touched]).float().mean() > 0.99
    assert torch.equal(result.masks[:, 0], mask_schedule(3, low=0.2, high=0.6, height=8, width=12).masks)


def test_an_exact_model_of_a_known_mean_repaints_that_mean() -> None:
    # With std -> 0 every denoised estimate is the mean itself, whatever the noise: masked cells become exactly 3.
    config = RegenerateConfig(rounds=2, high=0.5, strength=1.0, steps=3)
    result = regenerate(GaussianDenoiser(std=0.0), latents_of(), constant_cond(3.0), None, config, SeededNoise(0))
    touched = result.masks.amax(0)[:, None].expand_as(result.latents) > 0
    assert torch.allclose(result.latents[touched], torch.tensor(3.0), atol=1e-5)


def test_a_user_mask_confines_the_change_and_is_counted_by_its_own_patches() -> None:
    mask = torch.zeros(64, 96)
    mask[16:48, 16:64] = 1  # 8 pixels a cell: cells 2..6 x 2..8
    latents = latents_of()
    result = regenerate(GaussianDenoiser(), latents, COND, None, whole(), SeededNoise(0), mask)
    assert torch.equal(result.masks[0, 0, 2:6, 2:8], torch.ones(4, 6))
    assert result.masks.sum() == 2 * 24
    outside = torch.ones(8, 12, dtype=torch.bool)
    outside[2:6, 2:8] = False
    assert torch.equal(result.latents[..., outside], latents[..., outside])


@pytest.mark.parametrize("kind", NOISY)
def test_a_noisy_mask_regenerates_what_the_clean_one_does(kind: str) -> None:
    mask, latents = torch.zeros(64, 96), latents_of()
    mask[16:48, 20:64] = 1
    config = RegenerateConfig(rounds=2, steps=2)
    clean, found = (
        regenerate(GaussianDenoiser(), latents, COND, None, config, SeededNoise(0), m)
        for m in (mask, noisy(mask, kind))
    )
    assert torch.equal(found.masks, clean.masks)
    assert torch.equal(found.latents, clean.latents)
    assert torch.equal(found.latents[..., 6:, :], latents[..., 6:, :])
    own = torch.stack([mask, mask.flip(1)])
    rounds = [
        regenerate(GaussianDenoiser(), latents, COND, None, config, SeededNoise(0), masks=m)
        for m in (own, noisy(own, kind))
    ]
    assert torch.equal(rounds[0].latents, rounds[1].latents)


def test_a_soft_mask_mixes_by_its_weight() -> None:
    latents = latents_of(1)
    half = torch.full((1, 8, 12), 0.5)
    soft = regenerate(
        GaussianDenoiser(std=0.0), latents, constant_cond(3.0), None, whole(strength=1.0), SeededNoise(0), half
    )
    assert torch.allclose(soft.latents, (latents + 3) / 2, atol=1e-5)


def test_masks_of_ones_own_replace_the_schedule() -> None:
    masks = torch.zeros(2, 8, 12)
    masks[0, :, :3] = 1
    model, latents = GaussianDenoiser(), latents_of()
    result = regenerate(model, latents, COND, None, whole(steps=3), SeededNoise(0), masks=masks)
    assert torch.equal(result.latents[..., 3:], latents[..., 3:])
    assert model.calls == 3  # the empty second round costs nothing


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_cost_in_rows_is_what_the_docstring_states(candidates: int, cfg_scale: float) -> None:
    model = GaussianDenoiser()
    config = RegenerateConfig(rounds=3, steps=2, candidates=candidates, cfg_scale=cfg_scale)
    regenerate(model, latents_of(), COND, constant_cond(1.0), config, SeededNoise(0))
    assert model.calls == 3 * 2
    assert model.rows == 3 * 2 * 2 * candidates * (1 if cfg_scale == 1 else 2)


class Gullible(GaussianDenoiser):
    """Explains the visible part well only where the masked part happens to be bright: a known best candidate."""

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        super().__call__(x, sigma, cond)
        self.brightness = x[:, :, :, :6].flatten(1).mean(1)
        return torch.ones_like(x) * self.brightness.reshape(-1, 1, 1, 1)


def test_the_candidate_that_explains_the_visible_part_best_is_kept() -> None:
    masks = torch.zeros(1, 8, 12)
    masks[..., :6] = 1
    latents = torch.full((2, 4, 8, 12), 0.02)
    config = whole(steps=1, strength=1.0, candidates=8)
    model = Gullible()
    result = regenerate(model, latents, COND, None, config, SeededNoise(1), masks=masks)
    errors = ((model.brightness - 0.02) ** 2).reshape(8, 2)
    assert torch.allclose(result.errors[0], errors.min(0).values, rtol=1e-4)
    assert torch.allclose(result.latents[:, 0, 0, 0], model.brightness.reshape(8, 2)[errors.argmin(0), [0, 1]])
    # The images of a batch choose for themselves.
    assert errors.argmin(0)[0] != errors.argmin(0)[1]


def test_candidates_see_one_noise_outside_the_mask() -> None:
    masks = torch.zeros(1, 8, 12)
    masks[..., :6] = 1
    seen = []

    class Watching(GaussianDenoiser):
        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning) -> torch.Tensor:
            seen.append(x)
            return super().__call__(x, sigma, cond)

    regenerate(Watching(), latents_of(1), COND, None, whole(candidates=2), SeededNoise(0), masks=masks)
    assert all(torch.equal(x[0, :, :, 6:], x[1, :, :, 6:]) for x in seen)
    assert not any(torch.equal(x[0, :, :, :6], x[1, :, :, :6]) for x in seen)


def test_strength_goes_from_the_first_round_to_the_last() -> None:
    config = RegenerateConfig(rounds=3, strength=0.8, strength_end=0.2)
    assert [config.strength_of(k, 3) for k in range(3)] == pytest.approx([0.8, 0.5, 0.2])
    assert RegenerateConfig(strength=0.8, strength_end=0.2).strength_of(0, 1) == 0.8


def test_same_seed_same_result_and_a_batch_of_prompts_keeps_its_order() -> None:
    config, latents = RegenerateConfig(rounds=2, steps=2, candidates=2, high=1.0, strength=1.0), latents_of()
    conds = Conditioning(torch.tensor([0.0, 9.0]).reshape(2, 1, 1))
    first = regenerate(GaussianDenoiser(std=0.0), latents, conds, None, config, SeededNoise(4)).latents
    assert torch.equal(
        first, regenerate(GaussianDenoiser(std=0.0), latents, conds, None, config, SeededNoise(4)).latents
    )
    assert torch.allclose(first[0], torch.tensor(0.0), atol=1e-4)
    assert torch.allclose(first[1], torch.tensor(9.0), atol=1e-4)


def test_progress_counts_every_step_and_may_stop_the_run() -> None:
    steps: list[Step] = []
    regenerate(
        GaussianDenoiser(),
        latents_of(),
        COND,
        None,
        RegenerateConfig(rounds=3, steps=2),
        SeededNoise(0),
        callback=steps.append,
    )
    assert [(s.phase, s.index, s.total) for s in steps] == [(f"round {k // 2 + 1}", k + 1, 6) for k in range(6)]
    assert all(s.denoised is not None and s.denoised.shape == (2, 4, 8, 12) for s in steps)

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regenerate(GaussianDenoiser(), latents_of(), COND, None, RegenerateConfig(), SeededNoise(0), callback=stop)


def test_inputs_are_left_alone() -> None:
    latents, mask = latents_of(), torch.ones(8, 12)
    before = latents.clone()
    regenerate(GaussianDenoiser(), latents, COND, None, RegenerateConfig(), SeededNoise(0), mask)
    assert torch.equal(latents, before)
    assert mask.min() == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 0}, "`rounds` between 1"),
        ({"strength": 0.0}, "`strength` between 0.01 and 1"),
        ({"strength_end": 1.5}, "`strength_end` between 0.01 and 1"),
        ({"candidates": 0}, "`candidates` between 1"),
        ({"sampler": "magic"}, "`sampler` to be one of"),
        ({"high": 0.1}, "`high` between 0.15 and 1"),
        ({"cfg_scale": float("nan")}, "`cfg_scale` of at least 0"),
    ],
)
def test_bad_settings_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegenerateConfig(**fields)


def test_bad_tensors_are_refused_by_name() -> None:
    bad = latents_of()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"`latents` to be finite"):
        regenerate(GaussianDenoiser(), bad, COND, None, RegenerateConfig(), SeededNoise(0))
    with pytest.raises(ValueError, match=r"`latents` of shape"):
        regenerate(GaussianDenoiser(), bad[0], COND, None, RegenerateConfig(), SeededNoise(0))
    with pytest.raises(ValueError, match=r"`mask` with 1 or 2 masks, but got 3"):
        regenerate(
            GaussianDenoiser(), latents_of(), COND, None, RegenerateConfig(), SeededNoise(0), torch.ones(3, 8, 12)
        )
    with pytest.raises(ValueError, match=r"`patch` between 1 and 8"):
        regenerate(GaussianDenoiser(), latents_of(), COND, None, RegenerateConfig(patch=9), SeededNoise(0))
