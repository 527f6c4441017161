"""What was written is decoded again: order, number, size, colours and times of frames, and sound, for every kind of output."""

from __future__ import annotations

import logging
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from slipstream.core.images import save_image
from slipstream.stream import sinks
from slipstream.stream.sinks import ANIMATIONS, CONTAINERS, check_sink, durations, open_sink
from slipstream.stream.video import FrameSource, Stamp, open_source
from slipstream_tests.conftest import ROOT
from slipstream_tests.stream.clips import UNEVEN, av, make_video, sound_of, times_of
from torch import Tensor

# What a container counts time in, in seconds.
CLOCK = {".mkv": 1e-3, ".webm": 1e-3, ".gif": 1e-2, ".webp": 1e-3, ".apng": 1e-3, ".png": 1e-3}
FILES = (*CONTAINERS, *ANIMATIONS)


class Clip:
    """Frames of one colour each, of which blue tells the number, at multiples of 1/30 s."""

    live, has_sound, problem, path = False, False, "", ""
    time_base, base_rate = Fraction(1, 90000), Fraction(30)

    def __init__(self, size: tuple[int, int] = (32, 48), times: list[int] = UNEVEN) -> None:
        self.size, self.times, self.count = size, times, len(times)
        self.rate = Fraction(30 * len(times), times[-1] + 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Stamp]]:
        ends = [*self.times[1:], self.times[-1] + 1]
        for i, (time, end) in enumerate(zip(self.times, ends)):
            yield self.colour(i).expand(*self.size, 3), Stamp(3000 * time, self.time_base, 3000 * (end - time))

    def colour(self, index: int) -> Tensor:
        return torch.tensor([200, 40, 20 + 220 * index // len(self.times)], dtype=torch.uint8)


def copy(source: FrameSource, output: pathlib.Path | str) -> None:
    with open_sink(str(output), source) as sink:
        for image, stamp in source:
            sink.write(image, stamp)


def check_frames(output: pathlib.Path, clip: Clip, tolerance: float) -> None:
    frames = [image.float() * (255 if image.is_floating_point() else 1) for image, _ in open_source(str(output))]
    assert [tuple(frame.shape) for frame in frames] == [(*clip.size, 3)] * clip.count
    for index, frame in enumerate(frames):
        assert float((frame - clip.colour(index)).abs().mean()) < tolerance, index


@pytest.mark.parametrize("size", [(32, 48), (31, 47), (32, 47), (31, 48), (1, 1)])
@pytest.mark.parametrize("suffix", FILES)
def test_every_file_gives_back_its_frames(tmp_path: pathlib.Path, suffix: str, size: tuple[int, int]) -> None:
    clip, output = Clip(size), tmp_path / f"out{suffix}"
    open_sink(str(output), clip).check(*size)
    copy(clip, output)
    check_frames(output, clip, 4)
    times = [stamp.seconds for _, stamp in open_source(str(output))]
    np.testing.assert_allclose(times, [t / 30 for t in UNEVEN], atol=CLOCK.get(suffix, 1e-9) * 0.51 + 1e-9)
    assert open_source(str(output)).problem == ""
    assert [p.name for p in tmp_path.iterdir()] == [output.name]


@pytest.mark.parametrize("suffix", FILES)
def test_one_frame(tmp_path: pathlib.Path, suffix: str) -> None:
    clip = Clip(times=[0])
    copy(clip, tmp_path / f"out{suffix}")
    check_frames(tmp_path / f"out{suffix}", clip, 4)


@pytest.mark.parametrize(("suffix", "encoder"), [(".mp4", "libopenh264"), (".mp4", "mpeg4"), (".webm", "libvpx")])
@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_encoders_of_other_builds(
    tmp_path: pathlib.Path, suffix: str, encoder: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg may lack an encoder: the next one of the container gives the same frames at the same times."""
    has = sinks._has_encoder
    if not has(encoder):
        pytest.skip(f"this build of FFmpeg has no {encoder}")
    better = CONTAINERS[suffix].video[: CONTAINERS[suffix].video.index(encoder)]
    monkeypatch.setattr(sinks, "_has_encoder", lambda name: name not in better and has(name))
    clip = Clip(size)
    assert sinks.encoder_of(suffix) == encoder
    open_sink(str(tmp_path / f"out{suffix}"), clip).check(*size)
    copy(clip, tmp_path / f"out{suffix}")
    check_frames(tmp_path / f"out{suffix}", clip, 4)
    np.testing.assert_allclose(times_of(tmp_path / f"out{suffix}"), [t / 30 for t in UNEVEN], atol=1e-3)


def test_hd_frames_keep_their_colours(tmp_path: pathlib.Path) -> None:
    """Decoders take BT.709 for large frames and BT.601 for small ones, unless the file tells."""
    for suffix in (".mp4", ".webm"):
        clip = Clip((720, 1280), [0])
        copy(clip, tmp_path / f"out{suffix}")
        check_frames(tmp_path / f"out{suffix}", clip, 4)
        with av.open(str(tmp_path / f"out{suffix}")) as file:
            assert int(next(file.decode(video=0)).colorspace) == 1


@pytest.mark.parametrize(
    ("name", "first"), [("frames", "000000.png"), ("shot_%03d.jpg", "shot_000.jpg"), ("%d.webp", "0.webp")]
)
def test_folders_and_patterns_of_images(tmp_path: pathlib.Path, name: str, first: str) -> None:
    clip, places = Clip((31, 47)), tmp_path / "out"
    places.mkdir()
    copy(clip, places / name)
    folder = places / name if name == "frames" else places
    assert (folder / first).is_file()
    check_frames(folder, clip, 4)


def test_images_of_an_earlier_run_are_named(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    copy(Clip(times=[0, 1, 2]), tmp_path / "out")
    assert not caplog.text
    copy(Clip(times=[0]), tmp_path / "out")
    assert "holds images of an earlier run behind these 1" in caplog.text


# -- times


def test_durations_do_not_drift() -> None:
    steps = durations([i / 30 for i in range(301)], 100)
    assert sum(steps) == 1000
    assert set(steps) == {3, 4}


@pytest.mark.parametrize("suffix", ANIMATIONS)
def test_animations_show_each_frame_for_its_time(tmp_path: pathlib.Path, suffix: str) -> None:
    copy(Clip(), tmp_path / f"out{suffix}")
    shown, unit = [], 10 if suffix == ".gif" else 1
    with Image.open(tmp_path / f"out{suffix}") as file:
        assert file.info.get("loop", 0) == 0
        for index in range(file.n_frames):
            file.seek(index)
            file.load()
            shown.append(file.info["duration"])
    seconds = np.diff([*UNEVEN, 31]) / 30
    np.testing.assert_allclose(shown, 1000 * seconds, atol=unit)
    assert sum(shown) == pytest.approx(1000 * 31 / 30, abs=unit)


def test_frames_too_short_for_a_gif_are_named(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = Clip(times=list(range(12)))
    clip.time_base = Fraction(1, 360000)  # 120 frames a second
    copy(clip, tmp_path / "out.gif")
    assert "20 ms or more: it plays slower" in caplog.text
    assert len(times_of(tmp_path / "out.gif")) == 12


@pytest.mark.parametrize("name", ["in.gif", "in.webp", "in.apng"])
def test_animated_images_are_read_with_their_times(tmp_path: pathlib.Path, name: str) -> None:
    frames = [Image.new("RGB", (20, 10), (i * 20, 0, 0)) for i in range(5)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=[100, 100, 500, 100, 200])
    source = open_source(str(tmp_path / name))
    assert times_of(tmp_path / name) == [0.0, 0.1, 0.2, 0.7, 0.8]
    copy(source, tmp_path / "out.webp")
    assert [s.length for _, s in open_source(str(tmp_path / "out.webp"))] == [100, 100, 500, 100, 200]


# -- sound


def sound_packets(path: pathlib.Path) -> list[bytes]:
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(audio=0) if packet.size]


@pytest.mark.parametrize("suffix", [".mp4", ".m4v", ".mov", ".mkv"])
def test_sound_is_copied_bit_for_bit(tmp_path: pathlib.Path, suffix: str) -> None:
    source = make_video(tmp_path / "in.mp4")
    copy(open_source(str(source)), tmp_path / f"out{suffix}")
    wanted = sound_packets(source)
    assert len(wanted) > 15
    # Matroska has no place for the packet that prepares AAC's decoder: everything else would begin later.
    assert sound_packets(tmp_path / f"out{suffix}") == wanted[suffix == ".mkv" :]
    np.testing.assert_allclose(times_of(tmp_path / f"out{suffix}"), times_of(source), atol=1e-3)


@pytest.mark.parametrize(("suffix", "codec"), [(".webm", "opus"), (".avi", "mp3"), (".mp4", "aac")])
def test_sound_is_encoded_again_where_the_file_cannot_hold_it(tmp_path: pathlib.Path, suffix: str, codec: str) -> None:
    source = make_video(tmp_path / "in.mkv", sound="pcm_s16le" if suffix == ".mp4" else "aac")
    copy(open_source(str(source)), tmp_path / f"out{suffix}")
    with av.open(str(tmp_path / f"out{suffix}")) as file:
        assert file.streams.audio[0].codec_context.codec.canonical_name == codec
    got, wanted = (sound_of(path).astype(np.float64) for path in (tmp_path / f"out{suffix}", source))
    assert len(got) == pytest.approx(len(wanted), abs=4096)
    scale = (0.95 if codec == "mp3" else 1) / (32768 if suffix == ".mp4" else 1)  # LAME scales, against clipping
    assert got[5000:-5000].std() == pytest.approx(wanted[5000:-5000].std() * scale, rel=0.02)


def test_files_without_sound_warn_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_video(tmp_path / "in.mp4")
    for name in ("out.gif", "frames"):
        caplog.clear()
        copy(open_source(str(source)), tmp_path / name)
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert "has sound" in caplog.text


def test_sound_without_an_encoder_warns(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has = sinks._has_encoder
    monkeypatch.setattr(sinks, "_has_encoder", lambda name: name not in ("libopus", "libvorbis") and has(name))
    copy(open_source(str(make_video(tmp_path / "in.mp4"))), tmp_path / "out.webm")
    assert "it is left out" in caplog.text
    assert len(times_of(tmp_path / "out.webm")) == 12


def test_sound_ends_with_the_frames(tmp_path: pathlib.Path) -> None:
    opened = open_source(str(make_video(tmp_path / "in.mp4", range(60))))
    with open_sink(str(tmp_path / "out.mp4"), opened) as sink:
        for image, stamp in list(opened)[:15]:
            sink.write(image, stamp)
    assert len(sound_of(tmp_path / "out.mp4")) / 48000 == pytest.approx(0.5, abs=0.05)


# -- what is refused, and what a failed write leaves


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.xyz", r"Expected `out` to be a video \(\.mp4, .*an animated image \(\.gif.*a folder.*but got 'out.xyz'"),
        ("out.jpg", r"but got 'out.jpg'"),
        ("no/out.mp4", "there is no folder"),
        ("no/frames", "there is no folder"),
        ("no/%d.png", "there is no folder"),
        ("there.mp4", "there.mp4 is a folder"),
        ("file", "is a file"),
        ("%d_%d.png", "one number"),
        ("in.mp4", "another place than `input`"),
        ("../{name}/in.mp4", "another place than `input`"),
    ],
)
def test_bad_outputs_are_one_sentence(tmp_path: pathlib.Path, output: str, message: str) -> None:
    (tmp_path / "there.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "in.mp4").write_text("never opened")
    with pytest.raises(ValueError, match=message) as caught:
        check_sink(str(tmp_path / output.format(name=tmp_path.name)), str(tmp_path / "in.mp4"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("output", ["in", "in/", "in/%05d.png", "in/all.png", "in/all.gif", "link", "link/%d.jpg"])
def test_the_folder_that_is_read_is_not_written(tmp_path: pathlib.Path, output: str) -> None:
    save_image(torch.zeros(1, 8, 8, 3), tmp_path / "in" / "1.png")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match="another place than `input`"):
        check_sink(f"{tmp_path}/{output}", str(tmp_path / "in"))
    check_sink(str(tmp_path / "in" / "clip.mp4"), str(tmp_path / "in"))


@pytest.mark.parametrize(
    ("output", "refused"), [("", True), ("%06d.png", True), ("000000.png", True), ("all.png", False)]
)
def test_an_image_that_is_read_is_not_written(tmp_path: pathlib.Path, output: str, refused: bool) -> None:
    save_image(torch.zeros(1, 8, 8, 3), tmp_path / "000000.png")
    with pytest.raises(ValueError, match="another place than `input`") if refused else nullcontext():
        check_sink(f"{tmp_path}/{output}", str(tmp_path / "000000.png"))


def test_a_build_without_encoders_names_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(sinks, "_has_encoder", lambda name: name == "mpeg4")
    check_sink(str(tmp_path / "out.mp4"))
    with pytest.raises(ValueError, match=r"Expected an encoder for \.webm.* Use \.mp4, "):
        check_sink(str(tmp_path / "out.webm"))


@pytest.mark.parametrize("name", ["out.webp", "out.webm", "out.avi", "out.gif"])
def test_a_size_that_a_format_cannot_hold_is_refused_beforehand(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(ValueError, match="but got 70000x8"):
        open_sink(str(tmp_path / name), Clip()).check(8, 70000)


def test_an_odd_size_of_h264_is_named(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    open_sink(str(tmp_path / "out.mp4"), Clip()).check(32, 48)
    open_sink(str(tmp_path / "out.webm"), Clip()).check(31, 47)
    assert not caplog.text
    open_sink(str(tmp_path / "out.mp4"), Clip()).check(31, 48)
    assert "4:4:4" in caplog.text


def interrupted(output: pathlib.Path, source: FrameSource, frames: int) -> None:
    with open_sink(str(output), source) as sink:
        for image, stamp in source:
            if sink.written == frames:
                raise RuntimeError("no")
            sink.write(image, stamp)


@pytest.mark.parametrize("suffix", FILES)
def test_frames_before_an_error_elsewhere_become_a_whole_file(
    tmp_path: pathlib.Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At its own name if nothing is there, else beside the earlier file."""
    output = tmp_path / f"out{suffix}"
    with pytest.raises(RuntimeError, match="no"):
        interrupted(output, Clip(), 0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="no"):
        interrupted(output, Clip(), 5)
    assert len(times_of(output)) == 5
    assert f"5 frames are in {output}" in caplog.text
    earlier = output.read_bytes()
    with pytest.raises(RuntimeError, match="no"):
        interrupted(output, Clip(), 3)
    (other,) = (path for path in tmp_path.iterdir() if path != output)
    assert other.name.startswith("out.part-")
    assert len(times_of(other)) == 3
    assert f"3 frames are in {other}" in caplog.text
    assert output.read_bytes() == earlier


def test_videos_of_older_builds_are_fragments(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an older FFmpeg an MP4 stays as it grew; frames, times and sound are the same."""
    monkeypatch.setattr(sinks, "_fragments", lambda: "delay_moov+default_base_moof")
    source = make_video(tmp_path / "in.mp4", range(60))
    copy(open_source(str(source)), tmp_path / "out.mp4")
    assert b"moof" in (tmp_path / "out.mp4").read_bytes()
    assert sound_packets(tmp_path / "out.mp4") == sound_packets(source)
    np.testing.assert_allclose(times_of(tmp_path / "out.mp4"), times_of(source), atol=1e-3)


IMPORTED = """
import importlib.util, os, sys, torch
name, source, *outputs = sys.argv[1:]
spec = importlib.util.spec_from_file_location("slipstream", name + "/__init__.py", submodule_search_locations=[name])
sys.modules["slipstream"] = importlib.util.module_from_spec(spec)
from slipstream.stream.sinks import open_sink
from slipstream.stream.video import open_source
"""
KILLED = f"""{IMPORTED}
kept = [open_sink(output, open_source(source)).__enter__() for output in outputs]
for sink in kept:
    for image, stamp in open_source(source):
        sink.write(image, stamp)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_process_leaves_a_readable_video_and_the_earlier_one(tmp_path: pathlib.Path) -> None:
    source, folder = make_video(tmp_path / "in.mp4", range(150)), tmp_path / "out"
    folder.mkdir()
    animations = [folder / f"anim{suffix}" for suffix in ANIMATIONS]
    outputs = [folder / f"out{suffix}" for suffix in CONTAINERS]
    for output in (*outputs, *animations):
        output.write_text("earlier")
    command = [sys.executable, "-c", KILLED, str(ROOT), str(source), *map(str, (*outputs, *animations))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    frames = list(folder.glob("anim.part-*"))
    assert len(frames) == len(animations)
    assert {len(times_of(part)) for part in frames} == {150}
    for output in outputs:
        (part,) = folder.glob(f"out.part-*{output.suffix}")
        assert len(times_of(part)) >= 60, output.suffix
        assert output.read_text() == "earlier"
    assert {output.read_text() for output in animations} == {"earlier"}


FULL_DISK = f"""{IMPORTED}
import resource
for limit, output in zip(outputs[::2], outputs[1::2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
    opened = open_source(source)
    try:
        with open_sink(output, opened) as sink:
            for image, stamp in opened:
                sink.write(torch.randint(256, image.shape, dtype=torch.uint8), stamp)
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files are limited by setrlimit")
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    """In a process of its own, because FFmpeg used to crash it; what was on the disk by then can be watched."""
    source = make_video(tmp_path / "in.mp4", range(150))
    tried = [
        (limit, tmp_path / str(limit) / f"out{suffix}") for limit in (0, 100_000) for suffix in (*CONTAINERS, ".gif")
    ]
    for _, output in tried:
        output.parent.mkdir(exist_ok=True)
        output.write_text("old")
    command = [sys.executable, "-c", FULL_DISK, str(ROOT), str(source)]
    command += [str(word) for pair in tried for word in pair]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for (limit, output), line in zip(tried, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"Could not write {output} (")
        assert output.read_text() == "old"
        parts = list(output.parent.glob(f"out.part-*{output.suffix}"))
        assert len(parts) == (limit > 0 and output.suffix != ".gif")
        assert all(len(times_of(part)) >= 20 for part in parts), output


def test_an_animation_that_cannot_be_written_leaves_its_frames(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks, "save_animation", full)
    output = tmp_path / "out.gif"
    output.write_text("earlier")
    with pytest.raises(OSError, match=r"Could not write .*No space left.* What was there before is unchanged"):
        copy(Clip(), output)
    (frames,) = (path for path in tmp_path.iterdir() if path != output)
    assert f"its {Clip().count} frames are in {frames}" in caplog.text
    assert len(times_of(frames)) == Clip().count
    assert output.read_text() == "earlier"


def test_an_animation_keeps_nothing_beside_it(tmp_path: pathlib.Path) -> None:
    sink = open_sink(str(tmp_path / "out.webp"), Clip())
    with sink:
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    copy(Clip(), tmp_path / "out.webp")
    assert [path.name for path in tmp_path.iterdir()] == ["out.webp"]


def test_what_a_thread_writes_after_the_end_is_ignored(tmp_path: pathlib.Path) -> None:
    """A second Ctrl-C leaves the context while the stream's threads still run."""
    sink, frames = open_sink(str(tmp_path / "out.mp4"), Clip()), list(Clip())
    with sink:
        sink.write(*frames[0])
    sink.write(*frames[1])
    assert sink.written == 1
    assert len(times_of(tmp_path / "out.mp4")) == 1
