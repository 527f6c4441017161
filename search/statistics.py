"""Distances between sets of feature vectors (N, D), in float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D) of features (N, D); raises ValueError for fewer than two rows."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"Expected `features` of at least 2 samples, but got shape {tuple(features.shape)}. Give more images."
        )
    features = features.detach().to("cpu", torch.float64)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau 1982; FID is this on Inception features).

    By symmetric eigenvalues: Tr (S1 S2)^(1/2) = sum sqrt eig(S1^(1/2) S2 S1^(1/2)), which needs no matrix root of a
    product and no offset on the diagonal for singular covariances.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(t, dtype=torch.float64) for t in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float(((mean1 - mean2) ** 2).sum() + cov1.trace() + cov2.trace() - 2 * cross)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return (N, M) squared Euclidean distances of (N, D) and (M, D)."""
    return ((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T).clamp(min=0)


def median_bandwidth(reference: Tensor) -> float:
    """Return the median distance between different rows of `reference` (N, D): the usual width of a Gaussian kernel."""
    reference = reference[:2000].to("cpu", torch.float64)
    distances = squared_distances(reference, reference)
    upper = distances[torch.triu_indices(len(reference), len(reference), 1).unbind()]
    return max(float(upper.median().sqrt()), 1e-6) if len(upper) else 1.0


def mmd(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Return the unbiased squared maximum mean discrepancy of (N, D) and (M, D) under exp(-d^2 / (2 bandwidth^2)).

    With CLIP image embeddings of length 1, bandwidth 10 and times 1000, this is CMMD (arXiv 2401.09603). It may be
    slightly negative for equal distributions.
    """
    x, y = (t.detach().to("cpu", torch.float64) for t in (x, y))
    n, m = len(x), len(y)
    if n < 2 or m < 2:
        raise ValueError(f"Expected at least 2 samples on both sides, but got {n} and {m}. Give more images.")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-squared_distances(a, b) / (2 * bandwidth**2))

    xx, yy = kernel(x, x), kernel(y, y)
    same_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    same_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(same_x + same_y - 2 * kernel(x, y).mean())
