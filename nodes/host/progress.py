"""core's progress callback as the host's progress bar, latent preview and interrupt check."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ...core.progress import Callback, Step

# The host encodes previews on its server thread and queues them without bound: more than this only lags.
PREVIEWS_PER_SECOND = 20.0
_LISTENER: ContextVar[Callback | None] = ContextVar("slipstream_listener", default=None)


@contextmanager
def listening(listener: Callback) -> Iterator[None]:
    """Hand every step that our own samplers report inside this block to `listener` too (Influence Profile records runs)."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def overheard(callback: Callback) -> Callback:
    """Return `callback`, which also calls the listener of the running block, if there is one."""
    listener = _LISTENER.get()
    if listener is None:
        return callback

    def both(step: Step) -> None:
        callback(step)
        listener(step)

    return both


def check_interrupt() -> None:
    """Raise the host's `InterruptProcessingException` when the user pressed cancel; never catch it with `except Exception`."""
    import comfy.model_management

    comfy.model_management.throw_exception_if_processing_interrupted()


def host_callback(model: Any, total: int, previews: bool = True) -> Callback:
    """Return a core `Callback` for a run of `total` steps on a MODEL: progress bar, preview of the first image, interrupt.

    Previews use the model's own latent format and are throttled to about 20 a second; the last step always shows. The
    interrupt is checked at every step, besides the check before each network call in `HostDenoiser`.
    """
    import comfy.utils
    import latent_preview

    bar = comfy.utils.ProgressBar(total)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format) if previews else None
    shown = 0.0

    def callback(step: Step) -> None:
        nonlocal shown
        check_interrupt()
        preview, now = None, time.monotonic()
        due = now - shown >= 1 / PREVIEWS_PER_SECOND or step.index >= step.total
        if previewer is not None and step.denoised is not None and due:
            preview, shown = previewer.decode_latent_to_preview_image("JPEG", step.denoised.detach()), now
        bar.update_absolute(step.index, step.total, preview)

    return callback
