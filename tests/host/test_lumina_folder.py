"""Load Model on a diffusers folder of a small Lumina2 transformer: the host's NextDiT, on which stock nodes act as on any MODEL."""

from __future__ import annotations

import io
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import slipstream
import torch
from graph import node
from PIL import Image
from safetensors.torch import save_file
from slipstream.core import CFG, make_sigmas
from slipstream.core.loading import BUNDLED
from slipstream.core.samplers import euler
from slipstream.core.tensors import image_to_numpy

PROMPT = "a large red circle on a blue background"
# How Lumina2 transformers differ in what the host builds itself: feed-forward width, shared keys and values, refiners.
KINDS: dict[str, dict[str, Any]] = {
    "bundled": {"ffn_dim_multiplier": 0.5, "multiple_of": 32, "num_kv_heads": 2},
    "shared keys": {"multiple_of": 16, "num_kv_heads": 1, "num_refiner_layers": 2},
    "rounded up": {"ffn_dim_multiplier": 0.34, "multiple_of": 48, "num_kv_heads": 2},
}


def pixels(result: Any) -> np.ndarray:
    """Return the saved images (B, H, W, 3) as integers, so that differences do not wrap."""
    assert result.ok, result.explain()
    return np.stack([np.asarray(Image.open(io.BytesIO(f.read())).convert("RGB")) for f in result.files]).astype(int)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


def make_folder(folder: pathlib.Path, **changes: Any) -> str:
    """Write a folder with random weights, pocket's text encoder and a VAE that shifts its latents; return its name."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

    torch.manual_seed(0)
    settings = {"num_refiner_layers": 1, **changes}
    network = Lumina2Transformer2DModel(
        sample_size=16, in_channels=16, hidden_size=48, num_layers=2, num_attention_heads=2, axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 64, 64), cap_feat_dim=64, **settings,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], layers_per_block=1, latent_channels=16, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.6,
        shift_factor=0.2, mid_block_add_attention=False,
    )  # fmt: skip
    with torch.no_grad():
        for p in [*network.parameters(), *vae.parameters()]:
            p.add_(0.1 * torch.randn_like(p))
    for name, part in (
        ("transformer", network),
        ("vae", vae),
        ("scheduler", FlowMatchEulerDiscreteScheduler(shift=2.0)),
    ):
        part.save_pretrained(folder / name)
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(BUNDLED / name, folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Lumina2Pipeline"}))
    return folder.name


def base(model: str, **changes: Any) -> dict[str, Any]:
    sampler = {"seed": 7, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "1": node("SlipstreamLoadModel", model=model),
        "p": node("CLIPTextEncode", clip=["1", 1], text=PROMPT),
        "n": node("CLIPTextEncode", clip=["1", 1], text=""),
        "l": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "k": node(
            "KSampler", model=["1", 0], positive=["p", 0], negative=["n", 0], latent_image=["l", 0],
            **{**sampler, **changes},
        ),
        "d": node("VAEDecode", samples=["k", 0], vae=["1", 2]),
        "s": node("SaveImage", images=["d", 0], filename_prefix="test"),
    }  # fmt: skip


def library_pixels(source: Any) -> np.ndarray:
    """Return what the library makes of the settings of `base`."""
    pipe = slipstream.load(source, device="cpu")
    cond = pipe.encode_text([PROMPT, ""])
    sigmas = make_sigmas("simple", pipe.model.levels, 4)
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        guided = CFG(pipe.model, cond.take([0]), cond.take([1]), 3.0)
        return image_to_numpy(pipe.decode(euler(guided, noise * sigmas[0], sigmas, pipe.model.space))).astype(int)


@pytest.fixture(scope="module")
def folder(host_models: pathlib.Path) -> str:
    return make_folder(host_models / "diffusers" / "flow_bundled", **KINDS["bundled"])


@pytest.fixture(scope="module")
def plain(host: Any, folder: str) -> np.ndarray:
    return pixels(host.run(base(folder)))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bundled"])
def test_one_folder_is_one_model_in_library_and_host(host: Any, host_models: pathlib.Path, kind: str) -> None:
    path = host_models / "diffusers" / f"flow_{kind.replace(' ', '_')}"
    theirs = pixels(host.run(base(make_folder(path, **KINDS[kind]))))
    ours = library_pixels(path)
    assert ours.std() > 5
    assert difference(ours, theirs) <= 2


def test_the_bundled_size_is_one_model_in_library_and_host(
    host_models: pathlib.Path, folder: str, plain: np.ndarray
) -> None:
    assert difference(library_pixels(host_models / "diffusers" / folder), plain) <= 2


@pytest.mark.parametrize("model", ["random weights", "pocket-flow"])
def test_contract(host: Any, report: Any, folder: str, model: str) -> None:
    graph = {key: base(folder if model == "random weights" else model)[key] for key in ("1", "p", "n", "l")}
    graph["c"] = node("ProbeContract", model=["1", 0], positive=["p", 0], negative=["n", 0], latent=["l", 0])
    found = report(host.run(graph))
    assert found.pop("space") == "flow"
    assert found.pop("sigma_max") == "1.0000"
    assert len(found) == 8
    # Some hosts turn positions by a kernel without a gradient. No edit takes one of a transformer.
    gradients = found.pop("gradients_reach_x")
    assert gradients == "ok" or "comfy_kitchen.apply_rope" in gradients
    assert {name: text for name, text in found.items() if text != "ok"} == {}


def test_a_lora_finds_every_layer_and_leaves_no_trace(
    host: Any, host_models: pathlib.Path, folder: str, plain: np.ndarray
) -> None:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer, (out, inner) in {
        "layers_0_attention_qkv": (144, 48), "noise_refiner_0_feed_forward_w2": (48, 96), "cap_embedder_1": (48, 64),
    }.items():  # fmt: skip
        tensors[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
        tensors[f"lora_unet_{layer}.lora_down.weight"] = 0.3 * torch.randn(4, inner, generator=generator)
        tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(4.0)
    save_file(tensors, host_models / "loras" / "flow.safetensors")
    graph, before = base(folder), len(host.log())
    graph["lora"] = node("LoraLoaderModelOnly", model=["1", 0], lora_name="flow.safetensors", strength_model=1.0)
    graph["k"]["inputs"]["model"] = ["lora", 0]
    assert difference(pixels(host.run(graph)), plain) > 30
    assert "NOT LOADED" not in host.log()[before:]
    assert difference(pixels(host.run(base(folder, denoise=0.99999))), plain) == 0


@pytest.mark.parametrize("patch", ["EasyCache", "ModelSamplingAuraFlow"])
def test_stock_patches_act(host: Any, folder: str, patch: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "EasyCache": {"reuse_threshold": 0.9, "start_percent": 0.1, "end_percent": 0.95, "verbose": False},
        "ModelSamplingAuraFlow": {"shift": 6.0},
    }
    graph = base(folder, steps=8)
    untouched = pixels(host.run(graph))
    graph["patch"] = node(patch, model=["1", 0], **settings[patch])
    graph["k"]["inputs"]["model"] = ["patch", 0]
    assert difference(pixels(host.run(graph)), untouched) > 2


def test_previews_of_the_bundled_model_show_the_image(host: Any) -> None:
    result = host.run(base("pocket-flow", steps=16))
    image = pixels(result)[0].reshape(16, 8, 16, 8, 3).mean((1, 3))
    preview = Image.open(io.BytesIO(result.previews[-1].data["image"])).convert("RGB")
    last = np.asarray(preview.resize((16, 16), Image.Resampling.BOX)).astype(float)
    assert np.abs(last - image).mean() < 25
    assert np.abs(last - image[::-1, ::-1]).mean() > 1.2 * np.abs(last - image).mean()


def test_other_sizes_and_samplers(host: Any, folder: str) -> None:
    graph = base(folder, sampler_name="dpmpp_2m", scheduler="beta", steps=3)
    graph["l"]["inputs"].update(width=192, height=96, batch_size=2)
    assert pixels(host.run(graph)).shape == (2, 96, 192, 3)


def test_a_language_model_as_text_encoder_is_refused_by_name(
    host_models: pathlib.Path, folder: str, complaint: Any
) -> None:
    other = host_models / "diffusers" / "flow_gemma"
    shutil.copytree(host_models / "diffusers" / folder, other)
    config = other / "text_encoder" / "config.json"
    config.write_text(json.dumps({"architectures": ["Gemma2Model"], "model_type": "gemma2"}))
    said = complaint(base(other.name))
    assert "Gemma2Model" in said
    assert "CLIPTextModel" in said
