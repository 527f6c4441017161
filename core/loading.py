"""load(): the bundled pocket model or a diffusers folder as a `Pipeline`, without network access."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import Conditioning
from .device import pick_device, pick_dtype
from .diffusers_model import DiffusersDenoiser
from .tensors import image_to_pixels, pixels_to_image

BUNDLED = pathlib.Path(__file__).resolve().parent.parent / "pocket"


@dataclass
class Pipeline:
    """A model with its text encoders and VAE: everything from a prompt to pixels.

    `text` holds (tokenizer, encoder) pairs, two for SDXL. `downscale` is the VAE's pixels per latent cell.
    """

    model: DiffusersDenoiser
    text: list[tuple[Any, Any]]
    vae: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def latent_channels(self) -> int:
        return self.model.latent_channels

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], size: tuple[int, int] = (1024, 1024)) -> Conditioning:
        """Return one row of conditioning per prompt; `size` (height, width) is what SDXL is told about the picture."""
        hidden, pooled = [], None
        for tokenizer, encoder in self.text:
            ids = tokenizer(
                list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            ).input_ids  # fmt: skip
            output = encoder(ids.to(self.device), output_hidden_states=True)
            # SDXL takes the layer before the last of both encoders and the projection of the second.
            hidden.append(output.hidden_states[-2] if self.is_sdxl else output.last_hidden_state)
            pooled = getattr(output, "text_embeds", None)
        if not self.is_sdxl:
            return Conditioning(hidden[0].float())
        time_ids = torch.tensor([[*size, 0, 0, *size]], device=self.device).expand(len(prompts), 6)
        assert pooled is not None
        return Conditioning(torch.cat(hidden, -1).float(), pooled.float(), {"time_ids": time_ids})

    @property
    def is_sdxl(self) -> bool:
        return self.model.unet.config.addition_embed_type == "text_time"

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Return float32 latents (B, C, H / downscale, W / downscale) of IMAGE (B, H, W, 3) in [0, 1]: the posterior's mode."""
        pixels = image_to_pixels(images).to(self.vae.device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.mode().float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return IMAGE (B, H, W, 3) in [0, 1] on the CPU from latents (B, C, h, w)."""
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        return pixels_to_image(self.vae.decode(latents).sample)


def load(
    source: str | pathlib.Path = "pocket", device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Pipeline:  # fmt: skip
    """Load "pocket" or a diffusers folder, from local files only."""
    device = pick_device(device)
    dtype = pick_dtype(device, dtype)
    folder = BUNDLED if str(source) == "pocket" else pathlib.Path(source).expanduser()
    return _load_folder(folder, device, dtype)


def _load_folder(folder: pathlib.Path, device: torch.device, dtype: torch.dtype) -> Pipeline:
    import diffusers
    import transformers

    index = _read_json(folder / "model_index.json")
    unet = _component(diffusers.UNet2DConditionModel, folder / "unet", device, dtype)
    vae = _component(getattr(diffusers, index["vae"][1]), folder / "vae", device, dtype)
    text = []
    for suffix in ("", "_2"):
        if f"text_encoder{suffix}" in index:
            encoder_class = getattr(transformers, index[f"text_encoder{suffix}"][1])
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}", local_files_only=True)
            text.append((tokenizer, _component(encoder_class, folder / f"text_encoder{suffix}", device, dtype)))
    scheduler = diffusers.DDIMScheduler.from_config(_read_json(folder / "scheduler" / "scheduler_config.json"))
    model = DiffusersDenoiser(unet, scheduler.alphas_cumprod, scheduler.config.prediction_type)
    return Pipeline(model, text, vae, device, dtype)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _component(cls: Any, folder: pathlib.Path, device: torch.device, dtype: torch.dtype) -> Any:
    config = _read_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    with torch.device("meta"):
        module = cls(cls.config_class(**config)) if hasattr(cls, "config_class") and cls.config_class else cls.from_config(config)  # fmt: skip
    return _assign(module, dict(_tensors(files[0], device, dtype)), device)


def _tensors(path: pathlib.Path, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            yield key, tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)


def _assign(module: Any, state: dict[str, Tensor], device: torch.device) -> Any:
    """Give a module built on the meta device its weights, without a second copy."""
    expected = set(module.state_dict())
    # transformers 4 and 5 disagree on this prefix.
    state = {_match(key, expected): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key in expected}
    module.load_state_dict(state, strict=True, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta and name.endswith("position_ids"):
            owner, _, leaf = name.rpartition(".")
            ids = torch.arange(buffer.shape[-1], device=device)[None]
            module.get_submodule(owner).register_buffer(leaf, ids, persistent=False)
    return module.eval().requires_grad_(False)


def _match(key: str, expected: set[str]) -> str:
    for candidate in (key, f"text_model.{key}", re.sub(r"^text_model\.", "", key)):
        if candidate in expected:
            return candidate
    return key
