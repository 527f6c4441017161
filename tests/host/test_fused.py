"""The host's UNet in its fused form: its own numbers with fewer operators; weights, patches, ControlNets and hooks count."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from typing import Any

import pytest

HERE = pathlib.Path(__file__).resolve().parent
pytestmark = pytest.mark.timeout(900)  # the host is imported
Lines = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def lines(checkout: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Lines:
    folder = tmp_path_factory.mktemp("fused")
    (folder / "slipstream").symlink_to(HERE.parent.parent, target_is_directory=True)
    (folder / "slipstream_tests").symlink_to(HERE.parent, target_is_directory=True)
    paths = [checkout[0], str(folder), str(HERE)]
    done = subprocess.run(
        [checkout[1], str(HERE / "fused_checks.py")], cwd=checkout[0], capture_output=True, text=True, check=False, timeout=800,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COMFYUI_PATH": checkout[0]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line["kind"], line["check"].removeprefix("check_")): line for line in found}


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_numbers_are_the_networks_own_and_operators_fewer(lines: Lines, kind: str) -> None:
    line = lines[kind, "numbers"]
    assert line["refusal"] == ""
    assert line["calls"] == 4
    assert line["difference"] < 1e-5
    assert line["share"] <= 0.69  # 0.687 in 0.3.64; 0.627 in 0.33.0, whose own call has more operators


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_weights_that_a_lora_replaces_or_writes_count_at_once(lines: Lines, kind: str) -> None:
    line = lines[kind, "weights"]
    assert line["difference"] < 1e-5
    assert line["changed"] > 0.1


def test_patches_and_hooks_take_the_networks_own_call_and_a_controlnet_is_added(lines: Lines) -> None:
    line = lines["sd", "patches"]
    assert line["found"].keys() == {"attn1_patch", "attn2_patch", "output_block_patch", "attn2_replace", "control"}
    for name, (difference, changed) in line["found"].items():
        assert difference < 1e-5 if name == "control" else difference == 0, name
        assert changed > 0.01, name
    assert (line["fused"], line["hooks"]) == (1, 1), "the ControlNet's call was fused, the hook's was not"


def test_a_recording_serves_fewer_rows_and_ends_with_a_sentence_when_a_patch_comes(lines: Lines) -> None:
    line = lines["sd", "recording"]
    assert line["difference"] < 1e-5
    assert (line["replays"], line["after"]) == (5, 0), "of the next run, with a LoRA, two"
    first, again, never = line["forgotten"]
    assert (again[0] - first[0], again[1] - first[1]) == (1, 1), "recorded again where its weights lie now"
    assert never == again, "not recorded, and not replayed"
    assert line["told"] == ["a patch (`attn2_output_patch`) works inside the network"]
    assert line["cpu"] == ["CUDA graphs need a CUDA device. Choose compile, or none"]


def test_what_no_rule_knows_is_named(lines: Lines) -> None:
    line = lines["sd", "refusals"]
    assert (line["replaced"], line["class"]) == ("a UNetModel whose call was replaced", "Linear")
    assert line["setting"] == "ResBlock at middle_block.0 with settings or hooks of its own"


def test_lanes_record_for_themselves_and_again_for_other_rows_and_prompts_on_the_fake_device(lines: Lines) -> None:
    line = lines["sd", "lanes"]
    assert line["difference"] < 1e-5
    assert line["recorded"] == [2, 2, 4, 4, 4, 6, 6, 8], (
        "each lane: at once, for two rows, for the second call of a longer prompt, for one row"
    )
    assert line["apart"], "a lane waits for no other"
    assert line["waits"] == 0
    assert line["told"] == []
    assert line["informed"] == 8, "the memory of each recording is said"


def test_the_hosts_layers_are_compiled_as_one_piece_and_once(lines: Lines) -> None:
    line = lines["sd", "compiled"]
    assert line["difference"] < 1e-5
    assert line["told"] == []
    assert line["informed"][0].startswith("Compiling the network for 2 x (8, 8) latents")
    assert line["pieces"] == 1
