"""COW beside what a user would do instead, at equal network rows: on exact Gaussian fields and on the bundled models.

    python benchmarks/cow_quality.py [--fields 64] [--seeds 4] [--scenes 16] [--models pocket pocket-flow] [--dial] [--out benchmarks/out]

Fields (a square of a random field is kept, the rest starts from zeros; the true conditional distribution is known, means over
the noise seeds): error of the kept square before anything is pasted (ideal 0), squared jump across its edge over its expectation,
before and after the true square is pasted back (1), variance of the background (1), squared Mahalanobis distance of the
background given the square, per dimension (1).

Scenes (one object of a rendered scene is kept on grey, the prompt is the whole caption): PSNR of the kept pixels before pasting (8
pixels inside the edge and more, where no cell of the latents is shared); squared jump across the edge of the mask over that of the
true scene (1 is ideal, autoencoders blur it); halo, the root mean square error (of 255) in the 6 pixels around the mask, where a
second outline of the subject shows; growth, the pixels outside the mask that look like the subject, in % of its area; and what the
attribute checker reads after pasting: the surroundings are the background's colour and the other object's colour and shape. pocket-flow
has no checker of its own here: for its surroundings, the share of pixels nearer to the true background than to grey.

`--dial` measures `follow` at its five settings instead, and draws the chart of docs/guides/cow.md.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import _common
import numpy as np
import slipstream
import torch
from baselines import image_to_image, lanpaint, masked_replacement, repaint
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
from slipstream_tools.pocket import flow_scenes as flow
from slipstream_tools.pocket.checker import labels, load_checker, predict
from slipstream_tools.pocket.scenes import COLOURS, Scene, caption, coverage, render, sample_scene
from torch import Tensor

Run = Callable[[NoiseSource], Tensor]
COW = {
    "COW (default)": {},
    "COW, canvas, 10 cycles (the published way)": {"start": "canvas", "cycles": 10, "inversion_cfg": 1.5},
    "COW, fresh noise to the end (final_eta 1)": {"final_eta": 1.0},
}
DIAL = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = 20


def others(denoise: Denoise, canvas: Tensor, keep: Tensor, levels: Levels, space: NoiseSpace) -> dict[str, Run]:
    """Return what a user would do instead, each in 30 network calls."""

    def sigmas(steps: int, strength: float = 1.0) -> Tensor:
        return make_sigmas("leading", levels, steps, strength)

    return {
        "paste + img2img 0.7": lambda n: image_to_image(denoise, canvas, sigmas(30, 0.7), space, n),
        "masked replacement, eta 0": lambda n: masked_replacement(denoise, canvas, keep, sigmas(30), space, n, 0.0),
        "masked replacement, eta 1": lambda n: masked_replacement(denoise, canvas, keep, sigmas(30), space, n, 1.0),
        "RePaint, 6 levels x 5": lambda n: repaint(denoise, canvas, keep, sigmas(6), space, n, 5),
        "LanPaint, 5 levels x (5 + 1)": lambda n: lanpaint(denoise, canvas, keep, sigmas(5), space, n),
        "LanPaint, 10 levels x (2 + 1)": lambda n: lanpaint(
            denoise, canvas, keep, sigmas(10), space, n, inner=2, step=0.6, friction=1.0
        ),
    }


def measure_fields(
    count: int, seeds: int, names: Sequence[str] | None = None, first: int = 0
) -> dict[str, dict[str, float]]:
    """Return the measures of each method on exact Gaussian fields."""
    bed, cond = Bed.make(count), Conditioning(torch.zeros(1, 1, 1))
    runs = others(CFG(bed.model, cond), bed.canvas, bed.keep, bed.model.levels, bed.model.space)
    for name, changes in COW.items():
        config = CowConfig(steps=STEPS, **changes)
        runs[name] = lambda n, c=config: generate(bed.model, bed.canvas, bed.keep[:, 0], cond, None, c, n).latents
    found = {"the fields themselves": {"calls": 0.0, **bed.metrics(bed.truth)}}
    for name in names or runs:
        bed.model.calls = 0
        rows = [bed.metrics(runs[name](SeededNoise(seed))) for seed in range(first, first + seeds)]
        found[name] = {"calls": bed.model.calls / seeds, **{k: float(np.mean([r[k] for r in rows])) for k in rows[0]}}
    return found


@dataclass
class Kept:
    """Scenes of which one object is kept: images (B, H, W, 3), its masks (B, H, W), captions, and what the checker should read."""

    pipe: slipstream.core.Pipeline
    truth: Tensor
    empty: Tensor
    masks: Tensor
    captions: list[str]
    wanted: dict[str, Tensor] | None

    @property
    def canvas(self) -> Tensor:
        return composite(torch.full_like(self.truth, 0.5), self.truth, self.masks)


def kept(model: str, count: int, contradicted: bool = False) -> Kept:
    """Return scenes of a bundled model's own world: pocket's with a second object that the text asks for, pocket-flow's with one.

    `contradicted`: the text gives the kept object the next colour of the palette that is not in the scene.
    """
    pipe, rng = slipstream.load(model), np.random.default_rng(1234)
    if model == "pocket-flow":
        atlas, scenes = flow.make_atlas(), flow.sample_scenes(count, rng, pairs=0.0)
        truth, empty = (
            ((part + 1) / 2).movedim(1, -1) for part in (flow.render(scenes, atlas), 2 * flow.backgrounds(scenes) - 1)
        )
        return Kept(
            pipe,
            truth,
            empty,
            flow.coverage(scenes, atlas)[:, 0],
            [flow.caption(scenes, i) for i in range(count)],
            None,
        )
    drawn = [sample_scene(rng, objects=2) for _ in range(count)]
    truth, empty = (
        ((render(part) + 1) / 2).movedim(1, -1) for part in (drawn, [replace(s, items=s.items[1:]) for s in drawn])
    )
    masks = torch.stack([coverage(scene.items[0], 128) for scene in drawn])
    told = [with_other_colour(scene) for scene in drawn] if contradicted else drawn
    return Kept(pipe, truth, empty, masks, [caption(scene) for scene in told], labels(told))


def with_other_colour(scene: Scene) -> Scene:
    first, second = scene.items
    after = COLOURS.index(first.colour)
    order = [*COLOURS[after + 1 :], *COLOURS[:after]]
    colour = next(c for c in order if c not in (scene.background, second.colour))
    return replace(scene, items=(replace(first, colour=colour), second))


def measure_scenes(
    scenes: Kept, out: pathlib.Path, configs: dict[str, dict] | None = None, only: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Return the measures of each method (or of `configs` of COW alone) on a bundled model; saves a few images side by side."""
    pipe, model, count = scenes.pipe, scenes.pipe.model, len(scenes.truth)
    latents, cond, uncond = pipe.encode_image(scenes.canvas), pipe.encode_text(scenes.captions), pipe.encode_text([""])
    keep = torch.nn.functional.interpolate(scenes.masks[:, None], latents.shape[-2:], mode="area").round()
    runs = {} if configs else others(CFG(model, cond, uncond, 3.0), latents, keep, model.levels, model.space)
    for name, changes in (configs or COW).items():
        config = CowConfig(steps=STEPS, cfg_scale=3.0, **changes)
        runs[name] = lambda n, c=config: generate(model, latents, scenes.masks, cond, uncond, c, n).latents
    checker = load_checker()
    found = {} if configs else {"the scenes themselves": read(checker, scenes, scenes.truth, 0)}
    shown = {"canvas": scenes.canvas}
    for name, run in runs.items():
        if only and name not in only:
            continue
        model.rows = 0
        INVERSIONS.clear()  # each method pays for its own
        result = run(SeededNoise(0))
        image = pipe.decode(result).float()
        found[name] = read(checker, scenes, image, model.rows / count)
        if configs:
            whole = torch.nn.functional.interpolate(scenes.masks[:, None], latents.shape[-2:], mode="area") > 0.99
            inside = whole.expand_as(latents)
            change = (result - latents)[inside].square().mean().sqrt() / latents[inside].std()
            own = predict(checker, image.movedim(-1, 1) * 2 - 1)["colour"]
            asked = 100 * float((own == (scenes.wanted or {"colour": own})["colour"]).float().mean())
            found[name] |= {"subject's latents changed %": 100 * float(change), "subject as the text says %": asked}
        shown[name] = image if configs else composite(image, scenes.truth, scenes.masks)
        print(f"  {name}: {found[name]}", flush=True)
    rows = [side_by_side([images[i : i + 1] for images in shown.values()]) for i in range(min(4, count))]
    print(f"{' | '.join(shown)}: {save_image(torch.cat(rows, 1), out / 'cow_quality.png')}")
    return found


def read(checker: torch.nn.Module, scenes: Kept, image: Tensor, rows: float) -> dict[str, float]:
    """Return the measures of images (B, H, W, 3)."""
    truth, masks = scenes.truth, scenes.masks
    pasted = composite(image, truth, masks)
    inside = grow(masks, -8) > 0.99
    error = float((image - truth)[inside].square().mean()) if bool(inside.any()) else 1e-10
    ring = (grow(masks, 6) > 0.5) & (masks < 0.01)
    halo = 255 * float((image - scenes.empty)[ring].square().mean().sqrt())
    found = {
        "rows": rows, "kept PSNR": -10 * float(np.log10(max(error, 1e-10))), "seam": jump(image, masks) / jump(truth, masks),
        "seam after paste": jump(pasted, masks) / jump(truth, masks), "halo": halo, "growth %": growth(scenes, image),
    }  # fmt: skip
    if scenes.wanted is None:
        apart = [(image - other).square().sum(-1) for other in (scenes.empty, torch.full_like(truth, 0.5))]
        return {**found, "background %": 100 * float((apart[0] < apart[1])[masks < 0.01].float().mean())}
    seen = predict(checker, pasted.movedim(-1, 1) * 2 - 1)
    asked = {"background": "background %", "colour2": "other colour %", "shape2": "other shape %"}
    return {**found, **{v: 100 * float((seen[k] == scenes.wanted[k]).float().mean()) for k, v in asked.items()}}


def growth(scenes: Kept, image: Tensor) -> float:
    """Return the pixels within 20 of the mask, and outside it, that are nearer to a colour of the subject than to what is truly there."""
    shares = []
    for i, mask in enumerate(scenes.masks):
        ring = (grow(mask[None], 20)[0] > 0.5) & (mask < 0.02)
        colours = scenes.truth[i][mask > 0.9]
        colours = colours[torch.linspace(0, len(colours) - 1, 64).long()]
        like, away = torch.cdist(image[i][ring], colours).amin(1), (image[i] - scenes.empty[i])[ring].norm(dim=1)
        shares.append(float(((like < away) & (away > 0.15)).sum() / (mask > 0.9).sum()))
    return 100 * float(np.mean(shares))


def dial_chart(found: dict[str, dict[str, float]], path: pathlib.Path) -> pathlib.Path:
    """Draw the subject's change and what follows the text over the five settings, in percent; returns the SVG file."""
    rows = list(found.values())
    change = [r["subject's latents changed %"] for r in rows]
    around = [(r["background %"] + r["other colour %"] + r["other shape %"]) / 3 for r in rows]
    asked = [r["subject as the text says %"] for r in rows]
    most = max(100.0, *change)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 300" font-family="sans-serif" font-size="13">',
        '<rect width="520" height="300" fill="white"/><path d="M60 60V240H470" fill="none" stroke="#888"/>',
    ]
    for n, (values, colour, name) in enumerate((
        (change, "#c33", "change of the subject's latents, % of their deviation"),
        (around, "#36c", "surroundings as the text says, %"),
        (asked, "#2a2", "subject as the text says (it asks for another colour), %"),
    )):  # fmt: skip
        points = [(60 + 410 * f, 240 - 180 * v / most) for f, v in zip(DIAL, values)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        lines.append(f'<text x="70" y="{16 + 16 * n}" fill="{colour}">{name}</text>')
    lines += [f'<text x="{60 + 410 * f:.0f}" y="258" text-anchor="middle">{f:g}</text>' for f in DIAL]
    lines.append(
        '<text x="60" y="284">keep the pixels</text><text x="470" y="284" text-anchor="end">follow the text</text></svg>'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


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
    parser.add_argument("--fields", type=int, default=64, help="0 leaves the fields out")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=16, help="0 leaves the bundled models out")
    parser.add_argument("--models", nargs="+", default=["pocket", "pocket-flow"])
    parser.add_argument("--dial", action="store_true", help="measure the dial only, and draw its chart")
    parser.add_argument("--out", type=pathlib.Path, default=_common.OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.dial:
        found = measure_scenes(
            kept("pocket", args.scenes, True), args.out, {f"follow {f:g}": {"follow": f} for f in DIAL}
        )
        print(table(found))
        print(dial_chart(found, _common.ROOT / "docs" / "img" / "cow_dial.svg"))
        return
    if args.fields:
        print("Gaussian fields\n\n" + table(measure_fields(args.fields, args.seeds)) + "\n", flush=True)
    for model in args.models if args.scenes else []:
        print(f"{model}\n\n" + table(measure_scenes(kept(model, args.scenes), args.out)) + "\n", flush=True)


if __name__ == "__main__":
    main()
