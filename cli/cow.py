"""`slipstream cow` and `slipstream demo`: a subject of a photo kept while a scene grows around it."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import torch
from torch import Tensor

from ..core.images import check_image_name, read_image, read_mask, save_image, side_by_side
from ..core.noise import SeededNoise
from ..core.pipeline import Pipeline
from ..core.progress import Step
from ..cow.canvas import GREY, Canvas, image_background, noise_background, paste_back, place, plain_background
from ..cow.config import CowConfig
from ..cow.photos import PHOTOS
from ..cow.sampling import CowResult, generate

PHOTO, MASK = PHOTOS["astronaut"]
BUNDLED_CFG = {"pocket": 3.0, "pocket-lcm": 1.0}


def add_parser(subparsers: Any) -> None:
    """Declare `cow` and `demo`."""
    cow = subparsers.add_parser("cow", help="keep a subject of a photo while a scene grows around it (COW)")
    cow.add_argument("--image", required=True, help="the photo")
    cow.add_argument(
        "--mask", help="white = keep (docs/images.md: masks with alpha); default: what is opaque in the photo"
    )
    cow.add_argument("--invert-mask", action="store_true", help="black = keep")
    cow.add_argument("--prompt", required=True, help="the scene to grow")
    cow.add_argument("--negative", default="", help="what to keep out of it")
    cow.add_argument("--out", default="cow.png", help="where the picture goes (default %(default)s)")
    cow.add_argument("--strip", help="also save canvas, cycles and result side by side here")
    _add_canvas(cow.add_argument_group("canvas"))
    _add_run(cow.add_argument_group("run"))
    cow.set_defaults(run=run_cow)
    demo = subparsers.add_parser("demo", help="make pictures from the bundled photo with the bundled model")
    demo.add_argument("--out", default="out", help="the folder for the pictures (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--scenes", type=int, default=len(SCENES), help="how many of them (default %(default)s)")
    demo.set_defaults(run=run_demo)


def _add_canvas(group: Any) -> None:
    group.add_argument("--width", type=int, default=512)
    group.add_argument("--height", type=int, default=512)
    group.add_argument("--scale", type=float, default=1.0, help="size of the subject relative to the photo")
    group.add_argument("--x", type=float, default=0.5, help="0 left edge, 1 right edge (default %(default)s)")
    group.add_argument("--y", type=float, default=1.0, help="0 top edge, 1 bottom edge (default %(default)s)")
    group.add_argument("--background", default=GREY, help='"#rrggbb", "noise" or a picture file (default %(default)s)')


def _add_run(group: Any) -> None:
    default = CowConfig()
    group.add_argument("--model", default="pocket", help='"pocket", a diffusers folder or a .safetensors file')
    group.add_argument("--steps", type=int, default=default.steps)
    group.add_argument(
        "--cfg", type=float, help="guidance (default 3 for the bundled model, 1 for its student, else 7.5)"
    )
    group.add_argument("--inversion-cfg", type=float, default=default.inversion_cfg)
    group.add_argument("--cycles", type=int, default=default.cycles)
    group.add_argument("--low", type=float, default=default.low, help="the cycles' range in shares of training time")
    group.add_argument("--high", type=float, default=default.high)
    group.add_argument("--preserve", type=float, default=default.preserve, help="0 free, 1 subject's latents exact")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--no-paste", action="store_true", help="leave the subject as the model returns it")
    group.add_argument("--softness", type=int, default=2, help="pixels over which pasted pixels fade (default 2)")


def run_cow(args: argparse.Namespace) -> int:
    """Make one picture."""
    for path in filter(None, (args.out, args.strip)):
        check_image_name(path)
    photo, keep = _subject(args.image, args.mask, args.invert_mask)
    cfg_scale = BUNDLED_CFG.get(args.model, CowConfig.cfg_scale) if args.cfg is None else args.cfg
    config = CowConfig(
        steps=args.steps, cfg_scale=cfg_scale, inversion_cfg=args.inversion_cfg, cycles=args.cycles, low=args.low,
        high=args.high, preserve=args.preserve,
    )  # fmt: skip
    background = _background(args.background, args.height, args.width, args.seed)
    canvas = place(photo, keep, background, args.scale, args.x, args.y)
    pipe = _load(args.model)
    result = _generate(pipe, canvas, args.prompt, args.negative, config, args.seed)
    picture = pipe.decode(result.latents)
    final = picture if args.no_paste else paste_back(picture, canvas, args.softness)
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
            f"Expected `--mask` for a picture without transparent parts, but got {image}. Paint the subject white."
        )
    return photo[..., :3], 1 - keep if inverted else keep


def _background(value: str, height: int, width: int, seed: int) -> Tensor:
    if value == "noise":
        return noise_background(height, width, SeededNoise(seed).fork("cow background"))
    if value.startswith("#"):
        return plain_background(height, width, value)
    return image_background(read_image(value), height, width)


def _load(source: str) -> Pipeline:
    from ..core.loading import load

    return load(source)


def _generate(
    pipe: Pipeline, canvas: Canvas, prompt: str, negative: str, config: CowConfig, seed: int
) -> CowResult:  # fmt: skip
    cond, uncond = (
        pipe.encode_text([text], size=(canvas.keep.shape[1], canvas.keep.shape[2])) for text in (prompt, negative)
    )
    with ProgressBar(prompt) as bar:
        return generate(
            pipe.model, pipe.encode_image(canvas.image), canvas.keep, cond, uncond, config, SeededNoise(seed), bar
        )


def strip(pipe: Pipeline, canvas: Canvas, result: CowResult, final: Tensor, shown: int = 4) -> Tensor:
    """Return canvas, a few cycles' estimates and the result in one row (1, H, W, 3)."""
    count = len(result.cycles)
    picks = sorted({round(i * (count - 1) / (shown - 1)) for i in range(shown)}) if count else []
    grown = [paste_back(pipe.decode(result.cycles[i][:1]), canvas) for i in picks]
    return side_by_side([canvas.image, *grown, final])


class ProgressBar:
    """A callback that draws tqdm's bar, or one line per phase where tqdm is missing."""

    def __init__(self, label: str) -> None:
        self.label, self.phase = label, ""
        self.bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, step: Step) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            if step.phase != self.phase:
                print(f"{self.label}: {step.phase} ({step.index} of {step.total})", file=sys.stderr)
            self.phase = step.phase
            return
        if self.bar is None:
            self.bar = tqdm(total=step.total, desc=self.label, unit="step", disable=None)
        self.bar.update(step.index - self.bar.n)
        self.bar.set_postfix_str(step.phase)


# The bundled model knows shapes on coloured backgrounds, nothing else: these are its words.
SCENES = (
    ("a small white star at the top on a blue background", 0.5),
    ("a small yellow star on the left on a purple background", 0.7),
    ("a large green square on the right on an orange background", 0.3),
)


def run_demo(args: argparse.Namespace) -> int:
    """Grow scenes around the astronaut of the bundled photo and say where the pictures are."""
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    folder = pathlib.Path(args.out).expanduser()
    pipe = _load("pocket")
    photo, keep = _subject(str(PHOTO), str(MASK), False)
    rows = []
    for prompt, x in SCENES[: max(1, args.scenes)]:
        canvas = place(photo, keep, plain_background(192, 256), 0.25, x, 1.0)
        result = _generate(pipe, canvas, prompt, "", CowConfig(cfg_scale=3.0), args.seed)
        final = paste_back(pipe.decode(result.latents), canvas, 1)
        rows.append(strip(pipe, canvas, result, final))
        print(save_image(final, folder / f"cow_{len(rows)}.png"))
    space = torch.ones(1, 4, rows[0].shape[2], 3)
    print(save_image(torch.cat([part for row in rows for part in (space, row)][1:], 1), folder / "cow_strip.png"))
    return 0
