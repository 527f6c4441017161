"""Probes of guidance: rows of several levels guided by us against each row guided by the host's own guider."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch


def ours(name: str) -> Any:
    package = importlib.import_module(__name__.rpartition(".")[0])
    return package.ours(name)


def by_kind(kinds: list[int], rows: int, factor: float) -> torch.Tensor:
    """Return (rows, 1, 1, 1): `factor` where a chunk holds negative rows, else 1."""
    scales = torch.tensor([factor if kind == 1 else 1.0 for kind in kinds])
    return scales.repeat_interleave(rows // len(kinds)).reshape(-1, 1, 1, 1)


def damped_function(apply: Any, given: dict[str, Any]) -> torch.Tensor:
    out = apply(given["input"], given["timestep"], **given["c"])
    return out * by_kind(given["cond_or_uncond"], len(out), 0.9).to(out)


def damped_call(execute: Any, *args: Any, **more: Any) -> Any:
    (options,) = (each for each in (*args, *more.values()) if isinstance(each, dict) and "cond_or_uncond" in each)
    out = execute(*args, **more)
    return out * by_kind(options["cond_or_uncond"], len(out), 0.8).to(out)


def damped_estimates(given: dict[str, Any]) -> list[torch.Tensor]:
    import comfy.samplers

    out = comfy.samplers.calc_cond_batch(
        given["model"], given["conds"], given["input"], given["sigma"], given["model_options"]
    )
    return [out[0], 0.7 * out[1]]


def stronger(executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any) -> Any:
    """Another cfg at high noise, as the stock CFG Override sets it."""
    guider = executor.class_obj
    before = guider.cfg
    guider.cfg = 5.0 if float(timestep[0]) > 2 else before
    try:
        return executor(x, timestep, *args)
    finally:
        guider.cfg = before


class Patch:
    """A MODEL with a patch that looks at rows or changes cfg, of kinds that stock nodes of some hosts lack."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "kind": (["function", "call", "estimates", "cfg"],)}}

    def patch(self, model: Any, kind: str) -> Any:
        from comfy.patcher_extension import WrappersMP

        patched = model.clone()
        if kind == "function":
            patched.set_model_unet_function_wrapper(damped_function)
        elif kind == "call":
            patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "probe", damped_call)
        elif kind == "estimates":
            patched.set_model_sampler_calc_cond_batch_function(damped_estimates)
        else:
            patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "probe", stronger)
        return (patched,)


class Guided:
    """Four rows at four levels, guided together and row by row by the host's CFGGuider; `plain` is the MODEL without the patch."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sockets = dict.fromkeys(("positive", "negative"), ("CONDITIONING",))
        return {"required": {"model": ("MODEL",), "plain": ("MODEL",), **sockets, "cfg": ("FLOAT", {})}}

    def run(self, model: Any, plain: Any, positive: Any, negative: Any, cfg: float) -> Any:
        guided = ours("core.guidance").guided
        run_on_model = ours("nodes.host.session").run_on_model

        def together(session: Any) -> torch.Tensor:
            conds = [session.conds[name].at(0) for name in ("positive", "negative")]
            x, sigma = self.rows(session)
            return guided(session.denoiser, x, sigma, *conds, cfg)

        def alone(session: Any) -> torch.Tensor:
            x, sigma = self.rows(session)
            return torch.cat([session.denoise(x[i : i + 1], sigma[i]) for i in range(len(x))])

        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        runs = {}
        for name, which, work in (("ours", model, together), ("host", model, alone), ("plain", plain, alone)):
            runs[name] = run_on_model(
                which, latent, work, rows=8, cfg_scale=cfg, positive=positive, negative=negative
            )  # fmt: skip
        report = {
            "difference": float((runs["ours"] - runs["host"]).abs().max()),
            "effect": float((runs["host"] - runs["plain"]).abs().max()),
        }
        return {"ui": {"report": [json.dumps(report)]}}

    @staticmethod
    def rows(session: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x, sigma) of four rows, of levels that neither rise nor fall."""
        space, top = session.denoiser.space, session.denoiser.sigma_max
        clean, noise = torch.randn(2, 4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        sigma = torch.tensor([0.2, 0.8, 0.1, 0.4]) * top
        device = session.denoiser.device
        return space.add_noise(0.5 * clean, noise, sigma).to(device), sigma.to(device)


NODES = {"ProbePatch": Patch, "ProbeGuided": Guided}
