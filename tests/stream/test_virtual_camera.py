"""A virtual camera as a sink, with a stand-in for pyvirtualcam that takes down what the driver would be given."""

from __future__ import annotations

import sys
import threading
import time
import types
from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest
import torch
from slipstream.cli import main
from slipstream.stream.sinks import FrameSink, check_sink, open_sink
from slipstream.stream.video import Stamp
from slipstream.stream.virtual_camera import NAME, device_of
from slipstream_tests.stream.test_sinks import Clip

RATE = 200  # frames a second: tests do not wait long


class Clock(Clip):
    """A clip whose times are given in frames of 1/200 s."""

    time_base, base_rate = Fraction(1, RATE), Fraction(RATE)

    def __init__(self, size=(32, 48), times=(0, 1, 4)) -> None:
        super().__init__(size, times)
        self.rate = self.base_rate

    def __iter__(self):
        for i, at in enumerate(self.times):
            yield self.colour(i).expand(*self.size, 3), Stamp(at, self.time_base, 0)


class Driver(types.ModuleType):
    """What tests know of pyvirtualcam: cameras that were opened, and what was sent."""

    class PixelFormat:
        RGB = "RGB"

    def __init__(self) -> None:
        super().__init__("pyvirtualcam")
        self.cameras: list[Camera] = []
        self.reason, self.breaks_at = "", 10**9
        driver = self

        class Opened(Camera):
            def __init__(self, width, height, fps, *, fmt, device=None) -> None:
                if driver.reason:
                    raise RuntimeError(driver.reason)
                super().__init__(driver, width, height, fps, fmt, device)

        self.Camera = Opened


class Camera:
    def __init__(self, driver, width, height, fps, fmt, device) -> None:
        assert fmt == "RGB"
        self.size, self.fps, self.asked, self.device = (height, width), fps, device, device or "/dev/video0"
        self.driver, self.sent, self.closed = driver, [], False
        driver.cameras.append(self)

    def send(self, frame: np.ndarray) -> None:
        assert frame.dtype == np.uint8
        assert frame.shape == (*self.size, 3)
        assert frame.flags.c_contiguous
        assert not self.closed
        if len(self.sent) >= self.driver.breaks_at:
            raise RuntimeError("the device is gone")
        self.sent.append(frame.copy())

    def sleep_until_next_frame(self) -> None:
        time.sleep(1 / self.fps)

    def close(self) -> None:
        self.closed = True

    def colours(self) -> list[list[int]]:
        """The colour of each frame, of which every pixel has the same."""
        assert all((frame == frame[0, 0]).all() for frame in self.sent)
        return [frame[0, 0].tolist() for frame in self.sent]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setitem(sys.modules, "pyvirtualcam", found)
    return found


def show(source: Clip, output: str = NAME, live: bool = False) -> FrameSink:
    with open_sink(output, source, live) as sink:
        for image, stamp in source:
            sink.write(image, stamp)
    return sink


def test_a_clip_is_shown_whole_in_order_and_at_its_own_pace(driver: Driver) -> None:
    clip = Clock((4, 6), times=[5, 6, 9, 9, 10, 14])
    assert show(clip).written == clip.count
    (camera,) = driver.cameras
    assert (camera.size, camera.fps, camera.closed) == ((4, 6), RATE, True)
    numbers = [[clip.colour(i).tolist() for i in range(clip.count)].index(colour) for colour in camera.colours()]
    shown = [numbers.count(i) for i in range(clip.count)]
    assert numbers == sorted(numbers)
    # Each for its time, one of no time once; a busy machine may show one longer, never shorter.
    assert all(count >= least for count, least in zip(shown, [1, 3, 1, 1, 3, 1]))
    assert sum(shown) <= 2 * 10


def test_live_frames_never_wait_and_the_newest_is_shown_until_another_comes(driver: Driver) -> None:
    clip = Clock(times=[0, 10**6, 2 * 10**6])
    begun = time.monotonic()
    with open_sink(NAME, clip, live=True) as sink:
        for image, stamp in clip:
            sink.write(image, stamp)
        assert time.monotonic() - begun < 5
        while len(driver.cameras[0].sent) < 5:
            time.sleep(0.01)
    assert driver.cameras[0].colours()[-1] == clip.colour(2).tolist()
    assert not [t for t in threading.enumerate() if t.name == "slipstream-camera"]


@pytest.mark.parametrize(
    ("rate", "shown_at"), [(Fraction(1, 100), 10), (Fraction(30000, 1001), 30000 / 1001), (Fraction(9000), 240)]
)
def test_a_camera_has_a_rate_that_programs_take(driver: Driver, rate: Fraction, shown_at: float) -> None:
    clip = Clock(times=[0])
    clip.base_rate = rate
    show(clip, live=True)
    assert driver.cameras[0].fps == shown_at


def test_odd_sizes_lose_a_row_or_column_and_float_frames_are_bytes(driver: Driver) -> None:
    image = torch.rand(5, 7, 3)
    with open_sink(NAME, Clock(), live=True) as sink:
        sink.check(5, 7)
        sink.write(image, Stamp(0, Fraction(1, RATE)))
    trial, camera = driver.cameras
    assert trial.size == camera.size == (4, 6)
    assert trial.closed
    assert np.array_equal(camera.sent[0], (image[:4, :6] * 255).round().byte().numpy())
    with pytest.raises(ValueError, match="at least 2x2"):
        open_sink(NAME, Clock()).check(1, 8)


def test_another_size_is_refused(driver: Driver) -> None:
    with open_sink(NAME, Clock(), live=True) as sink:
        for width in (6, 7):
            sink.write(torch.zeros(4, width, 3), Stamp(0, Fraction(1, RATE)))
        with pytest.raises(ValueError, match="one size for a virtual camera, 6x4, but got 8x4"):
            sink.write(torch.zeros(4, 8, 3), Stamp(0, Fraction(1, RATE)))


def test_a_camera_that_fails_ends_the_stream(driver: Driver) -> None:
    driver.breaks_at = 2
    with pytest.raises(ValueError, match="it failed \\(the device is gone\\)"):
        show(Clock())
    assert driver.cameras[0].closed


def test_ctrl_c_ends_at_once_and_closes_the_camera(driver: Driver) -> None:
    """Also while a frame is shown for its time; what a thread writes after it is ignored."""
    slow = Clock(times=[0, 10**6])
    first, second = slow
    with suppress(KeyboardInterrupt), open_sink(NAME, slow) as sink:
        sink.write(*first)
        waiting = threading.Thread(target=sink.write, args=second)
        waiting.start()
        raise KeyboardInterrupt
    waiting.join(10)
    assert not waiting.is_alive()
    assert driver.cameras[0].closed
    assert sink.written == 1


def test_no_library_or_no_camera_is_one_sentence(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.reason = "'v4l2loopback' backend: No v4l2 loopback device found at /dev/video[0-99].\nSee the documentation."
    for platform, remedy in (
        ("linux", "sudo modprobe v4l2loopback"),
        ("darwin", "Install OBS"),
        ("win32", "Install OBS"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(
            ValueError, match=rf"Expected a virtual camera for 6x4, but got none \('v4l2.*99\]\)\. .*{remedy}"
        ):
            open_sink(NAME, Clock()).check(4, 6)
    monkeypatch.setitem(sys.modules, "pyvirtualcam", None)
    with pytest.raises(ValueError, match="Run: pip install pyvirtualcam"):
        check_sink(NAME)


def test_devices_are_named_as_cameras_are(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert device_of(NAME) is None
    assert device_of(f"{NAME}:10") == device_of(f"{NAME}:/dev/video10") == "/dev/video10"
    show(Clock(times=[0]), f"{NAME}:10")
    assert driver.cameras[0].asked == "/dev/video10"
    monkeypatch.setattr(sys, "platform", "win32")
    assert device_of(f"{NAME}:OBS Virtual Camera") == "OBS Virtual Camera"


def test_the_command_shows_a_clip(driver: Driver, tmp_path) -> None:
    from slipstream.core.images import save_image

    (tmp_path / "in").mkdir()
    for i in range(3):
        save_image(torch.full((1, 40, 60, 3), i / 3), tmp_path / "in" / f"{i}.png")
    assert (
        main(
            [
                "stream",
                "--input",
                str(tmp_path / "in"),
                "--out",
                NAME,
                "--steps",
                "1",
                "--guidance",
                "none",
                "--fps",
                "50",
            ]
        )
        == 0
    )
    assert driver.cameras[-1].size == (40, 60)
    assert len(np.unique([frame.mean() for frame in driver.cameras[-1].sent])) == 3
    assert driver.cameras[-1].closed
