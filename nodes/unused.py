"""Which inputs of a node have no effect beside others. A node lists its rules as UNUSED; a changed input without effect warns."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from ..core.unused import Unused, without_effect

__all__ = ["Unused", "changed", "unused"]


def changed(spec: Any, value: Any) -> bool:
    """Whether a user has set an input: a widget that is not at its default, or a socket that is connected."""
    options = spec[1] if len(spec) > 1 else {}
    return value is not None and ("default" not in options or value != options["default"])


def unused(node: type[Any], values: dict[str, Any]) -> Iterator[str]:
    """Yield one sentence for each rule of a node class whose inputs are set without effect.

    Args:
        node: the class.
        values: all inputs by name; None for an optional socket that is not connected.
    """

    @functools.cache
    def specs() -> dict[str, Any]:
        declared = node.INPUT_TYPES()
        return {**declared.get("required", {}), **declared.get("optional", {})}

    rules = getattr(node, "UNUSED", ())
    return without_effect(rules, SimpleNamespace(**values), lambda name: changed(specs()[name], values[name]))
