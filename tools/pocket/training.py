"""What every training stage shares: a resumable loop against the clock, weight averaging, schedules, several processes."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Stateful(Protocol):
    """Anything whose state a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Loop:
    """Yield the share of the training time that has passed, until it is over.

    The `parts` are saved once a minute and at the end; a new loop on the same `checkpoint` continues there, the time
    spent before included.
    """

    def __init__(self, checkpoint: pathlib.Path, minutes: float, parts: Mapping[str, Stateful]) -> None:
        self.checkpoint, self.minutes, self.parts = checkpoint, minutes, parts
        self.step, self.seconds, self._figures = 0, 0.0, {}
        if checkpoint.exists():
            saved = torch.load(checkpoint, map_location="cpu")
            self.step, self.seconds = saved["step"], saved["seconds"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            self.log(resumed=True)

    def __iter__(self) -> Iterator[float]:
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        while (share := self._share(began)) < 1:
            yield share
            self.step += 1
            if time.monotonic() - saved > 60:
                saved = time.monotonic()
                self.save()
        self.save()

    def _share(self, began: float) -> float:
        self.seconds = time.monotonic() - began
        share = torch.tensor([self.seconds / (60 * self.minutes)])
        if processes() > 1:  # all leave the loop at the same step
            dist.broadcast(share, 0)
        return share.item()

    def save(self) -> None:
        if rank() == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            partial = self.checkpoint.with_suffix(".partial")
            torch.save({**state, "step": self.step, "seconds": self.seconds}, partial)
            os.replace(partial, self.checkpoint)  # a kill while writing leaves the old one

    def report(self, every: int = 50, **figures: Tensor) -> None:
        """Average figures over `every` steps, then print them and add them to the log beside the checkpoint."""
        for name, value in figures.items():
            self._figures.setdefault(name, []).append(value.detach())
        if (self.step + 1) % every == 0:
            self.log(**{name: round(torch.stack(v).mean().item(), 5) for name, v in self._figures.items()})
            self._figures = {}

    def log(self, **figures: object) -> None:
        if rank() == 0:
            line = json.dumps(
                {"stage": self.checkpoint.stem, "step": self.step, "seconds": round(self.seconds), **figures}
            )
            print(line, flush=True)
            with self.checkpoint.with_suffix(".jsonl").open("a") as log:
                log.write(line + "\n")


class Average:
    """Exponential moving average of a module's parameters, warmed up so that the first steps do not linger."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.live = list(module.parameters())
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for p, mean in zip(module.parameters(), self.mean):
            p.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for mean, saved in zip(self.mean, state["mean"]):
            mean.copy_(saved)


def cosine(share: float, warm_up: float = 0.03, end: float = 0.01) -> float:
    """Factor of the learning rate after this share of the training: linear warm-up, then half a cosine."""
    if share < warm_up:
        return max(share / warm_up, 0.02)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))


def apply_gradients(loss: Tensor, lr: float, *optimizers: torch.optim.Optimizer) -> None:
    """One step of every optimizer on a loss, the gradients averaged over all processes and clipped to norm 1."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    for p in parameters:
        p.grad = None
    loss.backward()
    if processes() > 1:
        average_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in groups:
        group["lr"] = lr
    for optimizer in optimizers:
        optimizer.step()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """One all-reduce over all gradients: on a CPU, two processes of one thread beat one process of two by far."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= processes()
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
