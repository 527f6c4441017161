"""The host's own UNet (SD1.5, SD2, SDXL) in its fused form (`core.fused`), and recorded or compiled, for one sampling.

Nothing is put into the MODEL: a wrapper in the options of this sampling takes the place of the network's own call where nothing wants
to be a part of that. LoRA are weights, and count. ControlNets are added as the host does it. Where a patch works inside the network
(IP-Adapter, FreeU, attention patches), the host's own call runs.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.compiling import compiled_for, compiling, nobody
from ...core.fused import Attend, FusedUnet, Heads, Layer, Parts, Resample, Resnet, Size, Step, Transformer
from ...core.graphs import FIXED, Record, Replay, Tell, record_again, record_cuda, recorded_text, reserved_bytes
from ...core.taps import plain_type
from ...core.transfer import receive

KEPT = 32  # arrangements of levels and prompts whose times and texts are kept
# What the host gives a network beside latents, levels and prompts that changes nothing in a UNet of images.
IDLE = ("num_video_frames", "image_only_indicator", "time_context")
CONTAINERS = ("UNetModel", "ResBlock", "SpatialTransformer", "BasicTransformerBlock", "CrossAttention", "FeedForward")


class FusedNetwork:
    """A wrapper around the host's network for one sampling: its fused form where that can be, else the network as it is.

    Args:
        network: the host's `diffusion_model`, loaded.
        acceleration: "none", "graph" or "compile"; see `core.graphs.accelerated`.
        rows: most rows of a call.
        tell: gets a sentence when the acceleration has no effect, with the reason.
        inform: gets what is compiled and recorded meanwhile, and what memory that takes.
    """

    def __init__(
        self, network: Any, acceleration: str = "none", rows: int = 1, tell: Tell = nobody,
        record: Record | None = None, inform: Tell = nobody,
    ) -> None:  # fmt: skip
        self.network, self.acceleration, self.rows, self.tell, self.inform = network, acceleration, rows, tell, inform
        self.fused: FusedUnet | None = None
        self.refusal = unknown_part(network)
        self.calls = 0  # of the fused form
        self._record = record
        self._held: tuple[Tensor, Sequence[tuple[Any, int]]] | None = None
        self._known: OrderedDict[Any, tuple[int, Any, Tensor, Tensor]] = OrderedDict()
        self._replay: Replay | None = None
        self._shapes: tuple[Any, ...] = ()  # of the call before
        self._recorded = 0  # `rows` of what is recorded
        if not self.refusal:
            self.fused = FusedUnet(read_network(network))
        if acceleration != "none" and self._reason():
            self.forgo(self._reason())

    def forgo(self, reason: str) -> None:
        """Give up the acceleration and say why, once."""
        if self.acceleration != "none":
            self.acceleration, self._replay = "none", None
            self.tell(reason)

    def forget(self, for_good: bool = False) -> None:
        """Let go of the recording; `for_good` none is made again."""
        self._replay, self._shapes = None, ()
        if for_good:
            self.acceleration = "none"

    def again(self) -> FusedNetwork:
        """Return another one of the same network for a lane beside it: it shares weights and what is compiled, and records for itself."""
        other = copy.copy(self)
        other._known, other._replay = OrderedDict(), None
        return other

    def _reason(self) -> str:
        """Return why a network cannot be recorded or compiled, "" where it can."""
        if self.fused is None:
            return f"this kind of network is not known for it ({self.refusal})"
        if not self.fused.plain:
            return "the host keeps weights elsewhere and brings them for each layer (low memory, dynamic VRAM, or another number format)"
        if self.acceleration == "graph" and self._record is None and self._device.type != "cuda":
            return "CUDA graphs need a CUDA device. Choose compile, or none"
        return ""

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    @contextmanager
    def bound(self, sigma: Tensor, items: Sequence[tuple[Any, int]]) -> Iterator[None]:
        """Within the context a call of all rows has these levels, and its prompts are these rows (source, index)."""
        self._held = sigma, items
        try:
            yield
        finally:
            self._held = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fused is None:  # another kind of network, whose arguments are its own
            return executor(*args, **kwargs)
        return self._unet(executor, *args, **kwargs)

    def _unet(  # type: ignore[no-untyped-def]
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs  # noqa: B006
    ) -> Any:  # fmt: skip
        inside = self._inside(executor, context, transformer_options, kwargs)
        if inside:
            self.forgo(f"{inside} works inside the network")
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        assert self.fused is not None
        self.calls += 1
        times, texts = self._prepared(len(x), timesteps, context, y)
        if control is not None:
            self.forgo("a ControlNet adds to it")
            return self.fused(x, times, texts, None, functools.partial(add_control, control))
        return self._run({"sample": x, "times": times, "texts": texts})

    def _inside(self, executor: Any, context: Any, options: dict[str, Any], kwargs: dict[str, Any]) -> str:
        """Return what wants to be a part of the network's own call, "" for nothing."""
        for group in ("patches", "patches_replace"):
            found = next((name for name, patches in options.get(group, {}).items() if patches), None)
            if found is not None:
                return f"a patch (`{found}`)"
        if executor.idx + 1 < len(executor.wrappers):
            return "another wrapper"
        if "optimized_attention_override" in options or not isinstance(context, Tensor) or context.ndim != 3:
            return "another attention"
        unknown = next((name for name, value in kwargs.items() if name not in IDLE and value is not None), None)
        if unknown is not None:
            return f"`{unknown}`"
        return "" if self.fused is None or self.fused.intact else "a change of its layers"

    def _prepared(self, rows: int, timesteps: Tensor, context: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        fused, held = self.fused, self._held
        assert fused is not None
        fused.refresh()
        name = None
        if held is not None and len(held[1]) == rows:  # the host may split a call
            name = id(held[0]), tuple((id(source), index) for source, index in held[1])
        known = self._known.get(name)
        if known is not None and known[0] == fused.version:
            self._known.move_to_end(name)
            return known[2:]
        receive(fused.made, fused.joined)
        times, texts = fused.times(timesteps, context, y), fused.texts(context)
        if name is not None:
            self._known[name] = fused.version, held, times, texts  # `held` lives on, so that its ids stay its own
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return times, texts

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        replay = self._replay_for(inputs)
        return _call(self.fused, inputs) if replay is None else replay(inputs)

    def _replay_for(self, inputs: dict[str, Tensor]) -> Replay | None:
        """Return what is recorded for a call, None where there is nothing.

        Recorded again is what has other rows than `rows`, and for a call of all rows whose shapes come a second time.
        """
        if self.acceleration == "none":
            return None
        rows, before = len(inputs["sample"]), self._shapes
        self._shapes = tuple(tensor.shape for tensor in inputs.values())
        missing = self._replay is None or self._recorded != self.rows
        other = rows == self.rows and before == self._shapes and not (self._replay and self._replay.fits(inputs))
        if (missing and rows <= self.rows) or other:
            self._replay = None  # its memory first
            self._replay, self._recorded = self._record_now(inputs), self.rows
        return self._replay if self._replay is not None and self._replay.fits(inputs) else None

    def _record_now(self, inputs: dict[str, Tensor]) -> Replay | None:
        """Record the network for the shapes of `inputs` and `rows` rows."""
        compiled = self.acceleration == "compile"
        full = {
            name: torch.cat([t[:1].expand(max(self.rows - len(t), 0), *t.shape[1:]), t]) for name, t in inputs.items()
        }
        record = self._record or (record_cuda if self._device.type == "cuda" else record_again)
        what = f"the network for {len(full['sample'])} x {tuple(inputs['sample'].shape[2:])} latents"
        before = reserved_bytes(self._device)
        try:
            with compiling(what, self.inform) if compiled else nullcontext():
                owner = self.fused
                run = compiled_for(_call, owner, *full.values()) if compiled else functools.partial(_call, owner)
                found = Replay(run, full, record, FIXED)
        except RuntimeError as error:
            self.forgo(f"it failed: {str(error).splitlines()[0].rstrip('.')}")
            return None
        if self._device.type == "cuda":
            self.inform(recorded_text(1, len(full["sample"]), reserved_bytes(self._device) - before))
        return found


def _call(fused: Any, inputs: dict[str, Tensor]) -> Tensor:
    output: Tensor = fused(inputs["sample"], inputs["times"], inputs["texts"])
    return output


def add_control(control: dict[str, list[Any]], h: Tensor, place: str) -> Tensor:
    """Add a ControlNet's output of a place, as the host does; the host takes them from the end of its lists."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import apply_control

    found: Tensor = apply_control(h, control, place)
    return found


# -- reading the host's network


def unknown_part(network: Any) -> str:
    """Return the first part of a host's network that no rule here knows, "" where all are known."""
    if plain_type(network).__name__ != "UNetModel":
        return plain_type(network).__name__
    if {"forward", "_forward"} & vars(network).keys():
        return "a UNetModel whose call was replaced"
    if (
        network.predict_codebook_ids
        or network.middle_block is None
        or getattr(network, "heatmap_head", None) is not None
    ):
        return "a UNetModel with other outputs"
    for path, module in network.named_modules():
        kind = plain_type(module).__name__
        hooked = kind in CONTAINERS and (module._forward_hooks or module._forward_pre_hooks)
        if hooked or not RULES.get(kind, lambda m: True)(module):
            return f"{kind} at {path} with settings or hooks of its own"
    steps = [
        layer for block in (*network.input_blocks[1:], network.middle_block, *network.output_blocks) for layer in block
    ]
    return next((plain_type(s).__name__ for s in steps if plain_type(s).__name__ not in READERS), "")


def _usual_resnet(m: Any) -> bool:
    usual = (
        not (m.updown or m.use_scale_shift_norm or m.skip_t_emb or m.exchange_temb_dims) and m.emb_layers is not None
    )
    return usual and [type(part).__name__ for part in m.in_layers] == [type(m.in_layers[0]).__name__, "SiLU", "Conv2d"]


def _usual_layer(m: Any) -> bool:
    usual = (
        m.is_res and not m.ff_in and m.attn2 is not None and not m.disable_self_attn and not m.switch_temporal_ca_to_sa
    )
    return usual and [type(part).__name__ for part in m.ff.net] == ["GEGLU", "Dropout", "Linear"]


RULES: dict[str, Callable[[Any], bool]] = {
    "ResBlock": _usual_resnet, "BasicTransformerBlock": _usual_layer,
    "CrossAttention": lambda m: m.to_q.in_features == m.to_q.out_features and m.to_k.bias is None,
    "Upsample": lambda m: m.dims == 2 and m.use_conv, "Downsample": lambda m: m.dims == 2,
}  # fmt: skip


def read_network(network: Any) -> Parts:
    """Return the parts of the host's UNetModel; see `unknown_part`."""
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    resnets = [m for m in network.modules() if plain_type(m).__name__ == "ResBlock"]

    def embed(timesteps: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
        emb = network.time_embed(
            timestep_embedding(timesteps, network.model_channels, repeat_only=False).to(context.dtype)
        )
        return F.silu(emb if network.num_classes is None else emb + network.label_emb(y))

    def embedders() -> Iterator[tuple[Any, str]]:
        for root in (network.time_embed, getattr(network, "label_emb", None)):
            for owner in root.modules() if root is not None else ():
                yield from ((owner, name) for name, layer in owner._modules.items() if isinstance(layer, nn.Linear))

    return Parts(
        network.input_blocks[0][0], [_steps(block) for block in network.input_blocks[1:]], _steps(network.middle_block),
        [_steps(block) for block in network.output_blocks], network.out, embed,
        watched=[(r.emb_layers, "1") for r in resnets] + [(r.in_layers, "2") for r in resnets] + list(embedders()),
        bypassed=[m for m in network.modules() if plain_type(m).__name__ in CONTAINERS],
        same=lambda: not {"forward", "_forward"} & vars(network).keys(), plain=_plain,
    )  # fmt: skip


def _plain(layer: Any) -> bool:
    """Whether a layer of the host computes with its weight as it lies there."""
    functions = getattr(layer, "weight_function", ()) or getattr(layer, "bias_function", ())
    return (
        not getattr(layer, "comfy_cast_weights", False)
        and not functions
        and type(layer.weight) in (nn.Parameter, Tensor)
    )


def _steps(block: Sequence[Any]) -> list[Step]:
    return [READERS[plain_type(layer).__name__](layer) for layer in block]


def _resnet(m: Any) -> Resnet:
    shortcut = None if isinstance(m.skip_connection, nn.Identity) else m.skip_connection
    return Resnet(m.in_layers[0], m.in_layers[2], m.out_layers[0], m.out_layers[3], shortcut, m.emb_layers[1])


def _transformer(m: Any) -> Transformer:
    layers = [
        Layer(b.norm1, _heads(b.attn1), b.norm2, _heads(b.attn2), b.norm3, (b.ff.net[0], b.ff.net[2]))
        for b in m.transformer_blocks
    ]
    return Transformer(m.norm, m.proj_in, layers, m.proj_out, bool(m.use_linear))


def _heads(m: Any) -> Heads:
    return Heads(m, m.to_out[0], m.heads, _attend(m))


def _attend(m: Any) -> Attend:
    from comfy.ldm.modules import attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        # The host's choice of kernels, whatever it is.
        found: Tensor = attention.optimized_attention(
            q, k, v, m.heads, attn_precision=m.attn_precision, skip_reshape=True
        )
        return found

    return attend


def _down(m: Any) -> Resample:
    return Resample(lambda x, size: m(x))


def _up(m: Any) -> Resample:
    def call(x: Tensor, size: Size) -> Tensor:
        found: Tensor = m(x) if size is None else m(x, (*x.shape[:2], *size))
        return found

    return Resample(call)


READERS: dict[str, Callable[[Any], Step]] = {
    "ResBlock": _resnet, "SpatialTransformer": _transformer, "Downsample": _down, "Upsample": _up,
}  # fmt: skip
