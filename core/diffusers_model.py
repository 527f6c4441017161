"""The library's `Denoiser` over a network of diffusers, and the one of a UNet2DConditionModel (SD1.5, SD2, SDXL)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionHook, hooked
from .checks import check_choice, check_shape
from .denoiser import PREDICTIONS, Conditioning, Prediction
from .device import with_memory
from .features import default_blocks, unet_features
from .fused import FusedUnet, Prepared, Run, fused_unet
from .layers import Layer, measure, skipping
from .schedules import DiscreteLevels, FlowLevels, Levels
from .taps import active
from .transfer import to_device

Bound = Callable[[Tensor], Tensor]
Encoded = tuple[Tensor, Tensor | None]  # of one prompt: token embeddings (1, T, D), pooled text (1, P)


def _what(sample: Tensor) -> str:
    rows, _, height, width = sample.shape
    return f"denoise {rows} x {height} x {width} latents"


class NetworkDenoiser:
    """Denoised latents from a network of diffusers: what does not depend on how it takes its conditioning.

    Args:
        network: in eval mode.
        levels: the noise levels that it was trained on.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
    """

    def __init__(self, network: Any, levels: Levels, prediction_type: str) -> None:
        self.network, self.levels = network, levels
        self.prediction = Prediction(prediction_type)
        self.space = self.prediction.space
        self.sigma_min, self.sigma_max = levels.sigma_min, levels.sigma_max
        self.calls = 0
        self.rows = 0

    @property
    def latent_channels(self) -> int:
        return int(self.network.config.in_channels)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the numbers depend on, for `core.identity.digest`: the network as it is now, and its levels."""
        quantize = getattr(self.levels, "quantize", False)
        own = self.network, self.prediction.kind, self.levels.t_to_sigma(torch.arange(0, 1000, 111)), quantize
        if not active():
            return own
        # What this thread skips or hooks now, by the names of modules.
        names = {module: name for name, module in self._eager.named_modules()}
        taps = [sorted((names[m], i) for m in request if m in names) for i, request in enumerate(active())]
        return *own, taps, [[handler for m, handler in request.items() if m in names] for request in active()]

    def conditioning(self, parts: Sequence[Encoded], size: tuple[int, int]) -> Conditioning:
        """Return one row of conditioning from what each text encoder gives for one prompt, for an image of `size` pixels."""
        raise NotImplementedError

    def network_condition(self, cond: Conditioning) -> dict[str, Any]:
        """Return `cond` as the network's keyword arguments, on its device."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        # Not `network.dtype`, which walks through all modules: as long as a tenth of a small network's call.
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Denoise `x` (B, C, H, W) at `sigma` (B,); one network call of B rows, computed in the network's dtype.

        `x`, `sigma` and `cond` may be on any device; the result is where `x` is.
        """
        check_shape(
            "x",
            x,
            (None, self.latent_channels, None, None),
            "The latents are not of this model's kind: use its own VAE.",
        )
        check_shape("sigma", sigma, (len(x),), "Give one noise level per row.")
        output = self._output(x, sigma, cond)
        return self.prediction.denoised(to_device(output, x.device), x, sigma)

    def _output(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        sample = to_device(self.prediction.network_input(x, sigma), self.device, self.dtype)
        return self._call(sample, self.network_time(sigma), self.network_condition(cond.expand(len(x))))

    def _call(self, sample: Tensor, time: Tensor, condition: dict[str, Any]) -> Tensor:
        network = self._eager if active() else self.network
        return with_memory(lambda: self._run(network, sample, time, condition), _what(sample))

    def _bound(self, time: Tensor, condition: dict[str, Any]) -> Bound:
        """Return sample -> output of the network for fixed arguments."""
        return lambda sample: self._call(sample, time, condition)

    def _run(self, network: Any, sample: Tensor, time: Tensor, condition: dict[str, Any]) -> Tensor:
        output: Tensor = network(sample, time, **condition, return_dict=False)[0]
        return output

    @property
    def _eager(self) -> Any:
        """The network as it was before torch.compile, which sees no taps."""
        return getattr(self.network, "_orig_mod", self.network)

    def bind(self, sigma: Tensor, cond: Conditioning) -> Bound:
        """Return x (B, C, H, W) -> denoised for fixed `sigma` (B,) and `cond`; see `bind_levels`."""
        return self.bind_levels(sigma)(cond)

    def bind_levels(self, sigma: Tensor) -> Callable[[Conditioning], Bound]:
        """Return cond -> (x (B, C, H, W) on the model's device -> denoised) for fixed `sigma` (B,), best given on the CPU.

        The same numbers as a call of the model, for loops that repeat one arrangement: time steps, scales and embeddings
        are computed once, so that nothing but the network and three tensor operations runs per call and a GPU never waits.
        """
        rows, sigma, dtype = len(sigma), sigma.cpu(), self.dtype
        time, coefficients = self.network_time(sigma), self.prediction.coefficients(sigma.reshape(-1, 1, 1, 1))
        plain = bool((coefficients[1] == 1).all())
        scale_in, skip, scale_out = (to_device(c, self.device) for c in coefficients)

        def with_cond(cond: Conditioning) -> Bound:
            # Contiguous: every attention layer would copy a row that is only expanded.
            condition = self.network_condition(cond.expand(rows).map(Tensor.contiguous))
            call = self._bound(time, condition)

            def denoise(x: Tensor) -> Tensor:
                self.calls += 1
                self.rows += rows
                output = call((x * scale_in).to(dtype)).to(scale_out.dtype)
                return torch.addcmul(x.to(scale_out.dtype) if plain else skip * x, scale_out, output).to(x.dtype)

            return denoise

        return with_cond

    def layers(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Layer, ...]:
        """Return the blocks that can be skipped, with their cost in a call on these inputs; two calls are made."""
        return measure(self._eager, lambda: self._output(x, sigma, cond))

    def skipping(self, names: Collection[str]) -> AbstractContextManager[None]:
        """See `LayerModel.skipping`."""
        return skipping(self._eager, names)

    def network_time(self, sigma: Tensor) -> Tensor:
        """Return what the network takes as time: a training timestep, for a flow sigma itself in training steps."""
        if isinstance(self.levels, FlowLevels):
            return to_device(sigma, self.device) * self.levels.train_steps
        return to_device(self.levels.sigma_to_t(sigma), self.device)


class DiffusersDenoiser(NetworkDenoiser):
    """Denoised latents from a diffusers UNet.

    Args:
        unet: a `UNet2DConditionModel` in eval mode.
        alphas_cumprod: the training table (T,); ignored for "flow".
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
        shift: timestep shift of a flow model.
        quantize: ask the network at whole timesteps only, as the host does; see `DiscreteLevels`.
    """

    def __init__(
        self, unet: Any, alphas_cumprod: Tensor | None = None, prediction_type: str = "epsilon", shift: float = 1.0,
        quantize: bool = False,
    ) -> None:  # fmt: skip
        check_choice("prediction_type", prediction_type, PREDICTIONS)
        if prediction_type != "flow" and alphas_cumprod is None:
            raise ValueError(
                "Expected `alphas_cumprod` for a model that is not a flow, but got None. Take it from the scheduler."
            )
        flow = prediction_type == "flow" or alphas_cumprod is None
        levels: Levels = FlowLevels(shift) if flow else DiscreteLevels(alphas_cumprod, quantize)  # type: ignore[arg-type]
        super().__init__(unet, levels, prediction_type)

    @property
    def unet(self) -> Any:
        return self.network

    @property
    def _fused(self) -> tuple[FusedUnet | None, Run | None]:
        """The network in its fused form, and what runs that: it itself, or a recording. A network that the user compiled has none."""
        if isinstance(self.network, nn.Module):
            fused = fused_unet(self.network) if self.network is self._eager else None
            self._kept = fused  # shared by the denoisers of a network while one of them is alive
            return fused, fused
        return getattr(self.network, "fused", None), getattr(self.network, "run", None)

    def refresh(self) -> None:
        """Take over weights that were changed through `.data`, which nothing else notices."""
        fused = self._fused[0]
        if fused is not None:
            fused.refresh(force=True)

    def _bound(self, time: Tensor, condition: dict[str, Any]) -> Bound:
        """What depends on time and text only is computed once, while the weights stay as they are; see `FusedUnet`."""
        plain = super()._bound(time, condition)
        fused, run = self._fused
        if fused is None or run is None:
            return plain
        prepared = Prepared(fused, time, **condition)

        def call(sample: Tensor) -> Tensor:
            if torch.is_grad_enabled() or active() or not fused.intact:
                return plain(sample)
            return with_memory(lambda: run(sample, *prepared.tensors()), _what(sample))

        return call

    @property
    def takes_time_ids(self) -> bool:
        """Whether the network wants pooled text and image sizes (SDXL)."""
        return bool(self.unet.config.addition_embed_type == "text_time")

    def conditioning(self, parts: Sequence[Encoded], size: tuple[int, int]) -> Conditioning:
        """See `NetworkDenoiser.conditioning`: SDXL's two encoders side by side, with the pooled text of the second and sizes."""
        tokens = min(context.shape[1] for context, _ in parts)
        context = torch.cat([context[:, :tokens] for context, _ in parts], -1)
        if not self.takes_time_ids:
            return Conditioning(context)
        time_ids = torch.tensor([[*size, 0, 0, *size]], device=context.device, dtype=torch.float32)
        return Conditioning(context, parts[-1][1], {"time_ids": time_ids})

    @property
    def feature_blocks(self) -> tuple[int, ...]:
        """The decoder blocks whose outputs have half and full latent size."""
        return default_blocks(len(self._eager.up_blocks))

    def features(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        blocks: Sequence[int] | None = None,
        checkpoint: bool = False,
    ) -> list[Tensor]:
        """See `FeatureModel.features`."""
        blocks = self.feature_blocks if blocks is None else blocks
        return unet_features(self._eager, lambda: self._output(x, sigma, cond), blocks, checkpoint)

    def self_attention(self, hook: AttentionHook) -> AbstractContextManager[None]:
        """See `AttentionModel.self_attention`."""
        return hooked(self._eager, hook)

    def network_condition(self, cond: Conditioning) -> dict[str, Any]:
        """Return the UNet's keyword arguments for `cond`; SDXL takes pooled text and time ids by row."""
        cond = cond.to(self.device)
        arguments: dict[str, Any] = {"encoder_hidden_states": cond.context.to(self.dtype)}
        if cond.mask is not None:
            arguments["encoder_attention_mask"] = cond.mask
        if cond.pooled is not None and self.takes_time_ids:
            time_ids = (cond.extra or {}).get("time_ids")
            if time_ids is None:
                raise ValueError(
                    "Expected `cond.extra['time_ids']` (rows, 6) for an SDXL model, but got none. Use `pipe.encode_text`."
                )
            arguments["added_cond_kwargs"] = {"text_embeds": cond.pooled.to(self.dtype), "time_ids": time_ids}
        return arguments
