"""Tiny random models of SD1.5, SD2 and SDXL, written as diffusers folders and as single files in the original layout."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file
from slipstream.core import checkpoint
from slipstream.core.loading import BUNDLED
from torch import Tensor, nn

VOCABULARY = 655  # of the bundled tokenizer
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [32, 64], "down": [CROSS, PLAIN], "attention_head_dim": 8, "layers_per_block": 2},
    "sd2": {"block_out_channels": [64, 128], "down": [CROSS, PLAIN], "attention_head_dim": [1, 2],
            "layers_per_block": 1, "use_linear_projection": True},
    "sdxl": {"block_out_channels": [32, 64, 64], "down": [PLAIN, CROSS, CROSS], "attention_head_dim": [1, 1, 1],
             "layers_per_block": 2, "use_linear_projection": True, "transformer_layers_per_block": [1, 1, 2],
             "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
             "projection_class_embeddings_input_dim": 128 + 6 * 8},
}  # fmt: skip
TEXTS = {
    "sd15": [(checkpoint.SD_TEXT, 64, "quick_gelu")],
    "sd2": [(checkpoint.SD2_TEXT, 64, "gelu")],
    "sdxl": [(checkpoint.SDXL_TEXT_1, 64, "quick_gelu"), (checkpoint.SDXL_TEXT_2, 128, "gelu")],
}


def make_unet(kind: str) -> Any:
    from diffusers import UNet2DConditionModel

    config = dict(UNETS[kind])
    down = config.pop("down")
    up = [name.replace("Down", "Up") for name in reversed(down)]
    width = sum(width for _, width, _ in TEXTS[kind])
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, cross_attention_dim=width, **config)


def make_vae(kind: str) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[32, 64, 64], layers_per_block=1, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
    )  # fmt: skip


def make_texts(kind: str) -> list[Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    made = []
    for prefix, width, activation in TEXTS[kind]:
        config = CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, hidden_act=activation,
            num_attention_heads=width // 64, max_position_embeddings=77, projection_dim=width, eos_token_id=2,
        )  # fmt: skip
        cls = CLIPTextModelWithProjection if prefix == checkpoint.SDXL_TEXT_2 else CLIPTextModel
        made.append(cls(config))
    return made


class Tiny:
    """One tiny random model: its networks, and both ways to store it."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.kind, self.unet, self.vae, self.texts = kind, make_unet(kind), make_vae(kind), make_texts(kind)
            for module in (self.unet, self.vae, *self.texts):
                randomise(module)

    def folder(self, path: pathlib.Path) -> pathlib.Path:
        """Save as a diffusers folder with the bundled tokenizer."""
        from transformers import CLIPTokenizer

        self.unet.save_pretrained(path / "unet")
        self.vae.save_pretrained(path / "vae")
        for text, (prefix, _, _), suffix in zip(self.texts, TEXTS[self.kind], ("", "_2")):
            text.save_pretrained(path / f"text_encoder{suffix}")
            # The folders of SD2 and SDXL pad OpenCLIP's prompts with "!", which is token 0.
            padding = {"pad_token": "!"} if prefix in checkpoint.OPEN_CLIP else {}
            CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer", **padding).save_pretrained(path / f"tokenizer{suffix}")
        (path / "scheduler").mkdir()
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULE))
        return path

    def original(self) -> dict[str, Tensor]:
        """Return the weights under the names and in the shapes of the original layout."""
        state = original(self.unet, checkpoint.unet_source(dict(self.unet.config)))
        state |= original(self.vae, checkpoint.vae_source(dict(self.vae.config), checkpoint.VAE))
        for text, (prefix, _, _) in zip(self.texts, TEXTS[self.kind]):
            state |= original(text, checkpoint.text_source(prefix))
        for name, tensor in state.items():
            if ".mid.attn_1." in name and tensor.ndim == 2:
                state[name] = tensor[..., None, None]
        if self.kind == "sd2":
            # The file has one more layer than SD2 uses.
            last = {n.replace("resblocks.1.", "resblocks.2."): t for n, t in state.items() if "resblocks.1." in n}
            state |= {n: t.clone() for n, t in last.items()}
        return state

    def file(self, path: pathlib.Path, metadata: dict[str, str] | None = None, **more: Tensor) -> pathlib.Path:
        """Save as a single file, and the bundled tokenizer beside it."""
        save_file({n: t.contiguous() for n, t in {**self.original(), **more}.items()}, path, metadata)
        shutil.copytree(BUNDLED / "tokenizer", path.parent / "tokenizer", dirs_exist_ok=True)
        return path


def randomise(module: nn.Module) -> None:
    """Give every weight a value of its own: fresh layers are full of ones and zeros, which hide a swap."""
    for parameter in module.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)


def original(module: nn.Module, source: Callable[[str], checkpoint.Source]) -> dict[str, Tensor]:
    """Invert the renaming of `core/checkpoint.py`; the tests check the names against diffusers' own conversion."""
    state: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for key, tensor in module.state_dict().items():
        at = source(key)
        if at.third is not None:
            thirds.setdefault(at.name, {})[at.third] = tensor
        else:
            state[at.name] = tensor.T if at.transposed else tensor
    return state | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}
