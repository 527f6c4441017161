"""Random numbers as an argument: seeded on the CPU so that seeds agree across devices, or replayed from a recording."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .checks import check_integer
from .transfer import to_device


class NoiseSource(Protocol):
    """Gives standard normal noise in the order it is asked for."""

    def __call__(self, like: Tensor) -> Tensor:
        """Return noise of the shape, dtype and device of `like`."""
        ...

    def fork(self, name: str) -> NoiseSource:
        """Return an independent source for a named purpose, so that one phase's draws never shift another's."""
        ...


class SeededNoise:
    """Normal noise from a CPU generator in float32: the same seed gives the same numbers on every device."""

    def __init__(self, seed: int) -> None:
        check_integer("seed", seed, 0, 2**64 - 1)
        self.seed = seed
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, like: Tensor) -> Tensor:
        # Drawn where a GPU fetches it from.
        noise = torch.randn(like.shape, generator=self.generator, dtype=torch.float32, pin_memory=like.is_cuda)
        return to_device(noise, like.device, like.dtype)

    def fork(self, name: str) -> SeededNoise:
        # crc32, not hash(): Python salts string hashes per process.
        return SeededNoise((self.seed ^ zlib.crc32(name.encode()) * 0x9E3779B97F4A7C15) % 2**64)


class ReplayNoise:
    """Recorded tensors, given out in order; raises when the shape differs or the recording ends."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.position = 0

    def __call__(self, like: Tensor) -> Tensor:
        if self.position >= len(self.tensors):
            raise ValueError(
                f"Expected at most {len(self.tensors)} draws of noise, but got one more. Record more tensors."
            )
        noise = self.tensors[self.position]
        if noise.shape != like.shape:
            raise ValueError(
                f"Expected recorded noise {self.position} of shape {tuple(like.shape)}, but got {tuple(noise.shape)}."
            )
        self.position += 1
        return to_device(noise, like.device, like.dtype)

    def fork(self, name: str) -> ReplayNoise:
        """Return itself: a recording holds the draws of all phases in the order they were made."""
        return self
