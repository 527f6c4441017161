"""Cached latents of training scenes with their captions: what the UNet stages draw from."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .models import tokenize
from .scenes import Scene, caption, render, sample_scene
from .training import rank

_TWO_OBJECTS_SHARE = 0.2


@torch.no_grad()
def encode(vae: Any, scenes: Sequence[Scene], res: int, batch: int = 32) -> Tensor:
    """Latents of deviation about 1, (B, 4, h, w)."""
    parts = [scenes[i : i + batch] for i in range(0, len(scenes), batch)]
    means = [vae.encode(render(part, res).to(vae.device)).latent_dist.mean.cpu() for part in parts]
    return torch.cat(means) * vae.config.scaling_factor


def cached(work: pathlib.Path, vae: Any, count: int, res: int) -> tuple[Tensor, list[Scene]]:
    """`count` scenes of this process and their latents, made once and kept in `work`."""
    rng = np.random.default_rng([5, rank()])
    scenes = [sample_scene(rng, 2 if rng.random() < _TWO_OBJECTS_SHARE else 1) for _ in range(count)]
    path = work / f"latents_{rank()}.pt"
    if not path.exists():
        torch.save(encode(vae, scenes, res), path)
    latents = torch.load(path)
    if len(latents) != count:
        raise ValueError(
            f"Expected {count} latents in {path}, but got {len(latents)}. Delete the file to make them again."
        )
    return latents, scenes


class Batches:
    """Endless shuffled batches of latents with prompt embeddings of fresh captions."""

    def __init__(
        self, work: pathlib.Path, vae: Any, text: Any, tokenizer: Any, count: int, res: int, rng: np.random.Generator
    ) -> None:
        self.latents, self.scenes = cached(work, vae, count, res)
        self.text, self.tokenizer, self.rng = text, tokenizer, rng
        self.order: list[int] = []

    def draw(self, batch: int, full: float, empty: float) -> tuple[Tensor, Tensor]:
        """Latents and embeddings; `full` is the share of complete captions among those that are not `empty`."""
        if len(self.order) < batch:
            self.order = self.rng.permutation(len(self.latents)).tolist()
        picks, self.order = self.order[:batch], self.order[batch:]
        device = self.text.device
        return self.latents[picks].to(device), self.embed([self._words(i, full, empty) for i in picks])

    def _words(self, index: int, full: float, empty: float) -> str:
        if self.rng.random() < empty:
            return ""
        return caption(self.scenes[index], self.rng, full=self.rng.random() < full)

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Tensor:
        return self.text(tokenize(self.tokenizer, captions).to(self.text.device))[0]
