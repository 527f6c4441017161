"""Fused networks for inference: the weights of a network of diffusers in place, and fewer operators for the same numbers.

What does not depend on the latents is computed once: keys and values of the prompt, and the projections of the time embedding. q, k
and v of a self-attention are one product. Divisions by 1, dropout, and copies that only change the layout are left out. The network
itself is not touched: a `FusedUnet` calls its layers, so weights that change in place or are replaced count from the next call on.

Numbers differ from the network's own in rounding only: the bias of a convolution is added together with the time, and one product of
three matrices may be summed in another order. Relative differences stay below 1e-5 in float32.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


# How heads attend: (q (B, heads, T, d), k, v (B, heads, S, d), bias or None) -> (B, T, heads, d) or (B, T, heads * d)
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
Size = tuple[int, int] | None


@dataclass(eq=False)
class Resnet:
    """A residual block: its layers, and the projection of the time."""

    norm1: Any
    conv1: Any
    norm2: Any
    conv2: Any
    shortcut: Any  # None where the input is added as it is
    project: Any


@dataclass(eq=False)
class Heads:
    """An attention layer; `joined` has the weights of q, k and v in one matrix, None where they are not plain tensors."""

    owner: Any
    to_out: Any
    heads: int
    attend: Attend
    joined: Tensor | None = None

    @property
    def weights(self) -> list[Tensor]:
        return [self.owner.to_q.weight, self.owner.to_k.weight, self.owner.to_v.weight]


@dataclass(eq=False)
class Layer:
    """A transformer layer: self-attention, cross-attention, and a gated feed-forward of two parts."""

    norm1: Any
    attn1: Heads
    norm2: Any
    attn2: Heads
    norm3: Any
    ff: tuple[Any, Any]


@dataclass(eq=False)
class Transformer:
    """Transformer layers over the cells of an image."""

    norm: Any
    proj_in: Any
    layers: list[Layer]
    proj_out: Any
    linear: bool  # whether the projections are linear layers, not convolutions


@dataclass(eq=False)
class Resample:
    """What halves an image or doubles it: `call(x, size)`, of which `size` is None where that is exact."""

    call: Callable[[Tensor, Size], Tensor]


Step = Resnet | Transformer | Resample


@dataclass(eq=False)
class Parts:
    """A UNet as lists of steps. What each list of `inputs` gives is kept for one of `outputs`, in reverse order.

    `embed` maps the arguments of time (timestep, context, and whatever else there is) to the embedding that residual blocks project, the
    activation included. `bypassed` are modules that are not called as a whole, so that hooks on them would have no effect; `same()`
    tells whether anything else that the steps were read from is as it was. `watched` are (owner, name) of the layers that times, texts and
    joined weights come from. `plain` tells whether a layer's weights are tensors that may be read at any time.
    """

    conv_in: Any
    inputs: list[list[Step]]
    middle: list[Step]
    outputs: list[list[Step]]
    out: Callable[[Tensor], Tensor]
    embed: Callable[..., Tensor]
    watched: list[tuple[Any, str]]
    bypassed: list[Any]
    same: Callable[[], bool] = lambda: True
    plain: Callable[[Any], bool] = lambda layer: True

    def steps(self) -> Iterator[Step]:
        for steps in (*self.inputs, self.middle, *self.outputs):
            yield from steps


class FusedUnet(nn.Module):
    """A UNet of the usual blocks as one function of what changes from frame to frame.

    `extra_bytes` is the size of the only copies of weights, those of q, k and v of each self-attention in one matrix.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.resnets = [step for step in parts.steps() if isinstance(step, Resnet)]
        layers = [layer for step in parts.steps() if isinstance(step, Transformer) for layer in step.layers]
        self.selves, self.crosses = [layer.attn1 for layer in layers], [layer.attn2 for layer in layers]
        self.widths = [resnet.conv1.out_channels for resnet in self.resnets]
        self.sizes = [attention.owner.to_k.out_features for attention in self.crosses]
        self.folded = [parts.plain(resnet.conv1) for resnet in self.resnets]
        self.version = 0  # rises when weights have changed that times and texts were computed with
        self._join()
        watched = [(a.owner, name) for a in (*self.selves, *self.crosses) for name in ("to_q", "to_k", "to_v")]
        self._watch = Watch([*watched, *parts.watched])

    def _join(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for attention in self.selves:
                owner, joined = attention.owner, attention.joined
                if not all(self.parts.plain(layer) for layer in (owner.to_q, owner.to_k, owner.to_v)):
                    attention.joined = None
                elif joined is None or (joined.device, joined.dtype) != (
                    owner.to_q.weight.device,
                    owner.to_q.weight.dtype,
                ):
                    attention.joined = torch.cat(attention.weights)
                else:
                    torch.cat(attention.weights, out=joined)
        self.made = mark(self.joined)  # the event after which another CUDA stream may read them

    @property
    def joined(self) -> list[Tensor]:
        return [attention.joined for attention in self.selves if attention.joined is not None]

    @property
    def plain(self) -> bool:
        """Whether all weights are tensors that stay where they are, so that a pass can be recorded."""
        return len(self.joined) == len(self.selves) and all(self.folded)

    @property
    def extra_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.joined)

    @property
    def intact(self) -> bool:
        """Whether the network has the layers that it was read with (an adapter of PEFT replaces them), and no hooks or FreeU since."""
        hooks = any(module._forward_hooks or module._forward_pre_hooks for module in self.parts.bypassed)
        return self._watch.intact and not hooks and self.parts.same()

    def refresh(self, force: bool = False) -> None:
        """Take over weights that have changed, into the same memory."""
        if force or self._watch.changed:
            self._join()
            self._watch.look()
            self.version += 1

    def times(self, timestep: Tensor, context: Tensor, *more: Any) -> Tensor:
        """Return what time adds in each residual block (B, P, 1, 1), with the bias of its first convolution where that is folded in."""
        emb = self.parts.embed(timestep, context, *more)
        found = [
            resnet.project(emb) + resnet.conv1.bias if folded else resnet.project(emb)
            for resnet, folded in zip(self.resnets, self.folded)
        ]
        return torch.cat(found, 1)[:, :, None, None]

    def texts(self, context: Tensor) -> Tensor:
        """Return keys and values of every cross-attention (B, K) for token embeddings (B, T, D)."""
        found = []
        for attention in self.crosses:
            pair = torch.stack((attention.owner.to_k(context), attention.owner.to_v(context)), 1)
            found.append(rearrange(pair, "b two t (heads d) -> b (two heads t d)", heads=attention.heads))
        return torch.cat(found, 1)

    def text_bias(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return what a mask of tokens (B, T) adds to the scores, (B, 1, 1, T)."""
        return None if mask is None else ((1 - mask.to(dtype)) * -10000.0)[:, None, None]

    def forward(
        self, sample: Tensor, times: Tensor, texts: Tensor, bias: Tensor | None = None,
        control: Callable[[Tensor, str], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the network's output for `sample` (B, C, H, W); the rest is what the methods above gave, a row each.

        `control(h, place)` adds what a ControlNet gives after each "input", the "middle", and to each kept "output".
        """
        parts, walk = self.parts, _Walk(self, times, texts, bias)
        control = control or _untouched
        x = control(parts.conv_in(sample), "input")
        skips = [x]
        for steps in parts.inputs:
            x = control(walk(steps, x, None), "input")
            skips.append(x)
        x = control(walk(parts.middle, x, None), "middle")
        for steps in parts.outputs:
            x = torch.cat((x, control(skips.pop(), "output")), 1)
            x = walk(steps, x, skips[-1].shape[2:] if skips else None)
        return parts.out(x)


def _untouched(h: Tensor, place: str) -> Tensor:
    return h


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
            times = fused.times(self.timestep, self.context, *([] if self.added is None else [self.added]))
            self._tensors = times, fused.texts(self.context), bias
            self._version = fused.version
        return self._tensors


class _Walk:
    """One pass through the blocks: gives each its share of times and texts."""

    def __init__(self, fused: FusedUnet, times: Tensor, texts: Tensor, bias: Tensor | None) -> None:
        tokens = texts.shape[1] // (2 * sum(fused.sizes)) if fused.sizes else 0
        self.times: Iterator[Tensor] = iter(times.split(fused.widths, 1))
        self.texts: Iterator[Tensor] = iter(texts.split([2 * size * tokens for size in fused.sizes], 1))
        self.folded, self.tokens, self.bias = iter(fused.folded), tokens, bias

    def __call__(self, steps: list[Step], x: Tensor, size: Sequence[int] | None) -> Tensor:
        """Return `x` after some steps; `size` is that of the latents that are joined next."""
        for step in steps:
            if isinstance(step, Resnet):
                x = self.resnet(step, x)
            elif isinstance(step, Transformer):
                x = self.transformer(step, x)
            else:
                # Odd sides were rounded up on the way down.
                exact = size is None or (size[0], size[1]) == (2 * x.shape[2], 2 * x.shape[3])
                x = step.call(x, None if exact or size is None else (size[0], size[1]))
        return x

    def resnet(self, step: Resnet, x: Tensor) -> Tensor:
        conv, h = step.conv1, F.silu(step.norm1(x))
        h = F.conv2d(h, conv.weight, None, conv.stride, conv.padding) if next(self.folded) else conv(h)
        h = step.conv2(F.silu(step.norm2(h + next(self.times))))
        return (x if step.shortcut is None else step.shortcut(x)) + h

    def transformer(self, step: Transformer, x: Tensor) -> Tensor:
        # Tokens keep their rows and columns, (B, H, W, C): of latents in channels_last that is the memory as it lies.
        h = step.norm(x)
        h = step.proj_in(h.permute(0, 2, 3, 1)) if step.linear else step.proj_in(h).permute(0, 2, 3, 1)
        for layer in step.layers:
            h = self.self_attention(layer.attn1, layer.norm1(h)) + h
            h = self.cross_attention(layer.attn2, layer.norm2(h)) + h
            h = layer.ff[1](layer.ff[0](layer.norm3(h))) + h
        if step.linear:
            return x + step.proj_out(h).permute(0, 3, 1, 2)
        return x + step.proj_out(h.permute(0, 3, 1, 2))

    def self_attention(self, attention: Heads, x: Tensor) -> Tensor:
        shape = len(x), -1, attention.heads, x.shape[-1] // attention.heads
        if attention.joined is not None:
            parts = F.linear(x, attention.joined).view(*shape[:2], 3, *shape[2:])
            q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            owner = attention.owner
            q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (owner.to_q, owner.to_k, owner.to_v))
        return attention.to_out(attention.attend(q, k, v, None).reshape(x.shape))

    def cross_attention(self, attention: Heads, x: Tensor) -> Tensor:
        width = x.shape[-1] // attention.heads
        q = attention.owner.to_q(x).view(len(x), -1, attention.heads, width).transpose(1, 2)
        k, v = next(self.texts).view(len(x), 2, attention.heads, self.tokens, width).unbind(1)
        return attention.to_out(attention.attend(q, k, v, self.bias).reshape(x.shape))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """See `Attend`: PyTorch's scaled dot product."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


# -- reading a network of diffusers


def read_diffusers(unet: Any) -> Parts:
    """Return the parts of a UNet2DConditionModel; raises ValueError with the part that no rule here knows."""
    refusal = unknown_part(unet)
    if refusal:
        raise ValueError(f"Expected a UNet of the usual blocks, but got {refusal}. It runs as it is.")
    inputs: list[list[Step]] = []
    outputs: list[list[Step]] = []
    for block in unet.down_blocks:
        inputs += [_pair(block, i) for i in range(len(block.resnets))]
        inputs += [[Resample(functools.partial(_halved, m))] for m in block.downsamplers or ()]
    middle: list[Step] = [_resnet(unet.mid_block.resnets[0])]
    for attention, resnet in zip(unet.mid_block.attentions, unet.mid_block.resnets[1:]):
        middle += [_transformer(attention), _resnet(resnet)]
    for block in unet.up_blocks:
        outputs += [_pair(block, i) for i in range(len(block.resnets))]
        outputs[-1] += [Resample(m) for m in block.upsamplers or ()]
    attentions = [m for m in unet.modules() if plain_type(m).__name__ == "Attention"]
    processors = [attention.processor for attention in attentions]
    resnets = [m for m in unet.modules() if plain_type(m).__name__ == "ResnetBlock2D"]
    times = [unet.time_embedding, *([unet.add_embedding] if getattr(unet, "add_embedding", None) is not None else [])]

    def embed(timestep: Tensor, context: Tensor, added: dict[str, Tensor] | None = None) -> Tensor:
        emb = unet.time_embedding(unet.get_time_embed(sample=context, timestep=timestep))
        extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=context, added_cond_kwargs=added)
        return F.silu(emb if extra is None else emb + extra)

    return Parts(
        unet.conv_in, inputs, middle, outputs, lambda x: unet.conv_out(F.silu(unet.conv_norm_out(x))), embed,
        watched=[(r, name) for r in resnets for name in ("time_emb_proj", "conv1")]
        + [(owner, name) for owner in times for name in ("linear_1", "linear_2")],
        bypassed=[m for m in unet.modules() if plain_type(m).__name__ in BYPASSED],
        same=lambda: not _freeu(unet) and all(a.processor is p for a, p in zip(attentions, processors)),
    )  # fmt: skip


def _halved(layer: Any, x: Tensor, size: Size) -> Tensor:
    # Not a lambda that has the layer as a default: torch 2.11 cannot read a kept graph with such a weight again.
    halved: Tensor = layer(x)
    return halved


def _pair(block: Any, i: int) -> list[Step]:
    attentions = getattr(block, "attentions", None)
    return [_resnet(block.resnets[i]), *([_transformer(attentions[i])] if attentions is not None else [])]


def _resnet(m: Any) -> Resnet:
    return Resnet(m.norm1, m.conv1, m.norm2, m.conv2, m.conv_shortcut, m.time_emb_proj)


def _transformer(m: Any) -> Transformer:
    layers = [
        Layer(b.norm1, _heads(b.attn1), b.norm2, _heads(b.attn2), b.norm3, (b.ff.net[0], b.ff.net[2]))
        for b in m.transformer_blocks
    ]
    return Transformer(m.norm, m.proj_in, layers, m.proj_out, bool(m.use_linear_projection))


def _heads(m: Any) -> Heads:
    return Heads(m, m.to_out[0], m.heads, attend)


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
        _shared[id(unet)] = found = FusedUnet(read_diffusers(unet))
    return found
