"""Which inputs of a node have no effect beside others. A node lists its rules as UNUSED; a changed input without effect warns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Unused:
    """Inputs that have no effect in some states of the others.

    Args:
        inputs: their names, separated by spaces.
        when: the state, given all values as attributes.
        why: completes "`steps` has no effect ...": the reason, then a sentence with the remedy.
    """

    inputs: str
    when: Callable[[Any], bool]
    why: str


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
    state, specs = SimpleNamespace(**values), None
    for rule in getattr(node, "UNUSED", ()):
        if not rule.when(state):
            continue
        if specs is None:
            declared = node.INPUT_TYPES()
            specs = {**declared.get("required", {}), **declared.get("optional", {})}
        names = [f"`{name}`" for name in rule.inputs.split() if changed(specs[name], values[name])]
        if names:
            listed = " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])
            yield f"{listed} {'have' if len(names) > 1 else 'has'} no effect {rule.why}"
