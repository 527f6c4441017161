"""Short hashes of weights and embeddings: what a stored result belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(*tensors: Tensor | None) -> str:
    """Return a short hash of tensors in half precision, so that a model has one hash in every number format."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            found.update(str(tuple(tensor.shape)).encode())
            found.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def weights_digest(parameters: Iterable[Tensor], per_tensor: int = 64) -> str:
    """Return a short hash of some values of each parameter, in milliseconds.

    Neither order nor names nor shapes count, so that a network has one hash under the library's and the host's module names.
    """
    parts = []
    for parameter in parameters:
        flat = parameter.detach().flatten()
        picked = flat[:: max(1, len(flat) // per_tensor)][:per_tensor].to("cpu", torch.float16)
        parts.append(hashlib.sha256(picked.contiguous().numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]
