"""Which settings have no effect beside others: rules, and the sentences that warn of them, for nodes and commands alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unused:
    """Settings that have no effect in some states of the others.

    Args:
        inputs: their names, separated by spaces.
        when: the state, given all values as attributes.
        why: completes "`steps` has no effect ...": the reason, then a sentence with the remedy.
    """

    inputs: str
    when: Callable[[Any], bool]
    why: str


def without_effect(
    rules: Iterable[Unused], values: Any, given: Callable[[str], bool], shown: Callable[[str], str] = "`{}`".format
) -> Iterator[str]:
    """Yield one sentence for each rule that holds and has settings that a user has `given`; `shown` writes a name."""
    for rule in rules:
        names = [shown(name) for name in rule.inputs.split() if given(name)] if rule.when(values) else []
        if names:
            listed = " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])
            yield f"{listed} {'have' if len(names) > 1 else 'has'} no effect {rule.why}"
