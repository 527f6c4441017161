"""Several prompts in one stream: weights that may move over a clip, and a stream whose frames carry their own blend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.denoiser import Conditioning, Denoiser
from .batch import StreamBatch
from .config import StreamConfig
from .guidance import blend, check_blend


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


class BlendedStream(StreamBatch):
    """A `StreamBatch` whose prompt moves: each frame carries the blend of its place in a clip of `frames` to the end.

    `conds` are the prompts, one row each, in the order of the weights of `prompts`. A prompt given to `update` ends the blend
    for frames that enter later.
    """

    def __init__(
        self, model: Denoiser, conds: Sequence[Any], prompts: PromptBlend, frames: int, uncond: Any = None,
        config: StreamConfig | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, prompts.at(conds), uncond, config)
        self.move(lambda place: prompts.at(conds, place, frames), frames if prompts.moves else 0)

    def move(self, path: Callable[[int], Any], frames: int) -> None:
        """Give the next `frames` that enter the prompt `path(i)` of their place, i = 0, 1, ...; the last one stays.

        A path holds one row of conditioning at each place. Frames in flight keep the prompts that they have.
        """
        with self._lock:
            self._path, self._first, self._length = path, self._arrived, frames

    def fade(self, cond: Any, frames: int) -> None:
        """Go from the prompt that the newest frame has to `cond` over the next `frames`; 0 changes it at once, for all frames."""
        if not frames:
            return self.update(cond)
        before, prompts = self.newest_prompt(), PromptBlend([1, 0], [0, 1])
        self.move(lambda place: prompts.at([before, cond], place + 1, frames + 1), frames)

    @property
    def moving(self) -> bool:
        """Whether the prompt of the next frame is another one than that of the frame before may be."""
        return self._arrived - self._first < self._length

    def newest_prompt(self) -> Any:
        """Return the prompt that the newest frame has: where another path may begin."""
        with self._lock:
            place = min(self._arrived - self._first, self._length) - 1
            return self._path(place) if place >= 0 else self.cond

    def _accept(self, latents: Tensor, meta: Any, cond: Any, uncond: Any) -> None:
        """Frames without a `cond` of their own get the prompt of their place."""
        if cond is None and isinstance(latents, Tensor) and len(latents) and self._length:
            places = [self._arrived - self._first + i for i in range(len(latents))]
            # Frames of before the path are out by then: the last prompt is that of the stream.
            if places[0] >= self._length + self.config.rows:
                self._settle(self._path(self._length - 1))
            else:
                first, *rest = (self._path(min(place, self._length - 1)) for place in places)
                cond = first.join(*rest) if rest else first
        super()._accept(latents, meta, cond, uncond)

    def _settle(self, cond: Any) -> None:
        super().update(cond)
        self._length = 0

    def update(self, cond: Any = None, uncond: Any = None, **settings: Any) -> None:
        """See `StreamBatch.update`."""
        super().update(cond, uncond, **settings)
        if cond is not None:
            self._length = 0
