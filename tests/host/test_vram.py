"""Hosts that bring weights layer by layer: gradients and recordings get a MODEL loaded as a whole, a live stream a VAE of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # the host is imported


@pytest.fixture(scope="module")
def lines(inside: Callable[..., list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {line["check"]: line for line in inside("vram_checks.py")}


def test_an_edit_of_mode_fine_runs_on_a_model_that_is_loaded_as_a_whole(lines: dict[str, dict[str, Any]]) -> None:
    line = lines["edit"]
    assert line["same"]
    assert line["asked"] == 2, "by Invert and by Edit"
    assert "--disable-dynamic-vram" in line["refused"]


def test_an_acceleration_asks_for_a_whole_model_and_goes_without_one(lines: dict[str, dict[str, Any]]) -> None:
    line = lines["recordable"]
    assert line.pop("asked") == 0, "without acceleration nothing is read again"
    del line["check"]
    assert all(line.values()), line


def test_the_tiny_vae_of_a_live_stream_gives_what_the_hosts_own_call_gives(lines: dict[str, dict[str, Any]]) -> None:
    line = lines["tiny_vae"]
    assert line["copied"]
    assert line["shape"] == [2, 4, 5, 8]
    assert line["spread"] > 10
    assert line["latents"] < 1e-6
    assert line["bytes"] <= 1


def test_a_live_stream_without_room_gives_each_call_of_the_host_the_device_for_itself(
    lines: dict[str, dict[str, Any]],
) -> None:
    line = lines["live"]
    assert line["same"]
    assert (line["calls"], line["with memory"]) == (7, 6), "the prompt, and both ways of three frames"
    assert line["told"] == [
        "the device's memory does not hold model and VAE together, so each waits for the other. Use a tiny VAE (TAESD)."
    ], "once"


def test_a_checkpoint_of_the_hosts_own_dynamic_vram_gives_what_it_gives_as_a_whole(
    lines: dict[str, dict[str, Any]],
) -> None:
    line = lines["host"]
    if not line["known"]:
        pytest.skip("this host has no dynamic VRAM")
    del line["check"]
    assert line.keys() == {"known", "dynamic", "whole", "draft", "fine", "frames"}
    assert all(line.values()), line
