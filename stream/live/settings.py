"""What can be changed while a live stream runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ...core.checks import check_integer, check_range, check_text, shown
from ...core.unused import Unused, without_effect
from ..config import LCM_GRID, StreamConfig

MAX_PROMPT = 4000  # characters


def _unguided(v: Any) -> bool:
    return bool(v.guidance == "none" or v.guidance_scale == 1)


UNUSED = (
    Unused("strength steps", lambda v: bool(v.t_index_list), "while `t_index_list` is set. Clear it to use them."),
    Unused("guidance_scale", lambda v: v.guidance == "none", "with `guidance` none. Choose another guidance."),
    Unused(
        "delta",
        lambda v: _unguided(v) or v.guidance == "full",
        "without self or onetime guidance above scale 1. Choose one.",
    ),
    Unused(
        "negative",
        lambda v: _unguided(v) or v.guidance == "self",
        "without onetime or full guidance. Choose one of them.",
    ),
)


@dataclass(frozen=True)
class LiveSettings:
    """The settings that a client may change. What is not said here is as in `StreamConfig` and `SimilarityFilter`.

    Args:
        prompt, negative: texts; the prompt is faded in over `crossfade` frames.
        strength, steps: how much is repainted in how many steps; without effect while `t_index_list` is not empty.
        similarity: the threshold of the similarity filter; 1 skips nothing.

    Raises:
        ValueError: as the checks of those, and for texts of more than 4000 characters.
    """

    prompt: str = ""
    negative: str = ""
    crossfade: int = 8
    strength: float = 0.5
    steps: int = 2
    t_index_list: Sequence[int] = ()
    guidance: str = "self"
    guidance_scale: float = 1.2
    delta: float = 1.0
    seed: int = 2
    feedback: float = 0.0
    motion: float = 0.0
    similarity: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prompt", "negative"):
            text = check_text(name, getattr(self, name))
            if len(text) > MAX_PROMPT:
                raise ValueError(f"Expected `{name}` of at most {MAX_PROMPT} characters, but got {len(text)}.")
        check_integer("crossfade", self.crossfade, 0, 1000)
        check_range("similarity", self.similarity, 0, 1)
        check_range("strength", self.strength, 0.001, 1)
        check_integer("steps", self.steps, 1, LCM_GRID)
        object.__setattr__(self, "t_index_list", read_indices(self.t_index_list))
        StreamConfig(**self.updates())

    @property
    def stages(self) -> int:
        """Denoising steps of a frame."""
        return len(self.t_index_list) or self.steps

    def updates(self) -> dict[str, Any]:
        """Return the fields of a `StreamConfig` that these settings decide."""
        own = {"prompt", "negative", "crossfade", "similarity", "strength", "steps", "t_index_list"}
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        if self.t_index_list:
            return {**found, "t_index_list": self.t_index_list}
        return {**found, "strength": self.strength, "steps": self.steps}

    def changed(self, updates: Mapping[str, Any]) -> LiveSettings:
        """Return a copy with some settings changed; raises ValueError for unknown names and values out of range."""
        names = [f.name for f in fields(self)]
        unknown = sorted(set(updates) - set(names))
        if unknown:
            raise ValueError(f"Expected a setting of {', '.join(names)}, but got {shown(unknown[0])}.")
        return replace(self, **updates)

    def warnings(self, updates: Mapping[str, Any]) -> list[str]:
        """Return one sentence for each of the settings just made that has no effect beside the others."""
        return list(without_effect(UNUSED, self, lambda name: name in updates))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "t_index_list": list(self.t_index_list)}


def read_indices(value: Any) -> tuple[int, ...]:
    """Return indices that come as numbers or as text, "32, 45"; raises ValueError for others."""
    if isinstance(value, str):
        if re.fullmatch(r"[\d\s,]*", value) is None:
            raise ValueError(f"Expected `t_index_list` as numbers with commas, but got {shown(value)}. Example: 32,45.")
        return tuple(int(part) for part in re.findall(r"\d{1,6}", value))
    if not isinstance(value, Sequence):
        raise ValueError(f"Expected `t_index_list` to be a list of numbers, but got {shown(value)}. Example: [32, 45].")
    return tuple(value)
