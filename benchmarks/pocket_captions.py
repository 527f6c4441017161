"""Caption accuracy of the bundled pocket model: teacher and few-step student, one and two objects, held-out captions."""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any

import _common
import numpy as np
import torch
from slipstream_tools.pocket import checker as reading
from slipstream_tools.pocket import sampling
from slipstream_tools.pocket.scenes import caption, render, sample_scene
from torch import Tensor

ATTRIBUTES = ("background", "colour", "place", "shape", "size", "count", "colour2", "shape2", "size2", "all")
BAR = {"background": 0.97, "colour": 0.97, "place": 0.97, "shape": 0.90}
Draw = Callable[[list[str], Tensor], Tensor]


def runs(folder: pathlib.Path, cfg_scale: float, seed: int) -> list[tuple[str, Any, Draw]]:
    """(name, pipeline, captions and noise -> latents) of each column; the student's where it is there."""
    teacher = sampling.load_pipeline(folder)

    def guided(steps: int) -> Draw:
        return lambda captions, noise: sampling.ddim_latents(teacher, captions, noise, steps, cfg_scale)

    columns = [(f"teacher {n}", teacher, guided(n)) for n in (20, 4)]
    if (folder / "unet_lcm").exists():
        student = sampling.load_pipeline(folder, student=True)

        def distilled(steps: int) -> Draw:
            return lambda captions, noise: sampling.lcm_latents(student, captions, noise, steps, seed)

        columns += [(f"student {n}", student, distilled(n)) for n in (4, 2, 1)]
    return columns


def drawn_images(pipe: Any, draw: Draw, captions: list[str], seed: int, batch: int = 32) -> Tensor:
    """All captions drawn from the same noise in every run."""
    noise = sampling.start_noise(pipe.unet, len(captions), seed)
    parts = [draw(captions[i : i + batch], noise[i : i + batch]) for i in range(0, len(captions), batch)]
    return sampling.decode(pipe.vae, torch.cat(parts))


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown, attributes down and runs across, in percent."""
    lines = ["| % right | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for name in ATTRIBUTES:
        cells = [f"{100 * c[name]:.1f}" if name in c else "-" for c in columns.values()]
        if set(cells) != {"-"}:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(scores: dict[str, float]) -> str:
    """Whether the teacher at 20 steps meets the bar for one object."""
    asked = ", ".join(f"{name} {100 * bar:.0f} %" for name, bar in BAR.items())
    missed = ", ".join(f"{name} {100 * scores[name]:.1f} %" for name, bar in BAR.items() if scores[name] < bar)
    return f"The bar for one object ({asked}) is " + (f"missed: {missed}." if missed else "met.")


def measure(args: argparse.Namespace, objects: int, checker: Any) -> dict[str, dict[str, float]]:
    """Scores of every run on `args.n` captions, and of the real scenes and their way through the autoencoder."""
    rng = np.random.default_rng([args.seed, objects])
    scenes = [sample_scene(rng, objects) for _ in range(args.n)]
    captions = [caption(s) for s in scenes]
    columns, sheets = {}, []
    real = render(scenes)
    columns["real"] = reading.score(checker, real, scenes)
    for name, pipe, draw in runs(args.folder, args.cfg, args.seed):
        if len(columns) == 1:
            mean = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in real.split(32)])
            decoded = sampling.decode(pipe.vae, mean * pipe.vae.config.scaling_factor)
            columns["vae"] = reading.score(checker, decoded, scenes)
        began = time.perf_counter()
        drawn = drawn_images(pipe, draw, captions, args.seed)
        columns[name] = reading.score(checker, drawn, scenes)
        sheets.append((name, drawn[:32]))
        print(f"  {name}: {(time.perf_counter() - began) / args.n:.2f} s per image", flush=True)
    for name, drawn in sheets:
        sheet = sampling.contact_sheet(drawn, captions)
        sheet.save(args.out / f"pocket_{name.replace(' ', '_')}_steps_{objects}_objects.png")
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, default=_common.ROOT / "pocket")
    parser.add_argument("--out", type=pathlib.Path, default=_common.OUT)
    parser.add_argument("--n", type=int, default=256, help="captions per table")
    parser.add_argument("--seed", type=int, default=4242)
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance scale of the teacher")
    parser.add_argument("--objects", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    checker = reading.load_checker()
    for objects in args.objects:
        word = {1: "One object", 2: "Two objects"}[objects]
        columns = measure(args, objects, checker)
        print(
            f"\n{word}: {args.n} held-out captions, seed {args.seed}, teacher DDIM at cfg {args.cfg:g}, student without\n"
        )
        print(table(columns), "\n", flush=True)
        if objects == 1:
            print(verdict(columns["teacher 20"]))
    print(f"Contact sheets are in {args.out}")


if __name__ == "__main__":
    main()
