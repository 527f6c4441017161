"""Reuse between frames (research): values that hardly changed since the frame before rest, and only the others are computed again.

Every product of a UNet (convolution, linear layer, attention) keeps the input that it was last computed with. Of the next frame's input
a value counts only where it differs enough from the kept one, and is then taken over whole: each kept value is within a threshold of
the true one, so errors do not pile up. (Delta networks, arXiv 1612.05571; for images DeltaCNN, arXiv 2203.03996.)

Where operations are best spent follows from how much the output depends on each channel and cell, which is measured once by backward
passes over example frames: a value is computed again where its change, times that, is large for what it costs. The threshold follows
the share of operations that is asked for.

Operations are saved and counted, not time: torch has no products that leave out single values, so this computes dense ones.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.checks import check_latents, check_range
from ..core.denoiser import Conditioning, Denoiser
from ..core.diffusers_model import DiffusersDenoiser
from ..core.fused import FusedUnet, Prepared
from ..core.noise import SeededNoise
from .config import StreamConfig, stage_sigmas

log = logging.getLogger(__name__)

PROBES = 4  # random directions of the output in which its dependence is measured
DECIDING = 3  # operations to decide about a value: subtract, weigh, compare
# Of the mean of what a change to zero would score: the first threshold, and its limits.
FIRST, LEAST, MOST = 2e-2, 1e-4, 1.0


@dataclass
class Operations:
    """Operations of the passes so far: `done`, deciding included, and those of dense passes."""

    done: float = 0.0
    dense: float = 0.0

    @property
    def share(self) -> float:
        return self.done / self.dense if self.dense else 0.0


class _Products(TorchFunctionMode):
    """Lets `take` replace what goes into each product of a pass, in order."""

    def take(self, x: Tensor, channel: int, cost: float, attended: bool = False) -> Tensor:
        """Return what the product gets for `x`: `channel` is the axis of the channels, `cost` are the operations of a value.

        What is `attended` is decided about by vector, which `cost` stands for, and counted in `attention`.
        """
        raise NotImplementedError

    def attention(self, queries: Tensor, keys: Tensor) -> None:
        """Take note of an attention after its queries (B, heads, T, d), and its keys and values, were taken."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight = args[:2]
            args = self.take(x, x.ndim - 1, 2.0 * len(weight)), *args[1:]
        elif func is F.conv2d:
            x, weight = args[:2]
            args = self.take(x, 1, 2.0 * weight[:, 0].numel() / math.prod(args[3])), *args[1:]
        elif func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            # A query that changed: all its products. A key or value: its score, and its share out of and into each sum.
            pair = 2.0 * q.shape[3]
            q = self.take(q, 3, 2 * pair * k.shape[2], True)
            both = self.take(torch.cat((k, v), 3), 3, 3 * pair * q.shape[2], True)
            self.attention(q, both)
            args = q, *both.split((k.shape[3], v.shape[3]), 3), *args[3:]
        return func(*args, **(kwargs or {}))


class _Probe(_Products):
    """Notes the inputs of products for a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, int]] = []

    def take(self, x: Tensor, channel: int, cost: float, attended: bool = False) -> Tensor:
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        x.retain_grad()
        self.found.append((x, channel))
        return x


class _Reuse(_Products):
    """One pass: `kept` are the inputs of the products so far, a list that is filled where it is empty."""

    def __init__(self, weights: list[Tensor], kept: list[Tensor], threshold: float, cells: bool) -> None:
        super().__init__()
        self.weights, self.kept, self.threshold, self.cells = weights, kept, threshold, cells
        self.operations, self.first, self.place = Operations(), not kept, 0
        self.scores: list[Tensor] = []
        self.changed: list[Tensor] = []

    def take(self, x: Tensor, channel: int, cost: float, attended: bool = False) -> Tensor:
        place, whole = self.place, attended or self.cells
        self.place += 1
        score = ((x if self.first else x - self.kept[place]) * self.weights[place]).abs()
        if whole:
            score = score.square().sum(channel, keepdim=True).sqrt()
            cost *= 1 if attended else x.shape[channel]
        score = score / cost**0.5
        if self.first:
            changed = torch.ones_like(score, dtype=torch.bool)
            self.scores.append(score.mean())
            self.kept.append(x)
        else:
            changed = score >= self.threshold
            self.kept[place] = torch.where(changed, x, self.kept[place])
            self.operations.done += DECIDING * x.numel()
        self.changed.append(changed)
        if not attended:
            self._count(cost * float(changed.sum()), cost * changed.numel())
        return self.kept[place]

    def attention(self, queries: Tensor, keys: Tensor) -> None:
        (rows, heads, count, width), others = queries.shape, keys.shape[2]
        new_queries, new_keys = (changed.sum((2, 3)).double() for changed in self.changed[-2:])
        # A query that changed: all its pairs. A key that changed, for the other queries: out of and into the sums. Never more than all.
        pairs = (new_queries * others + 1.5 * (count - new_queries) * new_keys).clamp(max=count * others)
        self._count(4.0 * width * float(pairs.sum()), 4.0 * width * rows * heads * count * others)

    def _count(self, done: float, dense: float) -> None:
        self.operations.done += done
        self.operations.dense += dense


class RestingUnet:
    """A UNet that computes again what changed since its last pass, in the place of the network of a `DiffusersDenoiser`.

    Row i of a pass is compared with row i of the pass before, as the steps of a stream are. The first pass is dense, and so is the next
    after `restart()` or another prompt, level or number of rows. Latents of another size than the examples run as they are, uncounted.
    `operations` counts; `share` is aimed at, 1 leaves nothing out; `cells` decides about all channels of a cell at once.
    """

    def __init__(self, unet: Any, fused: FusedUnet, weights: list[Tensor], share: float, cells: bool) -> None:
        self.unet, self.config, self.fused, self.share, self.cells = unet, unet.config, fused, share, cells
        self._orig_mod = unet  # what hooks, features and layer masks work on, as of a compiled network
        self.operations, self.threshold = Operations(), 0.0
        self._weights, self._lock, self._scale = weights, threading.Lock(), 0.0
        self.restart()

    def restart(self) -> None:
        """Forget the last pass, so that the next one is dense."""
        self._kept: list[Tensor] = []
        self._given: tuple[Any, ...] = ()

    def parameters(self) -> Iterator[Tensor]:
        return self.unet.parameters()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)

    def run(self, sample: Tensor, times: Tensor, texts: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `core.fused.Run`."""
        if sample.shape[2:] != self._weights[0].shape[2:]:
            return self.fused(sample, times, texts, bias)
        with self._lock:
            given = len(sample), times, texts, bias
            if not self._given or any(a is not b for a, b in zip(given, self._given)):
                self.restart()
                self._given = given
            with _Reuse(self._weights, self._kept, 0.0 if self.share >= 1 else self.threshold, self.cells) as reuse:
                output: Tensor = self.fused(sample, times, texts, bias)
            self.operations.done += reuse.operations.done
            self.operations.dense += reuse.operations.dense
            self._follow(reuse)
            return output

    def _follow(self, reuse: _Reuse) -> None:
        """Set the threshold of the next pass by what this one took."""
        if not reuse.first:
            # Steps in the logarithm add up to nothing where the mean share is the one that is aimed at.
            self.threshold *= math.exp(0.5 * (min(reuse.operations.share / self.share, 4.0) - 1))
        elif not self._scale:
            self._scale = float(torch.stack(reuse.scores).mean())
            self.threshold = FIRST * self._scale
        self.threshold = min(max(self.threshold, LEAST * self._scale), MOST * self._scale)


def weights_of(fused: FusedUnet, sample: Tensor, tensors: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor]:
    """Return how much the output depends on the values that go into each product, by channel times by cell.

    That is the root mean square of derivatives over the rows of `sample` and over random directions of the output.
    """
    sums: list[Tensor] = []
    for probe in range(PROBES):
        with _Probe() as probed:
            output = fused(sample, *tensors)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(probe)).to(output)
        (output * direction).sum().backward()
        squares = [x.grad.float().square().mean(0, keepdim=True) for x, _ in probed.found if x.grad is not None]
        sums = [a + b for a, b in zip(sums, squares)] if sums else squares
    return [_by_axis(square / PROBES, channel) for square, (_, channel) in zip(sums, probed.found, strict=True)]


def _by_axis(square: Tensor, channel: int) -> Tensor:
    cells = tuple(axis for axis in range(square.ndim) if axis != channel)
    by_channel, by_cell = square.mean(cells, keepdim=True), square.mean(channel, keepdim=True)
    return (by_channel * by_cell / square.mean().clamp(min=1e-30)).sqrt()


def resting(
    model: Denoiser, cond: Conditioning, latents: Tensor, config: StreamConfig, share: float = 0.38, cells: bool = False
) -> Denoiser:  # fmt: skip
    """Return `model` for one stream of `config`, with a network that reuses what hardly changed; `.network.operations` counts.

    `latents` (F, C, H, W) are example frames: with the noise of the stream it is measured on them what matters, in `PROBES` backward
    passes for each step. `share` of the dense operations are aimed at. A model other than a UNet of the usual blocks is returned as it
    is, with a warning. Raises ValueError for a wrong share or shape.
    """
    check_range("share", share, 0.01, 1.0, "It is a share of the operations of a dense pass.")
    fused = model._fused[0] if isinstance(model, DiffusersDenoiser) and isinstance(model.network, nn.Module) else None
    if fused is None or not isinstance(model, DiffusersDenoiser):
        log.warning(
            "Reuse between frames needs a UNet of the usual blocks, not compiled or recorded: this model runs as it is."
        )
        return model
    check_latents("latents", latents, model.latent_channels)
    if any(weight.is_inference() for weight in model.network.parameters()):
        raise ValueError(
            "Expected `model` loaded outside torch.inference_mode(), but got weights made in it, which have no derivatives."
        )
    found: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad():
        x0, sigmas = latents.detach().clone().to(model.device), stage_sigmas(config, model.levels)
        noise = SeededNoise(config.seed)(x0.new_empty(len(sigmas), *x0.shape[1:]))
        for i, sigma in enumerate(sigmas.repeat(len(x0), 1).T):
            sample = model.prediction.network_input(model.space.add_noise(x0, noise[i], sigma), sigma).to(model.dtype)
            condition = model.network_condition(cond.map(torch.clone).expand(len(x0)))
            with torch.no_grad():
                tensors = Prepared(fused, model.network_time(sigma), **condition).tensors()
            more = weights_of(fused, sample, tensors)
            found = [torch.maximum(a, b) for a, b in zip(found, more)] if found else more
    copied = copy.copy(model)
    copied.calls = copied.rows = 0
    copied.network = RestingUnet(model.network, fused, found, share, cells)
    return copied
