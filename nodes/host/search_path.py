"""The search's path through the host: the user's GUIDER and SAMPLER, sampled as SamplerCustomAdvanced samples them."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...core.identity import Weights, identify, weights_digest
from ...core.layers import Layer, LayerMask
from ...core.lifetime import weakly
from ...core.noise import SeededNoise, StackedNoise
from ...core.reuse import CallReuse, ReuseSpan
from ...core.schedules import ALIGN_YOUR_STEPS, DiscreteLevels, align_your_steps, table_of
from ...search.paths import Trajectory, sampling_fields
from .denoiser import levels_of, noise_space
from .identity import entries_of, host_identity, original_weights, sampling_identity
from .layers import LayerSwitch
from .progress import check_interrupt
from .session import check_channels

WRAPPER_KEY = "slipstream_search"
# These take two ends from the sigmas and choose the steps between them.
OWN_STEPS = ("dpm_fast", "dpm_adaptive")


class HostPath:
    """A `SamplingPath` over GUIDER, SAMPLER and the size of a LATENT; the GUIDER's MODEL is cloned, never changed.

    Args:
        guider: any GUIDER; its conditioning is used as it is.
        sampler: SAMPLER.
        latent: LATENT, of which only the size matters.
        seed: where the noise of all pairs comes from.
        batch: most pairs sampled at once; halved when the device runs out of memory.
        positive: a CONDITIONING per prompt, which take the place of the guider's "positive"; pair i takes the one of number
            i modulo their number.
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
        self.users = guider
        self.switch = LayerSwitch(original, None if layers else ())
        self.model = self.switch.patched(original)
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, weakly(self._network_call))
        self.model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, WRAPPER_KEY, weakly(self._predict))
        self.guider = copy.copy(guider)
        self.guider.model_patcher, self.guider.model_options = self.model, self.model.model_options
        self.guider.original_conds = dict(guider.original_conds)
        self.positive = positive
        self.sampler, self.seed, self.batch = sampler, seed, batch
        samples = comfy.sample.fix_empty_latent_channels(original, latent["samples"])
        check_channels(original, samples)
        self.size = tuple(samples.shape[1:])
        self.sampling = original.get_model_object("model_sampling")
        self.calls = self.evaluations = 0
        self.watch: Trajectory | None = None
        self.listen: Callable[[int, int], None] | None = None  # gets the steps that are done, of all, while it samples
        self.share = 0, 0  # pairs that are sampled already, of how many
        self.spans: tuple[ReuseSpan, ...] = ()
        self.reuse = CallReuse(())

    def sample(
        self, sigmas: Tensor, pairs: Sequence[int], masks: Sequence[LayerMask] = (), watch: Trajectory | None = None,
        reuse: Sequence[ReuseSpan] = (),
    ) -> Tensor:  # fmt: skip
        """See `SamplingPath.sample`; latents are LATENT samples, unscaled."""
        import comfy.model_management

        self.switch.masks, self.spans = tuple(masks), tuple(reuse)
        done: list[tuple[Sequence[int], Tensor, Trajectory | None]] = []
        waiting = self._groups(pairs)
        try:
            while waiting:
                places = waiting[0][: self.batch]
                self.watch = None if watch is None else Trajectory([], [], [])
                self.share = sum(len(each) for each, _, _ in done), len(pairs)
                try:
                    done.append((places, self._batch(sigmas, [pairs[i] for i in places]), self.watch))
                except comfy.model_management.OOM_EXCEPTION:
                    if self.batch == 1:
                        raise
                    self.batch = max(self.batch // 2, 1)
                    continue
                waiting = [rest for rest in (waiting[0][self.batch :], *waiting[1:]) if rest]
        finally:
            self.switch.masks, self.watch, self.spans = (), None, ()
        if not done:
            return torch.zeros(0, *self.size)
        order = torch.tensor([i for places, _, _ in done for i in places]).argsort()
        if watch is not None:
            _merge([each for _, _, each in done if each is not None], order, watch)
        return torch.cat([samples for _, samples, _ in done])[order]

    def _groups(self, pairs: Sequence[int]) -> list[list[int]]:
        """Return the places of pairs that may be sampled together: those whose prompts have equal shapes."""
        groups: dict[Any, list[int]] = {}
        for place, pair in enumerate(pairs):
            groups.setdefault(self._kinds[pair % len(self._kinds)], []).append(place)
        return [[i] for i in range(len(pairs))] if draws_for_the_batch(self.sampler) else list(groups.values())

    @functools.cached_property
    def _kinds(self) -> list[Any]:
        return [None] if self.positive is None else [kind_of(prompt) for prompt in self.positive]

    def _batch(self, sigmas: Tensor, pairs: Sequence[int]) -> Tensor:
        sources = [SeededNoise(self.seed).fork(f"pair {i}") for i in pairs]
        noise = StackedNoise(sources)(torch.empty(len(pairs), *self.size))
        guider = copy.copy(self.guider)
        self.reuse = CallReuse(self.spans)
        if self.positive is not None:
            prompts = [self.positive[i % len(self.positive)] for i in pairs]
            guider.original_conds = {**self.guider.original_conds, "positive": joined(prompts)}
        seeds = [(self.seed + i) % 2**63 for i in pairs]
        sampler = with_noise_of_each(self.sampler, StackedNoise([s.fork("sampler") for s in sources]), seeds)
        with _global_seed(seeds[0]) if draws_for_the_batch(sampler) else nullcontext():
            samples = guider.sample(
                noise, torch.zeros_like(noise), sampler, sigmas, callback=self._callback(len(pairs)), disable_pbar=True, seed=seeds[0]
            )  # fmt: skip
        return samples.detach().float().cpu()

    def _callback(self, rows: int) -> Callable[..., None] | None:
        listen, (done, pairs) = self.listen, self.share
        return listen and (lambda i, denoised, x, total: listen(done * total + (i + 1) * rows, pairs * total))

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
        return self._identity

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        named = sampling_identity(self.users, self.sampler)
        prompts = None if self.positive is None else [entries_of(prompt) for prompt in self.positive]
        named["prompts"] = host_identity(prompts)
        return {
            "model": schedule_model(self.model, self.table(), self.sampling),
            "sampler": sampler_name(self.sampler),
            "cfg": float(getattr(self.guider, "cfg", 1.0)),
            "size": list(self.size),
            "conditioning": identify(named["conditioning"], named["prompts"]).digest[:16],
            "seed": self.seed,
            **sampling_fields(self, named),
        }


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _merge(parts: Sequence[Trajectory], order: Tensor, into: Trajectory) -> None:
    """Put what was seen of each batch together, in the order of the pairs."""
    into.sigmas += parts[0].sigmas
    for name in ("states", "denoised"):
        getattr(into, name).extend(torch.cat(level)[order] for level in zip(*(getattr(part, name) for part in parts)))


def descends(sigmas: Tensor) -> bool:
    """Whether a scheduler's answer can be sampled: finite, strictly descending, not below 0."""
    finite = bool(torch.isfinite(sigmas).all())
    return finite and len(sigmas) > 1 and bool((sigmas[1:] < sigmas[:-1]).all()) and float(sigmas[-1]) >= 0


def prompts_conditioning(clip: Any, text: str) -> list[Any]:
    """Return a CONDITIONING for each line of `text` that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines]


def kind_of(prompt: list[Any]) -> Any:
    """Return what must be equal for prompts to be rows of one batch: the shape of tensors with one row, and all the rest.

    A prompt with a mask of its tokens shares no batch with another: some families (Lumina2) count the tokens of all rows.
    """
    if any("attention_mask" in options for _, options in prompt):
        return host_identity(prompt).digest

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == 1:
            return tuple(value.shape), value.dtype
        if isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
            return tuple(kind(v) for v in value)
        return host_identity(value).digest

    return tuple(
        (kind(context), *((name, kind(options[name])) for name in sorted(options))) for context, options in prompt
    )


def joined(prompts: Sequence[list[Any]]) -> list[dict[str, Any]]:
    """Return prompts of one kind as one CONDITIONING with a row for each, in the form in which the host prepares it."""
    import comfy.sampler_helpers

    def together(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor) and first.ndim and len(first) == 1:
            return torch.cat(list(values))
        if isinstance(first, list) and first and all(isinstance(v, Tensor) for v in first):
            return [together(each) for each in zip(*values)]
        return first

    entries = [
        [together([context for context, _ in same]), {k: together([o[k] for _, o in same]) for k in same[0][1]}]
        for same in zip(*prompts)
    ]
    return comfy.sampler_helpers.convert_cond(entries)


def with_noise_of_each(sampler: Any, noise: StackedNoise, seeds: Sequence[int]) -> Any:
    """Return a SAMPLER that draws the noise of each row alone: a pair's result does not depend on its batch.

    Where the host's own choice is Brownian motion, each row has its own path. Samplers that take no noise are returned as they are.
    """
    import comfy.samplers
    from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler

    function, options = getattr(sampler, "sampler_function", None), getattr(sampler, "extra_options", {})
    if function is None or options.get("noise_sampler") is not None or "noise_sampler" not in _parameters(function):
        return sampler

    @functools.wraps(function)
    def sample(model: Any, x: Tensor, sigmas: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_brownian(function):
            low, high = sigmas[sigmas > 0].min(), sigmas.max()
            draw: Callable[..., Tensor] = BrownianTreeNoiseSampler(x, low, high, seed=list(seeds), cpu=True)
        else:
            draw = lambda *levels: noise(x)  # noqa: E731
        return function(model, x, sigmas, *args, **{**kwargs, "noise_sampler": draw})

    return comfy.samplers.KSAMPLER(sample, options, getattr(sampler, "inpaint_options", {}))


def draws_for_the_batch(sampler: Any) -> bool:
    """Whether a SAMPLER draws noise for all rows from the global generator: its pairs are sampled one by one, each seeded."""
    function, options = getattr(sampler, "sampler_function", None), getattr(sampler, "extra_options", {})
    return options.get("s_churn", 0) > 0 and "noise_sampler" not in _parameters(function)


def _parameters(function: Any) -> Sequence[str]:
    return list(inspect.signature(function).parameters) if callable(function) else []


def is_brownian(function: Any) -> bool:
    """Whether a sampler of the host, or one that it hands its work to, makes its noise of Brownian motion."""
    seen, waiting = set(), [function]
    while waiting:
        names = getattr(waiting[-1], "__code__", None)
        function = waiting.pop()
        if names is None or function in seen:
            continue
        seen.add(function)
        if "BrownianTreeNoiseSampler" in names.co_names:
            return True
        called = [function.__globals__.get(name) for name in names.co_names]
        waiting += [f for f in called if inspect.isfunction(f) and f.__module__ == function.__module__]
    return False


def sampler_name(sampler: Any) -> str:
    """Return a SAMPLER's name with its options: what a schedule is valid for."""
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return type(sampler).__name__
    name = function.__name__.removeprefix("sample_").removesuffix("_function")
    options = {k: v for k, v in getattr(sampler, "extra_options", {}).items() if isinstance(v, (int, float, str, bool))}
    return name + "".join(f" {k}={v}" for k, v in sorted(options.items()))


def described(model: Any) -> dict[str, Any]:
    """Return what a schedule file says of a MODEL."""
    sampling = model.get_model_object("model_sampling")
    table = getattr(sampling, "sigmas", torch.tensor([float(sampling.sigma_min), float(sampling.sigma_max)]))
    return schedule_model(model, table.detach().to("cpu", torch.float64).flatten(), sampling)


def schedule_model(model: Any, table: Tensor, sampling: Any) -> dict[str, Any]:
    """Return what a schedule file says of a MODEL: name, hash, class, prediction, sigma_min, sigma_max and shift.

    The hash covers LoRA patches.
    """
    network = model.model.diffusion_model
    found = weights_digest(weight for name, weight in original_weights(model) if name.startswith("diffusion_model."))
    if model.patches:
        patches = identify(Weights({key: model.patches[key] for key in sorted(model.patches)}))
        found = hashlib.sha256((found + patches.digest).encode()).hexdigest()[:16]
    return {
        "name": _named(getattr(model.model, "model_config", model.model)),
        "hash": found,
        "class": type(network).__name__,
        "prediction": "flow" if noise_space(sampling).name == "flow" else prediction_name(sampling),
        "sigma_min": float(table[0]),
        "sigma_max": float(table[-1]),
        "shift": float(sampling.shift) if isinstance(getattr(sampling, "shift", None), (int, float)) else None,
    }


def _named(config: Any) -> str:
    """Return the name that Load Model gave a folder, else the class of the host's description."""
    return getattr(config, "label", None) or type(config).__name__


def prediction_name(sampling: Any) -> str:
    names = [base.__name__ for base in type(sampling).__mro__]
    known = {"V_PREDICTION": "v_prediction", "X0": "sample", "EPS": "epsilon"}
    return next((known[n] for n in names if n in known), "epsilon")
