"""The messages of a live stream: binary frames with a head of 24 bytes, and JSON for everything else."""

from __future__ import annotations

import json
import math
import struct
from typing import Any, NamedTuple

MAGIC = b"SLIP"
FRAME, RESULT, REPEAT = 1, 2, 3  # up: an image; down: its result, or that the last one is shown again
HEAD = struct.Struct("<4sIQd")
MAX_FRAME = 4 << 20  # bytes of a message with an image
MAX_TEXT = 64 << 10  # bytes of a message of JSON
MAX_PIXELS = 4096 * 2304


class Head(NamedTuple):
    """What stands before an image: its number, which rises within a connection, and the sender's clock in ms, which comes back."""

    kind: int
    sequence: int
    captured: float


def pack(head: Head, body: bytes = b"") -> bytes:
    """Return the message of an image."""
    return HEAD.pack(MAGIC, *head) + body


def newest(waiting: bytes | None, message: bytes) -> bytes:
    """Return what is to be sent of a result that still waits and a newer one: one that repeats an image needs that image."""
    kind, sequence, captured = HEAD.unpack_from(message)[1:]
    if waiting is None or kind != REPEAT or HEAD.unpack_from(waiting)[1] != RESULT:
        return message
    return pack(Head(RESULT, sequence, captured), waiting[HEAD.size :])


def unpack(message: bytes, kinds: tuple[int, ...]) -> tuple[Head, bytes]:
    """Return head and image of a message; raises ValueError unless it is one of `kinds` and holds an image."""
    if len(message) > MAX_FRAME:
        raise ValueError(
            f"Expected a frame of at most {MAX_FRAME} bytes, but got {len(message)}. Send a smaller image."
        )
    if len(message) < HEAD.size or message[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"Expected a frame that begins with {MAGIC!r} and a head of {HEAD.size} bytes, but got another message."
        )
    head = Head(*HEAD.unpack_from(message)[1:])
    body = message[HEAD.size :]
    if head.kind not in kinds or not math.isfinite(head.captured):
        raise ValueError(f"Expected a frame of kind {' or '.join(map(str, kinds))} with a finite time, but got {head}.")
    if not body and head.kind != REPEAT:
        raise ValueError("Expected an image behind the head, but got none.")
    return head, body


def read_text(message: str) -> dict[str, Any]:
    """Return the object of a JSON message that names its `type`; raises ValueError for anything else."""
    if len(message) > MAX_TEXT:
        raise ValueError(f"Expected a message of at most {MAX_TEXT} characters, but got {len(message)}.")
    try:
        found = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected a message in JSON, but got one that cannot be read ({error}).") from None
    if not isinstance(found, dict) or not isinstance(found.get("type"), str):
        raise ValueError('Expected a JSON object with a "type", but got another value.')
    return found
