"""Pipeline: a model with its text encoders and VAE, everything from a prompt to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import PROMPTS
from .checks import check_finite, check_shape, check_text, shown
from .codec import Codec, codec_of
from .denoiser import Conditioning
from .device import with_memory
from .diffusers_model import NetworkDenoiser
from .identity import Identity, identify
from .tensors import check_image, image_to_bytes, unit_pixels
from .text import LanguageEncoder, TextEncoder
from .transfer import Arrival, to_device, to_host

# Pixels that the VAE takes at once: its activations are the largest of all, and a long clip must not need them for every frame.
VAE_PIXELS = 8 * 512 * 512


@dataclass(eq=False)
class Pipeline:
    """A model with its text encoders and VAE: everything from a prompt to pixels.

    The networks are shared with every other pipeline that was loaded from the same files; the call counters are its own. Who
    edits one (merges a LoRA) edits it for all of them, but a later `load` reads the files again. `key` names the files of the
    text encoders in the cache of prompt embeddings; None leaves the cache alone.
    """

    model: NetworkDenoiser
    text: Sequence[TextEncoder | LanguageEncoder]
    vae: Any
    device: torch.device
    dtype: torch.dtype
    key: str | None = None
    _chosen: Codec | None = field(default=None, init=False, repr=False)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What its results depend on, for `core.identity`."""
        return self.model, [encode.identity for encode in self.text], self.key, self.vae, self.dtype

    @property
    def latent_channels(self) -> int:
        return self.model.latent_channels

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, along one side."""
        config = self.vae.config
        # A VAE of videos lists its halvings, the others the levels between them.
        return int(2 ** (len(getattr(config, "temperal_downsample", None) or config.block_out_channels[1:])))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], size: tuple[int, int] = (1024, 1024)) -> Conditioning:
        """Return one row of conditioning per prompt, of any length (see `TextEncoder.tokens`).

        `size` (height, width) is the image size that SDXL is conditioned on.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"Expected `prompts` to be a list of at least one prompt, but got {shown(prompts)}.")
        unique = tuple(dict.fromkeys(check_text("prompts", prompt) for prompt in prompts))

        def encode() -> Conditioning:
            return with_memory(lambda: self._encode(unique, size), f"encode {len(unique)} prompts")

        cond = encode() if self.key is None else PROMPTS.get(self._prompts_identity(unique, size), encode)
        return cond.take([unique.index(prompt) for prompt in prompts])

    def _prompts_identity(self, prompts: Sequence[str], size: tuple[int, int]) -> Identity:
        # The files name the tokenizers. The encoders are looked at: a LoRA may have been merged into them.
        return identify(self.key, [encode.identity for encode in self.text], prompts, size)

    def _encode(self, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
        if not self.text:
            raise ValueError("Expected a model with a text encoder, but this one has none. Load a complete model.")
        parts = zip(*(encode(prompts) for encode in self.text))
        first, *others = (self.model.conditioning(each, size) for each in parts)
        return first.join(*others)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Return float32 latents (B, C, H / downscale, W / downscale) of IMAGE (B, H, W, C), in [0, 1] or uint8: the posterior's mode.

        Raises ValueError when a side is not a multiple of `downscale`, and for NaN in host memory. No GPU is waited for: images
        with NaN that are on a GPU already are found out when their latents are decoded.
        """
        images = images[None] if images.ndim == 3 else images
        check_image(images, finite=images.device.type == "cpu")
        height, width = images.shape[1:3]
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"Expected `images` with sides divisible by {self.downscale}, but got {height} x {width}. Crop or resize them."
            )
        return self._in_parts(self._encode_image, images, height * width, "encode")

    def _encode_image(self, images: Tensor) -> Tensor:
        # Bytes are a quarter of the way to the device; the rest is done there.
        latents = self._codec.encode(unit_pixels(to_device(images, self.vae.device))).float()
        shift, scale = self._normalisation()
        return latents if (shift, scale) == (0, 1) else (latents - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return IMAGE (B, H, W, 3) in [0, 1] on the CPU from latents (B, C, h, w); raises ValueError for NaN."""
        self._check_latents(latents)
        # Each part is waited for: a long clip must not lie on the device as a whole.
        parts = latents.split(max(1, VAE_PIXELS // self._pixels(latents)))
        return torch.cat([self.decode_async(part).get() for part in parts])

    @torch.no_grad()
    def decode_async(self, latents: Tensor, dtype: torch.dtype = torch.float32) -> Arrival:
        """Begin to decode latents (B, C, h, w); `get()` of the result waits for IMAGE (B, H, W, 3) on the CPU, [0, 1] or uint8.

        A GPU is not waited for: the device looks for NaN, and `get()` raises ValueError. The image lies in pinned memory, of
        which there is little: do not collect thousands.
        """
        self._check_latents(latents)
        pixels = self._in_parts(self._decode_latents, latents, self._pixels(latents), "decode")
        image = image_to_bytes(pixels) if dtype == torch.uint8 else pixels.clamp(0, 1)
        # Bytes cannot say NaN, and a VAE in fp16 makes it out of sound latents.
        return to_host(image.movedim(1, -1).contiguous(), latents=latents, pixels=pixels)

    def _check_latents(self, latents: Tensor) -> None:
        check_shape("latents", latents, (None, self.latent_channels, None, None), "Use latents of this model.")
        if latents.device.type == "cpu":
            check_finite("latents", latents)

    def _pixels(self, latents: Tensor) -> int:
        return latents.shape[-2] * latents.shape[-1] * self.downscale**2

    def _decode_latents(self, latents: Tensor) -> Tensor:
        shift, scale = self._normalisation()
        latents = to_device(latents, self.vae.device, self.vae.dtype)
        return self._codec.decode(latents if (shift, scale) == (0, 1) else latents / scale + shift)

    @property
    def _codec(self) -> Codec:
        if isinstance(self.vae, Codec):
            return self.vae
        # Not at every frame: a VAE is looked through for it.
        if self._chosen is None or self._chosen.vae is not self.vae or not self._chosen.current:
            self._chosen = codec_of(self.vae)
        self._chosen.refresh()
        return self._chosen

    def _normalisation(self) -> tuple[float, float]:
        """Return (shift, scale): the model's latents are (the VAE's - shift) * scale."""
        config = self.vae.config
        return getattr(config, "shift_factor", None) or 0.0, getattr(config, "scaling_factor", 1.0)

    def _in_parts(self, run: Callable[[Tensor], Tensor], batch: Tensor, pixels: int, verb: str) -> Tensor:
        what = f"{verb} images of {pixels / 1e6:.2g} million pixels"
        parts = [with_memory(lambda p=part: run(p), what) for part in batch.split(max(1, VAE_PIXELS // pixels))]  # type: ignore[misc]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
