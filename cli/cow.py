"""`slipstream cow` and `slipstream demo`: a subject of a photo kept while a scene grows around it."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import torch
from torch import Tensor

from ..core.files import check_folder
from ..core.images import read_image, read_mask, save_image, side_by_side
from ..core.noise import SeededNoise
from ..core.pipeline import Pipeline
from ..core.unused import Unused
from ..cow.canvas import (
    GREY,
    Canvas,
    image_background,
    noise_background,
    on_scene,
    padded,
    paste_back,
    place,
    plain_background,
)
from ..cow.config import STARTS, CowConfig
from ..cow.photos import PHOTOS
from ..cow.sampling import CowResult, generate
from .options import (
    add_cfg,
    add_model,
    add_output,
    add_prompt,
    add_seed,
    add_size,
    add_steps,
    checked,
    integer,
    load_pipeline,
    number,
    size_of,
)
from .progress import Progress

PHOTO, MASK = PHOTOS["astronaut"]
BUNDLED_CFG = {"pocket": 3.0, "pocket-lcm": 1.0, "pocket-flow": 3.0}


def _cfg_scale(v: Any) -> float:
    return float(BUNDLED_CFG.get(v.model, CowConfig.cfg_scale) if v.cfg_scale is None else v.cfg_scale)


UNUSED = (
    Unused("negative", lambda v: _cfg_scale(v) == v.inversion_cfg == 1, "at --cfg 1 and --inversion-cfg 1. Raise one of them."),
    Unused("preserve", lambda v: v.follow > 0, "with --follow. Leave one of them out."),
    Unused("softness", lambda v: v.no_paste, "with --no-paste. Leave one of them out."),
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Declare `cow` and `demo`."""
    cow = subparsers.add_parser("cow", help="keep a subject of a photo while a scene grows around it (COW)")
    cow.add_argument("--image", required=True, help="the photo")
    cow.add_argument(
        "--mask", help="white = keep (docs/guides/images.md: masks with alpha); default: what is opaque in the photo"
    )
    cow.add_argument("--invert-mask", action="store_true", help="black = keep")
    add_prompt(cow, "the scene to grow", required=True)
    add_output(cow, "--out", default="cow.png")
    add_output(cow, "--strip", help="also save canvas, cycles and result side by side here")
    _add_canvas(cow.add_argument_group("canvas"))
    _add_run(cow.add_argument_group("run"))
    add_model(cow)
    cow.unused = UNUSED
    cow.set_defaults(run=run_cow)
    demo = subparsers.add_parser("demo", help="make images from the bundled photo with the bundled model")
    demo.add_argument("--out", type=checked(_demo_folder), default="out", help="folder of the images")
    demo.add_argument("--scenes", type=integer(1, len(SCENES)), default=len(SCENES), help="how many of them")
    add_size(demo, "size of the canvas (default 256x192)")
    add_seed(demo)
    add_model(demo)
    demo.set_defaults(run=run_demo)


def _add_canvas(group: Any) -> None:
    add_size(group, "size of the canvas (default 512x512)")
    group.add_argument("--scale", type=number(), default=1.0, help="size of the subject relative to the photo")
    group.add_argument("--x", type=number(), default=0.5, help="0 left edge, 1 right edge")
    group.add_argument("--y", type=number(), default=1.0, help="0 top edge, 1 bottom edge")
    group.add_argument("--background", default=GREY, help='"#rrggbb", "noise" or an image file')


def _add_run(group: Any) -> None:
    default = CowConfig()
    add_steps(group, default.steps)
    add_cfg(group, None, note="(default 3 for the bundled model, 1 for its student, else 7.5)")
    group.add_argument("--inversion-cfg", type=number(), default=default.inversion_cfg, help="of the inversion")
    group.add_argument("--cycles", type=integer(), default=default.cycles, help="rounds of disturbing and denoising")
    group.add_argument("--low", type=number(), default=default.low, help="the cycles' range in shares of training time")
    group.add_argument("--high", type=number(), default=default.high, help="its upper end")
    group.add_argument("--preserve", type=number(), default=default.preserve, help="0 free, 1 subject's latents exact")
    group.add_argument(
        "--follow", type=number(), default=default.follow, help="0 keep the pixels ... 1 follow the text"
    )
    group.add_argument("--start", choices=STARTS, default=default.start, help="what the scene starts as")
    add_seed(group)
    group.add_argument("--no-paste", action="store_true", help="leave the subject as the model returns it")
    group.add_argument(
        "--softness", type=integer(0), default=2, help="pixels over which pasted pixels fade (default 2)"
    )


def _demo_folder(value: str) -> pathlib.Path:
    folder = pathlib.Path(value).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder, but {folder} is a file. Choose another name.")
    check_folder("out", folder if folder.is_dir() else folder.parent)
    return folder


def run_cow(args: argparse.Namespace) -> int:
    """Make one image."""
    photo, keep = _subject(args.image, args.mask, args.invert_mask)
    config = CowConfig(
        steps=args.steps, cfg_scale=_cfg_scale(args), inversion_cfg=args.inversion_cfg, cycles=args.cycles, low=args.low,
        high=args.high, preserve=args.preserve, follow=args.follow, start=args.start,
    )  # fmt: skip
    background = _background(args.background, *size_of(args, (512, 512)), args.seed)
    canvas = place(photo, keep, background, args.scale, args.x, args.y)
    pipe = load_pipeline(args)
    result = _generate(pipe, canvas, args.prompt, args.negative, config, args.seed)
    image = _decoded(pipe, result.latents, canvas)
    final = image if args.no_paste else paste_back(image, canvas, args.softness)
    print(save_image(final, args.out))
    if args.strip:
        print(save_image(strip(pipe, canvas, result, final), args.strip))
    return 0


def _subject(image: str, mask: str | None, inverted: bool) -> tuple[Tensor, Tensor]:
    photo = read_image(image)
    if mask is not None:
        keep = read_mask(mask)
    elif photo.shape[-1] == 4 and bool((photo[..., 3] < 0.5).any()):
        keep = photo[..., 3]
    else:
        raise ValueError(
            f"Expected `--mask` for an image without transparent parts, but got {image}. Paint the subject white."
        )
    return photo[..., :3], 1 - keep if inverted else keep


def _background(value: str, height: int, width: int, seed: int) -> Tensor:
    if value == "noise":
        return noise_background(height, width, SeededNoise(seed).fork("cow background"))
    if value.startswith("#"):
        return plain_background(height, width, value)
    return image_background(read_image(value), height, width)


def _generate(
    pipe: Pipeline, canvas: Canvas, prompt: str, negative: str, config: CowConfig, seed: int
) -> CowResult:  # fmt: skip
    canvas = padded(canvas, pipe.downscale)
    cond, uncond = (
        pipe.encode_text([text], size=(canvas.keep.shape[1], canvas.keep.shape[2])) for text in (prompt, negative)
    )

    def redraw(denoised: Tensor) -> Tensor:
        return pipe.encode_image(on_scene(pipe.decode(denoised), canvas.photo, canvas.keep, pipe.downscale))

    with Progress() as progress:
        return generate(
            pipe.model, pipe.encode_image(canvas.image), canvas.keep, cond, uncond, config, SeededNoise(seed), progress,
            redraw=redraw,
        )  # fmt: skip


def _decoded(pipe: Pipeline, latents: Tensor, canvas: Canvas) -> Tensor:
    """Return IMAGE of latents at the size of the canvas, which was padded to whole cells."""
    height, width = canvas.keep.shape[1:]
    return pipe.decode(latents)[:, :height, :width]


def strip(pipe: Pipeline, canvas: Canvas, result: CowResult, final: Tensor, shown: int = 4) -> Tensor:
    """Return canvas, a few cycles' estimates and the result in one row (1, H, W, 3)."""
    count = len(result.cycles)
    picks = sorted({round(i * (count - 1) / (shown - 1)) for i in range(shown)}) if count else []
    grown = [paste_back(_decoded(pipe, result.cycles[i][:1], canvas), canvas) for i in picks]
    return side_by_side([canvas.image, *grown, final])


# The bundled model knows shapes on coloured backgrounds, nothing else: these are its words.
SCENES = (
    ("a small white star at the top on a blue background", 0.5),
    ("a small yellow star on the left on a purple background", 0.7),
    ("a large green square on the right on an orange background", 0.3),
)


def run_demo(args: argparse.Namespace) -> int:
    """Grow scenes around the astronaut of the bundled photo and say where the images are."""
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    photo, keep = _subject(str(PHOTO), str(MASK), False)
    background = plain_background(*size_of(args, (192, 256)))
    scenes = [(prompt, place(photo, keep, background, 0.25, x, 1.0)) for prompt, x in SCENES[: args.scenes]]
    config, rows = CowConfig(cfg_scale=BUNDLED_CFG.get(args.model, CowConfig.cfg_scale)), []
    pipe = load_pipeline(args)
    for prompt, canvas in scenes:
        result = _generate(pipe, canvas, prompt, "", config, args.seed)
        final = paste_back(_decoded(pipe, result.latents, canvas), canvas, 1)
        rows.append(strip(pipe, canvas, result, final))
        print(save_image(final, args.out / f"cow_{len(rows)}.png"))
    space = torch.ones(1, 4, rows[0].shape[2], 3)
    print(save_image(torch.cat([part for row in rows for part in (space, row)][1:], 1), args.out / "cow_strip.png"))
    return 0
