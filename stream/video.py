"""Video files, picture folders and webcams in; video files with their sound, or picture folders, out (PyAV)."""

from __future__ import annotations

import logging
import pathlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.checks import check_range
from ..core.images import image_files, read_image, save_image
from ..core.tensors import image_to_numpy

log = logging.getLogger(__name__)

CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
CAMERA_NAMES = {"linux": "/dev/video{}", "darwin": "{}", "win32": "video={}"}


def import_av() -> Any:
    """Return PyAV; raises ValueError with the remedy when it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError("Expected PyAV for video, but it is not installed. Run: pip install av") from error
    return av


@dataclass(frozen=True)
class Stamp:
    """When a frame is shown: `pts` in units of `time_base` seconds."""

    pts: int
    time_base: Fraction

    @property
    def seconds(self) -> float:
        return float(self.pts * self.time_base)


class FrameSource(Protocol):
    """Frames, IMAGE (H, W, 3) in [0, 1] or uint8, with their times.

    `live` sources do not wait; `count` is the number of frames, 0 when nobody knows.
    """

    live: bool
    count: int
    rate: Fraction
    time_base: Fraction
    problem: str  # why reading ended early, or ""

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]: ...


def upright(picture: np.ndarray, rotation: int) -> np.ndarray:
    """Return a picture (H, W, C) turned counterclockwise by `rotation` degrees: phones film sideways and say so."""
    return np.rot90(picture, round(rotation / 90) % 4)


class VideoSource:
    """Frames of a video file or camera, uint8 IMAGE (H, W, 3); what is damaged is left out and said in `problem`."""

    def __init__(self, path: str, format: str | None = None) -> None:
        av = import_av()
        try:
            self.container = av.open(path, format=format)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise ValueError(f"Expected a video that can be read, but got {path} ({_reason(error)}).") from error
        if not self.container.streams.video:
            self.container.close()
            raise ValueError(f"Expected a video with pictures, but {path} has none. Give another file.")
        self.path, self.live, self.problem = path, format is not None, ""
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.count = self.stream.frames
        self.rate = Fraction(self.stream.average_rate or 25)
        self.time_base = Fraction(self.stream.time_base or 1 / self.rate)
        self.damaged = 0
        self.has_sound = bool(self.container.streams.audio) and not self.live

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]:
        """Decode frames in order of display; times never go back."""
        read, pts, first = 0, -1, 0
        step = max(round(1 / (self.rate * self.time_base)), 1)
        with self.container:
            for frame in self._decoded():
                if self.live and not read:
                    first = frame.pts or 0  # a camera counts from when it was switched on
                pts = max(frame.pts - first, pts + 1) if frame.pts is not None else pts + step if read else 0
                read += 1
                picture = upright(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0))
                yield torch.from_numpy(np.ascontiguousarray(picture)), Stamp(pts, self.time_base)
        if read < self.count or self.damaged:
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
            try:
                yield from packet.decode()
            except errors:
                self.damaged += 1


class FolderSource:
    """The images of a folder in natural order of their names, shown at `rate` a second."""

    live = False

    def __init__(self, folder: pathlib.Path, rate: float = 25.0) -> None:
        check_range("fps", rate, 0.01, 1000)
        self.files = image_files(folder, name="input")
        self.count, self.rate, self.problem = len(self.files), Fraction(rate).limit_denominator(1001), ""
        self.time_base = 1 / self.rate

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]:
        for i, path in enumerate(self.files):
            yield read_image(path)[0, ..., :3], Stamp(i, self.time_base)


def open_source(source: str, rate: float = 25.0) -> VideoSource | FolderSource:
    """Open a video file, a folder of pictures, or "webcam" ("webcam:1" for the second); raises ValueError with the reason."""
    if source == "webcam" or source.startswith("webcam:"):
        platform = next((p for p in CAMERA_FORMATS if sys.platform.startswith(p)), "linux")
        return VideoSource(CAMERA_NAMES[platform].format(source.partition(":")[2] or "0"), CAMERA_FORMATS[platform])
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return FolderSource(path, rate)
    if not path.is_file():
        raise ValueError(
            f"Expected a video or a folder of pictures at {path}, but there is no such file. Check the path."
        )
    return VideoSource(str(path))


class FolderSink:
    """Writes frames as numbered PNG files."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.written = folder, 0

    def __enter__(self) -> FolderSink:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def write(self, image: Tensor, stamp: Stamp) -> None:
        save_image(image[None], self.folder / f"{self.written:06d}.png")
        self.written += 1


class VideoSink:
    """Writes frames with their own times to a video file, and copies the sound of `source` beside them.

    The file is complete whenever the context is left, also by an error: what was written stays.
    """

    def __init__(self, path: pathlib.Path, source: FrameSource, quality: int = 18) -> None:
        self.path, self.source, self.quality = path, source, quality
        self.written = 0
        self.end = 0.0
        self._stack = ExitStack()
        self._video: Any = None
        self._sound: SoundCopy | None = None

    def __enter__(self) -> VideoSink:
        av = import_av()
        if not self.path.parent.is_dir():
            raise ValueError(
                f"Expected `output` in an existing folder, but {self.path.parent} does not exist. Make it."
            )
        try:
            self.container = self._stack.enter_context(av.open(str(self.path), "w"))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise ValueError(
                f"Expected `output` to be a video that can be written, but got {self.path} ({_reason(error)}). Use .mp4."
            ) from error
        return self

    def _start(self, height: int, width: int) -> None:
        av = import_av()
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._video = self.container.add_stream(codec, rate=self.source.rate)
        self._video.height, self._video.width = height, width
        # yuv420p is what every player shows, but it halves both sides.
        self._video.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        self._video.codec_context.time_base = self.source.time_base
        if codec == "libx264":
            self._video.options = {"crf": str(self.quality), "preset": "veryfast"}
        if isinstance(self.source, VideoSource) and self.source.has_sound:
            self._sound = self._stack.enter_context(SoundCopy(self.source.path, self.container))

    def write(self, image: Tensor, stamp: Stamp) -> None:
        """Encode one IMAGE (H, W, 3) to be shown at `stamp`."""
        av = import_av()
        if self._video is None:
            self._start(*image.shape[:2])
        frame = av.VideoFrame.from_ndarray(image_to_numpy(image), format="rgb24")
        frame.pts, frame.time_base = stamp.pts, stamp.time_base
        self.container.mux(self._video.encode(frame))
        self.written += 1
        self.end = stamp.seconds + float(1 / self.source.rate)
        if self._sound is not None:
            self._sound.copy_until(self.end)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._video is not None:
                self.container.mux(self._video.encode(None))
                if self._sound is not None:
                    self._sound.finish(self.end)


class SoundCopy:
    """Copies the first audio stream of a file into an open container, unchanged where the container takes its codec, else as AAC."""

    def __init__(self, path: str, container: Any) -> None:
        av = import_av()
        self.output = container
        self.input = av.open(path)
        self.source = self.input.streams.audio[0]
        codec = self.source.codec_context
        name = getattr(codec.codec, "canonical_name", codec.name)
        supported = getattr(container, "supported_codecs", None)
        self.copied = supported is None or name in supported
        if not self.copied:
            self.stream = container.add_stream("aac", rate=codec.sample_rate)
            log.info("The sound is %s, which this kind of file cannot hold: it is written as AAC.", name)
        elif hasattr(container, "add_stream_from_template"):
            self.stream = container.add_stream_from_template(self.source)
        else:
            self.stream = container.add_stream(template=self.source)
        self.packets = self.input.demux(self.source)
        self.waiting: Any = None

    def __enter__(self) -> SoundCopy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.input.close()

    def copy_until(self, seconds: float) -> None:
        """Write the sound before `seconds`, so that pictures and sound lie close together in the file."""
        errors = import_av().error.FFmpegError
        while True:
            try:
                packet = self.waiting or next(self.packets, None)
                self.waiting = None
                if packet is None or packet.dts is None:
                    return
                if float(packet.pts * packet.time_base) >= seconds:
                    self.waiting = packet
                    return
                self._write(packet)
            except errors:  # a damaged file: the sound ends where it cannot be read
                return

    def _write(self, packet: Any) -> None:
        if self.copied:
            packet.stream = self.stream
            self.output.mux(packet)
            return
        for frame in packet.decode():
            self.output.mux(self.stream.encode(frame))

    def finish(self, seconds: float) -> None:
        self.copy_until(seconds)
        if not self.copied:
            self.output.mux(self.stream.encode(None))


def open_sink(output: str, source: FrameSource) -> VideoSink | FolderSink:
    """Return where frames go: a video file, or a folder of PNG files when `output` has no suffix."""
    path = pathlib.Path(output).expanduser()
    if isinstance(source, VideoSource) and path.exists() and path.resolve() == pathlib.Path(source.path).resolve():
        raise ValueError("Expected `output` to be another file than `input`, but they are the same. Choose a new name.")
    return VideoSink(path, source) if path.suffix else FolderSink(path)


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
