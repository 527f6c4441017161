"""What an edit needs of the host's MODEL beyond denoising: decoder features with gradients, and its self-attention in our hands.

SD1.5, SD2, SDXL and every other native UNet of the host. The user's own patches stay in force where they can (LoRA, ControlNet,
cross-attention); patches of the self-attention and of the decoder's blocks would change what is compared, and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...core.attention import AttentionHook, attend_heads
from ...core.features import checkpointed, frozen
from .denoiser import HostDenoiser
from .gradients import grad_ready

OURS_ALONE = ("attn1_patch", "attn1_output_patch", "output_block_patch", "middle_patch")
CROSS = ("attn2_patch", "attn2_output_patch")


class _Cut(Exception):  # noqa: N818 - control flow
    pass


def upsampling_blocks(unet: Any) -> list[int]:
    """Return the indices of the native UNet's output blocks that end in an upsampler."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Upsample

    return [i for i, block in enumerate(unet.output_blocks) if isinstance(list(block.children())[-1], Upsample)]


def check_model(patcher: Any) -> None:
    """Raise ValueError for a MODEL that cannot be edited with: no native UNet, or its self-attention taken by another node."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    network = patcher.model.diffusion_model
    if not isinstance(network, UNetModel) or len(upsampling_blocks(network)) < 2:
        raise ValueError(
            f"Expected `model` with a UNet (SD1.5, SD2, SDXL), but got {type(network).__name__}. Feature guidance and shared attention "
            "are not defined for it: use an SD1.5 or SDXL checkpoint."
        )
    replaced = patcher.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1", {})
    if any(key[0] == "output" for key in replaced):
        raise ValueError(
            "Expected `model` with its own self-attention, but another node has replaced it (PerturbedAttentionGuidance, SAG and the "
            "like). Connect the MODEL from before that node."
        )


def left_out(patcher: Any) -> list[str]:
    """Return the names of the MODEL's patches that an edit leaves out."""
    patches = patcher.model_options.get("transformer_options", {}).get("patches", {})
    return [name for name in OURS_ALONE if patches.get(name)]


def has_image_prompt(patcher: Any) -> bool:
    """Whether a node has patched the MODEL's cross-attention (IP-Adapter)."""
    options = patcher.model_options.get("transformer_options", {})
    return bool(options.get("patches_replace", {}).get("attn2")) or any(
        options.get("patches", {}).get(k) for k in CROSS
    )


def _without(options: dict[str, Any], names: Sequence[str], replaced: Sequence[str]) -> None:
    options["patches"] = {k: v for k, v in options.get("patches", {}).items() if k not in names}
    options["patches_replace"] = {k: v for k, v in options.get("patches_replace", {}).items() if k not in replaced}


def _sdpa(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Sage and flash kernels may lack a backward pass; PyTorch's has one everywhere.
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(q, k, v, *args, **kwargs)


class HostEditModel:
    """core's `Denoiser`, `FeatureModel` and `AttentionModel` over a loaded MODEL.

    With `image_prompt` the user's cross-attention patches stay; without, they are left out, as in inversion and energies.
    """

    def __init__(self, denoiser: HostDenoiser, patcher: Any, image_prompt: bool = False) -> None:
        self.denoiser, self.patcher = denoiser, patcher
        self.left_out = OURS_ALONE if image_prompt else (*OURS_ALONE, *CROSS)
        self.replaced = () if image_prompt else ("attn2",)
        self.active = self._patched(lambda options: None)
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

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self.active(x, sigma, cond)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @contextmanager
    def self_attention(self, hook: AttentionHook) -> Iterator[None]:
        """See `slipstream.core.attention.AttentionModel`."""

        def replace(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            kind, number = extra["block"]
            layer = f"{kind}.{number}.{extra.get('block_index', 0)}"
            return hook(layer, q, k, v, attend_heads(extra["n_heads"]))

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
        # A patch sees what *enters* an output block: the output of the one before it, upsampler included.
        entries = [self.blocks[b] + 1 for b in (self.feature_blocks if blocks is None else blocks)]
        found: dict[int, Tensor] = {}

        def capture(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
            number = options["block"][1]
            if number in entries:
                found[number] = h
            if number == max(entries):
                raise _Cut
            return h, skip

        def change(options: dict[str, Any]) -> None:
            options["patches"]["output_block_patch"] = [capture]
            options["optimized_attention_override"] = _sdpa

        with ExitStack() as stack:
            if torch.is_grad_enabled():
                stack.enter_context(grad_ready(self.patcher))
                stack.enter_context(frozen(self.network))
                if checkpoint:
                    stack.enter_context(
                        checkpointed(
                            [*self.network.input_blocks, self.network.middle_block, *self.network.output_blocks]
                        )
                    )
            try:
                self._patched(change)(x, sigma, cond)
            except _Cut:
                pass
        return [found[e] for e in entries]
