"""Guidance as the host makes it: its cfg, and every patch that acts around the network (RescaleCFG, PAG, APG, SAG, CFG Override).

Such patches look at one batch at one level (most read `sigma[0]`), and some run the network themselves. So rows are guided in
groups of one level, each as the host's own guider would guide it.
"""

from __future__ import annotations

import dis
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .warnings import warn

# Functions that a patch puts around the network, by the host's names in `model_options`.
BEFORE, COMBINE, AFTER = "sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function"
CALCULATE = "sampler_calc_cond_batch_function"
# Set where a patch or a sampler needs the negative estimate at scale 1 too.
BOTH = "disable_cfg1_optimization"

Entries = list[dict[str, Any]]


def wrappers(options: dict[str, Any]) -> list[Callable[..., Tensor]]:
    """Return the wrappers around a guider's prediction (CFG Override, LazyCache)."""
    from comfy.patcher_extension import WrappersMP, get_all_wrappers

    found: list[Callable[..., Tensor]] = get_all_wrappers(WrappersMP.PREDICT_NOISE, options, is_model_options=True)
    return found


def acts(options: dict[str, Any], guider: Any = None) -> bool:
    """Whether a guided estimate is more than cfg of two estimates; wrappers count where a `guider` is there to be wrapped."""
    functions = any(options.get(name) for name in (BEFORE, COMBINE, AFTER, CALCULATE, BOTH))
    return functions or (guider is not None and bool(wrappers(options)))


def acts_on(patcher: Any) -> bool:
    """Whether something acts around the network of a MODEL that is not being sampled yet."""
    from comfy.patcher_extension import WrappersMP

    return acts(patcher.model_options) or bool(patcher.wrappers.get(WrappersMP.PREDICT_NOISE))


def asks_negative(patcher: Any, cfg_scale: float) -> bool:
    """Whether a sampling on a MODEL asks the negative prompt: at scale 1 a patch may want it, or set another scale (CFG Override)."""
    from comfy.patcher_extension import WrappersMP

    wrapped = bool(patcher.wrappers.get(WrappersMP.PREDICT_NOISE))
    return cfg_scale != 1 or bool(patcher.model_options.get(BOTH)) or wrapped


def asks_itself(options: dict[str, Any], guider: Any = None) -> bool:
    """Whether the estimates must come from the host's own call for each level: what is around it reads or replaces that call."""
    return bool(options.get(CALCULATE) or options.get(BOTH)) or (guider is not None and bool(wrappers(options)))


def remembers(function: Any) -> bool:
    """Whether a patch keeps a value of its own from call to call (APG's running average, which a momentum of 0 switches off)."""
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    kept = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_DEREF"} & {*code.co_freevars}
    return bool(kept) and inspect.getclosurevars(function).nonlocals.get("momentum", 1) != 0


def warn_of_patches(node: str, patcher: Any, guidance: str, frames: bool = False) -> None:
    """Warn of patches around the network that `node` cannot do right: by row of a stream, or without the negative prompt's call."""
    options = patcher.model_options
    around = [*options.get(BEFORE, []), options.get(COMBINE), *options.get(AFTER, [])]
    for function in around if frames else ():
        if remembers(function):
            warn(
                node,
                f"{_name(function)} keeps a running average from call to call, which mixes frames here. Set its momentum to 0, or "
                "connect the MODEL from before it.",
            )
    if guidance in ("self", "onetime") and options.get(CALCULATE):
        warn(
            node,
            f"{_name(options[CALCULATE])} acts on the call of the negative prompt, which `{guidance}` leaves out. Choose the guidance "
            "full, or connect the MODEL from before it.",
        )


def _name(function: Any) -> str:
    """Return the node that made a patch, as far as its code tells."""
    return getattr(function, "__qualname__", type(function).__name__).split(".")[0]


@dataclass(frozen=True)
class Group:
    """Rows of one level to be guided together.

    `cond` and `uncond` are prepared entries with one row per row of `x`; `estimates` are (positive, negative or None) where they
    are known; `negative` takes the place of the negative estimate.
    """

    model: Any
    x: Tensor
    sigma: Tensor
    cond: Entries
    uncond: Entries | None
    cfg_scale: float
    estimates: Sequence[Tensor | None] | None = None
    negative: Tensor | None = None

    def predict(self, options: dict[str, Any], guider: Any = None, seed: int | None = None) -> Tensor:
        """Return the guided estimate inside the wrappers of a guider's prediction, which may change the guider's cfg."""
        from comfy.patcher_extension import WrapperExecutor

        around = [] if guider is None else wrappers(options)
        if not around:
            return self.guided(options)

        def predict(x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None = None) -> Tensor:
            return replace(self, x=x, sigma=timestep, cfg_scale=guider.cfg).guided(model_options)

        before, guider.cfg = guider.cfg, self.cfg_scale
        try:
            executor = WrapperExecutor.new_class_executor(predict, guider, around)
            found: Tensor = executor.execute(self.x, self.sigma, options, seed)
            return found
        finally:
            guider.cfg = before

    def guided(self, options: dict[str, Any]) -> Tensor:
        """Return the guided estimate with the functions in `options` around it."""
        import comfy.samplers

        group = self
        if math.isclose(self.cfg_scale, 1.0) and not options.get(BOTH):
            group = replace(self, uncond=None, negative=None)
        conds = [group.cond, group.uncond]
        estimates = group._estimates(conds, options)
        shown = {"input": self.x, "sigma": self.sigma, "model": self.model, "model_options": options}
        for function in options.get(BEFORE, []):
            estimates = function(
                {**shown, "conds": conds, "conds_out": estimates, "cond_scale": self.cfg_scale, "timestep": self.sigma}
            )
        guided: Tensor = comfy.samplers.cfg_function(
            self.model, estimates[0], estimates[1], self.cfg_scale, self.x, self.sigma, model_options=options,
            cond=conds[0], uncond=conds[1],
        )  # fmt: skip
        return guided

    def _estimates(self, conds: list[Entries | None], options: dict[str, Any]) -> list[Tensor]:
        """Return [positive, negative]; as in the host, an estimate that nobody asked for is zero."""
        import comfy.samplers

        if self.estimates is not None:
            found = [self.x.new_zeros(self.x.shape) if e is None else e for e in self.estimates]
        else:
            # A patch on the MODEL may read the negative prompt's call (SAG) though its estimate is given.
            both = self.negative is None or self.model.current_patcher.model_options.get(BOTH)
            asked = conds if both else [conds[0], None]
            if options.get(CALCULATE):
                given = {"conds": asked, "input": self.x, "sigma": self.sigma, "model": self.model}
                found = list(options[CALCULATE]({**given, "model_options": options}))
            else:
                found = comfy.samplers.calc_cond_batch(self.model, asked, self.x, self.sigma, options)
        if self.negative is not None:
            found[1] = self.negative
        elif self.uncond is None and self.estimates is not None:
            found[1] = self.x.new_zeros(self.x.shape)
        return found
