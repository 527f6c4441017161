"""Ability: decoder features of a network, differentiable in the latents and cut off once the last wanted block has run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .denoiser import Given


@runtime_checkable
class FeatureModel(Protocol[Given]):
    """A denoiser that shows the outputs of its decoder blocks."""

    feature_blocks: tuple[int, ...]

    def features(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Given,
        blocks: Sequence[int] | None = None,
        checkpoint: bool = False,
    ) -> list[Tensor]:
        """Return the outputs of the decoder `blocks` for `x` (B, C, H, W) at `sigma` (B,), upsampler included.

        Differentiable in `x` when gradients are enabled. Counts as one call of B rows. `checkpoint` keeps only the inputs of
        each block and computes the rest anew in the backward pass.
        """
        ...


class _Cut(Exception):  # noqa: N818 - control flow, never seen by a caller
    pass


def default_blocks(count: int) -> tuple[int, int]:
    """Return the two decoder blocks whose outputs have half and full latent size: 1 and 2 of SD's four, 0 and 1 of SDXL's three."""
    if count < 3:
        raise ValueError(f"Expected a network with at least 3 decoder blocks for features, but got {count}.")
    return count - 3, count - 2


@contextmanager
def captured(
    modules: Sequence[nn.Module], wanted: Sequence[int]
) -> Iterator[tuple[dict[int, Tensor], type[Exception]]]:
    """Collect the outputs of `modules[i]` for i in `wanted`; the last one raises the yielded exception type to stop the forward."""
    found: dict[int, Tensor] = {}
    last = max(wanted)

    def collect(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output
            if index == last:
                raise _Cut

        return hook

    handles = [modules[i].register_forward_hook(collect(i)) for i in wanted]
    try:
        yield found, _Cut
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def checkpointed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context the forward of each module keeps its inputs only and is run again in the backward pass.

    The weights are frozen in both runs, also when the second comes after the caller's own `frozen` has ended.
    """
    from torch.utils.checkpoint import checkpoint

    def wrap(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with frozen(module):
                return forward(*args, **kwargs)

        return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)

    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = wrap(module, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Build no graph for the weights within the context: their gradients are never wanted and would cost the memory of training."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def unet_features(
    unet: Any, forward: Callable[[], Any], blocks: Sequence[int], checkpoint: bool = False
) -> list[Tensor]:
    """Run `forward` on a diffusers UNet up to the last of the decoder `blocks` and return their outputs."""
    count = len(unet.up_blocks)
    if not blocks or any(not 0 <= b < count for b in blocks):
        raise ValueError(f"Expected `blocks` within 0 and {count - 1}, but got {tuple(blocks)}.")
    parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    with ExitStack() as stack:
        stack.enter_context(frozen(unet))
        if checkpoint and torch.is_grad_enabled():
            stack.enter_context(checkpointed(parts))
        found, cut = stack.enter_context(captured(list(unet.up_blocks), blocks))
        try:
            forward()
        except cut:
            pass
    return [found[b] for b in blocks]
