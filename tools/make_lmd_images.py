"""Draw the images of the latent masking help pages into web/docs/img: python tools/make_lmd_images.py (two CPU minutes)."""

from __future__ import annotations

import pathlib
import sys
from dataclasses import replace
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _common  # noqa: E402, F401
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from slipstream import load  # noqa: E402
from slipstream.core import CFG, SeededNoise, make_sigmas, sample  # noqa: E402
from slipstream.core.images import side_by_side  # noqa: E402
from slipstream.core.tensors import image_to_numpy  # noqa: E402
from slipstream.lmd import (  # noqa: E402
    FillConfig,
    RegenerateConfig,
    TrainConfig,
    drag_field,
    influence,
    mask_schedule,
    optical_flow,
    regenerate,
    stretch_map,
    train,
)
from slipstream.lmd.charts import influence_chart, loss_chart, schedule_chart, stretch_charts  # noqa: E402
from slipstream_tools.pocket.scenes import Item, Scene, render, sample_scene  # noqa: E402
from torch import Tensor  # noqa: E402

FOLDER = ROOT / "web" / "docs" / "img"
RED = Scene("blue", (Item("circle", "red", "large", "center", 0.25, 0.45, 0.5),))
STAR = Scene("purple", (Item("star", "yellow", "large", "center", 0.25, 0.5, 0.5),), kind="gradient")


def save(image: Tensor, name: str, width: int = 900) -> None:
    """Write an IMAGE as web/docs/img/NAME.jpg, at most `width` wide."""
    drawn = Image.fromarray(image_to_numpy(image)[0])
    if drawn.width > width:
        drawn = drawn.resize((width, round(drawn.height * width / drawn.width)), Image.Resampling.LANCZOS)
    drawn.save(FOLDER / f"{name}.jpg", quality=88)
    print(name, drawn.size, (FOLDER / f"{name}.jpg").stat().st_size)


def enlarged(image: Tensor) -> Tensor:
    """IMAGE (1, H, W, 3) at 220 x 220."""
    scaled = torch.nn.functional.interpolate(image[..., :3].movedim(-1, 1), (220, 220), mode="bicubic", antialias=True)
    return scaled.clamp(0, 1).movedim(1, -1)


def drawing_of(scene: Scene) -> Tensor:
    return (render([scene], 128).movedim(1, -1) + 1) / 2


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """IMAGE with the masked cells (16, 16) grey."""
    cells = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[None, ..., None]
    return torch.where(cells > 0, torch.full_like(image, 0.6), image)


def draw_regenerate(pipe: Any) -> None:
    image = drawing_of(RED)
    schedule = mask_schedule(5, "cosine", 0.5, 0.75, nested=False, seed=3)
    config = RegenerateConfig(steps=6, strength=0.9, strength_end=0.6, cfg_scale=3.0)
    cond, uncond = pipe.encode_text(["a large yellow circle on a blue background"]), pipe.encode_text([""])
    result = regenerate(
        pipe.model, pipe.encode_image(image), cond, uncond, config, SeededNoise(1), masks=schedule.masks
    )
    save(
        side_by_side([enlarged(i) for i in (image, masked(image, schedule.masks[0]), pipe.decode(result.latents))]),
        "masked_regenerate",
    )


def draw_fill(pipe: Any) -> None:
    rng = np.random.default_rng(0)
    images = (render([sample_scene(rng) for _ in range(300)], 128).movedim(1, -1) + 1) / 2
    result = train(pipe.encode_image(images), FillConfig(), TrainConfig(steps=300, learning_rate=2e-3))
    save(loss_chart(result.losses, 300), "train_latent_fill")
    image, mask = drawing_of(STAR), torch.zeros(16, 16)
    mask[8:15, 7:14] = 1
    filled = result.fill.fill(pipe.encode_image(image), mask)
    config = RegenerateConfig(1, "fixed", high=1.0, strength=0.6, steps=6, cfg_scale=3.0)
    prompt, blank = (
        pipe.encode_text(["a large yellow star in the center on a purple gradient background"]),
        pipe.encode_text([""]),
    )
    final = regenerate(pipe.model, filled, prompt, blank, config, SeededNoise(0), mask).latents
    shown = (image, masked(image, mask), pipe.decode(filled), pipe.decode(final))
    save(side_by_side([enlarged(i) for i in shown]), "latent_fill")


def draw_influence(pipe: Any) -> None:
    """The same plain image without and with a pasted circle: a seed, and how far it reaches."""
    plain, circle = Scene("blue", ()), Scene("blue", (Item("circle", "red", "small", "center", 0.13, 0.5, 0.5),))
    mask = torch.zeros(16, 16)
    mask[5:11, 5:11] = 1
    empty, seeded = (pipe.encode_image(drawing_of(scene)) for scene in (plain, circle))
    guided = CFG(pipe.model, pipe.encode_text(["a small red circle on a blue background"]), None)
    sigmas = make_sigmas("uniform", pipe.model.levels, 10, 0.6)
    runs = []
    for start in (empty, torch.where(mask > 0, seeded, empty)):
        steps: list[Tensor] = []
        x = pipe.model.space.add_noise(start, SeededNoise(11)(start), sigmas[0])
        sample("euler", guided, x, sigmas, pipe.model.space, callback=lambda s, kept=steps: kept.append(s.denoised))
        runs.append(torch.stack(steps))
    save(influence_chart(influence(*runs, mask)), "influence_profile")


def draw_stretch(pipe: Any) -> None:
    ring = (Item("circle", "yellow", "large", "center", 0.25, 0.45, 0.5),)
    before, after = (drawing_of(Scene("purple", (replace(ring[0], x=x),), "checkered")) for x in (0.4, 0.48))
    points = torch.tensor([[[36.0, 64.0], [10.0, 64.0]], [[80.0, 64.0], [104.0, 64.0]]])
    drag = stretch_map(drag_field(points[:, 0], points[:, 1], 128, 128, 14.0))
    flow = stretch_map(optical_flow(before.movedim(-1, 1), after.movedim(-1, 1)))
    maps = torch.cat([stretch_charts(drag, drawing_of(Scene("purple", ring))), stretch_charts(flow, before)])
    save(side_by_side(maps.split(1)), "stretch_map")


def draw_schedule(pipe: Any) -> None:
    save(schedule_chart(mask_schedule(8, "cosine")), "mask_schedule")


DRAWINGS = {
    "schedule": draw_schedule, "stretch": draw_stretch, "regenerate": draw_regenerate, "influence": draw_influence, "fill": draw_fill
}  # fmt: skip


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    pipe = load("pocket", dtype=torch.float32)
    for name in sys.argv[1:] or DRAWINGS:
        DRAWINGS[name](pipe)


if __name__ == "__main__":
    main()
