"""The library's `Denoiser` over the flow transformers of diffusers: SD3, Flux, Lumina2, Z-Image and Qwen-Image.

A `Family` holds all that differs between them: what the network is asked, the sign of its answer, and how its text is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .denoiser import Conditioning
from .diffusers_model import Encoded, NetworkDenoiser
from .folder import VAES
from .schedules import FlowLevels
from .text import Reading

# (network, x (B, C, H, W), sigma (B,), arguments of `network_condition`) -> velocity n - x0 (B, C, H, W)
Velocity = Callable[[Any, Tensor, Tensor, Mapping[str, Any]], Tensor]
# Of Flux's guidance embedding where `cond.extra` has no "guidance", as in its own pipeline.
GUIDANCE = 3.5


@dataclass(frozen=True)
class Family:
    """One kind of transformer.

    `patch` is the side of a token in latent cells: odd sizes are padded to it. `channels` are those of the latents.
    `readings` say how each text encoder that is not CLIP is read, by its class; `conditioning` makes one row of what all give
    for one prompt. `penultimate` takes CLIP's layer before the last. `vaes` are the classes of its VAE.
    """

    name: str
    velocity: Velocity
    conditioning: Callable[[Sequence[Encoded], Any], Conditioning]
    readings: Mapping[str, Reading]
    patch: Callable[[Mapping[str, Any]], int] = lambda config: int(config.get("patch_size", 2))
    channels: Callable[[Mapping[str, Any]], int] = lambda config: int(config.get("in_channels", 16))
    penultimate: bool = False
    vaes: Sequence[str] = VAES


class TransformerDenoiser(NetworkDenoiser):
    """Denoised latents from a flow transformer of diffusers.

    Args:
        network: the transformer in eval mode.
        family: its kind, one of `FAMILIES`.
        shift: timestep shift of the levels.
    """

    def __init__(self, network: Any, family: Family, shift: float = 1.0) -> None:
        super().__init__(network, FlowLevels(shift), "flow")
        self.family = family

    @property
    def latent_channels(self) -> int:
        return self.family.channels(self.network.config)

    @property
    def patch(self) -> int:
        """The side of a token in latent cells."""
        return self.family.patch(self.network.config)

    def conditioning(self, parts: Sequence[Encoded], size: tuple[int, int]) -> Conditioning:
        """See `NetworkDenoiser.conditioning`."""
        return self.family.conditioning(parts, self.network.config)

    def network_condition(self, cond: Conditioning) -> dict[str, Any]:
        """See `NetworkDenoiser.network_condition`."""
        cond = cond.to(self.device)
        extra = {name: value.to(self.dtype) for name, value in (cond.extra or {}).items()}
        pooled = None if cond.pooled is None else cond.pooled.to(self.dtype)
        return {"context": cond.context.to(self.dtype), "mask": cond.counted, "pooled": pooled, **extra}

    def _run(self, network: Any, sample: Tensor, time: Tensor, condition: dict[str, Any]) -> Tensor:
        height, width = sample.shape[-2:]
        # As the host pads: with what lies at the other side.
        padded = F.pad(sample, (0, -width % self.patch, 0, -height % self.patch), mode="circular")
        sigma = time / self.levels.train_steps  # type: ignore[attr-defined]
        return self.family.velocity(network, padded, sigma, condition)[..., :height, :width]


# -- how each network is asked


def _lumina(network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Lumina2 counts time from noise to image, and its velocity points there."""
    return -network(x, 1 - sigma, given["context"], given["mask"], return_dict=False)[0]


def _z_image(network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Z-Image takes lists of images with a frame axis and of captions without padding; time and sign are Lumina2's."""
    captions = [context[mask] for context, mask in zip(given["context"], given["mask"])]
    velocity = network([*x[:, :, None]], 1 - sigma, captions, return_dict=False)[0]
    return -torch.stack([*velocity])[:, :, 0]


def _sd3(network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Any]) -> Tensor:
    output: Tensor = network(x, given["context"], given["pooled"], sigma * 1000, return_dict=False)[0]
    return output


def _flux(network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Any]) -> Tensor:
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    places = torch.zeros(height, width, 3, device=x.device)
    places[..., 1], places[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    guidance = given.get("guidance")
    if guidance is None and network.config.guidance_embeds:
        guidance = x.new_full((len(x),), GUIDANCE)
    output: Tensor = network(
        _packed(x), given["context"], given["pooled"], sigma.to(x.dtype), img_ids=places.flatten(0, 1),
        txt_ids=places.new_zeros(given["context"].shape[1], 3), guidance=guidance, return_dict=False,
    )[0]  # fmt: skip
    return _unpacked(output, height)


def _qwen(network: Any, x: Tensor, sigma: Tensor, given: Mapping[str, Any]) -> Tensor:
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    output: Tensor = network(
        _packed(x), given["context"], given["mask"], sigma.to(x.dtype), [[(1, height, width)]] * len(x), return_dict=False
    )[0]  # fmt: skip
    return _unpacked(output, height)


def _packed(x: Tensor) -> Tensor:
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def _unpacked(tokens: Tensor, height: int) -> Tensor:
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


# -- how the text encoders make one row of conditioning


def _one_text(parts: Sequence[Encoded], config: Any) -> Conditioning:
    return Conditioning(parts[0][0])


def _flux_text(parts: Sequence[Encoded], config: Any) -> Conditioning:
    """The tokens of T5, and the pooled text of CLIP."""
    (_, pooled), (context, _) = parts
    return Conditioning(context, pooled)


def _sd3_text(parts: Sequence[Encoded], config: Any) -> Conditioning:
    """Both CLIPs side by side, then T5's tokens; zeros in its place where a folder goes without."""
    clips, others = parts[:2], parts[2:]
    tokens = min(context.shape[1] for context, _ in clips)
    context = torch.cat([context[:, :tokens] for context, _ in clips], -1)
    width = config.joint_attention_dim
    last = others[0][0] if others else context.new_zeros(1, T5_SD3.tokens, width)
    pooled = torch.cat([pooled for _, pooled in clips if pooled is not None], -1)
    return Conditioning(torch.cat([F.pad(context, (0, width - context.shape[-1])), last], 1), pooled)


# As Qwen-Image was trained: the template's first 34 tokens are left out.
DESCRIBE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
T5_SD3 = Reading(-1, tokens=256, padded=True)
# By the class of the transformer in a folder.
FAMILIES = {
    "Lumina2Transformer2DModel": Family(
        "Lumina2", _lumina, _one_text, {"Gemma2Model": Reading(-2, tokens=256)}
    ),
    "ZImageTransformer2DModel": Family(
        "Z-Image", _z_image, _one_text, {"Qwen3Model": Reading(-2, tokens=512, chat=True)},
        patch=lambda config: int(config["all_patch_size"][0]),
    ),
    "SD3Transformer2DModel": Family("SD3", _sd3, _sd3_text, {"T5EncoderModel": T5_SD3}, penultimate=True),
    "FluxTransformer2DModel": Family(
        "Flux", _flux, _flux_text, {"T5EncoderModel": Reading(-1, tokens=512, padded=True)},
        patch=lambda config: 2, channels=lambda config: config["in_channels"] // 4,
    ),
    "QwenImageTransformer2DModel": Family(
        "Qwen-Image", _qwen, _one_text, {"Qwen2_5_VLTextModel": Reading(-1, tokens=1024, template=DESCRIBE, dropped=34)},
        channels=lambda config: config["in_channels"] // 4, vaes=("AutoencoderKLQwenImage",),
    ),
}  # fmt: skip
