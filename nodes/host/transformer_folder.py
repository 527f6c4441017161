"""A diffusers folder of a Lumina2 transformer as the host's own MODEL: its native NextDiT, in any size.

The host's detection knows this class in the sizes of the released models only, so a folder of another size (the bundled pocket-flow)
is described to the host here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.folder import Folder
from .folder_weights import as_model, choose_dtype, preview_factors, read_weights

KIND = "Lumina2Transformer2DModel"
# Names within a block and outside of the blocks: diffusers' beginning of a name -> the host's.
BLOCK = {
    "attn.to_out.0.": "attention.out.", "attn.norm_q.": "attention.q_norm.", "attn.norm_k.": "attention.k_norm.",
    "norm1.norm.": "attention_norm1.", "norm1.linear.": "adaLN_modulation.1.", "norm1.": "attention_norm1.",
    "norm2.": "attention_norm2.", "feed_forward.linear_": "feed_forward.w",
}  # fmt: skip
OUTSIDE = {
    "time_caption_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_caption_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_caption_embed.caption_embedder.": "cap_embedder.",
    "norm_out.linear_1.": "final_layer.adaLN_modulation.1.",
    "norm_out.linear_2.": "final_layer.linear.",
}
STACKS = ("noise_refiner", "context_refiner", "layers")


def host_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a Lumina2Transformer2DModel under the host's names; queries, keys and values are one matrix there."""
    renamed = {}
    for key, tensor in state.items():
        if key.endswith("attn.to_q.weight"):
            parts = [state[key.replace("to_q", name)] for name in ("to_q", "to_k", "to_v")]
            renamed[key.replace("attn.to_q", "attention.qkv")] = torch.cat(parts)
        elif ".attn.to_k." not in key and ".attn.to_v." not in key:
            renamed[host_name(key)] = tensor
    return renamed


def host_name(key: str) -> str:
    stack, _, rest = key.partition(".")
    number, _, inner = rest.partition(".")
    prefix, inner, names = (f"{stack}.{number}.", inner, BLOCK) if stack in STACKS else ("", key, OUTSIDE)
    old = next((old for old in names if inner.startswith(old)), "")
    return prefix + names.get(old, "") + inner.removeprefix(old)


def host_config(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the settings of the host's NextDiT for a Lumina2Transformer2DModel and its weights under the host's names."""
    width, hidden = config["hidden_size"], state["layers.0.feed_forward.w1.weight"].shape[0]
    return {
        "image_model": "lumina2", "patch_size": config["patch_size"], "in_channels": config["in_channels"], "dim": width,
        "n_layers": config["num_layers"], "n_refiner_layers": config["num_refiner_layers"],
        "n_heads": config["num_attention_heads"], "n_kv_heads": config["num_kv_heads"] or config["num_attention_heads"],
        "qk_norm": True, "norm_eps": config["norm_eps"], "cap_feat_dim": config["cap_feat_dim"],
        "axes_dims": list(config["axes_dim_rope"]), "axes_lens": list(config["axes_lens"]),
        # Hosts read the multiplier in two ways. Both round up to a multiple, which is the width itself here.
        "ffn_dim_multiplier": 2 / width, "multiple_of": hidden,
    }  # fmt: skip


def load_lumina(folder: Folder, vae: Any) -> Any:
    """Return a MODEL: the host's NextDiT with the weights of a Lumina2Transformer2DModel, for latents of `vae` (the host's class)."""
    import comfy.model_management as management

    state = host_weights(read_weights(folder.network))
    family = lumina_family()(host_config(folder.network.config, state))
    family.sampling_settings = {"multiplier": 1.0, "shift": folder.shift}
    family.latent_format = latent_format(vae)
    choose_dtype(family, state)
    model = family.get_model(state, "", device=management.unet_offload_device())
    # Older hosts keep a norm that they do not use.
    unused = {key: value for key, value in model.diffusion_model.state_dict().items() if key == "norm_final.weight"}
    model.load_model_weights({**unused, **state}, "")
    return as_model(model)


def lumina_family() -> Any:
    """Return the host's Lumina2 family, whose model takes text without a mask: 0.3.64 counts tokens by the mask alone."""
    import comfy.conds
    import comfy.model_base
    import comfy.supported_models

    class Model(comfy.model_base.Lumina2):
        def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
            out: dict[str, Any] = super().extra_conds(**kwargs)
            if "num_tokens" not in out and "c_crossattn" in out:
                out["num_tokens"] = comfy.conds.CONDConstant(out["c_crossattn"].cond.shape[1])
            return out

    class Family(comfy.supported_models.Lumina2):
        unet_config: dict[str, Any] = {}

        def get_model(self, state_dict: dict[str, Tensor], prefix: str = "", device: Any = None) -> Any:
            return Model(self, device=device)

    return Family


def latent_format(vae: Any) -> Any:
    """Return the host's description of the latents of a folder's VAE, with previews fitted to it."""
    import comfy.latent_formats

    config = vae.first_stage_model.vae.config
    made = comfy.latent_formats.Flux()
    made.latent_channels = config.latent_channels
    made.scale_factor, made.shift_factor = float(config.scaling_factor), float(config.shift_factor or 0.0)
    made.taesd_decoder_name = None
    made.latent_rgb_factors, made.latent_rgb_factors_bias = preview_factors(vae, made.scale_factor, made.shift_factor)
    return made
