"""Levels and schedules against their formulas, diffusers' tables and timesteps, and scipy's beta distribution."""

from __future__ import annotations

import math

import pytest
import torch
from slipstream.core import SCHEDULES, make_sigmas
from slipstream.core.checks import check_sigmas
from slipstream.core.schedules import (
    DiscreteLevels,
    FlowLevels,
    Levels,
    alphas_cumprod_of,
    beta_quantiles,
    from_timesteps,
    nearest_step,
    scaled_linear_alphas_cumprod,
    sigma_at,
    zero_terminal_snr,
)

SD = DiscreteLevels(scaled_linear_alphas_cumprod())
ZERO_SNR = DiscreteLevels(zero_terminal_snr(scaled_linear_alphas_cumprod()))
FLOW1, FLOW3 = FlowLevels(), FlowLevels(3.0)
LEVELS = pytest.mark.parametrize("levels", [SD, ZERO_SNR, FLOW1, FLOW3], ids=["sd", "zero snr", "flow", "flow shift 3"])


class TestLevels:
    def test_the_table_is_stable_diffusions(self) -> None:
        assert SD.sigma_min == pytest.approx(0.0292, abs=1e-4)
        assert SD.sigma_max == pytest.approx(14.6146, abs=1e-4)
        abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0).double()
        times = torch.arange(1000)
        torch.testing.assert_close(SD.t_to_sigma(times).double(), ((1 - abar) / abar).sqrt(), atol=0, rtol=1e-6)

    @LEVELS
    def test_a_float32_sigma_of_an_entry_gives_its_integer_timestep(self, levels: Levels) -> None:
        times = torch.arange(1, 1000) if isinstance(levels, FlowLevels) else torch.arange(1000)
        found = levels.sigma_to_t(levels.t_to_sigma(times).float())
        if isinstance(levels, DiscreteLevels):
            assert torch.equal(found, times.float())
        else:
            torch.testing.assert_close(found, times.float(), atol=1e-3, rtol=0)

    @LEVELS
    def test_fractional_timesteps_come_back(self, levels: Levels) -> None:
        times = torch.linspace(1.3, 990.7, 50)
        torch.testing.assert_close(levels.sigma_to_t(levels.t_to_sigma(times)), times, atol=2e-2, rtol=1e-4)

    def test_between_entries_sigma_is_log_linear(self) -> None:
        ends = SD.t_to_sigma(torch.tensor([500, 501])).log()
        middle = SD.t_to_sigma(torch.tensor(500.25)).log()
        torch.testing.assert_close(middle, 0.75 * ends[0] + 0.25 * ends[1])

    @pytest.mark.parametrize("levels", [SD, ZERO_SNR], ids=["sd", "zero snr"])
    def test_the_hosts_rounding_takes_the_nearest_entry_in_log_sigma(self, levels: DiscreteLevels) -> None:
        """As ModelSamplingDiscrete.timestep: the smallest distance in log sigma, of all entries."""
        sigmas = torch.linspace(math.log(0.02), math.log(20), 997).exp()
        distance = (sigmas.double().log() - levels.sigmas.log()[:, None]).abs()
        assert torch.equal(levels.sigma_to_t(sigmas, quantize=True), distance.argmin(0).float())
        assert torch.equal(
            DiscreteLevels(1 / (levels.sigmas**2 + 1), quantize=True).sigma_to_t(sigmas), distance.argmin(0).float()
        )
        assert float((levels.sigma_to_t(sigmas) - distance.argmin(0)).abs().max()) <= 0.5 + 1e-3

    def test_a_searched_schedule_has_the_same_timesteps_with_and_without_rounding(self) -> None:
        """A search tries entries of the table only; schedules that lie between them differ by up to half a step."""
        entries = SD.sigmas[torch.arange(0, 1000, 7)].float()
        assert torch.equal(SD.sigma_to_t(entries), SD.sigma_to_t(entries, quantize=True))
        karras = make_sigmas("karras", SD, 4)[:-1]
        assert SD.sigma_to_t(karras, quantize=True).tolist() == [999, 687, 146, 0]
        assert SD.sigma_to_t(karras).tolist() == pytest.approx([999, 687.153, 145.939, 0], abs=1e-3)

    def test_outside_the_table_the_ends_hold(self) -> None:
        assert SD.sigma_to_t(torch.tensor([0.0, 1e-5, 1e5])).tolist() == [0, 0, 999]
        assert SD.t_to_sigma(torch.tensor([-5.0, 5000.0])).tolist() == pytest.approx([SD.sigma_min, SD.sigma_max])

    def test_any_shape(self) -> None:
        assert SD.sigma_to_t(torch.tensor(1.0)).shape == ()
        assert SD.sigma_to_t(torch.ones(2, 3)).shape == (2, 3)

    def test_flow_shift(self) -> None:
        """sigma = s u / (1 + (s - 1) u) (arXiv 2403.03206 eq. 23)."""
        assert float(FLOW3.t_to_sigma(torch.tensor(500.0))) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
        assert float(FLOW1.t_to_sigma(torch.tensor(250.0))) == pytest.approx(0.25)
        assert float(FLOW3.t_to_sigma(torch.tensor(1000.0))) == FLOW3.sigma_max == 1
        with pytest.raises(ValueError, match="`shift`"):
            FlowLevels(0.0)

    @pytest.mark.parametrize(
        "config",
        [
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "rescale_betas_zero_snr": True,
            },
            {"beta_schedule": "linear", "num_train_timesteps": 500},
            {"trained_betas": [0.1, 0.2, 0.3]},
            {},
        ],
    )
    def test_tables_are_those_of_diffusers(self, config: dict[str, object]) -> None:
        from diffusers import DDIMScheduler

        wanted = DDIMScheduler(**config).alphas_cumprod
        torch.testing.assert_close(alphas_cumprod_of(config), wanted, atol=1e-6, rtol=1e-4)

    def test_unknown_tables_are_refused(self) -> None:
        with pytest.raises(ValueError, match="`beta_schedule`"):
            alphas_cumprod_of({"beta_schedule": "sigmoid"})

    def test_zero_terminal_snr_ends_in_noise_and_keeps_the_start(self) -> None:
        before, after = (
            x.sqrt() for x in (scaled_linear_alphas_cumprod(), zero_terminal_snr(scaled_linear_alphas_cumprod()))
        )
        assert float(after[-1]) == 0
        torch.testing.assert_close(after[0], before[0])
        assert math.isfinite(ZERO_SNR.sigma_max)

    @LEVELS
    def test_percent(self, levels: Levels) -> None:
        assert sigma_at(levels, 1.0) == pytest.approx(levels.sigma_max)
        assert sigma_at(levels, 0.0) <= levels.sigma_min
        middle = sigma_at(levels, 0.5)
        half = 500.0 if isinstance(levels, FlowLevels) else 499.5
        assert float(levels.sigma_to_t(torch.tensor(middle))) == pytest.approx(half, abs=0.01)
        with pytest.raises(ValueError, match="`fraction`"):
            sigma_at(levels, 1.1)

    def test_nearest_step_is_nearest_in_log_scale(self) -> None:
        sigmas = torch.tensor([10.0, 1.0, 0.1, 0.0])
        assert [nearest_step(sigmas, s) for s in (20.0, 3.2, 3.1, 0.11, 0.0)] == [0, 0, 1, 2, 3]


class TestSchedules:
    @LEVELS
    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 999, 1000])
    def test_every_schedule_is_usable(self, name: str, steps: int, levels: Levels) -> None:
        sigmas = make_sigmas(name, levels, steps)
        check_sigmas("sigmas", sigmas)
        assert sigmas.dtype == torch.float32
        assert float(sigmas[-1]) == 0
        assert float(sigmas[0]) <= levels.sigma_max * 1.0001
        # Rounded quantiles may meet.
        assert len(sigmas) == steps + 1 or (name == "beta" and len(sigmas) < steps + 1)

    def test_timesteps(self) -> None:
        def times(name: str, steps: int) -> list[float]:
            return [round(float(t), 3) for t in SD.sigma_to_t(make_sigmas(name, SD, steps)[:-1])]

        assert times("uniform", 4) == [999, 666, 333, 0]
        assert times("sgm_uniform", 4) == [999, 749.25, 499.5, 249.75]
        assert times("leading", 4) == [751, 501, 251, 1]
        assert times("simple", 4) == [999, 749, 499, 249]
        assert times("simple", 3) == [999, 666, 333]

    @pytest.mark.parametrize("steps", [1, 4, 20, 30, 1000])
    def test_leading_is_that_of_diffusers(self, steps: int) -> None:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1 if steps < 1000 else 0)
        scheduler.set_timesteps(steps)
        assert SD.sigma_to_t(make_sigmas("leading", SD, steps)[:-1]).tolist() == scheduler.timesteps.tolist()

    def test_karras(self) -> None:
        """arXiv 2206.00364 eq. 5."""
        n, rho, (low, high) = 10, 7, (SD.sigma_min, SD.sigma_max)
        wanted = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
        assert make_sigmas("karras", SD, n)[:-1].tolist() == pytest.approx(wanted, rel=1e-6)

    def test_exponential_is_geometric(self) -> None:
        sigmas = make_sigmas("exponential", SD, 10)[:-1].double()
        ratios = sigmas[1:] / sigmas[:-1]
        torch.testing.assert_close(ratios, ratios[:1].expand(9), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (1.0, 1.0), (2.0, 0.7), (0.5, 0.5)])
    def test_beta_quantiles(self, alpha: float, beta: float) -> None:
        """Closed forms: uniform for (1, 1), arcsine law for (1/2, 1/2); symmetry and the distribution function else."""
        p = torch.linspace(0, 1, 41, dtype=torch.float64)
        q = beta_quantiles(p, alpha, beta)
        if alpha == beta == 1:
            torch.testing.assert_close(q, p, atol=1e-6, rtol=0)
        if alpha == beta == 0.5:
            torch.testing.assert_close(q, (math.pi * p / 2).sin() ** 2, atol=1e-6, rtol=0)
        torch.testing.assert_close(beta_quantiles(1 - p, beta, alpha), 1 - q, atol=1e-6, rtol=0)
        sample = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(beta))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drawn = sample.sample((200_000,)).double()
        shares = (drawn[:, None] <= q[None]).double().mean(0)
        torch.testing.assert_close(shares, p, atol=5e-3, rtol=0)

    def test_strength_keeps_the_last_levels_of_a_finer_schedule(self) -> None:
        whole = make_sigmas("karras", SD, 20)
        assert torch.equal(make_sigmas("karras", SD, 10, strength=0.5), whole[-11:])

    @pytest.mark.parametrize(("steps", "strength", "whole"), [(4, 0.6, 6), (8, 0.6, 13), (3, 0.8, 3), (7, 0.99, 7)])
    def test_strength_is_the_hosts_denoise(self, steps: int, strength: float, whole: int) -> None:
        """KSampler takes the last levels of int(steps / denoise), rounded down."""
        assert torch.equal(make_sigmas("uniform", SD, steps, strength), make_sigmas("uniform", SD, whole)[-steps - 1 :])

    def test_from_timesteps(self) -> None:
        sigmas = from_timesteps(SD, [901, 701, 451, 151])
        assert SD.sigma_to_t(sigmas[:-1]).tolist() == [901, 701, 451, 151]
        assert float(sigmas[-1]) == 0

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [(("linear", SD, 10), "schedule"), (("karras", SD, 0), "steps"), (("karras", SD, 10.5), "steps"),
         (("karras", SD, 10, 0.0), "strength"), (("karras", SD, 10, math.nan), "strength"),
         (("leading", SD, 20, 0.005), "strength")],
    )  # fmt: skip
    def test_bad_input_is_named(self, arguments: tuple[object, ...], named: str) -> None:
        with pytest.raises(ValueError, match=f"^Expected `{named}`"):
            make_sigmas(*arguments)  # type: ignore[arg-type]
