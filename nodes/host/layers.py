"""Skipping blocks of the host's MODEL: each block asks the calling thread's requests, by object patches on a clone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ...core import layers, taps
from ...core.layers import Block, Layer, LayerMask, chosen, skipped_at

WRAPPER_KEY = "slipstream_layers"
# One architecture under its two names, that of diffusers and the host's.
UNETS = {"UNet2DConditionModel", "UNetModel"}


class LayerSwitch:
    """Blocks of a MODEL that are left out by `masks`, which may change between samplings.

    A network call whose rows are at several levels leaves out only what all of them may miss. Composes with a switch that the
    MODEL has already.

    Args:
        model: MODEL.
        names: blocks that may be switched; None = all. Raises ValueError for a name the model does not have.
    """

    def __init__(self, model: Any, names: Collection[str] | None = None) -> None:
        self.masks: Sequence[LayerMask] = ()
        known = blocks_of(model)
        self.blocks = chosen({name: block for name, (_, block) in known.items()}, known if names is None else names)
        self._paths = {name: path for name, (path, _) in known.items()}

    def patched(self, model: Any) -> Any:
        """Return a clone of the MODEL with the switch in it; the MODEL itself is not changed."""
        from comfy.patcher_extension import WrappersMP

        clone = model.clone()
        for name in self.blocks:
            key = f"diffusion_model.{self._paths[name]}.forward"
            clone.add_object_patch(key, self._switched(name, model.get_model_object(key)))
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, self._call)
        return clone

    def _switched(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: taps.through((self, name), forward)(*args, **kwargs)

    def routed(self, handlers: dict[str, taps.Handler]) -> AbstractContextManager[None]:
        """Within the context, calls of the named blocks by this thread go to `handlers` of `core.taps`."""
        return taps.requested({(self, name): handler for name, handler in handlers.items()})

    def measured(self, sample: Callable[[], Any]) -> tuple[Layer, ...]:
        """Return the blocks that can be skipped with their cost in one `sample()` of the model; see `core.layers.measured`."""
        return layers.measured(self.blocks, sample, self.routed)

    def _call(self, execute: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        levels = torch.unique(t.detach().float().flatten()).tolist() if self.masks else []
        sets = [skipped_at(self.masks, sigma) for sigma in levels]
        skipped = frozenset.intersection(*sets) if sets else frozenset()
        with self.routed({name: self.blocks[name].skip for name in skipped}):
            return execute(x, t, *args, **kwargs)


def blocks_of(model: Any) -> dict[str, tuple[str, Block]]:
    """Return {name: (module path below `diffusion_model`, block)} of the blocks that may be skipped.

    The name is diffusers' where the host knows it, so that a mask searched here fits the library's model and the reverse.
    """
    names = diffusers_names(model)
    found = layers.blocks_of(model.model.diffusion_model)
    return {names.get(path, path): (path, block) for path, block in found.items()}


def diffusers_names(model: Any) -> dict[str, str]:
    """Return {the host's module path: diffusers' module path} of the residual and attention blocks of a U-Net."""
    import comfy.utils

    config = getattr(getattr(model.model, "model_config", None), "unet_config", None) or {}
    try:
        keys = comfy.utils.unet_to_diffusers(config)
    except (KeyError, TypeError, IndexError):  # a network that the table was not written for
        return {}
    found = {}
    for theirs, ours in keys.items():
        if ".resnets." in theirs or ".attentions." in theirs:
            depth = 3 if theirs.startswith("mid_block") else 4
            found[".".join(ours.split(".")[: depth - 1])] = ".".join(theirs.split(".")[:depth])
    return found


def with_masks(model: Any, masks: Sequence[LayerMask], made_for: str = "") -> Any:
    """Return a clone of MODEL that samples with `masks`; the MODEL itself when there are none.

    Raises ValueError for masks that name blocks which the MODEL does not have, or whose network was of another class
    (`made_for`; "" = unknown).
    """
    if not masks:
        return model
    network = type(model.model.diffusion_model).__name__
    if made_for and network != made_for and not {network, made_for} <= UNETS:
        raise ValueError(
            f"Expected a layer mask for this model ({network}), but got one for {made_for}. Search the layer mask with this model."
        )
    switch = LayerSwitch(model, {name for mask in masks for name in mask.skip})
    switch.masks = tuple(masks)
    return switch.patched(model)
