"""The diffusion transformer of pocket-flow: diffusers' Lumina2 class (NextDiT) in small, fast attention for training it, and its folder."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import make_portable, save_half
from .train_flow_text import LENGTH, WIDTH
from .train_flow_vae import LATENT_CHANNELS

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

SIDE = 16  # latents
SHIFT = 2.0


def make_transformer(width: int, layers: int, heads: int) -> Lumina2Transformer2DModel:
    """A NextDiT with one refiner each for text and image; its feed-forward layers are twice as wide as it."""
    from diffusers import Lumina2Transformer2DModel

    head = width // heads
    side = head * 3 // 16 * 2
    model = Lumina2Transformer2DModel(
        sample_size=SIDE,
        in_channels=LATENT_CHANNELS,
        hidden_size=width,
        num_layers=layers,
        num_refiner_layers=1,
        num_attention_heads=heads,
        num_kv_heads=heads,
        multiple_of=32,
        ffn_dim_multiplier=0.5,
        axes_dim_rope=(head - 2 * side, side, side),
        axes_lens=(300, 512, 512),
        cap_feat_dim=WIDTH,
    )
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: Lumina2Transformer2DModel) -> None:
    """Zero gates and output; a time embedding that can tell levels apart.

    The class embeds t in [0, 1] by sines of at most one radian, so that its inputs hardly differ: the first layer starts as a bank of
    switches at random times, in place of nearly constant ones.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if name.endswith(("norm1.linear", "norm_out.linear_1", "norm_out.linear_2")):
            nn.init.zeros_(module.weight)
    for block in (*model.noise_refiner, *model.layers):
        block.norm1.linear.bias.view(4, -1)[[1, 3]] = 0.5  # gates of attention and feed-forward
    first = model.time_caption_embed.timestep_embedder.linear_1
    slope = 8 * torch.randn(first.out_features)
    first.weight.zero_()
    first.weight[:, first.in_features // 2] = slope  # sin(t)
    first.bias[:] = -slope * torch.rand_like(slope) * 0.84


class RealRope:
    """Lumina2's attention with rotations in real float32: diffusers' own computes them in complex float64."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None, base_sequence_length: int | None = None,
    ) -> Tensor:  # fmt: skip
        rows, tokens, _ = hidden_states.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(rows, tokens, attn.heads, -1)

        query, key = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states)).transpose(1, 2)
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            query, key = query * cos + _quarter_turn(query) * sin, key * cos + _quarter_turn(key) * sin
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _quarter_turn(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Trainer(nn.Module):
    """The forward pass of a Lumina2 transformer for rows of one text length and no padding: the same values, without its loops."""

    def __init__(self, model: Lumina2Transformer2DModel, text: int = LENGTH, side: int = SIDE) -> None:
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.model, self.text, self.side = model, text, side // model.config.patch_size
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(RealRope())
        self.register_buffer("tables", self._tables(), persistent=False)

    def compile_blocks(self) -> None:
        """Compile each block; blocks of one kind share what is compiled, so that it takes seconds."""
        for block in (*self.model.context_refiner, *self.model.noise_refiner, *self.model.layers):
            block.compile(dynamic=False)

    def _tables(self) -> Tensor:
        """Cosines and sines of all positions, (2, text + image, 1, head width): text along the first axis, image along the others."""
        at = torch.arange(self.side)
        down, across = at.repeat_interleave(self.side), at.repeat(self.side)
        image = torch.stack([torch.full_like(down, self.text), down, across], 1)
        text = torch.stack([torch.arange(self.text), *[torch.zeros(self.text, dtype=torch.long)] * 2], 1)
        angles = []
        for axis, width in enumerate(self.model.config.axes_dim_rope):
            rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            angles.append(torch.cat([text, image])[:, axis, None] * rates)
        turned = torch.cat(angles, 1).repeat_interleave(2, 1)[:, None]
        return torch.stack([turned.cos(), turned.sin()]).float()

    def forward(self, latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Data minus noise for latents (B, C, h, w) at times t (B,), 0 for noise, and text (B, L, width)."""
        model, p, side = self.model, self.model.config.patch_size, self.side
        time, text = model.time_caption_embed(latents, t, context)
        x = latents.unflatten(3, (side, p)).unflatten(2, (side, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = model.x_embedder(x)
        for layer in model.context_refiner:
            text = layer(text, None, self.tables[:, : self.text])
        for layer in model.noise_refiner:
            x = layer(x, None, self.tables[:, self.text :], time)
        x = torch.cat([text, x], 1)
        for layer in model.layers:
            x = layer(x, None, self.tables, time)
        x = model.norm_out(x, time)[:, self.text :]
        return x.unflatten(2, (p, p, -1)).unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def save_folder(folder: pathlib.Path, vae: nn.Module, text: nn.Module, tokenizer: Any, transformer: nn.Module) -> None:
    """Write a diffusers folder in fp16."""
    for name, part in (("vae", vae), ("text_encoder", text), ("transformer", transformer)):
        save_half(part, folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    make_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "Lumina2Pipeline",
        "_diffusers_version": "0.33.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "Lumina2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    make_portable(folder, pathlib.Path(tokenizer.name_or_path))
