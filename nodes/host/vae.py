"""Images and latents of a host VAE, one latent per image: a VAE of videos would take a batch of images for the frames of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.checks import check_finite
from ...core.compiling import nobody
from ...core.device import is_out_of_memory
from ...core.graphs import Record, Replay, Tell, record_cuda
from ...core.images import pad_to_multiple
from ...core.taps import plain_type
from ...core.tensors import image_to_bytes
from ...core.transfer import Arrival, Lane, to_device, to_host

if TYPE_CHECKING:
    from .denoiser import HostDenoiser

log = logging.getLogger(__name__)
HostCall = Callable[[Any, float], AbstractContextManager[Any]]


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
    """A host VAE for frames as bytes: a tiny one (TAESD) works from a copy on the device, where nothing waits.

    The host's own call scales and casts on the CPU, waits for each copy, and may bring the weights each time.

    Args:
        vae: VAE.
        device: that of the network.
        around: gives a context for the host's own call, of a patcher and the bytes that it takes beside the weights.
    """

    def __init__(self, vae: Any, device: torch.device, around: HostCall | None = None) -> None:
        self.vae, self.device, self.around = vae, device, around or (lambda patcher, memory: nullcontext())
        self.network = tiny_copy(vae, device) if device.type == "cuda" else None
        self._replays: dict[str, Replay] = {}

    def record(self, images: int, height: int, width: int, tell: Tell = nobody, record: Record = record_cuda) -> None:
        """Record the copy, whose kernels are short, for up to so many images; `tell` gets a sentence when that fails.

        For the thread that starts the others: a recording waits until they are outside of `DEVICE_WORK`.
        """
        if self.network is None:
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
        if samples is not None:
            return samples
        with self._host_call("memory_used_encode", images.movedim(-1, 1).shape):
            return encode_images(self.vae, self._padded(images))

    def decode(self, samples: Tensor) -> Tensor | Arrival:
        """Return bytes (B, H, W, 3), or such that are on their way, of LATENT samples on any device; NaN raises ValueError."""
        images = self._run("decode", self._decode, samples)
        if images is not None:
            return to_host(image_to_bytes(images), image=images)
        with self._host_call("memory_used_decode", samples.shape):
            images = decode_images(self.vae, samples)[..., :3]
        check_finite("image", images)  # bytes cannot say NaN
        return image_to_bytes(images)

    def _host_call(self, estimate: str, shape: Sequence[int]) -> AbstractContextManager[Any]:
        vae = self.vae
        memory = getattr(vae, estimate)(shape, vae.vae_dtype) if hasattr(vae, estimate) else 0
        return self.around(getattr(vae, "patcher", None), float(memory))

    def _padded(self, images: Tensor) -> Tensor:
        return pad_to_multiple(images.float() / 255, cell_side(self.vae))

    def _encode(self, images: Tensor) -> Tensor:
        assert self.network is not None
        pixels = self.vae.process_input(self._padded(images).movedim(-1, 1)).to(self.vae.vae_dtype)
        samples: Tensor = self.network.encode(pixels)
        return samples.float()

    def _decode(self, samples: Tensor) -> Tensor:
        assert self.network is not None
        images: Tensor = self.vae.process_output(self.network.decode(samples.to(self.vae.vae_dtype)).float())
        return images.movedim(1, -1)[..., :3].contiguous()

    def _run(self, way: str, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """Return `network(x)`; None for the host's call, which without memory makes room or works in tiles."""
        if self.network is None:
            return None
        replay = self._replays.get(way)
        try:
            x = to_device(x, self.device)
            return network(x) if replay is None or not replay.fits({"x": x}) else replay({"x": x})
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None


def tiny_copy(vae: Any, device: torch.device) -> Any:
    """Return a copy of a tiny VAE's network on a device, None for another kind or one whose calls do more than scale and cast."""
    network = vae.first_stage_model
    usual = (
        plain_type(network).__name__ == "TAESD"
        and f"{plain_type(vae).__module__}.{plain_type(vae).__name__}" == "comfy.sd.VAE"
        and not {"encode", "decode"} & vars(vae).keys()
        and getattr(vae, "output_channels", 3) == 3
        and getattr(vae, "format_encoded", None) is None
    )
    if not usual:
        return None
    with torch.inference_mode(False), torch.no_grad():  # as plain tensors, which a recording may read in any mode
        copy = plain_type(network)(latent_channels=vae.latent_channels)
        copy.load_state_dict({name: weight.clone() for name, weight in network.state_dict().items()})
        return copy.to(device, vae.vae_dtype).eval().requires_grad_(False)


def has_room(patcher: Any, memory: float = 0.0) -> bool:
    """Whether the host can load a model, and has so many bytes for its work, without unloading another: as it reckons itself."""
    import comfy.model_management as management

    if patcher is None or management.is_device_cpu(patcher.load_device):
        return True
    work = max(management.minimum_inference_memory(), memory + management.extra_reserved_memory())
    missing = max(patcher.model_size() - patcher.loaded_size(), 0)
    return bool(management.get_free_memory(patcher.load_device) >= 1.1 * missing + work)


@contextmanager
def while_sampling() -> Iterator[None]:
    """Within the context a VAE may run though a model is sampled with: what the host unloads for it is loaded again afterwards."""
    import comfy.model_management as memory

    loaded = memory.loaded_models(only_currently_used=True)
    try:
        yield
    finally:
        memory.load_models_gpu(loaded)


def vae_lanes(vae: FrameVae, denoiser: HostDenoiser) -> dict[str, Lane]:
    """Return CUDA streams for the threads of a stream, on which the VAE works beside the network; none where weights travel.

    The network keeps the stream that the host prepares prompts and weights on. Weights that are not on the device the host brings for
    each call, by streams and buffers that serve one caller at a time.
    """
    device, beside = denoiser.device, vae.network or vae.vae.first_stage_model
    if device.type != "cuda" or not denoiser.resident or any(weight.device != device for weight in beside.parameters()):
        return {}
    images = Lane(device)
    log.info("Live Stream: the VAE works on a CUDA stream of its own beside the network.")
    return {"encode": images, "denoise": Lane(device, shared=True), "decode": images}
