"""Skipping blocks of a network: which can be left out, what each costs, at which noise levels, and a call without some of them.

A skipped residual block of a U-Net is its shortcut, any other block gives back what came in (AutoDiffusion, arXiv 2309.10438).
Blocks are found by how the network is built and by what they return, never by the names of their classes, so that the same
code serves diffusers' U-Nets, those with the original module names (ADM, the host's models), and transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .taps import Handler, routed

RESIDUAL, ATTENTION, TRANSFORMER = "residual", "attention", "transformer"
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Least cosine of a transformer block's output with its input: 0.57 and more in 34 families of the host's, about 0 for one that
# adds nothing to its input, as those that compute modulation.
ADDS = 0.2


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


@dataclass(frozen=True)
class LayerMask:
    """Blocks to skip while sigma_low < sigma <= sigma_high, so that samplers with several calls per step keep their mask."""

    sigma_high: float
    sigma_low: float
    skip: tuple[str, ...]

    def holds(self, sigma: float) -> bool:
        """Whether a network call at `sigma` is inside; both ends allow for float32 rounding."""
        return self.sigma_low * (1 + 1e-5) < sigma <= self.sigma_high * (1 + 1e-5)


def skipped_at(masks: Sequence[LayerMask], sigma: float) -> frozenset[str]:
    """Return the blocks to skip in a network call at `sigma`."""
    return frozenset(name for mask in masks if mask.holds(sigma) for name in mask.skip)


@runtime_checkable
class LayerModel(Protocol):
    """A model whose blocks can be skipped."""

    def layers(self, *args: Any) -> tuple[Layer, ...]:
        """Return the blocks that can be skipped, in the order in which the network calls them."""
        ...

    def skipping(self, names: Collection[str]) -> AbstractContextManager[None]:
        """Leave the named blocks out of every network call of this thread in the `with` block."""
        ...


@dataclass(frozen=True)
class Returned:
    """What a block returns: `wrap` (tuple, list or None) around the arguments `keys`, with something added to each.

    `similarity` is the highest cosine of an argument before and after.
    """

    wrap: Callable[[Any], Any] | None
    keys: tuple[int | str | None, ...]
    similarity: float

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of a call in the place of its result."""
        given = _named(args, kwargs)
        values = tuple(None if key is None else given[key] for key in self.keys)
        return self.wrap(values) if self.wrap else values[0]


# By module and form of its call (positional arguments, names of the others); None where it returns none of its arguments.
_returned: WeakKeyDictionary[nn.Module, dict[tuple[int, frozenset[str]], Returned | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Block:
    """A module that may be skipped, by its kind: "residual" or "attention" of a U-Net, or "transformer"."""

    module: nn.Module
    kind: str

    def skip(self, call: Handler, *args: Any, **kwargs: Any) -> Any:
        """Give what comes out when the block is left out; a handler of `core.taps`.

        A transformer's block is computed the first time that it is met, to see which of its arguments it returns.
        """
        if self.kind == RESIDUAL:
            return _shortcut(self.module, args[0])
        if self.kind == ATTENTION:
            return args[0] if kwargs.get("return_dict", True) else args[:1]
        form = len(args), frozenset(kwargs)
        if form not in _returned.get(self.module, {}):
            # A block may write to its arguments.
            copies = [t.clone() if isinstance(t, Tensor) else t for t in (*args, *kwargs.values())]
            self.watch(call, *copies[: len(args)], **dict(zip(kwargs, copies[len(args) :])))
        returned = _returned[self.module][form]
        if returned is None:
            raise ValueError(
                f"Expected `skip` to name blocks that return their inputs in the same shapes, but got a {type(self.module).__name__}, "
                "which returns something else. Search the layer mask with this model."
            )
        return returned.of(args, kwargs)

    def watch(self, call: Handler, *args: Any, **kwargs: Any) -> Any:
        """Compute the block and note which of its arguments it returns; a handler of `core.taps`."""
        if self.kind != TRANSFORMER:
            return call(*args, **kwargs)
        before = {key: value.clone() for key, value in _named(args, kwargs).items() if isinstance(value, Tensor)}
        output = call(*args, **kwargs)
        _returned.setdefault(self.module, {})[len(args), frozenset(kwargs)] = _arguments_in(output, before)
        return output

    @property
    def adds(self) -> bool:
        """Whether it was always seen to return its arguments with something added, so that leaving it out makes sense."""
        return all(found and found.similarity > ADDS for found in _returned.get(self.module, {}).values())


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    return {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]


def _arguments_in(output: Any, given: dict[int | str, Tensor]) -> Returned | None:
    """Return which of the tensors `given` each part of `output` goes back to: the most similar one of its shape."""
    wrap = type(output) if type(output) in (tuple, list) else None
    keys: list[int | str | None] = []
    best = -1.0
    for part in output if wrap else [output]:
        same = {k: _similarity(part, v) for k, v in given.items() if k not in keys and _shape(v) == _shape(part)}
        if part is not None and not same:
            return None
        keys.append(max(same, key=lambda key: same[key], default=None))
        best = max(best, *same.values(), -1.0)
    return Returned(wrap, tuple(keys), best)


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _similarity(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0))


def blocks_of(root: nn.Module) -> dict[str, Block]:
    """Return the outermost blocks below `root` that may be skipped, by module path, in registration order.

    A network with residual blocks is a U-Net: its blocks are those and its attention. Any other network's blocks are the
    modules that it holds in lists.
    """
    unet = any(_kind(module) == RESIDUAL for module in root.modules() if module is not root)
    return dict(_outermost(root, "", unet, False))


def _kind(module: Any) -> str:
    if hasattr(module, "skip_connection") or hasattr(module, "conv_shortcut"):
        return RESIDUAL
    projected = hasattr(module, "proj_out") and (hasattr(module, "proj_in") or hasattr(module, "qkv"))
    return ATTENTION if projected or getattr(module, "residual_connection", False) else TRANSFORMER


def _outermost(module: nn.Module, prefix: str, unet: bool, listed: bool) -> Iterator[tuple[str, Block]]:
    for name, child in module.named_children():
        path, is_list = f"{prefix}{name}", isinstance(child, LISTS)
        kind = _kind(child) if unet else TRANSFORMER
        if kind != TRANSFORMER or (listed and not unet and not is_list and next(child.children(), None) is not None):
            yield path, Block(child, kind)
        else:
            yield from _outermost(child, f"{path}.", unet, is_list)


def skippable(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the `blocks_of` a network."""
    return ((name, block.module) for name, block in blocks_of(root).items())


def _shortcut(block: Any, x: Tensor) -> Tensor:
    if hasattr(block, "skip_connection"):  # ADM and the host: the resampling is `x_upd`
        return block.skip_connection(block.x_upd(x) if getattr(block, "updown", False) else x)
    for resample in (block.upsample, block.downsample):
        x = x if resample is None else resample(x)
    x = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return x / block.output_scale_factor


def chosen(blocks: Mapping[str, Block], names: Collection[str]) -> dict[str, Block]:
    """Return the blocks of `names`; raises ValueError for one that is not there."""
    for name in sorted(names):
        if name not in blocks:
            raise ValueError(
                f"Expected a layer mask for this model, but got one that names {name!r}. It was made for another model; "
                f"this one has {len(blocks)} blocks that can be skipped, such as {next(iter(blocks), None)!r}."
            )
    return {name: blocks[name] for name in names}


def skipping(root: nn.Module, names: Collection[str]) -> AbstractContextManager[None]:
    """Within the context the named blocks of `root` are left out, in calls of this thread."""
    return routed({block.module: block.skip for block in chosen(blocks_of(root), names).values()})


def measure(root: nn.Module, call: Callable[[], Any]) -> tuple[Layer, ...]:
    """Return the blocks of `root` that can be skipped, with their share of one network `call()`, in the order of that call."""
    blocks = blocks_of(root)
    return measured(blocks, call, lambda handlers: routed({blocks[name].module: h for name, h in handlers.items()}))


def measured(
    blocks: Mapping[str, Block],
    call: Callable[[], Any],
    route: Callable[[dict[str, Handler]], AbstractContextManager[None]],
) -> tuple[Layer, ...]:
    """Return the `blocks` that can be skipped, as `measure` does; `route` sends their calls to handlers. Calls twice."""
    full, total = _profile({name: block.watch for name, block in blocks.items()}, call, route)
    skips = {name: blocks[name].skip for name in full if blocks[name].adds}
    rest, _ = _profile(skips, call, route)
    layers = [
        Layer(name, blocks[name].kind, (full[name][0] - rest[name][0]) / total, full[name][1])
        for name in full
        if name in rest
    ]
    return tuple(layer for layer in layers if layer.cost > 0)


def _profile(
    handlers: dict[str, Handler],
    call: Callable[[], Any],
    route: Callable[[dict[str, Handler]], AbstractContextManager[None]],
) -> tuple[dict[str, tuple[float, float]], float]:
    """Return ({name: (floating-point operations, seconds)} in call order, operations in all) of one `call()`."""
    spent: dict[str, tuple[float, float]] = {}

    def clocked(name: str, block: Handler, *args: Any, **kwargs: Any) -> Any:
        flops, seconds = counter.flops, time.perf_counter()
        output = handlers[name](block, *args, **kwargs)
        before = spent.get(name, (0.0, 0.0))
        spent[name] = before[0] + counter.flops - flops, before[1] + time.perf_counter() - seconds
        return output

    with torch.no_grad(), route({name: partial(clocked, name) for name in handlers}), _Flops() as counter:
        call()
    return spent, max(counter.flops, 1.0)


class _Flops(TorchDispatchMode):
    """Counts floating-point operations of this thread. PyTorch's own counter hooks the modules of every thread."""

    flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is None:
            with self:  # what an operation of several does inside
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        return output
