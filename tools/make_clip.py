"""Make assets/ball.mp4: a shaded ball that bounces through a room, with camera noise and the sound of its bounces.

    python tools/make_clip.py

Drawn by this script, so the clip is ours (CC0). 128 x 128, 4 seconds, 12 frames a second, under 100 kB.
"""

from __future__ import annotations

import pathlib
from fractions import Fraction

import av
import numpy as np

SIZE, RATE, SECONDS, SOUND_RATE = 128, 12, 4, 44100
RADIUS, FLOOR, BOUNCES = 0.2, 0.8, 4
OUT = pathlib.Path(__file__).resolve().parent.parent / "assets" / "ball.mp4"


def position(time: float) -> tuple[float, float]:
    """Return (x, y) of the ball in shares of the picture: it crosses once and bounces `BOUNCES` times."""
    phase = (time * BOUNCES / SECONDS) % 1.0
    return 0.2 + 0.6 * time / SECONDS, FLOOR - RADIUS - 0.35 * 4 * phase * (1 - phase)


def picture(time: float, rng: np.random.Generator) -> np.ndarray:
    """Return one frame (H, W, 3) in [0, 1]: a wall and a floor, the ball's shadow, the lit ball, grain."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    light = 1.1 - 0.35 * np.hypot(x - 0.3, y - 0.2)
    wall, floor = np.array([0.18, 0.33, 0.83]), np.array([0.12, 0.2, 0.5])
    image = np.where((y < FLOOR)[..., None], wall, floor) * light[..., None]
    cx, cy = position(time)
    height = (FLOOR - RADIUS - cy) / 0.35
    shadow = np.exp(-(((x - cx - 0.04) / 0.2) ** 2 + ((y - FLOOR - 0.04) / 0.05) ** 2) * (1.5 - height / 2))
    image *= 1 - 0.55 * (1 - 0.5 * height) * shadow[..., None]
    u, v = (x - cx) / RADIUS, (y - cy) / RADIUS
    depth = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
    diffuse = np.clip(-0.45 * u - 0.55 * v + 0.7 * depth, 0, 1)
    ball = np.array([0.86, 0.16, 0.16]) * (0.45 + 0.6 * diffuse)[..., None] + 0.5 * (diffuse**24)[..., None]
    edge = np.clip((1 - np.hypot(u, v)) * RADIUS * SIZE, 0, 1)[..., None]
    return np.clip(image * (1 - edge) + ball * edge + rng.normal(0, 0.008, image.shape), 0, 1)


def sound() -> np.ndarray:
    """Return (1, samples) float32: a dying tone at every bounce."""
    time = np.arange(SECONDS * SOUND_RATE) / SOUND_RATE
    since = time % (SECONDS / BOUNCES)
    return (0.4 * np.exp(-8 * since) * np.sin(2 * np.pi * 180 * since * np.exp(-since)))[None].astype(np.float32)


def main() -> None:
    rng = np.random.default_rng(0)
    with av.open(str(OUT), "w", options={"movflags": "+faststart"}) as file:
        video = file.add_stream("libx264", rate=RATE)
        video.width = video.height = SIZE
        video.pix_fmt, video.options = "yuv420p", {"crf": "20", "preset": "veryslow"}
        audio = file.add_stream("aac", rate=SOUND_RATE, layout="mono")
        audio.bit_rate = 48000
        for i in range(RATE * SECONDS):
            pixels = (picture(i / RATE, rng) * 255).round().astype(np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        samples = av.AudioFrame.from_ndarray(sound(), format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = SOUND_RATE, 0, Fraction(1, SOUND_RATE)
        file.mux(audio.encode(samples))
        file.mux(video.encode(None))
        file.mux(audio.encode(None))
    print(f"{OUT.name}: {OUT.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
