"""Several prompts in one stream: weights that may move over a clip, and a stream whose frames carry their own blend."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.denoiser import Conditioning, Denoiser
from ..core.transfer import mark, receive
from .batch import StreamBatch
from .config import StreamConfig
from .guidance import blend, check_blend
from .lanes import StreamLanes


@dataclass(frozen=True)
class PromptBlend:
    """How much of each prompt a frame gets.

    Args:
        start: weights at the first frame, one per prompt, normalised to sum 1.
        end: weights at the last frame, reached evenly; default `start`.
        mode: "linear", or "slerp", which keeps the embeddings' length (two prompts).

    Raises:
        ValueError: see `blend`; also for an `end` of another number of weights.
    """

    start: Sequence[float]
    end: Sequence[float] | None = None
    mode: str = "linear"

    def __post_init__(self) -> None:
        for weights in (self.start, self.last):
            check_blend(len(self.start), weights, self.mode)

    @property
    def last(self) -> Sequence[float]:
        """The weights at the last frame."""
        return self.start if self.end is None else self.end

    @property
    def moves(self) -> bool:
        """Whether the blend changes over a clip."""
        return list(self.last) != list(self.start)

    def weights(self, share: float) -> list[float]:
        """Return the weights after `share` of the clip, between 0 and 1."""
        return [a + (b - a) * share for a, b in zip(self.start, self.last)]

    def at(self, conds: Sequence[Conditioning], frame: int = 0, frames: int = 1) -> Conditioning:
        """Return the prompt of a frame of a clip of `frames`; frames after its end keep the last one."""
        return blend(conds, self.weights(min(frame / max(frames - 1, 1), 1.0)), self.mode)


class MovingPrompt:
    """A prompt that moves: part of a `StreamBatch` or `StreamLanes` whose frames carry the prompt of their place on a path."""

    cond: Any
    _arrived: int
    _lock: threading.RLock
    _path: Callable[[int], Any]
    _first = _length = 0
    _made: tuple[Any, tuple[Any, ...]] = (None, ())

    def move(self, path: Callable[[int], Any], frames: int, *made_of: Any) -> None:
        """Give the next `frames` that enter the prompt `path(i)` of their place, i = 0, 1, ...; the last one stays.

        A path holds one row of conditioning at each place. Frames in flight keep the prompts that they have. `made_of` are prompts that
        the path is made of: the frames may enter on another CUDA stream than these were computed on.
        """
        with self._lock:
            self._path, self._first, self._length = path, self._arrived, frames
            self._made = mark(*made_of), made_of

    def fade(self, cond: Any, frames: int) -> None:
        """Go from the prompt that the newest frame has to `cond` over the next `frames`; 0 changes it at once, for all frames."""
        if not frames:
            return self.update(cond)
        before, prompts = self.newest_prompt(), PromptBlend([1, 0], [0, 1])
        self.move(lambda place: prompts.at([before, cond], place + 1, frames + 1), frames, before, cond)

    @property
    def moving(self) -> bool:
        """Whether the prompt of the next frame is another one than that of the frame before may be."""
        return self._arrived - self._first < self._length

    def newest_prompt(self) -> Any:
        """Return the prompt that the newest frame has: where another path may begin."""
        with self._lock:
            place = min(self._arrived - self._first, self._length) - 1
            return self._path(place) if place >= 0 else self.cond

    def update(self, cond: Any = None, uncond: Any = None, **settings: Any) -> None:
        """See `StreamBatch.update`."""
        super().update(cond, uncond, **settings)  # type: ignore[misc]
        if cond is not None:
            self._length = 0

    def _own(self, frames: int) -> Any:
        """Return the prompts of the next `frames`, a row each; None where they have that of the stream."""
        places = [self._arrived - self._first + i for i in range(frames)]
        if not self._length or not places:
            return None
        receive(*self._made)
        # Frames of before the end of the path are out by then: the last prompt is that of the stream.
        if places[0] - self.in_flight >= self._length:  # type: ignore[attr-defined]
            self.update(self._path(self._length - 1))
            return None
        first, *rest = (self._path(min(place, self._length - 1)) for place in places)
        return first.join(*rest) if rest else first


class BlendedStream(MovingPrompt, StreamBatch):
    """A `StreamBatch` whose prompt moves: each frame carries the blend of its place in a clip of `frames` to the end.

    `conds` are the prompts, one row each, in the order of the weights of `prompts`. A prompt given to `update` ends the blend
    for frames that enter later.
    """

    def __init__(
        self, model: Denoiser, conds: Sequence[Any], prompts: PromptBlend, frames: int, uncond: Any = None,
        config: StreamConfig | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, prompts.at(conds), uncond, config)
        self.move(lambda place: prompts.at(conds, place, frames), frames if prompts.moves else 0, *conds)

    def _accept(self, latents: Tensor, meta: Any, cond: Any, uncond: Any) -> None:
        if cond is None and isinstance(latents, Tensor):
            cond = self._own(len(latents))
        super()._accept(latents, meta, cond, uncond)


class BlendedLanes(MovingPrompt, StreamLanes):
    """`StreamLanes` whose prompt moves, from frame to frame whatever lane they go to."""

    def _push(self, latents: Tensor, meta: Any, cond: Any, uncond: Any) -> None:
        own = cond is None and isinstance(latents, Tensor)
        super()._push(latents, meta, self._own(len(latents)) if own else cond, uncond)


def blended(
    models: Sequence[Denoiser], conds: Sequence[Any], prompts: PromptBlend, frames: int, uncond: Any = None,
    config: StreamConfig | None = None, no_delay: bool = False,
) -> BlendedStream | BlendedLanes:  # fmt: skip
    """Return a stream with a lane for each model, whose prompt moves over a clip of `frames`; see `BlendedStream`, `StreamLanes`."""
    if len(models) == 1:
        return BlendedStream(models[0], conds, prompts, frames, uncond, config)
    lanes = BlendedLanes([StreamBatch(model, prompts.at(conds), uncond, config) for model in models], no_delay)
    lanes.move(lambda place: prompts.at(conds, place, frames), frames if prompts.moves else 0, *conds)
    return lanes
