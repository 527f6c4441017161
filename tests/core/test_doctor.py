"""The report of a fault: what is in it, and what is not."""

from __future__ import annotations

import pathlib
import sys
import types

import pytest
import torch
from slipstream import __version__, load
from slipstream.cli import main
from slipstream.core import doctor
from slipstream.nodes.doctor import Doctor


def test_the_command_prints_versions_devices_and_the_slowest_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--size", "64x32"]) == 0
    out = capsys.readouterr().out
    for line in (
        f"Slipstream: {__version__}",
        f"torch: {torch.__version__}",
        "attention: torch, kernels: ",
        "stream 64x32: encode",
    ):
        name, _, value = line.partition(": ")
        assert any(row.startswith(f"{name}:") and value in row for row in out.splitlines()), line
    assert out.splitlines()[-1].startswith("limited by:")
    assert str(pathlib.Path.home()) not in out


def test_a_model_that_does_not_load_comes_after_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "/nowhere"]) == 2
    captured = capsys.readouterr()
    assert "torch:" in captured.out
    assert captured.err.startswith("slipstream doctor: Expected a model at /nowhere")


def test_the_slowest_stage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.01, 0.05, 0.02))
    monkeypatch.setattr(doctor, "seconds_of", lambda run: next(times))
    told = doctor.stages(load("pocket"), 32, 64)
    assert told == {
        "stream 64x32": "encode 10.0 ms, denoise 50.0 ms, decode 20.0 ms",
        "limited by": "denoise: at most 20.0 frames per second",
    }


def test_the_report_is_aligned() -> None:
    assert doctor.report({"a": "1"}, {"long name": "2"}) == "a:         1\nlong name: 2"


def test_the_node_tells_of_a_host_that_lacks_some_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    management = types.SimpleNamespace(
        get_torch_device=lambda: torch.device("cpu"), get_free_memory=lambda _: 2**30, get_total_memory=lambda _: 2**31
    )
    attention = types.SimpleNamespace(optimized_attention=doctor.report)
    names = {
        "comfy": {},
        "comfy.ldm": {},
        "comfy.ldm.modules": {"attention": attention},
        "comfy.model_management": None,
    }
    for name, content in names.items():
        module = management if content is None else types.SimpleNamespace(**content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", attention)
    sys.modules["comfy"].model_management = management
    sys.modules["comfy"].ldm = sys.modules["comfy.ldm"]
    sys.modules["comfy.ldm"].modules = sys.modules["comfy.ldm.modules"]
    text = Doctor().look()["result"][0]
    assert "ComfyUI:        not known" in text
    assert "memory:         1.0 of 2.0 GiB free, not known" in text
    assert "host attention: report" in text
