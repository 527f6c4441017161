"""Ability: hooks on the decoder's self-attention, and a bank of recorded keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .taps import Handler, active, routed

# Plain attention of one layer: q (B, T, C), k and v (B, S, C) -> (B, T, C). Head split and scale are the layer's own.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# (layer name, q, k, v, attend) -> output, each (B, T, C) after the projections and before the head split.
AttentionHook = Callable[[str, Tensor, Tensor, Tensor, Attend], Tensor]


@runtime_checkable
class AttentionModel(Protocol):
    """A denoiser whose decoder self-attention can be recorded, replaced and routed."""

    def self_attention(self, hook: AttentionHook) -> AbstractContextManager[None]:
        """Within the context, let `hook` compute every self-attention of the decoder for this thread. Contexts do not nest."""
        ...


def attend_heads(heads: int, scale: float | None = None) -> Attend:
    """Return multi-head attention over (B, T, C) tensors by PyTorch's scaled dot product, which has a backward pass everywhere."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b t (heads c) -> b heads t c", heads=heads) for t in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v, scale=scale), "b heads t c -> b t (heads c)")

    return attend


class _SelfAttention:
    """Gives q, k and v of one attention layer of diffusers to a hook, in the place of the layer's own call."""

    def __init__(self, name: str, layer: Any, hook: AttentionHook) -> None:
        self.name, self.layer, self.hook = name, layer, hook

    def __call__(self, call: Handler, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        q, k, v = layer.to_q(hidden_states), layer.to_k(hidden_states), layer.to_v(hidden_states)
        out = self.hook(self.name, q, k, v, attend_heads(layer.heads, layer.scale))
        return layer.to_out[1](layer.to_out[0](out))


@contextmanager
def hooked(unet: Any, hook: AttentionHook) -> Iterator[None]:
    """Let `hook` compute every self-attention of a diffusers UNet's decoder, for calls of this thread only."""
    layers = {n: m for n, m in unet.named_modules() if n.startswith("up_blocks") and n.endswith("attn1")}
    if any(isinstance(request.get(layer), _SelfAttention) for request in active() for layer in layers.values()):
        raise ValueError("Expected one attention hook at a time, but got a second. Leave the first context before.")
    with routed({layer: _SelfAttention(name, layer, hook) for name, layer in layers.items()}):
        yield


@dataclass
class AttentionBank:
    """Keys and values of one image by (step, layer), in host memory.

    `dtype` None keeps the network's; `budget` bounds `bytes`: what does not fit is not kept, and `full` is set.
    """

    dtype: torch.dtype | None = None
    budget: int = 4 << 30
    bytes: int = 0
    full: bool = False
    entries: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def recorder(self, step: int) -> AttentionHook:
        """Return a hook that stores every layer's keys and values under `step` and leaves the attention as it is."""

        def hook(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
            self.put(step, layer, k, v)
            return attend(q, k, v)

        return hook

    def put(self, step: int, layer: str, k: Tensor, v: Tensor) -> None:
        """Store a copy of `k` and `v` (B, S, C) unless the budget is spent."""
        k, v = (t.detach().to("cpu", self.dtype or t.dtype, copy=True) for t in (k, v))
        size = k.nbytes + v.nbytes
        self.full = self.full or self.bytes + size > self.budget
        if not self.full:
            self.entries[step, layer] = k, v
            self.bytes += size

    def get(self, step: int, layer: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, S, C) of a layer on the device and in the dtype of `like`."""
        k, v = self.entries[step, layer]
        return k.to(like.device, like.dtype, non_blocking=True), v.to(like.device, like.dtype, non_blocking=True)

    @property
    def steps(self) -> set[int]:
        return {step for step, _ in self.entries}

    def clear(self) -> None:
        self.entries.clear()
        self.bytes = 0


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of a layer with `tokens` tokens for latents of `height` x `width`, halved (upwards) per level."""
    rows, columns = height, width
    while rows * columns > tokens:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != tokens:
        raise ValueError(f"Expected a layer that halves {height} x {width} latents, but got one of {tokens} tokens.")
    return rows, columns
