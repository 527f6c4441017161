"""What a widget that names a file or folder may read."""

from __future__ import annotations

import math
import os
import pathlib
import sys
import types

import pytest
import slipstream
import torch
from slipstream.core.images import save_image
from slipstream.nodes.host.places import VARIABLE, readable, readable_images
from slipstream.nodes.lmd import TrainLatentFill
from slipstream.nodes.search import ReferenceObjective


@pytest.fixture
def base(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A host's folders, a models folder elsewhere, and a secret beside them."""
    for name in ("input/photos", "models/vae", "drive/loras", "custom_nodes/pack", "secret", "photos", "input2"):
        (tmp_path / name).mkdir(parents=True)
        save_image(torch.zeros(1, 8, 8, 3), tmp_path / name / "1.png")
    host = types.SimpleNamespace(
        get_input_directory=lambda: str(tmp_path / "input"),
        models_dir=str(tmp_path / "models"),
        folder_names_and_paths={
            "loras": ([str(tmp_path / "drive/loras")], set()),
            "custom_nodes": ([str(tmp_path / "custom_nodes")], set()),
        },
    )
    monkeypatch.setitem(sys.modules, "folder_paths", host)
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


def test_input_and_models_can_be_read(base: pathlib.Path) -> None:
    for value, place in (
        ("photos", "input/photos"), (" photos ", "input/photos"), ("photos/../photos/1.png", "input/photos/1.png"),
        (str(base / "models/vae"), "models/vae"), ("../models/vae", "models/vae"), ("../drive/loras", "drive/loras"),
        ("", "input"), ("nothing/yet", "input/nothing/yet"),
    ):  # fmt: skip
        assert readable("folder", value) == base / place
    assert readable_images("folder", "photos") == [base / "input/photos/1.png"]


@pytest.mark.parametrize(
    "value",
    ["{base}/secret", "../secret", "photos/../../secret", "{base}/secret/1.png", "/", "/etc", "~", "..", "{base}/input2",
     "{base}/models/../secret", "../custom_nodes/pack", "out", "out/1.png", "../models/out", "photos/image.png", "a\0b",
     "{base}/secret/no such file", "//server/share", "file:///etc"],
)  # fmt: skip
def test_nothing_else_can(base: pathlib.Path, value: str) -> None:
    """Neither by its path, nor through a link, nor is told whether it exists."""
    for link in ("input/out", "models/out"):
        (base / link).symlink_to(base / "secret")
    (base / "input/photos/image.png").symlink_to(base / "secret/1.png")
    value = value.format(base=base)
    if value == "file:///etc":  # a relative path below input, where nothing is
        assert readable("folder", value) == base / "input/file:/etc"
        return
    with pytest.raises(ValueError, match="Expected `folder` in ComfyUI's input or models folders, but got") as caught:
        readable("folder", value)
    assert "\n" not in str(caught.value)
    assert math.isnan(ReferenceObjective.IS_CHANGED(folder=value))
    assert math.isnan(TrainLatentFill.IS_CHANGED(folder=value))
    assert "`inception_weights` in ComfyUI's" in ReferenceObjective.VALIDATE_INPUTS("inception", value)


def test_a_link_among_the_images_is_refused(base: pathlib.Path) -> None:
    (base / "input/photos/2.png").symlink_to(base / "secret/1.png")
    with pytest.raises(ValueError, match=r"but got '.*2\.png'"):
        readable_images("folder", "photos")
    with pytest.raises(ValueError, match=r"but got '.*2\.png'"):
        readable_images("folder", "", below=True)


def test_the_operator_may_allow_more(base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(base / "secret"), "", str(base / "photos")]))
    assert readable("folder", str(base / "secret/1.png")) == base / "secret/1.png"
    assert readable_images("folder", str(base / "photos")) == [base / "photos/1.png"]
    with pytest.raises(ValueError, match=VARIABLE):
        readable("folder", str(base / "input2"))


def test_a_folder_of_models_may_be_a_link(base: pathlib.Path) -> None:
    (base / "elsewhere").mkdir()
    (base / "models/unet").symlink_to(base / "elsewhere")
    sys.modules["folder_paths"].folder_names_and_paths["unet"] = ([str(base / "models/unet")], set())
    assert readable("weights", str(base / "models/unet/a.safetensors")) == base / "elsewhere/a.safetensors"


PLACES = {
    "TrainLatentFill folder",
    "ReferenceObjective folder",
    "ReferenceObjective inception_weights",
}  # through `readable`
FILES = {"TrainLatentFill name", "SaveSchedule name"}  # through `file_stem`
TEXTS = {
    "colour", "canvas", "reference_canvas", "handles", "targets", "points", "strength_curve", "prompt", "negative_prompt", "panel",
    "t_index_list", "prompts", "levels", "captions",
}  # fmt: skip


def test_every_text_that_a_client_may_send_is_known() -> None:
    """One that names a file or a folder must be read through `readable` or `file_stem`: list a new one where it belongs."""
    found = set()
    for id, node in slipstream.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        texts = {**inputs.get("required", {}), **inputs.get("optional", {})}
        found |= {f"{id.removeprefix('Slipstream')} {name}" for name, spec in texts.items() if spec[0] == "STRING"}
    assert PLACES | FILES <= found
    assert {text for text in found - PLACES - FILES if text.split()[1] not in TEXTS} == {"AddSchedule name"}
