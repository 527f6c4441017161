"""Single-file checkpoints in the original layout of SD1.5, SD2.x and SDXL: what they hold, their configs, and where each weight is.

The original layout numbers blocks through ("input_blocks.4.1"), diffusers nests them ("down_blocks.1.attentions.0"). Each
`*_source` function below answers for one diffusers weight: which entry of the file holds it.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNET = "model.diffusion_model."
VAE = "first_stage_model."
SD_TEXT = "cond_stage_model.transformer.text_model."
SD_OLD_TEXT = "cond_stage_model.transformer."  # of files older than transformers 4.22
SD2_TEXT = "cond_stage_model.model."
SDXL_TEXT_1 = "conditioner.embedders.0.transformer.text_model."
SDXL_TEXT_2 = "conditioner.embedders.1.model."
TEXT_PREFIXES = (SD_TEXT, SD_OLD_TEXT, SD2_TEXT, SDXL_TEXT_1, SDXL_TEXT_2)
OPEN_CLIP = (SD2_TEXT, SDXL_TEXT_2)

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


class Source(NamedTuple):
    """Where a weight is in the file: its name, the third of it when query, key and value are stored as one, and whether transposed."""

    name: str
    third: int | None = None
    transposed: bool = False


class Weights:
    """A safetensors file, opened: names, shapes and metadata at once, tensors (memory-mapped) when asked for.

    Raises FileNotFoundError when it is not there and ValueError when it is a pickle, damaged or not in this format.
    """

    def __init__(self, path: pathlib.Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        refuse_pickle(path)
        if not path.is_file():
            raise FileNotFoundError(f"Expected a model file at {path}, but found none. Check the path.")
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf or path.suffix.lower() == ".gguf":
            raise ValueError(
                f"Expected a .safetensors file, but {path.name} is a GGUF file of quantised weights. Download the .safetensors version; in "
                "ComfyUI a GGUF loader gives a MODEL that all nodes take."
            )
        try:
            self.file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"Expected a complete .safetensors file, but {path} is damaged, cut short or of another format "
                f"({path.stat().st_size} bytes; {error}). Download it again."
            ) from error
        self.names = set(self.file.keys())
        self.metadata: dict[str, str] = self.file.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())

    def read(self, source: Source) -> Tensor:
        """Return a tensor that still lies in the file."""
        if source.third is not None:
            part = self.file.get_slice(source.name)
            size = part.get_shape()[0] // 3
            return part[source.third * size : (source.third + 1) * size]
        tensor = self.file.get_tensor(source.name)
        return tensor.T if source.transposed else tensor

    def count(self, pattern: str) -> int:
        """Return how many different values the group of `pattern` takes at the start of the names."""
        return len({m[1] for m in (re.match(pattern, name) for name in self.names) if m})

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.names)


def refuse_pickle(path: pathlib.Path) -> None:
    """Raise ValueError for the formats that run code when they are opened."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"Expected a .safetensors file, but got {path.name}: opening a pickle runs whatever code is in it. "
            "Download the .safetensors version, or convert the file where you trust its origin."
        )


# What the names of the weights of other families begin with.
TRANSFORMERS = {
    "double_blocks.": "a Flux or HunyuanImage model",
    "double_layers.": "an AuraFlow model",
    "joint_blocks.": "an SD3 model",
    "cap_embedder.": "a Lumina2 or Z-Image model",
    "txt_norm.": "a Qwen-Image model",
    "blocks.0.self_attn.": "a Wan model",
    "blocks.0.cross_attn.": "a PixArt or Cosmos model",
    "patchify_proj.": "an LTX model",
}


def describe_layout(weights: Weights) -> str | None:
    """Return why a file is not a checkpoint that `load` can use, or None when it is one."""
    if weights.has("lora_") or any(".lora_" in name for name in weights.names):
        return "a LoRA, which only changes a model. Load the model it was made for"
    if weights.has("control_model.") or weights.has("controlnet_"):
        return "a ControlNet, which only steers a model. Load the model it was made for"
    if weights.has("down_blocks.") or weights.has("encoder.down_blocks."):
        return "one part of a diffusers model. Give the folder that holds its model_index.json"
    if weights.has("conditioner.embedders.0.model."):
        return "an SDXL refiner. Load the SDXL base model"
    if weights.has("edm_"):
        return "a model with EDM's noise levels (CosXL, Playground). Load an SD1.5, SD2.x or plain SDXL model"
    for part, family in TRANSFORMERS.items():
        if weights.has(part) or weights.has(UNET + part):
            return f"{family}, a transformer. Load an SD1.5, SD2.x or SDXL model; in ComfyUI load it there, all nodes take its MODEL"
    if not weights.has(UNET + "input_blocks.") or not weights.has(UNET + "middle_block.1.transformer_blocks."):
        return "of an unknown architecture. Load an SD1.5, SD2.x or SDXL checkpoint or diffusers folder"
    if weights.shape(UNET + "input_blocks.0.0.weight")[1] != weights.shape(UNET + "out.2.weight")[0]:
        return "an inpainting or instruction model, whose network takes extra channels. Load the base model"
    return None


def unet_config(weights: Weights) -> dict[str, Any]:
    """Return the diffusers UNet config that fits the shapes in the file."""

    def depth_of(attention: str) -> int:
        return weights.count(re.escape(attention) + r"transformer_blocks\.(\d+)\.")

    blocks = [f"{UNET}input_blocks.{i}." for i in range(weights.count(re.escape(UNET) + r"input_blocks\.(\d+)\."))]
    levels: list[list[str]] = [[]]
    for block in blocks[1:]:
        if f"{block}0.op.weight" in weights.names:
            levels.append([])
        else:
            levels[-1].append(block)
    depths = [depth_of(f"{level[0]}1.") for level in levels]
    channels = [weights.shape(f"{level[0]}0.in_layers.2.weight")[0] for level in levels]
    middle = f"{UNET}middle_block.1."
    linear = len(weights.shape(f"{middle}proj_in.weight")) == 2
    return {
        "in_channels": weights.shape(f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": weights.shape(f"{UNET}out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        # The middle has the depth of the last level; diffusers wants a number where a level has no attention at all.
        "transformer_layers_per_block": [*(d or 1 for d in depths[:-1]), depth_of(middle)],
        "cross_attention_dim": weights.shape(f"{middle}transformer_blocks.0.attn2.to_k.weight")[1],
        # diffusers' historical name for the number of heads: 8 in SD1.5, 64 channels per head since SD2.
        "attention_head_dim": [max(1, c // 64) for c in channels] if linear else 8,
        "use_linear_projection": linear,
        **_time_ids_config(weights),
    }


def _time_ids_config(weights: Weights) -> dict[str, Any]:
    """SDXL adds the pooled text and six sizes to the time embedding."""
    label = f"{UNET}label_emb.0.0.weight"
    if label not in weights.names:
        return {}
    width = weights.shape(label)[1]
    pooled = weights.shape(f"{SDXL_TEXT_2}text_projection")[1] if weights.has(SDXL_TEXT_2) else width - 6 * 256
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled) // 6,
        "projection_class_embeddings_input_dim": width,
    }


def vae_config(weights: Weights, prefix: str, scaling_factor: float) -> dict[str, Any]:
    """Return the diffusers AutoencoderKL config that fits the shapes in the file."""
    levels = weights.count(re.escape(prefix) + r"encoder\.down\.(\d+)\.")
    channels = [weights.shape(f"{prefix}encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    return {
        "block_out_channels": channels,
        "layers_per_block": weights.count(re.escape(prefix) + r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": weights.shape(f"{prefix}decoder.conv_in.weight")[1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": weights.has(f"{prefix}encoder.mid.attn_1."),
        "scaling_factor": scaling_factor,
    }


def text_prefixes(weights: Weights) -> list[str]:
    """Return where the file's text encoders are, one for SD, two for SDXL."""
    return [p for p in TEXT_PREFIXES if weights.has(p + ("token_embedding" if p in OPEN_CLIP else "embeddings."))]


def text_config(weights: Weights, prefix: str) -> dict[str, Any]:
    """Return the transformers CLIPTextConfig that fits the shapes of an original or OpenCLIP text encoder."""
    is_open = prefix in OPEN_CLIP
    embeddings = "" if is_open else "embeddings."
    vocabulary, width = weights.shape(f"{prefix}{embeddings}token_embedding.weight")
    layers = weights.count(
        re.escape(prefix) + (r"transformer\.resblocks" if is_open else r"encoder\.layers") + r"\.(\d+)\."
    )
    first = "transformer.resblocks.0.mlp.c_fc.weight" if is_open else "encoder.layers.0.mlp.fc1.weight"
    positions = "positional_embedding" if is_open else "embeddings.position_embedding.weight"
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(prefix + first)[0],
        # SD2 was trained on the layer before the last.
        "num_hidden_layers": layers - (prefix == SD2_TEXT),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": weights.shape(prefix + positions)[0],
        "hidden_act": "gelu" if is_open else "quick_gelu",
        "projection_dim": weights.shape(f"{prefix}text_projection")[1] if prefix == SDXL_TEXT_2 else width,
        # 2 tells transformers to take the end token as the highest id, which holds for every CLIP vocabulary.
        "eos_token_id": 2,
    }


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE_NAMES = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
}
OPEN_CLIP_NAMES = {
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def renamed(key: str, names: dict[str, str]) -> str:
    """Return `key` with whole dotted parts replaced."""
    for new, old in names.items():
        key = re.sub(rf"(?<![^.]){re.escape(new)}(?![^.])", old, key)
    return key


def unet_source(config: dict[str, Any]) -> Callable[[str], Source]:
    """Return where a UNet of `config` finds its weights."""
    stride = config["layers_per_block"] + 1

    def source(key: str) -> Source:
        match = re.match(r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", key)
        if not match:
            return Source(UNET + renamed(key, UNET_ENDS))
        side, kind, index, tail = match[1], match[3], int(match[4]), match[5]
        block = int(match[2] or 0) * stride
        if kind == "resnets":
            tail = renamed(tail, RESNET)
        if side == "mid":
            return Source(f"{UNET}middle_block.{1 if kind == 'attentions' else 2 * index}.{tail}")
        if kind == "downsamplers":
            return Source(f"{UNET}input_blocks.{block + stride}.0.{renamed(tail, {'conv': 'op'})}")
        if kind == "upsamplers":
            has_attention = "CrossAttn" in config["up_block_types"][int(match[2])]
            return Source(f"{UNET}output_blocks.{block + stride - 1}.{2 if has_attention else 1}.{tail}")
        number = block + index + (1 if side == "down" else 0)
        return Source(
            f"{UNET}{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{tail}"
        )

    return source


def vae_source(config: dict[str, Any], prefix: str) -> Callable[[str], Source]:
    """Return where an AutoencoderKL of `config` finds its weights; the original numbers the decoder's levels upwards."""
    last = len(config["block_out_channels"]) - 1

    def source(key: str) -> Source:
        key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
        key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", key)
        return Source(prefix + renamed(key, VAE_NAMES))

    return source


def text_source(prefix: str) -> Callable[[str], Source]:
    """Return where a CLIP text encoder finds its weights; transformers 4 has a prefix "text_model." that 5 has not."""

    def source(key: str) -> Source:
        key = key.removeprefix("text_model.")
        if prefix not in OPEN_CLIP:
            return Source(prefix + key)
        if key == "text_projection.weight":
            return Source(f"{prefix}text_projection", transposed=True)
        if key == "embeddings.position_embedding.weight":
            return Source(f"{prefix}positional_embedding")
        key = renamed(key, OPEN_CLIP_NAMES)
        match = re.match(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", key)
        if match:
            return Source(f"{prefix}{match[1]}.attn.in_proj_{match[3]}", third="qkv".index(match[2]))
        return Source(prefix + key)

    return source


def stated_prediction(weights: Weights) -> str | None:
    """Return the prediction type that a checkpoint states about itself, or None."""
    if "v_pred" in weights.names:
        return "v_prediction"
    stated = weights.metadata.get("modelspec.prediction_type", "")
    return {"epsilon": "epsilon", "v": "v_prediction"}.get(stated)


@torch.no_grad()
def probed_prediction(unet: Any, context_tokens: int = 77) -> str:
    """Return "epsilon" or "v_prediction" by one small network call on pure noise.

    At the last timestep a noise prediction is the input itself, while v = alpha noise - sigma x0 is almost all x0: the
    correlation of output and input is near 1 for the one and near 0 for the other, whatever the prompt.
    """
    generator = torch.Generator().manual_seed(0)
    size = 8 * 2 ** (len(unet.config.block_out_channels) - 1)
    noise = torch.randn(1, unet.config.in_channels, size, size, generator=generator).to(unet.device, unet.dtype)
    context = noise.new_zeros(1, context_tokens, unet.config.cross_attention_dim)
    extra: dict[str, Any] = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        sizes = noise.new_tensor([[1024, 1024, 0, 0, 1024, 1024]])
        extra["added_cond_kwargs"] = {"text_embeds": noise.new_zeros(1, pooled), "time_ids": sizes}
    output = unet(noise, 999, context, return_dict=False, **extra)[0]
    agreement = torch.corrcoef(torch.stack([output.flatten().float(), noise.flatten().float()]))[0, 1]
    return "epsilon" if agreement > 0.5 else "v_prediction"
