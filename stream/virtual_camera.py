"""A virtual camera, as which calls, browsers and OBS see a stream. Needs pyvirtualcam, and what makes the camera on each system."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from ..core.tensors import image_to_numpy
from .video import CAMERA_NAMES, MAX_RATE, FrameSource, Stamp, platform_of, reason

log = logging.getLogger(__name__)
NAME = "virtual-camera"
LEAST_RATE = 10.0  # frames a second; programs take a slower camera for a broken one
REMEDIES = {
    "linux": "Load the driver v4l2loopback: sudo modprobe v4l2loopback exclusive_caps=1",
    "darwin": "Install OBS (obsproject.com), and start and stop its virtual camera once",
    "win32": "Install OBS (obsproject.com)",
}


def is_virtual_camera(output: str) -> bool:
    """Return whether an output means a virtual camera: "virtual-camera", "virtual-camera:/dev/video10"."""
    return output == NAME or output.startswith(f"{NAME}:")


def device_of(output: str) -> str | None:
    """Return the device that an output names, None for the first one; Linux takes its number alone too."""
    name = output.partition(":")[2]
    return CAMERA_NAMES["linux"].format(name) if name.isdigit() and platform_of() == "linux" else name or None


def import_pyvirtualcam() -> Any:
    """Return pyvirtualcam; raises ValueError with the remedy when it is not installed."""
    try:
        import pyvirtualcam
    except ImportError as error:
        raise ValueError(
            "Expected pyvirtualcam for a virtual camera, but it is not installed. Run: pip install pyvirtualcam"
        ) from error
    return pyvirtualcam


def even(image: Tensor) -> np.ndarray:
    """Return IMAGE (H, W, 3) as uint8 without the last row and column of an odd size: cameras have even sizes."""
    height, width = image.shape[:2]
    return np.ascontiguousarray(image_to_numpy(image[: height - height % 2, : width - width % 2]))


class VirtualCameraSink:
    """Sends frames to a virtual camera at a steady rate, each over and over until the next one.

    A `live` stream is shown as it comes, the newest frame first. Else `write` waits until the frame before was shown for its
    time, so that a clip is shown at its own pace and no frame is left out.

    Args:
        device: "/dev/video10", or None for the first one.
        source: its smallest step in time decides the rate.
    """

    place = None

    def __init__(self, device: str | None, source: FrameSource, live: bool) -> None:
        self.device, self.source, self.live, self.written = device, source, live, 0
        self.rate = min(max(float(source.base_rate), LEAST_RATE), float(MAX_RATE))
        self._changed = threading.Condition()
        self._camera: Any = None
        self._frame: np.ndarray | None = None
        self._error: Exception | None = None
        self._closed = False
        # In frames that were sent: how many by now, from and until when the newest one is shown, and when the source began.
        self._sent = self._from = self._until = self._begun = 0

    def check(self, height: int, width: int) -> None:
        """Raise ValueError when there is no camera, or none of this size."""
        self._open(height - height % 2, width - width % 2).close()

    def _open(self, height: int, width: int) -> Any:
        module = import_pyvirtualcam()
        if not height or not width:
            raise ValueError("Expected frames of at least 2x2 for a virtual camera. Use a larger `size`.")
        try:
            return module.Camera(width, height, self.rate, fmt=module.PixelFormat.RGB, device=self.device)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"Expected a virtual camera for {width}x{height}, but got none ({reason(error)}). {REMEDIES[platform_of()]}."
            ) from error

    def __enter__(self) -> VirtualCameraSink:
        return self

    def write(self, image: Tensor, stamp: Stamp) -> None:
        """Show IMAGE (H, W, 3); raises ValueError for another size, and when the camera takes no frames any more."""
        pixels = even(image)
        with self._changed:
            if not self.live:
                self._wait(stamp.seconds)
            if self._closed:
                return
            self._check(pixels)
            length = 0 if self.live else self._due(stamp.end(self.source.rate)) - self._sent
            self._frame, self._from, self._until = pixels, self._sent, self._sent + max(length, 1)
            self.written += 1

    def _wait(self, seconds: float) -> None:
        """Wait until the frame before was sent and the time of this one has come; what is late delays all that follows."""
        if self._camera is None:
            self._begun = -round(seconds * self.rate)
            return
        self._changed.wait_for(lambda: self._over or (self._sent > self._from and self._sent >= self._due(seconds)))
        self._begun += max(self._sent - self._due(seconds), 0)

    @property
    def _over(self) -> bool:
        return self._closed or self._error is not None

    def _due(self, seconds: float) -> int:
        return self._begun + round(seconds * self.rate)

    def _check(self, pixels: np.ndarray) -> None:
        """Open the camera for the first frame; refuse what it cannot take."""
        if self._error is not None:
            raise ValueError(
                f"Expected a virtual camera that takes frames, but it failed ({reason(self._error)}). Start again."
            ) from self._error
        if self._camera is None:
            self._camera = self._open(*pixels.shape[:2])
            self._frame = pixels
            log.info("The virtual camera is %s.", self._camera.device)
            self._thread = threading.Thread(target=self._show, name="slipstream-camera", daemon=True)
            self._thread.start()
        elif self._frame is not None and pixels.shape != self._frame.shape:
            (old, new) = (f"{a.shape[1]}x{a.shape[0]}" for a in (self._frame, pixels))
            raise ValueError(f"Expected frames of one size for a virtual camera, {old}, but got {new}. Use `size`.")

    def _show(self) -> None:
        try:
            while (pixels := self._next()) is not None:
                self._camera.send(pixels)
                self._camera.sleep_until_next_frame()
        except Exception as error:  # whatever the driver raises
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> np.ndarray | None:
        with self._changed:
            self._sent += 1
            self._changed.notify_all()
            return None if self._closed else self._frame

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            if error is None and self._camera is not None:
                self._changed.wait_for(lambda: self._over or self._sent >= self._until)
            self._closed = True
            self._changed.notify_all()
        if self._camera is not None:
            self._thread.join()
            self._camera.close()
