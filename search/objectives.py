"""What "better" means: plug-ins that turn the samples of a candidate into one number, lower is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..core.checks import check_choice, check_finite
from ..core.identity import identify
from .features import Features, LatentFeatures
from .statistics import frechet_distance, median_bandwidth, mmd, moments

# Latents of the first n pairs of a bank (n, C, H, W) -> score. Called with a quarter, half and all of the pairs.
Score = Callable[[Tensor], float]
DISTANCES = ("frechet", "mmd")


class Bank(Protocol):
    """The pairs that a score is measured on."""

    def teacher(self) -> Tensor:
        """Return the model's own many-step latents of these pairs (n, C, H, W), sampled once and kept."""
        ...


class Objective(Protocol):
    """A plug-in: anything with these three. A search counts as another one when what it holds differs (a network, images)."""

    id: str
    needs_teacher: bool

    def prepare(self, bank: Bank) -> Score:
        """Return the score on a bank's pairs; called once for each bank."""
        ...


class Paired:
    """Mean squared distance to the model's own many-step result from the same noise: "the same image in fewer steps".

    Steady with few pairs, but at very few steps it prefers smooth averages: report a distribution distance as well.
    `features` None compares the latents themselves.
    """

    needs_teacher = True

    def __init__(self, features: Features | None = None) -> None:
        self.features = features
        self.id = f"paired/{features.id if features else 'latents'}"

    def vectors(self, latents: Tensor) -> Tensor:
        return latents.flatten(1).double() if self.features is None else self.features.of_latents(latents).double()

    def prepare(self, bank: Bank) -> Score:
        target = self.vectors(bank.teacher())
        return lambda latents: float(self.errors(latents, target[: len(latents)]).mean())

    def errors(self, latents: Tensor, target: Tensor) -> Tensor:
        """Return the error of each pair (n,)."""
        return ((self.vectors(latents) - target) ** 2).mean(1)


class SelfDistribution:
    """Distance between the distributions of the candidate's samples and of the model's own many-step samples."""

    needs_teacher = True

    def __init__(self, features: Features | None = None, distance: str = "frechet") -> None:
        check_choice("distance", distance, DISTANCES)
        self.features, self.distance = features or LatentFeatures(), distance
        self.id = f"self-{distance}/{self.features.id}"

    def prepare(self, bank: Bank) -> Score:
        return against(self.features.of_latents(bank.teacher()), self.features, self.distance)


class ReferenceImages:
    """Distance between the distributions of the candidate's samples and of a set of images: the paper's objective.

    FID when the features are Inception's pool3, CMMD when they are CLIP embeddings and the distance is "mmd".
    `images` are (H, W, 3) in [0, 1], of any sizes; raises ValueError for fewer than two.
    """

    needs_teacher = False

    def __init__(self, images: Sequence[Tensor], features: Features, distance: str = "frechet") -> None:
        check_choice("distance", distance, DISTANCES)
        if len(images) < 2:
            raise ValueError(
                f"Expected at least 2 reference images to have a distribution, but got {len(images)}. Add images, or compare "
                "with the model's own samples."
            )
        self.features, self.distance = features, distance
        self.reference = features.of_images(images)
        check_finite(
            "the features of the reference images", self.reference, "Use float32 or bfloat16 for their network."
        )
        self.id = f"reference-{distance}/{features.id}/{len(images)}-{identify(self.reference).digest[:8]}"

    def prepare(self, bank: Bank) -> Score:
        return against(self.reference, self.features, self.distance)


def against(reference: Tensor, features: Features, distance: str) -> Score:
    """Return the score of latents against reference vectors (N, D)."""
    if distance == "mmd":
        bandwidth = median_bandwidth(reference)
        return lambda latents: mmd(features.of_latents(latents), reference, bandwidth)
    target = moments(reference)
    return lambda latents: frechet_distance(*moments(features.of_latents(latents)), *target)


def score_or_worst(score: Score, latents: Tensor) -> float:
    """Return the score, or infinity for samples or scores that are not finite: NaN is worst, never best."""
    if not torch.isfinite(latents).all():
        return float("inf")
    value = float(score(latents))
    return value if value == value else float("inf")
