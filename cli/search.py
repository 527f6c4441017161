"""`slipstream search` and `slipstream compare`."""

from __future__ import annotations

import argparse
import functools
import logging
import pathlib
import sys
from typing import Any

from ..core.charts import check_drawing
from ..core.images import check_image_name, save_image
from ..core.schedules import make_sigmas
from ..search.comparison import compare
from ..search.config import STRATEGIES, SearchConfig
from ..search.engine import SearchStep, search
from ..search.evaluation import Task
from ..search.features import LatentFeatures, PixelFeatures, load_images
from ..search.objectives import Objective, Paired, ReferenceImages, SelfDistribution
from ..search.paths import ModelPath
from ..search.report import result_text, schedule_text
from ..search.schedule import Schedule

logger = logging.getLogger(__name__)
PRESETS = pathlib.Path(__file__).resolve().parent.parent / "search" / "presets"
OBJECTIVES = ("paired", "self-frechet", "self-mmd", "reference-frechet", "reference-mmd")
PROMPT = "a large red circle on a blue background"


def add_parser(subparsers: Any) -> None:
    """Declare both sub-commands."""
    found = subparsers.add_parser(
        "search", help="find the best few-step schedule for a model",
        description="Find the noise levels that give the best result in a few steps, for one model, sampler, cfg and size. "
        "With --store, the same command goes on where an earlier one was ended.",
    )  # fmt: skip
    _sampling_arguments(found)
    found.add_argument("--steps", type=int, default=4)
    found.add_argument(
        "--computed",
        type=int,
        default=None,
        metavar="CALLS",
        help="steps that call the network; the others reuse its answers",
    )
    found.add_argument(
        "--full",
        default=None,
        metavar="NAME",
        help="the schedule to reproduce with --computed, at --steps: karras, beta, ...",
    )
    found.add_argument("--evaluations", type=int, default=100, help="schedules to try")
    found.add_argument("--minutes", type=float, default=None, help="time for evaluations, earlier runs included")
    found.add_argument("--strategy", choices=STRATEGIES, default="auto")
    found.add_argument("--layers", action="store_true", help="also search blocks to skip")
    found.add_argument(
        "--search-first-level", action="store_true",
        help="also search where to start: often better below 5 steps, not for image to image",
    )  # fmt: skip
    found.add_argument("--store", type=pathlib.Path, default=None, help="SQLite file: the same command goes on with it")
    found.add_argument(
        "--ray", default=None, metavar="ADDRESS", help="evaluate on a Ray cluster: auto, local, or an address"
    )
    found.add_argument("--workers", type=int, default=None, help="Ray workers; default one per GPU, else one per CPU")
    found.add_argument("--out", type=pathlib.Path, default=pathlib.Path("schedule.json"), help="the schedule file")
    found.add_argument("--chart", type=pathlib.Path, default=None, help="a PNG of how it went")
    found.set_defaults(run=run_search)

    other = subparsers.add_parser("compare", help="score schedules against each other and the stock ones")
    _sampling_arguments(other)
    other.add_argument("schedules", nargs="*", help="schedule files, or presets by name")
    other.add_argument("--stock-steps", type=int, default=0, help="add every stock schedule at this number of steps")
    other.add_argument("--repeats", type=int, default=3)
    other.add_argument("--chart", type=pathlib.Path, default=None, help="a PNG of the table")
    other.set_defaults(run=run_compare)


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pocket", help="pocket, a diffusers folder or a .safetensors checkpoint")
    parser.add_argument("--prompt", action="append", default=None, help="may be given several times")
    parser.add_argument("--prompts", type=pathlib.Path, default=None, help="a text file with one prompt a line")
    parser.add_argument("--negative", default="", help="negative prompt")
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--objective", choices=OBJECTIVES, default="paired")
    parser.add_argument("--features", choices=("latent", "pixels"), default="latent")
    parser.add_argument("--reference", type=pathlib.Path, default=None, help="folder of pictures for reference-*")
    parser.add_argument("--pairs", type=int, default=16, help="noise seeds and prompts per evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default=None)


def make_task(args: argparse.Namespace) -> Task:
    """Return what the arguments ask for; also the factory of cluster workers, so it must need nothing but `args`."""
    from ..core.loading import load

    pipe = load(args.model, args.device)
    prompts = list(args.prompt or [])
    if args.prompts is not None:
        prompts += [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    height, width = args.size
    size = (pipe.latent_channels, height // pipe.downscale, width // pipe.downscale)
    path = ModelPath(
        pipe.model, pipe.encode_text(prompts or [PROMPT], (height, width)),
        pipe.encode_text([args.negative], (height, width)), size, args.sampler, args.cfg, args.seed, args.batch,
        str(args.model),
    )  # fmt: skip
    name = getattr(args, "full", None)
    full = None if name is None else tuple(make_sigmas(name, pipe.model.levels, args.steps).tolist())
    config = SearchConfig(
        steps=getattr(args, "steps", 4), strategy=getattr(args, "strategy", "auto"), pairs=args.pairs,
        holdout_pairs=2 * args.pairs, evaluations=getattr(args, "evaluations", 1) or None,
        seconds=(getattr(args, "minutes", None) or 0) * 60 or None, layers=getattr(args, "layers", False), seed=args.seed,
        pin_first=not getattr(args, "search_first_level", False), computed=getattr(args, "computed", None), full=full,
    )  # fmt: skip
    return Task(path, make_objective(args, pipe), config)


def make_objective(args: argparse.Namespace, pipe: Any) -> Objective:
    """Return the objective that the arguments name; raises ValueError for a reference without a folder."""
    features = PixelFeatures(pipe.decode) if args.features == "pixels" else LatentFeatures(pipe.encode_image, args.size)
    if args.objective == "paired":
        return Paired() if args.features == "latent" else Paired(features)
    kind, distance = args.objective.split("-")
    if kind == "self":
        return SelfDistribution(features, distance)
    if args.reference is None:
        raise ValueError("Expected `--reference` FOLDER with this objective, but got none. Name a folder of pictures.")
    return ReferenceImages(load_images(args.reference), features, distance)


def run_search(args: argparse.Namespace) -> int:
    """Search, print the result, write the schedule."""
    _check_chart(args.chart)
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(
            f"Expected `--out` to be a file in a folder that is there, but got {str(args.out)!r}. Make the folder."
        )
    task = make_task(args)
    steps: list[SearchStep] = []

    def progress(step: Any) -> None:
        steps.append(step)
        shown = f"best {step.best:.5g}" if step.history else ""
        _line(f"{step.phase} {step.index}/{step.total} {shown}")

    executor: Any = None
    if args.ray:
        from ..search.workers import RayExecutor

        executor = RayExecutor(None if args.ray == "local" else args.ray, args.workers)
    try:
        result = search(
            task.path, task.config, task.objective, store=args.store, executor=executor,
            factory=functools.partial(make_task, args) if executor else None, callback=progress,
        )  # fmt: skip
    finally:
        _line("")
        if executor is not None:
            executor.shutdown()
    print(result_text(result))  # before anything that may fail
    print(f"written to {result.schedule.save(args.out)}")
    if args.chart is not None:
        from ..search.charts import search_chart

        stock = {name: sigmas.tolist() for name, sigmas in task.path.stock(args.steps).items()}
        save_image(search_chart(steps[-1], result.schedule.levels, stock), args.chart)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Compare, print the table."""
    _check_chart(args.chart)
    task = make_task(args)
    entries: dict[str, Any] = {}
    for name in args.schedules:
        path = PRESETS / f"{name}.json"
        schedule = Schedule.load(path if path.is_file() else name)
        print(schedule_text(schedule))
        identity = task.path.identity()
        for text in schedule.mismatches(identity["model"], identity["sampler"], identity["cfg"]):
            logger.warning("%s: %s", name, text)
        entries[pathlib.Path(name).stem] = schedule
    if args.stock_steps:
        entries |= task.path.stock(args.stock_steps)
    result = compare(
        task.path, entries, [task.objective], args.pairs, args.repeats,
        callback=lambda step: _line(f"{step.phase} {step.index}/{step.total}"),
    )  # fmt: skip
    _line("")
    print(result.table())
    if args.chart is not None:
        from ..search.charts import comparison_chart

        save_image(comparison_chart(result), args.chart)
    return 0


def _line(text: str) -> None:
    """Show progress on one line of a terminal; silent when piped."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _check_chart(path: pathlib.Path | None) -> None:
    """Raise ValueError before the work for a chart that could not be written after it."""
    if path is not None:
        check_drawing()
        check_image_name(path)
