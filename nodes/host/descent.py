"""What the host only steps forward: keyframes of hooks (LoRA by schedule) and step caches (EasyCache, LazyCache).

They know one sampling, which goes down in noise once. Our techniques go up again (COW, Masked Regenerate), or ask for frames at
several levels in turn (Stream Frames).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .warnings import warn

# Where the stock nodes keep their cache in `transformer_options`, and the keys of the wrappers that reuse calls, by their node.
CACHE = "easycache"
CACHE_WRAPPERS = {"easycache": "EasyCache", "lazycache": "LazyCache", "slipstream_reuse": "Apply Call Reuse"}


def step_cache(options: dict[str, Any]) -> Any:
    """Return the MODEL's step cache, None without one."""
    return options.get("transformer_options", {}).get(CACHE)


def reusing_nodes(patcher: Any) -> list[str]:
    """Return the nodes whose wrappers on a MODEL leave out calls, by name."""
    keys = {key for by_key in patcher.wrappers.values() for key, found in by_key.items() if found}
    return [name for key, name in CACHE_WRAPPERS.items() if key in keys]


def without_step_cache(patcher: Any, node: str) -> Any:
    """Return the MODEL, or a clone without its step cache where it has one, with a warning of `node`.

    For techniques whose calls are no steps of one image: a cache would answer one frame with another's change.
    """
    names = reusing_nodes(patcher)
    if not names:
        return patcher
    warn(
        node,
        f"{' and '.join(names)} has no effect here: it knows the steps of one image only. Connect the MODEL from before it.",
    )
    clone = patcher.clone()
    clone.wrappers = {
        kind: {key: found for key, found in by_key.items() if key not in CACHE_WRAPPERS}
        for kind, by_key in patcher.wrappers.items()
    }
    transformer = {k: v for k, v in patcher.model_options.get("transformer_options", {}).items() if k != CACHE}
    clone.model_options = {**clone.model_options, "transformer_options": transformer}
    return clone


class Descent:
    """Starts keyframes and step caches again where the noise rises, so that each descent is a sampling of its own."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self.model, self.cache = model, step_cache(options)
        self.level: float | None = None

    def at(self, sigma: Tensor, entries: Iterable[dict[str, Any]]) -> None:
        """Take note of a network call at `sigma` (B,), of one level, with prepared conditioning `entries`."""
        hooks = [hook for e in entries if e.get("hooks") is not None for hook in e["hooks"].hooks]
        hooks = [hook for hook in hooks if not hook.hook_keyframe.is_empty()]
        if not hooks and self.cache is None:
            return
        before, self.level = self.level, float(sigma.flatten()[0])
        if before is not None and self.level <= before:
            return
        if self.cache is not None and before is not None:
            # Not its own reset(), which leaves a rate of 0 that makes it reuse at once.
            fresh = self.cache.clone().prepare_timesteps(self.model.model_sampling)
            vars(self.cache).update(vars(fresh))
        for hook in hooks:
            # Told that sampling begins here, the host takes the keyframe of this level, not the first one.
            hook.hook_keyframe.reset()
            hook.hook_keyframe.prepare_current_keyframe(sigma.flatten()[0], {"sample_sigmas": sigma.flatten()[:1]})
        if hooks and before is not None:
            self.model.current_patcher.clear_cached_hook_weights()
