"""Images and latents of a host VAE, one latent per image: a VAE of videos would take a batch of images for the frames of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.checks import check_finite
from ...core.compiling import nobody
from ...core.device import is_out_of_memory
from ...core.fused import Watch
from ...core.graphs import Record, Replay, Tell, record_cuda
from ...core.images import pad_to_multiple
from ...core.taps import plain_type
from ...core.tensors import image_to_bytes
from ...core.transfer import Arrival, Lane, to_device, to_host

if TYPE_CHECKING:
    from .denoiser import HostDenoiser

log = logging.getLogger(__name__)


def cell_side(vae: Any) -> int:
    """Return the side in pixels of what becomes one latent cell; a VAE of another pack may not have the host's method."""
    if hasattr(vae, "spacial_compression_encode"):
        return int(vae.spacial_compression_encode())
    ratio = getattr(vae, "downscale_ratio", 8)
    return int(ratio[-1] if isinstance(ratio, tuple) else ratio)  # of a video VAE: frames, height, width


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Return the LATENT samples (B, C, h, w), or (B, C, 1, h, w) of a VAE of videos, for IMAGE (B, H, W, 3)."""
    at_once = 1 if getattr(vae, "latent_dim", 2) == 3 else len(images)
    return torch.cat([vae.encode(part) for part in images.split(at_once)])


def decode_images(vae: Any, samples: Tensor) -> Tensor:
    """Return IMAGE (B, H, W, 3) for LATENT samples of one image each."""
    images: Tensor = vae.decode(samples)
    return images.flatten(0, -4)  # a VAE of videos gives (B, 1, H, W, 3)


class FrameVae:
    """A host VAE for frames as bytes: where its weights lie on `device` nothing waits. The host's own call works on the CPU too.

    Args:
        vae: VAE.
        device: that of the network.
    """

    def __init__(self, vae: Any, device: torch.device) -> None:
        self.vae, self.device, network = vae, device, vae.first_stage_model
        self._replays: dict[str, Replay] = {}
        self._plain = device.type == "cuda" and _only_scales(vae)
        layers = [(owner, name) for owner in network.modules() for name, _ in owner.named_children()]
        self._watch = Watch(layers if self._plain else [])
        self._look()

    def record(self, images: int, height: int, width: int, tell: Tell = nobody, record: Record = record_cuda) -> None:
        """Record a tiny VAE, whose kernels are short, for up to so many images; `tell` gets a sentence when that fails.

        For the thread that starts the others: a recording waits until they are outside of `DEVICE_WORK`.
        """
        if not (self.resident and plain_type(self.vae.first_stage_model).__name__ == "TAESD"):
            return
        x = torch.zeros(images, height, width, 3, dtype=torch.uint8, device=self.device)
        try:
            self._replays["encode"] = Replay(lambda given: self._encode(given["x"]), {"x": x}, record)
            samples = self._replays["encode"]({"x": x})
            self._replays["decode"] = Replay(lambda given: self._decode(given["x"]), {"x": samples}, record)
        except RuntimeError as error:
            self._replays.clear()
            tell(f"The VAE could not be recorded and runs as it is: {str(error).splitlines()[0].rstrip('.')}.")

    def encode(self, images: Tensor) -> Tensor:
        """Return LATENT samples (B, C, h, w) of bytes (B, H, W, 3), padded to whole latent cells."""
        samples = self._run("encode", self._encode, images)
        return encode_images(self.vae, self._padded(images)) if samples is None else samples

    def decode(self, samples: Tensor) -> Tensor | Arrival:
        """Return bytes (B, H, W, 3), or such that are on their way, of LATENT samples on any device; NaN raises ValueError."""
        images = self._run("decode", self._decode, samples)
        if images is not None:
            return to_host(image_to_bytes(images), image=images)
        images = decode_images(self.vae, samples)[..., :3]
        check_finite("image", images)  # bytes cannot say NaN
        return image_to_bytes(images)

    @property
    def resident(self) -> bool:
        """Whether all weights lie on the device, and the host's call only scales and casts around the network."""
        if self._watch.changed:
            self._look()
        return self._resident

    def _look(self) -> None:
        self._watch.look()
        self._replays.clear()  # they read weights where those were
        self._resident = self._plain and weights_on(self.device, self.vae.first_stage_model)

    def _padded(self, images: Tensor) -> Tensor:
        return pad_to_multiple(images.float() / 255, cell_side(self.vae))

    def _encode(self, images: Tensor) -> Tensor:
        pixels = self.vae.process_input(self._padded(images).movedim(-1, 1)).to(self.vae.vae_dtype)
        samples: Tensor = self.vae.first_stage_model.encode(pixels)
        return samples.float()

    def _decode(self, samples: Tensor) -> Tensor:
        pixels = self.vae.first_stage_model.decode(samples.to(self.vae.vae_dtype)).float()
        images: Tensor = self.vae.process_output(pixels)
        return images.movedim(1, -1)[..., :3].contiguous()

    def _run(self, way: str, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """Return `network(x)`; None for the host's call, which brings weights, and without memory makes room or works in tiles."""
        if not self.resident:
            return None
        replay = self._replays.get(way)
        try:
            x = to_device(x, self.device)
            return network(x) if replay is None or not replay.fits({"x": x}) else replay({"x": x})
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None


def _only_scales(vae: Any) -> bool:
    """Whether what a VAE's own calls do besides its network is to scale and cast images of three channels."""
    return (
        f"{plain_type(vae).__module__}.{plain_type(vae).__name__}" == "comfy.sd.VAE"
        and not {"encode", "decode"} & vars(vae).keys()
        and getattr(vae, "latent_dim", 2) == 2
        and getattr(vae, "output_channels", 3) == 3
        and getattr(vae, "format_encoded", None) is None
        and not getattr(vae.first_stage_model, "comfy_has_chunked_io", False)
    )


def weights_on(device: torch.device, *networks: Any) -> bool:
    """Whether all weights of some networks lie on a device, so that none is brought for each call."""
    return all(weight.device == device for network in networks for weight in network.parameters())


@contextmanager
def while_sampling() -> Iterator[None]:
    """Within the context a VAE may run though a model is sampled with: what the host unloads for it is loaded again afterwards."""
    import comfy.model_management as memory

    loaded = memory.loaded_models(only_currently_used=True)
    try:
        yield
    finally:
        memory.load_models_gpu(loaded)


def vae_lanes(vae: Any, denoiser: HostDenoiser) -> dict[str, Lane]:
    """Return CUDA streams for the threads of a stream, on which the VAE works beside the network; none where weights travel.

    The network keeps the stream that the host prepares prompts and weights on. Weights that are not on the device the host brings for
    each call, by streams and buffers that serve one caller at a time.
    """
    device = denoiser.device
    if device.type != "cuda" or not weights_on(device, denoiser.model.diffusion_model, vae.first_stage_model):
        return {}
    images = Lane(device)
    log.info("Live Stream: the VAE works on a CUDA stream of its own beside the network.")
    return {"encode": images, "denoise": Lane(device, shared=True), "decode": images}
