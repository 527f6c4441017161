"""`slipstream search` and `slipstream compare`."""

from __future__ import annotations

import argparse
import functools
import logging
import pathlib
import re
from typing import Any

import torch

from ..core.charts import check_drawing
from ..core.checks import check_choice
from ..core.images import image_files, save_image
from ..core.pipeline import Pipeline
from ..core.samplers import SAMPLERS
from ..core.schedules import SCHEDULES, Levels, make_sigmas
from ..core.unused import Unused
from ..search.comparison import as_schedule, compare
from ..search.config import STRATEGIES, SearchConfig
from ..search.engine import SearchStep, search
from ..search.evaluation import Task
from ..search.features import LatentFeatures, PixelFeatures, load_images
from ..search.objectives import Objective, Paired, ReferenceImages, SelfDistribution
from ..search.parsing import typed_levels
from ..search.paths import ModelPath
from ..search.report import result_text, schedule_text
from ..search.schedule import Schedule
from .options import (
    NEGATIVE_RULE,
    add_cfg,
    add_model,
    add_output,
    add_prompt,
    add_seed,
    add_size,
    add_steps,
    check_cells,
    checked,
    integer,
    load_pipeline,
    number,
    size_of,
)
from .progress import Progress

logger = logging.getLogger(__name__)
PRESETS = pathlib.Path(__file__).resolve().parent.parent / "search" / "presets"
OBJECTIVES = ("paired", "self-frechet", "self-mmd", "reference-frechet", "reference-mmd")
PROMPT = "a large red circle on a blue background"
SIZE = (128, 128)
COMPARE_UNUSED = (
    NEGATIVE_RULE,
    Unused(
        "reference",
        lambda v: not v.objective.startswith("reference"),
        "on this --objective. Choose a reference-... one.",
    ),
)
SEARCH_UNUSED = (
    *COMPARE_UNUSED,
    Unused(
        "full",
        lambda v: v.objective.startswith("reference"),
        "on this --objective, which needs no run. Choose another.",
    ),
    Unused(
        "computed",
        lambda v: v.computed == v.steps and v.no_fit,
        "at the number of --steps with --no-fit: every step calls the network. Lower it.",
    ),
    Unused("no_fit", lambda v: v.computed is None, "without --computed. Give both."),
    Unused("workers", lambda v: v.ray is None, "without --ray. Give both."),
)


def add_parser(subparsers: Any) -> None:
    """Declare both sub-commands."""
    found = subparsers.add_parser(
        "search", help="find the best few-step schedule for a model",
        description="Find the noise levels that give the best result in a few steps, for one model, sampler, cfg and size. "
        "With --store, the same command resumes where an earlier one was ended.",
    )  # fmt: skip
    _sampling_arguments(found)
    add_steps(found, 4, help="steps of the schedule")
    found.add_argument(
        "--computed", type=integer(), metavar="CALLS", help="steps that call the network; the others reuse its answers"
    )
    found.add_argument(
        "--no-fit", action="store_true", help="with --computed: keep Euler's own coefficients instead of fitted ones"
    )
    found.add_argument(
        "--full", type=checked(_full), metavar="SCHEDULE",
        help="the schedule to reproduce: karras, beta, ... at --steps, a file, or a list such as 1,0.65,0.44 (default: many even steps)",
    )  # fmt: skip
    found.add_argument(
        "--begin", type=checked(_given), action="append", metavar="SCHEDULE",
        help="a schedule to begin from too: a file, a preset or a list such as 1,0.65,0.44; the result is never worse than one of no "
        "more calls; may be given several times",
    )  # fmt: skip
    found.add_argument("--evaluations", type=integer(), default=100, help="schedules to try")
    found.add_argument("--minutes", type=number(), default=None, help="time for evaluations, earlier runs included")
    found.add_argument("--strategy", choices=STRATEGIES, default="auto", help="auto: coordinates, then evolution")
    found.add_argument("--layers", action="store_true", help="also search blocks to skip")
    found.add_argument(
        "--search-first-level", action="store_true",
        help="also search where to start: often better below 5 steps, not for image to image",
    )  # fmt: skip
    add_output(found, "--store", kind=(), help="SQLite file: the same command continues with it")
    found.add_argument(
        "--ray", default=None, metavar="ADDRESS", help="evaluate on a Ray cluster: auto, local, or an address"
    )
    found.add_argument("--workers", type=integer(1), help="Ray workers; default one per GPU, else one per CPU")
    add_output(found, "--out", kind=(".json", ".safetensors"), default="schedule.json", help="the schedule file")
    add_output(found, "--chart", help="a PNG of how it went")
    found.unused = SEARCH_UNUSED
    found.set_defaults(run=run_search)

    other = subparsers.add_parser("compare", help="score schedules against each other and the stock ones")
    _sampling_arguments(other)
    other.add_argument("schedules", nargs="*", help="schedule files, or presets by name")
    other.add_argument(
        "--stock-steps", type=integer(0), default=0, help="add every stock schedule at this number of steps"
    )
    other.add_argument("--repeats", type=integer(), default=3, help="repeats on fresh noise, for the interval")
    add_output(other, "--chart", help="a PNG of the table")
    other.unused = COMPARE_UNUSED
    other.set_defaults(run=run_compare)


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt(parser, f'may be given several times (default "{PROMPT}")', action="append")
    parser.add_argument("--prompts", type=checked(prompts_in), help="a text file with one prompt a line")
    parser.add_argument("--sampler", default="euler", help="of the library")
    add_cfg(parser, 3.0)
    add_size(parser, "of the images (default 128x128)")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="paired",
        help="paired: the same images as many steps give; self-*: their distribution; reference-*: that of a folder",
    )  # fmt: skip
    parser.add_argument(
        "--features", choices=("latent", "pixels"), default="latent", help="what the objective compares"
    )
    parser.add_argument("--reference", type=pathlib.Path, default=None, help="folder of images for reference-*")
    parser.add_argument("--pairs", type=integer(1), default=16, help="noise seeds and prompts per evaluation")
    add_seed(parser)
    parser.add_argument("--batch", type=integer(1), default=16, help="most images sampled at once")
    add_model(parser)


def _full(text: str) -> str | Schedule:
    """Return the name of a stock schedule as it is, anything else as a schedule."""
    return text if text in SCHEDULES else _given(text)[1]


def _given(text: str) -> tuple[str, Schedule]:
    """Return (name, schedule) of a file, a preset, or a typed list of levels; raises ValueError or OSError."""
    if re.fullmatch(r"[\d.,eE+\-\s]+", text):
        return text, as_schedule(torch.tensor(typed_levels(text)))
    return pathlib.Path(text).stem, read_schedule(text)


def prompts_in(file: str) -> list[str]:
    """Return the prompts of a text file, one a line; raises ValueError for a file that is none or holds none."""
    try:
        lines = pathlib.Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a text file in UTF-8, but {file} cannot be read ({error}).") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"Expected a file with one prompt a line, but {file} holds none.")
    return prompts


def config_of(args: argparse.Namespace, levels: Levels | None = None) -> SearchConfig:
    """Return the config that the options ask for; without the model's `levels` it lacks the schedule of --full."""
    full = getattr(args, "full", None)
    sigmas = full.levels if isinstance(full, Schedule) else None
    if isinstance(full, str) and levels is not None:
        sigmas = tuple(make_sigmas(full, levels, args.steps).tolist())
    return SearchConfig(
        steps=getattr(args, "steps", 4), strategy=getattr(args, "strategy", "auto"), pairs=args.pairs,
        holdout_pairs=2 * args.pairs, evaluations=getattr(args, "evaluations", 1) or None,
        seconds=(getattr(args, "minutes", None) or 0) * 60 or None, layers=getattr(args, "layers", False), seed=args.seed,
        pin_first=not getattr(args, "search_first_level", False), computed=getattr(args, "computed", None), full=sigmas,
        fit=False if getattr(args, "no_fit", False) else None,
    )  # fmt: skip


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for what can be known to be wrong before a model is loaded."""
    if args.chart:
        check_drawing()
    config_of(args)
    check_choice("sampler", args.sampler, SAMPLERS)
    if args.objective.startswith("reference"):
        if args.reference is None:
            raise ValueError("Expected `reference` with this objective, but got none. Name a folder of images.")
        image_files(args.reference, name="reference")


def make_task(args: argparse.Namespace) -> Task:
    """Return what the arguments ask for; also the factory of cluster workers, so it must need nothing but `args`."""
    height, width = size_of(args, SIZE)
    pipe = load_pipeline(args)
    check_cells(pipe, height, width)
    config = config_of(args, pipe.model.levels)
    prompts = [*(args.prompt or []), *(args.prompts or [])] or [PROMPT]
    size = (pipe.latent_channels, height // pipe.downscale, width // pipe.downscale)
    path = ModelPath(
        pipe.model, pipe.encode_text(prompts, (height, width)), pipe.encode_text([args.negative], (height, width)), size,
        args.sampler, args.cfg_scale, args.seed, args.batch, str(args.model),
    )  # fmt: skip
    return Task(path, make_objective(args, pipe), config)


def make_objective(args: argparse.Namespace, pipe: Pipeline) -> Objective:
    """Return the objective that the arguments name; raises ValueError for a reference without a folder."""
    latent = LatentFeatures(pipe.encode_image, size_of(args, SIZE))
    features = PixelFeatures(pipe.decode) if args.features == "pixels" else latent
    if args.objective == "paired":
        return Paired() if args.features == "latent" else Paired(features)
    kind, distance = args.objective.split("-")
    if kind == "self":
        return SelfDistribution(features, distance)
    return ReferenceImages(load_images(args.reference), features, distance)


def run_search(args: argparse.Namespace) -> int:
    """Search, print the result, write the schedule."""
    check_options(args)
    task = make_task(args)
    steps: list[SearchStep] = []
    executor: Any = None
    if args.ray:
        from ..search.workers import RayExecutor

        executor = RayExecutor(None if args.ray == "local" else args.ray, args.workers)
    try:
        with Progress(
            note=lambda step: f"{step.phase}, best {step.best:.5g}" if step.history else step.phase
        ) as progress:

            def callback(step: Any) -> None:
                steps.append(step)
                progress(step)

            result = search(
                task.path, task.config, task.objective, store=args.store, executor=executor,
                factory=functools.partial(make_task, args) if executor else None, callback=callback,
                given=dict(args.begin or ()),
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"evaluations are kept in {args.store}, and the same command continues"
        raise KeyboardInterrupt(kept if args.store else "nothing is kept; with --store a search continues") from None
    finally:
        if executor is not None:
            executor.shutdown()
    print(result_text(result))  # before anything that may fail
    print(f"written to {result.schedule.save(args.out)}")
    if args.chart is not None:
        from ..search.charts import search_chart

        stock = {name: sigmas.tolist() for name, sigmas in task.path.stock(task.config.network_steps).items()}
        save_image(search_chart(steps[-1], result.schedule.levels, stock), args.chart)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Compare, print the table."""
    check_options(args)
    schedules = {name: read_schedule(name) for name in args.schedules}
    if not schedules and not args.stock_steps:
        raise ValueError("Expected at least one schedule, but got none. Name files or presets, or set --stock-steps.")
    task = make_task(args)
    identity = task.path.identity()
    entries: dict[str, Any] = {}
    stock = task.path.stock(args.stock_steps) if args.stock_steps else {}
    for name, schedule in schedules.items():
        print(schedule_text(schedule))
        for text in schedule.mismatches(identity["model"], identity["sampler"], identity["cfg"]):
            logger.warning("%s: %s", name, text)
        stem = pathlib.Path(name).stem
        entries[name if stem in entries or stem in stock else stem] = schedule
    entries |= stock
    with Progress() as progress:
        result = compare(task.path, entries, [task.objective], args.pairs, args.repeats, callback=progress)
    print(result.table())
    if args.chart is not None:
        from ..search.charts import comparison_chart

        save_image(comparison_chart(result), args.chart)
    return 0


def read_schedule(name: str) -> Schedule:
    """Return a preset by name, or the schedule of a file."""
    path = PRESETS / f"{name}.json"
    try:
        return Schedule.load(path if path.is_file() else pathlib.Path(name).expanduser())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except OSError as error:
        raise ValueError(f"Expected a schedule file or a preset, but {name} cannot be read ({error}).") from error
