"""Residual guidance in closed form, its stability, its cost, and blends of prompts."""

from __future__ import annotations

import pytest
import torch
from slipstream.core import Conditioning, SeededNoise, make_sigmas, sample
from slipstream.core.guidance import guided
from slipstream.stream import RCFG, StreamBatch, StreamConfig, blend
from slipstream.stream.config import stage_sigmas
from slipstream.stream.guidance import slerp
from slipstream_tests.analytic import GaussianDenoiser, constant_cond


def results(stream: StreamBatch, frames) -> torch.Tensor:
    return torch.cat([f.latents for f in stream.push(frames) + stream.drain()])


@pytest.mark.parametrize("index", range(50))
def test_self_guidance_with_one_step_is_stable_at_every_level(model, frames, cond, index) -> None:
    """The published feedback multiplies by up to 17.5 per frame here; ours has no memory of earlier frames."""
    config = StreamConfig(t_index_list=[index], guidance="self", cfg_scale=1.5)
    stream = StreamBatch(model, cond, None, config)
    got = torch.cat([stream.push(frames[:1])[0].latents for _ in range(20)])
    assert torch.equal(got[0], got[-1])
    x = model.space.add_noise(frames[:1], SeededNoise(2)(frames[:1]), stage_sigmas(config, model.levels)[0])
    denoised = model(x, stage_sigmas(config, model.levels), cond)
    torch.testing.assert_close(got[:1], frames[:1] + 1.5 * (denoised - frames[:1]), rtol=1e-4, atol=1e-4)


def test_scale_one_is_no_guidance(model, frames, cond, uncond) -> None:
    plain = results(StreamBatch(model, cond, None, StreamConfig(guidance="none")), frames)
    for kind in ("self", "onetime", "full"):
        model.rows = 0
        got = results(StreamBatch(model, cond, uncond, StreamConfig(guidance=kind, cfg_scale=1)), frames)
        assert torch.equal(got, plain)
        assert model.rows == 2 * len(frames)


def test_onetime_with_one_step_is_full_guidance(model, frames, cond, uncond) -> None:
    settings = {"t_index_list": [20], "cfg_scale": 3.0}
    once = results(StreamBatch(model, cond, uncond, StreamConfig(guidance="onetime", **settings)), frames)
    full = results(StreamBatch(model, cond, uncond, StreamConfig(guidance="full", **settings)), frames)
    torch.testing.assert_close(once, full)


def test_delta_zero_takes_the_noised_latent_as_negative(model, frames, cond) -> None:
    config = StreamConfig(t_index_list=[30], cfg_scale=1.4, delta=0.0)
    sigma = stage_sigmas(config, model.levels)
    x = model.space.add_noise(frames[:1], SeededNoise(2)(frames[:1]), sigma[0])
    denoised, clean = model(x, sigma, cond), x / model.space.scale(sigma[0])
    got = results(StreamBatch(model, cond, None, config), frames[:1])
    torch.testing.assert_close(got, clean + 1.4 * (denoised - clean), rtol=1e-4, atol=1e-4)


def test_delta_softens_the_contrast_of_self(frames, cond) -> None:
    """Against a prompt far from the image, self guidance overshoots; a smaller delta overshoots less."""
    spreads = []
    for delta in (1.0, 0.5):
        config = StreamConfig(t_index_list=[10], cfg_scale=2.0, delta=delta)
        spreads.append(float(results(StreamBatch(GaussianDenoiser(0.2), cond, None, config), frames * 0.1).std()))
    assert spreads[0] != pytest.approx(spreads[1])


# -- any sampler


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize(("kind", "extra"), [("none", 0), ("self", 0), ("onetime", 1), ("full", None)])
def test_rcfg_costs_n_or_n_plus_one_or_two_n_rows(model, frames, cond, uncond, sampler, kind, extra) -> None:
    sigmas = make_sigmas("uniform", model.levels, 6)
    guided = RCFG(model, cond, uncond, kind, 2.0, reference=frames[:1])
    if kind == "onetime":
        guided.reference = None
    x = sample(sampler, guided, model.space.add_noise(frames[:1], frames[1:2], sigmas[0]), sigmas, model.space)
    assert torch.isfinite(x).all()
    calls = 11 if sampler == "heun" else 6
    assert model.calls == calls
    assert model.rows == (2 * calls if extra is None else calls + extra)


def test_rcfg_in_closed_form(model, frames, cond, uncond) -> None:
    x, sigma = frames * 0.9, torch.tensor(0.6)
    level = sigma.expand(len(x))
    positive, negative = model(x, level, cond), model(x, level, uncond)
    full = RCFG(model, cond, uncond, "full", 2.5)(x, sigma)
    torch.testing.assert_close(full, negative + 2.5 * (positive - negative))
    once = RCFG(model, cond, uncond, "onetime", 2.5)
    torch.testing.assert_close(once(x, sigma), full)
    second = once(x * 0.5, sigma)
    torch.testing.assert_close(second, negative + 2.5 * (model(x * 0.5, level, cond) - negative))
    half = RCFG(model, cond, uncond, "self", 2.5, delta=0.5, reference=frames)(x, sigma)
    residual = 0.5 * frames + 0.5 * x / model.space.scale(sigma)
    torch.testing.assert_close(half, residual + 2.5 * (positive - residual))


class OwnGuidance:
    """A model whose guidance has a patch around it: the guided estimate, halved. It notes what it was asked."""

    def __init__(self, model) -> None:
        self.model, self.seen = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x, sigma, cond):
        return self.model(x, sigma, cond)

    def guided(self, x, sigma, cond, uncond, cfg_scale, negative=None):
        self.seen.append((cfg_scale, negative))
        return 0.5 * guided(self.model, x, torch.as_tensor(sigma), cond, uncond, cfg_scale, negative)


@pytest.mark.parametrize("kind", ["none", "full", "self", "onetime"])
def test_a_models_own_guidance_is_asked(model, frames, cond, uncond, kind) -> None:
    reference = frames if kind == "self" else None
    own, sigma = OwnGuidance(model), torch.tensor(0.5)
    got = RCFG(own, cond, uncond, kind, 2.0, 0.5, reference)(frames, sigma)
    torch.testing.assert_close(got, 0.5 * RCFG(model, cond, uncond, kind, 2.0, 0.5, reference)(frames, sigma))
    assert [(scale, negative is not None) for scale, negative in own.seen] == [
        (1.0 if kind == "none" else 2.0, kind in ("self", "onetime"))
    ]


@pytest.mark.parametrize("kind", ["none", "full", "self", "onetime"])
def test_a_stream_asks_a_models_own_guidance_for_every_row(model, frames, cond, uncond, kind) -> None:
    """With a patch that changes nothing the frames are those of a model without one, in the same number of rows."""
    config = StreamConfig(guidance=kind, cfg_scale=2.0, delta=0.5, strength=0.8, steps=3)
    plain = results(StreamBatch(model, cond, uncond, config), frames)
    rows, model.rows = model.rows, 0
    own = OwnGuidance(model)
    own.guided = lambda *args: guided(model, *args)
    torch.testing.assert_close(results(StreamBatch(own, cond, uncond, config), frames), plain)
    assert model.rows == rows


def test_rcfg_bad_settings(model, cond, uncond) -> None:
    for settings, message in [
        (("self", 2.0), "`reference`"),
        (("cfg", 2.0), "`guidance`"),
        (("full", 0.0), "`cfg_scale`"),
        (("full", 2.0, 1.5), "`delta`"),
    ]:
        with pytest.raises(ValueError, match=message):
            RCFG(model, cond, uncond, *settings)


# -- blends


def test_linear_blend() -> None:
    a, b = constant_cond(1.0), constant_cond(4.0)
    assert float(blend([a, b], [1, 2]).context) == pytest.approx(3.0)
    assert torch.equal(blend([a, b], [0, 1]).context, b.context)
    for mode in ("linear", "slerp"):
        short, long = Conditioning(torch.ones(1, 2, 3)), Conditioning(torch.ones(1, 5, 3))
        assert blend([short, long], [1, 0], mode) is short
        assert blend([short, long], [0, 2], mode) is long


def test_blend_of_unequal_lengths_and_sdxl_parts() -> None:
    a = Conditioning(torch.ones(1, 2, 3), torch.zeros(1, 4), {"time_ids": torch.ones(1, 6, dtype=torch.long)})
    b = Conditioning(torch.zeros(1, 3, 3), torch.ones(1, 4), {"time_ids": torch.ones(1, 6, dtype=torch.long)})
    mixed = blend([a, b], [3, 1])
    assert mixed.mask is None  # the longer prompt counts to its end
    torch.testing.assert_close(mixed.context[0, :, 0], torch.tensor([0.75, 0.75, 0.0]))
    assert float(mixed.pooled.mean()) == pytest.approx(0.25)
    assert mixed.extra["time_ids"].dtype == torch.long
    assert mixed.rows == 1


def test_slerp_keeps_length() -> None:
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    middle = slerp(a, b, 0.5)
    torch.testing.assert_close(middle, torch.full((1, 2), 3 / 2**0.5))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a * 2, 0.5), a * 1.5)  # parallel
    torch.testing.assert_close(slerp(a, -a, 0.25), a * 0.5)  # opposite: no shortest way, mixed linearly
    cond = blend([Conditioning(a[None]), Conditioning(b[None])], [1, 1], "slerp")
    torch.testing.assert_close(cond.context[0], middle)


@pytest.mark.parametrize(
    ("count", "weights", "mode", "message"),
    [
        (2, [1.0], "linear", "one weight per prompt"),
        (0, [], "linear", "one weight per prompt"),
        (2, [0.0, 0.0], "linear", "sum above 0"),
        (2, [1.0, -1.0], "linear", "at least 0"),
        (2, [1.0, float("nan")], "linear", "sum above 0"),
        (3, [1.0, 1.0, 1.0], "slerp", "2 prompts for slerp"),
        (2, [1.0, 1.0], "cubic", "`mode`"),
    ],
)
def test_bad_blends(count, weights, mode, message) -> None:
    with pytest.raises(ValueError, match=message):
        blend([constant_cond(float(i)) for i in range(count)], weights, mode)
