"""The pocket model's parts: tokenizer, text encoder, autoencoder, UNet, schedulers; and how they are saved."""

from __future__ import annotations

import copy
import json
import pathlib
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .scenes import VOCABULARY

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

TOKENS = 77
TEXT_WIDTH = 64
LATENT_SIDE = 16
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json")


# ---------------------------------------------------------------------------------------------------------------- tokenizer


def _byte_letters() -> list[str]:
    """The 256 printable letters by which byte-level BPE writes the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def _merge(letters: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for letter in letters:
        if merged and (merged[-1], letter) == pair:
            merged[-1] += letter
        else:
            merged.append(letter)
    return merged


def _train_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair until every word is one token. Chaining each word's letters would make merges conflict."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(s) > 1 for s in spelled):
        counts = Counter(pair for s in spelled for pair in zip(s, s[1:]))
        best = max(sorted(counts), key=counts.__getitem__)
        merges.append(best)
        spelled = [_merge(s, best) for s in spelled]
    return merges


def build_tokenizer(folder: pathlib.Path, words: Sequence[str] = VOCABULARY, length: int = TOKENS) -> CLIPTokenizer:
    """Write and load a CLIP tokenizer in which each of `words` is one token; other words fall back to letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    merges = _train_merges(sorted(set(words)))
    letters = _byte_letters()
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    vocabulary = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    end = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    special = {"bos_token": "<|startoftext|>", **end}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, (B, the tokenizer's length)."""
    return torch.tensor(tokenizer(captions, padding="max_length", truncation=True).input_ids)


# ----------------------------------------------------------------------------------------------------------------- networks


def make_text_encoder(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def make_vae(channels: tuple[int, ...], latent_channels: int = 4) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=LATENT_SIDE * 2 ** (len(channels) - 1),
    )


def make_unet(channels: tuple[int, ...]) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule: 1000 scaled-linear steps, epsilon prediction."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def make_lcm_scheduler() -> LCMScheduler:
    from diffusers import LCMScheduler

    return LCMScheduler.from_config({**make_scheduler().config, "original_inference_steps": 50})


# ------------------------------------------------------------------------------------------------------------------- saving


def _half(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("cpu", memory_format=torch.contiguous_format).half()


def save_half(module: nn.Module, folder: pathlib.Path) -> None:
    """Write a diffusers module as fp16 safetensors, without the folder it once came from."""
    _half(module).save_pretrained(folder, safe_serialization=True)
    config = folder / "config.json"
    entries = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
    config.write_text(json.dumps(entries, indent=2) + "\n")


def save_pipeline(
    folder: pathlib.Path, vae: nn.Module, text: nn.Module, tokenizer: CLIPTokenizer, unet: nn.Module
) -> None:
    """Write a fp16 `StableDiffusionPipeline` folder that transformers 4 and 5 load alike."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=_half(text),
        tokenizer=tokenizer,
        unet=_half(unet),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    make_portable(folder, pathlib.Path(tokenizer.name_or_path))


def make_portable(folder: pathlib.Path, tokenizer_folder: pathlib.Path) -> None:
    """Undo what keeps transformers 4 from reading what transformers 5 wrote.

    Version 5 drops the prefix `text_model.` from the keys (version 4 then keeps random weights, with a warning only),
    and writes tokenizer.json alone (the slow tokenizer of version 4 needs the vocabulary and the merges).
    """
    from safetensors.torch import load_file, save_file

    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    if not any(key.startswith("text_model.") for key in state):
        save_file({f"text_model.{k}": v.contiguous() for k, v in state.items()}, weights, metadata={"format": "pt"})
    for name in _TOKENIZER_FILES:
        source = tokenizer_folder / name
        if source.exists() and source.parent != folder / "tokenizer":
            shutil.copy(source, folder / "tokenizer" / name)
