"""Nodes of the schedule search: find, compare, keep and use the best few-step schedule for the user's own model."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..search.config import STRATEGIES, SearchConfig
from ..search.objectives import DISTANCES
from .host.places import readable, readable_images
from .unused import Unused
from .widgets import choice, file_stem, integer, number, refusal, seed, string, switch, watched, work_seed

CATEGORY = "slipstream/schedule"
SCHEDULE, OBJECTIVE, ENTRIES = "SLIPSTREAM_SCHEDULE", "SLIPSTREAM_OBJECTIVE", "SLIPSTREAM_SCHEDULES"
PRESETS = pathlib.Path(__file__).resolve().parent.parent / "search" / "presets"
PAIRED, SELF = "same picture as many steps", "same look as many steps"
PIXELS, LATENT, CLIP_VISION, INCEPTION = "pixels", "latent", "clip vision", "inception"
FRECHET, MMD = "frechet", "mmd"
LARGEST = 5000  # images of a reference folder
GUIDER = (
    "GUIDER",
    {"tooltip": "The model with its prompt and cfg, as for SamplerCustomAdvanced: from CFGGuider or any other."},
)
SAMPLER = ("SAMPLER", {"tooltip": "The sampler you will use: a schedule is best for one sampler."})
SIZE = ("LATENT", {"tooltip": "An empty latent of the size you will use. Its content does not matter."})


def user_folder(kind: str) -> pathlib.Path:
    """Return <user>/slipstream/<kind>; it need not exist yet."""
    import folder_paths

    return pathlib.Path(folder_paths.get_user_directory()) / "slipstream" / kind


def schedule_files() -> dict[str, pathlib.Path]:
    """Return the user's schedule files and the bundled ones, by the name shown."""
    found = {}
    try:
        own = user_folder("schedules")
    except ImportError:  # no host: only what comes with the pack
        own = None
    if own is not None and own.is_dir():
        found = {p.name: p for p in sorted(own.iterdir()) if p.suffix in (".json", ".safetensors")}
    return {**found, **{f"preset: {p.stem}": p for p in sorted(PRESETS.glob("*.json"))}}


CLIP_RULE = Unused("clip", lambda v: not v.prompts.strip(), "without `prompts`. Write some, or disconnect it.")
VISION_RULE = Unused("clip_vision", lambda v: v.features != CLIP_VISION, "on these `features`. Choose clip vision.")


class StepBar:
    """A node's bar: what is evaluated, and each many-step run, which takes as long as many evaluations, as a bar of its own."""

    def __init__(self) -> None:
        import comfy.utils

        self.bar, self.many_steps = comfy.utils.ProgressBar(1), False

    def sampled(self, done: int, total: int) -> None:
        """Show the steps of a many-step run."""
        if self.many_steps:
            self.bar.update_absolute(done, total)
            self.many_steps = done < total

    def __call__(self, step: Any) -> None:
        from .host.progress import check_interrupt

        check_interrupt()
        self.many_steps = step.phase == "teacher"
        image = self.preview(step)
        self.bar.update_absolute(step.index, step.total, image and ("JPEG", image, image.width))

    def preview(self, step: Any) -> Any:
        """Return an image for the node, None for none."""
        return None


class LivePlot(StepBar):
    """Progress of a search in the host: bar, interrupt, and now and then a chart as the node's preview."""

    def __init__(self, stock: dict[str, Tensor]) -> None:
        from .host.charts import live_chart

        super().__init__()
        self.live = live_chart("Search Schedule")
        self.stock = {name: sigmas.tolist() for name, sigmas in stock.items()}
        self.best, self.levels = float("inf"), ()
        self.step: Any = None  # the last one; a chart is drawn once there is one
        self.profile: tuple[tuple[int, float], ...] = ()
        self.calls = 0

    def preview(self, step: Any) -> Any:
        self.step = step
        if step.phase == "search" and step.score <= step.best and step.score < self.best:
            self.best, self.levels = step.score, step.levels
        last = step.phase == "final" and step.index == step.total
        return self.live(self.chart, last) if self.levels else None

    def chart(self) -> Tensor:
        from ..search.charts import search_chart

        return search_chart(self.step, self.levels, self.stock, self.profile, self.calls)


def _objective(choice: str) -> Any:
    from ..search import Paired, SelfDistribution

    return Paired() if choice == PAIRED else SelfDistribution()


class SearchSchedule:
    """Searches the best noise levels for a model, sampler, cfg and number of steps."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Finds the noise levels (and, if you like, the layers to skip) that give the best result in a few steps, for your model, "
        "sampler, cfg, prompt and size (AutoDiffusion, arXiv 2309.10438). Every evaluation is kept: cancel whenever you like, Run "
        "resumes where it was. The result is never worse, on images it was not searched on, than the stock schedules."
    )
    RETURN_TYPES = (SCHEDULE, "SIGMAS", "IMAGE", "STRING")
    RETURN_NAMES = ("schedule", "sigmas", "chart", "report")
    OUTPUT_TOOLTIPS = (
        "The schedule with its provenance, for Save Schedule, Resample Schedule and Apply Layer Mask.",
        "The noise levels, for SamplerCustomAdvanced and every other node that takes SIGMAS.",
        "How the search went, against the stock schedules.",
        "What was found, and the scores of all stock schedules on held-out images.",
    )
    FUNCTION = "search"

    UNUSED = (
        Unused(
            "objective",
            lambda v: v.custom_objective is not None,
            "while `custom_objective` is connected. Disconnect it.",
        ),
        Unused(
            "computed",
            lambda v: v.computed == v.steps and not v.fit,
            "at the number of `steps` without `fit`: every step calls the model. Lower it, or switch `fit` on.",
        ),
        CLIP_RULE,
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "guider": GUIDER,
                "sampler": SAMPLER,
                "latent_image": SIZE,
                "steps": integer(4, 1, 100, "Steps of the schedule. A search pays most at 2 to 8."),
                "evaluations": integer(
                    100, 0, 1_000_000, "How many schedules to try; 60 to 150 are enough for 4 steps. 0 = no such limit."
                ),
                "minutes": number(
                    0.0,
                    0.0,
                    100_000.0,
                    "Time for evaluations, earlier runs of the same search included. 0 = no such limit.",
                    0.5,
                ),
                "objective": choice(
                    [PAIRED, SELF],
                    PAIRED,
                    "`same picture`: closest to what many steps give from the same noise; steady with few "
                    "pairs. same look: distribution of the latents like that of many steps; needs 64 pairs or more.",
                ),
                "pairs": integer(
                    16,
                    2,
                    10_000,
                    "Noise seeds (and prompts) that every schedule is tried on. More is steadier and slower.",
                ),
                "seed": work_seed("Noise seed. The same seed resumes the same search.", high=2**63 - 1),
                "strategy": choice(
                    STRATEGIES,
                    "auto",
                    "auto: coordinate search, then evolution. published: AutoDiffusion's own algorithm, "
                    "corrected; it needs several times the evaluations.",
                ),
                "layers": switch(
                    False,
                    "Also search blocks to skip, in exchange for extra steps. Use Apply Layer "
                    "Mask for sampling with the result. No gain was measured on the bundled model; `computed` saves more.",
                ),
                "batch": integer(16, 1, 256, "Most images sampled at once; halved when memory runs out."),
            },
            "optional": {
                "custom_objective": (OBJECTIVE, {"tooltip": "From an objective node, instead of the choice above."}),
                "clip": ("CLIP", {"tooltip": "With `prompts`: encodes them."}),
                "prompts": string(
                    "",
                    "One prompt a line. They take the place of the guider's positive prompt, "
                    "so that the schedule suits the model and not one prompt. Needs CLIP.",
                    multiline=True,
                ),
                "search_first_level": switch(
                    False,
                    "Also search where to start: often better below 5 steps from an empty latent. Off: "
                    "at the model's highest level, as image to image and COW expect; a stock schedule that begins lower is not returned.",
                ),
                "computed": integer(
                    0,
                    0,
                    1000,
                    "How many of the steps call the model; the others continue on its earlier answers. 0 = every step calls it. "
                    "Sample with the result through Apply Call Reuse.",
                ),
                "sigmas": (
                    "SIGMAS",
                    {
                        "tooltip": "The schedule that you use today, such as BasicScheduler's with 20 steps. Its image is the goal, "
                        "instead of that of 50 even steps."
                    },
                ),
                "fit": switch(
                    True,
                    "With `computed` and the sampler euler: each step combines the model's last two or three answers, with coefficients "
                    "fitted to your full run (S4S, arXiv 2502.17423). Sample with euler and Apply Call Reuse.",
                ),
                "schedules": (
                    ENTRIES,
                    {
                        "tooltip": "More schedules to start from, from Add Schedule: the list that a distilled model comes with, or the "
                        "result of a search with fewer calls. The result is never worse than any of them with as many calls or fewer."
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, evaluations: int | None = None, minutes: float | None = None, steps: int | None = None,
        computed: int | None = None, strategy: str | None = None, layers: bool | None = None,
    ) -> bool | str:  # fmt: skip
        def check(evaluations: int, minutes: float, steps: int, computed: int, strategy: str, layers: bool) -> None:
            if not evaluations and not minutes:
                raise ValueError("Expected a limit in `evaluations` or `minutes`, but got 0 for both. Set one.")
            SearchConfig(steps=steps, computed=computed or None, strategy=strategy, layers=layers)

        return refusal(
            cls, check, evaluations=evaluations, minutes=minutes, steps=steps, computed=computed, strategy=strategy,
            layers=layers,
        )  # fmt: skip

    def search(
        self, guider: Any, sampler: Any, latent_image: dict[str, Any], steps: int, evaluations: int, minutes: float,
        objective: str, pairs: int, seed: int, strategy: str, layers: bool, batch: int, custom_objective: Any = None,
        clip: Any = None, prompts: str = "", search_first_level: bool = False, computed: int = 0,
        sigmas: Tensor | None = None, fit: bool = True, schedules: dict[str, Any] | None = None,
    ) -> tuple[Any, Tensor, Tensor, str]:  # fmt: skip
        from ..search import Schedule, search
        from ..search.report import result_text
        from .host.charts import chart
        from .host.native import warn_of_latents
        from .host.search_path import HostPath
        from .host.warnings import warn

        config = SearchConfig(
            steps=steps, strategy=strategy, pairs=pairs, holdout_pairs=2 * pairs, evaluations=evaluations or None,
            seconds=minutes * 60 or None, layers=layers, seed=seed, pin_first=not search_first_level,
            computed=computed or None, full=None if sigmas is None else tuple(sigmas.tolist()),
            fit=None if fit else False,
        )  # fmt: skip
        path = HostPath(guider, sampler, latent_image, seed, batch, _prompts(clip, prompts, warn), layers)
        warn_of_latents("Search Schedule", guider.model_patcher, latent_image["samples"])
        goal = custom_objective or _objective(objective)
        plot = LivePlot(path.stock(config.network_steps))
        path.listen = plot.sampled
        result = search(path, config, goal, store=_job_file, callback=plot, given=schedules)
        identity = path.identity()
        given = {name: s for name, s in (schedules or {}).items() if isinstance(s, Schedule)}
        foreign = [
            f"{name}: {text}"
            for name, schedule in given.items()
            for text in schedule.mismatches(identity["model"], identity["sampler"], identity["cfg"])
        ]
        for text in [*foreign, *result.warnings]:
            warn("Search Schedule", text)
        plot.profile, plot.calls = result.profile, result.schedule.nfe
        drawn = chart("Search Schedule", plot.chart)
        return result.schedule, result.schedule.sigmas, drawn, result_text(result)


def _prompts(clip: Any, prompts: str, warn: Callable[[str, str], None]) -> Any:
    from .host.search_path import prompts_conditioning

    if not prompts.strip():
        return None
    if clip is None:
        raise ValueError("Expected `clip` to encode `prompts`, but got none. Connect CLIP, or leave the prompts empty.")
    return prompts_conditioning(clip, prompts)


def _job_file(identity: dict[str, Any]) -> pathlib.Path:
    """Return the store of a search: one file for each set of inputs that changes what is measured."""
    found = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    return user_folder("search") / f"{found.hexdigest()[:16]}.sqlite"


class _ObjectiveNode:
    CATEGORY = CATEGORY
    RETURN_TYPES = (OBJECTIVE,)
    RETURN_NAMES = ("objective",)
    OUTPUT_TOOLTIPS = ("For the custom_objective input.",)
    FUNCTION = "make"


class ReferenceObjective(_ObjectiveNode):
    """Objective: images like those in a folder or a batch."""

    DESCRIPTION = (
        "For Search Schedule and Compare Schedules: how far the samples' distribution is from that of reference images. With CLIP "
        "vision and mmd this is CMMD (arXiv 2401.09603) up to its scale; with frechet the Frechet distance on the chosen features, "
        "the paper's objective when the features are Inception's."
    )

    UNUSED = (
        VISION_RULE,
        Unused(
            "folder", lambda v: v.images is not None, "while `images` is connected. Disconnect it to use the folder."
        ),
        Unused("inception_weights", lambda v: v.features != INCEPTION, "on these `features`. Choose inception."),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": ("VAE", {"tooltip": "Decodes the samples (or encodes the images, for latent features)."}),
                "features": choice(
                    [PIXELS, LATENT, CLIP_VISION, INCEPTION],
                    PIXELS,
                    "pixels: coarse colours and edges. latent: the same in the VAE's latents, without "
                    "decoding samples. clip vision: embeddings; best for real images, needs clip_vision. inception: FID's; needs a "
                    "file of weights.",
                ),
                "distance": choice(DISTANCES, FRECHET, "mmd needs fewer images; frechet is FID's formula."),
                "folder": string("", "A folder of images of any size, below the input folder. Or connect images."),
            },
            "optional": {
                "images": ("IMAGE", {"tooltip": "Reference images as a batch, instead of a folder."}),
                "clip_vision": ("CLIP_VISION", {"tooltip": "For the clip vision features."}),
                "inception_weights": string(
                    "",
                    "File with Inception v3 weights (torch-fidelity's for FID, or torchvision's), in the input or models "
                    "folders. Nothing is downloaded.",
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, features: str | None = None, inception_weights: str | None = None) -> bool | str:
        def check(features: str, inception_weights: str) -> None:
            if features == INCEPTION and not readable("inception_weights", inception_weights).is_file():
                raise ValueError(
                    f"Expected `inception_weights` to be a file for the features {INCEPTION}, but got {inception_weights!r}. "
                    "Name one, or choose other features."
                )

        return refusal(cls, check, features=features, inception_weights=inception_weights)

    @classmethod
    def IS_CHANGED(cls, folder: str = "", inception_weights: str = "", **_: Any) -> str | float:
        def files() -> list[pathlib.Path]:
            weights = [readable("inception_weights", inception_weights)] if inception_weights.strip() else []
            return [*(readable_images("folder", folder) if folder.strip() else []), *weights]

        return watched(files)

    def make(
        self, vae: Any, features: str, distance: str, folder: str, images: Tensor | None = None, clip_vision: Any = None,
        inception_weights: str = "",
    ) -> tuple[Any]:  # fmt: skip
        from ..search import ReferenceImages
        from ..search.features import ImageFolder

        if images is None and not folder.strip():
            raise ValueError("Expected `folder` or `images`, but got neither. Name a folder of images.")
        goal = list(images) if images is not None else ImageFolder(readable_images("folder", folder)[:LARGEST])
        return (ReferenceImages(goal, make_features(features, vae, clip_vision, goal[0], inception_weights), distance),)


class SelfObjective(_ObjectiveNode):
    """Objective: the look of the model's own many-step samples, on features of choice."""

    DESCRIPTION = (
        "For Search Schedule and Compare Schedules: how far the samples are from what the model itself makes in many steps, either "
        "image by image (paired) or as a distribution (frechet, mmd), on features of your choice."
    )

    UNUSED = (VISION_RULE,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": ("VAE", {"tooltip": "Decodes the samples."}),
                "features": choice(
                    [PIXELS, LATENT, CLIP_VISION],
                    PIXELS,
                    "What images are compared by. clip vision needs clip_vision.",
                ),
                "distance": choice(
                    ["paired", *DISTANCES],
                    "paired",
                    "paired: same noise, same image. frechet and mmd: the same look as a whole.",
                ),
            },
            "optional": {"clip_vision": ("CLIP_VISION", {"tooltip": "For the clip vision features."})},
        }

    def make(self, vae: Any, features: str, distance: str, clip_vision: Any = None) -> tuple[Any]:
        from ..search import Paired, SelfDistribution

        found = make_features(features, vae, clip_vision)
        return (Paired(found) if distance == "paired" else SelfDistribution(found, distance),)


def make_features(kind: str, vae: Any, clip_vision: Any, sample: Tensor | None = None, weights: str = "") -> Any:
    """Return library features over the host's VAE and CLIP vision model, or over the user's Inception weights."""
    from ..search.features import LatentFeatures, NetworkFeatures, PixelFeatures
    from .host.progress import check_interrupt

    def decode(latents: Tensor) -> Tensor:
        check_interrupt()
        return vae.decode(latents).float().cpu()

    def encode(images: Tensor) -> Tensor:
        check_interrupt()
        return vae.encode(images[..., :3]).float().cpu()

    if kind == PIXELS:
        return PixelFeatures(decode)
    if kind == LATENT:
        size = None if sample is None else (8 * max(sample.shape[0] // 8, 1), 8 * max(sample.shape[1] // 8, 1))
        return LatentFeatures(encode, size)
    if kind == INCEPTION:
        from ..search.inception import inception_embedding

        file = readable("inception_weights", weights)
        return NetworkFeatures(decode, inception_embedding(file), INCEPTION, (299, 299))
    if clip_vision is None:
        raise ValueError(
            "Expected `clip_vision` for these features, but got none. Connect Load CLIP Vision, or compare pixels."
        )

    def embed(images: Tensor) -> Tensor:
        found = clip_vision.encode_image(images)["image_embeds"].float().cpu()
        return found / found.norm(dim=1, keepdim=True)

    return NetworkFeatures(decode, embed, "clip-vision")


class AddSchedule:
    """One more entry for Compare Schedules and Search Schedule."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Adds a named schedule to the list that Compare Schedules measures, or that Search Schedule begins from; chain as many as you "
        "like."
    )
    RETURN_TYPES = (ENTRIES,)
    RETURN_NAMES = ("schedules",)
    OUTPUT_TOOLTIPS = ("The list so far, for the next Add Schedule, Compare Schedules or Search Schedule.",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"name": string("", "Its name in the chart; empty takes the schedule's own name.")},
            "optional": {
                "sigmas": ("SIGMAS", {"tooltip": "Noise levels from any scheduler node."}),
                "schedule": (
                    SCHEDULE,
                    {"tooltip": "Instead of sigmas: a searched or loaded schedule, with its layer masks."},
                ),
                "schedules": (ENTRIES, {"tooltip": "The entries so far."}),
                "levels": string(
                    "",
                    "Instead of sigmas: a typed list, as distilled models come with, such as 1.0, 0.65, 0.44, 0.29. A missing 0 "
                    "at the end is added.",
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, levels: str | None = None) -> bool | str:
        return refusal(cls, lambda levels: _typed(levels), levels=levels)

    def add(
        self, name: str, sigmas: Tensor | None = None, schedule: Any = None, schedules: dict[str, Any] | None = None,
        levels: str = "",
    ) -> tuple[dict[str, Any]]:  # fmt: skip
        typed = _typed(levels)
        if [sigmas is None, schedule is None, typed is None].count(False) != 1:
            raise ValueError(
                "Expected one of `sigmas`, `schedule` and `levels`, but got none or several. Connect one, or type a list."
            )
        sigmas = sigmas if typed is None else typed
        name = name.strip() or (schedule.name if schedule is not None else f"{len(sigmas) - 1} steps")  # type: ignore[arg-type]
        return ({**(schedules or {}), _unused(name, schedules or {}): sigmas if schedule is None else schedule},)


def _typed(levels: str) -> Tensor | None:
    from ..search.parsing import typed_levels

    return torch.tensor(typed_levels(levels, "levels")) if levels.strip() else None


def _unused(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else next(n for i in range(2, 10_000) if (n := f"{name} ({i})") not in taken)


class CompareSchedules:
    """Scores any number of schedules on the same fresh images."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Is it better than karras, beta or Align Your Steps? Samples every schedule on the same noise, none of which a search has "
        "seen, and draws a table and a chart with 95 % intervals over the repeats."
    )
    RETURN_TYPES = ("IMAGE", "STRING", "SIGMAS")
    RETURN_NAMES = ("chart", "table", "best")
    OUTPUT_TOOLTIPS = (
        "One point per schedule with its interval, best first.",
        "The same as text.",
        "The levels of the best one.",
    )
    FUNCTION = "compare"

    UNUSED = (CLIP_RULE,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "guider": GUIDER,
                "sampler": SAMPLER,
                "latent_image": SIZE,
                "stock_steps": integer(0, 0, 100, "Adds every stock schedule at this number of steps. 0 = none."),
                "pairs": integer(16, 2, 10_000, "Noise seeds (and prompts) per repeat."),
                "repeats": integer(3, 1, 20, "Repeats on fresh noise, for the interval."),
                "objective": choice([PAIRED, SELF], PAIRED, "As in Search Schedule."),
                "seed": seed("Noise seed.", high=2**63 - 1),
                "batch": integer(16, 1, 256, "Most images sampled at once."),
            },
            "optional": {
                "schedule": (SCHEDULE, {"tooltip": "A searched or loaded schedule, with its layer masks."}),
                "sigmas": ("SIGMAS", {"tooltip": "Noise levels from any scheduler node."}),
                "schedules": (ENTRIES, {"tooltip": "Any number more, from Add Schedule."}),
                "custom_objective": (OBJECTIVE, {"tooltip": "A second panel, from an objective node."}),
                "clip": ("CLIP", {"tooltip": "With `prompts`: encodes them."}),
                "prompts": string("", "One prompt a line, instead of the guider's.", multiline=True),
            },
        }

    def compare(
        self, guider: Any, sampler: Any, latent_image: dict[str, Any], stock_steps: int, pairs: int, repeats: int,
        objective: str, seed: int, batch: int, schedule: Any = None, sigmas: Tensor | None = None,
        schedules: dict[str, Any] | None = None, custom_objective: Any = None, clip: Any = None, prompts: str = "",
    ) -> tuple[Tensor, str, Tensor]:  # fmt: skip
        from ..search import compare
        from ..search.charts import comparison_chart
        from .host.charts import chart
        from .host.native import warn_of_latents
        from .host.search_path import HostPath
        from .host.warnings import warn

        masked = getattr(schedule, "masks", ()) or any(getattr(s, "masks", ()) for s in (schedules or {}).values())
        path = HostPath(guider, sampler, latent_image, seed, batch, _prompts(clip, prompts, warn), bool(masked))
        warn_of_latents("Compare Schedules", guider.model_patcher, latent_image["samples"])
        entries: dict[str, Any] = dict(schedules or {})
        if schedule is not None:
            entries[_unused(schedule.name or "schedule", entries)] = schedule
            identity = path.identity()
            for text in schedule.mismatches(identity["model"], identity["sampler"], identity["cfg"]):
                warn("Compare Schedules", text)
        if sigmas is not None:
            entries[_unused("sigmas", entries)] = sigmas
        if stock_steps:
            entries |= {name: s for name, s in path.stock(stock_steps).items() if name not in entries}
        progress = StepBar()
        path.listen = progress.sampled
        goals = [_objective(objective), *([custom_objective] if custom_objective is not None else [])]
        result = compare(path, entries, goals, pairs, repeats, callback=progress)
        best = torch.tensor(result.rows[0].levels, dtype=torch.float32)
        drawn = chart("Compare Schedules", lambda: comparison_chart(result))
        return drawn, result.table(), best


class LoadSchedule:
    """Loads a schedule file."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a schedule from <user>/slipstream/schedules (JSON, or a .safetensors that carries one), or one of the presets that "
        "come with the pack with their published source. With a model connected it warns when the schedule was made for another."
    )
    RETURN_TYPES = (SCHEDULE, "SIGMAS", "STRING")
    RETURN_NAMES = ("schedule", "sigmas", "info")
    OUTPUT_TOOLTIPS = ("The schedule.", "Its noise levels.", "Where it comes from and what it was made for.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = list(schedule_files())
        return {
            "required": {
                "file": choice(files, files[0] if files else "", "Press R in the canvas to list new files."),
                "steps": integer(0, 0, 1000, "Resample to this number of steps. 0 = as it is."),
            },
            "optional": {
                "guider": ("GUIDER", {"tooltip": "Only to warn when model or cfg differ from what it was made for."}),
                "sampler": ("SAMPLER", {"tooltip": "Only to warn when the sampler differs."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, file: str, **_: Any) -> str | float:
        return watched(lambda: [schedule_files()[file]])

    def load(self, file: str, steps: int, guider: Any = None, sampler: Any = None) -> tuple[Any, Tensor, str]:
        from ..search import Schedule
        from ..search.report import schedule_text
        from .host.warnings import warn

        files = schedule_files()
        if file not in files:
            raise ValueError(f"Expected `file` to be one of {', '.join(files)}, but got {file!r}. Refresh the list.")
        schedule = Schedule.load(files[file])
        schedule = schedule.resample(steps) if steps else schedule
        for text in [*schedule.warnings, *mismatches(schedule, guider, sampler)]:
            warn("Load Schedule", text)
        return schedule, schedule.sigmas, schedule_text(schedule)


def mismatches(schedule: Any, guider: Any = None, sampler: Any = None) -> list[str]:
    """Return what differs between a schedule and the sampling it is about to be used in."""
    from .host.search_path import described, sampler_name

    model, cfg = None, None
    if guider is not None:
        model = described(guider.model_patcher)
        cfg = float(guider.cfg) if hasattr(guider, "cfg") else None
    return schedule.mismatches(model, None if sampler is None else sampler_name(sampler), cfg)


class SaveSchedule:
    """Saves a schedule as a file that others can load."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Writes the schedule to <user>/slipstream/schedules/NAME.json, where Load Schedule lists it. The file can be shared."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_TOOLTIPS = ("Where it was written.",)
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "schedule": (SCHEDULE, {"tooltip": "From Search Schedule or Resample Schedule."}),
                "name": string("my_schedule", "File name without ending."),
                "overwrite": switch(False, "Off: a file of that name is kept and a number is added."),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None = None) -> bool | str:
        return refusal(cls, file_stem, name=name)

    def save(self, schedule: Any, name: str, overwrite: bool) -> dict[str, Any]:
        folder = user_folder("schedules")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{file_stem(name)}.json" if overwrite else _new_file(folder, file_stem(name))
        try:
            schedule.save(path)
        except BaseException:
            if not overwrite:
                path.unlink(missing_ok=True)
            raise
        return {"ui": {"text": [str(path)]}, "result": (str(path),)}


def _new_file(folder: pathlib.Path, stem: str) -> pathlib.Path:
    """Return an empty file of a name that no other had: two hosts may write into one folder."""
    while True:
        path = folder / f"{_unused(stem, {p.stem: p for p in folder.glob('*.json')})}.json"
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path


class ResampleSchedule:
    """Another number of steps."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Turns a schedule into one of another number of steps: linear in log-SNR between its levels, first and last level exact. A "
        "good start, but a search at that number of steps is better."
    )
    RETURN_TYPES = (SCHEDULE, "SIGMAS")
    RETURN_NAMES = ("schedule", "sigmas")
    OUTPUT_TOOLTIPS = ("The new schedule.", "Its noise levels.")
    FUNCTION = "resample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "schedule": (SCHEDULE, {"tooltip": "Any schedule of at least 2 steps."}),
                "steps": integer(8, 1, 1000, "Steps of the new schedule."),
            }
        }

    def resample(self, schedule: Any, steps: int) -> tuple[Any, Tensor]:
        made = schedule.resample(steps)
        return made, made.sigmas


class ApplyCallReuse:
    """A MODEL whose network calls are reused as a searched schedule states."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Returns the MODEL with the schedule's call reuse: in the steps that the search chose, the sampler continues on the model's "
        "earlier answers instead of calling it, with the coefficients that were fitted for it. It acts around the guider, so it needs "
        "nothing from the model. Use it with the schedule's own sigmas."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with call reuse; the input model is not changed.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the schedule was searched for."}),
                "schedule": (SCHEDULE, {"tooltip": "A schedule searched with `computed`."}),
            }
        }

    def apply(self, model: Any, schedule: Any) -> tuple[Any]:
        from .host.reuse import with_reuse

        return (with_reuse(model, schedule),)


class ApplyLayerMask:
    """A MODEL that skips the blocks a schedule says."""

    CATEGORY = f"{CATEGORY}/advanced"
    DESCRIPTION = (
        "Returns the MODEL with the schedule's layer mask: at the noise levels it names, the network leaves those blocks out. No gain "
        "was measured on the bundled model: to save calls, use Apply Call Reuse. Without a mask in the schedule the model is returned as "
        "it is. A mask of another architecture is refused."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with the mask; the input model is not changed.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the schedule was searched for."}),
                "schedule": (SCHEDULE, {"tooltip": "A schedule with a layer mask."}),
            }
        }

    def apply(self, model: Any, schedule: Any) -> tuple[Any]:
        from .host.layers import with_masks
        from .host.warnings import warn

        if not schedule.masks:
            warn(
                "Apply Layer Mask",
                "`schedule` has no layer mask, so the model is returned as it is. Search with `layers` on.",
            )
        return (with_masks(model, schedule.masks, schedule.model.get("class") or ""),)


NODES = {
    "SlipstreamSearchSchedule": (SearchSchedule, "Search Schedule"),
    "SlipstreamCompareSchedules": (CompareSchedules, "Compare Schedules"),
    "SlipstreamAddSchedule": (AddSchedule, "Add Schedule to Compare"),
    "SlipstreamLoadSchedule": (LoadSchedule, "Load Schedule"),
    "SlipstreamSaveSchedule": (SaveSchedule, "Save Schedule"),
    "SlipstreamResampleSchedule": (ResampleSchedule, "Resample Schedule"),
    "SlipstreamApplyCallReuse": (ApplyCallReuse, "Apply Call Reuse"),
    "SlipstreamApplyLayerMask": (ApplyLayerMask, "Apply Layer Mask"),
    "SlipstreamReferenceObjective": (ReferenceObjective, "Objective: Reference Images"),
    "SlipstreamSelfObjective": (SelfObjective, "Objective: Own Many-Step Result"),
}
