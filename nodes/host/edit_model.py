"""What an edit needs of the host's MODEL beyond denoising: decoder features with gradients, and hooks on its self-attention.

SD1.5, SD2, SDXL and every other native UNet of the host. The user's own patches keep working where they can (LoRA, ControlNet,
cross-attention); patches of the self-attention and of the decoder's blocks would change what is compared, and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...core.attention import Attend, AttentionHook, attend_heads, token_grid
from ...core.features import captured, input_gradients
from ...core.identity import Identity
from ...core.layers import blocks_of
from .denoiser import HostConditioning, HostDenoiser
from .gradients import grad_ready
from .identity import model_identity, network_options

OURS_ALONE = ("attn1_patch", "attn1_output_patch", "output_block_patch", "middle_patch")
CROSS = ("attn2_patch", "attn2_output_patch")


def upsampling_blocks(unet: Any) -> list[int]:
    """Return the indices of the native UNet's output blocks that end in an upsampler."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Upsample

    return [i for i, block in enumerate(unet.output_blocks) if isinstance(list(block.children())[-1], Upsample)]


def check_model(patcher: Any) -> None:
    """Raise ValueError for a MODEL that mode fine cannot edit with: no native UNet, or its self-attention taken by another node."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    network = patcher.model.diffusion_model
    if not isinstance(network, UNetModel) or len(upsampling_blocks(network)) < 2:
        raise ValueError(
            f"Expected `model` with a UNet (SD1.5, SD2, SDXL) for mode fine, but got {type(network).__name__}. Feature guidance and "
            "shared attention are not defined for it: use mode draft."
        )
    replaced = patcher.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1", {})
    if any(key[0] == "output" for key in replaced):
        raise ValueError(
            "Expected `model` with its own self-attention for mode fine, but another node has replaced it (PerturbedAttentionGuidance, "
            "SAG and the like). Connect the MODEL from before that node, or use mode draft."
        )


def left_out(patcher: Any) -> list[str]:
    """Return the names of the MODEL's patches that an edit leaves out."""
    patches = patcher.model_options.get("transformer_options", {}).get("patches", {})
    return [name for name in OURS_ALONE if patches.get(name)]


def inversion_identity(patcher: Any) -> Identity:
    """Return what of a MODEL an inversion depends on: all but the patches that it leaves out and those of the guided estimate."""
    return model_identity(patcher, network_options(patcher.model_options, (*OURS_ALONE, *CROSS), ("attn2",)))


def has_image_prompt(patcher: Any) -> bool:
    """Whether a node has patched the MODEL's cross-attention (IP-Adapter)."""
    options = patcher.model_options.get("transformer_options", {})
    return bool(options.get("patches_replace", {}).get("attn2")) or any(
        options.get("patches", {}).get(k) for k in CROSS
    )


def check_prompt(name: str, cond: HostConditioning, latents: Tensor, sigmas: Tensor) -> None:
    """Raise ValueError unless a CONDITIONING is one prompt, or prompts that together cover the image at all of `sigmas` (S,).

    Where none acts the host estimates 0, which no image can be inverted or edited with.
    """
    if cond.rows > 1:
        raise ValueError(
            f"Expected `{name}` with one prompt, but got a batch of {cond.rows}. Edit one image at a time."
        )
    empty = [_uncovered(cond, latents, sigma) for sigma in sigmas]
    steps = sum(share == 1 for share in empty)
    if steps:
        raise ValueError(
            f"Expected `{name}` with a prompt at every step, but got none at {steps} of {len(empty)} steps (timestep range). "
            "Combine it with a prompt for the other steps: Conditioning (Combine)."
        )
    if any(empty):
        raise ValueError(
            f"Expected `{name}` with a prompt for the whole image, but got none for {max(empty):.0%} of it (area or mask). "
            "Combine it with a prompt for the rest: Conditioning (Combine)."
        )


def check_reference(cond: HostConditioning, size: tuple[int, int], own: tuple[int, int]) -> None:
    """Raise ValueError for a reference image of `own` cells whose conditioning holds an image, which was made for `size`."""
    parts = [c for e in cond.items[0][0].entries for c in e["model_conds"].values()]
    if size != own and any(type(part).__name__ == "CONDNoiseShape" for part in parts):
        raise ValueError(
            "Expected a reference image of the same size as the photo for a model with image conditioning (inpaint, "
            f"InstructPix2Pix), but got {own[1]} x {own[0]} instead of {size[1]} x {size[0]} latent cells. Resize it first."
        )


def _uncovered(cond: HostConditioning, latents: Tensor, sigma: Tensor) -> float:
    """Return the share of the image for which no prompt acts at a level."""
    from comfy.samplers import get_area_and_mult

    weight = torch.zeros_like(latents)
    for entry in cond.items[0][0].entries:
        part = get_area_and_mult(entry, latents, sigma.to(latents)[None])
        if part is not None:
            _window(weight, part.area).add_(1.0 if "default" in entry else part.mult)
    return float((weight == 0).float().mean())


def _window(x: Tensor, area: Sequence[int] | None) -> Tensor:
    """Return the part of `x` (B, C, ..., h, w) under the host's area: sizes, then offsets."""
    if area is None:
        return x
    sides = len(area) // 2
    for dim, (size, start) in enumerate(zip(area[:sides], area[sides:]), x.ndim - sides):
        x = x.narrow(dim, start, size)
    return x


def _without(options: dict[str, Any], names: Sequence[str], replaced: Sequence[str]) -> None:
    options["patches"] = {k: v for k, v in options.get("patches", {}).items() if k not in names}
    options["patches_replace"] = {k: v for k, v in options.get("patches_replace", {}).items() if k not in replaced}


def _sdpa(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Sage and flash kernels may lack a backward pass; PyTorch's has one everywhere.
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(q, k, v, *args, **kwargs)


def areas_of(cond: HostConditioning, x: Tensor, sigma: Tensor) -> dict[Any, Sequence[int]]:
    """Return the host's area (sizes, offsets) of each entry that is asked about a part of the image only, by its uuid."""
    from comfy.samplers import get_area_and_mult

    entries = [e for source in {source for source, _ in cond.items} for e in source.entries if "area" in e]
    parts = [get_area_and_mult(entry, x, sigma) for entry in entries]
    return {part.uuid: part.area for part in parts if part is not None}


def on_whole(
    hook: AttentionHook, layer: str, area: Sequence[int] | None, q: Tensor, k: Tensor, v: Tensor, attend: Attend,
    grid: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Let a hook see the queries (B, T, C) of an area at their place in the whole image of `grid` cells."""
    if area is None:
        return hook(layer, q, k, v, attend)
    height, width, top, left = area
    rows, columns = token_grid(q.shape[1], height, width)
    halvings = max(0, round(math.log2(height * width / (rows * columns)) / 2))
    total_rows, total_columns = (-(-side // 2**halvings) for side in grid)
    top, left = min(top >> halvings, total_rows - rows), min(left >> halvings, total_columns - columns)
    whole = q.new_zeros(len(q), total_rows, total_columns, q.shape[2])
    whole[:, top : top + rows, left : left + columns] = rearrange(q, "b (h w) c -> b h w c", h=rows)
    out = hook(layer, rearrange(whole, "b h w c -> b (h w) c"), k, v, attend)
    out = rearrange(out, "b (h w) c -> b h w c", h=total_rows)
    return rearrange(out[:, top : top + rows, left : left + columns], "b h w c -> b (h w) c")


class HostEditModel:
    """core's `Denoiser`, `FeatureModel` and `AttentionModel` over a loaded MODEL.

    With `image_prompt` the user's cross-attention patches stay; without, they are left out, as in inversion and energies.
    """

    def __init__(self, denoiser: HostDenoiser, patcher: Any, image_prompt: bool = False) -> None:
        self.denoiser, self.patcher = denoiser, patcher
        self.left_out = OURS_ALONE if image_prompt else (*OURS_ALONE, *CROSS)
        self.replaced = () if image_prompt else ("attn2",)
        self.active = self._patched(lambda options: None)
        self.grid = (0, 0)
        self.areas: dict[Any, Sequence[int]] = {}
        self.network = patcher.model.diffusion_model
        self.blocks = upsampling_blocks(self.network)
        self.space, self.levels = denoiser.space, denoiser.levels
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.latent_channels = denoiser.latent_channels
        self.feature_blocks = (len(self.blocks) - 2, len(self.blocks) - 1)

    @property
    def calls(self) -> int:
        return self.denoiser.calls

    @property
    def rows(self) -> int:
        return self.denoiser.rows

    def _patched(self, change: Callable[[dict[str, Any]], None]) -> HostDenoiser:
        def both(options: dict[str, Any]) -> None:
            _without(options, self.left_out, self.replaced)
            change(options)

        return self.denoiser.patched(both)

    def __call__(self, x: Tensor, sigma: Tensor, cond: HostConditioning) -> Tensor:
        self._place(x, sigma, cond)
        return self.active(x, sigma, cond)

    def _place(self, x: Tensor, sigma: Tensor, cond: HostConditioning) -> None:
        self.grid, self.areas = (x.shape[-2], x.shape[-1]), areas_of(cond, x, sigma.reshape(-1))

    @property
    def guided(self) -> Callable[..., Tensor] | None:
        """See core's `Guided`; what acts around the network sees the shared attention too."""
        return None if self.active.guided is None else self._guided

    def _guided(self, x: Tensor, sigma: Tensor, cond: HostConditioning, uncond: Any, *more: Any) -> Tensor:
        own = self.active.guided
        assert own is not None
        self._place(x, sigma, cond if uncond is None else cond.join(uncond))
        return own(x, sigma, cond, uncond, *more)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @contextmanager
    def self_attention(self, hook: AttentionHook) -> Iterator[None]:
        """See `slipstream.core.attention.AttentionModel`."""

        def replace(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            kind, number = extra["block"]
            layer, attend = f"{kind}.{number}.{extra.get('block_index', 0)}", attend_heads(extra["n_heads"])
            areas = [self.areas.get(uuid) for uuid in extra["uuids"]]
            if not any(areas):
                return hook(layer, q, k, v, attend)
            # Rows of several prompts, each of its own part of the image.
            rows = zip(areas, q.chunk(len(areas)), k.chunk(len(areas)), v.chunk(len(areas)))
            return torch.cat([on_whole(hook, layer, area, rq, rk, rv, attend, self.grid) for area, rq, rk, rv in rows])

        def change(options: dict[str, Any]) -> None:
            keys = {("output", i): replace for i in range(len(self.network.output_blocks))}
            options["patches_replace"]["attn1"] = {**options["patches_replace"].get("attn1", {}), **keys}

        before, self.active = self.active, self._patched(change)
        try:
            yield
        finally:
            self.active = before

    def features(
        self, x: Tensor, sigma: Tensor, cond: Any, blocks: Sequence[int] | None = None, checkpoint: bool = False
    ) -> list[Tensor]:
        """See `slipstream.core.features.FeatureModel`."""
        wanted = [self.blocks[b] for b in (self.feature_blocks if blocks is None else blocks)]
        network = self.network

        def change(options: dict[str, Any]) -> None:
            options["optimized_attention_override"] = _sdpa

        # The host calls the layers of an input or output block one by one, never the block.
        parts = [block.module for block in blocks_of(network).values()] if checkpoint else []
        with grad_ready(self.patcher) if torch.is_grad_enabled() else nullcontext(), input_gradients(network, parts):
            with captured({i: network.output_blocks[i][-1] for i in wanted}) as found:
                # Their networks would be part of the graph, and what they add is the same for both sides of a comparison.
                self._patched(change)(x, sigma, cond.without("control", "gligen"))
        return [found[i] for i in wanted]
