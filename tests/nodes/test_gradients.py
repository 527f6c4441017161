"""grad_ready on plain modules: what it renews, what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slipstream.nodes.host.gradients import grad_ready, renew_tensors
from torch import nn


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)).eval()


def patcher(network: nn.Module) -> Any:
    return SimpleNamespace(model=network)


def made_by_a_stock_loader() -> Network:
    with torch.inference_mode():
        return Network()


def test_weights_of_a_stock_loader_give_gradients_inside_the_executor() -> None:
    network = made_by_a_stock_loader()
    with torch.inference_mode(), grad_ready(patcher(network)):
        x = torch.ones(2, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(network.diffusion_model(x).sum(), x)
        first, last = network.diffusion_model[0].weight, network.diffusion_model[2].weight
        slope = 1 / (network.diffusion_model[1].running_var + network.diffusion_model[1].eps).sqrt()
        expected = (last * slope) @ first
    torch.testing.assert_close(gradient, expected.expand(2, 3))


def test_without_it_the_same_weights_fail() -> None:
    network = made_by_a_stock_loader()
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(RuntimeError, match=r"[Ii]nference"):
        network.diffusion_model(torch.ones(2, 3, requires_grad=True)).sum().backward()


def test_values_stay_and_a_second_time_costs_nothing() -> None:
    layer = made_by_a_stock_loader().diffusion_model[0]
    before = layer.weight.clone()
    with torch.inference_mode(False):
        assert renew_tensors(layer) == 2
        assert renew_tensors(layer) == 0
    assert torch.equal(layer.weight, before)
    assert not layer.weight.requires_grad


def test_inference_mode_is_back_afterwards() -> None:
    with torch.inference_mode():
        with grad_ready(patcher(Network())):
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused_with_the_reason(dtype: torch.dtype) -> None:
    network = Network()
    weight = network.diffusion_model[0].weight.detach().to(dtype)
    network.diffusion_model[0].weight = nn.Parameter(weight, requires_grad=False)
    with (
        pytest.raises(ValueError, match=r"Expected `model` with float32.*0\.weight.*quantised"),
        grad_ready(patcher(network)),
    ):
        pass


class Cast(nn.Linear):
    """A layer as the host makes it where it casts the weights for each call."""

    comfy_cast_weights = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_fp8_weights_that_are_cast_have_the_gradient_of_their_values() -> None:
    network = Network()
    first = network.diffusion_model[0]
    cast = Cast(first.in_features, first.out_features)
    small = first.weight.detach().to(torch.float8_e4m3fn)
    cast.weight, cast.bias = nn.Parameter(small, requires_grad=False), first.bias
    x = torch.randn(2, first.in_features)
    gradients = []
    for layer in (cast, first):
        first.weight.data = small.float()
        network.diffusion_model[0] = layer
        with torch.inference_mode(), grad_ready(patcher(network)):
            given = x.clone().requires_grad_()
            gradients.append(torch.autograd.grad(network.diffusion_model(given).pow(2).sum(), given)[0])
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_a_model_in_two_places_is_refused() -> None:
    network = Network()
    network.diffusion_model[2].to("meta")
    with pytest.raises(ValueError, match=r"wholly on one device.*cpu, meta"), grad_ready(patcher(network)):
        pass
