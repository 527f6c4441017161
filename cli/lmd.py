"""`slipstream lmd`: mask schedules, masked regeneration, a trained fill, and the two diagnostics."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor

from ..core.charts import check_drawing
from ..core.denoiser import Conditioning
from ..core.identity import identify
from ..core.images import cover, image_files, pad_to_multiple, read_image, read_mask, save_image
from ..core.masks import as_mask, touched
from ..core.noise import SeededNoise
from ..core.pipeline import Pipeline
from ..core.tensors import composite
from ..core.unused import Unused
from ..lmd.charts import (
    influence_chart,
    influence_report,
    loss_chart,
    schedule_chart,
    stretch_charts,
    stretch_report,
)
from ..lmd.influence import influence
from ..lmd.latent_fill import SIZES, FillConfig, LatentFill, latents_kind
from ..lmd.latents_cache import encode_files
from ..lmd.mask_schedule import DIRECTIONS, KINDS, mask_schedule
from ..lmd.regenerate import RegenerateConfig, regenerate
from ..lmd.stretch import drag_field, optical_flow, parse_points, stretch_map
from ..lmd.tokens import tokens_to_cells
from ..lmd.training import FAMILIES, RATIO_KINDS, TrainConfig, train
from .options import (
    LARGEST_SEED,
    NEGATIVE_RULE,
    add_cfg,
    add_model,
    add_output,
    add_prompt,
    add_seed,
    add_size,
    add_steps,
    add_without_effect,
    check_cells,
    checked,
    integer,
    load_pipeline,
    number,
    parse_size,
    size_of,
)
from .progress import Progress

FIXED_RULE = Unused(
    "low direction", lambda v: v.kind == "fixed", "with --kind fixed, which uses --high alone. Choose another."
)
ONE_ROUND = "on one round. Use two or more."
MASKS_UNUSED = (FIXED_RULE, Unused("kind low direction free", lambda v: v.steps == 1 and v.kind != "fixed", ONE_ROUND))
REGENERATE_UNUSED = (
    FIXED_RULE,
    Unused("kind low direction free", lambda v: v.rounds == 1 and v.kind != "fixed", ONE_ROUND),
    Unused("strength_end", lambda v: v.rounds == 1, ONE_ROUND),
    NEGATIVE_RULE,
)
FILL_UNUSED = (
    Unused(
        "prompt negative strength cfg_scale seed",
        lambda v: v.steps == 0,
        "at --steps 0, which shows the fill itself. Raise it.",
    ),
    Unused("negative", lambda v: v.cfg_scale == 1 and v.steps > 0, NEGATIVE_RULE.why),
)
STRETCH_UNUSED = (
    Unused("next window", lambda v: bool(v.drag), "with --drag. Leave it out to see the motion between two frames."),
    Unused("radius", lambda v: not v.drag, "without --drag. Give one."),
)
RESIZED = "crop and scale the image to this size (default: its own)"


def add_parser(subparsers: Any) -> None:
    """Declare `lmd` and its parts."""
    lmd = subparsers.add_parser("lmd", help="latent masking: regenerate, fill, and two diagnostics")
    parts = lmd.add_subparsers(dest="part", required=True, metavar="PART")
    _add_masks(parts.add_parser("masks", help="a chart of a mask schedule"))
    _add_regenerate(parts.add_parser("regenerate", help="vary or restore an image in rounds of masked patches"))
    _add_train(parts.add_parser("train", help="train a latent fill on a folder of images"))
    _add_fill(parts.add_parser("fill", help="fill a hole with a trained fill and a few denoise steps"))
    _add_influence(parts.add_parser("influence", help="how far the difference of two images reaches"))
    _add_stretch(parts.add_parser("stretch", help="where a drag or the motion between two frames stretches and folds"))


def _add_schedule(parser: Any, *seed: str) -> None:
    default = RegenerateConfig()
    parser.add_argument(
        "--kind", choices=list(KINDS), default=default.kind, help="how the share changes over the rounds"
    )
    parser.add_argument("--low", type=number(), default=default.low, help="smallest masked share")
    parser.add_argument("--high", type=number(), default=default.high, help="largest masked share")
    parser.add_argument(
        "--direction", choices=DIRECTIONS, default=default.direction, help="whether the share rises or falls"
    )
    parser.add_argument("--patch", type=integer(), default=default.patch, help="side of a patch in latent cells")
    parser.add_argument("--free", action="store_true", help="new patches each round instead of nested ones")
    parser.add_argument(
        *seed,
        "--mask-seed",
        dest="mask_seed",
        type=integer(0, LARGEST_SEED),
        default=default.mask_seed,
        help="of the masks",
    )


def _add_masks(parser: Any) -> None:
    add_steps(parser, 6, help="rounds")
    add_size(parser, "in latent cells (default 16x16)")
    _add_schedule(parser, "--seed")
    add_output(parser, "--out", default="masks.png")
    add_without_effect(parser)
    parser.unused = MASKS_UNUSED
    parser.set_defaults(run=run_masks)


def _add_regenerate(parser: Any) -> None:
    default = RegenerateConfig()
    parser.add_argument("--image", required=True, help="the image to vary")
    add_prompt(parser, required=True)
    parser.add_argument("--mask", help="white = may change (default: everything)")
    add_size(parser, RESIZED)
    parser.add_argument("--rounds", type=integer(), default=default.rounds, help="masks, one after the other")
    parser.add_argument(
        "--strength", type=number(), default=default.strength, help="how far masked patches are re-noised"
    )
    parser.add_argument("--strength-end", type=number(), help="strength of the last round (default: as the first)")
    add_steps(parser, default.steps, help="network steps a round")
    add_cfg(parser, 3.0)
    parser.add_argument(
        "--candidates", type=integer(), default=default.candidates, help="tries a round, of which the best is kept"
    )
    add_seed(parser)
    _add_schedule(parser)
    add_model(parser)
    add_output(parser, "--out", default="regenerated.png")
    parser.unused = REGENERATE_UNUSED
    parser.set_defaults(run=run_regenerate)


def _add_train(parser: Any) -> None:
    default = TrainConfig()
    parser.add_argument("--images", required=True, help="folder of images")
    add_output(
        parser, "--out", kind=(".safetensors",), required=True,
        help="the fill, a .safetensors file; an unfinished one is resumed",
    )  # fmt: skip
    add_size(parser, "in pixels (default 512x512)", checked(_size_or_network))
    add_steps(parser, default.steps, help="training steps")
    parser.add_argument("--batch", type=integer(), default=default.batch, help="images a step")
    parser.add_argument(
        "--learning-rate", type=number(), default=default.learning_rate, help="highest rate; it falls to 0"
    )
    parser.add_argument("--network", choices=list(SIZES), default="small", help="size of the fill")
    parser.add_argument("--patch", type=integer(), default=4, help="side of a token in latent cells")
    parser.add_argument("--ratio", choices=RATIO_KINDS, default=default.ratio, help="masked share while training")
    parser.add_argument(
        "--masks", choices=("mixed", *FAMILIES), default=default.masks, help="what is masked while training"
    )
    parser.add_argument("--no-mirror", action="store_true", help="do not train on mirrored images")
    parser.add_argument("--restart", "--anew", action="store_true", help="overwrite the file instead of resuming it")
    parser.add_argument("--cache", help="folder for encoded images (default: beside --out)")
    add_output(parser, "--chart", help="save the loss chart here")
    add_seed(parser)
    add_model(parser)
    parser.set_defaults(run=run_train)


def _size_or_network(value: str) -> tuple[int, int] | str:
    """--size used to name the network."""
    return value if value in SIZES else parse_size(value)


def _add_fill(parser: Any) -> None:
    parser.add_argument("--fill", required=True, help="a file of `slipstream lmd train`")
    parser.add_argument("--image", required=True, help="the image with the hole")
    parser.add_argument("--mask", required=True, help="white = fill")
    add_prompt(parser, default="")
    add_size(parser, RESIZED)
    add_steps(parser, 6, low=0, help="denoising steps after the fill; 0 shows the fill itself")
    parser.add_argument("--strength", type=number(), default=0.5, help="how far the fill is re-noised")
    add_cfg(parser, 3.0)
    add_seed(parser)
    add_model(parser)
    add_output(parser, "--out", default="filled.png")
    parser.unused = FILL_UNUSED
    parser.set_defaults(run=run_fill)


def _add_influence(parser: Any) -> None:
    parser.add_argument("--before", required=True, help="the image without the change")
    parser.add_argument("--after", required=True, help="the image with it")
    parser.add_argument("--mask", required=True, help="white = where the change was made")
    add_size(parser, RESIZED)
    add_output(parser, "--out", default="influence.png")
    add_without_effect(parser)
    parser.set_defaults(run=run_influence)


def _add_stretch(parser: Any) -> None:
    parser.add_argument("--image", required=True, help="the image, or the first of two frames")
    parser.add_argument("--next", help="the second frame: measure the motion between them")
    parser.add_argument(
        "--drag", action="append", default=[], metavar="'X,Y -> X,Y'", help="a drag in pixels; may repeat"
    )
    parser.add_argument("--radius", type=number(), default=48.0, help="how far a drag pulls, in pixels")
    parser.add_argument("--window", type=number(), default=3.0, help="smoothing of the optical flow in pixels")
    add_size(parser, f"{RESIZED}; drags count in its pixels")
    add_output(parser, "--out", default="stretch.png")
    add_without_effect(parser)
    parser.unused = STRETCH_UNUSED
    parser.arguments = {"after": "--next", "before": "--image"}
    parser.set_defaults(run=run_stretch)


def _image(args: argparse.Namespace, path: str) -> Tensor:
    """Return IMAGE (1, H, W, 3) of a file, cropped and scaled to --size if that is given."""
    image = read_image(path)[..., :3]
    return cover(image, *size_of(args, (image.shape[1], image.shape[2])))


def _mask(args: argparse.Namespace, path: str, like: str) -> Tensor:
    """Return MASK (1, H, W) of a file at the size of the image file `like`, cropped and scaled with it."""
    image = read_image(like)
    height, width = image.shape[1:3]
    mask = as_mask(read_mask(path), 1, height, width)
    return cover(mask[..., None], *size_of(args, (height, width)))[..., 0]


def _save(pipe: Pipeline, image: Tensor, latents: Tensor, mask: Tensor | None, path: pathlib.Path) -> None:
    """Save the decoded latents at the size of `image`; outside `mask` with its own pixels, which the VAE would change."""
    height, width = image.shape[1:3]
    result = pipe.decode(latents)
    if mask is not None:
        cells = touched(as_mask(mask, 1, *latents.shape[-2:])).float()
        pixels = tokens_to_cells(cells, pipe.downscale, *result.shape[1:3])
        result = composite(pad_to_multiple(image, pipe.downscale), result, pixels)
    print(save_image(result[:, :height, :width], path))


def _padded(pipe: Pipeline, mask: Tensor) -> Tensor:
    """Return MASK padded as its image is."""
    return pad_to_multiple(mask[..., None], pipe.downscale)[..., 0]


def run_masks(args: argparse.Namespace) -> int:
    """Draw a mask schedule."""
    schedule = mask_schedule(
        args.steps, args.kind, args.low, args.high, args.direction, args.patch, args.mask_seed, not args.free,
        *size_of(args, (16, 16)),
    )  # fmt: skip
    print(" ".join(f"{ratio:.3f}" for ratio in schedule.ratios))
    print(save_image(schedule_chart(schedule), args.out))
    return 0


def run_regenerate(args: argparse.Namespace) -> int:
    """Regenerate one image."""
    config = RegenerateConfig(
        rounds=args.rounds, kind=args.kind, low=args.low, high=args.high, direction=args.direction, patch=args.patch,
        nested=not args.free, mask_seed=args.mask_seed, strength=args.strength, strength_end=args.strength_end,
        steps=args.steps, cfg_scale=args.cfg_scale, candidates=args.candidates,
    )  # fmt: skip
    image = _image(args, args.image)
    mask = None if args.mask is None else _mask(args, args.mask, args.image)
    pipe = load_pipeline(args)
    latents, cond, uncond = _encoded(pipe, image, args)
    mask = None if mask is None else _padded(pipe, mask)
    with Progress() as progress:
        result = regenerate(pipe.model, latents, cond, uncond, config, SeededNoise(args.seed), mask, callback=progress)
    print(f"{pipe.model.rows} network rows in {pipe.model.calls} calls", file=sys.stderr)
    _save(pipe, image, result.latents, mask, args.out)
    return 0


def _encoded(pipe: Pipeline, image: Tensor, args: argparse.Namespace) -> tuple[Tensor, Conditioning, Conditioning]:
    """Return latents of the padded image, and the prompts."""
    padded = pad_to_multiple(image, pipe.downscale)
    size = padded.shape[1], padded.shape[2]
    cond, uncond = (pipe.encode_text([text], size) for text in (args.prompt, args.negative))
    return pipe.encode_image(padded), cond, uncond


def run_train(args: argparse.Namespace) -> int:
    """Train a fill; Ctrl-C keeps the last finished step."""
    if args.chart:
        check_drawing()
    network, args.size = (args.size, None) if isinstance(args.size, str) else (args.network, args.size)
    height, width = size_of(args, (512, 512))
    config = TrainConfig(args.steps, args.batch, args.learning_rate, ratio=args.ratio, masks=args.masks, seed=args.seed)
    files = image_files(args.images, below=True, name="images")
    pipe = load_pipeline(args)
    check_cells(pipe, height, width)
    grid = height // pipe.downscale, width // pipe.downscale
    shape = FillConfig(pipe.latent_channels, *grid, args.patch, latents=_kind(pipe))
    shape = dataclasses.replace(shape, **SIZES[network])
    cache = args.cache or args.out.with_suffix(".cache")
    with Progress("image") as progress:
        encoder, mirror = identify(pipe.vae), not args.no_mirror
        latents = encode_files(files, pipe.encode_image, height, width, cache, mirror, progress.show, encoder)
    try:
        with Progress(note=lambda step: f"error {step.loss:.3f}") as progress:
            result = train(latents, shape, config, args.out, not args.restart, device=pipe.device, callback=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the last finished step is kept, and the same command continues from it") from None
    if result.problem:
        _rescue(result.fill, args.out, result.problem)
    if args.chart:
        print(save_image(loss_chart(result.losses, args.steps), args.chart))
    print(args.out)
    return 0


def _rescue(fill: LatentFill, out: pathlib.Path, problem: str) -> None:
    """Write a trained fill to the folder for temporary files, and raise the OSError that names it."""
    place = pathlib.Path(tempfile.mkdtemp(prefix="slipstream_")) / out.name
    fill.save(place)
    raise OSError(f"{problem} The trained fill is in {place}.")


def _kind(pipe: Pipeline) -> str:
    config = pipe.vae.config
    return latents_kind(
        pipe.latent_channels, getattr(config, "scaling_factor", 1.0), getattr(config, "shift_factor", None)
    )


def run_fill(args: argparse.Namespace) -> int:
    """Fill a hole, then denoise it for a few steps with the rest held."""
    fill = LatentFill.load(args.fill)
    # One round of ratio 1 within the mask: image to image there, everything else held.
    config = RegenerateConfig(
        rounds=1, kind="fixed", high=1.0, strength=args.strength, steps=max(args.steps, 1), cfg_scale=args.cfg_scale
    )
    image, mask = _image(args, args.image), _mask(args, args.mask, args.image)
    pipe = load_pipeline(args)
    latents, cond, uncond = _encoded(pipe, image, args)
    mask = _padded(pipe, mask)
    filled = fill.to(latents.device).fill(latents, mask, _kind(pipe))
    if args.steps:
        hole = touched(as_mask(mask, 1, *latents.shape[-2:])).float()
        with Progress() as progress:
            noise = SeededNoise(args.seed)
            filled = regenerate(pipe.model, filled, cond, uncond, config, noise, hole, callback=progress).latents
    _save(pipe, image, filled, mask, args.out)
    return 0


def run_influence(args: argparse.Namespace) -> int:
    """Compare two images."""
    before, after = (_image(args, path).movedim(-1, 1)[None] for path in (args.before, args.after))
    profile = influence(before, after, _mask(args, args.mask, args.before))
    print(influence_report(profile, "pixels"))
    print(save_image(influence_chart(profile, "pixels"), args.out))
    return 0


def run_stretch(args: argparse.Namespace) -> int:
    """Map a drag, or the motion between two frames."""
    image = _image(args, args.image)
    if args.drag:
        handles, targets = parse_points("\n".join(args.drag))
        field = drag_field(handles, targets, image.shape[1], image.shape[2], args.radius)
    elif args.next:
        field = optical_flow(image.movedim(-1, 1), _image(args, args.next).movedim(-1, 1), args.window)
    else:
        raise ValueError(
            "Expected `--drag` or `--next`, but got neither. Give a drag such as '60,60 -> 90,60', or a second frame."
        )
    result = stretch_map(field)
    print(stretch_report(result))
    print(save_image(torch.cat(stretch_charts(result, image).split(1), 1), args.out))
    return 0
