"""Noise spaces, predictions and conditioning against their closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import slipstream
import torch
from slipstream.core import CFG, FLOW, VE, Conditioning, DiffusersDenoiser, NoiseSpace, Prediction
from slipstream.core.denoiser import PREDICTIONS
from slipstream.core.guidance import cfg, denoise_many
from slipstream.core.schedules import FlowLevels, scaled_linear_alphas_cumprod, zero_terminal_snr
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from torch import Tensor

SPACES = pytest.mark.parametrize("space", [VE, FLOW], ids=lambda s: s.name)
SIGMA = torch.tensor([0.9, 0.4, 0.05], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alpha(space: NoiseSpace, sigma: float) -> float:
    return 1 - sigma if space is FLOW else 1.0


@SPACES
class TestNoiseSpace:
    def test_add_noise_and_noise_of(self, space: NoiseSpace) -> None:
        x0, noise = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)
        x = space.add_noise(x0, noise, SIGMA)
        for i, sigma in enumerate(SIGMA.tolist()):
            torch.testing.assert_close(x[i], alpha(space, sigma) * x0[i] + sigma * noise[i])
        torch.testing.assert_close(space.noise_of(x, x0, SIGMA), noise)

    def test_renoise_is_add_noise_at_the_higher_level(self, space: NoiseSpace) -> None:
        """Clean part: scale(high). Noise: the variances of old and new noise add up to high^2."""
        low, high = 0.3, 0.8
        clean, noise = normal(1, 1, 3, 3), normal(1, 1, 3, 3, seed=1)
        zero = torch.zeros_like(clean)
        torch.testing.assert_close(
            space.renoise(alpha(space, low) * clean, low, high, zero), alpha(space, high) * clean
        )
        old, new = space.renoise(low * noise, low, high, zero), space.renoise(zero, low, high, noise)
        torch.testing.assert_close(old**2 + new**2, high**2 * noise**2)
        torch.testing.assert_close(space.renoise(clean, low, low, noise), clean)

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    def test_a_step_with_the_true_clean_latent_keeps_the_marginal(self, space: NoiseSpace, eta: float) -> None:
        high, low = 0.8, 0.3
        x0, noise, fresh = normal(1, 1, 3, 3), normal(1, 1, 3, 3, seed=1), normal(1, 1, 3, 3, seed=2)
        x = space.add_noise(x0, noise, high)
        zero = torch.zeros_like(fresh)
        kept = space.step(x, x0, high, low, eta, zero) - alpha(space, low) * x0
        added = space.step(x, x0, high, low, eta, fresh) - space.step(x, x0, high, low, eta, zero)
        # DDIM's sigma_t (arXiv 2010.02502 eq. 16) in terms of abar: sigma^2 / alpha^2 = (1 - abar) / abar.
        abar, abar_low = (alpha(space, s) ** 2 / (alpha(space, s) ** 2 + s**2) for s in (high, low))
        std = eta * math.sqrt((1 - abar_low) / (1 - abar) * (1 - abar / abar_low))
        # From the variance-preserving latent of eq. 12 back to this space.
        std *= math.sqrt(alpha(space, low) ** 2 + low**2)
        torch.testing.assert_close(added, std * fresh)
        torch.testing.assert_close(kept, math.sqrt(low**2 - std**2) * noise)

    def test_a_step_without_noise_is_euler(self, space: NoiseSpace) -> None:
        x, denoised, high, low = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1), 0.7, 0.2
        slope = (x - denoised) / high  # dx / dsigma in both spaces
        torch.testing.assert_close(space.step(x, denoised, high, low), x + (low - high) * slope)

    def test_up_undoes_down_with_the_same_estimate(self, space: NoiseSpace) -> None:
        x, denoised = normal(1, 1, 3, 3), normal(1, 1, 3, 3, seed=1)
        down = space.step(x, denoised, 0.7, 0.2)
        torch.testing.assert_close(space.step(down, denoised, 0.2, 0.7), x)

    def test_going_up_ignores_eta(self, space: NoiseSpace) -> None:
        x, denoised, noise = normal(1, 1, 3, 3), normal(1, 1, 3, 3, seed=1), normal(1, 1, 3, 3, seed=2)
        torch.testing.assert_close(space.step(x, denoised, 0.2, 0.7, 1.0, noise), space.step(x, denoised, 0.2, 0.7))

    def test_eta_may_be_a_region(self, space: NoiseSpace) -> None:
        x, denoised, noise = normal(1, 1, 2, 2), normal(1, 1, 2, 2, seed=1), normal(1, 1, 2, 2, seed=2)
        region = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
        mixed = space.step(x, denoised, 0.7, 0.2, region, noise)
        wanted = torch.where(
            region == 1, space.step(x, denoised, 0.7, 0.2, 1.0, noise), space.step(x, denoised, 0.7, 0.2)
        )
        torch.testing.assert_close(mixed, wanted)

    def test_one_level_per_row(self, space: NoiseSpace) -> None:
        x, denoised, noise = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1), normal(3, 2, 2, 2, seed=2)
        together = space.step(x, denoised, SIGMA, SIGMA / 2, 1.0, noise)
        raised = space.renoise(x, SIGMA / 2, SIGMA, noise)
        for i in range(3):
            rows = slice(i, i + 1)
            alone = space.step(x[rows], denoised[rows], float(SIGMA[i]), float(SIGMA[i] / 2), 1.0, noise[rows])
            torch.testing.assert_close(together[rows], alone)
            alone = space.renoise(x[rows], float(SIGMA[i] / 2), float(SIGMA[i]), noise[rows])
            torch.testing.assert_close(raised[rows], alone)


def test_flow_ends_are_exact() -> None:
    x0, noise, fresh = normal(1, 1, 2, 2), normal(1, 1, 2, 2, seed=1), normal(1, 1, 2, 2, seed=2)
    assert torch.equal(FLOW.add_noise(x0, noise, 1.0), noise)
    torch.testing.assert_close(FLOW.renoise(x0, 0.0, 1.0, fresh), fresh)
    torch.testing.assert_close(FLOW.step(noise, x0, 1.0, 0.0), x0)
    torch.testing.assert_close(FLOW.step(noise, x0, 1.0, 0.5, 1.0, fresh), 0.5 * x0 + 0.5 * fresh)


def close_to(found: Tensor, wanted: Tensor, dtype: torch.dtype, ulps: float = 1.0) -> None:
    """`found` is what float64 gives, rounded to `dtype` once (or `ulps` times)."""
    assert found.dtype == dtype
    step = ulps * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=step, atol=step * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
class TestHalfPrecision:
    """Coefficients are in float32 whatever the latents are, so that only the result is rounded."""

    @pytest.mark.parametrize(
        ("space", "high", "low"), [(VE, 4518.7, 0.0292), (VE, 300.0, 257.0), (FLOW, 0.9987, 0.0013)]
    )
    def test_noise_spaces(self, space: NoiseSpace, high: float, low: float, dtype: torch.dtype) -> None:
        x0, noise, fresh = (normal(2, 4, 4, 4, seed=s).to(dtype) for s in range(3))
        sigmas = torch.tensor([high, low])

        def both(run: Callable[..., Tensor], *levels: Any) -> None:
            close_to(run(x0, noise, fresh, *levels), run(x0.double(), noise.double(), fresh.double(), *levels), dtype)

        for sigma in (high, torch.tensor(high), sigmas):
            both(lambda a, n, f, sigma: space.add_noise(a, n, sigma), sigma)
            both(lambda a, n, f, sigma: space.noise_of(n, a, sigma), sigma)
            both(lambda a, n, f, sigma: space.renoise(a, low, sigma, n), sigma)
            both(lambda a, n, f, sigma: space.step(n, a, sigma, low), sigma)
            both(lambda a, n, f, sigma: space.step(n, a, sigma, 0.5 * low, 0.7, f), sigma)

    @pytest.mark.parametrize("kind", PREDICTIONS)
    def test_predictions_at_the_ends_of_their_levels(self, kind: str, dtype: torch.dtype) -> None:
        prediction = Prediction(kind)
        sigma = torch.tensor([0.9987, 0.0013] if kind == "flow" else [4518.7, 0.0292])
        x0, noise = normal(2, 4, 8, 8).to(dtype), normal(2, 4, 8, 8, seed=1).to(dtype)
        x = prediction.space.add_noise(x0, noise, sigma)
        close_to(prediction.network_input(x, sigma), prediction.network_input(x.double(), sigma), dtype)
        for output in (noise, noise.float()):  # the network's own dtype need not be that of the latents
            wanted = prediction.denoised(output.double(), x.double(), sigma)
            close_to(prediction.denoised(output, x, sigma), wanted, dtype)
        close_to(
            prediction.output_for(x0, noise, sigma), prediction.output_for(x0.double(), noise.double(), sigma), dtype
        )

    def test_a_network_sees_pure_noise_at_zero_terminal_snr(self, dtype: torch.dtype) -> None:
        x = (normal(1, 4, 64, 64) * 4518.7).to(dtype)
        seen = Prediction("v_prediction").network_input(x, torch.tensor([4518.7]))
        assert float(seen.float().std()) == pytest.approx(1.0, abs=0.02)

    def test_guidance_gives_the_model_its_level_unrounded(self, dtype: torch.dtype) -> None:
        seen: list[Tensor] = []
        sigma = torch.tensor(0.123456)
        denoise_many(
            lambda x, s, c: seen.append(s) or x, torch.zeros(2, 4, 2, 2, dtype=dtype), sigma, [constant_cond()]
        )  # type: ignore[arg-type,func-returns-value]
        assert torch.equal(seen[0], sigma.expand(2))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
def test_a_diffusers_network_on_half_precision_latents(kind: str, dtype: torch.dtype) -> None:
    """Called, and bound for a loop: as on float32 latents of the same values, rounded once."""
    unet = slipstream.load("pocket", device="cpu").model.unet
    model = DiffusersDenoiser(unet, zero_terminal_snr(scaled_linear_alphas_cumprod()), kind)
    x, sigma = normal(2, 4, 16, 16).to(dtype), torch.tensor([0.99, 0.2]) * model.sigma_max
    x = model.space.add_noise(torch.zeros_like(x), x, sigma)
    cond = Conditioning(normal(1, 77, 64).float())
    wanted = model(x.float(), sigma, cond)
    for found in (model(x, sigma, cond), model.bind(sigma, cond)(x)):
        # The network itself sees an input that was rounded to `dtype`.
        close_to(found, wanted.double(), dtype, ulps=8)


class TestPrediction:
    @pytest.mark.parametrize("kind", PREDICTIONS)
    def test_a_perfect_network_gives_the_clean_latent(self, kind: str) -> None:
        prediction = Prediction(kind)
        x0, noise = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)
        x = prediction.space.add_noise(x0, noise, SIGMA)
        output = prediction.output_for(x0, noise, SIGMA)
        torch.testing.assert_close(prediction.denoised(output, x, SIGMA), x0)

    @pytest.mark.parametrize("kind", PREDICTIONS)
    def test_targets_are_those_of_the_papers(self, kind: str) -> None:
        """In variance-preserving terms: eps = noise, v = alpha noise - sigma x0 (arXiv 2202.00512), flow: noise - x0."""
        prediction, sigma = Prediction(kind), 2.0 if kind != "flow" else 0.25
        x0, noise = normal(1, 1, 2, 2), normal(1, 1, 2, 2, seed=1)
        a, s = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
        targets = {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0, "flow": noise - x0}
        torch.testing.assert_close(prediction.output_for(x0, noise, torch.tensor([sigma])), targets[kind])
        x = prediction.space.add_noise(x0, noise, sigma)
        seen = x if kind == "flow" else a * x0 + s * noise
        torch.testing.assert_close(prediction.network_input(x, torch.tensor([sigma])), seen)

    def test_unknown_kinds_are_refused(self) -> None:
        with pytest.raises(ValueError, match="'epsilon', 'v_prediction', 'sample', 'flow', but got 'score'"):
            Prediction("score")


def test_a_flow_network_has_flow_levels_whatever_table_is_given() -> None:
    unet = slipstream.load("pocket").model.unet
    model = DiffusersDenoiser(unet, torch.linspace(0.99, 0.01, 1000), "flow", shift=3.0)
    assert isinstance(model.levels, FlowLevels)
    assert (model.sigma_max, model.space) == (1.0, FLOW)
    with pytest.raises(ValueError, match="`alphas_cumprod`"):
        DiffusersDenoiser(unet)


class TestConditioning:
    def cond(self, rows: int = 2, tokens: int = 3) -> Conditioning:
        return Conditioning(
            normal(rows, tokens, 5), pooled=normal(rows, 4), extra={"time_ids": torch.arange(rows * 6).reshape(rows, 6)}
        )

    def test_take_expand_and_join_keep_rows_together(self) -> None:
        cond = self.cond()
        taken = cond.take([1, 0, 1])
        for part, whole in zip(taken._parts().values(), cond._parts().values()):
            assert torch.equal(part, whole[[1, 0, 1]])
        assert torch.equal(taken.context, cond.context[[1, 0, 1]])
        joined = cond.join(taken.take([0]))
        assert joined.rows == 3
        assert joined.extra is not None
        assert torch.equal(joined.extra["time_ids"][2], torch.arange(6, 12))
        assert self.cond(1).expand(4).rows == 4
        assert cond.expand(2) is cond

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`cond` with 1 or 3 rows, but got 2"):
            self.cond().expand(3)
        with pytest.raises(ValueError, match="`pooled` with 2 rows"):
            Conditioning(torch.zeros(2, 3, 5), pooled=torch.zeros(1, 4))
        with pytest.raises(ValueError, match="`context`"):
            Conditioning(torch.zeros(3, 5))
        with pytest.raises(ValueError, match="the same parts"):
            self.cond().join(Conditioning(torch.zeros(1, 3, 5)))

    @torch.no_grad()
    def test_padding_a_context_leaves_attention_unchanged(self) -> None:
        """Prompts of 77 and 154 tokens join at 154: the padding of the short one, which a real network must not see."""
        pipe = slipstream.load("pocket")
        short = pipe.encode_text(["a red circle on a blue background"])
        long = Conditioning(torch.cat([pipe.encode_text([p]).context for p in ("a green ring", "")], 1))
        joined = short.join(long)
        assert joined.context.shape == (2, 154, 64)
        x, sigma = normal(2, 4, 16, 16).float(), torch.tensor([5.0, 1.0])
        for run in (pipe.model, lambda x, sigma, cond: pipe.model.bind(sigma, cond)(x)):
            together = run(x, sigma, joined)
            torch.testing.assert_close(together[:1], run(x[:1], sigma[:1], short), atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(together[1:], run(x[1:], sigma[1:], long), atol=2e-5, rtol=2e-5)

    def test_unequal_lengths_are_padded_and_masked(self) -> None:
        lengths = (14, 15, 16, 17, 19, 23, 26, 31)  # their least common multiple is 2.9e7
        conds = [self.cond(1, tokens) for tokens in lengths]
        joined = conds[0].join(*conds[1:])
        assert joined.context.shape[:2] == (8, 31)
        assert joined.mask.sum(1).tolist() == list(lengths)
        for row, cond in enumerate(conds):
            assert torch.equal(joined.context[row, : lengths[row]], cond.context[0])
        again = joined.take([0]).join(self.cond(1, 40))
        assert again.mask.sum(1).tolist() == [14, 40]
        assert joined.expand(8).to("cpu").mask is not None
        assert conds[0].join(conds[0]).mask is None

    def test_a_mask_has_one_value_per_token(self) -> None:
        with pytest.raises(ValueError, match="`mask`"):
            Conditioning(torch.zeros(1, 3, 5), mask=torch.ones(1, 4, dtype=torch.bool))


class TestGuidance:
    def test_extrapolate(self) -> None:
        a, d = normal(1, 1, 2, 2), normal(1, 1, 2, 2, seed=1)
        torch.testing.assert_close(cfg(a, d, 3.0), 3 * d - 2 * a)
        assert torch.equal(cfg(a, d, 0.0), a)

    @pytest.mark.parametrize(
        ("uncond", "scale", "rows"),
        [(None, 7.0, 3), (constant_cond(0.5), 1.0, 3), (constant_cond(0.5), 2.0, 6), (constant_cond(0.5), 0.0, 6)],
    )
    def test_cost_is_one_call_of_b_or_2b_rows(self, uncond: Conditioning | None, scale: float, rows: int) -> None:
        model = GaussianDenoiser()
        CFG(model, constant_cond(0.1), uncond, scale)(normal(3, 4, 2, 2), torch.tensor(1.0))
        assert (model.calls, model.rows) == (1, rows)

    @SPACES
    def test_cfg_is_the_papers_formula_on_noise_estimates(self, space: NoiseSpace) -> None:
        """eps = (1 + w) eps_c - w eps_u with w = scale - 1 (arXiv 2207.12598 eq. 6) holds for denoised estimates too."""
        model, x, sigma = GaussianDenoiser(0.5, space=space), normal(2, 4, 2, 2), torch.tensor(0.6, dtype=torch.float64)
        cond, uncond = constant_cond(1.0), constant_cond(-0.5)
        guided = CFG(model, cond, uncond, 3.0)(x, sigma)
        eps = [space.noise_of(x, model(x, sigma.expand(2), c), sigma) for c in (cond, uncond)]
        torch.testing.assert_close(space.noise_of(x, guided, sigma), 3 * eps[0] - 2 * eps[1])

    def test_many_conditionings_are_one_call_in_order(self) -> None:
        model, x, sigma = GaussianDenoiser(0.5), normal(2, 4, 2, 2), torch.tensor([1.0, 2.0])
        conds = [constant_cond(v, rows) for v, rows in ((0.0, 1), (1.0, 2), (-1.0, 1))]
        found = denoise_many(model, x, sigma, conds)
        assert (model.calls, model.rows) == (1, 6)
        for one, cond in zip(found, conds):
            torch.testing.assert_close(one, model(x, sigma, cond))

    def test_any_number_of_dimensions(self) -> None:
        video = normal(2, 4, 3, 2, 2)
        found = denoise_many(lambda x, sigma, cond: x, video, torch.tensor(1.0), [constant_cond()] * 2)  # type: ignore[arg-type]
        assert [part.shape for part in found] == [video.shape] * 2
