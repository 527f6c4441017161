"""Draw the README's moving images, one for each technique, into docs/img: python tools/make_moving.py [name ...] (two CPU minutes)."""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _common  # noqa: E402, F401
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from slipstream import load  # noqa: E402
from slipstream.core import CFG, Pipeline, SeededNoise, make_sigmas, sample  # noqa: E402
from slipstream.core.images import read_image, read_mask  # noqa: E402
from slipstream.core.tensors import image_to_numpy  # noqa: E402
from slipstream.cow import CowConfig, generate  # noqa: E402
from slipstream.cow.canvas import paste_back, place, plain_background  # noqa: E402
from slipstream.cow.photos import PHOTOS  # noqa: E402
from slipstream.edit import EditConfig, Move, edit, finish, fit, invert  # noqa: E402
from slipstream.edit.preview import preview  # noqa: E402
from slipstream.lmd import RegenerateConfig, mask_schedule, regenerate  # noqa: E402
from slipstream.search import Schedule  # noqa: E402
from slipstream.search.evaluation import teacher_sigmas  # noqa: E402
from slipstream.stream import StreamBatch, StreamConfig  # noqa: E402
from slipstream.stream.video import VideoSource  # noqa: E402
from torch import Tensor  # noqa: E402

HEIGHT, CAPTION, GAP = 240, 30, 6
Frame = list[tuple[str, Tensor]]


def panel(caption: str, image: Tensor) -> Image.Image:
    """Return one image (1, H, W, 3) at HEIGHT with its caption above it."""
    shown = Image.fromarray(image_to_numpy(image)[0])
    shown = shown.resize((round(shown.width * HEIGHT / shown.height), HEIGHT), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (shown.width, HEIGHT + CAPTION), "white")
    sheet.paste(shown, (0, CAPTION))
    ImageDraw.Draw(sheet).text((2, 4), caption, "black", ImageFont.load_default(17))
    return sheet


def animate(name: str, frames: list[Frame], milliseconds: list[int]) -> None:
    """Save frames, each a row of captioned images, as docs/img/NAME.webp."""
    sheets = []
    for frame in frames:
        panels = [panel(*each) for each in frame]
        sheet = Image.new("RGB", (sum(p.width + GAP for p in panels) - GAP, HEIGHT + CAPTION), "white")
        x = 0
        for each in panels:
            sheet.paste(each, (x, 0))
            x += each.width + GAP
        sheets.append(sheet)
    path = ROOT / "docs" / "img" / f"{name}.webp"
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=milliseconds, loop=0, quality=82, method=6)
    print(f"{path.relative_to(ROOT)}: {sheets[0].size}, {len(sheets)} frames, {path.stat().st_size // 1024} kB")


def draw_move(pipe: Pipeline) -> None:
    """The badge of the astronaut's suit is pulled to another place."""
    photo = read_image(PHOTOS["astronaut"][0])[..., :3]
    photo = torch.nn.functional.interpolate(photo.movedim(-1, 1), 256, mode="area").movedim(1, -1)
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    badge = ((columns - 86) ** 2 + (rows - 192) ** 2 < 20**2).float()
    config, (dx, dy) = EditConfig(steps=16, cfg_scale=1.0, anchor_fill=(0.0, 0.9)), (-31.0, 20.0)
    cond, uncond = pipe.encode_text(["a photo"]), pipe.encode_text([""])
    padded, canvas = fit(photo, pipe.downscale)
    inversion = invert(pipe.model, pipe.encode_image(padded), cond, config, canvas, photo)
    result = edit(
        pipe.model, inversion, Move(badge, dx, dy), cond, uncond, config, SeededNoise(0),
        encode=lambda image: pipe.encode_image(fit(image, pipe.downscale, like=canvas)[0]),
    )  # fmt: skip
    after = finish(photo, result, pipe.decode)
    pulls = [preview(photo, [Move(badge, dx * t, dy * t)])[0] for t in torch.linspace(0.05, 1, 10).tolist()]
    shown = [("Paint and pull", photo), *(("Paint and pull", each) for each in pulls), ("Result", after)]
    animate("move", [[("Your photo", photo), each] for each in shown], [900, *[110] * 9, 900, 2500])


def draw_cow(_: Pipeline) -> None:
    pipe = load("pocket-flow")
    photo, mask = read_image(PHOTOS["astronaut"][0]), read_mask(PHOTOS["astronaut"][1])
    canvas = place(photo, mask, plain_background(192, 256), 0.25, 0.5, 1.0)
    cond, uncond = pipe.encode_text(["a small rocket at the top on a blue shaded background"]), pipe.encode_text([""])
    result = generate(
        pipe.model, pipe.encode_image(canvas.image), canvas.keep, cond, uncond, CowConfig(cfg_scale=3.0), SeededNoise(0)
    )
    cycles = [paste_back(pipe.decode(x), canvas) for x in result.cycles]
    final = paste_back(pipe.decode(result.latents), canvas, 1)
    shown = [("Canvas", canvas.image), *((f"Cycle {i + 1}", each) for i, each in enumerate(cycles)), ("Result", final)]
    animate("cow", [[("Your photo", photo[..., :3]), each] for each in shown], [1200, *[250] * len(cycles), 2500])


def draw_stream(pipe: Pipeline) -> None:
    frames = torch.stack([image for image, _ in VideoSource(str(ROOT / "assets" / "ball.mp4"))])[:40] / 255
    student = load("pocket-lcm")
    cond = pipe.encode_text(["a large yellow circle on a green background"])
    stream = StreamBatch(student.model, cond, None, StreamConfig(strength=0.75, steps=2, guidance="none", seed=3))
    done = stream.push(pipe.encode_image(frames)) + stream.drain()
    results = pipe.decode(torch.cat([f.latents for f in done]))
    rows = [[("Your clip", frames[i : i + 1]), ("Repainted", results[i : i + 1])] for i in range(len(frames))]
    animate("stream", rows, [80] * len(rows))


def draw_search(pipe: Pipeline) -> None:
    """The same noise and captions: 50 steps, the best stock schedule of two steps, two searched steps."""
    import schedule_quality

    path = schedule_quality.pocket_path(pipe, schedule_quality.captions(10, 5000)[1], 900)
    searched = Schedule.load(ROOT / "search" / "presets" / "pocket_2.json").sigmas
    rows = {
        "50 steps": teacher_sigmas(path.table(), 50),
        "2 steps of beta": path.stock(2)["beta"],
        "2 searched steps": searched,
    }
    images = {name: pipe.decode(path.sample(sigmas, range(10))) for name, sigmas in rows.items()}
    animate("search", [[(name, each[i : i + 1]) for name, each in images.items()] for i in range(10)], [1300] * 10)


def draw_lmd(_: Pipeline) -> None:
    """A lion is repainted round by round; a round's masked cells are grey."""
    import make_lmd_images as drawn

    pipe, config = load("pocket-flow"), RegenerateConfig(steps=6, strength=0.9, strength_end=0.6, cfg_scale=3.0)
    lion, tiger, uncond = (
        pipe.encode_text([text and f"a large {text} in the center on a blue striped background"])
        for text in ("lion", "tiger", "")
    )
    sigmas, noise = make_sigmas("simple", pipe.model.levels, 20), SeededNoise(8)(torch.zeros(1, 16, 16, 16))
    image = pipe.decode(sample("euler", CFG(pipe.model, lion, uncond, 3.0), noise, sigmas, pipe.model.space))
    masks = mask_schedule(5, "cosine", 0.5, 0.75, nested=False, seed=3).masks
    frames: list[Frame] = [[("Your image", image), ("", image)]]
    latents = pipe.encode_image(image)
    for rounds in range(1, len(masks) + 1):
        shown = pipe.decode(latents)
        made = regenerate(
            pipe.model, pipe.encode_image(image), tiger, uncond, config, SeededNoise(1), masks=masks[:rounds]
        ).latents
        frames.append([("Your image", image), (f"Round {rounds}: masked", drawn.masked(shown, masks[rounds - 1]))])
        frames.append([("Your image", image), (f"Round {rounds}: repainted", pipe.decode(made))])
        latents = made
    animate("lmd", frames, [900, *[600, 600] * (len(masks) - 1), 600, 2500])


DRAWINGS = {"move": draw_move, "cow": draw_cow, "stream": draw_stream, "search": draw_search, "lmd": draw_lmd}


def main() -> None:
    torch.set_num_threads(1)
    pipe = load("pocket")
    with torch.no_grad():
        for name in sys.argv[1:] or DRAWINGS:
            DRAWINGS[name](pipe)


if __name__ == "__main__":
    main()
