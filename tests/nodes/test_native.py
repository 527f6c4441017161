"""A model's own size: read from its folder, and a hint where an empty latent has quite another one."""

from __future__ import annotations

import pathlib
import sys
import types
from typing import Any

import pytest
import slipstream
import torch
from slipstream.nodes.host import native
from slipstream.nodes.host.native import OTHERS, SizeHint, checkpoint_side, folder_side, frame_side, photo_pixels
from slipstream.nodes.host.vae import cell_side
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
    latents = types.SimpleNamespace(latent_channels=16 if family == "Flux" else 4)
    return types.SimpleNamespace(
        model=model, get_wrappers=lambda kind, key: hints, get_model_object=lambda name: latents
    )


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


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(native, "warn", lambda node, text: found.append(f"{node}: {text}"))
    return found


@pytest.mark.parametrize(
    ("family", "size", "shape", "warns"),
    [
        ("SD15", (0, 0), (2, 4, 64, 64), False),
        ("SDXL", (0, 768), (2, 4, 96, 128), False),
        ("Flux", (0, 0), (2, 16, 128, 128), False),
        ("Flux", (256, 256), (2, 16, 32, 32), False),  # its own size is not known
        ("SD15", (128, 128), (2, 4, 16, 16), True),
        ("SD15", (1024, 1024), (2, 4, 128, 128), True),
    ],
)
def test_an_empty_latent_follows_the_model(
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    family: str,
    size: tuple[int, int],
    shape: tuple[int, ...],
    warns: bool,
) -> None:
    management = types.ModuleType("comfy.model_management")
    management.intermediate_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, management.__name__, management)
    sys.modules["comfy"].model_management = management  # type: ignore[attr-defined]
    node = slipstream.NODE_CLASS_MAPPINGS["SlipstreamEmptyLatent"]()
    latent, width, height = node.make(host_model(family), *size, 2)
    assert latent["samples"].shape == shape
    assert not latent["samples"].any()
    assert (height, width) == (8 * shape[2], 8 * shape[3])
    assert [text.split(":")[0] for text in said] == ["Empty Latent for Model"] * warns


def test_a_latent_cell_may_be_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    model = types.SimpleNamespace(get_model_object=lambda name: types.SimpleNamespace(spacial_downscale_ratio=16))
    assert native.cell_of(model) == 16
    assert native.cell_of(host_model("SD15")) == 8


@pytest.mark.parametrize(
    ("side", "content", "hinted", "text"),
    [
        (64, 0.0, None, ""),
        (16, 0.0, None, "the empty latent is 128 x 128. Set it to 512 x 512."),
        (16, 0.0, 512, ""),  # the hint on the MODEL warns when it samples
        (16, 1.0, 512, "the latent is of 128 x 128. Scale the image to 512 x 512."),
        (128, 0.0, None, "the empty latent is 1024 x 1024"),
        (128, 1.0, None, ""),  # an image that is repainted may be larger
        (256, 1.0, None, "the latent is of 2048 x 2048"),
    ],
)
def test_latents_far_from_the_size_of_the_model(
    said: list[str], side: int, content: float, hinted: int | None, text: str
) -> None:
    native.warn_of_latents("Search Schedule", host_model("SD15", side=hinted), torch.full((1, 4, side, side), content))
    assert len(said) == bool(text)
    assert not text or text in said[0]


def test_a_hint_is_not_counted_on_where_no_sampling_starts_from_the_latent(said: list[str]) -> None:
    native.warn_of_latents(
        "Masked Regenerate", host_model("SD15", side=512), torch.zeros(1, 4, 16, 16), sampled_from=False
    )
    assert len(said) == 1
    assert "the empty latent is 128 x 128" in said[0]


def test_the_clip_follows_the_model() -> None:
    load = slipstream.NODE_CLASS_MAPPINGS["SlipstreamExampleClip"]().load
    assert load("bouncing ball", 1)[0].shape == (1, 128, 128, 3)
    frames, mask, _ = load("bouncing ball", 1, host_model("SD15"))
    assert (frames.shape, mask.shape) == ((1, 512, 512, 3), (1, 512, 512))


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


@pytest.mark.parametrize(("vae", "side"), [
    ({"spacial_compression_encode": lambda: 4, "downscale_ratio": 8}, 4), ({"downscale_ratio": 16}, 16),
    ({"downscale_ratio": (lambda a: a, 32, 32)}, 32), ({}, 8),
])  # fmt: skip
def test_a_vae_names_its_cells_by_the_hosts_method_or_its_ratio(vae: dict[str, Any], side: int) -> None:
    assert cell_side(types.SimpleNamespace(**vae)) == side
