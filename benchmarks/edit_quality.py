"""Edits on the bundled model against rendered ground truth, beside what a user would do instead, at equal network rows.

    python benchmarks/edit_quality.py [--scenes 24] [--search 0] [--out benchmarks/out]

A scene with one known object is rendered, the object is moved (every third is resized too), and the same scene is rendered with
the object in its new place: the truth. Every method gets the same picture, mask and caption of the result. Means over scenes:

- position: distance of the object from where it should be, in latent cells (8 pixels); found: share within 1 cell.
- colour, shape: share of scenes whose object the attribute checker reads as the right colour, the right shape.
- vacated: error where the object was, 0 to 255, root mean square. background: PSNR of everything but the object's new place.
- rows: network rows of the whole edit, inversion included.

(a) and (b) start from the same cut-and-paste that our draft is (hole filled smoothly), which is more than most users would do, and
get at least our rows. `--search N` tries N random settings on other scenes than those reported; the defaults came from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import random
import time
from collections.abc import Callable

import _common
import numpy as np
import slipstream
import torch
from slipstream.core import CFG, SeededNoise, make_sigmas, sample
from slipstream.core.tensors import composite
from slipstream.edit import Canvas, Drag, EditConfig, Inversion, Move, edit, finish, invert
from slipstream.edit.picture import draft
from slipstream.edit.placing import place
from slipstream_tests.reference.edit import DEFAULTS, edit_published, invert_published
from slipstream_tools.pocket import scenes as pocket
from slipstream_tools.pocket.checker import load_checker, predict
from torch import Tensor

SIZE, CELL = 128, 8
CANVAS = Canvas((SIZE, SIZE), (SIZE // CELL, SIZE // CELL), CELL)


@dataclasses.dataclass(frozen=True)
class Case:
    """A scene, the move that is asked for, and the truth."""

    before: pocket.Scene
    after: pocket.Scene
    dx: float
    dy: float
    scale: float

    @property
    def item(self) -> pocket.Item:
        return self.after.items[0]

    def image(self, scene: pocket.Scene) -> Tensor:
        return (pocket.render([scene], SIZE).permute(0, 2, 3, 1) + 1) / 2

    @property
    def mask(self) -> Tensor:
        """What a user paints: the object and a pixel around it."""
        covered = (pocket.coverage(self.before.items[0], SIZE) > 0.05).float()
        return torch.nn.functional.max_pool2d(covered[None, None], 3, 1, 1)[0, 0]

    @property
    def task(self) -> Move:
        return Move(self.mask, self.dx, self.dy, self.scale)

    @property
    def prompt(self) -> str:
        return pocket.caption(self.after)


def make_cases(count: int, seed: int = 0) -> list[Case]:
    """Return scenes whose object moves to another of the five places; every third changes size by up to a quarter too."""
    rng, cases = np.random.default_rng(seed), []
    while len(cases) < count:
        before = pocket.sample_scene(rng, objects=1)
        item = before.items[0]
        other = pocket.sample_scene(rng, objects=1).items[0]
        scale = float(rng.uniform(0.75, 1.25)) if len(cases) % 3 == 2 else 1.0
        radius = item.radius * scale
        inside = all(radius + 0.02 < v < 0.98 - radius for v in (other.x, other.y))
        if other.place == item.place or not inside:
            continue
        moved = dataclasses.replace(item, x=other.x, y=other.y, radius=radius, place=other.place)
        after = dataclasses.replace(before, items=(moved,))
        cases.append(Case(before, after, (moved.x - item.x) * SIZE, (moved.y - item.y) * SIZE, scale))
    return cases


@dataclasses.dataclass
class Bench:
    """The model, and one method after another over the cases."""

    pipe: slipstream.core.Pipeline
    checker: torch.nn.Module

    def measure(self, cases: list[Case], method: Callable[[Case], Tensor]) -> dict[str, float]:
        rows, began = self.pipe.model.rows, time.process_time()
        results = [method(case) for case in cases]
        figures = [self.score(case, result) for case, result in zip(cases, results)]
        out = {k: float(np.mean([f[k] for f in figures])) for k in figures[0]}
        out["rows"] = (self.pipe.model.rows - rows) / len(cases)
        out["cpu s"] = (time.process_time() - began) / len(cases)
        return out

    def score(self, case: Case, result: Tensor) -> dict[str, float]:
        truth = case.image(case.after)
        new = pocket.coverage(case.item, SIZE) > 0.01
        old = (pocket.coverage(case.before.items[0], SIZE) > 0.5) & ~new
        error = (result - truth).square().mean(-1)[0]
        outside = error[~torch.nn.functional.max_pool2d(new[None].float(), 5, 1, 2)[0].bool()].mean()
        read = predict(self.checker, result.permute(0, 3, 1, 2) * 2 - 1)
        labels = {k: int(v[0]) for k, v in read.items()}
        x, y, found = locate(result, truth, case)
        return {
            "position": math.hypot(x - case.item.x * SIZE, y - case.item.y * SIZE) / CELL,
            "found": float(found and math.hypot(x - case.item.x * SIZE, y - case.item.y * SIZE) <= CELL),
            "colour": float(pocket.COLOURS[labels["colour"]] == case.item.colour),
            "shape": float(pocket.SHAPES[labels["shape"]] == case.item.shape),
            "vacated": 255 * float(error[old].mean().sqrt()),
            "background PSNR": min(-10 * math.log10(float(outside) + 1e-9), 60.0),
        }


def locate(result: Tensor, truth: Tensor, case: Case) -> tuple[float, float, bool]:
    """Return the centroid of what is nearer to the object's colour than to the true background, anywhere in the picture."""
    empty = case.image(dataclasses.replace(case.after, items=()))[0]
    colour = truth[0][pocket.coverage(case.item, SIZE) > 0.95].mean(0)
    to_object = (result[0] - colour).norm(dim=-1)
    to_background = (result[0] - empty).norm(dim=-1)
    share = (to_object < to_background).float()
    if share.sum() < 10:
        return SIZE / 2, SIZE / 2, False
    at = CANVAS.pixel_centres()
    truth_share = pocket.coverage(case.item, SIZE)
    # A triangle's or a star's centroid is not its centre: compare with the centroid of the truth.
    offset = (at * truth_share[..., None]).sum((0, 1)) / truth_share.sum() - torch.tensor(
        [case.item.x, case.item.y]
    ) * SIZE
    centroid = (at * share[..., None]).sum((0, 1)) / share.sum() - offset
    return float(centroid[0]), float(centroid[1]), True


# --- methods ---


@dataclasses.dataclass
class Methods:
    """Every method takes a case and returns the picture (1, H, W, 3)."""

    pipe: slipstream.core.Pipeline
    uncond: slipstream.core.Conditioning

    def invert(self, case: Case, config: EditConfig) -> Inversion:
        image = case.image(case.before)
        cond = self.pipe.encode_text([pocket.caption(case.before)])
        return invert(self.pipe.model, self.pipe.encode_image(image), cond, config, CANVAS, image)

    def ours(
        self, config: EditConfig, composite_back: bool = True, kept: dict | None = None, task: Drag | None = None
    ) -> Callable[[Case], Tensor]:
        """`kept` keeps inversions between runs (a search); `task` is the case's move when left out."""

        def run(case: Case) -> Tensor:
            image = case.image(case.before)
            key = (case.dx, config.steps)
            inversion = kept[key] if kept and key in kept else self.invert(case, config)
            if kept is not None:
                kept[key] = inversion
            target = self.pipe.encode_text([case.prompt])
            result = edit(
                self.pipe.model,
                inversion,
                task or case.task,
                target,
                self.uncond,
                config,
                SeededNoise(1),
                encode=self.pipe.encode_image,
            )
            return finish(image, result, self.pipe.decode) if composite_back else self.pipe.decode(result.latents)

        return run

    def published(self, case: Case, task: Move | Drag, name: str) -> Tensor:
        """The published code with its defaults of a task."""
        image, pipe, config = case.image(case.before), self.pipe, DEFAULTS[name]
        cond = pipe.encode_text([pocket.caption(case.before)])
        inversion = invert_published(pipe.model, pipe.encode_image(image), cond, config, CANVAS, image)
        target = pipe.encode_text([case.prompt])
        result = edit_published(pipe.model, inversion, task, target, self.uncond, config, SeededNoise(1))
        return pipe.decode(result.latents)

    def cut_paste(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pasted picture, its hole filled from around it, and the masks (1, H, W) of hole and object."""
        placed = place(case.task, CANVAS, CANVAS)
        pixels = draft([case.image(case.before).movedim(-1, 1)], [(SIZE, SIZE)], [(0, placed)])
        return pixels.movedim(1, -1), (placed.removed > 0.02).float()[None], placed.target[None]

    def img2img(self, steps: int, strength: float, composite_back: bool = False) -> Callable[[Case], Tensor]:
        """(a) cut and paste, then image to image over the whole picture."""

        def run(case: Case) -> Tensor:
            pasted, hole, target = self.cut_paste(case)
            sigmas = make_sigmas("leading", self.pipe.model.levels, steps, strength)
            x = self.pipe.encode_image(pasted)
            x = x + sigmas[0] * SeededNoise(1)(x)
            guided = CFG(self.pipe.model, self.pipe.encode_text([case.prompt]), self.uncond, 3.0)
            decoded = self.pipe.decode(sample("euler", guided, x, sigmas, self.pipe.model.space))
            return self._back(case, decoded, hole, target) if composite_back else decoded

        return run

    def inpaint(self, steps: int, strength: float = 1.0, composite_back: bool = False) -> Callable[[Case], Tensor]:
        """(b) paste, then regenerate the hole only: known cells are set to the noised picture before each step."""

        def run(case: Case) -> Tensor:
            pasted, hole, target = self.cut_paste(case)
            sigmas = make_sigmas("leading", self.pipe.model.levels, steps, strength)
            known = self.pipe.encode_image(pasted)
            noise = SeededNoise(1)(known)
            mask = (CANVAS.to_grid(hole[0]) > 0.02).float()
            guided = CFG(self.pipe.model, self.pipe.encode_text([case.prompt]), self.uncond, 3.0)

            def denoise(x: Tensor, sigma: Tensor) -> Tensor:
                x = mask * x + (1 - mask) * (known + sigma * noise)
                return mask * guided(x, sigma) + (1 - mask) * known

            decoded = self.pipe.decode(
                sample("euler", denoise, known + sigmas[0] * noise, sigmas, self.pipe.model.space)
            )
            return self._back(case, decoded, hole, target) if composite_back else decoded

        return run

    @staticmethod
    def _back(case: Case, decoded: Tensor, hole: Tensor, target: Tensor) -> Tensor:
        grown = torch.nn.functional.max_pool2d(torch.maximum(hole, (target > 0.02).float()), 9, 1, 4)
        return composite(case.image(case.before), decoded, slipstream.core.masks.feather(grown, 4))


# --- drags ---


def make_drags(count: int, seed: int = 7) -> list[Case]:
    """Return large objects to be dragged by their centre by 2 to 3 cells, away from the border."""
    rng, cases = np.random.default_rng(seed), []
    while len(cases) < count:
        before = pocket.sample_scene(rng, objects=1)
        item = before.items[0]
        angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(16, 24) / SIZE
        x, y = item.x + length * math.cos(angle), item.y + length * math.sin(angle)
        if all(item.radius + 0.06 < v < 0.94 - item.radius for v in (x, y, item.x, item.y)):
            after = dataclasses.replace(before, items=(dataclasses.replace(item, x=x, y=y),))
            cases.append(Case(before, after, (x - item.x) * SIZE, (y - item.y) * SIZE, 1.0))
    return cases


def drag_task(case: Case, method: str) -> Drag:
    """Five handles on the object, all pulled by the same shift; the mask covers old and new place and a margin."""
    item, there = case.before.items[0], case.item
    reach = item.radius * SIZE * 0.6
    handles = [
        (item.x * SIZE + u * reach, item.y * SIZE + v * reach) for u, v in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    ]
    covered = torch.maximum(pocket.coverage(item, SIZE), pocket.coverage(there, SIZE))
    mask = torch.nn.functional.max_pool2d((covered > 0.01).float()[None, None], 17, 1, 8)[0, 0]
    return Drag(mask, [(h, (h[0] + case.dx, h[1] + case.dy)) for h in handles], method)


def drag_error(
    bench: Bench, cases: list[Case], methods: Methods, config: EditConfig | None, method: str
) -> dict[str, float]:
    """Return the mean distance of the dragged object from its target in cells, and the error outside the object, 0 to 255.

    Without `config` the published code drags.
    """
    rows, distances, errors = bench.pipe.model.rows, [], []
    for case in cases:
        task, truth = drag_task(case, method), case.image(case.after)
        out = methods.published(case, task, "drag") if config is None else methods.ours(config, task=task)(case)
        x, y, _ = locate(out, truth, case)
        distances.append(math.hypot(x - case.item.x * SIZE, y - case.item.y * SIZE) / CELL)
        outside = pocket.coverage(case.item, SIZE) < 0.01
        errors.append(255 * float((out - truth)[0][outside].square().mean().sqrt()))
    rows = (bench.pipe.model.rows - rows) / len(cases)
    return {"mean distance": float(np.mean(distances)), "background error": float(np.mean(errors)), "rows": rows}


# --- search and report ---

CHOICES: dict[str, list] = {
    "cfg_scale": [1.0, 1.5, 2.0, 3.0, 4.0],
    "anchor_object": [(0.0, v) for v in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)],
    "anchor_fill": [(0.0, v) for v in (0.2, 0.3, 0.4, 0.6, 0.8)],
    "energy_scale": [0.0, 0.05, 0.1, 0.2],
    "eta": [0.0, 0.4],
}


def search(bench: Bench, methods: Methods, tries: int, seed: int = 0) -> None:
    """Print random settings of the 16-step edit on eight scenes, best first by position and background together."""
    rng, cases, kept, found = random.Random(seed), make_cases(8, seed=100), {}, []
    for _ in range(tries):
        change = {name: rng.choice(values) for name, values in CHOICES.items()}
        figures = bench.measure(cases, methods.ours(EditConfig.fast(**change), kept=kept))
        found.append((figures["background PSNR"] - 20 * figures["position"], change, figures))
    for merit, change, figures in sorted(found, key=lambda f: -f[0]):
        print(f"{merit:6.2f} {json.dumps(change)} {line(figures)}")


def line(figures: dict[str, float]) -> str:
    return " | ".join(f"{value:.2f}" for value in figures.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--search", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=pathlib.Path, default=_common.OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = slipstream.load("pocket")
    bench, methods = Bench(pipe, load_checker()), Methods(pipe, pipe.encode_text([""]))
    if args.search:
        return search(bench, methods, args.search)
    cases = make_cases(args.scenes)
    fast = EditConfig.fast()
    ours = methods.ours(fast)
    rows = pipe.model.rows
    ours(cases[0])
    steps = -(-(pipe.model.rows - rows) // 2)  # the rivals' steps of two rows each: at least our rows
    table: dict[str, Callable[[Case], Tensor]] = {
        "truth": lambda case: case.image(case.after),
        "(a) cut, paste, img2img 0.3": methods.img2img(steps, 0.3),
        "(a) cut, paste, img2img 0.5": methods.img2img(steps, 0.5),
        "(b) paste, inpaint the hole": methods.inpaint(steps),
        "(b) with our composite": methods.inpaint(steps, composite_back=True),
        "ours, 16 steps": ours,
        "ours, 16 steps, latents only": methods.ours(fast, composite_back=False),
        "ours, 8 steps": methods.ours(fast.replace(steps=8)),
        "ours, 50 steps": methods.ours(EditConfig()),
        "published DiffEditor, 50 steps": lambda case: methods.published(case, case.task, "move"),
    }
    results: dict[str, dict[str, float]] = {}
    for name, method in table.items():
        results[name] = bench.measure(cases, method)
        if len(results) == 1:
            print("| method | " + " | ".join(results[name]) + " |")
            print("|---" * (len(results[name]) + 1) + "|")
        print(f"| {name} | {line(results[name])} |", flush=True)
    drags = make_drags(args.scenes // 2)
    print("\n| drag | mean distance | background error | rows |\n|---|---|---|---|")
    for name, config, method in (
        ("warp, 16 steps", fast, "warp"),
        ("energy, 16 steps", fast, "energy"),
        ("energy, published, 50 steps", None, "energy"),
    ):
        results[name] = drag_error(bench, drags, methods, config, method)
        print(f"| {name} | {line(results[name])} |", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "edit_quality.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
