"""Settings of an edit. Whatever the published code counted in steps of 50 is a fraction of the steps here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..core.checks import check_choice, check_integer, check_range
from ..core.schedules import SCHEDULES, Levels, make_sigmas

Span = tuple[float, float]
MEMORY = ("auto", "bank", "row")
MODES = ("draft", "fine")
# The method's own fractions of the steps (published for 50). Guided: every second step of GUIDE, and each step of DENSE.
GUIDE: Span = (0.0, 0.6)
DENSE: Span = (0.0, 0.2)
# The decoder's self-attention reads the inverted image's keys and values.
KEYS: Span = (0.1, 1.0)
# Fresh noise within the edited region.
NOISE: Span = (0.22, 0.4)
# A model with an image prompt is used.
IMAGE_PROMPT: Span = (0.2, 0.4)
# How often a step of time travel is run.
TRAVEL_PASSES = 3


def steps_in(span: Span, steps: int) -> range:
    """Return the step numbers within a pair of fractions, the end excluded."""
    return range(round(span[0] * steps), round(span[1] * steps))


@dataclass(frozen=True)
class EditConfig:
    """Settings of `invert` and `edit` (DiffEditor, arXiv 2402.02583; DragonDiffusion, arXiv 2307.02421).

    Attributes:
        steps: steps of the inversion and of the edit. 16 is the fast setting.
        cfg_scale: classifier-free guidance of the edit.
        energy_scale: strength of the feature guidance, the root mean square of the guidance relative to that of the noise
            estimate; 0 turns it off.
        w_edit, w_content, w_contrast, w_inpaint: weights of the energies.
        eta: strength of the fresh noise within the edited region.
        travel: fractions in which every second step is run three times (time travel); never the last step.
        anchor_object: fractions in which the moved object follows its moved inversion.
        anchor_fill: fractions in which a vacated area follows the smooth fill from around it.
        feather: soft edge of the edit, in pixels of the image.
        memory: "bank" keeps keys and values in host memory, "row" computes them again in each step, "auto" chooses by
            `memory_limit` bytes.
        checkpoint: recompute activations in the gradient pass (less memory, a third more time).
        mode: "draft" denoises the cut-and-paste inside what may change, on any model, without inversion and gradients; "fine" inverts
            the photo and guides by feature energies (UNets only). `energy_scale`, the weights, `eta`, `travel`, `memory` and
            `checkpoint` are those of mode fine.
    """

    steps: int = 50
    schedule: str = "leading"
    cfg_scale: float = 2.0
    energy_scale: float = 0.1
    w_edit: float = 4.0
    w_content: float = 6.0
    w_contrast: float = 0.2
    w_inpaint: float = 0.8
    eta: float = 0.4
    travel: Span = (0.44, 0.6)
    anchor_object: Span = (0.0, 0.9)
    anchor_fill: Span = (0.0, 0.4)
    feather: int = 4
    memory: str = "auto"
    memory_limit: int = 4 << 30
    checkpoint: bool = False
    mode: str = "draft"

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1, 1000)
        check_choice("schedule", self.schedule, SCHEDULES)
        for name, high in (("cfg_scale", 100), ("energy_scale", 1000), ("eta", 1)):
            check_range(name, getattr(self, name), 0, high)
        for name in ("w_edit", "w_content", "w_contrast", "w_inpaint"):
            check_range(name, getattr(self, name), 0, 1000)
        for name in ("travel", "anchor_object", "anchor_fill"):
            _check_span(name, getattr(self, name))
        check_integer("feather", self.feather, 0, 1000)
        check_choice("memory", self.memory, MEMORY)
        check_choice("mode", self.mode, MODES)
        check_integer("memory_limit", self.memory_limit, 0)

    @classmethod
    def fast(cls, **changes: Any) -> EditConfig:
        """Return the 16-step setting."""
        return cls(**{"steps": 16, **changes})

    def replace(self, **changes: Any) -> EditConfig:
        return replace(self, **changes)

    def sigmas(self, levels: Levels) -> Tensor:
        """Return the descending levels (steps + 1,) of the run."""
        return make_sigmas(self.schedule, levels, self.steps)

    @property
    def guided(self) -> frozenset[int]:
        """Steps with feature guidance: each of DENSE, every second one of GUIDE."""
        if self.energy_scale == 0:
            return frozenset()
        dense = steps_in(DENSE, self.steps)
        return frozenset(i for i in steps_in(GUIDE, self.steps) if i % 2 == 0 or i in dense)

    def passes(self, step: int) -> int:
        """Return how often a step is run: it travels only where energies act, and nothing leads back up from level 0."""
        travels = step % 2 == 0 and step in steps_in(self.travel, self.steps) and self.energy_scale > 0
        return TRAVEL_PASSES if travels and step + 1 < self.steps else 1


def _check_span(name: str, span: Span) -> None:
    ok = isinstance(span, (tuple, list)) and len(span) == 2 and all(isinstance(v, (int, float)) for v in span)
    if not ok or not 0 <= span[0] <= span[1] <= 1:
        raise ValueError(f"Expected `{name}` as two fractions 0 <= start <= end <= 1, but got {span!r}.")
