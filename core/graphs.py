"""Static-shape replay: a model whose network is recorded once as a CUDA graph and replayed without launch overhead."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .denoiser import Conditioning
from .diffusers_model import DiffusersDenoiser

WARM_UP = 3  # runs before a recording: kernels are chosen, compiled and cached in them

log = logging.getLogger(__name__)
# run -> (replay, output): `replay` computes `run` anew on the same memory and leaves the result in `output`.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]


def record_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Record `run` as a CUDA graph; it must read its inputs from fixed memory and never wait for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


class ReplayedUnet:
    """A UNet recorded for one shape: fewer rows are padded, anything else (other shapes, gradients) runs eagerly."""

    def __init__(self, unet: Any, inputs: dict[str, Tensor], record: Record) -> None:
        self.unet, self.config = unet, unet.config
        self.inputs = {name: tensor.contiguous().clone() for name, tensor in inputs.items()}
        with torch.no_grad():
            self.replay, self.output = record(lambda: _run(unet, self.inputs))

    def parameters(self) -> Iterator[Tensor]:
        return self.unet.parameters()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"A replayed network has no `{name}`: use the model that it was recorded from.")

    def __call__(self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Any) -> tuple[Tensor]:
        inputs = _flat(sample, timestep, **cond)
        if not self._fits(inputs):
            return (_run(self.unet, inputs),)
        for name, tensor in inputs.items():
            self.inputs[name][: len(tensor)].copy_(tensor)
        self.replay()
        # The next replay overwrites the output.
        return (self.output[: len(sample)].clone(),)

    def _fits(self, inputs: dict[str, Tensor]) -> bool:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.values()):
            return False
        return inputs.keys() == self.inputs.keys() and all(
            len(tensor) <= len(self.inputs[name]) and tensor.shape[1:] == self.inputs[name].shape[1:]
            for name, tensor in inputs.items()
        )


def _flat(
    sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Any = None
) -> dict[str, Tensor]:
    """Return a UNet's arguments as one level of named tensors with one row per sample."""
    return {"sample": sample, "timestep": timestep, "context": encoder_hidden_states, **(added_cond_kwargs or {})}


def _run(unet: Any, inputs: dict[str, Tensor]) -> Tensor:
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    cond = {"added_cond_kwargs": added} if added else {}
    output: Tensor = unet(inputs["sample"], inputs["timestep"], inputs["context"], return_dict=False, **cond)[0]
    return output


def replayed(
    model: DiffusersDenoiser, rows: int, height: int, width: int, cond: Conditioning, compiled: bool = False,
    record: Record | None = None,
) -> DiffusersDenoiser:  # fmt: skip
    """Return `model` with its network recorded for up to `rows` latents of `height` x `width` and the shape of `cond`.

    `compiled` runs torch.compile first. Without CUDA the model itself is returned, which is said once in the log. Weights may
    change in place; after hooks, layer masks or attention have changed, record again. The result has its own counters.
    """
    if record is None and model.device.type != "cuda":
        _say_once(f"CUDA graphs need a CUDA device: the network runs eagerly on {model.device}.")
        return model
    fast = copy.copy(model)
    fast.calls = fast.rows = 0
    unet = torch.compile(model.unet, dynamic=False) if compiled else model.unet
    x = torch.zeros(rows, model.latent_channels, height, width, device=model.device, dtype=model.dtype)
    sigma = torch.full((rows,), model.sigma_max, device=model.device)
    inputs = _flat(x, model.network_time(sigma), **model.network_condition(cond.take([0]).expand(rows)))
    try:
        fast.unet = ReplayedUnet(unet, inputs, record or record_cuda)
    except RuntimeError as error:
        log.warning("The network could not be recorded and runs eagerly: %s", str(error).splitlines()[0])
        return model
    return fast


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)
