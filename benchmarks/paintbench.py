"""PaintBench (arXiv 2606.00188): exact edits of seeded images of flat shapes, scored by its own deterministic score.

    git clone https://github.com/PaintBench/PaintBench paintbench        # MIT; none of it is part of this repository
    python benchmarks/paintbench.py --paintbench paintbench [--models pocket pocket-flow] [--problems 4] [--jobs 1]

Its generator makes the problems (seeds and all), its `compute_problem_stats` scores them: at each of eleven colour distances (CIE76, 0 to
10), correctly edited pixels over pixels that had to be edited or were spoiled; the mean is the score. Preservation is the share of the
other pixels that stay right.

Editors of the paper are given words. We are given masks: those of the generator's own objects, and where each is to go. So our figures
and the paper's (best of 11 editors: 17.1 % over 20 tasks) are not a race; they say what exact placement is worth.

Images keep their 1024 x 1024, 1024 x 576 or 576 x 1024 pixels. Draft and finish work at that size; the network sees the image reduced to
`--size` x `--size` pixels in area (`fit(max_pixels)`, as `slipstream edit --max-pixels` does), which is what these small models can do.

- untouched: the input itself. scissors: objects cut out and pasted at whole pixels, holes filled with the commonest colour around them,
  no network.
- draft: our cut-and-paste, before any network. ours: the whole edit, mode draft, 16 steps. `--models` without a name measures the draft
  alone, in a third of the time.

A shape that goes below others is moved, then the others are pasted over it. Not expressible, so left out and counted: scaling of one side.
Results are kept in `--out` after every problem; a further run continues from there, and `--minutes` ends it. Each editor takes about three
seconds for a problem on the CPU, so all 576 with both models take an hour and a half of one core; `--jobs` measures as many at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import _common
import numpy as np
import slipstream
import torch
from intervals import interval
from slipstream.cli.edit import edit_image
from slipstream.core.tensors import image_to_numpy, numpy_to_image
from slipstream.edit import EditConfig, Inversion, Move, Paste, Remove, Task, fit, invert
from slipstream.edit.placing import lay_out
from slipstream_tools.pocket.scenes import COLOURS, nearest_colour
from torch import Tensor

TASKS = ("translation", "scaling", "rotation", "copying", "removal", "recolor")
METHODS = ("untouched", "scissors", "draft", "ours")
PAPERS_BEST = 0.171
Todo = tuple[str, tuple[str, dict[str, Any], str | None, int], dict[str, Any] | None]  # task, slot, row so far
GOALS = {"solid": 0.90, "striped": 0.80, "preservation": 0.999}


@dataclass
class Edit:
    """What is asked of an image: what goes where, in the generator's own numbers.

    `moves` holds (mask, old centre, new centre, scale, angle), `above` the mask (H, W) of what must end on top.
    """

    moves: list[tuple[Tensor, tuple[float, float], tuple[float, float], float, float]] = field(default_factory=list)
    copies: list[tuple[Tensor, float, float]] = field(default_factory=list)
    removed: list[Tensor] = field(default_factory=list)
    recoloured: list[tuple[Tensor, tuple[int, int, int]]] = field(default_factory=list)
    above: Tensor | None = None


@dataclass
class Problem:
    name: str
    photo: np.ndarray
    answer: np.ndarray
    edit: Edit


@contextlib.contextmanager
def recorded(shapes: Any) -> Iterator[list[tuple[int, Any]]]:
    """Yield the list of (image, shape) that the generator draws, in order."""
    import copy

    drawn: list[tuple[int, Any]] = []
    original = shapes.ShapeInstance.draw

    def draw(shape: Any, image: Any) -> None:
        drawn.append((id(image), image, copy.copy(shape)))  # type: ignore[arg-type]  # the image is kept alive: its id stays its own
        original(shape, image)

    shapes.ShapeInstance.draw = draw
    try:
        yield drawn
    finally:
        shapes.ShapeInstance.draw = original


@dataclass
class PaintBench:
    """The generator and the score, imported from a checkout."""

    folder: pathlib.Path

    def __post_init__(self) -> None:
        if not (self.folder / "src" / "generate_benchmark.py").is_file():
            raise SystemExit(
                f"Expected a checkout of PaintBench, but got {self.folder}. git clone it and name its folder."
            )
        sys.path.insert(0, str(self.folder.resolve() / "src"))
        self.generator = importlib.import_module("generate_benchmark")
        self.score = importlib.import_module("eval").compute_problem_stats
        self.shapes = importlib.import_module("core.shapes")

    def slots(self, task: str, n: int) -> Iterator[tuple[str, dict[str, Any], str | None, int]]:
        """Yield (name, visual condition, mode, slot): the n-th problem of each of the eight conditions, modes in turn."""
        modes = importlib.import_module(f"tasks.{task}").PARAMETERS.get("mode", [None])
        mode, slot = modes[n % len(modes)], n // len(modes)
        for cond in self.generator.VISUAL_CONDITIONS:
            yield f"{task}/{cond['name']}/{mode or 'default'}/{slot}", cond, mode, slot

    def problem(self, task: str, name: str, cond: dict[str, Any], mode: str | None, slot: int) -> Problem | None:
        """Return a problem; None where our tasks cannot express it."""
        seed = self.generator._search_slot((task, cond, mode, slot))
        width, height, palette, count, striped = self.generator._visual_condition_config(cond, task)
        module = importlib.import_module(f"tasks.{task}")
        with recorded(self.shapes) as drawn:
            made = self.generator._gen(module, mode, seed, width, height, palette, count, striped)
        scenes: dict[int, list[Any]] = {}
        for image, _, shape in drawn:  # type: ignore[misc]
            scenes.setdefault(image, []).append(shape)
        first, *_, last = [*scenes.values(), *scenes.values()]
        photo, answer = (np.asarray(i.convert("RGB")) for i in (made.input_image, made.answer_image))
        edit = READERS[task](self, first, last, made.metadata, (height, width))
        return None if edit is None else Problem(name, photo, answer, edit)

    def mask(self, shapes: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Return the generator's own mask (H, W) of some of its shapes."""
        base = importlib.import_module("tasks.base")
        return torch.from_numpy(np.asarray(base._shape_occupancy_mask(list(shapes), size[1], size[0])) / 255.0).float()


def same(a: Any, b: Any) -> bool:
    return a.shape_name == b.shape_name and (a.x, a.y, a.w, a.h, a.rotation) == (b.x, b.y, b.w, b.h, b.rotation)


def read_move(bench: PaintBench, before: list, after: list, meta: dict, size: tuple[int, int]) -> Edit | None:
    (old,) = [s for s in before if not any(same(s, t) for t in after)] or [None]
    if old is None:
        return None
    (new,) = [s for s in after if not any(same(s, t) for t in before)]
    scale = new.w / old.w
    if abs(new.h / old.h - scale) > 1e-6 * scale or not 1 / 8 <= scale <= 8:
        return None
    if not bool(bench.mask([new], size).any()):  # it leaves the image
        return Edit(removed=[bench.mask([old], size)])
    angle = (new.rotation - old.rotation + 180) % 360 - 180
    edit = Edit(moves=[(bench.mask([old], size), (old.cx, old.cy), (new.cx, new.cy), scale, angle)])
    if after[-1] is not new:
        edit.above = bench.mask([s for s in after if s is not new], size) if len(after) > 1 else None
    return edit


def read_copying(bench: PaintBench, before: list, after: list, meta: dict, size: tuple[int, int]) -> Edit:
    height, width = size
    (x, y, *_), (to_x, to_y, *_) = meta["src_rect"], meta["dst_rect"]
    return Edit(copies=[(bench.mask(before, size), round((to_x - x) * width), round((to_y - y) * height))])


def read_removal(bench: PaintBench, before: list, after: list, meta: dict, size: tuple[int, int]) -> Edit:
    kept = after if meta["n_removed"] < len(before) else []
    return Edit(removed=[bench.mask([s], size) for s in before if not any(same(s, t) for t in kept)])


def read_recolor(bench: PaintBench, before: list, after: list, meta: dict, size: tuple[int, int]) -> Edit:
    pairs = [(s, next(t for t in after if same(s, t))) for s in before]
    return Edit(recoloured=[(bench.mask([s], size), t.fill) for s, t in pairs if s.fill != t.fill])


READERS: dict[str, Callable[..., Edit | None]] = {
    "translation": read_move, "scaling": read_move, "rotation": read_move, "copying": read_copying,
    "removal": read_removal, "recolor": read_recolor,
}  # fmt: skip


# --- methods ---


def scissors(problem: Problem) -> np.ndarray:
    """Cut, fill with the commonest colour around, paste at whole pixels (moved and turned by Pillow, nearest)."""
    from PIL import Image

    out, photo = problem.photo.copy(), problem.photo
    for hole in [*(m[0] for m in problem.edit.moves), *problem.edit.removed]:
        ring = torch.nn.functional.max_pool2d(hole[None, None], 7, 1, 3)[0, 0] - hole > 0.5
        colours, counts = np.unique(photo[ring.numpy()], axis=0, return_counts=True)
        out[hole.numpy() > 0.5] = colours[counts.argmax()]
    for mask, (x, y), (to_x, to_y), scale, angle in problem.edit.moves:
        cos, sin = np.cos(np.radians(angle)) / scale, np.sin(np.radians(angle)) / scale
        matrix = (cos, sin, x - cos * to_x - sin * to_y, -sin, cos, y + sin * to_x - cos * to_y)
        size = photo.shape[1], photo.shape[0]
        covered, content = (
            np.asarray(Image.fromarray(a).transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST))
            for a in ((mask * 255).byte().numpy(), photo)
        )
        out[covered > 127] = content[covered > 127]
    for mask, dx, dy in problem.edit.copies:
        rows, columns = np.nonzero(mask.numpy() > 0.5)
        out[rows + dy, columns + dx] = photo[rows, columns]
    for mask, colour in problem.edit.recoloured:
        out[mask.numpy() > 0.5] = colour
    return out


@dataclass
class Editor:
    """One of the bundled models, and how large an image it can work on; without a model it only drafts."""

    pipe: slipstream.core.Pipeline | None
    size: int
    config: EditConfig

    def photo(self, image: Tensor, prompt: str) -> Inversion:
        if self.pipe is None:
            return Inversion(torch.zeros(0), torch.zeros(0), None, fit(image, 8, self.size**2)[1], image)
        padded, canvas = fit(image, self.pipe.downscale, self.size**2)
        cond = self.pipe.encode_text([prompt], size=(padded.shape[1], padded.shape[2]))
        return invert(self.pipe.model, self.pipe.encode_image(padded), cond, self.config, canvas, image)

    def rounds(self, problem: Problem, image: Tensor, prompt: str) -> Iterator[Callable[[Inversion], list[Task]]]:
        """Yield what to do in one edit after another; each is given the photo as it is by then."""
        edit = problem.edit
        moves = [Move(m, *self.shift(m, a, b, s, t), s, angle=t) for m, a, b, s, t in edit.moves]
        colours = [(m, torch.tensor(c).float() / 255) for m, c in edit.recoloured]
        yield lambda photo: [
            *moves,
            *(Paste(photo, mask, dx, dy) for mask, dx, dy in edit.copies),
            *(Remove(mask) for mask in edit.removed),
            *(Paste(self.photo(c.expand_as(image), prompt), mask) for mask, c in colours),
        ]
        if edit.above is not None:
            hidden = lay_out(moves, self.photo(image, prompt)).placements[0].target * edit.above
            if bool((hidden > 0.5).any()):
                original = self.photo(image, prompt)
                above = edit.above
                yield lambda photo: [Paste(original, torch.minimum(above, near(hidden)))]

    @staticmethod
    def shift(
        mask: Tensor, old: tuple[float, float], new: tuple[float, float], scale: float, angle: float
    ) -> tuple[float, float]:
        """Return the shift of a Move about the mask's middle that takes the point `old` to `new`."""
        from slipstream.edit.geometry import Affine, centre_of

        x, y = Affine(centre_of(mask, "object"), scale, (0.0, 0.0), angle).forward(torch.tensor(old)).tolist()
        return new[0] - x, new[1] - y

    def run(self, problem: Problem) -> np.ndarray:
        """Return the edited image as bytes (H, W, 3)."""
        image = numpy_to_image(problem.photo[None].copy())
        prompt = caption(problem)
        for tasks_of in self.rounds(problem, image, prompt):
            photo = self.photo(image, prompt)
            tasks = tasks_of(photo)
            if not tasks:  # a recolouring to the colour that is there
                continue
            if self.pipe is None:
                drafts = lay_out(tasks, photo, looks=True).draft()
                assert drafts is not None
                image, _ = drafts
            else:
                image = edit_image(self.pipe, photo, tasks, (prompt, ""), self.config, 0, lambda step: None)
        return image_to_numpy(image)[0]


def near(region: Tensor, reach: int = 8) -> Tensor:
    return torch.nn.functional.max_pool2d(region[None, None], 2 * reach + 1, 1, reach)[0, 0]


def caption(problem: Problem) -> str:
    """Return a prompt that both bundled models know: the commonest colour of the answer as its background."""
    colour = np.bincount(problem.answer.reshape(-1, 3) @ np.array([65536, 256, 1])).argmax()
    background = torch.tensor([colour >> 16, colour >> 8 & 255, colour & 255]) / 127.5 - 1
    return f"a {COLOURS[int(nearest_colour(background))]} background"


# --- report ---


def mine(row: dict[str, Any], measure: str) -> list[float]:
    """Return the draft's and the whole edits' values of one problem."""
    return [value for name, value in row[measure].items() if name.startswith(("draft", "ours"))]


def missed(row: dict[str, Any]) -> bool:
    """Whether one of ours is below a goal."""
    goal = GOALS["striped" if row["condition"] == "striped" else "solid"]
    return (
        min(mine(row, "score"), default=1.0) < goal
        or min(mine(row, "preservation"), default=1.0) < GOALS["preservation"]
    )


def groups(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield (task, scenes, problems): each task on solid and striped grounds, then all tasks by visual condition."""
    for task in (*TASKS, "all six"):
        for scenes in ("solid", "striped"):
            striped = scenes == "striped"
            yield (
                task,
                scenes,
                [r for r in rows if task in (r["task"], "all six") and (r["condition"] == "striped") == striped],
            )
    for condition in dict.fromkeys(row["condition"] for row in rows):
        yield "all six", condition, [row for row in rows if row["condition"] == condition]


def table(rows: list[dict[str, Any]]) -> str:
    """Return each method's score by task and by visual condition: means, 95 % intervals over the problems; our worst; misses of a goal."""
    models = sorted({m for row in rows for m in row["score"]}, key=lambda m: (m.split()[0] not in METHODS, m))
    lines = [f"| task | scenes | problems | {' | '.join(models)} | ours, worst | preservation, worst | below a goal |"]
    lines.append("|---|---|--:|" + "--:|" * (len(models) + 3))
    for task, scenes, of in groups(rows):
        if of:
            cells = [interval([r["score"][m] for r in of if m in r["score"]]) for m in models]
            worst, kept = (
                min((v for r in of for v in mine(r, measure)), default=1.0) for measure in ("score", "preservation")
            )
            cells += [f"{worst:.3f}", f"{kept:.4f}", str(sum(map(missed, of)))]
            lines.append(f"| {task} | {scenes} | {len(of)} | {' | '.join(cells)} |")
    below = [f"{row['name']}: {mine(row, 'score')}, {mine(row, 'preservation')}" for row in rows if missed(row)]
    return "\n".join([*lines, "", "Below a goal (score, preservation): " + ("; ".join(below) or "none")])


@dataclass
class Bench:
    """What a process measures with: the generator, the editors and the time (`time.time()`) at which it ends."""

    paintbench: PaintBench
    editors: dict[str, Editor]
    ends: float

    @classmethod
    def load(cls, folder: pathlib.Path, models: Sequence[str], size: int, ends: float) -> Bench:
        torch.set_num_threads(1)
        editors = {"draft": Editor(None, size, EditConfig.fast())}
        editors |= {f"ours {m}": Editor(slipstream.load(m, device="cpu"), size, EditConfig.fast()) for m in models}
        return cls(PaintBench(folder), editors, ends)

    def measure(self, todo: Todo) -> dict[str, Any] | None:
        """Return the row of a problem, the methods that it lacked added; None if the time is over."""
        task, (name, cond, mode, slot), row = todo
        if time.time() > self.ends:
            return None
        row = row or {"name": name, "task": task, "condition": cond["name"], "score": {}, "preservation": {}}
        problem = self.paintbench.problem(task, name, cond, mode, slot)
        if problem is None:
            return row | {"skipped": True}
        for method, image in outputs(problem, self.editors, row["score"]):
            stats = self.paintbench.score(problem.photo, problem.answer, image)[0]["cie76_mean"]
            row["score"][method], row["preservation"][method] = stats["iou"], stats["preservation_accuracy"]
        return row


def measured(todo: Sequence[Todo], of: tuple[Any, ...], jobs: int) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of all problems as they are done, in `jobs` processes."""
    if jobs == 1:
        yield from map(Bench.load(*of).measure, todo)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, start, of) as pool:
        yield from pool.imap_unordered(measure, todo)


_bench: list[Bench] = []  # of this process


def start(*of: Any) -> None:
    _bench.append(Bench.load(*of))


def measure(todo: Todo) -> dict[str, Any] | None:
    return _bench[0].measure(todo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paintbench", type=pathlib.Path, required=True, help="a checkout of PaintBench")
    parser.add_argument("--models", nargs="*", default=["pocket", "pocket-flow"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--conditions", nargs="+", help="of the eight visual conditions, such as baseline and striped (default: all)"
    )
    parser.add_argument("--problems", type=int, default=4, help="of each of the eight visual conditions, up to 12")
    parser.add_argument("--first", type=int, default=0, help="of these problems")
    parser.add_argument("--size", type=int, default=256, help="the network sees this many pixels, squared")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=pathlib.Path, default=_common.OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"paintbench_{args.size}.json"
    rows = {row["name"]: row for row in (json.loads(path.read_text()) if path.exists() else [])}
    bench = PaintBench(args.paintbench)
    wanted = [
        (task, slot)
        for n in range(args.first, args.first + args.problems)
        for task in args.tasks
        for slot in bench.slots(task, n)
        if not args.conditions or slot[1]["name"] in args.conditions
    ]
    names, known = {"draft", *(f"ours {m}" for m in args.models)}, {r["name"] for r in rows.values() if "skipped" in r}
    known |= {row["name"] for row in rows.values() if names <= {*row["score"]}}
    todo = [(task, slot, rows.get(slot[0])) for task, slot in wanted if slot[0] not in known]
    ends = time.time() + 60 * args.minutes
    left = 0
    for row in measured(todo, (args.paintbench, args.models, args.size, ends), args.jobs):
        left += row is None
        if row is not None:
            rows[row["name"]] = row
            path.write_text(json.dumps(list(rows.values())))
            print(row["name"], {k: round(v, 3) for k, v in row["score"].items()}, flush=True)
    done = [row for row in rows.values() if row["score"]]
    skipped = sum("skipped" in row for row in rows.values())
    print("\n" + table(done))
    print(
        f"\nThe network saw {args.size} x {args.size} pixels. Not expressible by our tasks: {skipped}; not yet done: {left}."
    )
    print(
        f"The paper's best of 11 editors reaches {100 * PAPERS_BEST} % over its 20 tasks. They are given words, we are given masks."
    )


def outputs(problem: Problem, editors: dict[str, Editor], known: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every method's image (H, W, 3), but for those that are `known`."""
    methods: dict[str, Callable[[], np.ndarray]] = {
        "untouched": lambda: problem.photo,
        "scissors": lambda: scissors(problem),
    }
    methods |= {name: lambda e=editor: e.run(problem) for name, editor in editors.items()}  # type: ignore[misc]
    for name, method in methods.items():
        if name not in known:
            yield name, method()


if __name__ == "__main__":
    main()
