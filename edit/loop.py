"""edit(): the sampling loop with regional guidance, shared attention, regional noise and time travel."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.attention import Attend, AttentionBank
from ..core.checks import check_finite
from ..core.denoiser import Denoiser, Rows
from ..core.guidance import cfg
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
    conds = [positive] if uncond is None or config.cfg_scale == 1 else [uncond, positive]
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
    config, sigmas = run.config, run.sigmas
    x = run.problem.start(noise)
    noisy = steps_in(NOISE, config.steps)
    for step in range(run.problem.first_step, config.steps):
        for again in reversed(range(config.passes(step))):
            denoised, eps = _estimate(run, x, step)
            guidance = _guidance(run, x, step, eps) if step in config.guided else torch.zeros_like(x)
            fresh = noise(x) if step in noisy and config.eta > 0 else None
            after = _step(
                x, denoised - sigmas[step] * guidance, eps, sigmas[step], sigmas[step + 1], run.problem, fresh
            )
            after = run.problem.settle(step, after)
            run.report("edit", sigmas[step + 1], denoised)
            if again:
                x = _rerun(run, after, step)
        x = after
    return x


def _step(
    x: Tensor, denoised: Tensor, eps: Tensor, high: Tensor, low: Tensor, problem: GuidedEdit, fresh: Tensor | None
) -> Tensor:
    """Step down along the *unguided* `eps` from the guided `denoised`, with fresh noise where the edit asks for it.

    DDIM with a variance per cell (arXiv 2010.02502 eq. 12 and 16).
    """
    if fresh is None:
        return denoised + low * eps
    added = problem.noise_strength.to(x) * (low / high) * (high**2 - low**2).clamp(min=0).sqrt()
    return denoised + (low**2 - added**2).clamp(min=0).sqrt() * eps + added * fresh


def _rerun(run: _Run, x: Tensor, step: int) -> Tensor:
    """Return `x` one level up again by a deterministic inversion step, without guidance, bank or image prompt (time travel)."""
    low, high = run.sigmas[step + 1], run.sigmas[step]
    denoised = denoise_on_device(run.model, x, low, run.conds[-1])
    run.report("rewind", high, denoised)
    return x + (high - low) * (x - denoised) / low


def _estimate(run: _Run, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return (denoised, eps) under classifier-free guidance, the decoder's self-attention shared with the pictures."""
    config, sigma = run.config, run.sigmas[step]
    image_prompt = step in steps_in(IMAGE_PROMPT, config.steps)
    model = run.image_model if image_prompt else run.model
    rows, conds = [x] * len(run.conds), list(run.conds)
    if step not in steps_in(KEYS, config.steps):
        out = _call(model, rows, sigma, conds)
    else:
        out = _call_sharing(run, model, rows, sigma, conds, step)
    denoised = out[0] if len(run.conds) == 1 else cfg(out[0], out[1], config.cfg_scale)
    return denoised, (x - denoised) / sigma


def _call(model: Denoiser, rows: Sequence[Tensor], sigma: Tensor, conds: Sequence[Rows]) -> list[Tensor]:
    cond = conds[0].join(*conds[1:]) if len(conds) > 1 else conds[0]
    return list(denoise_on_device(model, torch.cat(list(rows)), sigma, cond).split(1))


def _call_sharing(
    run: _Run, model: Any, rows: list[Tensor], sigma: Tensor, conds: list[Rows], step: int
) -> list[Tensor]:
    """Call the network while its decoder reads the pictures' keys and values: from their banks, or from extra rows of this batch."""
    own = len(rows)
    stored: dict[int, AttentionBank] = {}
    live: list[int] = []
    for index, picture in enumerate(run.problem.pictures):
        if picture.has_keys(step):
            assert picture.bank is not None
            stored[index] = picture.bank
        elif picture.at(0).shape == rows[0].shape:
            live.append(index)
            rows, conds = [*rows, picture.network_row(step)[0].to(rows[0])], [*conds, picture.cond]
        else:
            stored[index] = _recorded(run.model, picture, step)

    def hook(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        kept: dict[int, KeyValue] = {i: bank.get(step, layer, k) for i, bank in stored.items()}
        kept.update({index: (k[own + n, None], v[own + n, None]) for n, index in enumerate(live)})
        pictures = [kept[i] for i in range(len(kept))]
        edited = run.problem.attend(q[:own], k[:own], v[:own], pictures, attend)
        return edited if not live else torch.cat([edited, attend(q[own:], k[own:], v[own:])])

    with model.self_attention(hook):
        return _call(model, rows, sigma, conds)[:own]


def _recorded(model: Any, picture: Inversion, step: int) -> AttentionBank:
    """Return one step's keys and values of a picture of another size, by a call of its own."""
    bank = AttentionBank(budget=1 << 62)
    x, sigma = picture.network_row(step)
    with model.self_attention(bank.recorder(step)):
        denoise_on_device(model, x, torch.tensor(sigma), picture.cond)
    return bank


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
    """Return the gradient of each energy, all from one graph: the latents are differentiated through the decoder features."""
    # A host executes under inference mode, where no graph can be built: leave it, and copy what was made in it.
    with torch.inference_mode(False), torch.enable_grad():
        device = device_of(run.model)
        z = (x / (1 + sigma**2).sqrt()).detach().to(device, copy=True).requires_grad_(True)
        level = sigma.to(device, copy=True).expand(len(x))
        seen = z * (1 + level**2).sqrt()
        features = run.model.features(seen, level, run.problem.pictures[0].cond, checkpoint=run.config.checkpoint)
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
