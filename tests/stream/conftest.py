"""A toy network for streams: exact enough for closed forms, different for every level, prompt and image."""

from __future__ import annotations

import pytest
import torch
from slipstream.core.denoiser import FLOW, VE
from slipstream_tests.analytic import GaussianDenoiser, constant_cond

SHAPE = (4, 8, 6)  # a multiple of 16 values: seeded noise of fewer steps is the beginning of that of more


@pytest.fixture(params=[VE, FLOW], ids=["ve", "flow"])
def model(request) -> GaussianDenoiser:
    return GaussianDenoiser(std=0.7, mean=0.2, space=request.param)


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cond():
    return constant_cond(0.5)


@pytest.fixture
def uncond():
    return constant_cond(-0.5)
