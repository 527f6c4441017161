"""Fused networks for inference: the weights of a network of diffusers in place, and fewer operators for the same numbers.

What does not depend on the latents is computed once: keys and values of the prompt, and the projections of the time embedding. q, k
and v of a self-attention are one product. Divisions by 1, dropout, and copies that only change the layout are left out. The network
itself is not touched: a `FusedUnet` calls its layers, so weights that change in place or are replaced count from the next call on.

Numbers differ from the network's own in rounding only: the bias of a convolution is added together with the time, and one product of
three matrices may be summed in another order. Relative differences stay below 1e-5 in float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .taps import plain_type
from .transfer import mark, receive

# (sample (B, C, H, W), times (B, P, 1, 1), texts (B, K), bias (B, 1, 1, T) or None) -> output (B, C, H, W)
Run = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


class Watch:
    """Tells whether layers or their weights were replaced or changed in place. An edit through `.data` cannot be seen."""

    def __init__(self, layers: list[tuple[nn.Module, str]]) -> None:
        """`layers` are (owner, name in it)."""
        self._layers = [(owner._modules, name, owner._modules[name]) for owner, name in layers]
        self._slots = [
            (layer._parameters, key) for _, _, layer in self._layers if layer is not None for key in layer._parameters
        ]
        self.look()

    def look(self) -> None:
        """Take what is there now as unchanged."""
        found = [(table[key], key) for table, key in self._slots]
        self._weights = [
            None if weight is None else (weight, _version(weight), weight.data_ptr()) for weight, _ in found
        ]

    @property
    def intact(self) -> bool:
        """Whether all layers are the ones from the start."""
        return all(table.get(name) is layer for table, name, layer in self._layers)

    @property
    def changed(self) -> bool:
        for (table, key), before in zip(self._slots, self._weights):
            weight = table[key]
            if before is None or weight is None:
                if before is not weight:
                    return True
            elif weight is not before[0] or _version(weight) != before[1] or weight.data_ptr() != before[2]:
                return True
        return False


class FusedUnet(nn.Module):
    """A UNet2DConditionModel of the usual blocks as one function of what changes from frame to frame.

    `joined` are the weights of q, k and v of each self-attention in one matrix: the only copies, `extra_bytes` large.
    """

    def __init__(self, unet: Any) -> None:
        """Raises ValueError with the part that no rule here knows."""
        super().__init__()
        refusal = unknown_part(unet)
        if refusal:
            raise ValueError(f"Expected a UNet of the usual blocks, but got {refusal}. It runs as it is.")
        self.unet = unet
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        self.resnets = [resnet for block in blocks for resnet in block.resnets]
        self.attentions = [a for block in blocks for a in getattr(block, "attentions", ()) or ()]
        layers = [layer for a in self.attentions for layer in a.transformer_blocks]
        self.selves, self.crosses = [layer.attn1 for layer in layers], [layer.attn2 for layer in layers]
        self.widths = [resnet.conv1.out_channels for resnet in self.resnets]
        self.sizes = [attention.to_k.out_features for attention in self.crosses]
        self.version = 0  # rises when weights have changed that times and texts were computed with
        with torch.inference_mode(False), torch.no_grad():
            self.joined = [torch.cat(weights_of(attention)) for attention in self.selves]
        self.made = mark(self.joined)  # the event after which another CUDA stream may read them
        self._bypassed = [m for m in unet.modules() if plain_type(m).__name__ in BYPASSED]
        self._processors = [attention.processor for attention in (*self.selves, *self.crosses)]
        self._watch = Watch(
            [(a, name) for a in (*self.selves, *self.crosses) for name in ("to_q", "to_k", "to_v")]
            + [(resnet, name) for resnet in self.resnets for name in ("time_emb_proj", "conv1")]
            + [(owner, name) for owner in _time_modules(unet) for name in ("linear_1", "linear_2")]
        )  # fmt: skip

    @property
    def extra_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.joined)

    @property
    def intact(self) -> bool:
        """Whether the network has the layers that it was read with (an adapter of PEFT replaces them), and no hooks or FreeU since."""
        hooks = any(module._forward_hooks or module._forward_pre_hooks for module in self._bypassed)
        attentions = zip((*self.selves, *self.crosses), self._processors)
        return (
            self._watch.intact and not hooks and not _freeu(self.unet) and all(a.processor is p for a, p in attentions)
        )

    def refresh(self, force: bool = False) -> None:
        """Take over weights that have changed, into the same memory."""
        if force or self._watch.changed:
            with torch.inference_mode(False), torch.no_grad():
                for i, (joined, attention) in enumerate(zip(self.joined, self.selves)):
                    weights = weights_of(attention)
                    if (joined.device, joined.dtype) != (weights[0].device, weights[0].dtype):
                        self.joined[i] = torch.cat(weights)
                    else:
                        torch.cat(weights, out=joined)
            self.made = mark(self.joined)
            self._watch.look()
            self.version += 1

    def times(self, timestep: Tensor, context: Tensor, added: dict[str, Tensor] | None = None) -> Tensor:
        """Return what time adds in each residual block (B, P, 1, 1), the bias of its first convolution included."""
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample=context, timestep=timestep))
        extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=context, added_cond_kwargs=added)
        emb = F.silu(emb if extra is None else emb + extra)
        found = [resnet.time_emb_proj(emb) + resnet.conv1.bias for resnet in self.resnets]
        return torch.cat(found, 1)[:, :, None, None]

    def texts(self, context: Tensor) -> Tensor:
        """Return keys and values of every cross-attention (B, K) for token embeddings (B, T, D)."""
        found = []
        for attention in self.crosses:
            pair = torch.stack((attention.to_k(context), attention.to_v(context)), 1)
            found.append(rearrange(pair, "b two t (heads d) -> b (two heads t d)", heads=attention.heads))
        return torch.cat(found, 1)

    def text_bias(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return what a mask of tokens (B, T) adds to the scores, (B, 1, 1, T)."""
        return None if mask is None else ((1 - mask.to(dtype)) * -10000.0)[:, None, None]

    def forward(self, sample: Tensor, times: Tensor, texts: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the network's output for `sample` (B, C, H, W); the rest is what the methods above gave, a row each."""
        unet, state = self.unet, _Walk(self, times, texts, bias)
        x = unet.conv_in(sample)
        skips = [x]
        for block in unet.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = state.block(block, i, resnet, x)
                skips.append(x)
            for downsampler in block.downsamplers or ():
                x = downsampler(x)
                skips.append(x)
        x = state.resnet(unet.mid_block.resnets[0], x)
        for attention, resnet in zip(unet.mid_block.attentions, unet.mid_block.resnets[1:]):
            x = state.resnet(resnet, state.transformer(attention, x))
        for block in unet.up_blocks:
            for i, resnet in enumerate(block.resnets):
                x = state.block(block, i, resnet, torch.cat((x, skips.pop()), 1))
            for upsampler in block.upsamplers or ():
                # Odd sides were rounded up on the way down.
                height, width = skips[-1].shape[2:]
                x = upsampler(x, None if (height, width) == (2 * x.shape[2], 2 * x.shape[3]) else (height, width))
        return unet.conv_out(F.silu(unet.conv_norm_out(x)))  # type: ignore[no-any-return]


class Prepared:
    """Times and texts of fixed arguments, computed again when the weights that they come from have changed."""

    def __init__(
        self, fused: FusedUnet, timestep: Tensor, encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None, encoder_attention_mask: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The arguments are those of the UNet, a row for each sample."""
        self.fused, self.timestep, self.context = fused, timestep, encoder_hidden_states
        self.added, self.mask = added_cond_kwargs, encoder_attention_mask
        self._version = -1
        self._tensors: tuple[Tensor, Tensor, Tensor | None] | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (times, texts, bias) as `FusedUnet.forward` takes them."""
        fused = self.fused
        fused.refresh()
        if self._tensors is None or self._version != fused.version:
            receive(fused.made, fused.joined)
            bias = fused.text_bias(self.mask, self.context.dtype)
            self._tensors = fused.times(self.timestep, self.context, self.added), fused.texts(self.context), bias
            self._version = fused.version
        return self._tensors


class _Walk:
    """One pass through the blocks: gives each its share of times and texts."""

    def __init__(self, fused: FusedUnet, times: Tensor, texts: Tensor, bias: Tensor | None) -> None:
        tokens = texts.shape[1] // (2 * sum(fused.sizes)) if fused.sizes else 0
        self.times: Iterator[Tensor] = iter(times.split(fused.widths, 1))
        self.texts: Iterator[Tensor] = iter(texts.split([2 * size * tokens for size in fused.sizes], 1))
        self.joined, self.tokens, self.bias = iter(fused.joined), tokens, bias

    def block(self, block: Any, i: int, resnet: Any, x: Tensor) -> Tensor:
        x = self.resnet(resnet, x)
        attentions = getattr(block, "attentions", None)
        return self.transformer(attentions[i], x) if attentions is not None else x

    def resnet(self, resnet: Any, x: Tensor) -> Tensor:
        conv = resnet.conv1
        h = F.conv2d(F.silu(resnet.norm1(x)), conv.weight, None, conv.stride, conv.padding) + next(self.times)
        h = resnet.conv2(F.silu(resnet.norm2(h)))
        return (x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)) + h  # type: ignore[no-any-return]

    def transformer(self, module: Any, x: Tensor) -> Tensor:
        # Tokens keep their rows and columns, (B, H, W, C): of latents in channels_last that is the memory as it lies.
        h = module.norm(x)
        if module.use_linear_projection:
            h = module.proj_in(h.permute(0, 2, 3, 1))
        else:
            h = module.proj_in(h).permute(0, 2, 3, 1)
        for layer in module.transformer_blocks:
            h = self.self_attention(layer.attn1, layer.norm1(h)) + h
            h = self.cross_attention(layer.attn2, layer.norm2(h)) + h
            h = layer.ff.net[2](layer.ff.net[0](layer.norm3(h))) + h
        if module.use_linear_projection:
            return x + module.proj_out(h).permute(0, 3, 1, 2)
        return x + module.proj_out(h.permute(0, 3, 1, 2))  # type: ignore[no-any-return]

    def self_attention(self, attention: Any, x: Tensor) -> Tensor:
        parts = F.linear(x, next(self.joined)).view(len(x), -1, 3, attention.heads, x.shape[-1] // attention.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(attention, x, q, k, v, None)

    def cross_attention(self, attention: Any, x: Tensor) -> Tensor:
        width = x.shape[-1] // attention.heads
        q = attention.to_q(x).view(len(x), -1, attention.heads, width).transpose(1, 2)
        k, v = next(self.texts).view(len(x), 2, attention.heads, self.tokens, width).unbind(1)
        return self.attend(attention, x, q, k, v, self.bias)

    def attend(self, attention: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return attention.to_out[0](out.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


def weights_of(attention: Any) -> list[Tensor]:
    return [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]


def _time_modules(unet: Any) -> list[nn.Module]:
    return [unet.time_embedding, *([unet.add_embedding] if getattr(unet, "add_embedding", None) is not None else [])]


DOWN, MID, UP = (
    ("DownBlock2D", "CrossAttnDownBlock2D"),
    ("UNetMidBlock2DCrossAttn",),
    ("UpBlock2D", "CrossAttnUpBlock2D"),
)
# Settings of a UNet and what they must be for the rules above; what is missing in an older config is as it must be.
PLAIN_SETTINGS: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None, "text_time"), "class_embed_type": (None,), "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,), "encoder_hid_dim": (None,), "time_cond_proj_dim": (None,), "center_input_sample": (False,),
    "time_embedding_act_fn": (None,), "cross_attention_norm": (None,), "attention_type": ("default",), "act_fn": ("silu", "swish"),
}  # fmt: skip


def unknown_part(unet: Any) -> str:
    """Return the first part of a network that `FusedUnet` has no rule for, "" where it knows all."""
    name = plain_type(unet).__name__
    if name != "UNet2DConditionModel":
        return name
    for setting, known in PLAIN_SETTINGS.items():
        if unet.config.get(setting, known[0]) not in known:
            return f"`{setting}` {unet.config[setting]}"
    for blocks, types in ((unet.down_blocks, DOWN), ([unet.mid_block], MID), (unet.up_blocks, UP)):
        for block in blocks:
            if plain_type(block).__name__ not in types:
                return plain_type(block).__name__
    if _freeu(unet):
        return "FreeU"
    for path, module in unet.named_modules():
        kind = plain_type(module).__name__
        if not KNOWN.get(kind, _any)(module) or (
            kind in BYPASSED and (module._forward_hooks or module._forward_pre_hooks)
        ):
            return f"{kind} at {path} with settings or hooks of its own"
    return ""


def _any(module: Any) -> bool:
    return True


def _freeu(unet: Any) -> bool:
    return any(getattr(block, f"{name}{i}", None) for block in unet.up_blocks for name in "sb" for i in (1, 2))


def _plain_resnet(m: Any) -> bool:
    plain = (
        m.time_embedding_norm == "default"
        and m.output_scale_factor == 1
        and not m.skip_time_act
        and m.time_emb_proj is not None
    )
    layers = (m.conv1, m.conv2, m.time_emb_proj)
    return (
        plain
        and m.upsample is None
        and m.downsample is None
        and isinstance(m.nonlinearity, nn.SiLU)
        and _plain_layers(*layers)
    )


def _plain_layers(*layers: Any) -> bool:
    return all(plain_type(layer) in (nn.Linear, nn.Conv2d) for layer in layers) and layers[0].bias is not None


def _plain_attention(m: Any) -> bool:
    # In the layer's own call too these do nothing then.
    absent = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    linear = all(plain_type(layer) is nn.Linear for layer in (m.to_q, m.to_k, m.to_v))
    usual = (
        type(m.processor).__name__ == "AttnProcessor2_0" and m.rescale_output_factor == 1 and not m.residual_connection
    )
    if not linear or m.to_q.bias is not None or m.to_q.in_features != m.to_q.out_features:
        return False
    usual = usual and m.scale == (m.to_q.out_features // m.heads) ** -0.5
    return usual and all(not getattr(m, name, None) for name in absent)


def _plain_transformer(m: Any) -> bool:
    return bool(m.is_input_continuous) and all(
        plain_type(b).__name__ == "BasicTransformerBlock" for b in m.transformer_blocks
    )


def _plain_layer(m: Any) -> bool:
    ff = [type(part).__name__ for part in m.ff.net]
    usual = m.norm_type == "layer_norm" and m.pos_embed is None and not m.only_cross_attention and m._chunk_size is None
    return usual and m.attn2 is not None and ff == ["GEGLU", "Dropout", "Linear"]


KNOWN: dict[str, Callable[[Any], bool]] = {
    "ResnetBlock2D": _plain_resnet, "Attention": _plain_attention, "Transformer2DModel": _plain_transformer,
    "BasicTransformerBlock": _plain_layer,
}  # fmt: skip

# What is not called as a whole, so that hooks on it would have no effect.
BYPASSED = (*DOWN, *MID, *UP, *KNOWN, "UNet2DConditionModel", "FeedForward")

# The fused networks that somebody uses, by the id of theirs: pipelines of the same files share one.
_shared: weakref.WeakValueDictionary[int, FusedUnet] = weakref.WeakValueDictionary()


def fused_unet(unet: Any) -> FusedUnet | None:
    """Return the `FusedUnet` of a network, made where none is in use; None where the network has a part that no rule knows."""
    found = _shared.get(id(unet))
    if found is None or not found.intact:
        if unknown_part(unet):
            return None
        _shared[id(unet)] = found = FusedUnet(unet)
    return found
