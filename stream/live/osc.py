"""Live settings over OSC: /slipstream/strength 0.4, /slipstream/prompt "a red circle". Needs python-osc."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ...core.checks import printable

log = logging.getLogger(__name__)
PREFIX = "/slipstream/"


class Settable(Protocol):
    """A stream, here or elsewhere."""

    def set(self, updates: Mapping[str, Any]) -> None: ...


def setting_of(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return the setting that a message means: faders send whole numbers as floats, and `t_index_list` is a list of one value too."""
    whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    listed = len(whole) > 1 or (name == "t_index_list" and not isinstance(whole[0], str))
    return {name: whole if listed else whole[0]}


class OscServer:
    """Sets the settings of the stream that `current()` returns as OSC messages say, within its context.

    What is refused is logged, at most once a second. Raises ValueError when the port
    is not free, or python-osc is not installed.
    """

    def __init__(self, host: str, port: int, current: Callable[[], Settable | None]) -> None:
        try:
            from pythonosc.dispatcher import Dispatcher
            from pythonosc.osc_server import BlockingOSCUDPServer
        except ImportError as error:
            raise ValueError(
                "Expected python-osc for --osc, but it is not installed. Run: pip install python-osc"
            ) from error
        dispatcher = Dispatcher()
        dispatcher.set_default_handler(self._take)
        self.current, self._logged = current, 0.0
        try:
            self._server = BlockingOSCUDPServer((host, port), dispatcher)
        except OSError as error:
            raise ValueError(
                f"Expected `osc` to be a free port, but {port} cannot be used ({error}). Choose another."
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="slipstream-osc", daemon=True)

    def _take(self, address: str, *values: Any) -> None:
        stream = self.current()
        if stream is None:
            return
        try:
            if not address.startswith(PREFIX) or not values:
                raise ValueError(f"Expected an address such as {PREFIX}strength with a value, but got {address!r}.")
            stream.set(setting_of(address[len(PREFIX) :], values))
        except ValueError as error:
            if time.monotonic() - self._logged > 1:
                self._logged = time.monotonic()
                log.warning("OSC: %s", printable(str(error)))

    def __enter__(self) -> OscServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
