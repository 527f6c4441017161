"""COW beside what a user would do instead, at equal network rows: on exact Gaussian fields and on the bundled models.

    python benchmarks/cow_quality.py [--fields 64] [--seeds 3] [--scenes 8] [--models pocket pocket-flow] [--only NAME ...] [--dial]

Every figure is a mean with its 95 % interval, over the seeds (fields) or over the scenes of all seeds (each seed has noise and scenes
of its own; an accuracy of one scene is 0 or 100). A finished seed is kept in `--out`; a further run continues there, and `--minutes`
ends it.

Fields (a square of a random field is kept, the rest starts from zeros; the true conditional distribution is known): error of the kept
square before anything is pasted (ideal 0), squared jump across its edge over its expectation, before and after the true square is
pasted back (1), variance of the background (1), squared Mahalanobis distance of the background given the square, per dimension (1).

Scenes (one object of a rendered scene is kept on grey, the prompt is the whole caption): PSNR of the kept pixels before pasting (8
pixels inside the edge and more, where no cell of the latents is shared); squared jump across the edge of the mask over that of the
true scene (1 is ideal, autoencoders blur it); halo, the root mean square error (of 255) in the 6 pixels around the mask, where a
second outline of the subject shows; growth, the pixels outside the mask that belong to the subject by colour and place, in % of its
area; and what the attribute checker reads after pasting: the surroundings are the background's colour and the other object's colour
and shape (pocket-flow: what object it is).

"guided around the subject too" is the default without its guidance of 1 around the subject, "latents alone" without the edge redrawn
through the autoencoder. "the scenes encoded and decoded" is what the autoencoder alone does to the true scenes: no method can do
better before pasting. Below the table stand the differences of the default to that, and of every method to the default, in the same scenes.

`--dial` measures `follow` at its five settings instead, and draws the chart of docs/guides/cow.md. There text and subject compete: the
mask keeps 12 pixels of the old ground around the subject, and the text asks for another colour of both. The surroundings are as the
text says where a pixel outside the mask is nearer to the scene that the text asks for than to the old one; the checker reads them after
the kept part is pasted, as above.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import _common
import numpy as np
import slipstream
import torch
from baselines import image_to_image, lanpaint, masked_replacement, repaint
from fields import Bed
from intervals import bounds, interval
from slipstream.core import CFG, Conditioning, NoiseSpace, SeededNoise, make_sigmas
from slipstream.core.cache import INVERSIONS
from slipstream.core.guidance import Denoise
from slipstream.core.images import save_image, side_by_side
from slipstream.core.masks import grow
from slipstream.core.noise import NoiseSource
from slipstream.core.schedules import Levels
from slipstream.core.tensors import composite, gaussian_blur
from slipstream.cow import CowConfig, generate
from slipstream.cow.canvas import colour_and_place, nearest, on_scene
from slipstream_tools.pocket import flow_scenes as flow
from slipstream_tools.pocket.checker import Checker, labels, load_checker, predict
from slipstream_tools.pocket.flow_checker import labels as flow_labels
from slipstream_tools.pocket.flow_checker import load_flow_checker
from slipstream_tools.pocket.scenes import COLOURS, Scene, caption, coverage, render, sample_scene
from torch import Tensor

Run = Callable[[NoiseSource], Tensor]
Values = dict[str, dict[str, list[float]]]  # by method and measure, one for each seed or scene
DEFAULT, FULLY, LATENTS = "COW (default)", "COW, guided around the subject too", "COW, latents alone (no redrawn edge)"
COW = {
    DEFAULT: {},
    FULLY: {},
    LATENTS: {},
    "COW, canvas, 10 cycles (the published way)": {"start": "canvas", "cycles": 10, "inversion_cfg": 1.5},
    "COW, fresh noise to the end (final_eta 1)": {"final_eta": 1.0},
}
DIAL = (0.0, 0.25, 0.5, 0.75, 1.0)
CHANGE, ASKED, AROUND = "subject's latents changed %", "subject as the text says %", "surroundings as the text says %"
THROUGH = "the scenes encoded and decoded"
STEPS, SCALE = 20, 3.0


@dataclass(frozen=True)
class Given:
    """What every method is given."""

    denoise: Denoise
    canvas: Tensor
    keep: Tensor
    levels: Levels
    space: NoiseSpace

    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor:
        return make_sigmas("leading", self.levels, steps, strength)


# What a user would do instead, each in 30 network calls.
OTHERS: dict[str, Callable[[Given, NoiseSource], Tensor]] = {
    "paste + img2img 0.7": lambda g, n: image_to_image(g.denoise, g.canvas, g.sigmas(30, 0.7), g.space, n),
    "masked replacement, eta 0": lambda g, n: masked_replacement(
        g.denoise, g.canvas, g.keep, g.sigmas(30), g.space, n, 0.0
    ),
    "masked replacement, eta 1": lambda g, n: masked_replacement(
        g.denoise, g.canvas, g.keep, g.sigmas(30), g.space, n, 1.0
    ),
    "RePaint, 6 levels x 5": lambda g, n: repaint(g.denoise, g.canvas, g.keep, g.sigmas(6), g.space, n, 5),
    "LanPaint, 5 levels x (5 + 1)": lambda g, n: lanpaint(g.denoise, g.canvas, g.keep, g.sigmas(5), g.space, n),
    "LanPaint, 10 levels x (2 + 1)": lambda g, n: lanpaint(
        g.denoise, g.canvas, g.keep, g.sigmas(10), g.space, n, inner=2, step=0.6, friction=1.0
    ),
}


def measure_fields(count: int, seeds: int, names: Sequence[str] = (), first: int = 0) -> Values:
    """Return the measures of each method on exact Gaussian fields, one for each seed of the noise."""
    bed, cond = Bed.make(count), Conditioning(torch.zeros(1, 1, 1))
    given = Given(CFG(bed.model, cond), bed.canvas, bed.keep, bed.model.levels, bed.model.space)
    runs: dict[str, Run] = {name: partial(method, given) for name, method in OTHERS.items()}
    for name, changes in COW.items():
        config = CowConfig(steps=STEPS, **changes)
        if name not in (
            FULLY,
            LATENTS,
        ):  # without a text there is no guidance, without an autoencoder nothing to redraw
            runs[name] = lambda n, c=config: generate(bed.model, bed.canvas, bed.keep[:, 0], cond, None, c, n).latents
    found = {"the fields themselves": {"calls": [0.0], **{k: [v] for k, v in bed.metrics(bed.truth).items()}}}
    for name in names or runs:
        bed.model.calls = 0
        rows = [bed.metrics(runs[name](SeededNoise(seed))) for seed in range(first, first + seeds)]
        found[name] = {"calls": [bed.model.calls / seeds], **{k: [r[k] for r in rows] for k in rows[0]}}
    return found


@dataclass
class Kept:
    """Scenes of two objects of which one is kept: images (B, H, W, 3), its masks (B, H, W), captions, and what the checker should read.

    `empty` is the scene without that object, and `asked` the same as the text has it, where it contradicts the image. `columns` names
    what is measured of the checker's reading.
    """

    pipe: slipstream.core.Pipeline
    truth: Tensor
    empty: Tensor
    masks: Tensor
    captions: list[str]
    checker: Checker
    wanted: dict[str, Tensor]
    columns: dict[str, str]
    asked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def canvas(self) -> Tensor:
        return composite(torch.full_like(self.truth, 0.5), self.truth, self.masks)


def kept(model: str, count: int, contradicted: bool = False, seed: int = 1234) -> Kept:
    """Return scenes of a bundled model's own world, with a second object that the text asks for.

    `contradicted` (pocket only): the text gives object and ground the next colours of the palette that are not in the scene, and the
    masks keep 12 pixels of the old ground.
    """
    pipe, rng = slipstream.load(model), np.random.default_rng(seed)
    if model == "pocket-flow":
        atlas, pairs = flow.make_atlas(), flow.sample_scenes(count, rng, pairs=1.0)
        second = replace(pairs, noun=torch.stack([torch.full_like(pairs.noun[:, 0], flow.UNSAID), pairs.noun[:, 1]], 1))
        truth, empty = (to_image(flow.render(part, atlas)) for part in (pairs, second))
        masks, captions = flow.coverage(pairs, atlas)[:, 0], [flow.caption(pairs, i) for i in range(count)]
        columns = {"background": "background %", "object2": "other object %"}
        return Kept(pipe, truth, empty, masks, captions, load_flow_checker(), flow_labels(pairs), columns)
    drawn = [sample_scene(rng, objects=2) for _ in range(count)]
    said = [with_other_colours(scene) for scene in drawn] if contradicted else drawn
    truth, empty, asked = (
        to_image(render(part))
        for part in (drawn, *([replace(s, items=s.items[1:]) for s in part] for part in (drawn, said)))
    )
    masks = torch.stack([coverage(scene.items[0], 128) for scene in drawn])
    masks = grow(masks, 12) if contradicted else masks
    captions, columns = [caption(scene) for scene in said], {"colour2": "other colour %", "shape2": "other shape %"}
    return Kept(
        pipe, truth, empty, masks, captions, load_checker(), labels(said), {"background": "background %", **columns}, asked
    )  # fmt: skip


def to_image(rendered: Tensor) -> Tensor:
    return ((rendered + 1) / 2).movedim(1, -1)


def with_other_colours(scene: Scene) -> Scene:
    first, second = scene.items
    used, found = {scene.background, first.colour, second.colour}, []
    for old in (first.colour, scene.background):
        after = COLOURS.index(old)
        found.append(next(c for c in [*COLOURS[after + 1 :], *COLOURS[:after]] if c not in used))
        used.add(found[-1])
    return replace(scene, background=found[1], items=(replace(first, colour=found[0]), second))


def measure_scenes(
    scenes: Kept, out: pathlib.Path, configs: dict[str, dict] | None = None, only: Sequence[str] = (), seed: int = 0
) -> Values:
    """Return the measures of each method (or of `configs` of COW alone) on a bundled model; saves a few images side by side."""
    pipe, model, count = scenes.pipe, scenes.pipe.model, len(scenes)
    latents, cond, uncond = pipe.encode_image(scenes.canvas), pipe.encode_text(scenes.captions), pipe.encode_text([""])
    covered = torch.nn.functional.interpolate(scenes.masks[:, None], latents.shape[-2:], mode="area")
    guided = CFG(model, cond, uncond, SCALE)

    def redraw(denoised: Tensor) -> Tensor:
        return pipe.encode_image(on_scene(pipe.decode(denoised), scenes.truth, scenes.masks, pipe.downscale))

    decoded = pipe.decode(pipe.encode_image(scenes.truth)).float()
    given = Given(guided, latents, covered.round(), model.levels, model.space)
    runs: dict[str, Run] = {} if configs else {name: partial(method, given) for name, method in OTHERS.items()}
    for name, changes in (configs or COW).items():
        own: dict[str, Any] = {"denoise": guided} if name == FULLY else {}
        own |= {} if name == LATENTS else {"redraw": redraw}
        config = CowConfig(steps=STEPS, cfg_scale=SCALE, **changes)
        runs[name] = lambda n, c=config, o=own: generate(model, latents, scenes.masks, cond, uncond, c, n, **o).latents
    found: Values = (
        {} if configs else {"the scenes themselves": read(scenes, scenes.truth, 0), THROUGH: read(scenes, decoded, 0)}
    )
    shown = {"canvas": scenes.canvas}
    for name, run in runs.items():
        if only and name not in only:
            continue
        model.rows = 0
        INVERSIONS.clear()  # each method pays for its own
        result = run(SeededNoise(seed))
        image = pipe.decode(result).float()
        found[name] = read(scenes, image, model.rows / count)
        if configs:
            found[name] |= against(scenes, image, result - latents, latents, covered > 0.99)
        shown[name] = image if configs else composite(image, scenes.truth, scenes.masks)
    rows = [side_by_side([images[i : i + 1] for images in shown.values()]) for i in range(min(4, count))]
    print(f"{' | '.join(shown)}: {save_image(torch.cat(rows, 1), out / f'cow_quality_{seed}.png')}", flush=True)
    return found


def read(scenes: Kept, image: Tensor, rows: float) -> dict[str, list[float]]:
    """Return the measures of images (B, H, W, 3), each."""
    truth, masks, pasted = scenes.truth, scenes.masks, composite(image, scenes.truth, scenes.masks)
    inside, ring = grow(masks, -8) > 0.99, (grow(masks, 6) > 0.5) & (masks < 0.01)
    true_jump = jump(truth, masks)
    found = {
        "rows": [rows] * len(scenes),
        "kept PSNR": (-10 * shares((image - truth).square().mean(-1), inside).clamp(min=1e-10).log10()).tolist(),  # nan where too small
        "seam": (jump(image, masks) / true_jump).tolist(), "seam after paste": (jump(pasted, masks) / true_jump).tolist(),
        "halo": (255 * shares((image - scenes.empty).square().mean(-1), ring).sqrt()).tolist(),
        "growth %": growth(scenes, image),
    }  # fmt: skip
    seen = predict(scenes.checker, pasted.movedim(-1, 1) * 2 - 1)
    right = {name: 100 * (seen[key] == scenes.wanted[key]).float() for key, name in scenes.columns.items()}
    return {**found, **{name: values.tolist() for name, values in right.items()}}


def against(scenes: Kept, image: Tensor, change: Tensor, latents: Tensor, inside: Tensor) -> dict[str, list[float]]:
    """Return what only a text that contradicts the canvas shows: what changed of the subject, and what is as the text says."""
    assert scenes.asked is not None
    own = predict(scenes.checker, image.movedim(-1, 1) * 2 - 1)["colour"]
    deviation = latents[inside.expand_as(latents)].std()
    around = (scenes.masks < 0.01) & ((scenes.asked - scenes.empty).square().sum(-1) > 0.01)
    return {
        CHANGE: (100 * shares(change.square().mean(1), inside[:, 0]).sqrt() / deviation).tolist(),
        ASKED: (100 * (own == scenes.wanted["colour"]).float()).tolist(),
        AROUND: nearer(image, scenes.asked, scenes.empty, around),
    }


def shares(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of `values` (B, H, W) over each row's cells in `where`, nan where there are none."""
    weights = where.to(values)
    return (values * weights).sum((1, 2)) / weights.sum((1, 2))


def nearer(image: Tensor, one: Tensor, other: Tensor, where: Tensor) -> list[float]:
    """Return how many of each image's pixels in `where` are nearer to `one` than to `other`, in %."""
    found: list[float] = (
        100 * shares(((image - one).norm(dim=-1) < (image - other).norm(dim=-1)).float(), where)
    ).tolist()
    return found


def growth(scenes: Kept, image: Tensor) -> list[float]:
    """Return the pixels within 20 of each mask, and outside it, that belong to the subject and not to the scene, in % of its area.

    A pixel that is off by 0.15 and more belongs to whichever has the nearest pixel in colour and place: the subject, or the true scene
    without it (20 pixels count as 0.16 of colour). So what another object shares with the subject, or draws elsewhere, is no growth,
    and neither is a blurred ground: the scene counts as it is and blurred by 4 and 8 pixels.
    """
    blurred = [gaussian_blur(scenes.empty.movedim(-1, 1), d, 2 * d).movedim(1, -1) for d in (4, 8)]
    empty = torch.cat([colour_and_place(of).flatten(1, 2) for of in (scenes.empty, *blurred)], 1)
    away = (image - scenes.empty).norm(dim=-1) > 0.15
    found = []
    for mask, off, own, scene, seen in zip(
        scenes.masks, away, colour_and_place(scenes.truth), empty, colour_and_place(image)
    ):
        at = (grow(mask[None], 20)[0] > 0.5) & (mask < 0.02) & off
        found.append(100 * float(nearest(seen[at], own[mask > 0.9], scene).sum() / (mask > 0.9).sum()))
    return found


def dial_figures(found: Values) -> Values:
    """Return what the dial is about: what changes of the subject, and what is as the text says."""
    read = ("background %", "other colour %", "other shape %")
    return {
        setting: {
            "change of the subject's latents, % of their deviation": row[CHANGE],
            "subject as the text says, %": row[ASKED],
            "caption of the surroundings right, %": [sum(of) / 3 for of in zip(*(row[key] for key in read))],
            "surroundings as the text says, % of pixels": row[AROUND],
            "kept PSNR": row["kept PSNR"],
        }
        for setting, row in found.items()
    }


def dial_chart(figures: Values, path: pathlib.Path) -> pathlib.Path:
    """Draw the first three figures over the five settings, means and 95 % intervals; returns the SVG file."""
    rows = list(figures.values())
    names = list(rows[0])[:3]
    ranges = [[(float(np.mean(row[name])), *bounds(row[name])) for row in rows] for name in names]
    most = max(100.0, *(high for series in ranges for *_, high in series))
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 300" font-family="sans-serif" font-size="13">',
        '<rect width="520" height="300" fill="white"/><path d="M60 60V240H480" fill="none" stroke="#888"/>',
    ]
    for value in (0, 50, 100):
        height = 240 - 180 * value / most
        lines.append(f'<path d="M55 {height:.1f}H60" stroke="#888"/>')
        lines.append(f'<text x="50" y="{height + 4:.1f}" text-anchor="end">{value}</text>')
    for n, (name, series, colour) in enumerate(zip(names, ranges, ("#c33", "#2a2", "#36c"))):
        points = [(60 + 410 * f, *(240 - 180 * v / most for v in values)) for f, values in zip(DIAL, series)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in points)
        lines.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, low, high in points:
            shift = x + 3 * (n - 1)
            lines.append(f'<path d="M{shift:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="70" y="{16 + 16 * n}" fill="{colour}">{name}</text>')
    lines += [f'<text x="{60 + 410 * f:.0f}" y="258" text-anchor="middle">{f:g}</text>' for f in DIAL]
    lines.append(
        '<text x="60" y="284">keep the pixels</text><text x="470" y="284" text-anchor="end">follow the text</text></svg>'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def jump(image: Tensor, masks: Tensor) -> Tensor:
    """Return the mean squared difference of neighbouring pixels across the edge of each mask (B,)."""
    inside, total, count = masks > 0.5, torch.zeros(len(masks)), torch.zeros(len(masks))
    for axis in (1, 2):
        edge = inside != inside.roll(-1, axis)
        total += ((image - image.roll(-1, axis)).square().mean(-1) * edge).sum((1, 2))
        count += edge.sum((1, 2))
    return total / count


def table(found: Values) -> str:
    """Markdown, one method a row: means with 95 % intervals."""
    columns = list(next(iter(found.values())))
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for name, row in found.items():
        lines.append(
            f"| {name} | {' | '.join(cell(row[c], 1 if '%' in c or c in ('halo', 'kept PSNR') else 2) for c in columns)} |"
        )
    return "\n".join(lines)


def cell(values: Sequence[float], digits: int) -> str:
    """Return the mean with its interval of the values that are known, or the one value that all have."""
    known = [value for value in values if not np.isnan(value)]
    return interval(known, digits) if len({*known}) > 1 else f"{known[0]:.4g}" if known else "-"


def differences(found: Values, name: str, base: str) -> str:
    """Return how much each measure of `name` is above that of `base` in the same scenes, with 95 % intervals."""
    rows = {k: [a - b for a, b in zip(v, found[base][k])] for k, v in found[name].items()}
    return f"{name} minus {base}: " + ", ".join(f"{k} {cell(v, 2)}" for k, v in rows.items())


def collect(
    path: pathlib.Path, seeds: range, methods: Sequence[str], measure: Callable[[int, list[str]], Values], ends: float
) -> Values:
    """Return the measures of `methods` over the seeds that have them all by `ends`; what an earlier run finished comes from `path`."""
    done: dict[str, Values] = json.loads(path.read_text()) if path.exists() else {}
    for seed in seeds:
        known = done.setdefault(str(seed), {})
        missing = [method for method in methods if method not in known]
        if missing and time.monotonic() < ends:
            known |= measure(seed, missing)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(done))
    whole = [done[str(seed)] for seed in seeds if {*methods} <= {*done[str(seed)]}]
    print(f"{len(whole)} of {len(seeds)} seeds")
    names = [name for name in whole[0] if name in methods or name.startswith("the ")] if whole else []
    return {name: {key: [v for row in whole for v in row[name][key]] for key in whole[0][name]} for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=64, help="0 leaves the fields out")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise, and of the scenes")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--scenes", type=int, default=8, help="of each seed; 0 leaves the bundled models out")
    parser.add_argument("--models", nargs="+", default=["pocket", "pocket-flow"])
    parser.add_argument("--only", nargs="+", choices=[*OTHERS, *COW], default=[*OTHERS, *COW], metavar="METHOD")
    parser.add_argument("--dial", action="store_true", help="measure the dial only, and draw its chart")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=_common.OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ends, seeds = time.monotonic() + 60 * args.minutes, range(args.first, args.first + args.seeds)
    if args.dial:
        configs = {f"follow {f:g}": {"follow": f} for f in DIAL}

        def dial(seed: int, missing: list[str]) -> Values:
            return measure_scenes(kept("pocket", args.scenes, True, seed), args.out, configs, missing, seed)

        found = collect(args.out / f"cow_dial_{args.scenes}.json", seeds, [*configs], dial, ends)
        if not found:
            return
        print(table(dial_figures(found)))
        print(dial_chart(dial_figures(found), _common.ROOT / "docs" / "img" / "cow_dial.svg"))
        return
    if args.fields:
        names = [name for name in args.only if name not in (FULLY, LATENTS)]
        print(
            "Gaussian fields\n\n" + table(measure_fields(args.fields, args.seeds, names, args.first)) + "\n", flush=True
        )
    for model in args.models if args.scenes else []:

        def scenes(seed: int, missing: list[str], model: str = model) -> Values:
            return measure_scenes(kept(model, args.scenes, seed=seed), args.out, None, missing, seed)

        found = collect(args.out / f"cow_{model}_{args.scenes}.json", seeds, args.only, scenes, ends)
        print(f"{model}\n\n{table(found)}\n" if found else f"{model}: not measured", flush=True)
        if DEFAULT in found:
            others = [name for name in args.only if name != DEFAULT]
            print(differences(found, DEFAULT, THROUGH))
            print("\n".join(differences(found, name, DEFAULT) for name in others) + "\n")


if __name__ == "__main__":
    main()
