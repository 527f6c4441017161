"""Residual guidance on exact Gaussian data: the closed form, models without signal at their first level, one rule everywhere."""

from __future__ import annotations

import pytest
import torch
from slipstream.core.denoiser import FLOW, VE
from slipstream.core.guidance import RCFG, residual_negative, residual_weights
from slipstream.core.samplers import euler
from slipstream.core.schedules import (
    DiscreteLevels,
    FlowLevels,
    make_sigmas,
    scaled_linear_alphas_cumprod,
    zero_terminal_snr,
)
from slipstream.stream import StreamBatch, StreamConfig
from slipstream_tests.analytic import GaussianDenoiser, constant_cond

TABLES = {
    "sd": scaled_linear_alphas_cumprod(),
    "zero terminal SNR": zero_terminal_snr(scaled_linear_alphas_cumprod()),
}


def model_of(kind: str) -> GaussianDenoiser:
    model = GaussianDenoiser(space=FLOW if kind == "flow" else VE)
    model.levels = FlowLevels(3.0) if kind == "flow" else DiscreteLevels(TABLES[kind])
    model.sigma_min, model.sigma_max = model.levels.sigma_min, model.levels.sigma_max
    return model


def sampled(model, kind: str, sigmas, delta: float) -> torch.Tensor:
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    guided = RCFG(model, constant_cond(0.2), constant_cond(-0.2), kind, 1.4, delta)
    return euler(guided, noise * sigmas[0], sigmas, space=model.space)


@pytest.mark.parametrize("space", [VE, FLOW], ids=lambda space: space.name)
@pytest.mark.parametrize("delta", [0.0, 0.5, 1.0])
def test_the_residual_negative_is_the_published_one(space, delta) -> None:
    """eps_c + (s - 1) (eps_c - delta eps_v), with eps_v the noise that leads from the reference to x."""
    g = torch.Generator().manual_seed(1)
    reference, noise, positive = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(3))
    sigma = torch.tensor([0.3, 0.9]).reshape(-1, 1, 1, 1)
    x, scale = space.add_noise(reference, noise, sigma.flatten()), space.scale(sigma)
    eps = (x - scale * positive) / sigma
    published = (x - sigma * (eps + 0.4 * (eps - delta * noise))) / scale
    negative = residual_negative(x, reference, residual_weights(sigma, delta, space))
    torch.testing.assert_close(negative + 1.4 * (positive - negative), published, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["zero terminal SNR", "flow"])
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_delta_has_no_effect_where_there_is_no_signal(kind, delta) -> None:
    model = model_of(kind)
    sigmas = torch.tensor([model.sigma_max, 0.0])
    assert torch.equal(sampled(model, "onetime", sigmas, delta), sampled(model, "onetime", sigmas, 1.0))


@pytest.mark.parametrize("kind", ["sd", "zero terminal SNR", "flow"])
@pytest.mark.parametrize("schedule", ["sgm_uniform", "karras"])
@pytest.mark.parametrize("steps", [3, 4, 6, 10, 20])
def test_delta_never_makes_the_result_wilder(kind, schedule, steps) -> None:
    """The data have standard deviation 1. Unguarded, a zero-terminal-SNR model gives 27 (karras, 3 steps) or 73 at delta 0.5."""
    model = model_of(kind)
    sigmas = make_sigmas(schedule, model.levels, steps)
    spread = {delta: float(sampled(model, "onetime", sigmas, delta).std()) for delta in (0.5, 1.0)}
    assert spread[0.5] <= spread[1.0]


@pytest.mark.parametrize("kind", ["sd", "zero terminal SNR", "flow"])
@pytest.mark.parametrize("guidance", ["onetime", "full", "none"])
@pytest.mark.parametrize("delta", [0.5, 1.0])
def test_a_sampler_and_a_stream_guide_alike(kind, guidance, delta) -> None:
    """Euler over RCFG, and a stream that keeps each frame's own noise, are one computation."""
    model = model_of(kind)
    sigmas = make_sigmas("sgm_uniform", model.levels, 4)
    frame = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    config = StreamConfig(
        sigmas=sigmas, guidance=guidance, cfg_scale=1.4, delta=delta, from_noise=True, renoise="ddim"
    )  # fmt: skip
    stream = StreamBatch(model, constant_cond(0.2), constant_cond(-0.2), config)
    scale = float(model.space.scale(sigmas[0]))
    finished = stream.push(frame * float(sigmas[0]) / (scale**2 + float(sigmas[0]) ** 2) ** 0.5) + stream.drain()
    torch.testing.assert_close(finished[0].latents, sampled(model, guidance, sigmas, delta), rtol=1e-4, atol=1e-4)
