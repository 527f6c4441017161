"""What the sampling loop asks of an edit: where to start, what pulls it, what its attention reads, what is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..core.attention import Attend
from ..core.features import FeatureModel
from ..core.noise import NoiseSource
from .invert import Inversion
from .picture import EditResult

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pull:
    """One energy (a scalar tensor) and the region (1, 1, h, w) of the latents that its gradient may move."""

    energy: Tensor
    region: Tensor


class Problem(Protocol):
    """An edit, prepared for one picture."""

    pictures: list[Inversion]  # the base picture, then the references
    noise_strength: Tensor  # eta per latent cell, broadcast over (1, 1, h, w)
    notes: list[str]  # what the user should know
    first_step: int  # steps before it would not change anything and are left out

    def start(self, noise: NoiseSource) -> Tensor:
        """Return the latents (1, C, h, w) at the level of `first_step`."""
        ...

    def reference(self, model: FeatureModel, step: int, index: int) -> list[Tensor]:
        """Return the features of picture `index` at `step` that the energies compare with."""
        ...

    def pulls(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        """Return the energies for the features of the current latents and of the pictures."""
        ...

    def scale(self, gradients: Sequence[Tensor], pulls: Sequence[Pull], eps: Tensor) -> Tensor:
        """Return the guidance added to `eps` (1, C, h, w) from the gradients with respect to variance-preserving latents."""
        ...

    def attend(
        self, step: int, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend
    ) -> Tensor:
        """Return self-attention of the rows q, k, v (B, T, C), given the pictures' keys and values (1, S, C) of this step."""
        ...

    def settle(self, step: int, x: Tensor) -> Tensor:
        """Return the latents after `step`, at `sigmas[step + 1]`, with what is not to be edited put back."""
        ...

    def result(self, latents: Tensor, notes: tuple[str, ...]) -> EditResult:
        """Return the result for the clean latents (1, C, h, w)."""
        ...
