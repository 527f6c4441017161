"""Every Denoiser of the library keeps the contract of `tests/denoiser_contract.py`, on every device and in every number format."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
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
from slipstream_tests.devices import CPU, Place, beside_the_cpu, dtypes, small_denoiser
from slipstream_tests.rounding import Rounding
from torch import Tensor

PROMPTS = ["a red circle on a blue background", "a large green square"]


def pocket(place: Place, dtype: torch.dtype, name: str = "pocket") -> tuple[Any, Any, Any]:
    pipe = slipstream.load(name)
    cond = pipe.encode_text(PROMPTS)
    return on(place, dtype, pipe.model, cond.take([0]), cond.take([1]))


def pocket_flow(place: Place, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    return pocket(place, dtype, "pocket-flow")


def sdxl(place: Place, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    tiny = Tiny("sdxl")
    texts = torch.randn(2, 77, 192, generator=torch.Generator().manual_seed(0))
    cond = slipstream.core.Conditioning(
        texts, pooled=texts[:, 0, :128], extra={"time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    )
    alphas = slipstream.core.schedules.alphas_cumprod_of(SCHEDULE)
    model = DiffusersDenoiser(tiny.unet.eval().requires_grad_(False), alphas, "v_prediction")
    return on(place, dtype, model, cond.take([0]), cond.take([1]))


def flow(place: Place, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    tiny = Tiny("sd15")
    cond = slipstream.core.Conditioning(torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(0)))
    model = DiffusersDenoiser(tiny.unet.eval().requires_grad_(False), prediction_type="flow", shift=3.0)
    return on(place, dtype, model, cond.take([0]), cond.take([1]))


def small(place: Place, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    texts = torch.randn(2, 1, 7, 8, generator=torch.Generator().manual_seed(0))
    return on(place, dtype, small_denoiser(), *map(slipstream.core.Conditioning, texts))


def on(place: Place, dtype: torch.dtype, model: Any, *conds: Any) -> tuple[Any, Any, Any]:
    """Return the model with its network in `dtype` on the device, and the conditionings there."""
    moved = copy.copy(model)
    network = copy.deepcopy(model.network)
    moved.network = place.put_module(network if dtype == torch.float32 else network.to(dtype))
    return moved, *(cond.map(place.put) for cond in conds)  # type: ignore[return-value]


def replay(place: Place, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Recorded: as a CUDA graph on CUDA."""
    model, cond, other = pocket(place, dtype)
    record = None if place.device.type == "cuda" and not place.fake else Recording()
    return replayed(model, 3, 16, 16, cond, record=record), cond, other


def gaussian(space: Any) -> Callable[..., tuple[Any, Any, Any]]:
    def make(place: Place, dtype: torch.dtype) -> tuple[Any, Any, Any]:
        model = GaussianDenoiser(0.5, space=space)
        model.device = place.device  # type: ignore[attr-defined]
        return model, constant_cond(0.3).map(place.put), constant_cond(-1.0).map(place.put)

    return make


MODELS = {
    "gaussian eps": gaussian(VE),
    "gaussian flow": gaussian(FLOW),
    "small": small,
    "pocket": pocket,
    "pocket-flow": pocket_flow,
    "sdxl v": sdxl,
    "flow": flow,
    "replayed": replay,
}
# One rounding of a number about 1. Over some 50 layers they add up, and a GPU rounds otherwise for another number of rows. In float32
# it may also choose kernels that add up in another order, or Winograd's, which lose four bits.
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# A difference quotient needs more digits than a half precision network gives.
EXACT = (contract.gradients_reach_x,)


def cases() -> Iterator[Any]:
    for place, name, check in itertools.product([Place(CPU), *beside_the_cpu()], MODELS, CONTRACT):
        if name.startswith("gaussian") and check is contract.bad_input_is_named:
            continue  # the analytic model takes any number of channels
        if place.fake and not name.startswith(("gaussian", "small")):
            continue  # a fake device is slow
        # A recording on the CPU stands in for one on a GPU: in one format.
        one = place.fake or name.startswith("gaussian") or (name == "replayed" and place.device == CPU)
        formats = {"float32": torch.float32} if one else dtypes(place.device)
        for kind, dtype in formats.items():
            if dtype == torch.float32 or check not in EXACT:
                yield pytest.param(place, dtype, name, check, id=f"{place}-{kind}-{name}-{check.__name__}")


def apart(model: Any, dtype: torch.dtype, sigma: Tensor) -> Tensor:
    """Return how far two runs may be apart: twice what either may be from exact, which is less than 20 roundings in each network.

    Where a network predicts noise, its error reaches the estimate times sigma: there it is less than 10, and 7 were measured.
    """
    reach = model.prediction.coefficients(sigma.reshape(-1, 1, 1, 1))[2].abs()
    return ROUNDING[dtype] * (20 * reach).clamp(min=40)


@pytest.fixture(scope="module")
def models() -> dict[Any, tuple[Any, Any, Any]]:
    """Made when first asked for; those of the fake device live in one test only."""
    return {}


@pytest.mark.parametrize(("place", "dtype", "name", "check"), cases())
def test_contract(
    models: dict[Any, Any], place: Place, dtype: torch.dtype, name: str, check: Callable[..., None]
) -> None:
    with place.open():
        key = (repr(place), dtype, name)
        made = MODELS[name](place, dtype) if place.fake or key not in models else models[key]
        model, cond, other = made if place.fake else models.setdefault(key, made)
        assert isinstance(model, Denoiser)
        here = dtype == torch.float32 and place.device == CPU
        plain = here or check in EXACT or isinstance(model, GaussianDenoiser)
        more: dict[str, Any] = {} if plain else {"tolerance": functools.partial(apart, model, dtype)}
        if check is contract.conditioning_is_batched:
            more["other"] = other
        check(model, cond, (getattr(model, "latent_channels", 4), 16, 16), **more)


@pytest.mark.parametrize(
    "check", [contract.conditioning_is_batched, contract.gradients_reach_x], ids=lambda c: c.__name__
)
def test_the_limits_of_a_gpu_hold_for_rounding_as_of_its_kernels(check: Callable[..., None]) -> None:
    """16 roundings of float32 a layer, and otherwise for another number of rows."""
    model, cond, other = pocket(Place(CPU), torch.float32)
    more: dict[str, Any] = {} if check in EXACT else {"tolerance": functools.partial(apart, model, torch.float32)}
    if check is contract.conditioning_is_batched:
        more["other"] = other
    with Rounding(1e-6):
        check(model, cond, (4, 16, 16), **more)


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
    _, cond, other = MODELS["gaussian eps"](Place(CPU), torch.float32)
    with pytest.raises(AssertionError):
        check(Broken(fault), cond, (4, 8, 8), **({"other": other} if check is contract.conditioning_is_batched else {}))
