"""Settings of an edit. Whatever the published code counted in steps of 50 is a fraction of the steps here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..core.checks import check_choice, check_integer, check_range
from ..core.schedules import SCHEDULES, DiscreteLevels, Levels, make_sigmas

Span = tuple[float, float]
MEMORY = ("auto", "bank", "row")


def steps_in(span: Span, steps: int) -> range:
    """Return the step numbers within a pair of fractions, the end excluded."""
    return range(round(span[0] * steps), round(span[1] * steps))


@dataclass(frozen=True)
class EditConfig:
    """Settings of `invert` and `edit` (DiffEditor, arXiv 2402.02583; DragonDiffusion, arXiv 2307.02421).

    Attributes:
        steps: steps of the inversion and of the edit. 16 is the fast setting.
        cfg_scale: classifier-free guidance of the edit.
        energy_scale: strength of the feature guidance; 0 turns it off. In the default mode the root mean square of the guidance
            relative to that of the noise estimate, in `published` mode the published slider.
        w_edit, w_content, w_contrast, w_inpaint: weights of the energies.
        guide, dense: fractions of the steps guided at all (every second one), and guided at each step.
        keys: fractions in which the decoder's self-attention reads the inverted picture's keys and values.
        noise_span, eta: fractions and strength of fresh noise within the edited region.
        travel, travel_passes: fractions in which every second step is repeated, and how often.
        image_prompt: fractions in which a model with an image prompt is used.
        anchor, anchor_object: fractions in which everything outside the edit follows the inverted picture, and the moved object
            follows its moved inversion. `anchor_fill`: fractions in which a vacated area follows the smooth fill from around it.
        own_keys: attention reads the own tokens beside the picture's.
        limit: largest guidance relative to the noise estimate.
        feather: soft edge of the edit, in pixels of the picture.
        memory: "bank" keeps keys and values in host memory, "row" recomputes them as an extra batch row, "auto" chooses by
            `memory_limit` bytes.
        checkpoint: recompute activations in the gradient pass (less memory, a third more time).
        published: reproduce the published code, slips included. For comparison only.
    """

    steps: int = 50
    schedule: str = "leading"
    cfg_scale: float = 2.0
    energy_scale: float = 0.1
    w_edit: float = 4.0
    w_content: float = 6.0
    w_contrast: float = 0.2
    w_inpaint: float = 0.8
    guide: Span = (0.0, 0.6)
    dense: Span = (0.0, 0.2)
    keys: Span = (0.1, 1.0)
    noise_span: Span = (0.22, 0.4)
    eta: float = 0.4
    travel: Span = (0.44, 0.6)
    travel_passes: int = 3
    image_prompt: Span = (0.2, 0.4)
    anchor: Span = (0.0, 1.0)
    anchor_object: Span = (0.0, 0.9)
    anchor_fill: Span = (0.0, 0.4)
    own_keys: bool = True
    limit: float = 1.0
    feather: int = 4
    memory: str = "auto"
    memory_limit: int = 4 << 30
    checkpoint: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1, 1000)
        check_choice("schedule", self.schedule, SCHEDULES)
        for name, high in (("cfg_scale", 100), ("energy_scale", 1000), ("eta", 1), ("limit", 100)):
            check_range(name, getattr(self, name), 0, high)
        for name in ("w_edit", "w_content", "w_contrast", "w_inpaint"):
            check_range(name, getattr(self, name), 0, 1000)
        for name in (
            "guide",
            "dense",
            "keys",
            "noise_span",
            "travel",
            "image_prompt",
            "anchor",
            "anchor_object",
            "anchor_fill",
        ):
            _check_span(name, getattr(self, name))
        check_integer("travel_passes", self.travel_passes, 1, 20)
        check_integer("feather", self.feather, 0, 1000)
        check_choice("memory", self.memory, MEMORY)
        check_integer("memory_limit", self.memory_limit, 0)

    @classmethod
    def fast(cls, **changes: Any) -> EditConfig:
        """Return the 16-step setting."""
        return cls(**{"steps": 16, **changes})

    @classmethod
    def as_published(cls, task: str, **changes: Any) -> EditConfig:
        """Return the published defaults of "move", "drag", "appearance", "paste" or "landmarks" (demo of DiffEditor)."""
        check_choice("task", task, PUBLISHED)
        return cls(**{"published": True, **PUBLISHED[task], **changes})

    def replace(self, **changes: Any) -> EditConfig:
        return replace(self, **changes)

    def sigmas(self, levels: Levels) -> Tensor:
        """Return the descending levels (steps + 1,) of the run; the published one ends at the first training level, not at 0."""
        sigmas = make_sigmas(self.schedule, levels, self.steps)
        if self.published:
            sigmas[-1] = float(levels.sigma_min) if isinstance(levels, DiscreteLevels) else 0.0
        return sigmas

    @property
    def guided(self) -> frozenset[int]:
        """Steps with feature guidance: all within `dense`, every second one within `guide`."""
        if self.energy_scale == 0:
            return frozenset()
        dense = steps_in(self.dense, self.steps)
        return frozenset(i for i in steps_in(self.guide, self.steps) if i % 2 == 0 or i in dense)

    def passes(self, step: int) -> int:
        """Return how often a step is run (time travel); the published code travels only when it guides."""
        travels = step % 2 == 0 and step in steps_in(self.travel, self.steps) and self.energy_scale > 0
        return self.travel_passes if travels else 1

    def rerun_calls(self, step: int) -> int:
        """Return the calls that lead back up: one between two passes, and one thrown away in the published code."""
        passes = self.passes(step)
        return passes if self.published and passes > 1 else passes - 1


def _check_span(name: str, span: Span) -> None:
    ok = isinstance(span, (tuple, list)) and len(span) == 2 and all(isinstance(v, (int, float)) for v in span)
    if not ok or not 0 <= span[0] <= span[1] <= 1:
        raise ValueError(f"Expected `{name}` as two fractions 0 <= start <= end <= 1, but got {span!r}.")


_CROSS: Mapping[str, Any] = {"keys": (0.0, 0.72)}
PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "move": {"cfg_scale": 4.0, "energy_scale": 0.5},
        "drag": {"cfg_scale": 4.0, "energy_scale": 2.0, "w_inpaint": 0.2},
        "appearance": {**_CROSS, "cfg_scale": 5.0, "energy_scale": 2.0, "w_edit": 3.5, "w_content": 5.0},
        "paste": {**_CROSS, "cfg_scale": 4.0, "energy_scale": 1.5},
        "landmarks": {
            "cfg_scale": 4.0,
            "energy_scale": 3.0,
            "w_edit": 12.0,
            "w_content": 0.0,
            "w_inpaint": 0.4,
            "eta": 0.2,
        },
    }
)
