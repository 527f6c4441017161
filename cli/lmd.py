"""`slipstream lmd`: mask schedules, masked regeneration, a trained fill, and the two diagnostics."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

import torch
from torch import Tensor

from ..core.charts import check_drawing
from ..core.images import cover, image_files, read_image, read_mask, save_image
from ..core.masks import as_mask, touched
from ..core.noise import SeededNoise
from ..core.pipeline import Pipeline
from ..core.progress import Step
from ..core.tensors import composite
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
from ..lmd.training import FAMILIES, RATIO_KINDS, TrainConfig, TrainStep, train


def add_parser(subparsers: Any) -> None:
    """Declare `lmd` and its parts."""
    lmd = subparsers.add_parser("lmd", help="latent masking: regenerate, fill, and two diagnostics")
    parts = lmd.add_subparsers(dest="part", required=True, metavar="PART")
    _add_masks(parts.add_parser("masks", help="a chart of a mask schedule"))
    _add_regenerate(parts.add_parser("regenerate", help="vary or restore a picture in rounds of masked patches"))
    _add_train(parts.add_parser("train", help="train a latent fill on a folder of pictures"))
    _add_fill(parts.add_parser("fill", help="fill a hole with a trained fill and a few denoise steps"))
    _add_influence(parts.add_parser("influence", help="how far the difference of two pictures reaches"))
    _add_stretch(parts.add_parser("stretch", help="where a drag or the motion between two frames stretches and folds"))


def _add_schedule(parser: Any) -> None:
    default = RegenerateConfig()
    parser.add_argument("--kind", choices=list(KINDS), default=default.kind)
    parser.add_argument("--low", type=float, default=default.low, help="smallest masked share (default %(default)s)")
    parser.add_argument("--high", type=float, default=default.high, help="largest masked share (default %(default)s)")
    parser.add_argument("--direction", choices=DIRECTIONS, default=default.direction)
    parser.add_argument("--patch", type=int, default=default.patch, help="side of a patch in latent cells")
    parser.add_argument("--free", action="store_true", help="new patches each round instead of nested ones")
    parser.add_argument("--mask-seed", type=int, default=default.mask_seed)


def _add_model(parser: Any) -> None:
    parser.add_argument("--model", default="pocket", help='"pocket", a diffusers folder or a .safetensors file')


def _add_masks(parser: Any) -> None:
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--width", type=int, default=16, help="in latent cells (default %(default)s)")
    parser.add_argument("--height", type=int, default=16)
    _add_schedule(parser)
    parser.add_argument("--out", default="masks.png")
    parser.set_defaults(run=run_masks)


def _add_regenerate(parser: Any) -> None:
    default = RegenerateConfig()
    parser.add_argument("--image", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative", default="")
    parser.add_argument("--mask", help="white = may change (default: everything)")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--strength", type=float, default=default.strength)
    parser.add_argument("--strength-end", type=float, help="strength of the last round (default: as the first)")
    parser.add_argument("--steps", type=int, default=default.steps, help="network steps a round")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--candidates", type=int, default=default.candidates)
    parser.add_argument("--seed", type=int, default=0)
    _add_schedule(parser)
    _add_model(parser)
    parser.add_argument("--out", default="regenerated.png")
    parser.set_defaults(run=run_regenerate)


def _add_train(parser: Any) -> None:
    default = TrainConfig()
    parser.add_argument("--images", required=True, help="folder of pictures")
    parser.add_argument("--out", required=True, help="the fill, a .safetensors file; an unfinished one is resumed")
    parser.add_argument("--width", type=int, default=512, help="in pixels (default %(default)s)")
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--patch", type=int, default=4, help="side of a token in latent cells (default %(default)s)")
    parser.add_argument("--ratio", choices=RATIO_KINDS, default=default.ratio)
    parser.add_argument("--masks", choices=("mixed", *FAMILIES), default=default.masks)
    parser.add_argument("--no-mirror", action="store_true", help="do not train on mirrored pictures")
    parser.add_argument("--anew", action="store_true", help="overwrite the file instead of resuming it")
    parser.add_argument("--cache", help="folder for encoded pictures (default: beside --out)")
    parser.add_argument("--chart", help="save the loss chart here")
    parser.add_argument("--seed", type=int, default=0)
    _add_model(parser)
    parser.set_defaults(run=run_train)


def _add_fill(parser: Any) -> None:
    parser.add_argument("--fill", required=True, help="a file of `slipstream lmd train`")
    parser.add_argument("--image", required=True)
    parser.add_argument("--mask", required=True, help="white = fill")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--steps", type=int, default=6, help="denoise steps after the fill; 0 shows the fill itself")
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    _add_model(parser)
    parser.add_argument("--out", default="filled.png")
    parser.set_defaults(run=run_fill)


def _add_influence(parser: Any) -> None:
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--mask", required=True, help="white = where the change was made")
    parser.add_argument("--out", default="influence.png")
    parser.set_defaults(run=run_influence)


def _add_stretch(parser: Any) -> None:
    parser.add_argument("--image", required=True, help="the picture, or the first of two frames")
    parser.add_argument("--next", help="the second frame: measure the motion between them")
    parser.add_argument(
        "--drag", action="append", default=[], metavar="'X,Y -> X,Y'", help="a drag in pixels; may repeat"
    )
    parser.add_argument(
        "--radius", type=float, default=48.0, help="how far a drag pulls, in pixels (default %(default)s)"
    )
    parser.add_argument("--window", type=float, default=3.0, help="smoothing of the optical flow in pixels")
    parser.add_argument("--out", default="stretch.png")
    parser.set_defaults(run=run_stretch)


def _load(source: str) -> Pipeline:
    from ..core.loading import load

    return load(source)


def _grid(pipe: Pipeline, image: Tensor) -> Tensor:
    """Return IMAGE cropped to whole latent cells."""
    height, width = (side // pipe.downscale * pipe.downscale for side in image.shape[1:3])
    return cover(image, height, width)


def _grid_mask(pipe: Pipeline, mask: Tensor) -> Tensor:
    """Return MASK cropped as `_grid` crops the image that it belongs to."""
    return _grid(pipe, mask[..., None])[..., 0]


def _paste(pipe: Pipeline, image: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
    """Return the decoded latents, outside `mask` (1, h, w) with the pixels of `image` itself: the VAE would change them."""
    picture = pipe.decode(latents)
    if mask is None:
        return picture
    cells = touched(as_mask(mask, 1, *latents.shape[-2:])).float()
    return composite(image, picture, tokens_to_cells(cells, pipe.downscale, *image.shape[1:3]))


def _print_step(step: Step | TrainStep) -> None:
    loss = f", error {step.loss:.3f}" if isinstance(step, TrainStep) else f", {step.phase}"
    if step.index % max(1, step.total // 20) == 0 or step.index == step.total:
        print(f"step {step.index} of {step.total}{loss}", file=sys.stderr)


def run_masks(args: argparse.Namespace) -> int:
    """Draw a mask schedule."""
    schedule = mask_schedule(
        args.steps, args.kind, args.low, args.high, args.direction, args.patch, args.mask_seed, not args.free, args.height,
        args.width,
    )  # fmt: skip
    print(" ".join(f"{ratio:.3f}" for ratio in schedule.ratios))
    print(save_image(schedule_chart(schedule), args.out))
    return 0


def run_regenerate(args: argparse.Namespace) -> int:
    """Regenerate one picture."""
    config = RegenerateConfig(
        rounds=args.rounds, kind=args.kind, low=args.low, high=args.high, direction=args.direction, patch=args.patch,
        nested=not args.free, mask_seed=args.mask_seed, strength=args.strength, strength_end=args.strength_end,
        steps=args.steps, cfg_scale=args.cfg, candidates=args.candidates,
    )  # fmt: skip
    image, mask = read_image(args.image)[..., :3], None if args.mask is None else read_mask(args.mask)
    pipe = _load(args.model)
    image, mask = _grid(pipe, image), None if mask is None else _grid_mask(pipe, mask)
    latents = pipe.encode_image(image)
    cond, uncond = (pipe.encode_text([text]) for text in (args.prompt, args.negative))
    result = regenerate(pipe.model, latents, cond, uncond, config, SeededNoise(args.seed), mask, callback=_print_step)
    print(f"{pipe.model.rows} network rows in {pipe.model.calls} calls", file=sys.stderr)
    print(save_image(_paste(pipe, image, result.latents, mask), args.out))
    return 0


def run_train(args: argparse.Namespace) -> int:
    """Train a fill; Ctrl-C keeps the last finished step."""
    if args.chart:
        check_drawing()
    config = TrainConfig(args.steps, args.batch, args.learning_rate, ratio=args.ratio, masks=args.masks, seed=args.seed)
    files, out = image_files(args.images, below=True, name="images"), pathlib.Path(args.out)
    pipe = _load(args.model)
    cache = args.cache or out.with_suffix(".cache")
    latents = encode_files(files, pipe.encode_image, args.height, args.width, cache, not args.no_mirror)
    channels, height, width = latents.shape[1:]
    shape = FillConfig(channels, height, width, args.patch, latents=_kind(pipe))
    shape = dataclasses.replace(shape, **SIZES[args.size])
    result = train(latents, shape, config, out, not args.anew, device=pipe.device, callback=_print_step)
    if args.chart:
        print(save_image(loss_chart(result.losses, args.steps), args.chart))
    print(out)
    return 0


def _kind(pipe: Pipeline) -> str:
    config = pipe.vae.config
    return latents_kind(pipe.latent_channels, config.scaling_factor, getattr(config, "shift_factor", None))


def run_fill(args: argparse.Namespace) -> int:
    """Fill a hole, then denoise it for a few steps with the rest held."""
    fill = LatentFill.load(args.fill)
    image, mask = read_image(args.image)[..., :3], read_mask(args.mask)
    pipe = _load(args.model)
    image, mask = _grid(pipe, image), _grid_mask(pipe, mask)
    latents = pipe.encode_image(image)
    filled = fill.to(latents.device).fill(latents, mask, _kind(pipe))
    if args.steps:
        # One round of ratio 1 within the mask: image to image there, everything else held.
        config = RegenerateConfig(
            rounds=1, kind="fixed", high=1.0, strength=args.strength, steps=args.steps, cfg_scale=args.cfg
        )
        cond, uncond = (pipe.encode_text([text]) for text in (args.prompt, ""))
        hole = touched(as_mask(mask, 1, *latents.shape[-2:])).float()
        noise = SeededNoise(args.seed)
        filled = regenerate(pipe.model, filled, cond, uncond, config, noise, hole, callback=_print_step).latents
    print(save_image(_paste(pipe, image, filled, mask), args.out))
    return 0


def run_influence(args: argparse.Namespace) -> int:
    """Compare two pictures."""
    before, after = (read_image(path)[..., :3].movedim(-1, 1)[None] for path in (args.before, args.after))
    profile = influence(before, after, read_mask(args.mask))
    print(influence_report(profile, "pixels"))
    print(save_image(influence_chart(profile, "pixels"), args.out))
    return 0


def run_stretch(args: argparse.Namespace) -> int:
    """Map a drag, or the motion between two frames."""
    image = read_image(args.image)[..., :3]
    if args.drag:
        handles, targets = parse_points("\n".join(args.drag))
        field = drag_field(handles, targets, image.shape[1], image.shape[2], args.radius)
    elif args.next:
        field = optical_flow(image.movedim(-1, 1), read_image(args.next)[..., :3].movedim(-1, 1), args.window)
    else:
        raise ValueError(
            "Expected `--drag` or `--next`, but got neither. Give a drag such as '60,60 -> 90,60', or a second frame."
        )
    result = stretch_map(field)
    print(stretch_report(result))
    print(save_image(torch.cat(stretch_charts(result, image).split(1), 1), args.out))
    return 0
