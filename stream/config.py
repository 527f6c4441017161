"""What a stream is asked to do: steps, noise, guidance. One frozen dataclass, every field checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_choice, check_integer, check_range, check_seed, check_sigmas
from ..core.guidance import GUIDANCE
from ..core.schedules import TRAIN_STEPS, Levels

RENOISE = ("fixed", "fresh", "none", "ddim")
# The three ways to say at which noise levels a frame is denoised; at most one is set.
LEAST_STRENGTH = 0.001
_STEP_FIELDS = ("t_index_list", "strength", "sigmas")
LCM_GRID = 50


@dataclass(frozen=True)
class StreamConfig:
    """Settings of a `StreamBatch` (StreamDiffusion, arXiv 2312.12491).

    Args:
        t_index_list: ascending indices into the LCM grid of `num_inference_steps` time steps, one per denoising step; a
            larger index is less noise. Default (32, 45), the published image-to-image setting.
        strength: instead: how much of the frame is repainted, above 0 up to 1, in `steps` even steps.
        sigmas: instead: descending noise levels (a terminal 0 is dropped), for example from a scheduler node.
        steps: number of denoising steps when `strength` is given.
        num_inference_steps: size of the grid that `t_index_list` points into, at most 50.
        guidance: the kind: "none", "full" (classifier-free), "self" or "onetime" (residual CFG, section 3.2; "initialize" is
            the published name of "onetime").
        cfg_scale: 1 (off) or more.
        delta: between 0 and 1; how far the residual negative is trusted. Below 1 it curbs the contrast of "self".
        renoise: how a frame gets to its next level: "fixed" (one noise per step, the published way and the steadiest),
            "fresh", "ddim" (deterministic), or "none" (the published `do_add_noise=False`, kept as recorded).
        seed: of the noise.
        frame_group: frames that enter and leave together (the published frame_buffer_size).
        from_noise: frames are pure noise (text to image) instead of images.
        consistency: apply the boundary scalings of consistency models (LCM); leave off for turbo and flow models.
        static_rows: pad every network call to its full number of rows, for compiled or captured models.
        feedback: share of the previous output in a new frame, 0 to 0.95, against flicker.
        motion: 0 to 1; how much less a fast moving frame is repainted (StreamDiffusionV2, arXiv 2511.07399).
        cross_frame: let every row attend to the keys and values of all frames in flight (arXiv 2312.12491 v2).
        guidance_scale: the older name of `cfg_scale`.

    Raises:
        ValueError: a field is out of range, or the steps are said in two ways.
    """

    t_index_list: Sequence[int] | None = None
    strength: float | None = None
    sigmas: Sequence[float] | Tensor | None = None
    steps: int = 2
    num_inference_steps: int = LCM_GRID
    guidance: str = "self"
    cfg_scale: float = 1.2
    delta: float = 1.0
    renoise: str = "fixed"
    seed: int = 2
    frame_group: int = 1
    from_noise: bool = False
    consistency: bool = False
    static_rows: bool = False
    feedback: float = 0.0
    motion: float = 0.0
    cross_frame: bool = False
    guidance_scale: InitVar[float | None] = None

    def __post_init__(self, guidance_scale: float | None) -> None:
        if guidance_scale is not None:
            object.__setattr__(self, "cfg_scale", guidance_scale)
        if self.guidance == "initialize":
            object.__setattr__(self, "guidance", "onetime")
        check_choice("guidance", self.guidance, GUIDANCE)
        check_range("cfg_scale", self.cfg_scale, 1, 100, "1 switches guidance off.")
        check_range("delta", self.delta, 0, 1)
        check_choice("renoise", self.renoise, RENOISE)
        object.__setattr__(self, "seed", check_seed("seed", self.seed))
        check_integer("frame_group", self.frame_group, 1, 256)
        check_range("feedback", self.feedback, 0, 0.95)
        check_range("motion", self.motion, 0, 1)
        self._check_steps()

    def _check_steps(self) -> None:
        given = [name for name in _STEP_FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"Expected one of `t_index_list`, `strength` and `sigmas`, but got {' and '.join(given)}. Set one."
            )
        check_integer("steps", self.steps, 1, LCM_GRID)
        check_integer("num_inference_steps", self.num_inference_steps, 1, LCM_GRID)
        if self.strength is not None:
            check_range("strength", self.strength, LEAST_STRENGTH, 1)
            # More steps than training levels below the strength would repeat levels: passes without effect.
            most = max(int(self.strength * TRAIN_STEPS) - 1, 1)
            check_integer("steps", self.steps, 1, most, f"Use at most {most} steps at strength {self.strength}.")
        elif self.sigmas is not None:
            levels = torch.as_tensor(self.sigmas, dtype=torch.float32).detach().cpu()
            check_sigmas("sigmas", levels, minimum=1)
            kept = tuple(levels[levels > 0].tolist())
            if not kept:
                raise ValueError(
                    "Expected `sigmas` with a level above 0, but got only 0. Take SIGMAS of one step or more."
                )
            object.__setattr__(self, "sigmas", kept)
        else:
            indices = (32, 45) if self.t_index_list is None else self.t_index_list
            object.__setattr__(self, "t_index_list", check_indices(indices, self.num_inference_steps))

    @property
    def stages(self) -> int:
        """Number of denoising steps of a frame: N in the paper."""
        if self.sigmas is not None:
            return len(self.sigmas)
        return self.steps if self.t_index_list is None else len(self.t_index_list)

    @property
    def guided(self) -> bool:
        """Whether guidance changes anything."""
        return self.guidance != "none" and self.cfg_scale > 1

    @property
    def rows(self) -> int:
        """Most rows of a network call: what `static_rows` pads to, and what a recording needs."""
        slots = self.frame_group * self.stages
        negatives = {"full": slots, "onetime": self.frame_group} if self.guided else {}
        return slots + negatives.get(self.guidance, 0)

    def changed(self, **updates: Any) -> StreamConfig:
        """Return a copy with some fields changed; a new way to say the steps replaces the old one."""
        if "guidance_scale" in updates:
            updates["cfg_scale"] = updates.pop("guidance_scale")
        unknown = set(updates) - {f.name for f in fields(self)}
        if unknown:
            raise ValueError(f"Expected a setting of StreamConfig, but got `{sorted(unknown)[0]}`.")
        if any(updates.get(name) is not None for name in _STEP_FIELDS):
            updates = {**dict.fromkeys(_STEP_FIELDS), **updates}
        elif "steps" in updates and self.strength is None:
            raise ValueError("Expected `strength` together with `steps`, but got `steps` alone. Set both.")
        return replace(self, **updates)


def check_indices(indices: Sequence[int], grid: int) -> tuple[int, ...]:
    """Return `indices` as a tuple; raises ValueError unless they ascend strictly within 0 .. grid - 1."""
    if isinstance(indices, (str, bytes)) or not isinstance(indices, Sequence) or not len(indices):
        raise ValueError(f"Expected `t_index_list` to be a list of at least one index, but got {indices!r}.")
    for index in indices:
        check_integer("t_index_list", index, 0, grid - 1, "0 is the most noise.")
    if any(b <= a for a, b in zip(indices, indices[1:])):
        raise ValueError(
            f"Expected `t_index_list` to ascend strictly, but got {list(indices)}. Sort it: noise only falls."
        )
    return tuple(indices)


def lcm_timesteps(num_inference_steps: int = LCM_GRID) -> list[int]:
    """Return the descending training time steps of an LCM scheduler: entries floor(50 i / n) of 999, 979, ..., 19."""
    return [TRAIN_STEPS - 1 - 20 * (i * LCM_GRID // num_inference_steps) for i in range(num_inference_steps)]


def stage_sigmas(config: StreamConfig, levels: Levels) -> Tensor:
    """Return the noise level of each denoising step (N,), descending, float32 on the CPU."""
    if config.sigmas is not None:
        return torch.tensor(config.sigmas, dtype=torch.float32)
    if config.strength is not None:
        first = config.strength * TRAIN_STEPS - 1
        timesteps = [max(round(first * (1 - i / config.steps)), 1) for i in range(config.steps)]
    else:
        assert config.t_index_list is not None
        grid = lcm_timesteps(config.num_inference_steps)
        timesteps = [grid[i] for i in config.t_index_list]
    return levels.t_to_sigma(torch.tensor(timesteps, dtype=torch.float64)).float()


def boundary_scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return (c_skip, c_out) of a consistency model at training time steps (arXiv 2310.04378, with sigma_data 0.5, scaling 10)."""
    scaled = 10 * timesteps.double()
    root = (scaled**2 + 0.25).sqrt()
    return (0.25 / root**2).float(), (scaled / root).float()
