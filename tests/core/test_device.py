"""The default device is decided in one place, and nothing else asks whether there is a GPU."""

from __future__ import annotations

import ast
import pathlib

import pytest
import slipstream
import torch
from slipstream.core.device import default_device, pick_device, pick_dtype
from slipstream_tests.conftest import ROOT
from slipstream_tests.devices import accelerators

PRODUCT = ("core", "cow", "stream", "search", "edit", "lmd", "nodes", "cli")


@pytest.mark.parametrize(
    ("variable", "available", "expected"),
    [("", True, "cuda"), ("", False, "cpu"), ("cpu", True, "cpu"), ("cuda:1", False, "cuda:1"), ("mps", True, "mps")],
)
def test_the_default(monkeypatch: pytest.MonkeyPatch, variable: str, available: bool, expected: str) -> None:
    monkeypatch.setenv("SLIPSTREAM_DEVICE", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert default_device() == expected


def test_tests_run_on_the_cpu_wherever_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cpu")
    assert slipstream.load("pocket").model.device == torch.device("cpu")


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_DEVICE", "abacus")
    with pytest.raises(
        ValueError, match=r"Expected `SLIPSTREAM_DEVICE` \(environment variable\) to be .* got 'abacus'"
    ):
        pick_device()
    with pytest.raises(ValueError, match="Expected `device` to be"):
        pick_device("abacus")


@pytest.mark.parametrize("device", accelerators(), ids=str)
def test_an_accelerator_is_used_when_named(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("SLIPSTREAM_DEVICE", str(device))
    pipe = slipstream.load("pocket")
    assert pipe.model.device == device
    assert pipe.model.dtype == pick_dtype(device)
    assert pipe.decode(pipe.encode_image(torch.rand(1, 64, 64, 3))).device == torch.device("cpu")


def asks(path: pathlib.Path) -> bool:
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.Attribute) and node.attr == "is_available" for node in ast.walk(tree))


def test_nothing_else_asks_for_a_gpu() -> None:
    """`core.cache` asks how much memory there is, `core.doctor` reports what there is."""
    found = {str(p.relative_to(ROOT)) for name in PRODUCT for p in (ROOT / name).rglob("*.py") if asks(p)}
    assert found == {"core/device.py", "core/cache.py", "core/doctor.py"}
