"""Static-shape replay: networks that are recorded once as CUDA graphs and replayed without launch overhead."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice
from .codec import Codec, codec_of
from .compiling import compiled_for, compiling, nobody
from .denoiser import Conditioning
from .diffusers_model import DiffusersDenoiser, NetworkDenoiser
from .fused import FusedUnet, Prepared, fused_unet
from .pipeline import Pipeline
from .transfer import DEVICE_WORK, receive

ACCELERATIONS = ("none", "graph", "compile")
# Runs before a recording: kernels are chosen, compiled and cached in them. One more follows, which must not wait for the device.
WARM_UP = 2

log = logging.getLogger(__name__)
# run -> (replay, output): `replay` computes `run` again on the same memory and leaves the result in `output`.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
Tell = Callable[[str], None]  # gets what the log gets, for whoever waits


def record_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Record `run` as a CUDA graph of its own memory; it must read fixed memory and never wait for the device."""
    # A stream of this device and this recording: torch's own is one for all devices and threads.
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            made = run()
        # Not of the recording's own memory: with cudaMallocAsync torch warns when that is freed.
        output = torch.empty_like(made)
    del made
    output.record_stream(current)
    with DEVICE_WORK.alone():
        with torch.cuda.stream(side), refused_waits():
            run()
        try:
            # By default a thread that allocates meanwhile, as a running stream may, would break the recording and fail itself.
            with addresses(), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                output.copy_(run())
        except Exception:
            # With cudaMallocAsync the memory of what failed exists from the first replay on; freed before, it ends the process.
            with torch.cuda.stream(side), suppress(RuntimeError):
                graph.replay()
            raise
    current.wait_stream(side)
    return graph.replay, output


def native_allocator() -> bool:
    """Return whether torch itself manages the device's memory, and not cudaMallocAsync, ComfyUI's default on NVIDIA cards."""
    return bool(torch.cuda.get_allocator_backend() == "native")


@contextmanager
def addresses() -> Iterator[None]:
    """Within the context compiled kernels get addresses in place of tensors, where cudaMallocAsync manages memory.

    Their launcher asks the driver about each tensor, and the driver knows nothing of a recording's memory before the first replay.
    """
    kernel = getattr(sys.modules.get("torch._inductor.runtime.triton_heuristics"), "CachingAutotuner", None)
    if kernel is None or native_allocator():
        yield
        return
    launch, recording = kernel.run, threading.get_ident()

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == recording:
            args = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
        return launch(self, *args, **kwargs)

    kernel.run = run
    try:
        yield
    finally:
        kernel.run = launch


@contextmanager
def refused_waits() -> Iterator[None]:
    """Within the context what would make the host wait raises, where cudaMallocAsync manages memory.

    It would break a recording, and there freeing what a broken one holds ends the process. The setting is that of all threads.
    """
    if native_allocator():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def record_again(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Stand in for a recording where there are no CUDA graphs: a replay runs once more. For compiled networks of one shape."""
    output = run()

    @torch.inference_mode(False)
    @torch.no_grad()  # as it was compiled: in another mode it would be compiled again
    def replay() -> None:
        output.copy_(run())

    return replay, output


class Replay:
    """`run` on named tensors of one shape, recorded; calls may have fewer rows, the rest is padding left from before.

    Rows must not depend on each other, so padding is harmless whatever it holds. Calls from several threads and CUDA streams
    take turns: they share the memory that was recorded.
    """

    def __init__(
        self, run: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], record: Record,
        fixed: Collection[str] = (),
    ) -> None:  # fmt: skip
        """`fixed` names inputs that nobody changes in place: one that comes again is not copied again."""
        self._lock = threading.Lock()
        self._fixed, self._held = frozenset(fixed), dict[str, Tensor]()
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
                if self._held.get(name) is not tensor:
                    self.inputs[name][:rows].copy_(tensor)
            self._held = {name: inputs[name] for name in self._fixed & inputs.keys()}
            self.replay()
            # The next replay overwrites the output.
            return self.output[:rows].clone()

    def _take_turn(self) -> None:
        """Let the current stream wait for the one that called before, when that is another."""
        stream = torch.cuda.current_stream(self.output.device) if self._cuda else None
        if stream != self._user:
            receive(self._user.record_event(), self.inputs, self.output)
            self._user = stream


FIXED = ("times", "texts", "bias")  # inputs of a `FusedUnet` that stay from call to call


class ReplayedUnet:
    """A UNet recorded for one shape: fewer rows are padded, anything else (other shapes, gradients) runs eagerly.

    Recorded is its `FusedUnet`, which the denoiser binds to levels and prompts; a UNet that has none is recorded as it is.
    """

    def __init__(
        self, unet: Any, sample: Tensor, timestep: Tensor, cond: dict[str, Any], compiled: bool, record: Record
    ) -> None:  # fmt: skip
        self.unet, self.config, self.fused = unet, unet.config, fused_unet(unet)
        self._orig_mod = unet  # what hooks, features and layer masks work on, as of a compiled network
        given = _flat(sample, timestep, **cond)
        function: Callable[..., Tensor] = _run
        owner: Any = unet
        if self.fused is not None:
            with torch.no_grad():
                prepared = Prepared(self.fused, timestep, **cond).tensors()
            given = {"sample": sample, **_fixed(*prepared)}
            function, owner = _run_fused, self.fused
        self._eager = functools.partial(function, owner)
        self._called = compiled_for(function, owner, *given.values()) if compiled else self._eager
        self.recording = Replay(self._called, given, record, FIXED)

    def again(self, record: Record) -> ReplayedUnet:
        """Return a second recording of the same network, compiled or not, in memory of its own."""
        other = copy.copy(self)
        other.recording = Replay(self._called, self.recording.inputs, record, FIXED)
        return other

    def parameters(self) -> Iterator[Tensor]:
        return self.unet.parameters()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"A replayed network has no `{name}`: use the model that it was recorded from.")

    def __call__(self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Any) -> tuple[Tensor]:
        inputs = _flat(sample, timestep, **cond)
        if self.fused is None:
            return (self._replay(inputs),)
        if torch.is_grad_enabled() or not self.fused.intact:
            return (_run(self.unet, inputs),)
        return (self.run(sample, *Prepared(self.fused, timestep, **cond).tensors()),)

    def run(self, sample: Tensor, times: Tensor, texts: Tensor, bias: Tensor | None) -> Tensor:
        """See `core.fused.Run`."""
        return self._replay({"sample": sample, **_fixed(times, texts, bias)})

    def _replay(self, inputs: dict[str, Tensor]) -> Tensor:
        output: Tensor = self.recording(inputs) if self.recording.fits(inputs) else self._eager(inputs)
        return output


class ReplayedVae(Codec):
    """A VAE recorded for up to `images` images of one size, both ways; anything else runs eagerly."""

    def __init__(
        self, vae: Any, height: int, width: int, cell: int, compiled: bool, record: Record, images: int = 1
    ) -> None:  # fmt: skip
        super().__init__(vae)
        self.config, self.device, self.dtype = vae.config, vae.device, vae.dtype
        self.codec = codec = codec_of(vae)
        zeros = functools.partial(torch.zeros, device=vae.device)
        # Laid out as images are: the channels of a pixel beside each other.
        pixels = zeros(images, height, width, 3).movedim(-1, 1)
        latents = zeros(images, vae.config.latent_channels, height // cell, width // cell, dtype=vae.dtype)
        encode, decode = codec.encode, codec.decode
        if compiled and not codec.fused:
            kind: Any = type(codec)
            encode, decode = compiled_for(kind.encode, codec, pixels), compiled_for(kind.decode, codec, latents)
        self.recordings = (
            Replay(lambda given: encode(given["x"]), {"x": pixels}, record),
            Replay(lambda given: decode(given["x"]), {"x": latents}, record),
        )

    def encode(self, pixels: Tensor) -> Tensor:
        return self._replay(0, pixels, self.codec.encode)

    def decode(self, latents: Tensor) -> Tensor:
        return self._replay(1, latents, self.codec.decode)

    def _replay(self, way: int, x: Tensor, eager: Callable[[Tensor], Tensor]) -> Tensor:
        self.codec.refresh()
        return self.recordings[way]({"x": x}) if self.recordings[way].fits({"x": x}) else eager(x)


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


def _added(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}


def _run(unet: Any, inputs: dict[str, Tensor]) -> Tensor:
    cond: dict[str, Any] = {"added_cond_kwargs": _added(inputs)} if _added(inputs) else {}
    if "mask" in inputs:
        cond["encoder_attention_mask"] = inputs["mask"]
    output: Tensor = unet(inputs["sample"], inputs["timestep"], inputs["context"], return_dict=False, **cond)[0]
    return output


def _run_fused(fused: FusedUnet, inputs: dict[str, Tensor]) -> Tensor:
    output: Tensor = fused(inputs["sample"], inputs["times"], inputs["texts"], inputs.get("bias"))
    return output


def _fixed(times: Tensor, texts: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {"times": times, "texts": texts, **({} if bias is None else {"bias": bias})}


def replayed(
    model: NetworkDenoiser, rows: int, height: int, width: int, cond: Conditioning, compiled: bool = False,
    record: Record | None = None, tell: Tell = nobody,
) -> NetworkDenoiser:  # fmt: skip
    """Return `model` with its network recorded for up to `rows` latents of `height` x `width` and the shape of `cond`.

    `compiled` runs torch.compile first; without CUDA that is all. Where neither can be, and for a transformer, the model itself is
    returned, which is said once in the log. Weights may change in place; after layer masks or attention have changed, record again.
    The result has its own counters.
    """
    record = record or _recorder(model.device, compiled)
    if record is None:
        return model
    if not isinstance(model, DiffusersDenoiser):
        _say_once("CUDA graphs are recorded of UNets only: the transformer runs eagerly.")
        return model
    fast = copy.copy(model)
    fast.calls = fast.rows = 0
    x = torch.zeros(rows, model.latent_channels, height, width, device=model.device, dtype=model.dtype)
    sigma = torch.full((rows,), model.sigma_max)
    arguments = model.network_condition(cond.take([0]).expand(rows))
    try:
        with compiling(f"the network for {rows} x {height} x {width} latents", tell) if compiled else nullcontext():
            fast.network = ReplayedUnet(model.unet, x, model.network_time(sigma), arguments, compiled, record)
    except RuntimeError as error:
        _warn("network", error, tell)
        return model
    return fast


def replayed_pipeline(
    pipe: Pipeline, rows: int, height: int, width: int, cond: Conditioning, compiled: bool = False,
    record: Record | None = None, images: int = 1, tell: Tell = nobody,
) -> Pipeline:  # fmt: skip
    """Return `pipe` with model and VAE recorded, for a stream of images of `height` x `width` pixels; see `replayed`.

    `images` go through the VAE in one call.
    """
    model = replayed(pipe.model, rows, height // pipe.downscale, width // pipe.downscale, cond, compiled, record, tell)
    record = record or _recorder(pipe.device, compiled)
    if record is None:
        return pipe
    try:
        with compiling(f"the VAE for {images} x {height} x {width} images", tell) if compiled else nullcontext():
            vae: Any = ReplayedVae(pipe.vae, height, width, pipe.downscale, compiled, record, images)
    except RuntimeError as error:
        _warn("VAE", error, tell)
        vae = pipe.vae
    return dataclasses.replace(pipe, model=model, vae=vae)


def accelerated(
    pipe: Pipeline, acceleration: str, rows: int, height: int, width: int, cond: Conditioning, images: int = 1, lanes: int = 1,
    record: Record | None = None, tell: Tell = nobody,
) -> tuple[Pipeline, list[NetworkDenoiser]]:  # fmt: skip
    """Return `pipe` as `acceleration` says ("none", "graph", "compile": compiled, then recorded), and a model for each lane.

    See `replayed_pipeline`. The lanes share their weights; each has the memory of a pass of its own, which the log names.
    """
    check_choice("acceleration", acceleration, ACCELERATIONS)
    if acceleration == "none":
        return pipe, [pipe.model] * lanes
    before, compiled = reserved_bytes(pipe.device), acceleration == "compile"
    fast = replayed_pipeline(pipe, rows, height, width, cond, compiled, record, images, tell)
    more = [_again(fast.model, record) for _ in range(lanes - 1)]
    if pipe.device.type == "cuda":
        text = recorded_text(lanes, rows, reserved_bytes(pipe.device) - before)
        log.info(text)
        tell(text)
    return fast, [fast.model, *more]


def _again(model: NetworkDenoiser, record: Record | None) -> NetworkDenoiser:
    if not isinstance(model.network, ReplayedUnet):
        return model
    other = copy.copy(model)
    other.network = model.network.again(record or (record_cuda if model.device.type == "cuda" else record_again))
    return other


def reserved_bytes(device: torch.device) -> int:
    """Return the bytes that torch holds of a CUDA device, 0 for others."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0  # none before CUDA is used


def _recorder(device: torch.device, compiled: bool) -> Record | None:
    """Return what records on a device; None, said once, where nothing can."""
    if compiled and device.type != "cuda":
        return record_again
    return record_cuda if _has_cuda(device) else None


def _has_cuda(device: torch.device) -> bool:
    if device.type != "cuda":
        _say_once(f"CUDA graphs need a CUDA device: the network runs eagerly on {device}.")
    return device.type == "cuda"


def _warn(what: str, error: RuntimeError, tell: Tell) -> None:
    text = f"The {what} could not be recorded and runs eagerly: {str(error).splitlines()[0]}"
    log.warning(text)
    tell(text)


def recorded_text(lanes: int, rows: int, taken: int) -> str:
    """Return a sentence on recordings and the device memory in bytes that they take."""
    return (
        f"Recordings for {lanes} lane{'s' * (lanes > 1)} of {rows} row{'s' * (rows > 1)} take {taken / 2**30:.2f} GB."
    )


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)
