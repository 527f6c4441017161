"""Single files: every weight comes from where diffusers' own conversion finds it, and every config from the shapes."""

from __future__ import annotations

import pathlib

import pytest
import torch
from diffusers.loaders import single_file_utils as oracle
from slipstream.core import checkpoint
from slipstream.core.checkpoint import Weights
from slipstream_tests.core.checkpoints import TEXTS, Tiny

KINDS = ["sd15", "sd2", "sdxl"]


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(request.param)


@pytest.fixture(scope="module")
def weights(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return Weights(tiny.file(tmp_path_factory.mktemp(tiny.kind) / "model.safetensors"))


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
    wanted = {name.removeprefix("text_model."): tensor for name, tensor in wanted.items()}
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name].reshape(wanted[name].shape), wanted[name]) for name in wanted)


def test_unet_names_are_those_of_diffusers(tiny: Tiny) -> None:
    same(oracle.convert_ldm_unet_checkpoint(tiny.original(), dict(tiny.unet.config)), tiny.unet.state_dict())


def test_vae_names_are_those_of_diffusers(tiny: Tiny) -> None:
    same(oracle.convert_ldm_vae_checkpoint(tiny.original(), dict(tiny.vae.config)), tiny.vae.state_dict())


def test_text_names_are_those_of_diffusers(tiny: Tiny) -> None:
    for text, (prefix, _, _) in zip(tiny.texts, TEXTS[tiny.kind]):
        state = tiny.original()
        if prefix in checkpoint.OPEN_CLIP:
            found = oracle.convert_open_clip_checkpoint(text, state, prefix)
            # SD2 has no projection, its widest layer stands for it; the unused third layer is dropped.
            found = {n: t for n, t in found.items() if "layers.2." not in n}
        else:
            found = oracle.convert_ldm_clip_checkpoint(state, remove_prefix=prefix.removesuffix("text_model."))
        same(found, text.state_dict())


def test_configs_are_read_from_the_shapes(tiny: Tiny, weights: Weights) -> None:
    config = checkpoint.unet_config(weights)
    wanted = dict(tiny.unet.config)
    depths = wanted["transformer_layers_per_block"]
    wanted["transformer_layers_per_block"] = (
        depths if isinstance(depths, list) else [depths] * len(wanted["block_out_channels"])
    )
    assert {name: wanted[name] for name in config} == config
    config = checkpoint.vae_config(weights, checkpoint.VAE, tiny.vae.config.scaling_factor)
    assert {name: tiny.vae.config[name] for name in config} == config
    for text, (prefix, _, _) in zip(tiny.texts, TEXTS[tiny.kind]):
        config = checkpoint.text_config(weights, prefix)
        assert {name: getattr(text.config, name) for name in config} == config


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_down.weight"], "a LoRA"),
        (["unet.up.lora_A.weight"], "a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["down_blocks.0.resnets.0.conv1.weight"], "model_index.json"),
        (["conditioner.embedders.0.model.ln_final.weight"], "refiner"),
        (["edm_vpred.sigma_max", "model.diffusion_model.out.2.weight"], "EDM"),
        (["double_blocks.0.img_attn.qkv.weight"], "a Flux or HunyuanImage model"),
        (["nothing.that.we.know.weight"], "unknown architecture"),
    ],
)
def test_other_files_are_named(tmp_path: pathlib.Path, names: list[str], said: str) -> None:
    from safetensors.torch import save_file

    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    problem = checkpoint.describe_layout(Weights(tmp_path / "x.safetensors"))
    assert problem is not None
    assert said in problem
