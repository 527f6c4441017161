"""What a latent fill is worth on the pocket model's scenes, and what the mask ratio and the latents do for its training.

    python benchmarks/lmd_fill.py                 # the tables, about four CPU minutes on one core
    python benchmarks/lmd_fill.py --seconds 60    # three times the training budget

Every training run gets the same CPU seconds (not steps), on one thread, from the same scenes; a pixel autoencoder of the same
width and depth sees the images themselves. PSNR is over the masked pixels of held-out scenes, after the VAE's decoder, so the
VAE's own error is the ceiling. Accuracy is the checker's, on all of the scene's attributes.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable

import _common  # noqa: F401
import numpy as np
import torch
from slipstream import load
from slipstream.core import SeededNoise
from slipstream.lmd import FillConfig, LatentFill, RegenerateConfig, TrainConfig, regenerate, train
from slipstream.lmd.latent_fill import interpolate
from slipstream.lmd.training import training_masks
from slipstream_tools.pocket.checker import load_checker, score
from slipstream_tools.pocket.scenes import caption, render, sample_scene
from torch import Tensor

SIDE, CELLS, PATCH = 128, 16, 2
HOLES = (
    ("random 50 %", "random", 0.5),
    ("random 75 %", "random", 0.75),
    ("block 25 %", "block", 0.25),
    ("half", "half", 0.5),
)


def scenes(count: int, seed: int) -> list:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def images_of(found: list) -> Tensor:
    """IMAGE (N, 128, 128, 3) in [0, 1]."""
    return (render(found, SIDE).movedim(1, -1) + 1) / 2


def holes(family: str, ratio: float, count: int) -> Tensor:
    """Masks (N, 16, 16) of whole tokens."""
    side = CELLS // PATCH
    tokens = training_masks(family, ratio, count, side, side, torch.Generator().manual_seed(5)).unflatten(
        1, (side, side)
    )
    return tokens.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).float()


def enlarged(mask: Tensor) -> Tensor:
    """Masks (N, 16, 16) at the size of the images, with hard edges."""
    return mask.repeat_interleave(SIDE // CELLS, 1).repeat_interleave(SIDE // CELLS, 2)


def psnr(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Mean over images of the PSNR within `mask` (N, 16, 16)."""
    pixels = enlarged(mask)[..., None]
    error = ((one - other) ** 2 * pixels).sum((1, 2, 3)) / (3 * pixels.sum((1, 2, 3)))
    return float((-10 * error.clamp(min=1e-8).log10()).mean())


def mean_fill(latents: Tensor, mask: Tensor) -> Tensor:
    """Fill with the mean of the image's visible cells."""
    seen = 1 - mask[:, None]
    mean = (latents * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True)
    return torch.where(mask[:, None] > 0, mean, latents)


def nearest_fill(latents: Tensor, mask: Tensor) -> Tensor:
    """Fill every hidden patch with the nearest visible one."""
    side = CELLS // PATCH
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], 1).float()
    away = torch.cdist(places, places)
    out = latents.clone()
    patches = out.unflatten(2, (side, PATCH)).unflatten(4, (side, PATCH))  # (N, C, side, p, side, p)
    for row, hidden in enumerate(mask[:, ::PATCH, ::PATCH].flatten(1) > 0):
        source = (away + 1e9 * hidden).argmin(1)
        for token in hidden.nonzero().flatten().tolist():
            a, b = divmod(token, side)
            c, d = divmod(int(source[token]), side)
            patches[row, :, a, :, b] = patches[row, :, c, :, d]
    return patches.flatten(4, 5).flatten(2, 3)


def fit(data: Tensor, shape: FillConfig, config: TrainConfig, seconds: float) -> tuple[LatentFill, int, float]:
    """Train for about so many CPU seconds; return the fill, its steps and the CPU seconds it took.

    A short run over the whole range of ratios says how many steps fit, so that the learning rate falls to 0 at the end.
    """

    def run(steps: int) -> tuple[LatentFill, float]:
        began = time.process_time()
        fill = train(data, shape, dataclasses.replace(config, steps=steps)).fill
        return fill, time.process_time() - began

    run(3)  # the first steps of a shape pay for its set-up
    _, spent = run(8)
    steps = max(10, round(8 * seconds / spent))
    fill, spent = run(steps)
    return fill, steps, spent


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |")


DEFAULT = TrainConfig(seed=1, learning_rate=2e-3)


def compare_training(pipe, latents: Tensor, images: Tensor, test: Tensor, truth: Tensor, seconds: float) -> None:
    """Table 1: mask ratios and a pixel autoencoder at the same CPU budget."""
    # The ratios and the pixels are compared as published, without the interpolation that the fill of this pack builds on.
    shape = FillConfig(latents.shape[1], CELLS, CELLS, PATCH, interpolate=False)
    runs = {
        f"latents, {r}": (latents, shape, dataclasses.replace(DEFAULT, ratio=r)) for r in ("random", "cosine", "fixed")
    }
    # A pixel token of 16 x 16 covers what a latent token covers; MAE's own habit is finer: 8 x 8, four times as many tokens.
    for patch in (16, 8):
        config = FillConfig(3, SIDE, SIDE, patch, interpolate=False)
        runs[f"pixels, random, {patch} px patches"] = (images.movedim(-1, 1), config, DEFAULT)
    rows = []
    for name, (data, config, training) in runs.items():
        fill, steps, spent = fit(data, config, training, seconds)
        cells = []
        for _, family, ratio in HOLES:
            mask = holes(family, ratio, len(test))
            if config.channels == 3:
                made = fill.fill(truth.movedim(-1, 1), enlarged(mask)).movedim(1, -1)
            else:
                made = pipe.decode(fill.fill(test, mask))
            cells.append(f"{psnr(made.clamp(0, 1), truth, mask):.2f}")
        rows.append([name, str(steps), f"{spent:.0f}", *cells])
        print(rows[-1], flush=True)
    title = f"Plain masked autoencoders trained for about {seconds:.0f} CPU seconds each: PSNR (dB) in the hole"
    table(title, ["data, ratio", "steps", "CPU s", *[h[0] for h in HOLES]], rows)


def compare_fills(pipe, fill: LatentFill, test: Tensor, truth: Tensor) -> None:
    """Table 2: one pass of the fill against the simplest things a user would do."""
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mean of the visible cells": mean_fill,
        "nearest visible patch": nearest_fill,
        "interpolation": lambda latents, mask: torch.where(
            mask[:, None] > 0, interpolate(latents, 1 - mask[:, None]), latents
        ),
        "latent fill, one pass": fill.fill,
        "nothing missing (the VAE)": lambda latents, mask: latents,
    }
    rows = []
    for name, way in ways.items():
        masks = [holes(family, ratio, len(test)) for _, family, ratio in HOLES]
        rows.append([name, *(f"{psnr(pipe.decode(way(test, mask)), truth, mask):.2f}" for mask in masks)])
    table("Filling held-out scenes: PSNR (dB) in the hole", ["way", *[h[0] for h in HOLES]], rows)


def compare_sampling(pipe, fill: LatentFill, test: Tensor, truth: Tensor, found: list) -> None:
    """Table 3: a fill and a few steps against inpainting from noise, with the scene's caption."""
    cond, uncond = pipe.encode_text([caption(s) for s in found]), pipe.encode_text([""])
    mask, checker = holes("block", 0.4, len(test)), load_checker()
    starts = {"mean": mean_fill(test, mask), "nearest": nearest_fill(test, mask), "fill": fill.fill(test, mask)}
    plans = [
        ("from noise, 20 steps", "mean", 20, 1.0), ("from noise, 6 steps", "mean", 6, 1.0),
        *[(f"{n}, {k} steps at {s}", n, k, s) for k, s in ((6, 0.8), (6, 0.6)) for n in ("fill", "mean", "nearest")],
        ("fill, 3 steps at 0.6", "fill", 3, 0.6), ("fill alone", "fill", 0, 0.0),
    ]  # fmt: skip
    rows = []
    for name, start, steps, strength in plans:
        made, calls = starts[start], pipe.model.rows
        if steps:
            config = RegenerateConfig(
                1, "fixed", high=1.0, strength=strength, steps=steps, cfg_scale=3.0, schedule="uniform"
            )
            made = regenerate(pipe.model, made, cond, uncond, config, SeededNoise(3), mask).latents
        image = pipe.decode(made)
        share = score(checker, image.movedim(-1, 1) * 2 - 1, found)
        rows.append([
            name, str((pipe.model.rows - calls) // len(test)), f"{psnr(image, truth, mask):.2f}",
            f"{share['shape']:.0%}", f"{share['all']:.0%}",
        ])  # fmt: skip
    share = score(checker, pipe.decode(test).movedim(-1, 1) * 2 - 1, found)
    rows.append(
        [
            "nothing missing",
            "0",
            f"{psnr(pipe.decode(test), truth, mask):.2f}",
            f"{share['shape']:.0%}",
            f"{share['all']:.0%}",
        ]
    )
    table(
        f"Inpainting a 40 % block of {len(test)} scenes", ["way", "rows", "PSNR (dB)", "shape right", "all right"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of each of six training runs")
    parser.add_argument("--part", choices=("all", "training", "filling"), default="all")
    parser.add_argument("--scenes", type=int, default=600, help="training scenes")
    parser.add_argument("--tests", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load("pocket", dtype=torch.float32)
    began = time.process_time()
    images = images_of(scenes(args.scenes, 0))
    latents = pipe.encode_image(images)
    spent = time.process_time() - began
    found = scenes(args.tests, 1)
    truth = images_of(found)
    test = pipe.encode_image(truth)
    print(f"{args.scenes} scenes drawn and encoded once in {spent:.1f} CPU seconds; {args.tests} held-out scenes")
    if args.part in ("all", "training"):
        compare_training(pipe, latents, images, test, truth, args.seconds)
    if args.part in ("all", "filling"):
        shape = FillConfig(latents.shape[1], CELLS, CELLS, PATCH)
        fill, steps, spent = fit(latents, shape, DEFAULT, args.seconds)
        print(f"\nThe fill of this pack (on interpolation), {steps} steps in {spent:.0f} CPU seconds")
        compare_fills(pipe, fill, test, truth)
        compare_sampling(pipe, fill, test, truth, found)


if __name__ == "__main__":
    main()
