"""Samplers on Gaussian data, whose probability flow and marginals have closed forms, in both noise spaces."""

from __future__ import annotations

import math

import pytest
import torch
from slipstream.core import CFG, FLOW, SAMPLERS, VE, NoiseSpace, SeededNoise, Step, sample
from slipstream.core.schedules import make_sigmas
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from torch import Tensor

SPACES = pytest.mark.parametrize("space", [VE, FLOW], ids=lambda s: s.name)
MEAN, STD = 0.5, 0.75


def model_of(space: NoiseSpace, std: float = STD) -> tuple[GaussianDenoiser, CFG]:
    model = GaussianDenoiser(std, space=space)
    return model, CFG(model, constant_cond(MEAN))


def exact(space: NoiseSpace, x: Tensor, start: float, end: float) -> Tensor:
    """Solve the probability flow of N(MEAN, STD^2): the standardised latent stays as it is."""

    def moments(sigma: float) -> tuple[float, float]:
        scale = 1 - sigma if space is FLOW else 1.0
        return scale * MEAN, math.sqrt((scale * STD) ** 2 + sigma**2)

    (mean0, std0), (mean1, std1) = moments(start), moments(end)
    return mean1 + (x - mean0) * std1 / std0


def levels(space: NoiseSpace, steps: int) -> Tensor:
    start, end = (0.95, 0.05) if space is FLOW else (10.0, 0.1)
    # Even in log-SNR, so that halving the step is halving it everywhere.
    ends = [math.log(s / (1 - s)) if space is FLOW else math.log(s) for s in (start, end)]
    grid = torch.linspace(*ends, steps + 1, dtype=torch.float64)
    return grid.sigmoid() if space is FLOW else grid.exp()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@SPACES
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name: str, order: int, space: NoiseSpace) -> None:
    _, denoise = model_of(space)
    errors = []
    for steps in (40, 80, 160):
        sigmas = levels(space, steps)
        x = float(sigmas[0]) * noise(1, 1, 4, 4)
        wanted = exact(space, x, float(sigmas[0]), float(sigmas[-1]))
        errors.append(float((sample(name, denoise, x, sigmas, space) - wanted).abs().max()))
    found = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert found == pytest.approx([order] * 2, abs=0.15)
    assert errors[-1] < (2e-2 if order == 1 else 1e-3)


@SPACES
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_down_to_zero_gives_the_data(name: str, space: NoiseSpace) -> None:
    model, denoise = model_of(space)
    errors = []
    for steps in (100, 200):
        sigmas = make_sigmas("uniform", model.levels, steps).double()
        x = float(sigmas[0]) * noise(1, 1, 4, 4)
        errors.append(sample(name, denoise, x, sigmas, space) - exact(space, x, float(sigmas[0]), 0.0))
    first, second = (float(e.abs().max()) for e in errors)
    assert first < 0.1
    # The one step from sigma_min to 0 is Euler's for all, and does not shrink with their number.
    assert second < (0.65 * first if name == "euler" else 5e-3)


@SPACES
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_point_of_data_is_hit_exactly(name: str, space: NoiseSpace) -> None:
    """With all data at one point the estimate is that point, and every sampler must end on it from any noise."""
    model, denoise = model_of(space, std=0.0)
    sigmas = make_sigmas("uniform", model.levels, 5).double()
    found = sample(name, denoise, float(sigmas[0]) * noise(2, 1, 3, 3), sigmas, space, SeededNoise(0))
    torch.testing.assert_close(found, torch.full_like(found, MEAN), atol=1e-10, rtol=0)


@SPACES
def test_ancestral_steps_have_the_marginal_of_the_data(space: NoiseSpace) -> None:
    """The reverse process has the forward one's law: mean, variance, and the covariance of both ends."""
    _, denoise = model_of(space)
    sigmas = levels(space, 200)
    start, end = (float(s) for s in (sigmas[0], sigmas[-1]))
    mean, std_start = _marginal(space, start)
    x = mean + std_start * noise(1, 1, 400, 400)
    found = sample("euler_ancestral", denoise, x, sigmas, space, SeededNoise(1))
    mean, std = _marginal(space, end)
    assert float(found.mean()) == pytest.approx(mean, abs=5e-3)
    assert float(found.std()) == pytest.approx(std, rel=0.02)
    correlation = float(torch.corrcoef(torch.stack([found.flatten(), x.flatten()]))[0, 1])
    ratio = (1 - start) / (1 - end) if space is FLOW else 1.0
    assert correlation == pytest.approx(ratio * std / std_start, abs=0.01)


def _marginal(space: NoiseSpace, sigma: float) -> tuple[float, float]:
    scale = 1 - sigma if space is FLOW else 1.0
    return scale * MEAN, math.sqrt((scale * STD) ** 2 + sigma**2)


def test_one_ancestral_step_is_that_of_k_diffusion() -> None:
    """sigma_up^2 = s'^2 (s^2 - s'^2) / s^2 and sigma_down^2 = s'^2 - sigma_up^2."""
    _, denoise = model_of(VE)
    x, s, t = noise(1, 1, 4, 4), 2.0, 0.7
    up = math.sqrt(t**2 * (s**2 - t**2) / s**2)
    down = math.sqrt(t**2 - up**2)
    denoised = denoise(x, torch.tensor(s))
    fresh = SeededNoise(3)(x)
    wanted = x + (x - denoised) / s * (down - s) + up * fresh
    found = sample("euler_ancestral", denoise, x, torch.tensor([s, t]).double(), VE, SeededNoise(3))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@SPACES
def test_dpmpp_2m_is_algorithm_2_of_the_paper(space: NoiseSpace) -> None:
    """x = (sigma'/sigma) x - alpha' (e^-h - 1) D with D = (1 + 1/2r) D_i - 1/2r D_(i-1) (arXiv 2211.01095)."""
    _, denoise = model_of(space)
    x = noise(1, 1, 3, 3)
    sigmas = torch.tensor([0.9, 0.5, 0.35, 0.1], dtype=torch.float64)

    def alpha(s: float) -> float:
        return 1 - s if space is FLOW else 1.0

    wanted, previous, h_last = x, None, 0.0
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        denoised = denoise(wanted, torch.tensor(s))
        h = math.log(alpha(t) / t) - math.log(alpha(s) / s)
        r = h_last / h
        d = denoised if previous is None else (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        wanted, previous, h_last = t / s * wanted - alpha(t) * math.expm1(-h) * d, denoised, h
    torch.testing.assert_close(sample("dpmpp_2m", denoise, x, sigmas, space), wanted)


@pytest.mark.parametrize(("name", "calls"), [("euler", 6), ("euler_ancestral", 6), ("heun", 11), ("dpmpp_2m", 6)])
def test_cost(name: str, calls: int) -> None:
    model, denoise = model_of(VE)
    sigmas = make_sigmas("karras", model.levels, 6)
    sample(name, denoise, noise(2, 1, 3, 3), sigmas, VE, SeededNoise(0))
    assert (model.calls, model.rows) == (calls, 2 * calls)


@SPACES
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_is_its_rows(name: str, space: NoiseSpace) -> None:
    model, denoise = model_of(space)
    sigmas = make_sigmas("uniform", model.levels, 4).double()
    x = noise(3, 1, 4, 4)
    together = sample(name, denoise, x, sigmas, space, SeededNoise(0))
    assert torch.equal(together, sample(name, denoise, x, sigmas, space, SeededNoise(0)))
    if name != "euler_ancestral":
        for i in range(3):
            torch.testing.assert_close(sample(name, denoise, x[i : i + 1], sigmas, space), together[i : i + 1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_progress(name: str) -> None:
    model, denoise = model_of(VE)
    sigmas, seen = make_sigmas("karras", model.levels, 4), list[Step]()
    sample(name, denoise, noise(2, 1, 3, 3), sigmas, VE, SeededNoise(0), seen.append)
    assert [(s.phase, s.index, s.total) for s in seen] == [("sample", i, 4) for i in range(1, 5)]
    assert [s.sigma for s in seen] == pytest.approx(sigmas[1:].tolist())
    assert all(s.denoised is not None and s.denoised.shape == (2, 1, 3, 3) for s in seen)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "plms"}, "`sampler`"),
        ({"sigmas": torch.tensor([1.0, 2.0, 0.0])}, "`sigmas` to descend"),
        ({"sigmas": torch.tensor([1.0])}, "at least 2 noise levels"),
        ({"sigmas": torch.tensor([math.nan, 0.0])}, "`sigmas` to be finite"),
        ({"x": torch.full((1, 1, 2, 2), math.inf)}, "`x` to be finite"),
        ({"name": "euler_ancestral", "noise": None}, "`noise`"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], said: str) -> None:
    _, denoise = model_of(VE)
    arguments = {"name": "euler", "x": torch.zeros(1, 1, 2, 2), "sigmas": torch.tensor([1.0, 0.0]), **change}
    with pytest.raises(ValueError, match=said):
        sample(arguments.pop("name"), denoise, arguments.pop("x"), arguments.pop("sigmas"), VE, **arguments)  # type: ignore[arg-type]
