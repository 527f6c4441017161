"""Write the images of docs/guides/cow.md and of the help pages of COW's nodes: python tools/make_cow_images.py."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _common  # noqa: E402, F401
import slipstream  # noqa: E402
import torch  # noqa: E402
from slipstream.core import SeededNoise  # noqa: E402
from slipstream.core.images import read_image, read_mask, save_image, side_by_side  # noqa: E402
from slipstream.cow import CowConfig, generate  # noqa: E402
from slipstream.cow.canvas import on_scene, paste_back, place, plain_background  # noqa: E402
from slipstream.cow.photos import PHOTOS  # noqa: E402
from torch import Tensor  # noqa: E402

HELP, GUIDE = ROOT / "web" / "docs" / "img", ROOT / "docs" / "img"
SEED = 4
PROMPT = "a small yellow star on the left on a purple background"


def main() -> None:
    pipe = slipstream.load("pocket")
    photo, mask = read_image(PHOTOS["astronaut"][0]), read_mask(PHOTOS["astronaut"][1])
    canvas = place(photo, mask, plain_background(192, 256), 0.25, 0.7, 1.0)
    latents, cond, uncond = pipe.encode_image(canvas.image), pipe.encode_text([PROMPT]), pipe.encode_text([""])

    def redraw(denoised: Tensor) -> Tensor:
        return pipe.encode_image(on_scene(pipe.decode(denoised), canvas.photo, canvas.keep, pipe.downscale))

    def grown(**changes: Any) -> tuple[Tensor, list[Tensor]]:
        config = CowConfig(**{"cfg_scale": 3.0, **changes})
        result = generate(pipe.model, latents, canvas.keep, cond, uncond, config, SeededNoise(SEED), redraw=redraw)
        return pipe.decode(result.latents), [pipe.decode(x) for x in result.cycles]

    def small(image: Tensor, height: int = 192) -> Tensor:
        size = height, round(image.shape[2] * height / image.shape[1])
        return torch.nn.functional.interpolate(image.movedim(-1, 1), size, mode="area").movedim(1, -1)

    image, _ = grown()
    final = paste_back(image, canvas, 1)
    published, cycles = grown(start="canvas", cycles=10)
    mask_image = mask[..., None].expand(-1, -1, -1, 3)
    save_image(side_by_side([small(photo), small(mask_image)]), HELP / "example_photo.jpg")
    save_image(side_by_side([small(photo), small(mask_image), canvas.image]), HELP / "seed_canvas.jpg")
    save_image(side_by_side([canvas.image, final]), HELP / "cow_sampler.jpg")
    steps = [paste_back(cycles[i], canvas) for i in (0, 2, 9)]
    save_image(side_by_side([canvas.image, *steps, paste_back(published, canvas, 1)]), GUIDE / "cow_cycles.jpg")
    dial = [grown(preserve=share)[0] for share in (0.0, 0.6)]
    save_image(side_by_side([*dial, image, final]), GUIDE / "cow_preserve.jpg")
    save_image(side_by_side([grown(noise_limit=1000.0)[0], image]), GUIDE / "cow_noise_limit.jpg")


if __name__ == "__main__":
    main()
