"""The search's path through the host: the user's GUIDER and SAMPLER, sampled as SamplerCustomAdvanced samples them."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.layers import Layer, LayerMask
from ...core.noise import SeededNoise, StackedNoise
from ...core.reuse import CallReuse, ReuseSpan
from ...core.schedules import ALIGN_YOUR_STEPS, DiscreteLevels, align_your_steps, table_of
from ...search.digests import digest, weights_digest
from ...search.paths import Trajectory
from .denoiser import levels_of, noise_space
from .layers import LayerSwitch
from .progress import check_interrupt

WRAPPER_KEY = "slipstream_search"
# These take two ends from the sigmas and choose the steps between them by themselves.
OWN_STEPS = ("dpm_fast", "dpm_adaptive")


class HostPath:
    """A `SamplingPath` over GUIDER, SAMPLER and the size of a LATENT; the GUIDER's MODEL is cloned, never changed.

    Args:
        guider: any GUIDER; its conditioning is used as it is.
        sampler: SAMPLER.
        latent: LATENT, of which only the size matters.
        seed: where the noise of all pairs comes from.
        batch: most pairs sampled at once; halved when the device runs out of memory.
        positive: CONDITIONING with one row per prompt that takes the place of the guider's "positive"; pair i takes row
            i modulo the rows.
        layers: whether blocks will be skipped.
    """

    def __init__(
        self, guider: Any, sampler: Any, latent: dict[str, Any], seed: int = 0, batch: int = 16,
        positive: list[Any] | None = None, layers: bool = False,
    ) -> None:  # fmt: skip
        import comfy.sample
        from comfy.patcher_extension import WrappersMP

        if sampler_name(sampler).split()[0] in OWN_STEPS:
            raise ValueError(
                f"Expected `sampler` to follow its sigmas, but got {sampler_name(sampler)!r}, which chooses its own steps. "
                "Use euler, dpmpp_2m or another one."
            )
        original = guider.model_patcher
        self.switch = LayerSwitch(original, None if layers else ())
        self.model = self.switch.model
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, self._network_call)
        self.model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, WRAPPER_KEY, self._predict)
        self.guider = copy.copy(guider)
        self.guider.model_patcher, self.guider.model_options = self.model, self.model.model_options
        self.guider.original_conds = dict(guider.original_conds)
        self.positive = positive
        self.sampler, self.seed, self.batch = sampler, seed, batch
        samples = comfy.sample.fix_empty_latent_channels(original, latent["samples"])
        self.size = tuple(samples.shape[1:])
        self.sampling = original.get_model_object("model_sampling")
        self.calls = self.evaluations = 0
        self.watch: Trajectory | None = None
        self.spans: tuple[ReuseSpan, ...] = ()
        self.reuse = CallReuse(())

    def sample(
        self, sigmas: Tensor, pairs: Sequence[int], masks: Sequence[LayerMask] = (), watch: Trajectory | None = None,
        reuse: Sequence[ReuseSpan] = (),
    ) -> Tensor:  # fmt: skip
        """See `SamplingPath.sample`; latents are LATENT samples, unscaled."""
        import comfy.model_management

        parts, pairs = [], list(pairs)
        self.switch.masks, self.watch, self.spans = tuple(masks), watch, tuple(reuse)
        try:
            while pairs:
                try:
                    parts.append(self._batch(sigmas, pairs[: self.batch]))
                    pairs = pairs[self.batch :]
                except comfy.model_management.OOM_EXCEPTION:
                    if self.batch == 1:
                        raise
                    self.batch = max(self.batch // 2, 1)
        finally:
            self.switch.masks, self.watch, self.spans = (), None, ()
        return torch.cat(parts) if parts else torch.zeros(0, *self.size)

    def _batch(self, sigmas: Tensor, pairs: Sequence[int]) -> Tensor:
        noise = StackedNoise([SeededNoise(self.seed).fork(f"pair {i}") for i in pairs])(
            torch.empty(len(pairs), *self.size)
        )
        guider = copy.copy(self.guider)
        self.reuse = CallReuse(self.spans)
        if self.positive is not None:
            guider.original_conds = {**self.guider.original_conds, "positive": rows_of(self.positive, pairs)}
        # A sampler that draws noise of its own gets the seed of its first pair: the same for every candidate.
        seed = (self.seed + pairs[0]) % 2**63
        samples = guider.sample(noise, torch.zeros_like(noise), self.sampler, sigmas, disable_pbar=True, seed=seed)
        return samples.detach().float().cpu()

    def _network_call(self, execute: Any, *args: Any, **kwargs: Any) -> Tensor:
        check_interrupt()
        self.calls += 1
        return execute(*args, **kwargs)

    def _predict(self, execute: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            denoised = execute(x, sigma, *args, **kwargs)
            self.evaluations += 1
            if self.watch is not None:
                self.watch.record(x, float(sigma.flatten()[0]), denoised)
            return denoised

        return self.reuse(denoise, x, timestep) if self.spans else denoise(x, timestep)

    def table(self) -> Tensor:
        """Return the model's levels, ascending (T,)."""
        sigmas = getattr(self.sampling, "sigmas", None)
        if sigmas is None:
            return table_of(levels_of(self.sampling))
        return sigmas.detach().to("cpu", torch.float64).flatten()

    def stock(self, steps: int) -> dict[str, Tensor]:
        """Return what the host's scheduler list and its Align Your Steps node give at this length."""
        import comfy.samplers

        found = {}
        for name in comfy.samplers.SCHEDULER_NAMES:
            try:
                sigmas = comfy.samplers.calculate_sigmas(self.sampling, name, steps).float().cpu()
            except (ArithmeticError, IndexError, ValueError):  # some cannot do so few steps
                continue
            if descends(sigmas):
                found[name] = sigmas
        levels = levels_of(self.sampling)
        if isinstance(levels, DiscreteLevels) and math.isclose(levels.sigma_max, 14.6146, rel_tol=1e-3):
            found |= {name: align_your_steps(levels, steps, name) for name in ALIGN_YOUR_STEPS}
        return found

    def layers(self) -> tuple[Layer, ...]:
        """Return the blocks that can be skipped, measured in one sampling of one step."""
        sigmas = torch.tensor([float(self.sampling.sigma_max), 0.0])
        found = self.switch.measured(lambda: self._batch(sigmas, [0]))
        if not found:
            raise ValueError(
                "Expected a model with blocks that can be skipped to search layers, but this one has none. Turn layers off."
            )
        return found

    def identity(self) -> dict[str, Any]:
        """See `SamplingPath.identity`."""
        table = self.table()
        return {
            "model": model_identity(self.model, table, self.sampling),
            "sampler": sampler_name(self.sampler),
            "cfg": float(getattr(self.guider, "cfg", 1.0)),
            "size": list(self.size),
            "conditioning": conditioning_hash(self.guider.original_conds, self.positive),
            "seed": self.seed,
        }


def descends(sigmas: Tensor) -> bool:
    """Whether a scheduler's answer can be sampled: finite, strictly descending, not below 0."""
    finite = bool(torch.isfinite(sigmas).all())
    return finite and len(sigmas) > 1 and bool((sigmas[1:] < sigmas[:-1]).all()) and float(sigmas[-1]) >= 0


def rows_of(conditioning: list[Any], pairs: Sequence[int]) -> list[dict[str, Any]]:
    """Return the host's prepared form of a CONDITIONING with one row per pair."""
    import comfy.sampler_helpers

    rows = [i % len(conditioning[0][0]) for i in pairs]
    taken = []
    for context, options in conditioning:
        pooled = options.get("pooled_output")
        picked = {**options} if pooled is None else {**options, "pooled_output": pooled[rows]}
        taken.append([context[rows], picked])
    return comfy.sampler_helpers.convert_cond(taken)


def prompts_conditioning(clip: Any, text: str) -> list[Any]:
    """Return a CONDITIONING with one row for each line of `text` that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(line))[0] for line in lines]
    tokens = math.lcm(*(context.shape[1] for context, _ in encoded))
    context = torch.cat([c.repeat(1, tokens // c.shape[1], 1) for c, _ in encoded])
    options = dict(encoded[0][1])
    if isinstance(options.get("pooled_output"), Tensor):
        options["pooled_output"] = torch.cat([o["pooled_output"] for _, o in encoded])
    return [[context, options]]


def sampler_name(sampler: Any) -> str:
    """Return a SAMPLER's name with its options: what a schedule is valid for."""
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return type(sampler).__name__
    name = function.__name__.removeprefix("sample_").removesuffix("_function")
    options = {k: v for k, v in getattr(sampler, "extra_options", {}).items() if isinstance(v, (int, float, str, bool))}
    return name + "".join(f" {k}={v}" for k, v in sorted(options.items()))


def model_identity(model: Any, table: Tensor, sampling: Any) -> dict[str, Any]:
    """Return name, hash, class, prediction, sigma_min, sigma_max and shift of a MODEL; the hash covers LoRA patches."""
    network = model.model.diffusion_model
    found = weights_digest(original_weights(model))
    if model.patches:
        patched = hashlib.sha256(found.encode())
        for key in sorted(model.patches):
            for patch in model.patches[key]:
                patched.update(repr((key, patch[0], patch[2])).encode())
                patched.update(digest(*list(tensors_in(patch[1]))[:4]).encode())
        found = patched.hexdigest()[:16]
    return {
        "name": type(getattr(model.model, "model_config", model.model)).__name__,
        "hash": found,
        "class": type(network).__name__,
        "prediction": "flow" if noise_space(sampling).name == "flow" else prediction_name(sampling),
        "sigma_min": float(table[0]),
        "sigma_max": float(table[-1]),
        "shift": float(sampling.shift) if isinstance(getattr(sampling, "shift", None), (int, float)) else None,
    }


def prediction_name(sampling: Any) -> str:
    names = [base.__name__ for base in type(sampling).__mro__]
    known = {"V_PREDICTION": "v_prediction", "X0": "sample", "EPS": "epsilon"}
    return next((known[n] for n in names if n in known), "epsilon")


def original_weights(model: Any) -> Iterator[Tensor]:
    """Yield each parameter as loaded from its file, also while patches are applied to it."""
    for name, parameter in model.model.diffusion_model.named_parameters():
        backup = model.backup.get(f"diffusion_model.{name}")
        yield parameter if backup is None else getattr(backup, "weight", backup)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors inside a patch, whatever form the host keeps it in."""
    if isinstance(value, Tensor):
        flat = value.detach().flatten()
        yield flat[:: max(1, len(flat) // 64)][:64]
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "weights"):
        yield from tensors_in(value.weights)


def conditioning_hash(conds: dict[str, list[dict[str, Any]]], positive: list[Any] | None) -> str:
    """Return a hash of all prompts, by their embeddings."""
    found = hashlib.sha256()
    entries = [(name, entry) for name in sorted(conds) for entry in conds[name]]
    if positive is not None:
        entries = [(n, e) for n, e in entries if n != "positive"]
        entries += [("positive", {"cross_attn": c, **o}) for c, o in positive]
    for name, entry in entries:
        found.update(name.encode())
        for part in ("cross_attn", "pooled_output"):
            if isinstance(entry.get(part), Tensor):
                found.update(digest(entry[part]).encode())
        found.update(repr(sorted(k for k in entry if k != "uuid")).encode())
    return found.hexdigest()[:16]
