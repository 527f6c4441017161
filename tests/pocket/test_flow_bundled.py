"""The shipped flow model: standard layout, small, alike in library and diffusers, and its card says how well it draws."""

from __future__ import annotations

import json

import pytest
import slipstream
import torch
from safetensors import safe_open
from slipstream_tools.pocket.emoji import OBJECTS
from slipstream_tools.pocket.flow_checker import load_flow_checker, score
from slipstream_tools.pocket.flow_sampling import FlowPipeline, held_out, shifted_sigmas
from slipstream_tools.pocket.flow_scenes import WORDS
from slipstream_tools.pocket.train_flow_text import LENGTH

MB = 1e6


@pytest.fixture(scope="module")
def folder(root):
    return root / "pocket_flow"


@pytest.fixture(scope="module")
def pipe():
    return slipstream.load("pocket-flow", device="cpu", dtype=torch.float32)


def test_all_bundled_weights_together_are_small(root, folder):
    files = [f for name in ("pocket", "pocket_flow") for f in (root / name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 28 * MB
    assert max(f.stat().st_size for f in files) < 16 * MB
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_are_finite_half_precision(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(t.isfinite().all() for t in tensors.values())
    assert part != "text_encoder" or all(k.startswith("text_model.") for k in tensors)


def test_it_is_a_flow_model_of_sixteen_channels_and_factor_eight(pipe):
    assert pipe.model.space.name == "flow"
    assert pipe.latent_channels == 16
    assert pipe.downscale == 8
    assert pipe.encode_text(["a large cat on the left on a blue background"]).context.shape == (1, LENGTH, 128)


def test_each_word_of_its_captions_is_one_token(folder):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert {word: len(tokenizer(word, add_special_tokens=False).input_ids) for word in WORDS} == dict.fromkeys(WORDS, 1)


@torch.no_grad()
def test_the_library_samples_it_as_the_recipe_does(folder, pipe):
    captions = ["a large red circle in the center on a blue background"]
    recipe = FlowPipeline(folder).draw(captions, steps=4)
    cond = pipe.encode_text([captions[0], ""])
    guided = slipstream.core.CFG(pipe.model, cond.take([0]), cond.take([1]), 3.0)
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    shift = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["shift"]
    latents = slipstream.core.samplers.euler(guided, noise, shifted_sigmas(4, shift), pipe.model.space)
    torch.testing.assert_close(pipe.decode(latents).permute(0, 3, 1, 2), (recipe + 1) / 2, atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_caption_decides_everything_that_the_checker_reads(folder):
    scenes, captions = held_out(8, 0.25, tuple(OBJECTS))
    images = FlowPipeline(folder).draw(captions, steps=10)
    found = score(load_flow_checker(), images, scenes)
    assert min(found["background"], found["place"], found["count"]) == 1
    assert found["object"] >= 7 / 8
    assert score(load_flow_checker(), images.flip(0), scenes)["object"] < 0.5
