"""edit(): the sampling loop with regional guidance, shared attention, regional noise and time travel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.attention import Attend, AttentionHook
from ..core.checks import check_finite
from ..core.denoiser import Cond, Denoiser, Rows
from ..core.guidance import guided
from ..core.noise import NoiseSource, SeededNoise
from ..core.progress import Callback, Reporter
from .config import IMAGE_PROMPT, KEYS, NOISE, EditConfig, steps_in
from .drafted import drafts, prepare_draft, sample_draft
from .guided import GuidedEdit, prepare
from .invert import Inversion, check_inversions, check_model, denoise_on_device, device_of
from .parts import Energy, KeyValue
from .pixels import EditResult, Encode
from .tasks import Task, Tasks

log = logging.getLogger(__name__)


@dataclass
class _Run:
    """One edit under way: the model(s), conditioning and settings that every step reads."""

    model: Any
    image_model: Any
    problem: GuidedEdit
    conds: list[Rows]
    sigmas: Tensor
    report: Reporter
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> EditConfig:
        return self.problem.config

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            log.warning(text)


def edit(
    model: Denoiser[Cond],
    inversion: Inversion[Cond],
    tasks: Task | Tasks | Iterable[Task],
    cond: Cond | None = None,
    uncond: Cond | None = None,
    config: EditConfig | None = None,
    noise: NoiseSource | None = None,
    image_model: Denoiser[Cond] | None = None,
    callback: Callback | None = None,
    encode: Encode | None = None,
) -> EditResult:
    """Edit a photo that `invert` returned, by the mode it was inverted for: `config.mode` "draft" takes an inverted one too.

    Mode fine (DiffEditor, arXiv 2402.02583) is `prepare`, then `sample_edit`; mode draft is `prepare_draft`, then `sample_draft`.

    Args:
        inversion: what `invert` returned, with the same config.
        tasks: one task, or several that add up.
        encode: the VAE's encoder, see `prepare`.
    """
    config = config or EditConfig()
    if drafts(inversion, config):
        drafted = prepare_draft(tasks, inversion, config, encode)
        return sample_draft(model, drafted, inversion.cond if cond is None else cond, uncond, noise, callback)
    check_model(model)
    problem = prepare(tasks, inversion, config, encode)
    return sample_edit(model, problem, cond, uncond, noise, image_model, callback)


def sample_edit(
    model: Denoiser[Cond],
    problem: GuidedEdit,
    cond: Cond | None = None,
    uncond: Cond | None = None,
    noise: NoiseSource | None = None,
    image_model: Denoiser[Cond] | None = None,
    callback: Callback | None = None,
) -> EditResult:
    """Sample a prepared edit.

    Args:
        cond: one row, the prompt of the result; the inversion's when left out.
        uncond: one row; without it, or with cfg_scale 1, there is no classifier-free guidance and half the rows.
        image_model: the same network with an image prompt (an IP-Adapter), used from 20 to 40 % of the steps only.
        callback: called after each network call, `problem.calls` times; may raise to stop.

    Raises:
        ValueError: for a schedule other than the inversions', and models that `invert` refuses.
    """
    check_model(model)
    config = problem.config
    with torch.inference_mode(False), torch.no_grad():
        sigmas = config.sigmas(model.levels).cpu()
        check_inversions(problem.inversions, config, sigmas)
        positive: Rows = problem.base.cond if cond is None else cond
        conds: list[Rows] = [positive] if uncond is None else [uncond, positive]
        run = _Run(model, image_model or model, problem, conds, sigmas, Reporter(problem.calls, callback))
        run.notes += problem.layout.notes
        if config.energy_scale > 0 and not any(i >= problem.first_step for i in config.guided):
            run.note(
                f"None of the {config.steps} steps is guided, so `energy_scale` has no effect. Use more steps, or set it to 0."
            )
        x = _sample(run, noise or SeededNoise(0))
        check_finite("result", x, "Lower `energy_scale`, or use float32 or bfloat16 for the network.")
        return problem.result(x, tuple(run.notes))


def _sample(run: _Run, noise: NoiseSource) -> Tensor:
    problem, config, sigmas, space = run.problem, run.config, run.sigmas, run.model.space
    noisy, eta = steps_in(NOISE, config.steps), config.eta * problem.regions.free
    vacated = noise.fork("vacated")(problem.clean)
    x = problem.start(vacated)
    for step in range(problem.first_step, config.steps):
        high, low = sigmas[step], sigmas[step + 1]
        for again in reversed(range(config.passes(step))):
            denoised = _estimate(run, x, step)
            fresh = noise(x) if step in noisy and config.eta > 0 else None
            after = space.step(x, denoised, high, low, eta, fresh)
            if step in config.guided:
                # The energies move the denoised estimate; the step's direction stays the network's own.
                guidance = _guidance(run, x, step, space.noise_of(x, denoised, high))
                after = after - space.scale(low) / space.scale(high) * high * guidance
            after = problem.put_back(step, after, vacated)
            run.report("edit", low, denoised)
            if again:
                x = _rerun(run, after, step)
        x = after
    return x


def _rerun(run: _Run, x: Tensor, step: int) -> Tensor:
    """Return `x` one level up again by a deterministic step, without guidance, bank or image prompt (time travel)."""
    low, high = run.sigmas[step + 1], run.sigmas[step]
    denoised = denoise_on_device(run.model, x, low, run.conds[-1])
    run.report("rewind", high, denoised)
    return run.model.space.step(x, denoised, low, high)


def _estimate(run: _Run, x: Tensor, step: int) -> Tensor:
    """Return the denoised estimate under classifier-free guidance, the decoder's self-attention shared with the images."""
    config, sigma = run.config, run.sigmas[step]
    model = run.image_model if step in steps_in(IMAGE_PROMPT, config.steps) else run.model
    uncond, cond = run.conds[0] if len(run.conds) > 1 else None, run.conds[-1]
    hook: AttentionHook | None = None
    if step in steps_in(KEYS, config.steps):
        hook = _reader(run.problem, [_keys_of(run, inversion, step) for inversion in run.problem.inversions])
    device = device_of(model)
    with nullcontext() if hook is None else model.self_attention(hook):
        level = sigma.to(device, torch.float32)
        return guided(model, x.to(device), level, cond, uncond, config.cfg_scale).to(x.device)


def _keys_of(run: _Run, inversion: Inversion, step: int) -> Callable[[str, Tensor], KeyValue]:
    """Return (layer, like) -> an image's keys and values at a step: from its bank, or from a network row of its own."""
    bank = inversion.bank
    if bank is not None and inversion.has_keys(step):
        return lambda layer, like: bank.get(step, layer, like)
    kept: dict[str, KeyValue] = {}

    def record(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        kept[layer] = k, v
        return attend(q, k, v)

    x, sigma = inversion.network_row(step)
    with run.model.self_attention(record):
        denoise_on_device(run.model, x, sigma, inversion.cond.reference(float(sigma)))
    return lambda layer, like: kept[layer]


def _reader(problem: GuidedEdit, banks: Sequence[Callable[[str, Tensor], KeyValue]]) -> AttentionHook:
    """Return a hook by which rows of the edit, however many a host makes of them, read the images' keys and values."""

    def hook(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        return problem.attend(q, k, v, [bank(layer, k) for bank in banks], attend)

    return hook


def _guidance(run: _Run, x: Tensor, step: int, eps: Tensor) -> Tensor:
    """Return the guidance added to eps: regional gradients of the energies with respect to latents of variance 1."""
    sigma = run.sigmas[step]
    references = []
    for inversion in run.problem.inversions:
        references.append(inversion.features(run.model, step))
        run.report("compare", sigma)
    gradients, energies = regional_gradients(run, x, sigma, references)
    run.report("guide", sigma)
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        run.note(
            "The energy's gradient was not finite in places; it was left out there. Use float32 if the result looks wrong."
        )
        gradients = [torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in gradients]
    return run.problem.guidance(gradients, energies, eps)


def regional_gradients(
    run: _Run, x: Tensor, sigma: Tensor, references: list[list[Tensor]]
) -> tuple[list[Tensor], list[Energy]]:
    """Return the gradient of each energy with respect to latents of variance 1, all from one graph through the decoder features."""
    # A host executes under inference mode, where no graph can be built: leave it, and copy what was made in it.
    with torch.inference_mode(False), torch.enable_grad():
        device = device_of(run.model)
        deviation = float(run.model.space.deviation(sigma))
        z = (x / deviation).detach().to(device, copy=True).requires_grad_(True)
        level = sigma.to(device, copy=True).expand(len(x))
        cond = run.problem.base.cond.reference(float(sigma))
        features = run.model.features(z * deviation, level, cond, checkpoint=run.config.checkpoint)
        # Energies are cheap and their masks live on the CPU.
        current = [f.to("cpu", torch.float32) for f in features]
        kept = [[f.to("cpu", torch.float32, copy=True) for f in maps] for maps in references]
        energies = run.problem.energies(current, kept)
        gradients = [
            torch.autograd.grad(e.value, z, retain_graph=n + 1 < len(energies), allow_unused=True)[0]
            for n, e in enumerate(energies)
        ]
    return [torch.zeros_like(x) if g is None else g.detach().to(x) for g in gradients], energies
