"""Video in and out: times, sound, damage, folders; and the whole command on the bundled model."""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import pathlib
import re
import struct
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from slipstream.cli import build_parser, main
from slipstream.cli.stream import config_of, fitted
from slipstream.core.images import cover, read_image, save_image
from slipstream.stream import StreamConfig, video
from slipstream.stream.queues import StreamThreads
from slipstream.stream.video import FolderSource, Stamp, VideoSource, open_source, upright
from slipstream_tests.stream.clips import UNEVEN, av, make_video, sound_of, times_of

CLIP = pathlib.Path(__file__).resolve().parent.parent.parent / "assets" / "ball.mp4"


def test_folder_pictures_come_by_name_with_alpha_dropped(tmp_path) -> None:
    for name, value in (("b.png", 0.5), ("a.png", 0.0), ("c.png", 1.0)):
        save_image(torch.full((1, 4, 4, 4), value), tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path)
    assert [round(float(image.mean()), 1) for image, _ in source] == [0.0, 0.5, 1.0]
    assert all(image.shape == (4, 4, 3) for image, _ in source)


@pytest.mark.parametrize("keep", [0.5, 0.75])
def test_a_video_that_was_cut_off_gives_what_can_be_read(tmp_path, keep) -> None:
    whole = make_video(tmp_path / "whole.mkv", range(200), sound=None)
    data = whole.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: int(len(data) * keep)])
    source = VideoSource(str(tmp_path / "cut.mkv"))
    source.count = 200  # Matroska keeps no count; mp4 does, in the part that is cut off here
    count = len(list(source))
    assert 0 < count < 200
    assert f"{count} of 200 frames" in source.problem


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/task").exists(), reason="no /proc here: threads outside Python cannot be counted"
)
def test_reading_a_video_does_not_gather_threads(tmp_path) -> None:
    """Those of a conversion end with it, also where Python has not looked for cycles yet."""
    path = make_video(tmp_path / "in.mp4", range(120))
    gc.disable()
    try:
        threads = [len(os.listdir("/proc/self/task")) for _ in open_source(str(path))]
    finally:
        gc.enable()
    assert len(threads) == 120
    assert threads[-1] <= threads[1]


def test_a_video_is_read_again_from_its_start() -> None:
    source = VideoSource(str(CLIP))
    first, again = ([(float(image.float().mean()), stamp.pts) for image, stamp in source] for _ in range(2))
    assert len(first) > 10
    assert first == again
    assert not source.problem


def test_damage_inside_a_video_is_survived(tmp_path) -> None:
    path = make_video(tmp_path / "v.mkv", range(60), codec="mpeg4", sound=None)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 600] = bytes(600)
    path.write_bytes(data)
    assert 0 < len(list(VideoSource(str(path)))) <= 60


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.mp4", None, "no such file"),
        ("text.mp4", b"this is not a video", "can be read"),
        ("empty.mp4", b"", "can be read"),
    ],
)
def test_what_is_no_video_is_refused_in_one_sentence(tmp_path, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_sound_without_pictures_and_empty_folders_are_refused(tmp_path) -> None:
    with av.open(str(tmp_path / "tone.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="has none"):
        open_source(str(tmp_path / "tone.wav"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="but got none"):
        open_source(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("platform", "device", "remedy"),
    [
        ("linux", "/dev/no_such_camera7", "webcam:1 is the second"),
        ("darwin", "7", "Allow the camera"),
        ("win32", "video=7", "webcam:NAME"),
    ],
)
def test_a_camera_that_is_not_there_says_what_to_do(monkeypatch, platform: str, device: str, remedy: str) -> None:
    monkeypatch.setitem(video.CAMERA_NAMES, "linux", "/dev/no_such_camera{}")
    monkeypatch.setattr(video.sys, "platform", platform)
    with pytest.raises(ValueError, match=rf"Expected a camera, but {device} cannot be opened \(.+\)\. .*{remedy}"):
        open_source("webcam:7")


def test_fit_takes_the_middle() -> None:
    image = torch.zeros(40, 100, 3)
    image[:, 30:70] = 1
    assert torch.allclose(cover(image, 20, 20), torch.ones(20, 20, 3), atol=1e-5)
    assert cover(image, 40, 100) is image
    assert cover(image, 64, 24).shape == (64, 24, 3)


def test_the_first_frame_gives_the_size(tmp_path) -> None:
    for i, shape in enumerate([(37, 50), (80, 20)]):
        save_image(torch.rand(1, *shape, 3), tmp_path / f"{i}.png")
    frames, size = fitted(FolderSource(tmp_path), options())
    assert size == (37, 50)
    assert [image.shape for image, _ in frames] == [(37, 50, 3)] * 2
    frames, size = fitted(FolderSource(tmp_path), options("--size", "3x16", "--max-frames", "1"))
    assert size == (16, 3)
    assert [image.shape for image, _ in frames] == [(16, 3, 3)]


# -- the command

SMALL = ("--size", "32x32", "--steps", "1", "--guidance", "none")
FAINT = ("--strength", "0.05", "--steps", "1", "--guidance", "none")


def run(*options: str) -> int:
    return main(["stream", *options])


def test_command_on_the_bundled_clip(tmp_path, capsys, caplog) -> None:
    out = tmp_path / "out.mp4"
    with caplog.at_level(logging.INFO):
        options = ["--prompt", "a large red circle", "--max-frames", "5", "--steps", "2"]
        assert run("--input", str(CLIP), "--output", str(out), *options) == 0
    assert times_of(out) == times_of(CLIP)[:5]
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert len(sound_of(out)) > 10000
    assert "5 of 5 frames" in caplog.text
    assert "latency p50" in caplog.text
    bar = said.err
    assert "5/5" in bar
    assert re.search(r"\d\.\d fps, latency \d+ ms", bar)


@pytest.mark.parametrize("size", [(37, 50), (40, 48), (3, 2)])
def test_command_keeps_the_size_of_its_input(tmp_path, size) -> None:
    """Frames are padded for the network and cropped again; a bright edge shows that nothing is shifted."""
    image = torch.zeros(1, *size, 3)
    image[:, :, size[1] // 2 :] = 1
    save_image(image, tmp_path / "in" / "1.png")
    options = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *FAINT]
    assert run(*options) == 0
    result = read_image(tmp_path / "out" / "000000.png")
    assert result.shape == (1, *size, 3)
    if size[0] > 8:
        assert float((result - image).abs().mean()) < 0.1
    assert run(*options[:3], str(tmp_path / "out.mp4"), *FAINT, "--size", "51x21") == 0
    assert [frame.shape for frame, _ in open_source(str(tmp_path / "out.mp4"))] == [(21, 51, 3)]


def test_command_takes_frames_in_natural_order(tmp_path) -> None:
    for name, grey in ((1, 0.1), (2, 0.5), (10, 0.9)):
        save_image(torch.full((1, 64, 64, 3), grey), tmp_path / "in" / f"{name}.png")
    assert run("--input", str(tmp_path / "in"), "--out", str(tmp_path / "out.webm"), *FAINT) == 0
    first, second, third = (float(image.float().mean()) for image, _ in open_source(str(tmp_path / "out.webm")))
    assert first + 60 < second < third - 60


@pytest.mark.parametrize("fmt", ["yuv420p", "yuv420p10le", "yuv444p"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "tag"), [(1, 1), (5, 6), (5, 2)])
def test_colours_by_the_matrix_and_range_of_the_video(tmp_path, fmt, full, matrix, tag) -> None:
    """BT.709, BT.601, and no matrix named, which is BT.601; camera range and full range; 8 and 10 bits."""
    colour = np.full((32, 48, 3), (200, 40, 60), np.uint8)
    with av.open(str(tmp_path / "in.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, fmt
        frame = av.VideoFrame.from_ndarray(colour, format="rgb24")
        frame = frame.reformat(format=fmt, dst_colorspace=matrix, dst_color_range=2 if full else 1)
        stream.codec_context.colorspace = frame.colorspace = tag
        stream.codec_context.color_range = frame.color_range = 2 if full else 1
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    ((image, stamp),) = open_source(str(tmp_path / "in.mkv"))
    assert stamp.seconds == 0
    assert float((image.float() - torch.from_numpy(colour).float()).abs().max()) <= 3


def test_grey_videos_are_read_right(tmp_path) -> None:
    ramp = np.ascontiguousarray(np.broadcast_to(np.linspace(0, 255, 48).round().astype(np.uint8), (32, 48)))
    with av.open(str(tmp_path / "in.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "gray"
        frame = av.VideoFrame.from_ndarray(ramp, format="gray")
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    ((image, _),) = open_source(str(tmp_path / "in.mkv"))
    assert float((image.float() - torch.from_numpy(ramp)[..., None].float()).abs().max()) <= 1


def test_command_keeps_uneven_times_and_sound(tmp_path) -> None:
    source = make_video(tmp_path / "in.mp4", UNEVEN)
    assert run("--input", str(source), "--output", str(tmp_path / "out.mp4"), *SMALL) == 0
    assert times_of(tmp_path / "out.mp4") == [round(t / 30, 4) for t in UNEVEN]
    np.testing.assert_array_equal(sound_of(tmp_path / "out.mp4"), sound_of(source))


def test_command_on_a_camera(tmp_path, monkeypatch) -> None:
    """A file behind the camera's name, opened as a device: latest-wins, from its own first moment on, without sound."""
    times = range(100, 130)
    make_video(tmp_path / "camera1.mp4", times)
    monkeypatch.setattr(video, "CAMERA_FORMATS", dict.fromkeys(video.CAMERA_FORMATS, "mp4"))
    monkeypatch.setattr(video, "CAMERA_NAMES", dict.fromkeys(video.CAMERA_NAMES, str(tmp_path / "camera{}.mp4")))
    assert open_source("webcam:1").live
    assert not open_source("webcam:1").has_sound
    assert run("--input", "webcam:1", "--output", str(tmp_path / "out.mp4"), "--max-frames", "20", *SMALL) == 0
    got = times_of(tmp_path / "out.mp4")
    assert 1 <= len(got) <= 20
    assert got == sorted(set(got))
    assert got[-1] == pytest.approx(19 / 30, abs=1e-3)  # the newest frame is never the one that is dropped
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert not file.streams.audio


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, caplog, capsys) -> None:
    """The file is whole, and the statistics are logged, when a user ends a stream that would never end."""
    wait, pressed = StreamThreads.wait, []

    def press(self: StreamThreads, timeout: float | None = None) -> dict[str, float]:
        if not pressed:
            while self.statistics.frames_out < 3:
                time.sleep(0.01)
            pressed.append(1)
            raise KeyboardInterrupt
        return wait(self, timeout)

    def endless(self: FolderSource):
        for i in itertools.count():
            yield torch.full((32, 32, 3), 0.5), Stamp(i, self.time_base)

    monkeypatch.setattr(StreamThreads, "wait", press)
    monkeypatch.setattr(FolderSource, "__iter__", endless)
    save_image(torch.zeros(1, 32, 32, 3), tmp_path / "0.png")
    with caplog.at_level(logging.INFO):
        assert run("--input", str(tmp_path), "--output", str(tmp_path / "out.mp4"), *SMALL) == 130
    count = len(times_of(tmp_path / "out.mp4"))
    assert count >= 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"slipstream stream: cancelled: {count} frames are in {tmp_path / 'out.mp4'}"
    assert f"{count} of " in caplog.text


def test_command_with_a_tiny_autoencoder(tmp_path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    out = tmp_path / "out"
    options = ["--vae", str(tmp_path / "taesd"), "--max-frames", "2", *SMALL]
    assert run("--input", str(CLIP), "--output", str(out), *options) == 0
    assert len(list(out.glob("*.png"))) == 2


def options(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["stream", "--input", "a", "--output", "b", *words])


def parsed(*words: str) -> StreamConfig:
    return config_of(options(*words))


def test_every_option_reaches_the_config() -> None:
    options = {
        "--strength": 0.7, "--steps": 3, "--guidance": "onetime", "--cfg": 1.5, "--delta": 0.4, "--renoise": "ddim",
        "--seed": 9, "--frame-group": 2, "--feedback": 0.3, "--motion": 0.6,
    }  # fmt: skip
    got = parsed(*(str(part) for pair in options.items() for part in pair), "--consistency", "--cross-frame")
    assert got == StreamConfig(
        strength=0.7, steps=3, guidance="onetime", cfg_scale=1.5, delta=0.4, renoise="ddim", seed=9, frame_group=2,
        feedback=0.3, motion=0.6, consistency=True, cross_frame=True,
    )  # fmt: skip
    assert parsed("--t-index", "20, 40").t_index_list == (20, 40)
    assert parsed("--graph").static_rows
    assert parsed("--acceleration", "compile").static_rows
    assert [parsed("--priority", "throughput", "--steps", n).frame_group for n in "1248"] == [4, 4, 4, 2]
    assert parsed("--priority", "2").frame_group == 1
    assert parsed("--priority", "throughput", "--feedback", "0.3").frame_group == 1
    assert parsed() == StreamConfig(strength=0.5)


def test_every_priority_gives_the_same_video_and_names_what_stands_against_it(tmp_path, caplog) -> None:
    found = []
    for i, (priority, more) in enumerate(
        [("latency", []), ("throughput", []), ("2", []), ("2", ["--feedback", "0.3"])]
    ):
        (tmp_path / f"{i}").mkdir()
        paths = ["--input", str(CLIP), "--output", str(tmp_path / f"{i}" / "%03d.png")]
        assert run(*paths, "--steps", "1", "--size", "32x32", "--max-frames", "6", "--priority", priority, *more) == 0
        files = sorted((tmp_path / f"{i}").glob("*.png"))
        assert len(files) == 6
        found.append(torch.cat([read_image(file) for file in files]) * 255)
        assert ("--priority 2 has no effect: `feedback` ties each frame to others" in caplog.text) == bool(more)
    assert (found[1] - found[0]).abs().max() <= 1.01
    assert (found[2] - found[0]).abs().max() <= 1.01


def test_command_says_that_a_video_was_cut_off(tmp_path, caplog) -> None:
    path = make_video(tmp_path / "in.mp4", range(40), sound=None)
    data = path.read_bytes()
    # The index is written behind the images; put it before them and cut the images.
    with (
        av.open(str(path)) as file,
        av.open(str(tmp_path / "front.mp4"), "w", options={"movflags": "+faststart"}) as front,
    ):
        stream = front.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                front.mux(packet)
    data = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: -len(data) // 12])
    paths = ["--input", str(tmp_path / "cut.mp4"), "--output", str(tmp_path / "out.mp4")]
    assert run(*paths, "--steps", "1", "--size", "32x32") == 0
    count = len(times_of(tmp_path / "out.mp4"))
    assert 0 < count < 40
    assert f"{count} of 40 frames read" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "nowhere.mp4"], "no such file"),
        (["--input", str(CLIP), "--t-index", "32;45"], "--t-index as numbers"),
        (["--input", str(CLIP), "--t-index", "45,32"], "ascend"),
        (["--input", str(CLIP), "--size", "big"], "WIDTHxHEIGHT"),
        (["--input", str(CLIP), "--size", "0x0"], "WIDTHxHEIGHT"),
        (["--input", str(CLIP), "--cfg", "-1"], "`cfg_scale`"),
        (["--input", str(CLIP), "--graph", "--cross-frame"], "(or --graph) or --cross-frame"),
        (["--input", str(CLIP), "--acceleration", "compile", "--cross-frame"], "--acceleration"),
        (["--input", str(CLIP), "--priority", "fast"], "`priority`"),
        (["--input", str(CLIP), "--priority", "9"], "`priority`"),
        (["--input", str(CLIP), "--strength", "0.02", "--steps", "50"], "at most 19 steps"),
        (["--input", str(CLIP), "--strength", "2"], "`strength`"),
        (["--input", str(CLIP), "--similarity", "-1"], "`threshold`"),
        (["--input", str(CLIP), "--model", "no/such/model"], "no/such/model"),
    ],
)
def test_a_users_mistake_is_one_sentence(tmp_path, capsys, options, message) -> None:
    assert run("--output", str(tmp_path / "out.mp4"), *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_stamp() -> None:
    assert Stamp(45, Fraction(1, 30)).seconds == 1.5


TURNS = {
    (1, 0, 0, 1): (0, 0), (0, 1, -1, 0): (0, 1), (0, -1, 1, 0): (3, 0), (-1, 0, 0, -1): (1, 3),
    (-1, 0, 0, 1): (0, 3), (1, 0, 0, -1): (1, 0), (0, 1, 1, 0): (0, 0), (0, -1, -1, 0): (3, 1),
}  # fmt: skip


@pytest.mark.parametrize(("matrix", "corner"), TURNS.items())
def test_frames_are_turned_and_mirrored_as_the_camera_says(tmp_path, matrix, corner) -> None:
    """A mark in the first corner ends in another; in a file, the matrix lies in the header of the track."""
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[0, 0] = 255
    assert tuple(np.argwhere(upright(picture, matrix)[..., 0])[0]) == corner
    large = picture.repeat(16, 0).repeat(16, 1)
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10, width=64, height=32, pix_fmt="yuv420p")
        for packet in (*stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")), *stream.encode(None)):
            file.mux(packet)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data)
    (frame,) = [image for image, _ in open_source(str(tmp_path / "a.mp4"))]
    bright = frame.float().mean(-1)[8::16, 8::16] > 128
    assert tuple(bright.nonzero()[0].tolist()) == corner
    assert int(bright.sum()) == 1


@pytest.mark.parametrize("sound", ["aac", None])
@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_a_matroska_file_that_was_cut_off_is_named(tmp_path, suffix, sound) -> None:
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    sound = "libopus" if sound and suffix == ".webm" else sound
    path = make_video(tmp_path / f"a{suffix}", range(90), codec=codec, sound=sound)
    whole = open_source(str(path))
    assert len(list(whole)) == 90
    assert whole.problem == ""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    cut = open_source(str(path))
    read = len(list(cut))
    assert read < 85
    assert cut.problem == f"the video is damaged or cut off: {read} of an unknown number of frames read"
