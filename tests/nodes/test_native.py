"""A model's own size: read from its folder, and a hint where an empty latent has quite another one."""

from __future__ import annotations

import pathlib
import sys
import types

import pytest
import slipstream
import torch
from slipstream.nodes.host.native import OTHERS, SizeHint, checkpoint_side, folder_side, frame_side, photo_pixels
from slipstream.nodes.models import Folder, find


@pytest.mark.parametrize("name", ["pocket", "pocket-lcm", "pocket-flow"])
def test_the_bundled_models_were_made_for_128(name: str) -> None:
    folder = find(name)
    assert isinstance(folder, Folder)
    assert folder_side(folder.path, folder.network) == 128


def test_a_folder_that_states_no_size_counts_as_most_models(tmp_path: object) -> None:
    assert folder_side(tmp_path, "unet") == OTHERS  # type: ignore[arg-type]


def host_model(family: str, prediction: str = "EPS", side: int | None = None) -> object:
    model = types.SimpleNamespace(
        model_config=type(family, (), {})(), model_type=types.SimpleNamespace(name=prediction)
    )
    hints = [] if side is None else [SizeHint(side, print)]
    return types.SimpleNamespace(model=model, get_wrappers=lambda kind, key: hints)


@pytest.mark.parametrize(
    ("family", "prediction", "side"),
    [
        ("SD15", "EPS", 512),
        ("SD20", "EPS", 512),
        ("SD20", "V_PREDICTION", 768),
        ("SDXL", "EPS", 1024),
        ("Flux", "FLUX", 1024),
    ],
)
def test_families_of_the_host(family: str, prediction: str, side: int) -> None:
    assert checkpoint_side(host_model(family, prediction)) == side


def test_pixels_of_a_photo() -> None:
    assert photo_pixels(host_model("SD15"), 0.0) == 512**2
    assert photo_pixels(host_model("Family", side=128), 0.0) == 256**2  # 16 cells across are too few for a photo
    assert photo_pixels(host_model("Flux"), 0.0) == 1024**2
    assert photo_pixels(host_model("SDXL"), 0.5) == 500_000


@pytest.mark.parametrize(
    ("width", "height", "remedy"),
    [
        (512, 512, "128 x 128"),
        (1024, 512, "192 x 64"),
        (64, 64, "128 x 128"),
        (128, 128, ""),
        (192, 128, ""),
        (256, 128, ""),
    ],
)
def test_an_empty_latent_of_another_size(width: int, height: int, remedy: str) -> None:
    said: list[str] = []
    hint = SizeHint(128, lambda node, text: said.append(f"{node}: {text}"))
    latent = torch.zeros(1, 4, height // 8, width // 8)
    assert hint(lambda noise, latent, *rest: (latent, rest), None, latent, 3) == (latent, (3,))  # type: ignore[arg-type]
    assert len(said) == bool(remedy)
    assert not remedy or f"Set it to {remedy}, " in said[0]


def test_frames_of_0_have_the_size_of_the_model() -> None:
    assert frame_side(host_model("SDXL"), "width", 0) == 1024
    assert frame_side(host_model("Family", side=128), "height", 0) == 128
    assert frame_side(host_model("Flux"), "width", 0) == OTHERS
    assert frame_side(host_model("SDXL"), "width", 520) == 520
    with pytest.raises(ValueError, match="`height` of 0 or at least 16, but got 8"):
        frame_side(host_model("SD15"), "height", 8)


def test_an_encoded_image_has_its_own_size() -> None:
    hint = SizeHint(128, lambda node, text: pytest.fail(text))
    hint(lambda *given: given, torch.zeros(1), torch.ones(1, 4, 64, 64), None)
    # Edit, Invert and the stream work in an empty latent of the photo's size.
    hint(lambda *given: given, torch.zeros(1), torch.zeros(1, 4, 64, 64), types.SimpleNamespace(runs_ours=True))
    assert slipstream.NODE_CLASS_MAPPINGS["SlipstreamLoadModel"].RETURN_NAMES[-2:] == ("width", "height")


@pytest.mark.parametrize("parts", [("model", "clip", "vae"), ("model", None, "vae")])
def test_a_checkpoint_is_loaded_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[str | None, ...]
) -> None:
    from slipstream.nodes.host.diffusers_folder import load_checkpoint

    comfy, sd, folders = types.ModuleType("comfy"), types.ModuleType("comfy.sd"), types.ModuleType("folder_paths")
    comfy.sd = sd  # type: ignore[attr-defined]
    sd.load_checkpoint_guess_config = lambda path, embedding_directory: (*parts, None)  # type: ignore[attr-defined]
    folders.get_folder_paths = lambda kind: [kind]  # type: ignore[attr-defined]
    for module in (comfy, sd, folders):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if None not in parts:
        assert load_checkpoint(tmp_path / "a.safetensors") == parts
        return
    with pytest.raises(ValueError, match=r"a\.safetensors has no CLIP"):
        load_checkpoint(tmp_path / "a.safetensors")
