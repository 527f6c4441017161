"""The one way to talk to a model: noised latents and a noise level per row in, denoised latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_choice, check_shape
from .schedules import Levels
from .transfer import to_device

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


def per_row(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Return a level, or one level per row, shaped to broadcast over `x` (B, C, ...), in float32 or better whatever `x` is.

    In half precision a level loses the digits that its timestep needs, and its square is infinite from 256 on.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.as_tensor(sigma, dtype=dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class NoiseSpace:
    """How clean latents and noise mix at a level: x = scale(sigma) * x0 + sigma * n.

    VE has scale 1 (k-diffusion's variance-exploding view of eps, v and x0 models), FLOW has scale 1 - sigma (rectified
    flow). Every formula below holds for both; `sigma` is a float or one level per row (B,). Each is computed in float32 at
    least, and its result has the dtype of its latents.
    """

    name: str

    def scale(self, sigma: Tensor) -> Tensor:
        return 1 - sigma if self.name == "flow" else torch.ones_like(sigma)

    def deviation(self, sigma: Tensor) -> Tensor:
        """Return the standard deviation of x at `sigma` for clean latents of variance 1."""
        return (self.scale(sigma) ** 2 + sigma**2).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """Return x0 (B, C, H, W) noised to `sigma`."""
        sigma = per_row(sigma, x0)
        return (self.scale(sigma) * x0 + sigma * noise).to(x0.dtype)

    def noise_of(self, x: Tensor, denoised: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the noise n that explains `x` at `sigma` > 0 given `denoised`."""
        sigma = per_row(sigma, x)
        return ((x - self.scale(sigma) * denoised) / sigma).to(x.dtype)

    def renoise(self, x: Tensor, sigma_from: Tensor | float, sigma_to: Tensor | float, noise: Tensor) -> Tensor:
        """Raise the noise of `x` from `sigma_from` to `sigma_to` >= `sigma_from` with fresh noise, keeping its marginal."""
        low, high = per_row(sigma_from, x), per_row(sigma_to, x)
        ratio = self.scale(high) / self.scale(low)
        return (ratio * x + (high**2 - (ratio * low) ** 2).clamp(min=0).sqrt() * noise).to(x.dtype)

    def step(
        self,
        x: Tensor,
        denoised: Tensor,
        sigma_from: Tensor | float,
        sigma_to: Tensor | float,
        eta: float | Tensor = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Move `x` from `sigma_from` > 0 to any `sigma_to`: DDIM with variance `eta` (arXiv 2010.02502 eq. 12 and 16).

        With eta 0 this is one Euler step, downwards or upwards (inversion). With eta 1 it is Euler ancestral. `eta` may be
        a tensor that broadcasts over `x`, for noise in a region only. Going up ignores `eta`.
        """
        low, high = per_row(sigma_to, x), per_row(sigma_from, x)
        eps = (x - self.scale(high) * denoised) / high
        if noise is None:
            return (self.scale(low) * denoised + low * eps).to(x.dtype)
        ratio = self.scale(high) / self.scale(low)
        added = eta * (low / high) * (high**2 - (ratio * low) ** 2).clamp(min=0).sqrt()
        return (self.scale(low) * denoised + (low**2 - added**2).clamp(min=0).sqrt() * eps + added * noise).to(x.dtype)


VE = NoiseSpace("ve")
FLOW = NoiseSpace("flow")


@dataclass(frozen=True)
class Conditioning:
    """What a network is conditioned on, one row per sample.

    `context` (B, T, D) are token embeddings, `pooled` (B, P) or None, `extra` holds further per-row tensors by the name the
    network knows them under (SDXL's "time_ids" (B, 6)). `mask` (B, T) is True where a token counts; None where all do.
    """

    context: Tensor
    pooled: Tensor | None = None
    extra: dict[str, Tensor] | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        check_shape(
            "context", self.context, (None, None, None), "Give token embeddings of shape (rows, tokens, width)."
        )
        for name, value in self._parts().items():
            if len(value) != len(self.context):
                raise ValueError(
                    f"Expected `{name}` with {len(self.context)} rows like `context`, but got {len(value)}."
                )
        if self.mask is not None:
            tokens = self.context.shape[1]
            check_shape("mask", self.mask, (len(self.context), tokens), "Give one value per token of `context`.")

    def _parts(self) -> dict[str, Tensor]:
        pooled = {} if self.pooled is None else {"pooled": self.pooled}
        return {**pooled, **(self.extra or {})}

    @property
    def rows(self) -> int:
        return len(self.context)

    @property
    def counted(self) -> Tensor:
        """The mask (B, T), also where all tokens count."""
        return self.context.new_ones(self.context.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    def map(self, fn: Callable[[Tensor], Tensor]) -> Conditioning:
        """Return a copy with `fn` applied to every tensor."""
        extra = None if self.extra is None else {k: fn(v) for k, v in self.extra.items()}
        pooled, mask = (None if part is None else fn(part) for part in (self.pooled, self.mask))
        return Conditioning(fn(self.context), pooled, extra, mask)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        return self.map(lambda t: to_device(t, torch.device(device), dtype))

    def take(self, rows: Sequence[int] | Tensor) -> Conditioning:
        """Return the given rows, in that order; rows may repeat."""
        index = to_device(torch.as_tensor(rows), self.context.device)
        return self.map(lambda t: t.index_select(0, index))

    def expand(self, rows: int) -> Conditioning:
        """Return `rows` rows: one row is repeated, equal rows are kept, anything else raises ValueError."""
        if self.rows == rows:
            return self
        if self.rows != 1:
            raise ValueError(
                f"Expected `cond` with 1 or {rows} rows, but got {self.rows}. Give one prompt, or one per image."
            )
        return self.map(lambda t: t.expand(rows, *t.shape[1:]))

    def reference(self, sigma: float) -> Conditioning:
        """Return what one network row over the whole image is conditioned on at `sigma`: itself (a host may combine prompts)."""
        return self

    def join(self, *others: Conditioning) -> Conditioning:
        """Return all rows as one batch on the device of the first, so that positive and negative are one network call.

        Contexts of unequal length are padded to the longest, and `mask` tells padding from tokens.
        """
        conds = (self, *(other.to(self.context.device) for other in others))
        if len({frozenset(c._parts()) for c in conds}) > 1:
            raise ValueError(
                "Expected conditionings with the same parts (pooled, extra), but got different ones. Encode all with one CLIP."
            )
        tokens = max(c.context.shape[1] for c in conds)
        context = torch.cat([F.pad(c.context, (0, 0, 0, tokens - c.context.shape[1])) for c in conds])
        pooled = None if self.pooled is None else torch.cat([c.pooled for c in conds])  # type: ignore[misc]
        extra = None if self.extra is None else {k: torch.cat([c.extra[k] for c in conds]) for k in self.extra}  # type: ignore[index]
        whole = all(c.mask is None and c.context.shape[1] == tokens for c in conds)
        mask = None if whole else torch.cat([F.pad(c.counted, (0, tokens - c.context.shape[1])) for c in conds])
        return Conditioning(context, pooled, extra, mask)


Cond = TypeVar("Cond", bound="Rows")
Given = TypeVar("Given", contravariant=True)


class Rows(Protocol):
    """Rows of conditioning, of the library (`Conditioning`) or of a host: what the techniques do with them."""

    @property
    def rows(self) -> int: ...
    def take(self: Cond, rows: Sequence[int] | Tensor) -> Cond: ...
    def expand(self: Cond, rows: int) -> Cond: ...
    def reference(self: Cond, sigma: float) -> Cond: ...
    def join(self: Cond, *others: Cond) -> Cond: ...


@runtime_checkable
class Denoiser(Protocol[Given]):
    """A model as a callable from noised latents to denoised latents, with its noise space and its cost counters.

    `Denoiser[C]` takes conditioning of the kind C.
    """

    @property
    def space(self) -> NoiseSpace: ...
    @property
    def levels(self) -> Levels: ...
    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    @property
    def calls(self) -> int: ...
    @property
    def rows(self) -> int: ...

    def __call__(self, x: Tensor, sigma: Tensor, cond: Given) -> Tensor:
        """Denoise `x` (B, C, H, W) at one level per row `sigma` (B,), given 1 or B rows of `cond`.

        All may be on any device; the result has the device and the dtype of `x`.
        """
        ...


@dataclass
class Counter:
    """Network calls and rows so far: what a test asserts instead of time."""

    calls: int = 0
    rows: int = 0

    def add(self, rows: int) -> None:
        self.calls += 1
        self.rows += rows


@dataclass(frozen=True)
class Prediction:
    """What a network predicts, and the one place where it becomes a denoised estimate.

    `kind` is "epsilon", "v_prediction" (arXiv 2202.00512), "sample" (x0) or "flow" (velocity n - x0, arXiv 2209.03003).
    For the first three the network sees x / sqrt(sigma^2 + 1), the variance-preserving latent.
    """

    kind: str
    space: NoiseSpace = field(init=False)

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.kind, PREDICTIONS)
        object.__setattr__(self, "space", FLOW if self.kind == "flow" else VE)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (input, skip, output), shaped like `sigma`: the network sees input * x, denoised = skip * x + output * network."""
        root = (sigma**2 + 1).sqrt()
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        return {
            "epsilon": (1 / root, one, -sigma),
            "v_prediction": (1 / root, 1 / root**2, -sigma / root),
            "sample": (1 / root, zero, one),
            "flow": (one, one, -sigma),
        }[self.kind]

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return what the network sees for `x` (B, C, H, W) at `sigma` (B,), in the dtype of `x`."""
        return (x * self.coefficients(per_row(sigma, x))[0]).to(x.dtype)

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoised estimate from the network's `output` for `x` at `sigma`, in the dtype of `x`."""
        _, skip, scale = self.coefficients(per_row(sigma, x))
        return torch.addcmul(skip * x, scale, output.to(scale.dtype)).to(x.dtype)

    def output_for(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return what a perfect network would output for clean `x0` and `noise` at `sigma` (used in tests and distillation)."""
        sigma = per_row(sigma, x0)
        alpha = 1 / (sigma**2 + 1).sqrt()
        targets = {
            "epsilon": noise,
            "sample": x0,
            "flow": noise - x0,
            "v_prediction": alpha * noise - sigma * alpha * x0,
        }
        return targets[self.kind].to(x0.dtype)
