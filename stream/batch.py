"""Stream Batch: every pass denoises all frames in flight, each at its own step, in one network call.

StreamDiffusion, arXiv 2312.12491 section 3.1. The result of each frame is exactly what denoising it alone would give; only
the order of the work differs. M frames take M + N - 1 passes of at most N rows: nothing runs on empty buffers.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_finite, check_latents
from ..core.denoiser import Denoiser
from ..core.noise import NoiseSource, SeededNoise
from ..core.transfer import mark, receive, to_device
from .config import StreamConfig, stage_sigmas
from .guidance import GUIDES
from .plan import Group, Plan, Skipped, Track, make_plan
from .stability import Motion

PLANS_KEPT = 64
# Below this share of signal a latent of pure noise has no frame behind it.
NO_SIGNAL = 1e-3


@dataclass(frozen=True)
class StreamFrame:
    """One finished frame: `latents` (1, C, H, W), its `id` in order of arrival, and the caller's `meta`.

    `age` is the number of passes that ran after the one the frame entered with, until it left: N - 1 in a steady stream.
    `latency` is the time from `arrived` (time.perf_counter) in seconds; a GPU may still be at work on the frame then.
    `repeated` marks a skipped frame, which shows the one before it. `ready` is the CUDA event after which `latents` may be read
    by another CUDA stream; None: by the current one, at once.
    """

    id: int
    latents: Tensor
    meta: Any
    age: int
    arrived: float
    latency: float
    repeated: bool = False
    ready: Any = None


class Waiting(NamedTuple):
    """A frame that has arrived; `cond` and `uncond` are its own, or None."""

    latents: Tensor
    id: int
    meta: Any
    arrived: float
    cond: Any
    uncond: Any


class StreamBatch:
    """Frames in, the same frames denoised out, in order, N - 1 passes later (N = `config.stages`).

    Args:
        model: the `Denoiser`; several streams may share one.
        cond: one row of conditioning, the prompt.
        uncond: the negative prompt, needed by "full" and "onetime" guidance.
        config: see `StreamConfig`.
        noise: where noise comes from; default `SeededNoise(config.seed)`, whose first draw is one noise for each step.

    Safe to `update` from another thread: changes take effect between passes.
    """

    lanes = 1  # see `StreamLanes`

    def __init__(
        self, model: Denoiser, cond: Any, uncond: Any = None, config: StreamConfig | None = None,
        noise: NoiseSource | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        refresh = getattr(model, "refresh", None)
        if refresh is not None:
            refresh()
        self.config = config or StreamConfig()
        self.cond, self.uncond = _one_row("cond", cond), None if uncond is None else _one_row("uncond", uncond)
        self._check(self.config, self.uncond)
        self.noise = noise or SeededNoise(self.config.seed)
        self.passes = 0
        self._lock = threading.RLock()
        self._arrived = 0
        self._waiting: list[Waiting] = []
        self._groups: deque[Group] = deque()  # newest first, as the rows of `_x` are
        self._x: Tensor | None = None
        self._reference: Tensor | None = None
        self._newest: StreamFrame | None = None  # the newest finished frame, for feedback and repeats
        self._finished: list[StreamFrame] = []  # kept here until returned: a pass that fails loses none of them
        self._bank: Tensor | None = None  # (steps, C, H, W): the fixed noise of each step
        self._motion = Motion()
        self._tracks: dict[float, Track] = {}
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._handed = mark(self.cond, self.uncond)

    @property
    def in_flight(self) -> int:
        """Frames that were pushed or skipped and have not come out yet."""
        return len(self._waiting) + sum(group.size + len(group.skipped) for group in list(self._groups))

    @property
    def capacity(self) -> int:
        """Frames in flight when all steps are at work."""
        return self.config.stages * self.config.frame_group

    @torch.inference_mode()
    def push(self, latents: Tensor, meta: Any = None, cond: Any = None, uncond: Any = None) -> list[StreamFrame]:
        """Add frames (B, C, H, W) or (B, C, 1, H, W) on any device, scaled as the model takes them; return those that finished.

        These are on the model's device.

        Each full group costs one pass. `meta` comes back with the frame (a list gives one per frame). `cond` and `uncond`
        override the prompts for these frames at all their steps: a row each, or one row. Raises ValueError for a wrong shape,
        another size than the frames in flight, NaN (looked for on the CPU only: on a GPU looking would stall it, and the NaN is
        found when the image is decoded), and leaves the stream as it was.
        """
        with self._lock:
            self._take_over()
            self._accept(latents, meta, cond, uncond)
            while len(self._waiting) >= self.config.frame_group:
                self._enter(self.config.frame_group)
            return self._hand_out()

    @torch.inference_mode()
    def advance(self) -> list[StreamFrame]:
        """Run one pass without a new frame and return what finished; does nothing when no frame is in flight."""
        with self._lock:
            self._advance()
            return self._hand_out()

    def _advance(self) -> None:
        self._take_over()
        if self._waiting:
            self._enter(len(self._waiting))
        elif self._groups:
            self._pass()

    def _take_over(self) -> None:
        """Let the CUDA stream of the passes wait for new prompts, which another one may still be computing."""
        receive(self._handed, self.cond, self.uncond)
        self._handed = None

    def _hand_out(self) -> list[StreamFrame]:
        finished, self._finished = self._finished, []
        return finished

    @torch.inference_mode()
    def skip(self, meta: Any = None) -> list[StreamFrame]:
        """Take note of a frame that is not worth processing: it comes out in its turn as a repeat of the frame before it.

        Costs one pass while frames are in flight, so that a scene that comes to rest shows its newest frame; nothing after
        that. Raises ValueError when no frame came before.
        """
        with self._lock:
            self._advance()
            skipped = Skipped(self._arrived, meta, time.perf_counter(), self.passes)
            if self._groups:
                self._groups[0].skipped.append(skipped)
            elif self._newest is not None:
                self._finished.append(_repeat(self._newest, skipped, self.passes))
            else:
                raise ValueError("Expected a frame before the first skip, but got none. Push the first frame.")
            self._arrived += 1
            return self._hand_out()

    @torch.inference_mode()
    def drain(self) -> list[StreamFrame]:
        """Finish all frames in flight and return them; the stream can be pushed to again.

        When a pass fails, the frames that were finished before it come with the next call.
        """
        with self._lock:
            while self.in_flight:
                self._advance()
            return self._hand_out()

    def clear(self) -> None:
        """Drop all frames in flight and the memory of earlier ones."""
        with self._lock:
            self._waiting.clear()
            self._finished.clear()
            self._groups.clear()
            self._plans.clear()
            self._x = self._reference = self._newest = None
            self._motion = Motion()

    def use(self, models: Sequence[Denoiser]) -> None:
        """Run the next passes on another model of the same kind (one, in a list): a recording for other settings."""
        with self._lock:
            (self.model,) = models
            self._plans.clear()

    def update(self, cond: Any = None, uncond: Any = None, **settings: Any) -> None:
        """Change the prompt, the negative prompt or any field of the config while frames are in flight.

        Prompts and guidance hold for all frames from the next pass on; steps, strength and seed for frames that enter later,
        so no frame in flight is lost. Raises ValueError for a bad setting and changes nothing then.
        """
        with self._lock:
            config = self.config.changed(**settings)
            cond = self.cond if cond is None else _one_row("cond", cond)
            uncond = self.uncond if uncond is None else _one_row("uncond", uncond)
            self._check(config, uncond)
            if config.seed != self.config.seed:
                self.noise, self._bank = SeededNoise(config.seed), None
            self.config, self.cond, self.uncond = config, cond, uncond
            self._handed = mark(cond, uncond)
            self._tracks.clear()
            self._plans.clear()

    def _check(self, config: StreamConfig, uncond: Any) -> None:
        if config.guided and config.guidance in ("full", "onetime") and uncond is None:
            raise ValueError(
                f"Expected `uncond` for guidance {config.guidance!r}, but got None. Give a negative prompt (it may be "
                "empty), or use guidance 'self'."
            )
        if config.consistency and self.model.space.name == "flow":
            raise ValueError(
                "Expected `consistency` off for a flow model, but got on. Flow models have no such scalings."
            )

    # -- frames entering

    def _accept(self, latents: Tensor, meta: Any, cond: Any, uncond: Any) -> None:
        if not isinstance(latents, Tensor) or latents.ndim not in (4, 5) or not len(latents):
            got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(
                f"Expected `latents` of shape (frames, channels, height, width) with at least one frame, but got {got}."
            )
        channels = getattr(self.model, "latent_channels", latents.shape[1])
        check_latents("latents", latents, channels, "Use the VAE that belongs to this model.")
        if latents.ndim == 5 and latents.shape[2] != 1:
            raise ValueError(
                f"Expected `latents` of one image per frame, but got a video of {latents.shape[2]} frames in one latent. A frame of a "
                "stream is an image: push the frames one by one."
            )
        current = self._waiting[0].latents.shape if self._waiting else None if self._x is None else self._x.shape
        if current is not None and current[1:] != latents.shape[1:]:
            raise ValueError(
                f"Expected `latents` of size {tuple(current[1:])} like the frames in flight, but got "
                f"{tuple(latents.shape[1:])}. Resize the frames, or call drain() before changing size."
            )
        # A sum shows in one operation whether all is finite; only then is it worth looking closer.
        if latents.device.type == "cpu" and not math.isfinite(float(latents.sum())):
            check_finite("latents", latents)
        metas = meta if isinstance(meta, list) else [meta] * len(latents)
        if len(metas) != len(latents):
            raise ValueError(f"Expected {len(latents)} entries in `meta`, one per frame, but got {len(metas)}.")
        now = time.perf_counter()
        # Kept in float32 whatever the network computes in: noise levels and guidance lose digits in half precision.
        latents = to_device(latents.float(), getattr(self.model, "device", latents.device))
        for i, row in enumerate((latents,) if len(latents) == 1 else latents.split(1)):
            own = tuple(c if c is None or c.rows == 1 else c.take([i % c.rows]) for c in (cond, uncond))
            self._waiting.append(Waiting(row, self._arrived, metas[i], now, *own))
            self._arrived += 1

    def _enter(self, count: int) -> None:
        """Noise `count` waiting frames to their first level and run a pass with them."""
        entering = self._waiting[:count]
        x0 = entering[0].latents if count == 1 else torch.cat([frame.latents for frame in entering])
        x, reference, track = self._noised(x0)
        del self._waiting[:count]
        ids, metas, arrived, conds, unconds = (list(column) for column in zip(*(frame[1:] for frame in entering)))
        own, own_negative = (column if any(c is not None for c in column) else None for column in (conds, unconds))
        self._groups.appendleft(Group(ids, metas, arrived, track, self.passes, own, own_negative))
        self._x = x if self._x is None else torch.cat((x, self._x))
        self._reference = reference if self._reference is None else torch.cat((reference, self._reference))
        self._pass()

    def _noised(self, x0: Tensor) -> tuple[Tensor, Tensor, Track]:
        """Return the latents at their first level, the frame that stands behind them, and the steps they take."""
        config = self.config
        track = self._track(x0, self._motion.factor(x0, config.motion) if config.motion else 1.0)
        if not config.from_noise:
            before = self._newest
            if config.feedback and before is not None and before.latents.shape[1:] == x0.shape[1:]:
                x0 = torch.lerp(x0, before.latents.to(x0), config.feedback)
            return (x0 if track.scale == 1 else x0 * track.scale) + track.entry, x0, track
        x = x0 * (track.scale**2 + float(track.sigmas[0]) ** 2) ** 0.5
        if track.scale >= NO_SIGNAL:
            return x, (x - track.entry) / track.scale, track
        if config.guided and config.guidance == "self":
            raise ValueError(
                "Expected guidance 'onetime', 'full' or 'none' for frames of pure noise, but got 'self', which needs an "
                "image to start from."
            )
        return x, torch.zeros_like(x), track

    def _track(self, x0: Tensor, strength: float) -> Track:
        """Return the steps of a new frame; `strength` below 1 lowers all its levels."""
        track = self._tracks.get(strength)
        if track is None or track.noise.shape[1:] != x0.shape[1:] or track.noise.device != x0.device:
            levels = self.model.levels
            sigmas = stage_sigmas(self.config, levels)
            if strength != 1:
                sigmas = levels.t_to_sigma(levels.sigma_to_t(sigmas) * strength).float()
            noise = self._step_noise(len(sigmas), x0)
            scale = float(self.model.space.scale(sigmas[0]))
            self._tracks[strength] = track = Track(sigmas, noise, scale, float(sigmas[0]) * noise[:1])
        return track

    def _step_noise(self, steps: int, x0: Tensor) -> Tensor:
        """Return the noise of each step (N, C, H, W); steps keep their noise when their number or strength changes."""
        bank = self._bank
        if bank is None or bank.shape[1:] != x0.shape[1:] or bank.device != x0.device:
            bank = self.noise(x0.new_empty((steps, *x0.shape[1:])))
        elif steps > len(bank):
            bank = torch.cat((bank, self.noise(x0.new_empty((steps - len(bank), *x0.shape[1:])))))
        self._bank = bank
        return bank[:steps]

    # -- a pass

    def _pass(self) -> None:
        """Denoise all frames in flight by one step each, in one network call."""
        config, x, reference = self.config, self._x, self._reference
        assert x is not None
        assert reference is not None
        active = [group for group in self._groups if group.result is None]
        plan = self._plan(active, x)
        guide = GUIDES[config.guidance if config.guided else "none"]
        denoised, reference = guide(plan, x, reference, config.cfg_scale)
        if plan.skip_out is not None:
            denoised = torch.addcmul(plan.skip_out[0] * x, plan.skip_out[1], denoised)
        self.passes += 1
        row = 0
        for group in active:
            if group.ending:
                group.result = denoised[row : row + group.size]
            group.stage += 1
            row += group.size
        self._x = self._reference = None
        if plan.move is not None:
            self._x = plan.move(denoised[plan.kept], x[plan.kept])
            kept = reference[plan.kept]
            self._reference = kept if plan.reference_shift is None else kept - plan.reference_shift
        self._emit()

    def _emit(self) -> None:
        """Take finished frames off the old end; a frame with fewer steps waits for those that came before it."""
        now = time.perf_counter()
        while self._groups and self._groups[-1].result is not None:
            group = self._groups.pop()
            assert group.result is not None
            age = self.passes - 1 - group.born
            with torch.inference_mode(False):
                # A plain tensor of its own: the caller may do with it what he likes, and keep it without its neighbours.
                result = group.result.clone()
            rows = (result,) if group.size == 1 else result.split(1)
            for row, id, meta, arrived in zip(rows, group.ids, group.metas, group.arrived):
                self._newest = StreamFrame(id, row, meta, age, arrived, now - arrived)
                self._finished.append(self._newest)
            newest = self._finished[-1]
            self._finished += [_repeat(newest, skipped, self.passes) for skipped in group.skipped]

    def _plan(self, active: list[Group], x: Tensor) -> Plan:
        own = any(group.conds or group.unconds for group in active)
        key = (own, x.shape[1:], x.device, *((group.track, group.stage, group.size) for group in active))
        plan = self._plans.get(key)
        if plan is not None:
            return plan.with_prompts(self.cond, self.uncond, active) if own else plan
        if len(self._plans) >= PLANS_KEPT:
            self._plans.clear()
        self._plans[key] = plan = make_plan(self.model, self.config, self.cond, self.uncond, active, x, self.noise)
        return plan


def _repeat(frame: StreamFrame, skipped: Skipped, passes: int) -> StreamFrame:
    return StreamFrame(
        skipped.id, frame.latents, skipped.meta, max(passes - 1 - skipped.born, 0), skipped.arrived,
        time.perf_counter() - skipped.arrived, repeated=True,
    )  # fmt: skip


def _one_row(name: str, cond: Any) -> Any:
    if not hasattr(cond, "expand") or not hasattr(cond, "join"):
        raise ValueError(f"Expected `{name}` to be conditioning, but got {type(cond).__name__}. Use pipe.encode_text.")
    if cond.rows != 1:
        raise ValueError(f"Expected `{name}` with 1 row, but got {cond.rows}. Give one prompt; `blend` mixes several.")
    return cond
