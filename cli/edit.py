"""`slipstream edit`: move, paste, re-texture and drag in a photo from the command line."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.images import read_image, read_mask, save_image
from ..core.noise import SeededNoise
from ..core.pipeline import Pipeline
from ..core.progress import Step
from ..edit.config import EditConfig
from ..edit.geometry import Canvas
from ..edit.invert import Inversion, invert
from ..edit.loop import edit
from ..edit.picture import finish, fit
from ..edit.preview import preview
from ..edit.tasks import Appearance, Drag, Move, Paste, Task

EXAMPLE = "example: slipstream edit --image photo.jpg --prompt 'a dog on grass' --move dog.png 120 0 --out edited.png"


def add_parser(subparsers: Any) -> None:
    """Declare `edit`."""
    parser = subparsers.add_parser(
        "edit", help="move, resize, paste, re-texture and drag in a photo (DiffEditor)", epilog=EXAMPLE
    )
    parser.add_argument("--image", required=True, help="the photo")
    parser.add_argument("--prompt", default="", help="what the photo shows")
    parser.add_argument("--result-prompt", help="what the result shows (default: the same)")
    parser.add_argument("--negative", default="", help="what to keep out of it")
    parser.add_argument("--out", default="edited.png", help="where the picture goes (default %(default)s)")
    parser.add_argument("--preview", help="also save arrows, ghosts and regions here")
    parser.add_argument("--only-preview", action="store_true", help="stop there: no model is loaded")
    tasks = parser.add_argument_group(
        "tasks", "may be repeated; MASK is a picture (white = object) or a box X0:Y0:X1:Y1 in pixels"
    )
    tasks.add_argument("--move", nargs="+", action="append", default=[], metavar="V", help="MASK DX DY [SCALE]")
    tasks.add_argument(
        "--paste", nargs="+", action="append", default=[], metavar="V", help="PICTURE MASK DX DY [SCALE]"
    )
    tasks.add_argument(
        "--appearance", nargs=3, action="append", default=[], metavar=("MASK", "PICTURE", "PICTURE_MASK")
    )
    tasks.add_argument(
        "--drag", nargs="+", action="append", default=[], metavar="V", help="MASK X,Y:X,Y ... (handle:target)"
    )
    tasks.add_argument("--drag-method", choices=["warp", "energy"], default="warp")
    _add_run(parser.add_argument_group("run"))
    parser.set_defaults(run=run)


def _add_run(group: Any) -> None:
    default = EditConfig.fast()
    group.add_argument("--model", default="pocket", help='"pocket", a diffusers folder or a .safetensors file')
    group.add_argument(
        "--steps", type=int, default=default.steps, help="16 is fast, 50 as published (default %(default)s)"
    )
    group.add_argument("--cfg", type=float, default=default.cfg_scale)
    group.add_argument("--guidance", type=float, default=default.energy_scale, help="strength of the feature guidance")
    group.add_argument("--hold-object", type=float, default=default.anchor_object[1], help="share of the steps")
    group.add_argument("--hold-fill", type=float, default=default.anchor_fill[1], help="share of the steps")
    group.add_argument("--feather", type=int, default=default.feather, help="soft seam in pixels")
    group.add_argument("--max-pixels", type=int, default=1_000_000, help="larger photos are worked on at this size")
    group.add_argument("--memory", choices=["auto", "bank", "row"], default=default.memory)
    group.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Make one picture."""
    from ..core.loading import load

    image = read_image(args.image)[..., :3]
    if args.preview or args.only_preview:
        save_image(preview(image, make_tasks(args, image, _unloaded))[0], args.preview or args.out)
        if args.only_preview:
            return 0
    config = EditConfig(
        steps=args.steps, cfg_scale=args.cfg, energy_scale=args.guidance, anchor_object=(0.0, args.hold_object),
        anchor_fill=(0.0, args.hold_fill), feather=args.feather, memory=args.memory,
    )  # fmt: skip
    pipe = load(args.model)

    def inverted(picture: Tensor) -> Inversion:
        padded, canvas = fit(picture, pipe.downscale, args.max_pixels)
        cond = pipe.encode_text([args.prompt], size=(padded.shape[1], padded.shape[2]))
        return invert(pipe.model, pipe.encode_image(padded), cond, config, canvas, picture, _progress)

    tasks = make_tasks(args, image, inverted)
    out = edit_picture(
        pipe, inverted(image), tasks, args.result_prompt or args.prompt, args.negative, config, args.seed
    )
    print(f"{save_image(out, args.out)}: {pipe.model.calls} network calls, {pipe.model.rows} rows")
    return 0


def edit_picture(
    pipe: Pipeline,
    inversion: Inversion,
    tasks: Sequence[Task],
    prompt: str,
    negative: str,
    config: EditConfig,
    seed: int,
) -> Tensor:
    """Return the edited IMAGE (1, H, W, 3)."""
    assert inversion.image is not None
    padded, _ = fit(inversion.image, pipe.downscale, like=inversion.canvas)
    cond, uncond = (pipe.encode_text([text], size=(padded.shape[1], padded.shape[2])) for text in (prompt, negative))

    def encode(image: Tensor) -> Tensor:
        return pipe.encode_image(fit(image, pipe.downscale, like=inversion.canvas)[0])

    result = edit(
        pipe.model, inversion, tasks, cond, uncond, config, SeededNoise(seed), callback=_progress, encode=encode
    )
    return finish(inversion.image, result, pipe.decode)


def _progress(step: Step) -> None:
    print(
        f"\r{step.phase} {step.index}/{step.total} ",
        end="\n" if step.index == step.total else "",
        file=sys.stderr,
        flush=True,
    )


def _unloaded(picture: Tensor) -> Inversion:
    """Return a picture as a task wants it for a preview, without a model."""
    height, width = picture.shape[1:3]
    return Inversion(torch.zeros(0), torch.zeros(0), None, Canvas((height, width), (height, width), 1.0), picture)


def make_tasks(args: argparse.Namespace, image: Tensor, inverted: Any) -> list[Task]:
    """Return the tasks of a command line; `inverted` (IMAGE -> Inversion) is asked for other pictures."""
    tasks: list[Task] = []
    for words in args.move:
        mask = object_mask(_first("move", words, (3, 4)), image)
        dx, dy, scale = [*_numbers("move", words[1:]), 1.0][:3]
        tasks.append(Move(mask, dx, dy, scale))
    for words in args.paste:
        other = read_image(_first("paste", words, (4, 5)))[..., :3]
        dx, dy, scale = [*_numbers("paste", words[2:]), 1.0][:3]
        tasks.append(Paste(inverted(other), object_mask(words[1], other), dx, dy, scale))
    for mask, path, other_mask in args.appearance:
        other = read_image(path)[..., :3]
        tasks.append(Appearance(object_mask(mask, image), inverted(other), object_mask(other_mask, other)))
    for words in args.drag:
        points = [_pair(word) for word in words[1:]]
        tasks.append(Drag(object_mask(words[0], image), points, args.drag_method))
    if not tasks:
        raise ValueError("Expected at least one of --move, --paste, --appearance, --drag, but got none. " + EXAMPLE)
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
    if len(words) not in counts:
        raise ValueError(
            f"Expected {counts[0]} or {counts[1]} values for --{option}, but got {len(words)}: {' '.join(words)}."
        )
    return words[0]


def _numbers(option: str, words: Sequence[str]) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(f"Expected numbers for --{option}, but got {' '.join(words)!r}.") from None


def _pair(word: str) -> tuple[tuple[float, float], tuple[float, float]]:
    parts = [_numbers("drag", side.split(",")) for side in word.split(":")]
    if len(parts) != 2 or any(len(p) != 2 for p in parts):
        raise ValueError(f"Expected X,Y:X,Y (handle:target) for --drag, but got {word!r}.")
    (hx, hy), (tx, ty) = parts
    return (hx, hy), (tx, ty)
