"""Static-shape replay: networks that are recorded once as CUDA graphs and replayed without launch overhead."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .denoiser import Conditioning
from .diffusers_model import DiffusersDenoiser, NetworkDenoiser
from .pipeline import Pipeline, latents_of
from .transfer import receive

WARM_UP = 3  # runs before a recording: kernels are chosen, compiled and cached in them

log = logging.getLogger(__name__)
# run -> (replay, output): `replay` computes `run` anew on the same memory and leaves the result in `output`.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]


def record_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Record `run` as a CUDA graph of its own memory; it must read fixed memory and never wait for the device."""
    # A stream of this device and this recording: torch's own is one for all devices and threads.
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # By default a thread that allocates meanwhile, as a running stream may, would break the recording and fail itself.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output


class Replay:
    """`run` on named tensors of one shape, recorded; calls may have fewer rows, the rest is padding left from before.

    Rows must not depend on each other, so padding is harmless whatever it holds. Calls from several threads and CUDA streams
    take turns: they share the memory that was recorded.
    """

    def __init__(self, run: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], record: Record) -> None:
        self._lock = threading.Lock()
        device = next(iter(inputs.values())).device
        self._cuda = device.type == "cuda"
        # Plain tensors, whatever mode this is called in: those of inference mode can only be written to there.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device) if self._cuda else nullcontext():
            self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            self.replay, self.output = record(lambda: run(self.inputs))
            self._user: Any = torch.cuda.current_stream() if self._cuda else None

    def fits(self, inputs: dict[str, Tensor]) -> bool:
        """Return whether a call with these tensors can be replayed: known names, equal rows, no gradients."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.values()):
            return False
        rows = {len(tensor) for tensor in inputs.values()}
        return inputs.keys() == self.inputs.keys() and len(rows) == 1 and all(
            len(tensor) <= len(self.inputs[name]) and tensor.shape[1:] == self.inputs[name].shape[1:]
            for name, tensor in inputs.items()
        )  # fmt: skip

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        with self._lock:
            self._take_turn()
            rows = len(next(iter(inputs.values())))
            for name, tensor in inputs.items():
                self.inputs[name][:rows].copy_(tensor)
            self.replay()
            # The next replay overwrites the output.
            return self.output[:rows].clone()

    def _take_turn(self) -> None:
        """Let the current stream wait for the one that called before, when that is another."""
        stream = torch.cuda.current_stream(self.output.device) if self._cuda else None
        if stream != self._user:
            receive(self._user.record_event(), self.inputs, self.output)
            self._user = stream


class ReplayedUnet:
    """A UNet recorded for one shape: fewer rows are padded, anything else (other shapes, gradients) runs eagerly."""

    def __init__(self, unet: Any, inputs: dict[str, Tensor], record: Record) -> None:
        self.unet, self.config = unet, unet.config
        self.recording = Replay(lambda given: _run(unet, given), inputs, record)

    def parameters(self) -> Iterator[Tensor]:
        return self.unet.parameters()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"A replayed network has no `{name}`: use the model that it was recorded from.")

    def __call__(self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Any) -> tuple[Tensor]:
        inputs = _flat(sample, timestep, **cond)
        return (self.recording(inputs) if self.recording.fits(inputs) else _run(self.unet, inputs),)


class ReplayedVae:
    """A VAE recorded for single pictures of one size, both ways; anything else runs eagerly."""

    def __init__(self, vae: Any, height: int, width: int, cell: int, compiled: bool, record: Record) -> None:
        self.vae, self.config, self.device, self.dtype = vae, vae.config, vae.device, vae.dtype
        encode, decode = (torch.compile(f, dynamic=False) if compiled else f for f in (vae.encode, vae.decode))
        zeros = functools.partial(torch.zeros, device=vae.device, dtype=vae.dtype)
        # Laid out as pictures are: the channels of a pixel beside each other.
        pixels = zeros(1, height, width, 3).movedim(-1, 1)
        latents = zeros(1, vae.config.latent_channels, height // cell, width // cell)
        self.recordings = (
            Replay(lambda given: latents_of(encode(given["x"])), {"x": pixels}, record),
            Replay(lambda given: decode(given["x"]).sample, {"x": latents}, record),
        )

    def encode(self, pixels: Tensor) -> Any:
        latents = self._replay(0, pixels)
        return self.vae.encode(pixels) if latents is None else SimpleNamespace(latents=latents)

    def decode(self, latents: Tensor) -> Any:
        pixels = self._replay(1, latents)
        return self.vae.decode(latents) if pixels is None else SimpleNamespace(sample=pixels)

    def _replay(self, way: int, x: Tensor) -> Tensor | None:
        return self.recordings[way]({"x": x}) if self.recordings[way].fits({"x": x}) else None


def _flat(
    sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return a UNet's arguments as one level of named tensors with one row per sample."""
    mask = {} if encoder_attention_mask is None else {"mask": encoder_attention_mask}
    return {
        "sample": sample,
        "timestep": timestep,
        "context": encoder_hidden_states,
        **mask,
        **(added_cond_kwargs or {}),
    }


def _run(unet: Any, inputs: dict[str, Tensor]) -> Tensor:
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    cond: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
    if "mask" in inputs:
        cond["encoder_attention_mask"] = inputs["mask"]
    output: Tensor = unet(inputs["sample"], inputs["timestep"], inputs["context"], return_dict=False, **cond)[0]
    return output


def replayed(
    model: NetworkDenoiser, rows: int, height: int, width: int, cond: Conditioning, compiled: bool = False,
    record: Record | None = None,
) -> NetworkDenoiser:  # fmt: skip
    """Return `model` with its network recorded for up to `rows` latents of `height` x `width` and the shape of `cond`.

    `compiled` runs torch.compile first. Without CUDA, and for a transformer, the model itself is returned, which is said once in
    the log. Weights may
    change in place; after hooks, layer masks or attention have changed, record again. The result has its own counters.
    """
    if record is None and not _has_cuda(model.device):
        return model
    if not isinstance(model, DiffusersDenoiser):
        _say_once("CUDA graphs are recorded of UNets only: the transformer runs eagerly.")
        return model
    fast = copy.copy(model)
    fast.calls = fast.rows = 0
    unet = torch.compile(model.unet, dynamic=False) if compiled else model.unet
    x = torch.zeros(rows, model.latent_channels, height, width, device=model.device, dtype=model.dtype)
    sigma = torch.full((rows,), model.sigma_max)
    inputs = _flat(x, model.network_time(sigma), **model.network_condition(cond.take([0]).expand(rows)))
    try:
        fast.network = ReplayedUnet(unet, inputs, record or record_cuda)
    except RuntimeError as error:
        _warn("network", error)
        return model
    return fast


def replayed_pipeline(
    pipe: Pipeline, rows: int, height: int, width: int, cond: Conditioning, compiled: bool = False,
    record: Record | None = None,
) -> Pipeline:  # fmt: skip
    """Return `pipe` with model and VAE recorded, for a stream of pictures of `height` x `width` pixels; see `replayed`."""
    model = replayed(pipe.model, rows, height // pipe.downscale, width // pipe.downscale, cond, compiled, record)
    if record is None and not _has_cuda(pipe.device):
        return pipe
    try:
        vae: Any = ReplayedVae(pipe.vae, height, width, pipe.downscale, compiled, record or record_cuda)
    except RuntimeError as error:
        _warn("VAE", error)
        vae = pipe.vae
    return dataclasses.replace(pipe, model=model, vae=vae)


def _has_cuda(device: torch.device) -> bool:
    if device.type != "cuda":
        _say_once(f"CUDA graphs need a CUDA device: the network runs eagerly on {device}.")
    return device.type == "cuda"


def _warn(what: str, error: RuntimeError) -> None:
    log.warning("The %s could not be recorded and runs eagerly: %s", what, str(error).splitlines()[0])


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)
