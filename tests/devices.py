"""The devices that tests of the whole library run on: every one that torch can use here, and in place of a GPU the fake one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from slipstream_tests.fake_cuda import DEVICE, DeviceTensor, fake_cuda
from torch import Tensor, nn

CPU = torch.device("cpu")


def accelerators() -> list[torch.device]:
    """Return the devices of this machine beside the CPU."""
    xpu = getattr(torch, "xpu", None)  # torch 2.3 and later
    here = {
        "cuda": torch.cuda.device_count() > 0, "mps": torch.backends.mps.is_available(),
        "xpu": xpu is not None and xpu.is_available(),
    }  # fmt: skip
    return [torch.device(kind, 0) for kind, found in here.items() if found]


class Place:
    """A device to run on: `put` tensors and `put_module` networks there, within `open`."""

    def __init__(self, device: torch.device, fake: bool = False) -> None:
        self.device, self.fake = device, fake
        self.put: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device)

    def __repr__(self) -> str:
        return "fake_cuda" if self.fake else self.device.type

    def put_module(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)

    @contextlib.contextmanager
    def open(self) -> Iterator[Place]:
        yield self


class FakePlace(Place):
    def __init__(self) -> None:
        super().__init__(DEVICE, fake=True)

    @contextlib.contextmanager
    def open(self) -> Iterator[Place]:
        with fake_cuda(may_wait=True) as machine:
            self.put, self.put_module = machine.put, machine.put_module  # type: ignore[method-assign]
            yield self


def beside_the_cpu() -> list[Place]:
    """Return every accelerator here, or the fake one where there is none."""
    return [Place(device) for device in accelerators()] or [FakePlace()]


def values(tensor: Tensor) -> Tensor:
    """Return the values of a tensor on any device, or of what is left of one of the fake device, on the CPU."""
    return tensor.inner if isinstance(tensor, DeviceTensor) else tensor.detach().cpu()


def dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """Return the number formats that `core.device.pick_dtype` accepts on a device."""
    found: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return found if device.type == "cpu" else {**found, "float16": torch.float16}


def small_denoiser() -> Any:
    """Return the smallest random `DiffusersDenoiser` that has every ability (context of width 8): a fake device is slow."""
    from diffusers import UNet2DConditionModel
    from slipstream.core import DiffusersDenoiser
    from slipstream.core.schedules import scaled_linear_alphas_cumprod

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
            attention_head_dim=2, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        )  # fmt: skip
    return DiffusersDenoiser(unet.eval().requires_grad_(False), scaled_linear_alphas_cumprod())
