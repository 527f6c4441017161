"""Skipping blocks of a U-Net: which blocks can be left out, what each costs, and a call without some of them.

A skipped residual block is its shortcut, a skipped attention block the identity (AutoDiffusion, arXiv 2309.10438). Encoder
to decoder connections keep their shapes, so nothing else changes. The blocks are found by their structure, so that the
same code serves diffusers' U-Nets and those with the original module names (ADM, the host's models).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

RESIDUAL, ATTENTION = "residual", "attention"
# By class name, so that neither diffusers nor a host has to be imported to look at a module.
KINDS = {
    "ResnetBlock2D": RESIDUAL,
    "ResnetBlockCondNorm2D": RESIDUAL,
    "ResBlock": RESIDUAL,
    "Transformer2DModel": ATTENTION,
    "SpatialTransformer": ATTENTION,
    "AttentionBlock": ATTENTION,
    "Attention": ATTENTION,
}


@dataclass(frozen=True)
class Layer:
    """One block that can be skipped.

    `name` is its module path, `cost` the share of a network call's multiply-adds that a skip saves, in (0, 1), `seconds`
    what the block took in the measuring call.
    """

    name: str
    kind: str
    cost: float
    seconds: float = 0.0


@runtime_checkable
class LayerModel(Protocol):
    """A model whose blocks can be skipped."""

    def layers(self, *args: Any) -> tuple[Layer, ...]:
        """Return the blocks that can be skipped, in the order in which the network calls them."""
        ...

    def skipping(self, names: Collection[str]) -> AbstractContextManager[None]:
        """Leave the named blocks out of every network call in the `with` block."""
        ...


def kind_of(module: nn.Module) -> str | None:
    """Return "residual", "attention", or None for a module that cannot be skipped."""
    return next((KINDS[c.__name__] for c in type(module).__mro__ if c.__name__ in KINDS), None)


def skippable(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the outermost skippable blocks below `root`, in registration order."""
    for name, child in root.named_children():
        path = f"{prefix}{name}"
        if kind_of(child) is not None:
            yield path, child
        else:
            yield from skippable(child, f"{path}.")


def bypass(module: Any) -> Callable[..., Any]:
    """Return what replaces the forward of a skipped block: the shortcut of a residual block, else the identity."""
    if kind_of(module) == ATTENTION:
        return _identity
    if hasattr(module, "skip_connection"):  # ADM and the host: the resampling is `x_upd`
        resample = module.x_upd if getattr(module, "updown", False) else _same
        return lambda x, *args, **kwargs: module.skip_connection(resample(x))
    return lambda x, *args, **kwargs: _diffusers_shortcut(module, x)


def _same(x: Tensor) -> Tensor:
    return x


def _identity(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return x if kwargs.get("return_dict", True) else (x,)


def _diffusers_shortcut(block: Any, x: Tensor) -> Tensor:
    for resample in (block.upsample, block.downsample):
        x = x if resample is None else resample(x)
    x = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return x / block.output_scale_factor


def checked(root: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """Return the modules of `names`; raises ValueError for one that is not there or cannot be skipped."""
    known = dict(skippable(root))
    for name in names:
        if name not in known:
            raise ValueError(
                f"Expected `skip` to name blocks of this model, but got {name!r}. "
                f"The mask was made for another model; this one has {len(known)} blocks such as {next(iter(known), None)!r}."
            )
    return [known[name] for name in names]


@contextmanager
def skipping(root: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Replace the forward of the named blocks of `root` by their bypass until the block ends."""
    modules = checked(root, sorted(names))
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = bypass(module)
    try:
        yield
    finally:
        for module, forward in zip(modules, before):
            del module.forward
            if forward is not None:
                module.forward = forward


def measure(root: nn.Module, call: Callable[[], Any]) -> tuple[Layer, ...]:
    """Return the skippable blocks of `root` with their share of one network `call()`, in the order of that call."""
    found = dict(skippable(root))
    full, total = _profile(found, call)
    with skipping(root, found):
        rest, _ = _profile(found, call)
    layers = [
        Layer(name, str(kind_of(found[name])), (flops - rest[name][0]) / total, seconds)
        for name, (flops, seconds) in full.items()
    ]
    return tuple(layer for layer in layers if layer.cost > 0)


def _profile(modules: dict[str, nn.Module], call: Callable[[], Any]) -> tuple[dict[str, tuple[float, float]], float]:
    """Return ({name: (floating-point operations, seconds)} in call order, operations in all) of one `call()`."""
    from torch.utils.flop_counter import FlopCounterMode

    begun: dict[str, tuple[float, float]] = {}
    spent: dict[str, tuple[float, float]] = {}
    handles = []
    with FlopCounterMode(display=False) as counter, torch.no_grad():

        def begin(name: str) -> Callable[..., None]:
            return lambda *_: begun.update({name: (float(counter.get_total_flops()), time.perf_counter())})

        def end(name: str) -> Callable[..., None]:
            def stop(*_: Any) -> None:
                now = (float(counter.get_total_flops()), time.perf_counter())
                spent[name] = (now[0] - begun[name][0], now[1] - begun[name][1])

            return stop

        for name, module in modules.items():
            handles += [module.register_forward_pre_hook(begin(name)), module.register_forward_hook(end(name))]
        try:
            call()
        finally:
            for handle in handles:
                handle.remove()
        return spent, max(float(counter.get_total_flops()), 1.0)
