"""Where frames go: a video file with the source's sound, an animated image, numbered images, or a camera. Checked before the work."""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..core.files import Draft, check_folder, check_output, naming, unwritten
from ..core.images import IMAGE_SUFFIXES, opened_image, save_image
from ..core.tensors import image_to_numpy
from .video import FrameSource, Stamp, import_av, reason
from .virtual_camera import NAME as CAMERA
from .virtual_camera import VirtualCameraSink, device_of, import_pyvirtualcam, is_virtual_camera

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

log = logging.getLogger(__name__)


class FrameSink(Protocol):
    """Takes IMAGE (H, W, 3) frames of one size, in order, within its context; leaving it tells `place`, where they are kept."""

    written: int

    @property
    def place(self) -> pathlib.Path | None: ...

    def check(self, height: int, width: int) -> None:
        """Raise ValueError when frames of this size cannot be written."""

    def __enter__(self) -> FrameSink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, image: Tensor, stamp: Stamp) -> None: ...


@dataclass(frozen=True)
class Container:
    """What a kind of video file holds: encoders, best first, and codecs of sound that are copied into it as they are.

    No `copied` stands for every codec that FFmpeg can store. `constant` files have no times, only a frame rate. Files without
    `priming` would be shifted as a whole by sound that begins before 0, as copied AAC does.
    """

    video: tuple[str, ...]
    sound: tuple[str, ...]
    copied: tuple[str, ...] = ()
    constant: bool = False
    priming: bool = True


H264 = ("libx264", "libopenh264", "mpeg4")
PCM = ("pcm_s16le", "pcm_s24le")
CONTAINERS = {
    ".mp4": Container(H264, ("aac",), ("aac", "mp3", "ac3", "eac3", "alac", "opus")),
    ".m4v": Container(H264, ("aac",), ("aac", "ac3", "alac")),
    ".mov": Container(H264, ("aac",), ("aac", "mp3", "ac3", "eac3", "alac", *PCM)),
    ".mkv": Container(H264, ("aac",), priming=False),
    ".webm": Container(("libvpx-vp9", "libvpx"), ("libopus", "libvorbis"), ("opus", "vorbis")),
    # AVI holds no times: frames are shown in the order, and at the step, in which they are stored, which B-frames would upset.
    # H.264 is read back one step late, as its readers expect B-frames.
    ".avi": Container(("mpeg4",), ("libmp3lame", "ac3"), ("mp3", "ac3", "pcm_s16le"), constant=True),
}
OPTIONS = {
    "libx264": {"crf": "18", "preset": "veryfast"},
    "libvpx-vp9": {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"},
    "libvpx": {"crf": "10", "deadline": "good", "cpu-used": "4"},
    "mpeg4": {"flags": "+qscale", "global_quality": "236", "bf": "0"},  # quantiser 2 of 31, in FFmpeg's unit of 118
}
# Bits per pixel and frame, where quality alone cannot be asked for.
BITS = {"libopenh264": 0.25, "libvpx": 0.5}
LEAST_BITS = 1_000_000  # a second
# The other codecs do not store which matrix was used: decoders assume BT.601.
STORES_MATRIX = ("libx264", "libvpx-vp9")
ITU709, ITU601, LIMITED = 1, 5, 1  # of swscale
BT709 = 1  # of libavcodec

ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".apng": "PNG", ".png": "PNG"}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
NUMBER = re.compile(r"%0?\d*d")
POSSIBLE = (
    f"a video ({', '.join(CONTAINERS)}), an animated image ({', '.join(ANIMATIONS)}), a folder, a pattern of images such as "
    f"frames/%05d.png, or {CAMERA}"
)


def check_sink(output: str, source: str = "") -> None:
    """Raise ValueError, with what is possible, unless frames of `source` (a path or "webcam") can be written to `output`."""
    path = pathlib.Path(output).expanduser()
    kind = _kind(output)
    if kind == CAMERA:
        import_pyvirtualcam()
        return
    if _overwrites(path, kind, pathlib.Path(source).expanduser()):
        raise ValueError(f"Expected `out` to be another place than `input`, but both are {source}. Choose a new name.")
    if kind == "folder":
        if path.exists() and not path.is_dir():
            raise ValueError(f"Expected `out` to be {POSSIBLE}, but {path} is a file. Choose another name.")
        check_folder("out", path if path.is_dir() else path.parent)
        return
    check_output("out", path)
    if kind == "video":
        encoder_of(path.suffix.lower())
    elif kind == "animation":
        _check_animation(path.suffix.lower())


def _overwrites(output: pathlib.Path, kind: str, source: pathlib.Path) -> bool:
    """Tell whether writing to `output` could overwrite what is read: the file itself, or an image of its folder."""

    def same(place: pathlib.Path, other: pathlib.Path) -> bool:
        return place.exists() and os.path.samefile(place, other)

    if not source.exists() or kind == "video":
        return source.exists() and same(output, source)
    written = output if kind == "folder" else output.parent
    if source.is_dir():
        return same(written, source)
    numbered = kind in ("folder", "pattern") and source.suffix.lower() in IMAGE_SUFFIXES
    return same(output, source) or (numbered and same(written, source.parent))


def _kind(output: str) -> str:
    if is_virtual_camera(output):
        return CAMERA
    path = pathlib.Path(output).expanduser()
    suffix = path.suffix.lower()
    if NUMBER.search(path.name) and suffix in IMAGES:
        with suppress(ValueError, TypeError):
            return "pattern" if path.name % 1 else ""
        raise ValueError(f"Expected one number such as %05d in `out`, but got {path.name!r}.")
    if suffix in CONTAINERS:
        return "video"
    if suffix in ANIMATIONS:
        return "animation"
    if not suffix or path.is_dir() or output.endswith(("/", os.sep)):
        return "folder"
    raise ValueError(f"Expected `out` to be {POSSIBLE}, but got {path.name!r}. Choose another ending.")


def open_sink(output: str, source: FrameSource, live: bool = False) -> FrameSink:
    """Return where frames go; see `check_sink` for what is possible and what is refused.

    `live`: a camera shows each frame as it comes, in place of each for its time.
    """
    check_sink(output, source.path)
    path, kind = pathlib.Path(output).expanduser(), _kind(output)
    if kind == "video":
        return VideoSink(path, source)
    if source.has_sound:
        where = "a virtual camera" if kind == CAMERA else path.suffix or "a folder"
        log.warning("The input has sound, which %s cannot hold: it is left out.", where)
    if kind == CAMERA:
        return VirtualCameraSink(device_of(output), source, live)
    if kind == "animation":
        return AnimationSink(path, source)
    return ImagesSink(path / "%06d.png" if kind == "folder" else path)


def encoder_of(suffix: str) -> str:
    """Return the encoder for a kind of video file; raises ValueError when this build of FFmpeg has none."""
    for name in CONTAINERS[suffix].video:
        if _has_encoder(name):
            return name
    others = ", ".join(s for s, c in CONTAINERS.items() if any(map(_has_encoder, c.video)))
    raise ValueError(f"Expected an encoder for {suffix}, but this build of PyAV has none. Use {others or 'a folder'}.")


def _has_encoder(name: str) -> bool:
    av = import_av()
    with suppress(av.error.FFmpegError, ValueError):
        return bool(av.codec.Codec(name, "w"))
    return False


class ImagesSink:
    """Writes frames as numbered images: `pattern` is a path whose name has one number as in "%06d.png", counted from 0."""

    def __init__(self, pattern: pathlib.Path) -> None:
        self.folder, self.name, self.written = pattern.parent, pattern.name, 0
        self.place = self.folder

    def check(self, height: int, width: int) -> None:
        """Any size will do."""

    def __enter__(self) -> ImagesSink:
        self.folder.mkdir(exist_ok=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._at(self.written).exists():
            log.warning("%s holds images of an earlier run behind these %d.", self.folder, self.written)

    def _at(self, index: int) -> pathlib.Path:
        return self.folder / (self.name % index)

    def write(self, image: Tensor, stamp: Stamp) -> None:
        save_image(image[None], self._at(self.written))
        self.written += 1


class AnimationSink:
    """Writes frames as one animated GIF, WebP or PNG that repeats for ever.

    Until the end they are PNG files in a folder beside it, where they remain when the process is killed or the animation cannot be
    written. Frames that equal the one before become longer instead. Times are rounded to what the format counts in: 10 ms for GIF,
    at least 20 ms a frame, else 1 ms.
    """

    def __init__(self, path: pathlib.Path, source: FrameSource) -> None:
        self.path, self.place, self.rate, self.written = path, path, source.rate, 0
        self.format = ANIMATIONS[path.suffix.lower()]
        self.times: list[float] = []
        self.end = 0.0

    def check(self, height: int, width: int) -> None:
        """Raise ValueError when the format cannot hold this size."""
        from PIL import Image

        try:
            frame = Image.new("RGB", (width, height))
            save_animation(io.BytesIO(), self.format, frame.quantize(256) if self.format == "GIF" else frame, [], [100])
        except Exception as error:  # Pillow's writers raise what they meet
            raise ValueError(
                f"Expected frames that {self.path.suffix} can hold, but got {width}x{height} ({reason(error)}). "
                "Use another ending or a smaller `size`."
            ) from error

    def __enter__(self) -> AnimationSink:
        target = pathlib.Path(os.path.realpath(self.path))
        with naming(self.path):
            self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{target.stem[:50]}.part-", dir=target.parent))
        return self

    def _file(self, index: int) -> pathlib.Path:
        return self.folder / f"{index:06d}.png"

    def write(self, image: Tensor, stamp: Stamp) -> None:
        from PIL import Image

        file = self._file(self.written)
        with naming(self.path):
            try:
                Image.fromarray(image_to_numpy(image)).save(file, compress_level=1)
            except OSError:
                file.unlink(missing_ok=True)
                raise
        self.times.append(stamp.seconds)
        self.end = stamp.end(self.rate)
        self.written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.written:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        unit, least = (10, 2) if self.format == "GIF" else (1, 1)
        steps = durations([*self.times, self.end], 1000 / unit)
        if any(step < least for step in steps):
            log.warning("%s shows a frame for %d ms or more: it plays slower than its source.", self.path, least * unit)
        frames = KeptFrames([self._file(i) for i in range(self.written)], self.format == "GIF")
        draft = None
        try:
            draft = Draft(self.path, visible=True)
            with naming(self.path):
                save_animation(
                    draft.file, self.format, frames.first, frames.rest, [max(s, least) * unit for s in steps]
                )
                self.place = settle(draft, error, self.written)
        except BaseException:
            if draft is not None:
                draft.discard()
            self.place = self.folder
            log.warning("%s was not written: its %d frames are in %s.", self.path, self.written, self.folder)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class KeptFrames:
    """Frames in image files, read each time they are asked for: Pillow goes over them more than once."""

    files: list[pathlib.Path]
    palette: bool

    def __iter__(self) -> Iterator[PilImage]:
        for file in self.files:
            with opened_image(file) as image:
                yield image.quantize(256) if self.palette else image.copy()

    @property
    def first(self) -> PilImage:
        return next(iter(self))

    @property
    def rest(self) -> KeptFrames:
        return KeptFrames(self.files[1:], self.palette)


def settle(draft: Draft, error: BaseException | None, frames: int) -> pathlib.Path:
    """Give a video its name and return where it is; one that an error or Ctrl-C ended never replaces an earlier one."""
    place = draft.settle(error is None)
    if error is not None and not isinstance(error, KeyboardInterrupt):
        log.warning("%s was ended early: %d frames are in %s.", draft.path, frames, place)
    return place


def durations(times: list[float], per_second: float) -> list[int]:
    """Return the steps between ascending times in seconds, in whole units whose sum does not drift."""
    counts = [round((time - times[0]) * per_second) for time in times]
    return [after - before for before, after in zip(counts, counts[1:])]


def save_animation(
    file: Any, format: str, first: PilImage, rest: Iterable[PilImage], milliseconds: list[int]
) -> None:  # fmt: skip
    """Write frames of one size, each shown for its time, as an animation without end; `rest` may be gone over twice."""
    extra = {"WEBP": {"quality": 90}}.get(format, {})
    first.save(file, format=format, save_all=True, append_images=rest, duration=milliseconds, loop=0, **extra)


def _check_animation(suffix: str) -> None:
    from PIL import Image, features

    Image.init()
    if ANIMATIONS[suffix] not in Image.SAVE_ALL or (suffix == ".webp" and not features.check("webp")):
        raise ValueError(
            f"Expected an animation that Pillow can write, but this build cannot write {suffix}. Use .gif."
        )


class _Output:
    """The file of a video, for FFmpeg: after a write that failed the rest is dropped, because a muxer crashes on errors.

    What was on the disk by then stays as it is, to its last whole fragment.
    """

    def __init__(self, file: pathlib.Path) -> None:
        self.error: OSError | None = None
        self._end = 0
        self._raw = file.open("r+b", buffering=0)

    def write(self, data: Any) -> int:
        view = memoryview(data)
        done = 0
        try:
            while self.error is None and done < len(view):
                done += self._raw.write(view[done:])
        except OSError as error:
            self.error = error
        self._end = max(self._end, self._raw.tell()) if self._raw.seekable() else 0
        return len(view)

    def reserve(self, size: int) -> None:
        """Take the place of the index first: FFmpeg gives up the fragments before it writes it."""
        if self._raw.seekable() and self.error is None:
            at, end = self._raw.tell(), self._end
            self._raw.seek(end)
            self.write(bytes(size))
            self._end = end
            self._raw.seek(at)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def seekable(self) -> bool:
        return self._raw.seekable()

    def close(self) -> None:
        if self._raw.seekable():
            with suppress(OSError):
                self._raw.truncate(self._end)
        self._raw.close()


@functools.cache
def _fragments() -> str:
    """Return FFmpeg's flags for an MP4 that is readable while it grows: with one index at the end where FFmpeg can."""
    av = import_av()
    for flags in ("hybrid_fragmented+delay_moov", "delay_moov+default_base_moof"):
        with suppress(av.error.FFmpegError, ValueError):
            with av.open(io.BytesIO(), "w", format="mp4", options={"movflags": flags}) as trial:
                stream = trial.add_stream("mpeg4", rate=25)
                stream.height = stream.width = 16
                stream.pix_fmt = "yuv420p"
                trial.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
                trial.mux(stream.encode(None))
            return flags
    return ""


def _growing(suffix: str) -> dict[str, str]:
    """Return the options of a muxer that puts every second of video on the disk, readable without what follows."""
    options = {"flush_packets": "1"}
    if suffix in (".mkv", ".webm"):
        return {**options, "cluster_time_limit": "1000"}
    if suffix in (".mp4", ".m4v", ".mov"):
        return {**options, "movflags": _fragments(), "frag_duration": "1000000"}
    return options


class VideoSink:
    """Writes frames with their own times to a video file, and the sound of `source` beside them.

    The file grows under a name of its own, readable at any time, and replaces `path` at the end. After an error or a cancel
    the finished frames are at `path` if nothing was there, else beside it: `place` says where. Frames of odd size keep it:
    H.264 then stores all chroma samples (4:4:4), which not every player shows.
    """

    def __init__(self, path: pathlib.Path, source: FrameSource) -> None:
        self.path, self.source = path, source
        self.place = path
        self.suffix = path.suffix.lower()
        self.kind, self.encoder = CONTAINERS[self.suffix], encoder_of(self.suffix)
        self.written, self.end = 0, 0.0
        self._last = -1
        self._closed = False
        self._lock = threading.Lock()  # a second Ctrl-C may leave the context while a thread still writes
        self._video: Any = None
        self._sound: Sound | None = None

    def check(self, height: int, width: int) -> None:
        """Encode one frame of this size into memory; raises ValueError when container, encoder and size do not go together."""
        av = import_av()
        try:
            with av.open(io.BytesIO(), "w", format=_muxer(self.suffix)) as trial:
                stream = self._add_video(trial, height, width)
                trial.mux(stream.encode(self._frame(stream, torch.zeros(height, width, 3), 0)))
                trial.mux(stream.encode(None))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise ValueError(
                f"Expected frames that {self.encoder} can write to {self.suffix}, but got {width}x{height} ({reason(error)}). "
                "Use another ending or `size`."
            ) from error
        if height % 2 + width % 2 and self.encoder == "libx264":
            log.warning(
                "%dx%d is an odd size: %s is written as H.264 4:4:4, which browsers and QuickTime may not show. "
                "Use .webm or an even size where that matters.", width, height, self.path,
            )  # fmt: skip

    def __enter__(self) -> VideoSink:
        self._draft = Draft(self.path, visible=True)
        self._output = _Output(self._draft.file)
        options = {**_growing(self.suffix), **({"avoid_negative_ts": "disabled"} if self.kind.constant else {})}
        self.container = import_av().open(self._output, "w", format=_muxer(self.suffix), options=options)
        return self

    def _check_written(self) -> None:
        """Raise OSError when the file could not take what was written so far."""
        if self._output.error is not None:
            raise unwritten(self.path, self._output.error)

    def _add_video(self, container: Any, height: int, width: int) -> Any:
        odd = height % 2 or width % 2
        if odd and self.encoder == "libopenh264":
            self.encoder = "mpeg4"  # H.264 cannot crop 4:2:0 to an odd size, and this encoder writes nothing else
        base = self.source.time_base
        if self.kind.constant:
            base = 1 / self.source.base_rate
        elif self.encoder == "mpeg4" and base.denominator > 65535:
            base = Fraction(1, 30000)
        stream = container.add_stream(
            self.encoder, rate=self.source.base_rate if self.kind.constant else self.source.rate
        )
        stream.height, stream.width = height, width
        # 4:2:0 is what every player shows.
        stream.pix_fmt = "yuv444p" if odd and self.encoder == "libx264" else "yuv420p"
        stream.codec_context.time_base = base
        if self.encoder in BITS:
            bits = BITS[self.encoder] * height * width * max(float(self.source.rate), 1)
            stream.bit_rate = max(int(bits), LEAST_BITS)
        if self.encoder in STORES_MATRIX:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED
        stream.options = OPTIONS.get(self.encoder, {})
        return stream

    def _frame(self, stream: Any, image: Tensor, pts: int) -> Any:
        matrix = ITU709 if self.encoder in STORES_MATRIX else ITU601
        frame = import_av().VideoFrame.from_ndarray(image_to_numpy(image), format="rgb24")
        frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix)
        frame.pts, frame.time_base = pts, stream.codec_context.time_base
        return frame

    def write(self, image: Tensor, stamp: Stamp) -> None:
        """Encode one IMAGE (H, W, 3) to be shown at `stamp`."""
        with self._lock:
            if self._closed:
                return
            if self._video is None:
                self._start(*image.shape[:2])
            base = self._video.codec_context.time_base
            self._last = max(round(Fraction(stamp.pts) * stamp.time_base / base), self._last + 1)
            self.container.mux(self._video.encode(self._frame(self._video, image, self._last)))
            self.end = stamp.end(self.source.rate)
            if self._sound is not None:
                self._sound.copy_until(self.end)
            self._check_written()
            self.written += 1

    def _start(self, height: int, width: int) -> None:
        self._video = self._add_video(self.container, height, width)
        if self.source.has_sound:
            self._sound = Sound(self.source.path, self.container, self.kind)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock, ExitStack() as stack:
            self._closed = True
            stack.callback(self._settle, error)
            stack.callback(self._output.close)
            stack.callback(self.container.close)
            if self._sound is not None:
                stack.callback(self._sound.close)
            if self.written:
                self.container.mux(self._video.encode(None))
                if self._sound is not None:
                    self._sound.finish(self.end)
                self._output.reserve(64 * (1024 + self.written + int(100 * self.end)))

    def _settle(self, error: BaseException | None) -> None:
        """Give the finished file its name; raises OSError when a part of it could not be written."""
        if not self.written or (self._output.error is not None and not _is_readable(self._draft.file)):
            self._draft.discard()
        else:
            self.place = settle(self._draft, error or self._output.error, self.written)
        self._check_written()


def _is_readable(file: pathlib.Path) -> bool:
    """Return whether a video holds a frame that can be shown."""
    av = import_av()
    with suppress(av.error.FFmpegError, OSError, ValueError), av.open(str(file)) as video:
        return next(video.decode(video=0), None) is not None
    return False


def _muxer(suffix: str) -> str:
    """Return FFmpeg's name of a format: the file beside the target is not asked for it."""
    return {".mkv": "matroska", ".m4v": "mp4"}.get(suffix, suffix[1:])


class Sound:
    """The first audio stream of a file, into an open container: as it is where the container takes its codec, else encoded again.

    Where the container takes neither, the video stays silent, with a warning.
    """

    def __init__(self, path: str, container: Any, kind: Container) -> None:
        self.output, self.waiting = container, None
        self.input = import_av().open(path)
        self.source = self.input.streams.audio[0]
        codec = self.source.codec_context
        name = getattr(codec.codec, "canonical_name", codec.name)
        self.copied = name in (kind.copied or container.supported_codecs)
        self.begin = -math.inf if kind.priming or name == "opus" else 0
        encoder = next((n for n in kind.sound if _has_encoder(n)), None)
        if self.copied:
            self.stream = _copied_stream(container, self.source)
        elif encoder is not None:
            rate = 48000 if encoder == "libopus" else codec.sample_rate
            self.stream = container.add_stream(encoder, rate=rate)
            self.stream.codec_context.layout = "mono" if codec.channels == 1 else "stereo"
            log.info("The sound is %s, which this kind of file does not hold: it is written by %s.", name, encoder)
        else:
            self.stream = None
            log.warning("The sound is %s, which this kind of file cannot hold: it is left out.", name)
        self.packets = iter(()) if self.stream is None else self.input.demux(self.source)

    def close(self) -> None:
        self.input.close()

    def copy_until(self, seconds: float) -> None:
        """Write the sound before `seconds`, so that frames and sound lie close together in the file."""
        while (packet := self._next()) is not None:
            if float(packet.pts * packet.time_base) >= seconds:
                self.waiting = packet
                return
            self._write(packet)

    def _next(self) -> Any:
        """Return the next packet, or None where the sound ends or cannot be read further."""
        packet, self.waiting = self.waiting, None
        if packet is None:
            with suppress(import_av().error.FFmpegError):
                packet = next(self.packets, None)
        return None if packet is None or packet.pts is None else packet

    def _write(self, packet: Any) -> None:
        if self.copied:
            packet.stream = self.stream
            if packet.pts >= self.begin:
                self.output.mux(packet)
            return
        frames: list[Any] = []
        with suppress(import_av().error.FFmpegError):
            frames = packet.decode()
        for frame in frames:
            self.output.mux(self.stream.encode(frame))

    def finish(self, seconds: float) -> None:
        """Write the sound up to the end of the video."""
        self.copy_until(seconds)
        if self.stream is not None and not self.copied:
            self.output.mux(self.stream.encode(None))


def _copied_stream(container: Any, source: Any) -> Any:
    if hasattr(container, "add_stream_from_template"):
        return container.add_stream_from_template(source)
    return container.add_stream(template=source)
