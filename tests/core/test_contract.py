"""Every Denoiser of the library keeps the contract of `tests/denoiser_contract.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import slipstream
import torch
from slipstream.core import FLOW, VE, Denoiser, DiffusersDenoiser
from slipstream.core.graphs import replayed
from slipstream_tests import denoiser_contract as contract
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.core.checkpoints import SCHEDULE, Tiny
from slipstream_tests.core.test_graphs import Recording
from slipstream_tests.denoiser_contract import CONTRACT
from torch import Tensor

PROMPTS = ["a red circle on a blue background", "a large green square"]


def pocket() -> tuple[Any, Any, Any]:
    pipe = slipstream.load("pocket")
    cond = pipe.encode_text(PROMPTS)
    return pipe.model, cond.take([0]), cond.take([1])


def sdxl() -> tuple[Any, Any, Any]:
    tiny = Tiny("sdxl")
    texts = torch.randn(2, 77, 192, generator=torch.Generator().manual_seed(0))
    cond = slipstream.core.Conditioning(
        texts, pooled=texts[:, 0, :128], extra={"time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    )
    alphas = slipstream.core.schedules.alphas_cumprod_of(SCHEDULE)
    model = DiffusersDenoiser(tiny.unet.eval().requires_grad_(False), alphas, "v_prediction")
    return model, cond.take([0]), cond.take([1])


def flow() -> tuple[Any, Any, Any]:
    tiny = Tiny("sd15")
    cond = slipstream.core.Conditioning(torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(0)))
    model = DiffusersDenoiser(tiny.unet.eval().requires_grad_(False), prediction_type="flow", shift=3.0)
    return model, cond.take([0]), cond.take([1])


def replay() -> tuple[Any, Any, Any]:
    model, cond, other = pocket()
    return replayed(model, 3, 16, 16, cond, record=Recording()), cond, other


def gaussian(space: Any) -> Callable[[], tuple[Any, Any, Any]]:
    return lambda: (GaussianDenoiser(0.5, space=space), constant_cond(0.3), constant_cond(-1.0))


MODELS = {
    "gaussian eps": gaussian(VE),
    "gaussian flow": gaussian(FLOW),
    "pocket": pocket,
    "sdxl v": sdxl,
    "flow": flow,
    "replayed": replay,
}


# The analytic model takes any number of channels.
CASES = [
    (n, c) for n in MODELS for c in CONTRACT if not (n.startswith("gaussian") and c is contract.bad_input_is_named)
]


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any, Any]]:
    return {name: make() for name, make in MODELS.items()}


@pytest.mark.parametrize(("name", "check"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_contract(models: dict[str, tuple[Any, Any, Any]], name: str, check: Callable[..., None]) -> None:
    model, cond, other = models[name]
    assert isinstance(model, Denoiser)
    check(model, cond, (4, 16, 16), **({"other": other} if check is contract.conditioning_is_batched else {}))


class Broken(GaussianDenoiser):
    """A model with one fault, so that each check is seen to fail."""

    def __init__(self, fault: str) -> None:
        super().__init__(0.5)
        self.fault = fault

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        if self.fault == "adds to x":
            x += 1e-6
        if self.fault == "one level for all":
            sigma = sigma[:1].expand(len(x))
        if self.fault == "one prompt for all":
            cond = cond.take([0])
        if self.fault == "rows mix":
            x = x + 0.1 * x.mean(0, keepdim=True)
        if self.fault == "no gradient":
            x = x.detach() + 0 * x
        if self.fault == "calls twice":
            super().__call__(x, sigma, cond)
        if self.fault == "remembers":
            self.mean += 0.1
        return super().__call__(x, sigma, cond)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("adds to x", contract.answers_in_the_shape_of_x),
        ("one level for all", contract.one_level_per_row_equals_row_by_row),
        ("rows mix", contract.one_level_per_row_equals_row_by_row),
        ("one prompt for all", contract.conditioning_is_batched),
        ("rows mix", contract.gradients_reach_x),
        ("no gradient", contract.gradients_reach_x),
        ("calls twice", contract.calls_and_rows_are_counted),
        ("remembers", contract.an_interrupt_leaves_it_usable),
        ("none", contract.bad_input_is_named),
    ],
)
def test_the_contract_catches(fault: str, check: Callable[..., None]) -> None:
    _, cond, other = MODELS["gaussian eps"]()
    with pytest.raises(AssertionError):
        check(Broken(fault), cond, (4, 8, 8), **({"other": other} if check is contract.conditioning_is_batched else {}))
