"""One way to refuse bad input: name the argument, the legal range, the received value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real

import torch
from torch import Tensor

UNFINITE = "Check what made it: a VAE in fp16 is the usual source."


def printable(text: str) -> str:
    """Return a text without what moves the cursor, clears the screen or turns the direction of writing."""
    return "".join(c if c.isprintable() else " " for c in text)


def shown(value: object, most: int = 200) -> str:
    """Return a value for a message: in one line, and shortened."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    try:
        text = printable(repr(value))
    except ValueError:  # an integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}..."


def _refuse(name: str, expected: str, got: str, remedy: str = "") -> ValueError:
    return ValueError(f"Expected `{name}` {expected}, but got {got}.{' ' + remedy if remedy else ''}")


def check_range(name: str, value: float, low: float, high: float = math.inf, remedy: str = "") -> None:
    """Raise ValueError unless `low <= value <= high` and `value` is a finite number (not a bool)."""
    if (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and -math.inf < value < math.inf
        and low <= value <= high
    ):
        return
    raise _refuse(name, f"of at least {low}" if high == math.inf else f"between {low} and {high}", shown(value), remedy)


def check_integer(name: str, value: int, low: float, high: float = math.inf, remedy: str = "") -> None:
    """Raise ValueError unless `value` is an integer (not a bool) with `low <= value <= high`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise _refuse(name, "to be an integer", shown(value), remedy)
    check_range(name, value, low, high, remedy)


def check_seed(name: str, value: int) -> int:
    """Return `value` as a plain int (NumPy's would overflow in arithmetic); raises ValueError unless 0 <= `value` < 2^64."""
    check_integer(name, value, 0, 2**64 - 1)
    return int(value)


def check_text(name: str, value: str) -> str:
    """Return `value`; raises ValueError unless it is text in UTF-8: other bytes arrive as lone surrogates, which no tokenizer takes."""
    try:
        value.encode()
    except (UnicodeEncodeError, AttributeError):
        raise _refuse(name, "to be text in UTF-8", shown(value)) from None
    return value


def check_choice(name: str, value: str, choices: Collection[str], remedy: str = "") -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise _refuse(name, "to be one of " + ", ".join(repr(c) for c in choices), shown(value), remedy)


def check_finite(name: str, tensor: Tensor, remedy: str = UNFINITE) -> None:
    """Raise ValueError when `tensor` holds NaN or infinity. Looks at the values, so a GPU has to wait."""
    refuse_non_finite(name, int((~torch.isfinite(tensor)).sum()), tuple(tensor.shape), remedy)


def refuse_non_finite(name: str, bad: int, shape: tuple[int, ...], remedy: str = UNFINITE) -> None:
    """Raise the ValueError of `check_finite` for a tensor of `shape` with `bad` NaN or infinite values, if there are any."""
    if bad:
        raise _refuse(name, "to be finite everywhere", f"{bad} NaN or infinite values in shape {shape}", remedy)


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], remedy: str = "") -> None:
    """Raise ValueError unless `tensor.shape` equals `expected`, where None stands for any size."""
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected)):
        wanted = tuple("any" if e is None else e for e in expected)
        raise _refuse(name, f"of shape {wanted}".replace("'", ""), str(shape), remedy)


def check_latents(name: str, latents: Tensor, channels: int | None = None, remedy: str = "") -> None:
    """Raise ValueError unless `latents` are (B, C, H, W) or (B, C, T, H, W), with `channels` where that is given."""
    frames = [None] if latents.ndim == 5 else []
    check_shape(name, latents, (None, channels, *frames, None, None), remedy)


def check_sigmas(name: str, sigmas: Tensor, minimum: int = 2) -> None:
    """Raise ValueError unless `sigmas` is a 1-D, finite, strictly descending tensor of at least `minimum` levels >= 0."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < minimum:
        got = str(tuple(sigmas.shape)) if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise _refuse(name, f"to be a 1-D tensor of at least {minimum} noise levels", got)
    sigmas = sigmas.float()  # as samplers compute: close levels are one there
    check_finite(name, sigmas, "Take SIGMAS from a scheduler node.")
    rising = (sigmas[1:] >= sigmas[:-1]).nonzero().flatten().tolist()
    if rising or sigmas[-1] < 0:
        at = rising[0] if rising else len(sigmas) - 1
        raise _refuse(
            name, "to descend strictly to 0 or above", f"{[round(float(s), 4) for s in sigmas[at : at + 2]]} at {at}",
            "Flip or sort the levels and drop duplicates.",
        )  # fmt: skip
