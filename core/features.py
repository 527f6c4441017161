"""Ability: decoder features of a network, differentiable in the latents and cut off once the last wanted block has run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .denoiser import Given
from .taps import Handler, active, resumed, routed


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
        each block and computes the rest again in the backward pass.
        """
        ...


class Cut(Exception):  # noqa: N818 - control flow, never seen by a caller
    """Ends a call whose outputs are all there; `found` says whose call it is."""

    def __init__(self, found: Any) -> None:
        self.found = found


def default_blocks(count: int) -> tuple[int, int]:
    """Return the two decoder blocks whose outputs have half and full latent size: 1 and 2 of SD's four, 0 and 1 of SDXL's three."""
    if count < 3:
        raise ValueError(f"Expected a network with at least 3 decoder blocks for features, but got {count}.")
    return count - 3, count - 2


@contextmanager
def captured(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collect the output of each module in calls of this thread, and end the body of the context once all are there."""
    found: dict[int, Tensor] = {}

    def collect(key: int, call: Handler, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        found[key] = output[0] if isinstance(output, tuple) else output
        if len(found) == len(modules):
            raise Cut(found)
        return output

    try:
        with routed({module: partial(collect, key) for key, module in modules.items()}):
            yield found
    except Cut as cut:
        if cut.found is not found:
            raise
        # From Python 3.13 on its frames hold it, and it would hold the network until garbage is collected.
        cut.__traceback__ = None


class _Frozen(TorchFunctionMode):
    """Takes these parameters as constants in every operation of this thread; their `requires_grad` is not touched."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.constants = {id(p): p.detach() for p in parameters}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        constants = self.constants
        given = {name: constants.get(id(value), value) for name, value in (kwargs or {}).items()}
        return func(*(constants.get(id(value), value) for value in args), **given)


def frozen(module: nn.Module) -> AbstractContextManager[Any]:
    """Build no graph for the weights within the context: their gradients are never wanted and would cost the memory of training."""
    trainable = [p for p in module.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    return _Frozen(trainable) if trainable else nullcontext()


@contextmanager
def input_gradients(network: nn.Module, checkpointed: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Within the context calls of `network` by this thread are differentiable in their inputs alone, the weights are `frozen`.

    The modules `checkpointed` keep their inputs only and run again in the backward pass.
    """
    blocks = {module: partial(_checkpoint, module) for module in checkpointed} if torch.is_grad_enabled() else {}
    with frozen(network), routed(blocks):
        yield


def _checkpoint(module: nn.Module, call: Handler, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    requests = active()

    def run(*args: Any, **kwargs: Any) -> Any:
        # By the second run the caller's contexts have ended, and the thread may be one of autograd's.
        with resumed(requests), frozen(module):
            return call(*args, **kwargs)

    # The caller may write to its options before then.
    args, kwargs = tuple(_kept(a) for a in args), {name: _kept(a) for name, a in kwargs.items()}
    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def _kept(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def unet_features(
    unet: Any, forward: Callable[[], Any], blocks: Sequence[int], checkpoint: bool = False
) -> list[Tensor]:
    """Run `forward` on a diffusers UNet up to the last of the decoder `blocks` and return their outputs."""
    count = len(unet.up_blocks)
    if not blocks or any(not 0 <= b < count for b in blocks):
        raise ValueError(f"Expected `blocks` within 0 and {count - 1}, but got {tuple(blocks)}.")
    parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks] if checkpoint else []
    with input_gradients(unet, parts), captured({b: unet.up_blocks[b] for b in blocks}) as found:
        forward()
    return [found[b] for b in blocks]
