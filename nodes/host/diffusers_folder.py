"""A diffusers folder as the host's own MODEL, CLIP and VAE.

The UNet becomes the host's native UNetModel, so everything that patches a MODEL works on it: LoRA, ControlNet, attention and
block patches, offloading. Families that the host knows (SD1.x, SD2.x, SDXL) go through the host's own loader; any other
UNet2DConditionModel of the same block types (the bundled pocket model) is described to the host here, and a Lumina2 transformer in
`transformer_folder`. Only tiny autoencoders and the VAE of an unknown family stay diffusers modules, wrapped in the host's VAE and its
memory management.
"""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

from ...core.folder import Folder, Network, read_folder, read_vae
from ...core.loading import init_config
from ...core.schedules import DiscreteLevels
from .folder_weights import as_model, choose_dtype, preview_factors, read_weights

# Settings of UNet2DConditionModel that the host's UNet has built in: (field, the only value it can do).
BUILT_IN = (
    ("act_fn", "silu"), ("center_input_sample", False), ("class_embed_type", None), ("addition_embed_type", None),
    ("conv_in_kernel", 3), ("conv_out_kernel", 3), ("downsample_padding", 1), ("dual_cross_attention", False),
    ("encoder_hid_dim_type", None), ("flip_sin_to_cos", True), ("freq_shift", 0), ("mid_block_scale_factor", 1),
    ("mid_block_type", "UNetMidBlock2DCrossAttn"), ("norm_eps", 1e-5), ("only_cross_attention", False),
    ("resnet_time_scale_shift", "default"), ("resnet_out_scale_factor", 1.0), ("resnet_skip_time_act", False),
    ("time_cond_proj_dim", None), ("time_embedding_type", "positional"), ("attention_type", "default"),
)  # fmt: skip
# The host has a cosine table too, but stops with an error when it is asked for.
BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}


def load_folder(path: pathlib.Path, network: str = "unet", scheduler: str = "scheduler") -> tuple[Any, Any, Any]:
    """Return (MODEL, CLIP, VAE) of a diffusers folder, weights in the dtype and on the device that the host chooses.

    For `network`, `scheduler` and what is refused see `core.folder.read_folder`; families that cannot be described to the host are
    refused too.
    """
    from .transformer_folder import KIND, load_lumina

    folder = read_folder(path, network, scheduler, {KIND: ()})
    vae = read_vae(path, shifted=folder.network.kind == KIND)
    # Stock loaders run in inference mode; weights made outside it can be differentiated later without a copy.
    with torch.inference_mode(False), torch.no_grad():
        if known_family(folder.network.config):
            return load_known(folder, vae)
        if len(folder.text) != 1:
            raise ValueError(
                f"Expected an SD1.x, SD2.x or SDXL model in {path.name}, but got an unknown one with {len(folder.text)} text encoders. "
                "Use a checkpoint of a known family."
            )
        made = load_vae(vae)
        if folder.network.kind == KIND:
            return load_lumina(folder, made), load_text_encoder(folder), made
        return load_unet(folder, made), load_text_encoder(folder), made


def load_checkpoint(path: pathlib.Path) -> tuple[Any, Any, Any]:
    """Return (MODEL, CLIP, VAE) of a checkpoint through the host's own loader; a file without one of them is refused."""
    import comfy.sd
    import folder_paths

    embeddings = folder_paths.get_folder_paths("embeddings")
    loaded = comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=embeddings)[:3]
    missing = [name for name, part in zip(("MODEL", "CLIP", "VAE"), loaded) if part is None]
    if missing:
        raise ValueError(
            f"Expected a checkpoint with MODEL, CLIP and VAE, but {path.name} has no {' and no '.join(missing)}. Use the host's loaders "
            "for single parts."
        )
    return loaded[0], loaded[1], loaded[2]


# --------------------------------------------------------------------------------------------------------- known families


def known_family(config: dict[str, Any]) -> bool:
    """Whether the host has a family for a UNet: its own loader then knows the text encoders and the VAE as well."""
    return config.get("block_out_channels") in ([320, 640, 1280, 1280], [320, 640, 1280], [384, 768, 1536, 1536])


def load_known(folder: Folder, vae: Network) -> tuple[Any, Any, Any]:
    """Return (MODEL, CLIP, VAE) through the host's own loaders, part by part."""
    import comfy.sd
    import folder_paths

    model = comfy.sd.load_diffusion_model_state_dict(read_weights(folder.network))
    if model is None:
        raise ValueError(
            f"Expected an SD1.x, SD2.x or SDXL UNet in {folder.path.name}, but the host does not know it. Use Load Checkpoint."
        )
    embeddings = folder_paths.get_folder_paths("embeddings")
    clip = comfy.sd.load_text_encoder_state_dicts([text_state(n) for n in folder.text], embedding_directory=embeddings)
    set_levels(model.model, folder)
    if vae.kind == "AutoencoderTiny":
        return model, clip, load_vae(vae, model.model.latent_format.scale_factor)
    return model, clip, comfy.sd.VAE(sd=read_weights(vae))


def text_state(network: Network) -> dict[str, Tensor]:
    """Return a CLIP text encoder's tensors under the names of transformers 4, which the host knows; version 5 drops a prefix."""
    state = read_weights(network)
    if any(key.startswith("text_model.") for key in state):
        return state
    return {key if key.startswith("text_projection") else f"text_model.{key}": tensor for key, tensor in state.items()}


def set_levels(model: Any, folder: Folder) -> None:
    """Give a freshly made host `BaseModel` the prediction type and the table of noise levels of the folder."""
    import comfy.model_base as model_base
    import comfy.model_sampling as sampling

    config, kind, table = folder.scheduler, folder.prediction_type, folder.alphas_cumprod
    assert table is not None, "read_folder was asked for UNets only"
    # For nodes that make a table of their own from these settings; the folder's table follows below.
    model.model_config.sampling_settings = {
        "beta_schedule": BETA_SCHEDULES.get(config.get("beta_schedule", ""), "linear"),
        "linear_start": config.get("beta_start", 0.00085),
        "linear_end": config.get("beta_end", 0.012),
        "timesteps": len(table),
        "zsnr": bool(config.get("rescale_betas_zero_snr", False)),
    }
    model.model_type = model_base.ModelType.V_PREDICTION if kind == "v_prediction" else model_base.ModelType.EPS
    model.model_sampling = model_base.model_sampling(model.model_config, model.model_type)
    if kind == "sample":
        model.model_sampling = type("ModelSampling", (sampling.ModelSamplingDiscrete, sampling.X0), {})(
            model.model_config
        )
    model.model_sampling.set_sigmas(DiscreteLevels(table).sigmas)


# --------------------------------------------------------------------------------------------------------- UNet


def load_unet(folder: Folder, vae: Any) -> Any:
    """Return a MODEL: the host's UNetModel with the weights of a UNet2DConditionModel."""
    import comfy.latent_formats
    import comfy.model_management as management
    import comfy.supported_models
    import comfy.utils

    class Family(comfy.supported_models.SD15):
        unet_config: dict[str, Any] = {}
        unet_extra_config: dict[str, Any] = {}

    state, config = read_weights(folder.network), folder.network.config
    family = Family(host_unet_config(config))
    family.latent_format = comfy.latent_formats.LatentFormat()
    family.latent_format.latent_channels = config["in_channels"]
    family.latent_format.scale_factor = float(vae.first_stage_model.vae.config.scaling_factor)
    family.latent_format.latent_rgb_factors, family.latent_format.latent_rgb_factors_bias = preview_factors(
        vae, family.latent_format.scale_factor
    )
    choose_dtype(family, state)
    family.custom_operations = operations_with_groups(family.manual_cast_dtype is not None, config["norm_num_groups"])
    names = comfy.utils.unet_to_diffusers(family.unet_config)
    missing = sorted(set(state) - set(names))
    if missing:
        raise ValueError(
            f"Expected the layers of a UNet2DConditionModel in unet/, but got {missing[0]}. Use a stock checkpoint loader."
        )
    model = family.get_model(state, "", device=management.unet_offload_device())
    model.load_model_weights({names[key]: tensor for key, tensor in state.items()}, "")
    set_levels(model, folder)
    return as_model(model)


def host_unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the host's description of a UNet2DConditionModel config; raises ValueError for what the host's UNet lacks."""
    for name, only in BUILT_IN:
        if config.get(name, only) != only:
            raise ValueError(
                f"Expected `{name}` {only!r} in unet/config.json, but got {config[name]!r}. "
                "This UNet has no counterpart in the host: use a stock checkpoint loader."
            )
    channels, levels = config["block_out_channels"], len(config["block_out_channels"])
    blocks = config["down_block_types"]
    mirrored = [name.replace("Up", "Down") for name in reversed(config["up_block_types"])]
    if (
        set(blocks) - {"CrossAttnDownBlock2D", "DownBlock2D"}
        or blocks != mirrored
        or any(c % channels[0] for c in channels)
    ):
        raise ValueError(
            f"Expected a symmetric UNet of CrossAttnDownBlock2D and DownBlock2D, but got {blocks} with {channels} channels. "
            "Use a stock checkpoint loader."
        )
    depth = per_level(config.get("transformer_layers_per_block", 1), levels)
    layers = per_level(config["layers_per_block"], levels)
    depths = [d if block.startswith("CrossAttn") else 0 for d, block in zip(depth, blocks)]
    # diffusers calls the number of heads `attention_head_dim` unless `num_attention_heads` is set.
    heads = per_level(config.get("num_attention_heads") or config["attention_head_dim"], levels)
    widths = [c // h for c, h in zip(channels, heads)]
    if len(set(heads)) > 1 and len(set(widths)) > 1:
        raise ValueError(
            f"Expected heads equal in number or width at every level, but got {heads} heads. Use a stock loader."
        )
    return {
        "image_size": 32, "in_channels": config["in_channels"], "out_channels": config["out_channels"],
        "model_channels": channels[0], "channel_mult": [c // channels[0] for c in channels], "num_res_blocks": layers,
        "transformer_depth": [d for d, n in zip(depths, layers) for _ in range(n)],
        "transformer_depth_output": [d for d, n in zip(depths, layers) for _ in range(n + 1)],
        "transformer_depth_middle": depth[-1], "context_dim": config["cross_attention_dim"],
        "num_heads": heads[0] if len(set(heads)) == 1 else -1, "num_head_channels": -1 if len(set(heads)) == 1 else widths[0],
        "use_linear_in_transformer": bool(config.get("use_linear_projection")), "use_spatial_transformer": True,
        "adm_in_channels": None, "use_checkpoint": False, "legacy": False,
        "use_temporal_attention": False, "use_temporal_resblock": False,
    }  # fmt: skip


def per_level(value: Any, levels: int) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [int(value)] * levels


def operations_with_groups(manual_cast: bool, groups: int) -> Any:
    """Return the host's layer classes with another number of normalisation groups (the host's UNet always asks for 32)."""
    import comfy.ops

    base = comfy.ops.manual_cast if manual_cast else comfy.ops.disable_weight_init

    class Operations(base):  # type: ignore[misc,valid-type]
        class GroupNorm(base.GroupNorm):  # type: ignore[name-defined]
            def __init__(self, num_groups: int, *args: Any, **kwargs: Any) -> None:
                super().__init__(groups, *args, **kwargs)

    return Operations


# --------------------------------------------------------------------------------------------------------- text encoder


def load_text_encoder(folder: Folder) -> Any:
    """Return a CLIP: the host's own text model and tokenizer with the weights and words of a CLIPTextModel."""
    import comfy.sd
    import folder_paths
    from comfy.supported_models_base import ClipTarget

    (network,), (tokens,) = folder.text, folder.tokenizers
    config = {"eos_token_id": 2, **network.config}
    if not (tokens / "vocab.json").is_file():
        raise ValueError(
            "Expected tokenizer/vocab.json and merges.txt of CLIP, but they are missing. Download the whole folder."
        )
    embeddings = folder_paths.get_folder_paths("embeddings")
    words, tokenizer = tokenizer_classes(tokens, config)
    target = ClipTarget(tokenizer, clip_class(config, words(embeddings)))
    state = text_state(network)
    size = sum(tensor.numel() for tensor in state.values())
    clip = comfy.sd.CLIP(target, embedding_directory=embeddings, parameters=size)
    missing, _ = clip.load_sd(state)
    absent = [key for key in missing if "text_projection" not in key and "logit_scale" not in key]
    if absent:
        raise ValueError(
            f"Expected a CLIPTextModel in text_encoder/, but it lacks {absent[0]}. Use a stock checkpoint loader."
        )
    return clip


def tokenizer_classes(folder: pathlib.Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the host's tokenizer with the words of `folder`: the class of one encoder, and that of a CLIP made of it."""
    import comfy.sd1_clip

    class Words(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = {}) -> None:  # noqa: B006
            super().__init__(
                str(folder), max_length=config["max_position_embeddings"],
                embedding_directory=embedding_directory, embedding_size=config["hidden_size"],
            )  # fmt: skip

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = {}) -> None:  # noqa: B006
            super().__init__(embedding_directory, tokenizer_data, tokenizer=Words)

    return Words, Tokenizer


def clip_class(config: dict[str, Any], words: Any) -> Any:
    """Return the host's text model as a class, of the size in `config` and with the special tokens of the tokenizer `words`."""
    import comfy.clip_model
    import comfy.sd1_clip

    special = {"start": words.start_token, "end": words.end_token, "pad": words.pad_token}

    class TextModel(comfy.clip_model.CLIPTextModel):
        def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
            super().__init__(config_dict, dtype, device, operations)
            # The host's class has CLIP's vocabulary size built in.
            self.text_model.embeddings.token_embedding = operations.Embedding(
                config_dict["vocab_size"], config_dict["hidden_size"], dtype=dtype, device=device
            )

    class Clip(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = {}) -> None:  # noqa: B006
            super().__init__(
                device=device, dtype=dtype, max_length=config["max_position_embeddings"], textmodel_json_config=config,
                model_class=TextModel, special_tokens=special, return_projected_pooled=False,
                model_options={**model_options, "model_name": "clip_l"},
            )  # fmt: skip

    class ClipModel(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = {}) -> None:  # noqa: B006
            super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=Clip)

    return ClipModel


# --------------------------------------------------------------------------------------------------------- VAE


def load_vae(network: Network, scale: float | None = None) -> Any:
    """Return a VAE: a diffusers AutoencoderKL or a tiny autoencoder (TAESD) inside the host's VAE class, managed by the host.

    `scale` is what the MODEL multiplies a LATENT by, where that is not the VAE's own factor: a tiny autoencoder gives latents
    as the UNet has them and has factor 1.
    """
    import diffusers

    kind = network.kind
    vae = getattr(diffusers, kind).from_config(init_config(network.config, kind))
    try:
        vae.load_state_dict(read_weights(network))
    except RuntimeError:  # its message lists every weight
        raise ValueError(
            f"Expected the weights of an {kind} in vae/, as its config.json says, but got others. Download vae/ again."
        ) from None
    return folder_vae(vae.eval().requires_grad_(False), 1.0 if scale is None else vae.config.scaling_factor / scale)


def folder_vae(vae: Any, ratio: float) -> Any:
    """Return a diffusers autoencoder as the host's VAE, whose LATENT is `ratio` times what the autoencoder gives."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.sd

    class Network(nn.Module):  # the host sets attributes that a diffusers model has as read-only properties
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def encode(self, pixels: Tensor) -> Tensor:
            code = self.vae.encode(pixels)
            return ratio * (code.latents if hasattr(code, "latents") else code.latent_dist.mode())

        def decode(self, latents: Tensor, **_: Any) -> Tensor:
            return self.vae.decode(latents / ratio).sample

    class FolderVAE(comfy.sd.VAE):
        def __init__(self, network: nn.Module, channels: int, factor: int) -> None:
            with quiet("No VAE weights"):
                super().__init__(sd={})  # sets every field that this version of the host knows, and no network
            self.first_stage_model = network
            self.latent_channels, self.downscale_ratio, self.upscale_ratio = channels, factor, factor
            self.working_dtypes = [torch.bfloat16, torch.float32]
            # diffusers layers do not cast their weights: they must be on the device as a whole.
            self.disable_offload = True
            self.device, self.output_device = management.vae_device(), management.intermediate_device()
            self.vae_dtype = management.vae_dtype(self.device, self.working_dtypes)
            network.to(self.vae_dtype)
            self.patcher = comfy.model_patcher.ModelPatcher(
                network, load_device=self.device, offload_device=management.vae_offload_device()
            )

    return FolderVAE(Network(), vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))


class quiet:  # noqa: N801
    """Keep one expected message of the host out of its log."""

    def __init__(self, text: str) -> None:
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()

    def __enter__(self) -> None:
        logging.getLogger().addFilter(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeFilter(self)
