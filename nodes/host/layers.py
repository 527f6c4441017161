"""Skipping blocks of the host's MODEL: bypasses as object patches on a clone, switched by sigma in a keyed wrapper."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.layers import bypass, skippable
from ...search.schedule import LayerMask, skipped_at

WRAPPER_KEY = "slipstream_layers"


class LayerSwitch:
    """A clone of a MODEL whose blocks are left out where `masks` say so; `masks` may change between samplings.

    The given MODEL is not changed. A network call whose rows are at several levels leaves out only what all of them may
    miss. Composes with a switch that the MODEL has already.

    Args:
        model: MODEL.
        names: blocks that may be switched; None = all. Raises ValueError for a name the model does not have.
    """

    def __init__(self, model: Any, names: Collection[str] | None = None) -> None:
        from comfy.patcher_extension import WrappersMP

        self.masks: Sequence[LayerMask] = ()
        self.skipped: frozenset[str] = frozenset()
        self.model = model.clone()
        known = blocks_of(model)
        for name in sorted(known if names is None else names):
            if name not in known:
                raise ValueError(
                    f"Expected a layer mask for this model, but got one that names {name!r}. "
                    f"It was made for another model; this one has {len(known)} blocks such as {next(iter(known), None)!r}."
                )
            path, block = known[name]
            key = f"diffusion_model.{path}.forward"
            self.model.add_object_patch(key, self._switched(name, model.get_model_object(key), bypass(block)))
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, self._call)

    def _switched(self, name: str, forward: Callable[..., Any], shortcut: Callable[..., Any]) -> Callable[..., Any]:
        def switched(*args: Any, **kwargs: Any) -> Any:
            return (shortcut if name in self.skipped else forward)(*args, **kwargs)

        return switched

    def _call(self, execute: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        levels = torch.unique(t.detach().float().flatten()).tolist() if self.masks else []
        sets = [skipped_at(self.masks, sigma) for sigma in levels]
        self.skipped = frozenset.intersection(*sets) if sets else frozenset()
        try:
            return execute(x, t, *args, **kwargs)
        finally:
            self.skipped = frozenset()


def blocks_of(model: Any) -> dict[str, tuple[str, torch.nn.Module]]:
    """Return {name: (module path below `diffusion_model`, module)} of the blocks that can be skipped; none for transformers.

    The name is diffusers' where the host knows it, so that a mask searched here fits the library's model and the reverse.
    """
    names = diffusers_names(model)
    return {names.get(path, path): (path, block) for path, block in skippable(model.model.diffusion_model)}


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


def with_masks(model: Any, masks: Sequence[LayerMask]) -> Any:
    """Return a clone of MODEL that samples with `masks`; the MODEL itself when there are none."""
    if not masks:
        return model
    switch = LayerSwitch(model, {name for mask in masks for name in mask.skip})
    switch.masks = tuple(masks)
    return switch.model
