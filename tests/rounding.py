"""Rounding as of another device: every layer's output is off by a few units in its last places, otherwise for every input.

A GPU chooses its kernels by the number of rows, and each adds up in an order of its own. Here the same input always gives the same
output, as there, and results are as far apart as `size` says: 1e-7 for another order in float32, 1e-6 for Winograd's convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = (
    "convolution", "conv2d", "conv_transpose2d", "convolution_backward", "linear", "matmul", "mm", "addmm", "bmm", "baddbmm",
    "native_group_norm", "group_norm", "native_layer_norm", "layer_norm", "_softmax", "softmax", "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
)  # fmt: skip


class Rounding(TorchDispatchMode):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in LAYERS:
            for part in found if isinstance(found, (tuple, list)) else [found]:
                if (
                    isinstance(part, Tensor)
                    and part.is_floating_point()
                    and part.dtype != torch.float64
                    and part.numel()
                ):
                    self._shake(part.detach())
        return found

    def _shake(self, x: Tensor) -> None:
        """Add noise of `size` times each value, at least of their mean size, that is drawn by the values themselves; zeros stay."""
        values = x.float()
        size = torch.maximum(values.abs(), values.square().mean().sqrt())
        bits = values.contiguous().view(torch.int32).long().flatten()
        seed = int((bits * torch.arange(1, bits.numel() + 1)).sum()) & 0x7FFFFFFF
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        x.copy_(torch.where(values == 0, 0.0, values + self.size * size * noise))
