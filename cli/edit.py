"""`slipstream edit`: move, paste, re-texture and drag in a photo from the command line."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.images import read_image, read_mask, save_image
from ..core.noise import SeededNoise
from ..core.pipeline import Pipeline
from ..core.points import Pair, read_pairs
from ..core.progress import Callback
from ..core.unused import Unused
from ..edit.config import MEMORY, MODES, EditConfig
from ..edit.geometry import Canvas
from ..edit.invert import Inversion, invert
from ..edit.loop import edit
from ..edit.pixels import finish, fit
from ..edit.preview import preview
from ..edit.tasks import Appearance, Drag, Move, Paste, Remove, Task
from .options import (
    NEGATIVE_RULE,
    add_cfg,
    add_model,
    add_output,
    add_prompt,
    add_seed,
    add_size,
    add_steps,
    integer,
    load_pipeline,
    number,
    size_of,
    text,
)
from .progress import Progress

EXAMPLE = "example: slipstream edit --image photo.jpg --prompt 'a dog on grass' --move dog.png 120 0 --out edited.png"

UNUSED = (
    Unused(
        "prompt result_prompt negative steps cfg_scale mode energy_scale hold_object hold_fill feather max_pixels size memory seed "
        "model vae device dtype", lambda v: v.only_preview, "with --only-preview, which loads no model. Leave one of them out.",
    ),
    Unused("out", lambda v: v.only_preview and v.preview is not None, "with --only-preview and --preview. Leave one of them out."),
    Unused("negative", lambda v: v.cfg_scale == 1 and not v.only_preview, NEGATIVE_RULE.why),
    Unused("drag_method", lambda v: not v.drag, "without --drag. Give one."),
    Unused(
        "energy_scale memory", lambda v: v.mode == "draft" and not v.only_preview, "in mode draft. Leave it out, or give --mode fine.",
    ),
    Unused(
        "memory", lambda v: v.energy_scale == 0 and v.mode == "fine" and not v.only_preview,
        "at --energy 0: there is no gradient pass. Leave it out.",
    ),
    Unused(
        "hold_object", lambda v: not (v.move or v.remove or v.paste or v.drag or v.only_preview),
        "on --appearance, which makes its region new. Leave it out.",
    ),
    Unused(
        "hold_fill", lambda v: not (v.move or v.remove or v.drag or v.only_preview or (v.appearance and v.mode == "draft")),
        "where nothing is vacated (--paste, --appearance). Leave it out.",
    ),
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Declare `edit`."""
    parser = subparsers.add_parser(
        "edit", help="move, resize, paste, re-texture and drag in a photo (DiffEditor)", epilog=EXAMPLE
    )
    parser.add_argument("--image", required=True, help="the photo")
    add_prompt(parser, "what the photo shows", default="")
    parser.add_argument("--result-prompt", type=text, help="what the result shows (default: the same)")
    add_output(parser, "--out", default="edited.png")
    add_output(parser, "--preview", help="also save arrows, ghosts and regions here")
    parser.add_argument("--only-preview", action="store_true", help="stop there: no model is loaded")
    tasks = parser.add_argument_group(
        "tasks", "may be repeated; MASK is an image (white = object) or a box X0:Y0:X1:Y1 in pixels"
    )
    tasks.add_argument("--move", nargs="+", action="append", default=[], metavar="V", help="MASK DX DY [SCALE [ANGLE]]")
    tasks.add_argument(
        "--remove", action="append", default=[], metavar="MASK", help="MASK, taken away and its place filled"
    )
    tasks.add_argument(
        "--paste", nargs="+", action="append", default=[], metavar="V", help="IMAGE MASK DX DY [SCALE [ANGLE]]"
    )
    tasks.add_argument(
        "--appearance", nargs=3, action="append", default=[], metavar=("MASK", "IMAGE", "IMAGE_MASK"),
        help="give what is in MASK the look of what is in IMAGE_MASK of IMAGE",
    )  # fmt: skip
    tasks.add_argument(
        "--drag", nargs="+", action="append", default=[], metavar="V", help="MASK X,Y:X,Y ... (handle:target)"
    )
    tasks.add_argument(
        "--drag-method", choices=["warp", "energy"], default="warp",
        help="warp: move the pixels; energy: by gradients, in mode fine",
    )  # fmt: skip
    _add_run(parser.add_argument_group("run"))
    add_model(parser)
    parser.arguments = {"anchor_object": "--hold-object", "anchor_fill": "--hold-fill"}
    parser.unused = UNUSED
    parser.set_defaults(run=run)


def _add_run(group: Any) -> None:
    default = EditConfig.fast()
    add_steps(group, default.steps, help="denoising steps, 16 is fast, 50 as published")
    add_cfg(group, default.cfg_scale)
    group.add_argument(
        "--mode", choices=MODES, default=default.mode,
        help="draft: any model, no gradients; fine: inversion and feature guidance, UNets only",
    )  # fmt: skip
    group.add_argument(
        "--energy", "--guidance", dest="energy_scale", type=number(), default=default.energy_scale,
        help="strength of the feature guidance",
    )  # fmt: skip
    hold = {"type": number()}
    group.add_argument(
        "--hold-object", default=default.anchor_object[1], help="share of the steps that hold the object", **hold
    )
    group.add_argument(
        "--hold-fill", default=default.anchor_fill[1], help="share of the steps that hold what fills its place", **hold
    )
    group.add_argument("--feather", type=integer(), default=default.feather, help="soft seam in pixels")
    group.add_argument(
        "--max-pixels", type=integer(64), default=1_000_000, help="larger photos are worked on at this size"
    )
    add_size(group, "work on the photo at the size that fits in here; the result has the photo's own")
    group.add_argument(
        "--memory",
        choices=MEMORY,
        default=default.memory,
        help="mode fine: keep keys and values, or make them again",
    )
    add_seed(group)


def run(args: argparse.Namespace) -> int:
    """Make one image."""
    image = read_image(args.image)[..., :3]
    # Also when nobody looks at it: what is wrong with the tasks is found before a model is loaded.
    drawn = preview(image, make_tasks(args, image, _unloaded))[0]
    if args.preview or args.only_preview:
        print(save_image(drawn, args.preview or args.out))
        if args.only_preview:
            return 0
    config = EditConfig(
        steps=args.steps, cfg_scale=args.cfg_scale, energy_scale=args.energy_scale, anchor_object=(0.0, args.hold_object),
        anchor_fill=(0.0, args.hold_fill), feather=args.feather, memory=args.memory, mode=args.mode,
    )  # fmt: skip
    pipe = load_pipeline(args)
    with Progress() as progress:

        def inverted(image: Tensor) -> Inversion:
            padded, canvas = fit(image, pipe.downscale, max_pixels(args, image))
            cond = pipe.encode_text([args.prompt], size=(padded.shape[1], padded.shape[2]))
            return invert(pipe.model, pipe.encode_image(padded), cond, config, canvas, image, progress)

        tasks = make_tasks(args, image, inverted)
        prompts = args.result_prompt or args.prompt, args.negative
        out = edit_image(pipe, inverted(image), tasks, prompts, config, args.seed, progress)
    print(f"{save_image(out, args.out)}: {pipe.model.calls} network calls, {pipe.model.rows} rows")
    return 0


def max_pixels(args: argparse.Namespace, image: Tensor) -> int:
    """Return the pixels at which `image` is worked on: --max-pixels at most, and within --size if that is given."""
    height, width = image.shape[1:3]
    rows, columns = size_of(args, (height, width))
    return max(1, min(args.max_pixels, int(height * width * min(rows / height, columns / width) ** 2)))


def edit_image(
    pipe: Pipeline, inversion: Inversion, tasks: Sequence[Task], prompts: tuple[str, str], config: EditConfig, seed: int,
    callback: Callback,
) -> Tensor:  # fmt: skip
    """Return the edited IMAGE (1, H, W, 3)."""
    assert inversion.image is not None
    padded, _ = fit(inversion.image, pipe.downscale, like=inversion.canvas)
    cond, uncond = (pipe.encode_text([text], size=(padded.shape[1], padded.shape[2])) for text in prompts)

    def encode(image: Tensor) -> Tensor:
        return pipe.encode_image(fit(image, pipe.downscale, like=inversion.canvas)[0])

    result = edit(
        pipe.model, inversion, tasks, cond, uncond, config, SeededNoise(seed), callback=callback, encode=encode
    )
    return finish(inversion.image, result, pipe.decode)


def _unloaded(image: Tensor) -> Inversion:
    """Return an image as a task wants it for a preview, without a model."""
    height, width = image.shape[1:3]
    return Inversion(torch.zeros(0), torch.zeros(0), None, Canvas((height, width), (height, width), 1.0), image)


def make_tasks(args: argparse.Namespace, image: Tensor, inverted: Any) -> list[Task]:
    """Return the tasks of a command line; `inverted` (IMAGE -> Inversion) is asked for other images."""
    tasks: list[Task] = []
    for words in args.move:
        mask = object_mask(_first("move", words, (3, 5)), image)
        dx, dy, scale, angle = _transform("move", words[1:])
        tasks.append(Move(mask, dx, dy, scale, angle=angle))
    tasks.extend(Remove(object_mask(source, image)) for source in args.remove)
    for words in args.paste:
        other = read_image(_first("paste", words, (4, 6)))[..., :3]
        dx, dy, scale, angle = _transform("paste", words[2:])
        tasks.append(Paste(inverted(other), object_mask(words[1], other), dx, dy, scale, angle=angle))
    for mask, path, other_mask in args.appearance:
        other = read_image(path)[..., :3]
        tasks.append(Appearance(object_mask(mask, image), inverted(other), object_mask(other_mask, other)))
    for words in args.drag:
        tasks.append(Drag(object_mask(words[0], image), _pairs(words[1:]), args.drag_method))
    if not tasks:
        raise ValueError(
            "Expected at least one of --move, --remove, --paste, --appearance, --drag, but got none. " + EXAMPLE
        )
    return tasks


def object_mask(source: str, image: Tensor) -> Tensor:
    """Return a mask (H, W) of an image file (see `core.images.mask_of`) or of a box X0:Y0:X1:Y1."""
    if not pathlib.Path(source).exists() and source.count(":") == 3:
        x0, y0, x1, y1 = (round(v) for v in _numbers("box", source.split(":")))
        mask = torch.zeros(image.shape[1:3])
        mask[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] = 1
        return mask
    return read_mask(source)[0]


def _first(option: str, words: Sequence[str], counts: tuple[int, int]) -> str:
    if not counts[0] <= len(words) <= counts[1]:
        raise ValueError(
            f"Expected {counts[0]} to {counts[1]} values for --{option}, but got {len(words)}: {' '.join(words)}."
        )
    return words[0]


def _transform(option: str, words: Sequence[str]) -> list[float]:
    """Return dx, dy, scale and angle of DX DY [SCALE [ANGLE]]."""
    values = _numbers(option, words)
    return [*values, *(0.0, 0.0, 1.0, 0.0)[len(values) :]]


def _numbers(option: str, words: Sequence[str]) -> list[float]:
    try:
        return [number()(word) for word in words]
    except argparse.ArgumentTypeError:
        raise ValueError(f"Expected numbers for --{option}, but got {' '.join(words)!r}.") from None


def _pairs(words: Sequence[str]) -> list[Pair]:
    try:
        return read_pairs(" ".join(words))
    except ValueError:
        raise ValueError(f"Expected X,Y:X,Y (handle:target) for --drag, but got {' '.join(words)!r}.") from None
