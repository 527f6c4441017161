"""Call reuse is exact where the slope is what it assumes, and calls the network exactly where it may not be reused."""

from __future__ import annotations

import pytest
import torch
from slipstream.core import FLOW, VE, sample
from slipstream.core.reuse import CallReuse, ReuseSpan, reusing

SIGMAS = torch.tensor([8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.0])
A, B = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.25, 0.125]])


class Slope:
    """A denoiser whose ODE slope is A + B * sigma everywhere, so that Euler's result is known; counts its calls."""

    def __init__(self, bend: float) -> None:
        self.bend, self.levels = bend, []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = float(torch.as_tensor(sigma).flatten()[0])
        self.levels.append(level)
        return x - level * (A + self.bend * B * level)


def run(bend: float, spans: list[ReuseSpan], sampler: str = "euler", space=VE) -> tuple[torch.Tensor, list[float]]:
    denoise = Slope(bend)
    return sample(sampler, reusing(denoise, spans), torch.zeros(1, 2), SIGMAS, space), denoise.levels


@pytest.mark.parametrize("space", [VE, FLOW], ids=["ve", "flow"])
@pytest.mark.parametrize(("bend", "kind", "computed"), [(0.0, "last", 1), (0.0, "linear", 1), (1.0, "linear", 2)])
def test_is_exact_for_the_slope_that_it_assumes(bend, kind, computed, space):
    sigmas = SIGMAS / 8
    whole, split = Slope(bend), Slope(bend)
    spans = [ReuseSpan(float(sigmas[computed]), 0.0, kind)]
    expected = sample("euler", whole, torch.zeros(1, 2), sigmas, space)
    found = sample("euler", reusing(split, spans), torch.zeros(1, 2), sigmas, space)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (len(whole.levels), len(split.levels)) == (7, computed)


def test_a_bent_slope_kept_straight_is_not_the_same():
    assert not torch.allclose(run(1.0, [ReuseSpan(6.0, 0.0, "last")])[0], run(1.0, [])[0], atol=1e-2)


def test_only_the_levels_inside_a_span_are_reused():
    _, levels = run(1.0, [ReuseSpan(4.0, 2.0), ReuseSpan(1.0, 0.5)])
    assert levels == [8.0, 6.0, 2.0, 0.5]


def test_the_first_call_is_computed_even_inside_a_span():
    assert run(0.0, [ReuseSpan(8.0, 0.0, "last")])[1] == [8.0]


def test_a_solver_of_second_order_reuses_both_calls_of_a_step():
    whole, levels = run(1.0, [], "heun")
    found, fewer = run(1.0, [ReuseSpan(4.0, 1.0)], "heun")
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert [s for s in levels if not 1.0 < s <= 4.0] == fewer


def two_step(high: float, at: float, low: float) -> tuple[float, float]:
    """Adams-Bashforth's weights of a step from `at` to `low` after a call at `high`: exact for a slope linear in sigma."""
    share = (low - at) / 2 / (at - high)
    return 1 + share, -share


@pytest.mark.parametrize("space", [VE, FLOW], ids=["ve", "flow"])
@pytest.mark.parametrize("knots", [[8.0, 4.0, 1.0, 0.0], [8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.0]])
def test_fitted_weights_solve_a_linear_slope_exactly(knots, space):
    """The spans between the calls hold any number of steps: all of them continue on the same slope."""
    knots = [k / 8 for k in knots]
    steps = [(1.0,), *(two_step(*knots[i - 1 : i + 2]) for i in range(1, len(knots) - 1))]
    spans = [ReuseSpan(high, low, "fitted", w) for high, low, w in zip(knots, knots[1:], steps)]
    denoise, first = Slope(1.0), knots[0] - knots[1]
    found = sample("euler", reusing(denoise, spans), torch.zeros(1, 2), SIGMAS / 8, space)
    expected = -A * knots[0] - B * (first * knots[0] + knots[1] ** 2 / 2)  # Euler's first step, then the integral
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert denoise.levels == pytest.approx(knots[:-1])


def test_a_fitted_span_reached_with_too_few_slopes_keeps_the_last():
    """Image to image begins in the middle of a schedule."""
    span = ReuseSpan(4.0, 1.0, "fitted", (3.0, -2.0))
    start = SIGMAS[2:]
    denoise = Slope(1.0)
    found = sample("euler", reusing(denoise, [span]), torch.zeros(1, 2), start, VE)
    kept = sample("euler", reusing(Slope(1.0), [ReuseSpan(3.0, 1.0, "last")]), torch.zeros(1, 2), start, VE)
    torch.testing.assert_close(found, kept)
    assert denoise.levels == [4.0, 1.0, 0.5]


def test_a_new_sampling_begins_without_slopes():
    denoise = Slope(0.0)
    reuse = CallReuse([ReuseSpan(8.0, 0.0, "last")])
    for x in (torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(3, 2)):
        for sigma in (4.0, 2.0):
            reuse(denoise, x, torch.tensor(sigma))
    assert denoise.levels == [4.0, 4.0, 4.0]
    assert (reuse.computed, reuse.reused) == (3, 3)


def test_rows_at_different_levels_are_computed():
    denoise = Slope(0.0)
    reuse = CallReuse([ReuseSpan(4.0, 0.0, "last")])
    reuse(denoise, torch.zeros(2, 2), torch.tensor(8.0))
    reuse(denoise, torch.zeros(2, 2), torch.tensor([4.0, 2.0]))
    reuse(denoise, torch.zeros(2, 2), torch.tensor([2.0, 2.0]))
    assert denoise.levels == [8.0, 4.0, 2.0]


def test_half_precision_stays_half_precision():
    reuse = CallReuse([ReuseSpan(4.0, 0.0, "last")])
    x = torch.ones(1, 2, dtype=torch.float16)
    reuse(lambda x, sigma: x - 8 * A.half(), x, torch.tensor(8.0))
    found = reuse(lambda x, sigma: 1 / 0, x, torch.tensor(2.0))
    assert found.dtype == torch.float16
    assert torch.equal(found, x - 2 * A.half())


def test_bad_spans_are_refused():
    with pytest.raises(ValueError, match=r"Expected `sigma_low` between 0 and `sigma_high`, but got 2\.0 and 1\.0"):
        ReuseSpan(1.0, 2.0)
    with pytest.raises(ValueError, match="Expected `kind`"):
        ReuseSpan(2.0, 1.0, "cubic")
    with pytest.raises(ValueError, match="Expected 1 to 4 `weights` for the kind fitted"):
        ReuseSpan(2.0, 1.0, "fitted")
    with pytest.raises(ValueError, match="Expected no `weights` for last"):
        ReuseSpan(2.0, 1.0, "last", (1.0,))
