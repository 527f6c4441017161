"""Make assets/ball.mp4: a shaded ball that bounces through a room, with camera noise and the sound of its bounces.

    python tools/make_clip.py

Its frames are those of `slipstream.stream.clip`, so the clip is ours (CC0). 128 x 128, 4 seconds, 12 frames a second, under
100 kB.
"""

from __future__ import annotations

import pathlib
from fractions import Fraction

import av
import numpy as np
from slipstream.stream.clip import BOUNCES, RATE, SECONDS, ball_clip

SOUND_RATE = 44100
OUT = pathlib.Path(__file__).resolve().parent.parent / "assets" / "ball.mp4"


def sound() -> np.ndarray:
    """Return (1, samples) float32: a dying tone at every bounce."""
    time = np.arange(SECONDS * SOUND_RATE) / SOUND_RATE
    since = time % (SECONDS / BOUNCES)
    return (0.4 * np.exp(-8 * since) * np.sin(2 * np.pi * 180 * since * np.exp(-since)))[None].astype(np.float32)


def main() -> None:
    frames = (ball_clip()[0] * 255).round().byte()
    with av.open(str(OUT), "w", options={"movflags": "+faststart"}) as file:
        video = file.add_stream("libx264", rate=RATE)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt, video.options = "yuv420p", {"crf": "20", "preset": "veryslow"}
        audio = file.add_stream("aac", rate=SOUND_RATE, layout="mono")
        audio.bit_rate = 48000
        for frame in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        samples = av.AudioFrame.from_ndarray(sound(), format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = SOUND_RATE, 0, Fraction(1, SOUND_RATE)
        file.mux(audio.encode(samples))
        file.mux(video.encode(None))
        file.mux(audio.encode(None))
    print(f"{OUT.name}: {OUT.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
