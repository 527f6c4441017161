"""Nodes of latent masking: mask schedules, masked regeneration, a trainable latent fill, and two diagnostics."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_integer, check_range
from ..core.samplers import SAMPLERS
from ..core.schedules import SCHEDULES
from ..lmd.latent_fill import SIZES
from ..lmd.mask_schedule import DIRECTIONS, KINDS
from ..lmd.stretch import parse_points
from ..lmd.training import MASK_KINDS, RATIO_KINDS
from .host.places import readable_images
from .host.vae import cell_side
from .unused import Unused
from .widgets import choice, file_stem, integer, number, refusal, seed, string, switch, watched, work_seed

CATEGORY = "slipstream/mask"
SHOWN = 8  # maps of a long clip that a node shows
FILL, TASKS = "SLIPSTREAM_LATENT_FILL", "SLIPSTREAM_EDIT"
NO_FILE = "(none yet: train one)"


def _ratio_inputs() -> dict[str, Any]:
    """The widgets of a mask schedule, the same for both nodes that have one."""
    return {
        "kind": choice(KINDS, "cosine", "How the masked share goes from low to high; fixed is always high."),
        "low": number(0.15, 0.0, 1.0, "Smallest share of patches that is masked (0 to 1; the paper uses 0.15)."),
        "high": number(0.75, 0.0, 1.0, "Largest share of patches that is masked (0 to 1; the paper uses 0.75)."),
        "direction": choice(
            DIRECTIONS,
            "decreasing",
            "decreasing: most masked first, details last. increasing: the order of the paper's training.",
        ),
    }


FIXED_RULE = Unused(
    "low direction", lambda v: v.kind == "fixed", "with `kind` fixed, which is always `high`. Choose another kind."
)


def _check_ratios(low: float, high: float) -> None:
    check_range("high", high, low, 1, "`high` must not be below `low`.")


class MaskSchedule:
    """Random patch masks whose share follows a schedule."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "A batch of random patch masks whose masked share follows one of the three schedules of latent masking diffusion "
        "(arXiv 2312.07971), or is fixed. Use it with Masked Regenerate, or anywhere that takes a batch of masks."
    )
    RETURN_TYPES = ("MASK", "IMAGE")
    RETURN_NAMES = ("masks", "chart")
    OUTPUT_TOOLTIPS = ("One mask a step, 1 = masked.", "The share over the steps, and the masks.")
    FUNCTION = "make"

    UNUSED = (
        FIXED_RULE,
        Unused(
            "kind low direction nested",
            lambda v: v.steps == 1 and v.kind != "fixed",
            "on one mask. Use 2 `steps` or more.",
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "steps": integer(6, 1, 1000, "How many masks. Both ends of the schedule are among them."),
                **_ratio_inputs(),
                "width": integer(512, 8, 16384, "Width of the masks in pixels.", step=8),
                "height": integer(512, 8, 16384, "Height of the masks in pixels.", step=8),
                "patch": integer(
                    64,
                    0,
                    4096,
                    "Side of a patch in pixels; 0 takes an eighth of the shorter side. A multiple of 8 covers whole latent cells.",
                ),
                "nested": switch(
                    True, "On: every smaller mask lies inside every larger one. Off: new patches each step."
                ),
                "seed": seed("Which patches. The same seed gives the same masks."),
            },
            "optional": {
                "region": ("MASK", {"tooltip": "Mask only patches that this mask touches; shares count those."})
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, low: float | None = None, high: float | None = None, patch: int | None = None, width: int | None = None,
        height: int | None = None,
    ) -> bool | str:  # fmt: skip
        def check(low: float, high: float, patch: int, width: int, height: int) -> None:
            _check_ratios(low, high)
            check_integer("patch", patch, 0, min(width, height), "Use smaller patches or larger masks.")

        return refusal(cls, check, low=low, high=high, patch=patch, width=width, height=height)

    def make(
        self, steps: int, kind: str, low: float, high: float, direction: str, width: int, height: int, patch: int,
        nested: bool, seed: int, region: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from ..lmd import mask_schedule
        from ..lmd.charts import schedule_chart
        from .host.charts import chart

        patch = patch or min(width, height) // 8
        made = mask_schedule(steps, kind, low, high, direction, patch, seed, nested, height, width, region)
        return made.masks, chart("Mask Schedule", lambda: schedule_chart(made))


def _rounds(v: Any) -> int:
    return v.rounds if v.masks is None else len(v.masks)


class MaskedRegenerate:
    """Rounds of patches re-noised and denoised while the rest is held."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Varies or restores an image: in each round random patches are re-noised and denoised with the model while the rest is "
        "held. Inspired by latent masking diffusion (arXiv 2312.07971), without its training. Masking does not make a diffusion "
        "model faster: the cost is the sum of the steps of all rounds, as the report says."
    )
    RETURN_TYPES = ("LATENT", "MASK", "STRING")
    RETURN_NAMES = ("latent", "touched", "report")
    OUTPUT_TOOLTIPS = (
        "The new latent; what no round masked is bit for bit as before.",
        "Every cell that some round masked (1), at latent size.",
        "Cost in network rows, and how well the visible part was explained in each round.",
    )
    FUNCTION = "regenerate"

    UNUSED = (
        Unused(
            "rounds kind low high direction patch nested",
            lambda v: v.masks is not None,
            "while `masks` is connected. Disconnect it to use them.",
        ),
        Unused("low direction", lambda v: v.masks is None and v.kind == "fixed", FIXED_RULE.why),
        Unused("strength_end", lambda v: _rounds(v) == 1, "on one round. Use 2 `rounds` or more."),
        Unused(
            "kind low direction nested",
            lambda v: v.masks is None and v.rounds == 1 and v.kind != "fixed",
            "on one round. Use 2 `rounds` or more.",
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The diffusion model."}),
                "positive": ("CONDITIONING", {"tooltip": "What the patches should become."}),
                "negative": ("CONDITIONING", {"tooltip": "What to keep out. Unused at cfg 1."}),
                "latent": (
                    "LATENT",
                    {"tooltip": "The image as a latent. Its noise mask, if any, limits the change."},
                ),
                "seed": seed(
                    "Noise of every round. One round at high 1 equals KSampler with this seed and denoise = strength."
                ),
                "steps": integer(8, 1, 1000, "Network steps in each round."),
                "cfg": number(
                    5.0, 0.0, 100.0, "Classifier-free guidance. 1 halves the cost. 3 suits the pocket model.", 0.1
                ),
                "sampler_name": choice(SAMPLERS, "euler", "The sampler of each round."),
                "schedule": choice(SCHEDULES, "uniform", "Noise levels of each round. uniform is the host's normal."),
                "rounds": integer(4, 1, 1000, "How many masks are regenerated one after the other."),
                "strength": number(
                    0.6, 0.01, 1.0, "How far masked patches are re-noised in the first round (1 = to pure noise)."
                ),
                "strength_end": number(
                    0.0, 0.0, 1.0, "The same in the last round; in between it is linear. 0 = as the first."
                ),
                **_ratio_inputs(),
                "patch": integer(4, 1, 1024, "Side of a patch in latent cells (8 pixels). 2 suits the pocket model."),
                "nested": switch(True, "Every smaller mask lies inside every larger one."),
                "candidates": integer(
                    1,
                    1,
                    64,
                    "Tries in each round; the one that explains the visible patches best is kept. Cost scales with it.",
                ),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {"tooltip": "1 = may change. Without it, the latent's own noise mask, or everything."},
                ),
                "masks": (
                    "MASK",
                    {
                        "tooltip": "One mask a round, for example from Mask Schedule; then rounds, kind, low, high, direction, patch "
                        "and nested have no effect."
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, low: float | None = None, high: float | None = None) -> bool | str:
        return refusal(cls, _check_ratios, low=low, high=high)

    def regenerate(
        self, model: Any, positive: Any, negative: Any, latent: dict[str, Any], seed: int, steps: int, cfg: float,
        sampler_name: str, schedule: str, rounds: int, strength: float, strength_end: float, kind: str, low: float,
        high: float, direction: str, patch: int, nested: bool, candidates: int, mask: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[dict[str, Any], Tensor, str]:  # fmt: skip
        from ..core.masks import over, touched
        from ..lmd import RegenerateConfig, regenerate
        from .host.native import warn_of_latents
        from .host.sampling import KSamplerNoise, ksampler_sigmas
        from .host.session import Session, check_places, run_on_model
        from .host.warnings import warn, warn_of_stretch

        config = RegenerateConfig(
            rounds, kind, low, high, direction, patch, nested, seed, strength, strength_end or None, steps, sampler_name,
            schedule, cfg, candidates,
        )  # fmt: skip

        def work(session: Session) -> tuple[Tensor, Tensor, str]:
            # As it was wired: the session's has gone through the host's resize already.
            region = mask if mask is not None else latent.get("noise_mask")
            shape = len(masks) if masks is not None else rounds
            result = regenerate(
                session.denoiser, session.latents, session.conds["positive"], session.conds.get("negative"), config,
                KSamplerNoise(seed, latent), region, masks, session.callback(shape * steps),
                lambda strength: ksampler_sigmas(model, schedule, steps, strength),
            )  # fmt: skip
            changed = result.masks.amax(0).cpu()
            given = latent["samples"]
            # Scaling into the model's space and back is not exact: what no round touched is taken from the input.
            samples = torch.where(over(touched(changed), given), session.process_out(result.latents), given)
            errors = ", ".join(f"{e:.4g}" for e in result.errors.mean(1).tolist())
            report = (
                f"{session.denoiser.rows} network rows in {session.denoiser.calls} calls; "
                f"{float(touched(changed).float().mean()):.0%} of the cells touched; visible error by round: {errors}"
            )
            return samples, changed, report

        if mask is not None:
            warn_of_stretch("Masked Regenerate", "mask", mask, latent["samples"])
            if "noise_mask" in latent:
                warn("Masked Regenerate", "the latent's noise mask has no effect while `mask` is connected.")
        check_places(latent["samples"])
        warn_of_latents("Masked Regenerate", model, latent["samples"], sampled_from=False)
        rows = 2 * len(latent["samples"]) * candidates
        samples, changed, report = run_on_model(
            model, latent, work, rows=rows, seed=seed, cfg_scale=cfg, positive=positive, negative=negative
        )
        return {**latent, "samples": samples}, changed, report


# ------------------------------------------------------------------------------------------------------------ latent fill


def fill_folder() -> pathlib.Path:
    """Return where trained fills live; it need not exist yet."""
    import folder_paths

    return pathlib.Path(folder_paths.models_dir) / "latent_fill"


def fill_files() -> list[str]:
    """Return the names of all trained fills; none without a host."""
    try:
        return sorted(p.name for p in fill_folder().glob("*.safetensors"))
    except ImportError:
        return []


def kind_of(model: Any) -> str:
    """Return the kind of latents of a MODEL, as files of the library name it."""
    from ..lmd import latents_kind

    form = model.model.latent_format
    return latents_kind(form.latent_channels, form.scale_factor, getattr(form, "shift_factor", None))


def fill_path(name: str) -> pathlib.Path:
    """Return the file of a fill; raises ValueError for a name that is no plain file name."""
    return fill_folder() / f"{file_stem(name)}.safetensors"


class TrainLatentFill:
    """Trains a latent fill in the queue."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Trains a small network on your images that fills a hole in a latent in one pass (latent masking diffusion, arXiv "
        "2312.07971). Runs in the queue with a loss chart. Cancel keeps the last step; queue again to resume, with the same result "
        "as an undisturbed run. A finished fill is loaded, not trained again."
    )
    RETURN_TYPES = (FILL, "IMAGE", "STRING")
    RETURN_NAMES = ("fill", "loss chart", "report")
    OUTPUT_TOOLTIPS = (
        "The trained fill, for Latent Fill.",
        "Error on masked patches over the steps, as a share of the variance. It starts from a smooth interpolation.",
        "Images, steps, last error, and where the file is.",
    )
    FUNCTION = "train"
    OUTPUT_NODE = True

    UNUSED = (
        Unused(
            "folder", lambda v: v.images is not None, "while `images` is connected. Disconnect it to use the folder."
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "The model whose latents are filled. It is not trained and not changed."},
                ),
                "vae": ("VAE", {"tooltip": "The VAE of that model."}),
                "name": string("my_fill", "File name in models/latent_fill."),
                "folder": string("", "Folder of images, below the input folder. A few hundred or more."),
                "steps": integer(2000, 1, 1_000_000, "Training steps. Some thousand for a real folder."),
                "batch": integer(32, 1, 4096, "Images a step."),
                "learning_rate": number(
                    1e-3, 1e-6, 1.0, "Highest rate; it warms up and falls to 0.", 1e-4, round=False
                ),
                "size": choice(SIZES, "small", "Size of the network: about 0.6, 3.5 and 18 million weights."),
                "width": integer(
                    512, 64, 4096, "Width in pixels at which the fill works. Images are cropped to it.", step=8
                ),
                "height": integer(512, 64, 4096, "Height in pixels at which the fill works.", step=8),
                "patch": integer(
                    4, 1, 64, "Side of a token in latent cells: 4 for 512 pixels, 2 for the pocket model."
                ),
                "ratio": choice(
                    RATIO_KINDS,
                    "random",
                    "Masked share while training: random is best for holes of any shape; the others are the paper's schedules, or 0.75.",
                ),
                "masks": choice(
                    MASK_KINDS,
                    "mixed",
                    "What is masked while training: random patches as in the paper, blocks, halves, brush strokes, or all of them.",
                ),
                "mirror": switch(True, "Train on mirrored images too. Off for text and faces in profile."),
                "resume": switch(True, "Continue a file of this name. Off: replace it once the new fill is finished."),
                "seed": work_seed("Weights, order and masks."),
            },
            "optional": {"images": ("IMAGE", {"tooltip": "Train on this batch instead of a folder."})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None = None) -> bool | str:
        return refusal(cls, file_stem, name=name)

    @classmethod
    def IS_CHANGED(cls, folder: str = "", **_: Any) -> str | float:
        return watched(lambda: readable_images("folder", folder, below=True) if folder.strip() else [])

    def train(
        self, model: Any, vae: Any, name: str, folder: str, steps: int, batch: int, learning_rate: float, size: str,
        width: int, height: int, patch: int, ratio: str, masks: str, mirror: bool, resume: bool, seed: int,
        images: Tensor | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        import comfy.model_management as management

        from ..lmd import FillConfig, TrainConfig, train
        from ..lmd.charts import loss_chart
        from .host.charts import chart
        from .host.warnings import warn

        path = fill_path(name)
        config = TrainConfig(steps, batch, learning_rate, ratio=ratio, masks=masks, seed=seed)
        side = cell_side(vae) * patch
        for name_of, pixels in (("width", width), ("height", height)):
            if pixels % side:
                raise ValueError(
                    f"Expected `{name_of}` as a multiple of {side}, the pixels of a token of `patch` {patch}, but got {pixels}. "
                    f"Set it to {max(pixels // side, 1) * side}."
                )
        latents = _training_latents(model, vae, folder, images, width, height, mirror)
        channels, rows, columns = latents.shape[1:]
        shape = FillConfig(channels, rows, columns, patch, latents=kind_of(model), **SIZES[size])
        device = management.get_torch_device()
        management.free_memory(2 * 1024**3, device)
        result = train(latents, shape, config, path, resume, device=device, callback=_training_progress(steps))
        if result.problem:
            warn("Train Latent Fill", result.problem)
        losses = chart("Train Latent Fill", lambda: loss_chart(result.losses, steps))
        last = sum(result.losses[-50:]) / len(result.losses[-50:])
        report = f"{len(latents)} latents, {len(result.losses)} steps, error {last:.3f} over the last 50; {path.name}"
        return {"ui": {"text": (report,)}, "result": (result.fill.cpu(), losses, report)}


def _training_latents(
    model: Any, vae: Any, folder: str, images: Tensor | None, width: int, height: int, mirror: bool
) -> Tensor:
    """Return model-space latents of the batch, or of the folder through the disk cache."""
    import comfy.utils

    from ..lmd.latents_cache import encode_files, encode_images
    from .host.identity import host_identity
    from .host.progress import check_interrupt

    def encode(image: Tensor) -> Tensor:
        check_interrupt()
        return model.model.process_latent_in(vae.encode(image))

    if images is not None:
        return encode_images(images, encode, height, width, mirror)
    if not folder.strip():
        raise ValueError("Expected `folder` or `images`, but got neither. Name a folder of images or wire a batch.")
    files = readable_images("folder", folder, below=True)
    bar = comfy.utils.ProgressBar(len(files))
    return encode_files(
        files,
        encode,
        height,
        width,
        fill_folder() / "cache",
        mirror,
        lambda done, total: bar.update_absolute(done, total),
        host_identity(vae, model.model.latent_format),
    )


def _training_progress(steps: int) -> Any:
    """Return a callback that moves the progress bar, checks for cancel, and shows the loss chart every few seconds."""
    import comfy.utils

    from ..lmd.charts import loss_chart
    from .host.charts import live_chart
    from .host.progress import check_interrupt

    bar, losses, live = comfy.utils.ProgressBar(steps), [], live_chart("Train Latent Fill")

    def callback(step: Any) -> None:
        check_interrupt()
        losses.append(step.loss)
        chart = live(lambda: loss_chart(losses, step.total, step.index - len(losses)), step.index == step.total)
        bar.update_absolute(step.index, step.total, chart and ("JPEG", chart, chart.width))

    return callback


class LatentFill:
    """Fills a hole in a latent in one pass."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Fills the masked part of a latent in one pass of a trained fill, as the start of a short inpainting run: KSampler at "
        "denoise 0.4 to 0.6 with 4 to 8 steps. The fill itself is blurred, because it is the mean of what could be there. "
        "Everything outside the mask is returned bit for bit."
    )
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The filled latent, with the mask as its noise mask.",)
    FUNCTION = "fill"

    UNUSED = (
        Unused(
            "fill_name",
            # The choice of a fresh installation names no file, also when a training has made one since.
            lambda v: v.fill is not None and v.fill_name != NO_FILE,
            "while `fill` is connected. Disconnect it to use the file.",
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "The model whose latents these are: the one the fill was trained with."},
                ),
                "latent": ("LATENT", {"tooltip": "The image as a latent, of the size the fill was trained on."}),
                "mask": ("MASK", {"tooltip": "1 = fill. Any part of a latent cell (above 1 %) counts."}),
                "fill_name": (
                    fill_files() or [NO_FILE],
                    {
                        "tooltip": "A fill in models/latent_fill, made by Train Latent Fill. A connected `fill` takes precedence."
                    },
                ),
            },
            "optional": {"fill": (FILL, {"tooltip": "A fill from Train Latent Fill; then fill_name has no effect."})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, fill_name: str = "") -> bool | str:
        return True  # the list may be older than the file; a missing one is explained when the node runs

    @classmethod
    def IS_CHANGED(cls, fill_name: str = "", fill: Any = False, **_: Any) -> str | float:
        # A linked input is None here, and a wired fill goes before the file.
        return watched(lambda: [] if fill is None else [fill_folder() / fill_name])

    def fill(
        self, model: Any, latent: dict[str, Any], mask: Tensor, fill_name: str, fill: Any = None
    ) -> tuple[dict[str, Any]]:
        from ..core.masks import as_mask, painted, touched
        from ..lmd import LatentFill as Fill

        if fill is None:
            if fill_name == NO_FILE:
                raise ValueError(
                    "Expected a trained fill, but got none. Run Train Latent Fill first, or wire its output."
                )
            import comfy.ops

            fill = Fill.load(fill_path(fill_name), comfy.ops.disable_weight_init)
        samples = latent["samples"]
        filled = fill.fill(model.model.process_latent_in(samples.float()), mask, kind_of(model))
        # Scaling into the model's space and back is not exact: visible cells are taken from the input.
        cells = touched(as_mask(mask, len(samples), *samples.shape[-2:]))[:, None].to(samples.device)
        out = torch.where(cells, model.model.process_latent_out(filled).to(samples), samples)
        return ({**latent, "samples": out, "noise_mask": painted(mask)[:, None]},)


# ------------------------------------------------------------------------------------------------------------ diagnostics


class InfluenceProfile:
    """Runs a sampling twice, differing in one thing, and shows how far the difference reaches."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "How far does a change reach? Samples twice with the same noise: once as wired, once with the other latent, guider or "
        "sampler. Shows the mean difference against distance to the mask, step by step, and where it falls to 1/e and to 10 %. "
        "It describes these two runs; it is not a physical constant. Cost: both runs."
    )
    RETURN_TYPES = ("IMAGE", "IMAGE", "FLOAT", "STRING")
    RETURN_NAMES = ("chart", "heat maps", "reach", "report")
    OUTPUT_TOOLTIPS = (
        "Difference against distance, reach against step, and the last heat map.",
        "The difference itself, one image a step, all on one scale.",
        "Distance in latent cells at which the last step's difference falls to 1/e of its value in the mask.",
        "Reach and share outside the mask, one line a step.",
    )
    FUNCTION = "measure"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "noise": ("NOISE", {"tooltip": "The same for both runs."}),
                "guider": ("GUIDER", {"tooltip": "Model and prompts of the first run."}),
                "sampler": ("SAMPLER", {"tooltip": "The sampler of the first run."}),
                "sigmas": ("SIGMAS", {"tooltip": "The same for both runs."}),
                "latent": ("LATENT", {"tooltip": "The start of the first run."}),
                "mask": (
                    "MASK",
                    {"tooltip": "Where the runs were made to differ (1); distance is measured from here."},
                ),
            },
            "optional": {
                "other_latent": ("LATENT", {"tooltip": "The start of the second run: another seed, another paste."}),
                "other_guider": ("GUIDER", {"tooltip": "Model and prompts of the second run."}),
                "other_sampler": ("SAMPLER", {"tooltip": "The sampler of the second run."}),
            },
        }

    def measure(
        self, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent: dict[str, Any], mask: Tensor,
        other_latent: dict[str, Any] | None = None, other_guider: Any = None, other_sampler: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        from .host.warnings import warn

        if other_latent is None and other_guider is None and other_sampler is None:
            warn("Influence Profile", "both runs are the same, so nothing can differ. Wire the other latent or guider.")
        before = _recorded_run(noise, guider, sampler, sigmas, latent)
        after = _recorded_run(noise, other_guider or guider, other_sampler or sampler, sigmas, other_latent or latent)
        return _influence_outputs(before, after, mask, "cells")


def _recorded_run(noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent: dict[str, Any]) -> Tensor:
    """Sample as SamplerCustomAdvanced does and return the denoised estimate of every step (S, B, C, H, W)."""
    import comfy.sample

    from ..core.progress import Step
    from ..lmd.influence import recorded
    from .host.progress import host_callback, listening
    from .host.session import check_channels, check_places

    check_places(latent["samples"])
    samples = comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"])
    check_channels(guider.model_patcher, samples)
    given = {**latent, "samples": samples}
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    show = host_callback(guider.model_patcher, len(sigmas) - 1)

    def callback(index: int, denoised: Tensor, x: Tensor, total: int) -> None:
        outer.append(denoised.detach().float().cpu())
        if not inner:
            show(Step("sample", index + 1, total, float(sigmas[index + 1]), denoised))

    def listen(step: Step) -> None:
        if step.denoised is not None:
            inner.append(step.denoised.detach().float().cpu())

    with listening(listen):
        guider.sample(
            noise.generate_noise(given), samples, sampler, sigmas, denoise_mask=latent.get("noise_mask"), callback=callback,
            disable_pbar=True, seed=noise.seed,
        )  # fmt: skip
    # Our own samplers report their inner steps and call back once at the end; stock samplers call back at every step.
    return recorded(inner or outer)


def _influence_outputs(before: Tensor, after: Tensor, mask: Tensor, unit: str) -> dict[str, Any]:
    from ..lmd import influence
    from ..lmd.charts import influence_chart, influence_heat_maps, influence_report
    from .host.charts import chart
    from .host.preview import preview_images

    profile = influence(before, after, mask.amax(0) if mask.ndim == 3 else mask)
    curves = chart("Influence", lambda: influence_chart(profile, unit))
    heat = chart("Influence", lambda: influence_heat_maps(profile, unit))
    result = curves, heat, float(profile.reach_e[-1]), influence_report(profile, unit)
    return {"ui": preview_images(curves), "result": result}


class InfluenceImages:
    """How far the difference of two images reaches from a mask."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "How far does an edit reach? Compares two batches of images, for example a photo before and after an edit, and shows the "
        "mean difference against distance to the mask. A batch is taken as steps or frames, one profile each."
    )
    RETURN_TYPES = InfluenceProfile.RETURN_TYPES
    RETURN_NAMES = InfluenceProfile.RETURN_NAMES
    OUTPUT_TOOLTIPS = (
        "Difference against distance, reach against image, and the last heat map.",
        "The difference itself, one image each, all on one scale.",
        "Distance in pixels at which the last image's difference falls to 1/e of its value in the mask.",
        "Reach and share outside the mask, one line an image.",
    )
    FUNCTION = "measure"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "before": ("IMAGE", {"tooltip": "The images without the change."}),
                "after": ("IMAGE", {"tooltip": "The images with it, of the same size."}),
                "mask": ("MASK", {"tooltip": "Where the change was made (1); distance is measured from here."}),
            }
        }

    def measure(self, before: Tensor, after: Tensor, mask: Tensor) -> dict[str, Any]:
        return _influence_outputs(before.movedim(-1, 1)[:, None], after.movedim(-1, 1)[:, None], mask, "pixels")


class StretchMap:
    """Where a drag or the motion between frames stretches, tears and folds."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Where does a motion stretch, tear or fold? Shows the logarithm of the largest stretching (the one-step finite-time "
        "Lyapunov field) and outlines where the map folds over. Takes the motion between successive frames by optical flow, the drags "
        "of an edit, or drags written as lines of 'x, y -> x, y' in pixels."
    )
    RETURN_TYPES = ("IMAGE", "MASK", "STRING")
    RETURN_NAMES = ("map", "folds", "report")
    OUTPUT_TOOLTIPS = (
        "Red is stretched, blue is squeezed every way, folds have an outline. One image for each pair of frames, or one.",
        "1 where the map folds or collapses: nothing there can be carried over from frame to frame.",
        "Largest and median stretching, and the share that folds.",
    )
    FUNCTION = "draw"
    OUTPUT_NODE = True

    UNUSED = (
        Unused("points", lambda v: v.edit is not None, "while `edit` is connected. Disconnect one of them."),
        Unused(
            "window",
            lambda v: v.edit is not None or bool(v.points.strip()),
            "on drags: it smooths the motion between frames. Empty `points` to see that motion.",
        ),
        Unused(
            "radius", lambda v: v.edit is not None or not v.points.strip(), "without drags in `points`. Write some."
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "Frames of a stream (two or more), or the image to be dragged."}),
                "points": string(
                    "",
                    "Drags, one a line: 60, 60 -> 90, 60 in pixels. Empty: the motion between the frames.",
                    multiline=True,
                ),
                "radius": number(
                    48.0,
                    0.5,
                    4096.0,
                    "How far a drag pulls its surroundings, in pixels. It folds beyond 1.65 radii.",
                    0.5,
                ),
                "window": number(
                    3.0, 0.5, 50.0, "Smoothing of the optical flow in pixels: larger is steadier and coarser.", 0.5
                ),
            },
            "optional": {
                "edit": (
                    TASKS,
                    {
                        "tooltip": "Drags of an edit (Drag Points), as they bend the image. Takes precedence over points."
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, points: str | None = None) -> bool | str:
        return refusal(cls, parse_points, points=points)

    def draw(self, image: Tensor, points: str, radius: float, window: float, edit: Any = None) -> dict[str, Any]:
        from ..lmd import drag_field, stretch_map
        from ..lmd.charts import stretch_charts, stretch_report
        from .host.charts import chart
        from .host.preview import preview_images
        from .host.progress import check_interrupt

        height, width = image.shape[1:3]
        under = image[:1]
        if edit is not None:
            result = stretch_map(_warps_of(edit, height, width), backward=True)
        elif points.strip():
            result = stretch_map(drag_field(*parse_points(points), height, width, radius))
        elif len(image) > 1:
            under = image[:-1]
            result = _stretch_between(image, window)
        else:
            raise ValueError(
                "Expected two or more frames, `points` or `edit`, but got one image. Write a drag such as 60, 60 -> 90, 60."
            )
        under = under.expand(len(result.stretch), -1, -1, -1)
        charts = chart("Stretch Map", lambda: stretch_charts(result, under, check_interrupt))
        shown = (charts, result.fold.float(), stretch_report(result))
        return {"ui": preview_images(charts[:SHOWN]), "result": shown}


def _stretch_between(frames: Tensor, window: float) -> Any:
    """Return the StretchMap of each pair of successive frames (B, H, W, C), with a progress bar, one pair at a time."""
    import comfy.utils

    from ..lmd import optical_flow, stretch_map
    from ..lmd.stretch import StretchMap
    from .host.progress import check_interrupt

    pixels = frames.movedim(-1, 1)
    bar, found = comfy.utils.ProgressBar(len(frames) - 1), []
    for before, after in zip(pixels[:-1].split(1), pixels[1:].split(1)):
        flow = optical_flow(before.float(), after.float(), window, callback=check_interrupt)
        found.append(stretch_map(flow))
        bar.update(1)
    return StretchMap(torch.cat([one.stretch for one in found]), torch.cat([one.fold for one in found]))


def _warps_of(edit: Any, height: int, width: int) -> Tensor:
    """Return where each place of the image comes from (N, 2, H, W), minus itself, for every drag among the tasks."""
    from ..edit import Drag
    from ..edit.geometry import Canvas
    from ..edit.placing import place

    drags = [task for task in edit if isinstance(task, Drag)]
    if not drags:
        raise ValueError("Expected `edit` with at least one drag, but got none. Wire Drag Points.")
    for drag in drags:
        if tuple(drag.mask.shape) != (height, width):
            raise ValueError(
                f"Expected the drag's mask of the image's size {height} x {width}, but got {tuple(drag.mask.shape)}. "
                "Wire the image that is edited."
            )
    canvas = Canvas((height, width), (height, width), 1.0)
    origins = torch.stack([place(drag, canvas, canvas).points for drag in drags])
    return (origins - canvas.pixel_centres()).movedim(-1, 1)


NODES = {
    "SlipstreamMaskSchedule": (MaskSchedule, "Mask Schedule"),
    "SlipstreamMaskedRegenerate": (MaskedRegenerate, "Masked Regenerate"),
    "SlipstreamTrainLatentFill": (TrainLatentFill, "Train Latent Fill"),
    "SlipstreamLatentFill": (LatentFill, "Latent Fill"),
    "SlipstreamInfluenceProfile": (InfluenceProfile, "Influence Profile"),
    "SlipstreamInfluenceImages": (InfluenceImages, "Influence of an Edit"),
    "SlipstreamStretchMap": (StretchMap, "Stretch Map"),
}
