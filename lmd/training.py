"""Training a `LatentFill`: mixed masks, a mask ratio that may grow, exact resume. Every step depends on (seed, step) only."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_choice, check_finite, check_integer, check_range, check_seed, check_shape
from ..core.identity import identify
from ..core.noise import SeededNoise
from .latent_fill import FillConfig, LatentFill, bad_file, read_config, read_tensors, write_tensors
from .mask_schedule import KINDS, mask_ratio
from .tokens import lowest, masked_count, to_tokens

log = logging.getLogger(__name__)

RATIO_KINDS = ("random", *KINDS)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`.

    Args:
        steps, batch: optimiser steps and latents a step.
        learning_rate, weight_decay: AdamW with 5 % warm-up and a half cosine to 0. (The published scripts use Adan.)
        ratio: masked share over the run: "random" in [low, high] for each step, or a schedule of `mask_ratio`.
        low, high: its bounds.
        masks: "mixed", or one family: "random" patches as published, "block", "half" or "stroke" as a user would paint.
        seed: decides weights, order and masks.
    """

    steps: int = 2000
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    ratio: str = "random"
    low: float = 0.15
    high: float = 0.75
    masks: str = "mixed"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1, 10_000_000)
        check_integer("batch", self.batch, 1, 65_536)
        check_range("learning_rate", self.learning_rate, 1e-8, 1)
        check_range("weight_decay", self.weight_decay, 0, 10)
        check_choice("ratio", self.ratio, RATIO_KINDS)
        check_range("low", self.low, 0, 1)
        check_range("high", self.high, max(self.low, 1e-6), 1, "`high` must be above 0 and not below `low`.")
        check_choice("masks", self.masks, MASK_KINDS)
        object.__setattr__(self, "seed", check_seed("seed", self.seed))


@dataclass(frozen=True)
class TrainStep:
    """One finished training step: `index` of `total` from 1, its masked mean squared error, and the ratio it masked."""

    index: int
    total: int
    loss: float
    ratio: float


TrainCallback = Callable[[TrainStep], None]


@dataclass(frozen=True)
class TrainResult:
    """The trained fill in eval mode, the loss of every step, resumed steps included, and why the file could not be written."""

    fill: LatentFill
    losses: list[float]
    problem: str = ""


def channel_statistics(latents: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of latents (N, C, H, W)."""
    exact = latents.cpu().double()  # not every device has float64
    mean, std = exact.mean((0, 2, 3)), exact.std((0, 2, 3)).clamp(min=1e-6)
    return tuple(mean.tolist()), tuple(std.tolist())


def _places(rows: int, columns: int) -> Tensor:
    """Return the (y, x) of every token, (L, 2), with the longer side from 0 to 1."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], 1).float() / max(rows, columns, 2)


def _random_scores(places: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, len(places), generator=generator)


def _block_scores(places: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Distance to a random centre in a random rectangle's metric: the lowest scores form that rectangle."""
    centre = torch.rand(batch, 1, 2, generator=generator) * places.amax(0)
    stretch = (torch.rand(batch, 1, generator=generator) * 2 - 1).exp()
    away = (places - centre).abs()
    return torch.maximum(away[..., 0] * stretch, away[..., 1] / stretch)


def _half_scores(places: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Distance along a random direction: the lowest scores form one side of the image."""
    angle = torch.rand(batch, 1, generator=generator) * 2 * math.pi
    return places[:, 0] * angle.sin() + places[:, 1] * angle.cos()


def _stroke_scores(places: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Distance to a random bent line: the lowest scores form a brush stroke."""
    a, b, c = (torch.rand(3, batch, 1, 2, generator=generator) * 1.2 - 0.1) * places.amax(0)
    t = torch.linspace(0, 1, 24)[:, None]
    line = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c  # (batch, 24, 2)
    return torch.cdist(places.expand(batch, -1, -1), line).amin(-1)


FAMILIES: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "random": _random_scores,
    "block": _block_scores,
    "half": _half_scores,
    "stroke": _stroke_scores,
}
MASK_KINDS = ("mixed", *FAMILIES)


def training_masks(
    family: str, ratio: float, batch: int, rows: int, columns: int, generator: torch.Generator
) -> Tensor:
    """Return bool masks (batch, rows * columns), each hiding the same number of tokens: at least one, never all.

    "mixed" deals the families out over the batch, random patches first.
    """
    places = _places(rows, columns)
    names = list(FAMILIES) if family == "mixed" else [family]
    every = torch.stack([FAMILIES[name](places, batch, generator) for name in names])
    chosen = every[torch.arange(batch) % len(names), torch.arange(batch)]
    # Ties would favour the top left corner.
    chosen = chosen + 1e-4 * torch.rand(chosen.shape, generator=generator)
    count = min(max(masked_count(rows * columns, ratio), 1), rows * columns - 1)
    return lowest(chosen, count)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of step 0, 1, ...: linear over the first 5 %, then a half cosine to 0."""
    warm = max(1, round(0.05 * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def train(
    latents: Tensor,
    fill: FillConfig,
    config: TrainConfig,
    path: str | os.PathLike[str] | None = None,
    resume: bool = True,
    checkpoint_every: int = 200,
    device: torch.device | str = "cpu",
    callback: TrainCallback | None = None,
) -> TrainResult:
    """Train a `LatentFill` on latents (N, C, H, W) and write it to `path`.

    The file is a usable fill at any time. Whatever stops the run (a callback that raises, Ctrl-C) first writes the last
    finished step with the optimiser's state, and the same call resumes there: the result equals an uninterrupted run bit for
    bit on one machine. A finished file is returned as it is. Without `resume` an earlier file is replaced once the new fill is
    finished; until then that is in NAME.unfinished.safetensors. On a full disk the run continues in memory and tries again at
    each checkpoint. Channel statistics are taken from `latents` unless given.
    Raises ValueError for bad latents, or when `path` was begun with other settings and `resume` is on.
    """
    # The host runs nodes in inference mode, whose tensors cannot be trained on.
    with torch.inference_mode(False), torch.enable_grad():
        return _Trainer(latents.detach().clone(), fill, config, path, resume, torch.device(device)).run(
            checkpoint_every, callback
        )


class _Trainer:
    """The state of one run: network, optimiser, losses."""

    def __init__(
        self, latents: Tensor, fill: FillConfig, config: TrainConfig, path: str | os.PathLike[str] | None, resume: bool,
        device: torch.device,
    ) -> None:  # fmt: skip
        check_shape(
            "latents", latents, (None, fill.channels, fill.height, fill.width), "Encode all images at one size."
        )
        if len(latents) == 0:
            raise ValueError("Expected `latents` of at least one image, but got none. Give images to train on.")
        check_finite("latents", latents)
        mean, std = channel_statistics(latents)
        fill = dataclasses.replace(fill, mean=fill.mean or mean, std=fill.std or std)
        self.config, self.device = config, device
        self.path = None if path is None else pathlib.Path(path)
        self.fill = LatentFill(fill, SeededNoise(config.seed).fork("weights")).to(device).train()
        self.optimiser = torch.optim.AdamW(
            self.fill.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.95)
        )
        self.losses: list[float] = []
        self.images = identify(latents.detach().float()).digest[:16]
        self.whole = True
        self.problem = ""
        self.begun = self.path  # where the run is kept until it is finished
        if self.path is not None and self.path.exists():
            unfinished = self.path.with_name(f"{self.path.stem}.unfinished{self.path.suffix}")
            self.begun = self._resume(self.path, unfinished) if resume else unfinished
        # All tokens stay on the CPU: a large folder need not fit on the device.
        centre, spread = (torch.tensor(v).reshape(-1, 1, 1) for v in (fill.mean, fill.std))
        self.tokens = to_tokens((latents.float().cpu() - centre) / spread, fill.patch)
        self.grid = fill.height // fill.patch, fill.width // fill.patch

    def run(self, checkpoint_every: int, callback: TrainCallback | None) -> TrainResult:
        check_integer("checkpoint_every", checkpoint_every, 1)
        finished = len(self.losses) == self.config.steps
        try:
            while len(self.losses) < self.config.steps:
                done = self._step(len(self.losses))
                if callback is not None:
                    callback(done)
                if len(self.losses) % checkpoint_every == 0:
                    self._save()
        except BaseException:
            # Ctrl-C and the host's interrupt both land here: the work so far is kept, and the exception is raised further.
            if self.whole:
                self._save()
            raise
        if not finished:
            self._save()
        return TrainResult(self.fill.eval().requires_grad_(False), self.losses, self.problem)

    def _step(self, step: int) -> TrainStep:
        config = self.config
        generator = SeededNoise(config.seed).fork(f"step {step}").next_generator()
        span = torch.rand((), generator=generator).item()
        fraction = step / max(1, config.steps - 1)
        ratio = (
            config.low + (config.high - config.low) * span
            if config.ratio == "random"
            else mask_ratio(config.ratio, fraction, config.low, config.high)
        )
        rows = torch.randint(len(self.tokens), (config.batch,), generator=generator)
        hidden = training_masks(config.masks, ratio, config.batch, *self.grid, generator).to(self.device)
        tokens = self.tokens[rows].to(self.device)
        error = (self.fill.predict(tokens, hidden) - tokens)[hidden]
        loss = error.square().mean()
        value = float(loss.detach())
        # From here to the end of the step the weights are in between two steps, or spoilt: nothing to keep.
        self.whole = False
        if not math.isfinite(value):
            raise ValueError(
                f"Expected `loss` to be finite, but got {value} at step {step + 1}. Lower `learning_rate`."
            )
        self.optimiser.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.fill.parameters(), 1.0))
        if not math.isfinite(norm):
            raise ValueError(
                f"Expected finite gradients, but got a norm of {norm} at step {step + 1}. Lower `learning_rate`."
            )
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        self.optimiser.step()
        self.losses.append(value)
        self.whole = True
        return TrainStep(step + 1, config.steps, value, ratio)

    def _save(self) -> None:
        """Write the state of the run, or warn when that fails: the next checkpoint tries again."""
        if self.path is None or self.begun is None or not self.losses:
            return
        whole = len(self.losses) >= self.config.steps
        try:
            self._write(self.path if whole else self.begun)
        except OSError as error:
            self.problem = str(error)
            log.warning("Step %d is in memory only: %s", len(self.losses), error)
            return
        self.problem = ""
        if whole and self.begun != self.path:
            self.begun.unlink(missing_ok=True)

    def _write(self, path: pathlib.Path) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.fill.state_dict().items()}
        if len(self.losses) < self.config.steps:
            for name, parameter in self.fill.named_parameters():
                for key, value in self.optimiser.state[parameter].items():
                    tensors[f"train.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        metadata: dict[str, Any] = {
            "config": dataclasses.asdict(self.fill.config),
            "training": dataclasses.asdict(self.config),
            "images": self.images,
            "losses": self.losses,
        }
        write_tensors(path, tensors, metadata)

    def _resume(self, path: pathlib.Path, unfinished: pathlib.Path) -> pathlib.Path:
        """Load the run of these settings from one of two files and return which."""
        different = self._differences(path)
        if different and unfinished.exists() and not self._differences(unfinished):
            path, different = unfinished, []
        if different:
            raise ValueError(
                f"Expected `{path.name}` to be begun with these settings and images, but got other values of "
                f"{', '.join(different)}. Use another name, or turn resume off to train from the start."
            )
        self._load(path)
        return path

    def _differences(self, path: pathlib.Path) -> list[str]:
        """Return the names of the settings with which a file was begun otherwise."""
        metadata = read_tensors(path)[1]
        begun = dataclasses.asdict(read_config(path, metadata)), metadata.get("training")
        wanted = dataclasses.asdict(self.fill.config), dataclasses.asdict(self.config)
        different = [
            name for old, new in zip(begun, wanted) for name in new if old is None or _plain(old.get(name)) != _plain(new[name])
        ]  # fmt: skip
        return [*different, *(["images"] if metadata.get("images", self.images) != self.images else [])]

    def _load(self, path: pathlib.Path) -> None:
        tensors, metadata = read_tensors(path)
        found = read_config(path, metadata)
        self.fill.load_state_dict(LatentFill.from_tensors(tensors, found, path).state_dict())
        self.losses = [float(loss) for loss in metadata.get("losses", [])]
        if len(self.losses) >= self.config.steps:
            return
        for name, parameter in self.fill.named_parameters():
            try:
                state = {key: tensors[f"train.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            except KeyError as error:
                raise bad_file(path, f"a checkpoint without {error}") from error
            moments = {key: value.to(parameter.device) for key, value in state.items() if key != "step"}
            self.optimiser.state[parameter] = {"step": state["step"], **moments}
        log.info("Resuming %s at step %d of %d.", path.name, len(self.losses), self.config.steps)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
