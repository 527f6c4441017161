"""The shipped folder: standard layout, small, and read alike by transformers 4 and 5."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from slipstream_tools.pocket.models import build_tokenizer
from slipstream_tools.pocket.scenes import VOCABULARY, caption, sample_scene

MB = 1e6
PARTS = ["unet", "unet_lcm", "vae", "text_encoder"]


@pytest.fixture(scope="module")
def pocket(root):
    return root / "pocket"


def weights_of(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def test_everything_together_is_small(pocket):
    assert sum(f.stat().st_size for f in pocket.rglob("*") if f.is_file()) < 16 * MB
    for unet in pocket.glob("unet*"):
        assert weights_of(unet).stat().st_size < 8 * MB


def test_no_pickles(pocket):
    assert not [f for f in pocket.rglob("*") if f.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_finite_half_precision(pocket, part):
    with safe_open(weights_of(pocket / part), "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    assert all(t.isfinite().all() for t in tensors.values())


def test_text_encoder_keys_are_those_of_transformers_4(pocket):
    # Version 5 reads both spellings; version 4 keeps random weights, with a warning only, where the prefix is missing.
    with safe_open(weights_of(pocket / "text_encoder"), "pt") as file:
        assert all(k.startswith("text_model.") for k in file.keys())


def test_text_encoder_is_loaded_not_made_up(pocket):
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(pocket / "text_encoder", dtype=torch.float32)
    name = "embeddings.token_embedding.weight"
    loaded = next(p for k, p in model.named_parameters() if k.endswith(name))
    with safe_open(weights_of(pocket / "text_encoder"), "pt") as file:
        assert torch.equal(loaded, file.get_tensor("text_model." + name).float())


def test_latents_are_an_eighth_of_the_picture(pocket):
    vae = json.loads((pocket / "vae" / "config.json").read_text())
    unet = json.loads((pocket / "unet" / "config.json").read_text())
    assert len(vae["block_out_channels"]) == 4
    assert unet["sample_size"] == 16
    assert unet["cross_attention_dim"] == 64


def test_schedule_is_stable_diffusions(pocket):
    config = json.loads((pocket / "scheduler" / "scheduler_config.json").read_text())
    wanted = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
    assert {k: config[k] for k in wanted} == wanted
    assert config["num_train_timesteps"] == 1000


def test_the_student_has_the_teachers_shape_and_the_lcm_settings(pocket):
    teacher, student = (json.loads((pocket / unet / "config.json").read_text()) for unet in ("unet", "unet_lcm"))
    assert {k: v for k, v in teacher.items() if k[0] != "_"} == {k: v for k, v in student.items() if k[0] != "_"}
    config = json.loads((pocket / "scheduler_lcm" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "LCMScheduler"
    assert (config["original_inference_steps"], config["timestep_scaling"]) == (50, 10.0)


def test_encoding_and_decoding_keeps_a_picture(pocket):
    import numpy as np
    from diffusers import AutoencoderKL
    from slipstream_tools.pocket.scenes import render

    vae = AutoencoderKL.from_pretrained(pocket / "vae", torch_dtype=torch.float32)
    rng = np.random.default_rng(8)
    pictures = render([sample_scene(rng) for _ in range(8)])
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
        decoded = vae.decode(latents).sample.clamp(-1, 1)
    assert latents.shape == (8, 4, 16, 16)
    assert 0.7 < latents.std() * vae.config.scaling_factor < 1.4
    psnr = -10 * ((decoded - pictures) / 2).square().mean((1, 2, 3)).log10()
    assert psnr.mean() > 28


# ---------------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(pocket):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(pocket / "tokenizer")


def test_every_word_is_one_token(tokenizer):
    ids = [tokenizer(word).input_ids for word in VOCABULARY]
    assert {len(i) for i in ids} == {3}  # between the start and the end token
    assert len({i[1] for i in ids}) == len(set(VOCABULARY))


def test_other_words_fall_back_to_letters(tokenizer):
    assert tokenizer.tokenize("zebra") == ["z", "e", "b", "r", "a</w>"]
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_case_does_not_matter_and_long_prompts_are_cut(tokenizer):
    assert tokenizer("A Red Star").input_ids == tokenizer("a red star").input_ids
    assert len(tokenizer("red " * 100, truncation=True).input_ids) == 77


def test_files_of_the_slow_tokenizer_say_the_same(pocket, tokenizer, tmp_path):
    assert {"vocab.json", "merges.txt"} <= {f.name for f in (pocket / "tokenizer").iterdir()}
    vocabulary = json.loads((pocket / "tokenizer" / "vocab.json").read_text())
    assert vocabulary == tokenizer.get_vocab()
    rebuilt = build_tokenizer(tmp_path)
    assert rebuilt.get_vocab() == vocabulary


def test_captions_fit(tokenizer):
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = [len(tokenizer(caption(sample_scene(rng, 2))).input_ids) for _ in range(50)]
    assert max(lengths) < 30
