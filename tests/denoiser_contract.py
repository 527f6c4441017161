"""What every `Denoiser` must do, as plain functions: called on analytic models, on diffusers networks and inside the real host.

Each takes the model, a conditioning of one row, and the shape (C, H, W) of one latent; an AssertionError names what is broken.
`tolerance` is one for all levels, or a function of them (B,) that gives one for each row (B, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from slipstream.core.progress import Step
from slipstream.core.samplers import euler
from torch import Tensor

Shape = tuple[int, int, int]
Tolerance = float | Callable[[Tensor], Tensor]


def latents(model: Any, rows: int, shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (x, sigma): latents (rows, *shape), each row noised to a level of its own, from high to low."""
    device = getattr(model, "device", "cpu")
    noise = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    top, bottom = 0.7 * model.sigma_max, 2 * model.sigma_min
    sigma = torch.linspace(0, 1, rows).mul(torch.tensor(bottom / top).log()).exp().mul(top).to(device)
    return model.space.add_noise(0.5 * noise.flip(0), noise, sigma), sigma


def close(one: Tensor, other: Tensor, what: str, tolerance: Tolerance, sigma: Tensor) -> None:
    limits = tolerance(sigma) if callable(tolerance) else tolerance
    scale = max(1.0, float(other.abs().max()))
    off = (one - other).abs()
    assert bool((off <= limits * scale).all()), f"{what}: differs by {float(off.max()):.2e} at a scale of {scale:.2g}"


@torch.no_grad()
def answers_in_the_shape_of_x(model: Any, cond: Any, shape: Shape, tolerance: Tolerance = 1e-4) -> None:
    x, sigma = latents(model, 2, shape)
    before = x.clone(), sigma.clone()
    denoised = model(x, sigma, cond)
    assert denoised.shape == x.shape
    assert denoised.dtype == x.dtype
    assert denoised.device == x.device
    assert bool(torch.isfinite(denoised).all())
    assert torch.equal(x, before[0]), "x was changed"
    assert torch.equal(sigma, before[1]), "sigma was changed"
    assert torch.equal(denoised, model(x, sigma, cond)), "the same input gave another answer"


@torch.no_grad()
def one_level_per_row_equals_row_by_row(model: Any, cond: Any, shape: Shape, tolerance: Tolerance = 1e-4) -> None:
    x, sigma = latents(model, 3, shape)
    together = model(x, sigma, cond)
    for i in range(3):
        alone = slice(i, i + 1)
        close(together[alone], model(x[alone], sigma[alone], cond), f"row {i}", tolerance, sigma[alone])


@torch.no_grad()
def conditioning_is_batched(
    model: Any, cond: Any, shape: Shape, tolerance: Tolerance = 1e-4, other: Any = None
) -> None:
    """`other` is a second conditioning; without it the first stands in."""
    other = cond if other is None else other
    x, sigma = latents(model, 2, shape)
    joined = cond.join(other)
    assert joined.rows == 2
    assert joined.take([1, 0, 1]).rows == 3
    assert cond.expand(2).rows == 2
    together = model(x, sigma, joined)
    for i, single in enumerate((cond, other)):
        alone = slice(i, i + 1)
        close(together[alone], model(x[alone], sigma[alone], single), f"conditioning {i}", tolerance, sigma[alone])
    swapped = model(x.flip(0), sigma.flip(0), joined.take([1, 0]))
    close(swapped.flip(0), together, "rows in another order", tolerance, sigma)
    close(model(x, sigma, cond.expand(2)), model(x, sigma, cond), "one row of conditioning for all", tolerance, sigma)


@torch.no_grad()
def calls_and_rows_are_counted(model: Any, cond: Any, shape: Shape, tolerance: Tolerance = 1e-4) -> None:
    for rows in (1, 3):
        x, sigma = latents(model, rows, shape)
        calls, counted = model.calls, model.rows
        model(x, sigma, cond)
        assert (model.calls - calls, model.rows - counted) == (1, rows)


def levels_fit_the_space(model: Any, cond: Any, shape: Shape, tolerance: Tolerance = 1e-4) -> None:
    assert 0 < model.sigma_min < model.sigma_max
    assert model.space.name != "flow" or model.sigma_max <= 1
    ends = torch.tensor([model.sigma_min, model.sigma_max])
    times = model.levels.sigma_to_t(ends)
    assert times[0] < times[1]
    close(model.levels.t_to_sigma(times).to(ends), ends, "sigma of timestep of sigma", 1e-3, ends)


def gradients_reach_x(model: Any, cond: Any, shape: Shape, tolerance: float = 1e-2) -> None:
    """The derivative along the gradient equals the difference quotient, and one row's output depends on no other row."""
    x, sigma = latents(model, 2, shape)
    weight = latents(model, 4, shape, seed=1)[0][:2]
    x.requires_grad_()
    with torch.enable_grad():
        (model(x, sigma, cond) * weight).sum().backward()
    assert x.grad is not None
    # Across the gradient the sum hardly changes, and what does drowns in its rounding: in two roundings a layer already, as on a GPU.
    direction = x.grad / x.grad.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * len(shape))
    slope = float((x.grad * direction).sum())
    # Four points: no error of second order.
    x, h = x.detach(), 0.002
    with torch.no_grad():
        ends = [
            float((model(x + s * h * direction, sigma, cond) * weight).cpu().sum(dtype=torch.float64))
            for s in (1, -1, 2, -2)
        ]
    expected = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h)
    assert abs(slope - expected) <= tolerance * max(1.0, abs(expected)), (slope, expected)
    x.requires_grad_()
    with torch.enable_grad():
        model(x, sigma, cond)[0].sum().backward()
    assert x.grad is not None
    assert float(x.grad[0].abs().max()) > 0
    assert float(x.grad[1].abs().max()) == 0, "row 0 depends on row 1"


@torch.no_grad()
def an_interrupt_leaves_it_usable(model: Any, cond: Any, shape: Shape, tolerance: Tolerance = 1e-4) -> None:
    def stop(step: Step) -> None:
        if step.index == 2:
            raise KeyboardInterrupt

    x, _ = latents(model, 1, shape)
    sigmas = torch.linspace(0.7 * model.sigma_max, 2 * model.sigma_min, 6).to(x)
    before = model(x, sigmas[:1], cond)
    calls = model.calls
    try:
        euler(lambda x, sigma: model(x, sigma.expand(len(x)), cond), x, sigmas, model.space, callback=stop)
        raise AssertionError("the callback's exception was swallowed")
    except KeyboardInterrupt:
        pass
    assert model.calls - calls == 2, "the run continued after the interrupt"
    assert torch.equal(model(x, sigmas[:1], cond), before)


@torch.no_grad()
def bad_input_is_named(model: Any, cond: Any, shape: Shape, tolerance: Tolerance = 1e-4) -> None:
    x, sigma = latents(model, 2, shape)
    for bad_x, bad_sigma, name in ((x[:, :-1], sigma, "x"), (x, sigma[:1], "sigma")):
        said = ""
        try:
            model(bad_x, bad_sigma, cond)
        except ValueError as error:
            said = str(error)
        assert said.startswith(f"Expected `{name}`"), said or f"bad `{name}` was accepted"
    model(x, sigma, cond)


CONTRACT: tuple[Callable[..., None], ...] = (
    answers_in_the_shape_of_x,
    one_level_per_row_equals_row_by_row,
    conditioning_is_batched,
    calls_and_rows_are_counted,
    levels_fit_the_space,
    gradients_reach_x,
    an_interrupt_leaves_it_usable,
    bad_input_is_named,
)
