"""What is compiled: a function of its own for each shape, shared by the networks of a kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slipstream.core.compiling import compiled_for
from torch import Tensor


class Kind:
    def scaled(self, x: Tensor) -> Tensor:
        return x * 3


class Other(Kind):
    def scaled(self, x: Tensor) -> Tensor:
        return super().scaled(x) + 1


def twice(factor: float, x: Tensor) -> Tensor:
    return x.sin() * factor


def test_more_than_eight_shapes_are_compiled_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles a function for eight shapes, and runs it eagerly from the ninth on."""
    made: list[int] = []
    true = torch.compile

    def backend(module: Any, given: Any) -> Any:
        made.append(1)
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: true(function, backend=backend, **options))
    for _ in range(2):
        for rows in range(1, 12):
            x = torch.ones(rows, 2)
            torch.testing.assert_close(compiled_for(twice, 2.0, x)(x), 2 * x.sin())
    assert len(made) == 11


def test_methods_that_call_their_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    x = torch.ones(2)
    assert compiled_for(Other.scaled, Other(), x)(x).tolist() == [4.0, 4.0]
