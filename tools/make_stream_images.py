"""Make the images of the stream's help pages from assets/ball.mp4 and the bundled model.

python tools/make_stream_images.py
"""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _common  # noqa: E402, F401
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from slipstream.core import SeededNoise, load, make_sigmas, sample  # noqa: E402
from slipstream.core.tensors import image_to_numpy, image_to_pixels  # noqa: E402
from slipstream.stream import RCFG, BlendedStream, PromptBlend, SimilarityFilter, StreamBatch, StreamConfig  # noqa: E402
from slipstream.stream.similarity import select  # noqa: E402
from slipstream.stream.video import VideoSource  # noqa: E402
from torch import Tensor  # noqa: E402

SHOWN = slice(4, 28, 4)


def strip(rows: list[Tensor], path: pathlib.Path, gap: int = 4) -> None:
    """Save rows of images, each (B, H, W, 3) in [0, 1], below each other."""
    lines = [torch.cat([torch.nn.functional.pad(p, (0, 0, 0, gap, 0, gap), value=1.0) for p in row], 1) for row in rows]
    sheet = torch.cat(lines)[:-gap, :-gap]
    Image.fromarray(image_to_numpy(sheet)).save(path, quality=88)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} kB")


def main() -> None:
    torch.set_num_threads(1)
    images = ROOT / "web" / "docs" / "img"
    frames = torch.stack([image for image, _ in VideoSource(str(ROOT / "assets" / "ball.mp4"))]) / 255
    pipe = load("pocket")
    cond, uncond = pipe.encode_text(["a large yellow circle on a green background"]), pipe.encode_text([""])
    student = load("pocket-lcm")
    stream = StreamBatch(student.model, cond, uncond, StreamConfig(strength=0.75, steps=2, guidance="none", seed=3))
    done = stream.push(pipe.encode_image(frames[:28])) + stream.drain()
    results = pipe.decode(torch.cat([f.latents for f in done[SHOWN]]))
    strip([frames[SHOWN], results], images / "stream_frames.jpg")

    other = pipe.encode_text(["a large blue circle on a red background"])
    faded = []
    for mode in ("linear", "slerp"):
        config, fade = StreamConfig(strength=0.75, steps=2, guidance="none", seed=3), PromptBlend([1, 0], [0, 1], mode)
        blended = BlendedStream(student.model, [cond, other], fade, 24, uncond, config)
        done = blended.push(pipe.encode_image(frames[4:28])) + blended.drain()
        faded.append(pipe.decode(torch.cat([f.latents for f in [*done[:20:4], done[23]]])))
    strip([torch.cat([frames[4:24:4], frames[27:28]]), *faded], images / "blend_prompts.jpg")

    red, sigmas = (
        pipe.encode_text(["a large red circle on a blue background"]),
        make_sigmas("uniform", pipe.model.levels, 12),
    )
    start = SeededNoise(11)(torch.zeros(1, 4, 16, 16)) * sigmas[0]
    settings = [("none", 1.0, 1.0), ("onetime", 1.5, 0.5), ("onetime", 1.5, 1.0), ("full", 2.0, 1.0)]
    with torch.no_grad():
        made = [sample("euler", RCFG(pipe.model, red, uncond, *s), start, sigmas, pipe.model.space) for s in settings]
    strip([pipe.decode(torch.cat(made))], images / "rcfg_guider.jpg")

    slow = frames.repeat_interleave(2, 0)[:24]  # every frame twice, as a film shown at a higher rate
    kept = select(image_to_pixels(slow), SimilarityFilter(0.98, blocks=8))
    marked = slow * torch.tensor([1.0 if i in kept else 0.25 for i in range(len(slow))])[:, None, None, None]
    small = torch.nn.functional.interpolate(marked.movedim(-1, 1), 64, mode="area").movedim(1, -1)
    strip([small[:12], small[12:]], images / "similarity_filter.jpg", gap=2)


if __name__ == "__main__":
    main()
