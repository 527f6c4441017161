"""A search's result and a schedule's provenance as text."""

from __future__ import annotations

from .engine import SearchResult
from .schedule import Schedule
from .space import Candidate, candidate_of


def result_text(result: SearchResult) -> str:
    """Return what was found, what it cost, and the held-out scores of all stock schedules."""
    schedule = result.schedule
    assert schedule.objective is not None
    lines = [
        f"{schedule.name}: sigmas {_levels(schedule)}",
        f"{result.evaluations} schedules tried in {result.calls} network calls, {result.seconds:.1f} s; "
        f"{result.evaluated_now} evaluations in this run, those on held-out images included",
        "",
        f"held-out score ({schedule.objective['id']}, lower is better):",
    ]
    scores = {**result.baselines, "* this schedule": schedule.objective["value"]}
    lines += [f"  {name:<20} {score:.5g}" for name, score in sorted(scores.items(), key=lambda pair: pair[1])]
    for mask in schedule.masks:
        lines.append(f"skips {', '.join(mask.skip)} for sigma {mask.sigma_low:.4g} to {mask.sigma_high:.4g}")
    if schedule.reuse:
        made = candidate_of(schedule.levels, reuse=schedule.reuse)
        lines.append(f"calls the model at sigma {', '.join(f'{s:.4g}' for s in made.knots[:-1])}; {_continued(made)}")
    if result.profile:
        others = ", ".join(f"{calls}: {100 * error:.2g} %" for calls, error in result.profile)
        lines += ["", f"difference to the full run by calls of the model, before any search: {others}"]
    return "\n".join([*lines, *(f"note: {w}" for w in result.warnings)])


def _continued(made: Candidate) -> str:
    others = made.steps + 1 - len(made.knots)
    text = f"the other {others} steps reuse these calls" if others else "every step combines the last calls"
    return text + (" with fitted coefficients" if made.weights else "")


def schedule_text(schedule: Schedule) -> str:
    """Return levels, what it was made for, its score and its source."""
    made = [
        f"model {schedule.model.get('name')}" if schedule.model.get("name") else "",
        f"sampler {schedule.sampler}" if schedule.sampler else "",
        f"cfg {schedule.cfg_scale:g}" if schedule.cfg_scale is not None else "",
    ]
    score = ""
    if schedule.objective:
        others = schedule.objective.get("baselines") or {}
        best = min(others, key=lambda n: others[n], default="")
        score = f"{schedule.objective['id']}: {schedule.objective['value']:.5g}"
        score += f" (best stock schedule: {best} {others[best]:.5g})" if best else ""
    lines = [
        schedule.name,
        f"{schedule.steps} steps: {_levels(schedule)}",
        "for " + ", ".join(m for m in made if m) if any(made) else "",
        score,
        f"source: {schedule.source}" if schedule.source else "",
        *(f"note: {w}" for w in schedule.warnings),
    ]
    return "\n".join(line for line in lines if line)


def _levels(schedule: Schedule) -> str:
    return ", ".join(f"{s:.4g}" for s in schedule.levels)
