"""Call reuse on the host's MODEL: keyed wrappers around a guider's prediction, so that cond and uncond are reused as one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.reuse import CallReuse
from ...search.schedule import Schedule
from .descent import reusing_nodes
from .search_path import described, sampler_name
from .warnings import owned, warn

WRAPPER_KEY = "slipstream_reuse"
NODE = "Apply Call Reuse"


def with_reuse(model: Any, schedule: Schedule) -> Any:
    """Return a clone of MODEL whose samplings reuse calls as `schedule` states; the MODEL itself when it has no reuse.

    Everything between the sampler and the prediction is left out in a reused call: guidance, ControlNet, LoRA and patches took
    part in the calls that it continues. Raises ValueError for a MODEL that reuses calls already.
    """
    from comfy.patcher_extension import WrappersMP

    if not schedule.reuse:
        warn(
            NODE,
            "`schedule` has no reuse, so the model is unchanged: each step calls it. Search with `computed` below `steps`, and with "
            "more `evaluations`.",
        )
        return model
    others = reusing_nodes(model)
    if others:
        raise ValueError(
            f"Expected `model` without call reuse, but got one from {' and '.join(others)}. Two of them reuse each other's guesses: "
            "remove one."
        )
    for text in schedule.mismatches(described(model)):
        warn(NODE, f"{text}.")
    clone = model.clone()
    sampling = functools.partial(_sample, schedule, owned(warn))
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, sampling)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, WRAPPER_KEY, _predict)
    return clone


def _sample(schedule: Schedule, warn: Callable[[str, str], None], execute: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Wrap one whole sampling: its calls share one `CallReuse`, which ends with it."""
    import comfy.model_patcher

    sigmas = args[3] if len(args) > 3 else kwargs.get("sigmas")
    if not follows(sigmas, schedule.sigmas):
        warn(
            NODE,
            "the sampler's sigmas are not those of `schedule`, so its reuse was not searched for them. Connect Load Schedule's sigmas.",
        )
    sampler = args[2] if len(args) > 2 else kwargs.get("sampler")
    if any(span.weights for span in schedule.reuse) and sampler_name(sampler) != "euler":
        warn(
            NODE,
            f"the sampler is {sampler_name(sampler)}, but the coefficients of `schedule` take the place of a solver's own. Use euler.",
        )
    guider = execute.class_obj
    before = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(before)
    guider.model_options.setdefault("transformer_options", {})[WRAPPER_KEY] = CallReuse(schedule.reuse)
    try:
        return execute(*args, **kwargs)
    finally:
        guider.model_options = before


def _predict(execute: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Wrap one prediction of a guider: made, or continued from earlier ones."""
    options = args[0] if args else kwargs.get("model_options", {})
    reuse = options.get("transformer_options", {}).get(WRAPPER_KEY)
    if reuse is None:  # not inside a sampling of the host
        return execute(x, timestep, *args, **kwargs)
    return reuse(lambda x, sigma: execute(x, sigma, *args, **kwargs), x, timestep)


def follows(sigmas: Tensor | None, levels: Tensor) -> bool:
    """Whether `sigmas` are the `levels` of a schedule or its lower end, as image to image takes it."""
    if sigmas is None or len(sigmas) > len(levels):
        return False
    return torch.allclose(sigmas.detach().float().cpu(), levels[-len(sigmas) :], rtol=1e-3, atol=1e-6)
