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
from ..core.denoiser import Denoiser, Rows
from ..core.guidance import guided
from ..core.noise import NoiseSource, SeededNoise
from ..core.progress import Callback, Reporter
from .config import IMAGE_PROMPT, KEYS, NOISE, EditConfig, steps_in
from .guided import Encode, GuidedEdit
from .invert import Inversion, check_inversions, check_model, denoise_on_device, device_of
from .parts import KeyValue, Pull
from .picture import EditResult
from .tasks import Task, Tasks

log = logging.getLogger(__name__)


@dataclass
class _Run:
    """One edit under way: the model(s), conditioning and settings that every step reads."""

    model: Any
    image_model: Any
    problem: GuidedEdit
    conds: list[Rows]
    config: EditConfig
    sigmas: Tensor
    report: Reporter
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            log.warning(text)


def edit(
    model: Denoiser,
    inversion: Inversion,
    tasks: Task | Tasks | Iterable[Task],
    cond: Rows | None = None,
    uncond: Rows | None = None,
    config: EditConfig | None = None,
    noise: NoiseSource | None = None,
    image_model: Denoiser | None = None,
    callback: Callback | None = None,
    encode: Encode | None = None,
) -> EditResult:
    """Edit an inverted picture (DiffEditor, arXiv 2402.02583).

    Args:
        inversion: what `invert` returned, with the same config.
        tasks: one task, or several that add up.
        cond: one row, the prompt of the result; the inversion's when left out.
        uncond: one row; without it, or with cfg_scale 1, there is no classifier-free guidance and half the rows.
        image_model: the same network with an image prompt (an IP-Adapter), used within `config.image_prompt` only.
        callback: called after each network call; may raise to stop.
        encode: the VAE's encoder (IMAGE at the picture's size -> latents). With it, and inversions that know their pixels, objects
            are carried in pixels and then encoded, which keeps them sharper than carrying latent cells.

    Raises:
        ValueError: for tasks that lie outside the picture or contradict each other, masks of another size, a schedule other
            than the inversion's, and models that `invert` refuses.
    """
    config, tasks = config or EditConfig(), Tasks.of(tasks)
    check_model(model)
    with torch.inference_mode(False), torch.no_grad():
        return _edit(model, inversion, tasks, cond, uncond, config, noise, image_model, callback, encode)


def _edit(model, inversion, tasks, cond, uncond, config, noise, image_model, callback, encode):  # type: ignore[no-untyped-def]
    sigmas = config.sigmas(model.levels).cpu()
    problem = GuidedEdit(tasks.items, inversion, config, encode)
    check_inversions(problem.pictures, config, sigmas)
    positive = inversion.cond if cond is None else cond
    conds = [positive] if uncond is None else [uncond, positive]
    run = _Run(model, image_model or model, problem, conds, config, sigmas, Reporter(_calls(config, problem), callback))
    run.notes += problem.notes
    if config.energy_scale > 0 and not any(i >= problem.first_step for i in config.guided):
        run.note(
            f"None of the {config.steps} steps is guided, so `energy_scale` has no effect. Use more steps, or set it to 0."
        )
    x = _sample(run, noise or SeededNoise(42))
    check_finite("result", x, "Lower `energy_scale`, or use float32 or bfloat16 for the network.")
    return problem.result(x, tuple(run.notes))


def network_calls(tasks: Task | Tasks | Iterable[Task], inversion: Inversion, config: EditConfig) -> int:
    """Return the number of reports that `edit` will make, for a progress bar."""
    return _calls(config, GuidedEdit(Tasks.of(tasks).items, inversion, config))


def _calls(config: EditConfig, problem: GuidedEdit) -> int:
    """Return the number of reported calls of a run."""
    steps = range(problem.first_step, config.steps)
    guided = sum(config.passes(i) for i in steps if i in config.guided) * (1 + len(problem.pictures))
    return sum(2 * config.passes(i) - 1 for i in steps) + guided  # one call leads back up between two passes


def _sample(run: _Run, noise: NoiseSource) -> Tensor:
    config, sigmas, problem, space = run.config, run.sigmas, run.problem, run.model.space
    x = problem.start(noise)
    for step in range(problem.first_step, config.steps):
        high, low = sigmas[step], sigmas[step + 1]
        for again in reversed(range(config.passes(step))):
            denoised = _estimate(run, x, step)
            fresh = noise(x) if step in steps_in(NOISE, config.steps) and config.eta > 0 else None
            after = space.step(x, denoised, high, low, problem.noise_strength, fresh)
            if step in config.guided:
                # The energies move the denoised estimate; the step's direction stays the network's own.
                guidance = _guidance(run, x, step, space.noise_of(x, denoised, high))
                after = after - space.scale(low) / space.scale(high) * high * guidance
            after = problem.settle(step, after)
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
    """Return the denoised estimate under classifier-free guidance, the decoder's self-attention shared with the pictures."""
    config, sigma = run.config, run.sigmas[step]
    model = run.image_model if step in steps_in(IMAGE_PROMPT, config.steps) else run.model
    uncond, cond = run.conds[0] if len(run.conds) > 1 else None, run.conds[-1]
    hook: AttentionHook | None = None
    if step in steps_in(KEYS, config.steps):
        hook = _reader(run.problem, [_keys_of(run, picture, step) for picture in run.problem.pictures])
    device = device_of(model)
    with nullcontext() if hook is None else model.self_attention(hook):
        level = sigma.to(device, torch.float32)
        return guided(model, x.to(device), level, cond, uncond, config.cfg_scale).to(x.device)


def _keys_of(run: _Run, picture: Inversion, step: int) -> Callable[[str, Tensor], KeyValue]:
    """Return (layer, like) -> a picture's keys and values at a step: from its bank, or from a network row of its own."""
    bank = picture.bank
    if bank is not None and picture.has_keys(step):
        return lambda layer, like: bank.get(step, layer, like)
    kept: dict[str, KeyValue] = {}

    def record(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        kept[layer] = k, v
        return attend(q, k, v)

    x, sigma = picture.network_row(step)
    with run.model.self_attention(record):
        denoise_on_device(run.model, x, sigma, picture.cond.reference(float(sigma)))
    return lambda layer, like: kept[layer]


def _reader(problem: GuidedEdit, banks: Sequence[Callable[[str, Tensor], KeyValue]]) -> AttentionHook:
    """Return a hook by which rows of the edit, however many a host makes of them, read the pictures' keys and values."""

    def hook(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        return problem.attend(q, k, v, [bank(layer, k) for bank in banks], attend)

    return hook


def _guidance(run: _Run, x: Tensor, step: int, eps: Tensor) -> Tensor:
    """Return the guidance added to eps: regional gradients of the energies with respect to variance-preserving latents."""
    sigma = run.sigmas[step]
    references = []
    for index in range(len(run.problem.pictures)):
        references.append(run.problem.pictures[index].features(run.model, step))
        run.report("compare", sigma)
    gradients, pulls = regional_gradients(run, x, sigma, references)
    run.report("guide", sigma)
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        run.note(
            "The energy's gradient was not finite in places; it was left out there. Use float32 if the result looks wrong."
        )
        gradients = [torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in gradients]
    return run.problem.scale(gradients, pulls, eps)


def regional_gradients(
    run: _Run, x: Tensor, sigma: Tensor, references: list[list[Tensor]]
) -> tuple[list[Tensor], list[Pull]]:
    """Return the gradient of each energy with respect to latents of variance 1, all from one graph through the decoder features."""
    # A host executes under inference mode, where no graph can be built: leave it, and copy what was made in it.
    with torch.inference_mode(False), torch.enable_grad():
        device = device_of(run.model)
        deviation = float(run.model.space.deviation(sigma))
        z = (x / deviation).detach().to(device, copy=True).requires_grad_(True)
        level = sigma.to(device, copy=True).expand(len(x))
        cond = run.problem.pictures[0].cond.reference(float(sigma))
        features = run.model.features(z * deviation, level, cond, checkpoint=run.config.checkpoint)
        # Energies are cheap and their masks live on the CPU.
        current = [f.to("cpu", torch.float32) for f in features]
        pulls = run.problem.pulls(
            current, [[f.to("cpu", torch.float32, copy=True) for f in maps] for maps in references]
        )
        gradients = [
            torch.autograd.grad(p.energy, z, retain_graph=n + 1 < len(pulls), allow_unused=True)[0]
            for n, p in enumerate(pulls)
        ]
    return [torch.zeros_like(x) if g is None else g.detach().to(x) for g in gradients], pulls
