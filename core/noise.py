"""Random numbers as an argument: seeded on the CPU so that seeds agree across devices, or replayed from a recording."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .checks import check_seed
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
    """Normal noise from a CPU generator in float32: the same seed gives the same numbers on every device.

    Row i of the k-th draw depends on the seed, k and i alone, so an image is the same in a batch of any size. The first draw
    is the host's for this seed (`comfy.sample.prepare_noise`), whose row i is not row 0 of seed + i. `rows` says which rows of
    the endless batch the batch at hand is, as the host's `batch_index` does; the default is 0, 1, 2, ...
    """

    def __init__(self, seed: int, rows: Sequence[int] | None = None) -> None:
        self.seed = check_seed("seed", seed)
        self.rows = None if rows is None else [int(row) for row in rows]
        self.draws = 0

    def __call__(self, like: Tensor) -> Tensor:
        if self.rows is not None and len(self.rows) != len(like):
            raise ValueError(
                f"Expected `rows` with one index for each row of the batch {len(like)}, but got {self.rows}."
            )
        count = len(like) if self.rows is None else max(self.rows) + 1
        # Drawn where a GPU fetches it from.
        noise = torch.empty(count, *like.shape[1:], pin_memory=like.is_cuda and self.rows is None)
        generator = self.next_generator()
        for row in noise:
            row.normal_(generator=generator)
        return to_device(noise if self.rows is None else noise[self.rows], like.device, like.dtype)

    def next_generator(self) -> torch.Generator:
        """Return the generator of one more draw."""
        seed = self.fork(f"draw {self.draws}").seed if self.draws else self.seed
        self.draws += 1
        return torch.Generator("cpu").manual_seed(seed)

    def fork(self, name: str) -> SeededNoise:
        # crc32, not hash(): Python salts string hashes per process.
        return SeededNoise((self.seed ^ zlib.crc32(name.encode()) * 0x9E3779B97F4A7C15) % 2**64, self.rows)


class StackedNoise:
    """Noise for a batch of equal parts, each from its own source."""

    def __init__(self, sources: Sequence[NoiseSource]) -> None:
        self.sources = list(sources)

    def __call__(self, like: Tensor) -> Tensor:
        parts = like.unflatten(0, (len(self.sources), -1))
        return torch.cat([source(part) for source, part in zip(self.sources, parts)])

    def fork(self, name: str) -> StackedNoise:
        return StackedNoise([source.fork(name) for source in self.sources])


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
