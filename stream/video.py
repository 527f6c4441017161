"""Where frames come from: video files and webcams (PyAV), animated images and folders of images (Pillow)."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.checks import check_range
from ..core.images import IMAGE_SUFFIXES, MAX_PIXELS, count_frames, image_files, read_frames, read_image

MAX_RATE = 240  # what FFmpeg guesses beyond is the resolution of the times, not a rate
# What a video calls its matrix, and what swscale does: BT.709, FCC, BT.470BG and SMPTE 170M (both BT.601), SMPTE 240M.
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7}
UNTIMED = 0.1  # seconds of a frame whose file gives none, as browsers show it
CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
CAMERA_NAMES = {"linux": "/dev/video{}", "darwin": "{}", "win32": "video={}"}
CAMERA_REMEDIES = {
    "linux": "Connect one, or name another: webcam:1 is the second.",
    "darwin": "Allow the camera to the terminal in the system's settings, or name another: webcam:1 is the second.",
    "win32": "Windows knows cameras by name: webcam:NAME, with the name that the settings of the system show.",
}


def import_av() -> Any:
    """Return PyAV; raises ValueError with the remedy when it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError("Expected PyAV for video, but it is not installed. Run: pip install av") from error
    return av


@dataclass(frozen=True)
class Stamp:
    """When a frame is shown, and for how long: in units of `time_base` seconds; a `length` of 0 is not known."""

    pts: int
    time_base: Fraction
    length: int = 0

    @property
    def seconds(self) -> float:
        return float(self.pts * self.time_base)

    def end(self, rate: Fraction) -> float:
        """Return the second at which its time is over; at `rate` frames a second where its length is not known."""
        return self.seconds + float(self.length * self.time_base or 1 / rate)


class FrameSource(Protocol):
    """Frames, IMAGE (H, W, 3) in [0, 1] or uint8, with their times.

    `live` sources do not wait; `count` is the number of frames, 0 when nobody knows. `rate` is the mean number of frames a
    second, `base_rate` the smallest of which all times are multiples, as far as is known.
    """

    path: str
    live: bool
    has_sound: bool
    count: int
    rate: Fraction
    base_rate: Fraction
    time_base: Fraction
    problem: str  # why reading ended early, or ""

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]: ...


def rgb_of(frame: Any, reformatter: Any) -> np.ndarray:
    """Return a frame as uint8 (H, W, 3), by the matrix and range that it names, through PyAV's VideoReformatter.

    A frame's own `reformat` makes one for each frame, and each starts threads.
    PyAV before 17 looks at neither, unless source and destination are given and differ; for RGB the destination's do not count.
    """
    matrix, full = MATRICES.get(int(frame.colorspace), 5), int(frame.color_range) == 2
    other, src, dst = 1 if matrix != 1 else 5, *((2, 1) if full else (1, 2))
    changed = {"src_colorspace": matrix, "dst_colorspace": other, "src_color_range": src, "dst_color_range": dst}
    pixels: np.ndarray = reformatter.reformat(frame, format="rgb24", **changed).to_ndarray()
    return pixels


def matrix_of(frame: Any) -> tuple[int, int, int, int]:
    """Return (a, b, c, d) of a frame's display matrix, -1, 0 or 1 each: it is shown at x' = a x + c y, y' = b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")  # iterating gives data before PyAV 19, and types from it on
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5]
    straight = abs(a) >= abs(b)  # a matrix of another angle is rounded to a quarter turn
    first, second = (a, d) if straight else (b, c)
    x, y = (-1 if first < 0 else 1), (-1 if second < 0 else 1)
    return (x, 0, 0, y) if straight else (0, x, y, 0)


def upright(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Return an image (H, W, C) turned and mirrored as its display matrix says: phones film sideways, front cameras mirror."""
    a, b, c, d = matrix
    shown = image if a else image.transpose(1, 0, 2)
    return shown[:: -1 if b + d < 0 else 1, :: -1 if a + c < 0 else 1]


class VideoSource:
    """Frames of a video file or camera, uint8 IMAGE (H, W, 3); what is damaged is left out and said in `problem`."""

    def __init__(self, path: str, format: str | None = None) -> None:
        av = import_av()
        try:
            self.container = av.open(path, format=format)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if format is not None:
                raise ValueError(
                    f"Expected a camera, but {path} cannot be opened ({reason(error)}). {CAMERA_REMEDIES[platform_of()]}"
                ) from error
            raise ValueError(f"Expected a video that can be read, but got {path} ({reason(error)}).") from error
        if not self.container.streams.video:
            self.container.close()
            raise ValueError(f"Expected a video with images, but {path} has none. Give another file.")
        self.path, self.live, self.problem = path, format is not None, ""
        self.stream = self.container.streams.video[0]
        if self.stream.width * self.stream.height > MAX_PIXELS:
            self.container.close()
            raise ValueError(
                f"Expected frames of at most {MAX_PIXELS / 1e6:.3g} megapixels, but {path} has larger ones. Reduce it first."
            )
        self.stream.thread_type = "AUTO"
        self.begun = False
        self.count = self.stream.frames
        self.rate = Fraction(self.stream.average_rate or 25)
        guessed = Fraction(self.stream.base_rate or self.rate)
        self.base_rate = guessed if self.rate <= guessed <= MAX_RATE else self.rate
        self.time_base = Fraction(self.stream.time_base or 1 / self.rate)
        self.promised = self._seconds()
        self.damaged = self.discarded = 0
        self.has_sound = bool(self.container.streams.audio) and not self.live

    def _seconds(self) -> float:
        """Return how long the images last by the header, 0 where it does not tell; Matroska and WebM count no frames."""
        clock = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", self.stream.metadata.get("DURATION", ""))
        if clock:
            return 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3])
        alone = len(self.container.streams) == 1 and not self.live
        return (self.container.duration or 0) / 1e6 if alone else 0.0

    def _begin(self) -> None:
        """Open the file again where a pass has closed it."""
        if self.begun:
            self.container = import_av().open(self.path)
            self.stream = self.container.streams.video[0]
            self.stream.thread_type = "AUTO"
            self.damaged = self.discarded = 0
        self.begun = not self.live

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]:
        """Decode frames in order of display; times never go back. Each pass begins at the start of the file."""
        self._begin()
        read, pts, first = 0, -1, 0
        matrix, reformatter = (1, 0, 0, 1), import_av().video.reformatter.VideoReformatter()
        step = max(round(1 / (self.rate * self.time_base)), 1)
        with self.container:
            for frame in self._decoded():
                if self.live and not read:
                    first = frame.pts or 0  # a camera counts from when it was switched on
                pts = max(frame.pts - first, pts + 1) if frame.pts is not None else pts + step if read else 0
                read += 1
                # A frame whose side data was read lives until Python looks for cycles. A key frame tells for those after it.
                if read == 1 or (frame.key_frame and not self.live):
                    matrix = matrix_of(frame)
                image = upright(rgb_of(frame, reformatter), matrix)
                stamp = Stamp(pts, self.time_base, getattr(frame, "duration", None) or 0)
                yield torch.from_numpy(np.ascontiguousarray(image)), stamp
        # AVI counts the steps at which it shows no new frame too.
        reached = pts + 1 if "avi" in self.container.format.name else read + self.discarded
        missing = self.promised - float((pts + 1.5 * step) * self.time_base) if read and not self.count else 0.0
        if reached < self.count or self.damaged or missing > 0.1:
            self.problem = (
                f"the video is damaged or cut off: {read} of {self.count or 'an unknown number of'} frames read"
            )

    def _decoded(self) -> Iterator[Any]:
        errors = import_av().error.FFmpegError
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except errors:
                self.damaged += 1
                return
            if packet is None:
                return
            self.discarded += packet.is_discard  # what an edit list leaves out
            try:
                yield from packet.decode()
            except errors:
                self.damaged += 1


class AnimationSource:
    """The frames of an animated GIF, WebP, PNG or AVIF with their times, or the one frame of another image."""

    live, has_sound = False, False

    def __init__(self, path: str) -> None:
        self.path, self.problem, self.count = path, "", count_frames(path)
        self.time_base = Fraction(1, 1000)
        self.rate = self.base_rate = Fraction(25)
        times = [seconds or UNTIMED for _, seconds in read_frames(path)] if self.count > 1 else []
        if times:
            self.rate = Fraction(len(times) / sum(times)).limit_denominator(1001)
            self.base_rate = Fraction(1 / min(times)).limit_denominator(1001)

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]:
        seconds = 0.0
        for image, duration in read_frames(self.path):
            begin, seconds = seconds, seconds + (duration or UNTIMED)
            length = round(1000 * (seconds - begin))
            yield image[0, ..., :3], Stamp(round(1000 * begin), self.time_base, length)


class FolderSource:
    """The images of a folder in natural order of their names, shown at `rate` a second."""

    live, has_sound = False, False

    def __init__(self, folder: pathlib.Path, rate: float = 25.0) -> None:
        check_range("fps", rate, 0.01, 1000)
        self.path, self.files = str(folder), image_files(folder, name="input")
        self.count, self.rate, self.problem = len(self.files), Fraction(rate).limit_denominator(1001), ""
        self.base_rate, self.time_base = self.rate, 1 / self.rate

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]:
        for i, path in enumerate(self.files):
            yield read_image(path)[0, ..., :3], Stamp(i, self.time_base, 1)


def platform_of() -> str:
    """Return the system whose way to cameras counts here: "linux", "darwin" or "win32"."""
    return next((name for name in CAMERA_FORMATS if sys.platform.startswith(name)), "linux")


def is_webcam(source: str) -> bool:
    """Return whether a source's name means a webcam: "webcam", "webcam:1"."""
    return source == "webcam" or source.startswith("webcam:")


def open_source(source: str, rate: float = 25.0) -> FrameSource:
    """Open a video, an image, a folder of images, or "webcam" ("webcam:1" for the second); raises ValueError with the reason."""
    if is_webcam(source):
        platform = platform_of()
        return VideoSource(CAMERA_NAMES[platform].format(source.partition(":")[2] or "0"), CAMERA_FORMATS[platform])
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return FolderSource(path, rate)
    if not path.is_file():
        raise ValueError(
            f"Expected a video or a folder of images at {path}, but there is no such file. Check the path."
        )
    return AnimationSource(str(path)) if path.suffix.lower() in IMAGE_SUFFIXES else VideoSource(str(path))


def reason(error: BaseException) -> str:
    """Return why something failed: what FFmpeg or the system say, or the first line of the error, without its full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0].rstrip(".")
