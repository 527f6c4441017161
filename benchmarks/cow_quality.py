"""COW beside what a user would do instead, at equal network rows: on exact Gaussian fields and on the bundled model.

    python benchmarks/cow_quality.py [--fields 64] [--seeds 4] [--scenes 8] [--out benchmarks/out]

Fields (a square of a random field is kept, the rest starts from zeros; the true conditional distribution is known, means over
the noise seeds): error of the kept square before anything is pasted (ideal 0), squared jump across its edge over its expectation,
before and after the true square is pasted back (1), variance of the background (1), squared Mahalanobis distance of the
background given the square, per dimension (1).

Scenes (one object of a rendered scene with two is kept on grey, the prompt is the whole caption): PSNR of the kept pixels before
pasting (8 pixels inside the edge and more, where no cell of the latents is shared); squared jump across the edge of the mask over
that of the true scene (1 is ideal, autoencoders blur it); halo, the root mean square error (of 255) in the 6 pixels around the
mask, where a second outline of the subject shows; and what the attribute checker reads after pasting: the surroundings are the
background's colour and the other object's colour and shape.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence

import _common
import numpy as np
import slipstream
import torch
from baselines import image_to_image, masked_replacement, repaint
from fields import Bed
from slipstream.core import CFG, Conditioning, NoiseSpace, SeededNoise, make_sigmas
from slipstream.core.cache import INVERSIONS
from slipstream.core.guidance import Denoise
from slipstream.core.images import save_image, side_by_side
from slipstream.core.masks import grow
from slipstream.core.noise import NoiseSource
from slipstream.core.schedules import Levels
from slipstream.core.tensors import composite
from slipstream.cow import CowConfig, generate
from slipstream_tools.pocket.checker import labels, load_checker, predict
from slipstream_tools.pocket.scenes import caption, coverage, render, sample_scene
from torch import Tensor

Run = Callable[[NoiseSource], Tensor]
COW = {
    "COW, one final replacement": {"preserve": 0.2},
    "COW, replacement for 60 %": {"preserve": 0.6},
    "COW (default: to the end)": {},
    "COW without noise limit": {"noise_limit": 1000.0},
}


def others(denoise: Denoise, canvas: Tensor, keep: Tensor, levels: Levels, space: NoiseSpace) -> dict[str, Run]:
    """Return what a user would do instead, each in 30 network calls."""

    def sigmas(steps: int, strength: float = 1.0) -> Tensor:
        return make_sigmas("leading", levels, steps, strength)

    return {
        "paste + img2img 0.7": lambda n: image_to_image(denoise, canvas, sigmas(30, 0.7), space, n),
        "masked replacement, eta 0": lambda n: masked_replacement(denoise, canvas, keep, sigmas(30), space, n, 0.0),
        "masked replacement, eta 1": lambda n: masked_replacement(denoise, canvas, keep, sigmas(30), space, n, 1.0),
        "RePaint, 6 levels x 5": lambda n: repaint(denoise, canvas, keep, sigmas(6), space, n, 5),
    }


def measure_fields(count: int, seeds: int, names: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Return the measures of each method on exact Gaussian fields."""
    bed, cond = Bed.make(count), Conditioning(torch.zeros(1, 1, 1))
    runs = others(CFG(bed.model, cond), bed.canvas, bed.keep, bed.model.levels, bed.model.space)
    for name, changes in COW.items():
        config = CowConfig(steps=10, **changes)
        runs[name] = lambda n, c=config: generate(bed.model, bed.canvas, bed.keep[:, 0], cond, None, c, n).latents
    found = {"the fields themselves": {"calls": 0.0, **bed.metrics(bed.truth)}}
    for name in names or runs:
        bed.model.calls = 0
        rows = [bed.metrics(runs[name](SeededNoise(seed))) for seed in range(seeds)]
        found[name] = {"calls": bed.model.calls / seeds, **{k: float(np.mean([r[k] for r in rows])) for k in rows[0]}}
    return found


def measure_scenes(count: int, out: pathlib.Path) -> dict[str, dict[str, float]]:
    """Return the measures of each method on the bundled model, and save a few pictures side by side."""
    pipe, checker = slipstream.load("pocket"), load_checker()
    rng = np.random.default_rng(1234)
    scenes = [sample_scene(rng, objects=2) for _ in range(count)]
    truth = ((render(scenes) + 1) / 2).movedim(1, -1)
    masks = torch.stack([coverage(scene.items[0], 128) for scene in scenes])
    canvas = composite(torch.full_like(truth, 0.5), truth, masks)
    latents, cond = pipe.encode_image(canvas), pipe.encode_text([caption(scene) for scene in scenes])
    uncond, keep = (
        pipe.encode_text([""]),
        torch.nn.functional.interpolate(masks[:, None], (16, 16), mode="area").round(),
    )

    model = pipe.model
    runs = others(CFG(model, cond, uncond, 3.0), latents, keep, model.levels, model.space)
    for name, changes in list(COW.items())[:3]:  # all of these subjects invert well: the noise limit is idle
        config = CowConfig(steps=10, cfg_scale=3.0, **changes)
        runs[name] = lambda n, c=config: generate(model, latents, masks, cond, uncond, c, n).latents
    wanted = labels(scenes)
    found = {"the scenes themselves": read(checker, truth, truth, masks, wanted, 0)}
    shown = {"canvas": canvas}
    for name, run in runs.items():
        model.rows = 0
        INVERSIONS.clear()  # each method pays for its own
        picture = pipe.decode(run(SeededNoise(0)))
        found[name] = read(checker, picture, truth, masks, wanted, model.rows / count)
        shown[name] = composite(picture, truth, masks)
    rows = [side_by_side([images[i : i + 1] for images in shown.values()]) for i in range(min(4, count))]
    print(f"{' | '.join(shown)}: {save_image(torch.cat(rows, 1), out / 'cow_quality.png')}")
    return found


def read(
    checker: torch.nn.Module, picture: Tensor, truth: Tensor, masks: Tensor, wanted: dict[str, Tensor], rows: float
) -> dict[str, float]:
    """Return the measures of pictures (B, H, W, 3) whose kept part is `masks` (B, H, W)."""
    pasted = composite(picture, truth, masks)
    seen = predict(checker, pasted.movedim(-1, 1) * 2 - 1)
    kept = grow(masks, -8) > 0.99
    error = float((picture - truth)[kept].square().mean())
    ring = (grow(masks, 6) > 0.5) & (masks < 0.01)
    halo = 255 * float((picture - truth)[ring].square().mean().sqrt())
    right = {k: 100 * float((seen[k] == wanted[k]).float().mean()) for k in ("background", "colour2", "shape2")}
    return {
        "rows": rows, "kept PSNR": -10 * float(np.log10(max(error, 1e-10))),
        "seam": jump(picture, masks) / jump(truth, masks), "seam after paste": jump(pasted, masks) / jump(truth, masks),
        "halo": halo, "background %": right["background"], "other colour %": right["colour2"], "other shape %": right["shape2"],
    }  # fmt: skip


def jump(image: Tensor, masks: Tensor) -> float:
    """Mean squared difference of neighbouring pixels across the edge of the mask."""
    inside, total = masks > 0.5, []
    for axis in (1, 2):
        edge = inside != inside.roll(-1, axis)
        total.append((image - image.roll(-1, axis)).square()[edge].flatten())
    return float(torch.cat(total).mean())


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown, one method a row."""
    columns = list(next(iter(found.values())))
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for name, row in found.items():
        cells = [f"{v:.0f}" if c in ("calls", "rows", "halo") or "%" in c else f"{v:.2f}" for c, v in row.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=8, help="0 leaves the bundled model out")
    parser.add_argument("--out", type=pathlib.Path, default=_common.OUT)
    args = parser.parse_args()
    print("Gaussian fields\n\n" + table(measure_fields(args.fields, args.seeds)) + "\n")
    if args.scenes:
        print("Bundled model\n\n" + table(measure_scenes(args.scenes, args.out)))


if __name__ == "__main__":
    main()
