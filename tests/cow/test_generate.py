"""Cyclic One-Way Diffusion on exact denoisers: closed forms, invariants, cost and bad input."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from slipstream.core import CFG, FLOW, VE, Conditioning, DiffusersDenoiser, ReplayNoise, SeededNoise, make_sigmas
from slipstream.core.cache import INVERSIONS
from slipstream.core.denoiser import PREDICTIONS, Prediction
from slipstream.core.masks import grow
from slipstream.core.progress import Reporter
from slipstream.core.reuse import ReuseSpan, reusing
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.cow import CowConfig, generate
from slipstream.cow.config import Plan, make_plan
from slipstream.cow.cycle import MaskedCFG, Subject, around
from slipstream.cow.invert import invert, limit_noise
from slipstream.cow.sampling import lifted
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.noisy_masks import NOISY, noisy

TEN = CowConfig(steps=10, cycles=3, start="canvas", inversion_cfg=1.5)


def canvas(rows: int = 1, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(5))


def corner(height: int = 8, width: int = 12) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, 2:5, 3:9] = 1
    return mask


def run(model=None, latents=None, mask=None, config=TEN, seed=0, **more):
    model = model or GaussianDenoiser(std=0.8)
    latents = canvas() if latents is None else latents
    mask = corner() if mask is None else mask
    noise = more.pop("noise", None) or SeededNoise(seed)
    return generate(model, latents, mask, constant_cond(0.3), constant_cond(0.0), config, noise, **more)


class Watch(GaussianDenoiser):
    """Remembers each level and input it was asked about."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.seen: list = []

    def __call__(self, x, sigma, cond):
        self.seen.append((float(sigma[0]), x.clone()))
        return super().__call__(x, sigma, cond)


# Closed forms


@pytest.mark.parametrize("space", [VE, FLOW])
def test_inversion_follows_the_exact_flow_of_gaussian_data(space):
    """Data N(0, s^2): the probability flow keeps x / sqrt(scale^2 s^2 + sigma^2); the error halves as the steps double."""
    model, latents, s = GaussianDenoiser(std=0.8, space=space), canvas(), 0.8
    errors = []
    for steps in (100, 200):
        levels = torch.linspace(0, 0.6, steps + 1)
        path = invert(lambda x, v: model(x, v.expand(len(x)), constant_cond()), latents, levels, space, Reporter(steps))
        scale = float(space.scale(levels[-1]))
        exact = latents * math.sqrt(scale**2 * s**2 + 0.36) / s
        errors.append(float((path[-1] - exact).abs().max()))
    assert errors[1] < 0.01
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.05)


def test_eps_and_flow_agree_at_equal_signal_to_noise():
    """x_flow = (1 - t) x_eps with t = sigma / (1 + sigma): the same run in two spaces, step for step."""
    sigmas = make_sigmas("leading", GaussianDenoiser().levels, 12)
    low, high = 1.0, 3.0
    eps = run(GaussianDenoiser(std=0.8), config=CowConfig(low=low, high=high, unit="sigma", cycles=3), sigmas=sigmas)
    flow = run(
        GaussianDenoiser(std=0.8, space=FLOW), sigmas=sigmas / (1 + sigmas),
        config=CowConfig(low=low / (1 + low), high=high / (1 + high), unit="sigma", cycles=3),
    )  # fmt: skip
    torch.testing.assert_close(eps.latents, flow.latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(eps.cycles[-1], flow.cycles[-1], atol=1e-5, rtol=0)


class ExactUnet:
    """A diffusers-shaped network that predicts `kind` perfectly for data N(0, s^2) per pixel."""

    config = SimpleNamespace(in_channels=4, addition_embed_type=None)

    def __init__(self, kind: str) -> None:
        self.prediction, self.s = Prediction(kind), 0.8
        self.sigmas = GaussianDenoiser().levels

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, x, timestep, encoder_hidden_states, return_dict):
        flow = self.prediction.space is FLOW
        sigma = (timestep / 1000 if flow else self.sigmas.t_to_sigma(timestep)).reshape(-1, 1, 1, 1)
        scale = 1 - sigma if flow else torch.ones_like(sigma)
        x = x if flow else x * (sigma**2 + 1).sqrt()
        clean = scale * self.s**2 / (scale**2 * self.s**2 + sigma**2) * x
        noise = (x - scale * clean) / sigma
        return (self.prediction.output_for(clean, noise, sigma.flatten()),)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_kind_of_prediction_gives_the_exact_run(kind):
    space = Prediction(kind).space
    cond = Conditioning(torch.zeros(1, 1, 1))
    model = DiffusersDenoiser(ExactUnet(kind), None if space is FLOW else scaled_linear_alphas_cumprod(), kind)
    config = CowConfig(steps=10, cycles=2, cfg_scale=1)
    got = generate(model, canvas(), corner(), cond, None, config, SeededNoise(0))
    plain = generate(GaussianDenoiser(std=0.8, space=space), canvas(), corner(), cond, None, config, SeededNoise(0))
    torch.testing.assert_close(got.latents, plain.latents, atol=2e-4, rtol=0)


@pytest.mark.parametrize("space", [VE, FLOW])
def test_background_becomes_the_prompts_distribution(space):
    """Independent pixels N(0.3 + uncond 0, 0.8^2): after the cycles nothing of the constant background is left."""
    model = GaussianDenoiser(std=0.8, space=space)
    flat = torch.full((16, 4, 16, 16), -2.0)
    config = CowConfig(steps=50, cycles=6, cfg_scale=1, inversion_cfg=1)
    result = run(model, flat, torch.eye(16)[None], config)
    outside = result.latents[:, :, torch.eye(16) == 0]
    assert float(outside.mean()) == pytest.approx(0.3, abs=0.05)
    assert float(outside.std()) == pytest.approx(0.8, abs=0.08)


def test_suppress_and_enhance_move_the_background_only():
    """The estimate is affine: base = n + w (p - d), guided = base + g (c - base); means of Gaussian data follow exactly."""
    mask = corner()
    config = CowConfig(steps=10, cycles=1, cfg_scale=2.0, repel=0.5, eta=0)
    plain = run(mask=mask, config=config)
    moved = run(mask=mask, config=config, suppress=constant_cond(0.2), enhance=constant_cond(0.6))
    shifted = run(mask=mask, config=config, suppress=constant_cond(0.0), enhance=constant_cond(0.4))
    kept = mask[0] == 1
    assert torch.equal(plain.latents[..., kept], moved.latents[..., kept])
    assert (moved.latents - plain.latents)[..., ~kept].min() > 0  # towards the higher mean of `enhance`
    torch.testing.assert_close(moved.latents, shifted.latents, atol=1e-5, rtol=0)  # only the difference counts


def test_noise_of_a_subject_that_inverts_badly_is_limited_to_its_level():
    """A subject 30 standard deviations off inverts to far too much noise; what inverts well is returned as it is."""
    latents, keep = canvas(), corner()[:, None]
    levels = torch.tensor([0.0, 0.5, 2.0])
    strong = torch.cat([torch.full((1, 2, 8, 12), 5.0), torch.full((1, 2, 8, 12), 0.5)], 1)
    path = [latents] + [latents + sigma * strong for sigma in levels[1:]]
    limited = limit_noise(path, keep, levels, VE, 1.0)
    kept = keep[0, 0] == 1
    assert torch.equal(limited[0], latents)
    for sigma, x, before in zip(levels[1:], limited[1:], path[1:]):
        noise = ((x - latents) / sigma)[..., kept]
        torch.testing.assert_close(noise[:, :2], torch.ones_like(noise[:, :2]))
        torch.testing.assert_close(noise[:, 2:], torch.full_like(noise[:, 2:], 0.5))
        assert torch.equal(x[..., ~kept], before[..., ~kept])


# Invariants


@pytest.mark.parametrize("space", [VE, FLOW])
def test_the_subject_is_at_every_network_call_at_its_own_level(space):
    """What the network sees inside the mask is the inversion's latent of that very level, after every replacement."""
    model = Watch(std=0.8, space=space)
    config = CowConfig(steps=10, cycles=2, preserve=1.0, noise_limit=1000, start="canvas")
    result = run(model, config=config)
    plan = make_plan(config, model.levels, make_sigmas("leading", model.levels, 10))
    levels = torch.tensor(plan.levels)
    guided = CFG(model, constant_cond(0.3), constant_cond(0.0), config.inversion_cfg)
    path = invert(guided, canvas(), levels[: plan.high + 1], space, Reporter(plan.high))
    calls = model.seen[plan.high : plan.total]
    kept = corner()[0] == 1
    for sigma, x in calls:
        step = int((levels - sigma).abs().argmin())
        assert torch.equal(x[:1][..., kept], path[step][..., kept])
    assert torch.equal(result.latents[..., kept], canvas()[..., kept])


def test_preserve_counts_the_final_replacements():
    results = {p: run(config=CowConfig(steps=10, cycles=2, preserve=p, final_eta=0.5)) for p in (0.0, 0.6, 1.0)}
    kept = corner()[0] == 1
    change = {p: float((r.latents - canvas())[..., kept].abs().max()) for p, r in results.items()}
    assert change[1.0] == 0
    assert 0 < change[0.6] < change[0.0]


def test_full_mask_skips_the_cycles_with_the_same_result():
    full = torch.ones(1, 8, 12)
    short = GaussianDenoiser(std=0.8)
    config = CowConfig(steps=10, cycles=3, preserve=0.6)
    result = run(short, mask=full, config=config)
    plan = make_plan(config, short.levels, make_sigmas("leading", short.levels, 10))
    assert (short.calls, result.cycles) == (2 * plan.stop, [])
    # One free cell far from all others: independent pixels, so every kept cell of the long way must be the same.
    almost = full.clone()
    almost[:, 0, 0] = 0
    long = run(mask=almost, config=config)
    assert len(long.cycles) == 3
    kept = almost[0] == 1
    assert torch.equal(result.latents[..., kept], long.latents[..., kept])


def test_same_seed_twice_and_another_seed():
    one, two, other = run(seed=3), run(seed=3), run(seed=4)
    assert torch.equal(one.latents, two.latents)
    assert not torch.equal(one.latents, other.latents)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run()
    assert torch.equal(before, torch.get_rng_state())


def draws(rows: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, 4, 8, 12, generator=generator) for _ in range(count)]


def test_a_batch_row_equals_its_single_run():
    latents, noise = canvas(3), draws(3, 40)
    masks = torch.stack([corner()[0], corner()[0].flip(0), corner()[0].roll(2, 1)])
    together = run(latents=latents, mask=masks, noise=ReplayNoise(noise))
    for row in range(3):
        single = run(
            latents=latents[row : row + 1], mask=masks[row : row + 1],
            noise=ReplayNoise([n[row : row + 1] for n in noise]),
        )  # fmt: skip
        torch.testing.assert_close(together.latents[row : row + 1], single.latents, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(7, 13), (3, 5), (1, 9)])
def test_odd_sizes(height, width):
    mask = torch.zeros(1, height * 8, width * 8)
    mask[:, : height * 4, : width * 4] = 1
    result = run(latents=canvas(1, height, width), mask=mask)
    assert result.latents.shape == (1, 4, height, width)
    assert torch.isfinite(result.latents).all()


def test_a_soft_mask_holds_a_cell_for_its_share_of_the_levels():
    """Cells of 0, 0.1 ... 1 side by side: the higher the value, the lower the level down to which the cell is put back."""
    model = Watch(std=0.8)
    values = torch.linspace(0, 1, 11)
    config = CowConfig(steps=20, cycles=1, preserve=1.0, cfg_scale=1, inversion_cfg=1, noise_limit=1000, start="canvas")
    run(model, canvas(1, 1, 11), values[None, None], config)
    plan = make_plan(config, model.levels, make_sigmas("leading", model.levels, 20))
    path = {level: x for level, x in model.seen[: plan.high]}
    held = [0] * 11
    for sigma, x in model.seen[plan.high :]:
        # The inversion asks at the level it goes to about the latents below: what it saw one call later is the target.
        levels = sorted(path)
        at = levels.index(sigma)
        target = path[levels[at + 1]] if at + 1 < len(levels) else None
        if target is not None:
            for cell in range(11):
                held[cell] += bool((x[..., cell] - target[..., cell]).abs().max() < 1e-6)
    assert held[0] == 0
    assert held[-1] == max(held) == plan.high - 1
    assert held == sorted(held)
    assert held[5] == pytest.approx(max(held) / 2, abs=1)


@pytest.mark.parametrize("kind", NOISY)
def test_a_noisy_mask_keeps_what_the_clean_one_does(kind):
    pixels = corner().repeat_interleave(8, 1).repeat_interleave(8, 2)
    for mask in (corner(), pixels):
        assert torch.equal(run(mask=mask).latents, run(mask=noisy(mask, kind)).latents)


def test_a_mask_of_pixels_and_several_subjects():
    mask = torch.zeros(1, 64, 96)
    mask[:, 8:24, 8:24] = 1
    mask[:, 40:56, 64:88] = 1
    result = run(mask=mask, config=CowConfig(steps=10, cycles=2, preserve=1.0))
    grid = mask[0, ::8, ::8] == 1
    assert torch.equal(result.latents[..., grid], canvas()[..., grid])
    assert (result.latents - canvas())[..., ~grid].abs().min() > 0


def test_inputs_are_not_changed():
    latents, mask = canvas(), corner()
    run(latents=latents, mask=mask)
    assert torch.equal(latents, canvas())
    assert torch.equal(mask, corner())


# Cost and progress


@pytest.mark.parametrize(("inversion_cfg", "cfg_scale"), [(1.0, 1.0), (1.5, 7.5), (1.0, 3.0)])
def test_cost_in_network_rows(inversion_cfg, cfg_scale):
    """invert K, cycles C (K - R), final R calls; two rows a call where guidance acts. n = 10: K = 7, R = 5."""
    model = GaussianDenoiser()
    config = CowConfig(steps=10, cycles=10, inversion_cfg=inversion_cfg, cfg_scale=cfg_scale, start="canvas")
    run(model, canvas(2), config=config)
    assert model.calls == 7 + 10 * 2 + 5
    pair = {True: 2, False: 1}
    assert model.rows == 2 * (7 * pair[inversion_cfg != 1] + 25 * pair[cfg_scale != 1])


def test_suppress_and_enhance_cost_two_more_rows_in_the_cycles():
    model = GaussianDenoiser()
    run(model, suppress=constant_cond(0.1), enhance=constant_cond(0.2))
    assert model.rows == 7 * 2 + 3 * 2 * 4 + 5 * 2


class Known(GaussianDenoiser):
    """A model that says what its numbers depend on, so that its inversions may be cached."""

    @property
    def identity(self):
        return "Gaussian", self.std, self.mean, self.space


@pytest.fixture
def inversions():
    INVERSIONS.clear()
    yield INVERSIONS
    INVERSIONS.clear()


def test_another_seed_or_more_cycles_do_not_invert_again(inversions):
    model, latents = Known(std=0.8), canvas()
    first = run(model, latents)
    model.calls = 0
    seen = []
    again = run(model, latents.clone(), callback=seen.append)
    assert model.calls == 3 * 2 + 5
    assert torch.equal(first.latents, again.latents)
    assert [s.index for s in seen] == list(range(8, 19))  # the progress bar jumps over what was found
    run(
        model,
        latents,
        config=CowConfig(steps=10, cycles=5, eta=0.5, preserve=0.2, inversion_cfg=1.5, start="canvas"),
        seed=9,
    )
    assert model.calls == 3 * 2 + 5 + 5 * 2 + 5
    assert len(inversions) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"model": Known(std=0.7)},
        {"model": Known(std=0.8, mean=0.1)},
        {"latents": canvas() + 1e-3},
        {"config": CowConfig(steps=10, cycles=3, inversion_cfg=2.0)},
        {"config": CowConfig(steps=11, cycles=3)},
    ],
)
def test_what_an_inversion_depends_on_makes_a_new_one(inversions, more):
    run(Known(std=0.8))
    run(**{"model": Known(std=0.8), **more})
    assert len(inversions) == 2


def test_a_cached_inversion_survives_what_the_caller_does_with_the_latents(inversions):
    latents = canvas()
    first = run(Known(std=0.8), latents, config=CowConfig(steps=10, cycles=1, preserve=1.0)).latents
    latents.zero_()
    second = run(Known(std=0.8), canvas(), config=CowConfig(steps=10, cycles=1, preserve=1.0)).latents
    assert torch.equal(first, second)


def test_a_model_that_does_not_say_what_it_is_is_never_cached(inversions):
    run()
    assert len(inversions) == 0


def test_progress_counts_every_call_of_all_phases():
    seen = []
    run(callback=seen.append)
    assert [s.index for s in seen] == list(range(1, 7 + 3 * 2 + 5 + 1))
    assert {s.total for s in seen} == {18}
    assert [s.phase for s in seen] == ["invert"] * 7 + ["cycle 1"] * 2 + ["cycle 2"] * 2 + ["cycle 3"] * 2 + [
        "sample"
    ] * 5
    assert all(s.denoised.shape == (1, 4, 8, 12) for s in seen)


@pytest.mark.parametrize("at", [1, 9, 18])
def test_a_callback_that_raises_stops_within_one_call(at):
    model = GaussianDenoiser()

    def stop(step):
        if step.index == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, callback=stop)
    assert model.calls == at


# Levels


def test_the_default_range_is_the_published_one_with_levels_aligned():
    levels = GaussianDenoiser().levels
    plan = make_plan(CowConfig(preserve=0.6), levels, make_sigmas("leading", levels, 10))
    assert (plan.low, plan.high, plan.stop) == (5, 7, 2)
    timesteps = levels.sigma_to_t(torch.tensor(plan.levels)[[plan.stop, plan.low, plan.high]])
    assert timesteps.tolist() == [101, 401, 601]


def test_range_as_noise_levels():
    levels = GaussianDenoiser().levels
    plan = make_plan(CowConfig(low=1.0, high=3.0, unit="sigma"), levels, make_sigmas("karras", levels, 20))
    assert plan.levels[plan.low] == pytest.approx(1.0, rel=0.3)
    assert plan.levels[plan.high] == pytest.approx(3.0, rel=0.3)


def test_any_descending_levels_do():
    sigmas = torch.tensor([9.0, 3.1, 2.9, 1.4, 1.1, 0.9, 0.2, 0.0])
    assert torch.isfinite(run(sigmas=sigmas).latents).all()


@pytest.mark.parametrize("space", [VE, FLOW])
def test_the_inversion_carries_the_noise_of_its_level_at_the_default_settings(space):
    """Gaussian data: 20 steps up to the default range keep the marginal standard deviation within 4 %."""
    model = GaussianDenoiser(std=0.8, space=space)
    plan = make_plan(CowConfig(), model.levels, make_sigmas("leading", model.levels, 20))
    levels = torch.tensor(plan.levels[: plan.high + 1])
    clean = 0.8 * SeededNoise(0)(torch.empty(4, 4, 32, 32))
    inverted = invert(CFG(model, constant_cond(), None, 1.0), clean, levels, space, Reporter(plan.high))[-1]
    expected = ((space.scale(levels[-1]) * 0.8) ** 2 + levels[-1] ** 2).sqrt()
    assert float(inverted.std() / expected) == pytest.approx(1, abs=0.04)


# Bad input


@pytest.mark.parametrize("space", [VE, FLOW])
def test_a_range_that_reaches_pure_noise_is_refused(space):
    model = GaussianDenoiser(space=space)
    with pytest.raises(ValueError, match=r"^Expected `high` at a noise level of at most .*Lower it"):
        make_plan(CowConfig(high=1.0), model.levels, make_sigmas("uniform", model.levels, 20))


def test_steps_so_few_that_the_range_is_empty():
    message = r"at least one step between noise levels .* \(`low` 0.4\) and .* \(`high` 0.6\), but got none in 2 steps \(.*\). Use more"
    with pytest.raises(ValueError, match=message):
        run(config=CowConfig(steps=2))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sigmas": torch.tensor([3.0, 2.0, 2.5, 0.0])}, r"`sigmas` to descend strictly to 0 or above, but got \[2.0, 2.5\]"),
        ({"sigmas": torch.tensor([3.0, 2.0, 1.0])}, "`sigmas` that end in 0, but got 1"),
        ({"sigmas": torch.tensor([3.0, float("nan"), 0.0])}, "`sigmas` to be finite"),
        ({"latents": canvas() * float("nan")}, "`canvas_latents` to be finite"),
        ({"latents": canvas()[0]}, "`canvas_latents` of shape"),
        ({"mask": corner() * float("nan")}, "`keep_mask` to be finite"),
        ({"mask": corner() * 0}, "`keep_mask` with at least one kept cell, but got an empty mask in row 0"),
        ({"mask": corner().expand(3, -1, -1)}, "`keep_mask` with 1 or 1 masks, but got 3"),
        ({"mask": corner()[None].expand(1, 2, -1, -1)}, "`keep_mask` of shape"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(more, message):
    with pytest.raises(ValueError, match=message):
        run(**more)


def test_latents_of_another_vae_are_refused():
    model = DiffusersDenoiser(ExactUnet("epsilon"), scaled_linear_alphas_cumprod())
    with pytest.raises(ValueError, match="not of this model's kind: use its own VAE"):
        generate(model, torch.randn(1, 16, 8, 12), corner(), constant_cond(), None, TEN, SeededNoise(0))


def test_an_empty_mask_names_its_row():
    with pytest.raises(ValueError, match="empty mask in row 1"):
        run(latents=canvas(2), mask=torch.cat([corner(), corner() * 0]))


def test_repelling_needs_a_negative_prompt():
    with pytest.raises(ValueError, match="Expected `uncond` beside `suppress` or `enhance`"):
        generate(
            GaussianDenoiser(), canvas(), corner(), constant_cond(), None, TEN, SeededNoise(0), suppress=constant_cond()
        )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cycles", 0, "`cycles` of at least 1|`cycles` between 1"),
        ("cycles", 2.5, "`cycles` to be an integer"),
        ("low", 0.7, "`low` below `high` 0.6, but got 0.7"),
        ("high", 1.2, "`high` between 0 and 1.0, but got 1.2"),
        ("unit", "steps", "`unit` to be one of 'time', 'sigma', but got 'steps'"),
        ("eta", -0.1, "`eta` between 0 and 1, but got -0.1"),
        ("preserve", 1.01, "`preserve` between 0 and 1, but got 1.01"),
        ("inversion_cfg", float("nan"), "`inversion_cfg` between 0 and 100, but got nan"),
        ("schedule", "linear", "`schedule` to be one of"),
        ("steps", 0, "`steps` between 1 and 1000, but got 0"),
    ],
)
def test_config_is_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        CowConfig(**{field: value})


@pytest.mark.parametrize("space", [VE, FLOW])
def test_reused_calls_are_not_made_and_the_subject_stays(space):
    """Each round goes up in noise again: its first call is made, slopes from before are dropped."""
    model, latents = GaussianDenoiser(std=0.8, space=space), canvas()
    levels = make_sigmas("leading", GaussianDenoiser().levels, 12)
    levels = levels if space is VE else levels / (1 + levels)
    spans = [ReuseSpan(float(levels[i]), float(levels[i + 1]), "last") for i in range(1, 12, 2)]
    low, high = float(levels[9]) * 0.99, float(levels[4]) * 1.01
    config = CowConfig(low=low, high=high, unit="sigma", cycles=2)
    found, calls = {}, {}
    for name, reuse in (("plain", ()), ("reuse", spans)):
        guided = CFG(model, constant_cond(0.3), constant_cond(0.0), config.cfg_scale)
        begin = model.calls
        found[name] = run(model, latents, config=config, sigmas=levels, denoise=reusing(guided, reuse)).latents
        calls[name] = model.calls - begin
    assert calls["reuse"] < 0.8 * calls["plain"]
    torch.testing.assert_close(found["reuse"][..., 2:5, 3:9], found["plain"][..., 2:5, 3:9], atol=0.05, rtol=0)
    assert 0 < (found["reuse"] - found["plain"]).pow(2).mean().sqrt() < 0.3 * found["plain"].std()


# The scene that starts as noise, and the dial


@pytest.mark.parametrize("space", [VE, FLOW])
def test_from_noise_the_subject_is_at_every_network_call_at_its_own_level(space):
    """Above the inversion its last noise stays; below, what the network sees is the inversion's latent of that very level."""
    model = Watch(std=0.8, space=space)
    config = CowConfig(steps=10, noise_limit=1000)
    result = run(model, config=config)
    plan = make_plan(config, model.levels, make_sigmas("leading", model.levels, 10))
    levels = torch.tensor(plan.levels)
    assert plan.inverted == plan.high - 1
    assert plan.top == 10
    calls = model.seen[plan.inverted :]
    guided = CFG(model, constant_cond(0.3), constant_cond(0.0), config.inversion_cfg)
    path = lifted(invert(guided, canvas(), levels[: plan.high], space, Reporter(plan.high)), levels, space)
    kept = corner()[0] == 1
    assert len(calls) == plan.total - plan.inverted
    for sigma, x in calls:
        step = int((levels - sigma).abs().argmin())
        torch.testing.assert_close(x[:1][..., kept], path[step][..., kept], atol=1e-4, rtol=1e-4)
    assert torch.equal(result.latents[..., kept], canvas()[..., kept])


def test_around_the_subject_the_guidance_is_one():
    model, x, sigma = GaussianDenoiser(std=0.8), canvas(), torch.tensor([2.0])
    cond, uncond = constant_cond(0.3), constant_cond(0.0)
    keep = corner()[None]
    weights = around(keep)
    assert torch.equal(around(keep[:, :, None])[:, :, 0], weights)  # a video's
    near = torch.zeros(1, 1, 8, 12)
    near[..., 1:6, 2:10] = 1  # an eighth of 8 cells
    assert torch.equal(weights, near * (1 - keep))
    made = MaskedCFG(model, cond, uncond, 5.0, weights)(x, sigma)
    wanted = torch.where(weights == 1, model(x, sigma, cond), CFG(model, cond, uncond, 5.0)(x, sigma))
    torch.testing.assert_close(made, wanted)


def test_around_the_subject_an_estimate_of_ones_own_counts_as_the_models_does():
    model, config = GaussianDenoiser(std=0.8), CowConfig(steps=10)
    cond, uncond = constant_cond(0.3), constant_cond(0.0)
    own = CFG(model, cond, uncond, config.cfg_scale)
    alike, masked = (
        run(model, config=config, denoise=own, **more).latents
        for more in ({}, {"denoise_where": partial(MaskedCFG, model, cond, uncond, config.cfg_scale)})
    )
    ours = run(model, config=config).latents
    assert torch.equal(masked, ours)
    assert float((alike - ours).abs().max()) > 0.01
    published = CowConfig(steps=10, start="canvas")
    assert torch.equal(run(model, config=published).latents, run(model, config=published, denoise=own).latents)


def test_at_the_default_a_run_costs_at_most_one_and_a_half_plain_ones():
    model = GaussianDenoiser()
    run(model, config=CowConfig())
    assert model.rows <= 1.5 * 2 * CowConfig().steps


@pytest.mark.parametrize("space", [VE, FLOW])
@pytest.mark.parametrize("start", ["noise", "canvas"])
def test_the_dial_lets_the_subject_go_step_by_step(space, start):
    kept = corner()[0] == 1
    errors = []
    for follow in (0.0, 0.25, 0.5, 0.75, 1.0):
        config = CowConfig(steps=20, follow=follow, start=start, cfg_scale=2.0)
        result = run(GaussianDenoiser(std=0.8, space=space), config=config)
        errors.append(float((result.latents - canvas())[..., kept].square().mean().sqrt()))
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert len(set(errors)) == 5


def test_follow_takes_the_place_of_preserve():
    free, held = (run(config=CowConfig(steps=20, follow=0.5, preserve=p)).latents for p in (0.0, 1.0))
    assert torch.equal(free, held)
    with pytest.raises(ValueError, match="`follow` between 0 and 1"):
        CowConfig(follow=1.5)
    with pytest.raises(ValueError, match="`start` to be"):
        CowConfig(start="grey")


def test_a_redrawn_edge_is_held_with_the_cells_around_it():
    """`redraw` is given the scene's estimate, once; its latents end exact in the subject and the cell around it, nowhere else."""
    asked = []

    def redraw(denoised):
        asked.append(denoised)
        return denoised + 2

    mask, config = corner(), CowConfig(steps=10, start="canvas", cycles=2)
    result, plain = run(config=config, redraw=redraw), run(config=config)
    assert len(asked) == 1
    torch.testing.assert_close(asked[0], plain.cycles[-1])
    held = grow(mask, 1)[:, None].expand_as(result.latents) == 1
    assert torch.equal(result.latents[held], (asked[0] + 2)[held])
    assert (result.latents[~held] != (asked[0] + 2)[~held]).all()
    assert not torch.equal(result.latents[held], plain.latents[held])


def test_a_redrawn_edge_carries_the_noise_of_its_scene_and_the_subject_its_own():
    space, levels = VE, torch.tensor([0.0, 0.5, 1.0, 2.0])
    clean, own, keep = canvas(), torch.full((1, 4, 8, 12), 3.0), corner()[:, None].clone()
    keep[:, :, 2] *= 0.5
    subject = Subject([clean + level * own for level in levels], keep, Plan((0.0, 0.5, 1.0, 2.0), 2, 3, 0, 1, 3))
    firm = corner()[:, None]
    redrawn = subject.redrawn(clean + 7, torch.full_like(clean, -1.0), firm, levels, space)
    assert len(redrawn.latents) == 3
    assert torch.equal(redrawn.latents[0], clean + 7)
    noise = torch.where(keep == 1, 3.0, -1.0)
    torch.testing.assert_close(redrawn.latents[2], clean + 7 + noise)
    assert torch.equal(redrawn.keep[:, 0], grow(firm[:, 0], 1))


def test_a_subject_thinner_than_a_cell_keeps_its_redrawn_edge_to_the_end():
    """A cell that a firm pixel touches holds the subject on its scene, so it is held to the end; a soft one for its share of the levels."""
    mask = torch.zeros(1, 64, 96)
    mask[:, 20:22, 24:64], mask[:, 44:46, 24:64] = 1, 0.5  # a quarter of a row of cells, firm and soft
    result = run(mask=mask, redraw=torch.ones_like, config=CowConfig(steps=10, start="canvas"))
    firm = torch.zeros(1, 8, 12)
    firm[:, 2, 3:8] = 1
    held = grow(firm, 1)[:, None].expand_as(result.latents) == 1
    assert (result.latents[held] == 1).all()
    assert (result.latents[~held] != 1).all()


@pytest.mark.parametrize("config", [CowConfig(steps=10, follow=0.25), CowConfig(steps=10, preserve=0.5)])
def test_a_subject_that_is_let_go_is_not_redrawn(config):
    def redraw(denoised):
        raise AssertionError

    torch.testing.assert_close(run(config=config, redraw=redraw).latents, run(config=config).latents)
    run(mask=torch.ones(1, 8, 12), redraw=redraw)  # nothing is beside it


def test_a_video_keeps_its_redrawn_edge_in_every_frame():
    video = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(5))
    result = run(latents=video, redraw=torch.ones_like)
    held = grow(corner(), 1)[:, None, None].expand_as(video) == 1
    assert (result.latents[held] == 1).all()
