"""Small clips for tests: grey frames whose value is their number, uneven times, sound."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
from slipstream.stream.video import open_source

av = pytest.importorskip("av")  # whoever imports this is skipped without it

UNEVEN = [0, 3, 4, 9, 10, 17, 18, 30]


def make_video(
    path: pathlib.Path, times: Iterable[int] = range(12), size: tuple[int, int] = (32, 48), codec: str = "libx264",
    sound: str | None = "aac",
) -> pathlib.Path:  # fmt: skip
    """Write a video with frames at the given multiples of 1/30 s, grey rising from frame to frame, and sound to its end."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=30)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30)
        audio = file.add_stream(sound, rate=48000, layout="mono") if sound else None
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 10 * i % 250, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 30)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if audio is not None:
            wave = np.sin(np.arange(48000 * (max(times) + 1) // 30) / 20)[None] / 2
            wave = (wave * 20000).astype(np.int16) if sound.startswith("pcm") else wave.astype(np.float32)
            frame = av.AudioFrame.from_ndarray(wave, format="s16" if sound.startswith("pcm") else "fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            file.mux(audio.encode(frame))
            file.mux(audio.encode(None))
    return path


def times_of(path: pathlib.Path) -> list[float]:
    return [round(stamp.seconds, 4) for _, stamp in open_source(str(path))]


def sound_of(path: pathlib.Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
