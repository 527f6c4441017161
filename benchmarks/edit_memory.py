"""Memory of an edit at SD1.5 and SDXL shapes: activations of the gradient pass and the attention bank, counted without weights.

    python benchmarks/edit_memory.py [--sizes 512 768 1024]

The network is built on the meta device, so that nothing is computed: what autograd would keep for the backward pass is counted as it
is saved (each storage once, weights left out), and the bank from the shapes of the keys and values it would store. Batch 1, fp16,
fused attention (no score matrix). With low_memory: the inputs of all blocks and the activations of the largest one.

On a machine with CUDA the true peak and the time of one gradient are measured as well, with random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import _common  # noqa: F401  makes `slipstream` importable from a checkout
import torch
from slipstream.core.attention import Attend
from slipstream.core.diffusers_model import DiffusersDenoiser
from slipstream.core.features import default_blocks, unet_features
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.edit.config import KEYS, EditConfig, steps_in
from torch import Tensor

GIB = 1 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "SD1.5": {
        "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "SDXL": {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, "use_linear_projection": True,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


def make_unet(name: str, device: str) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, layers_per_block=2, **SHAPES[name])
    return unet.to(torch.float16).eval().requires_grad_(False)


def call(unet: Any, x: Tensor) -> Any:
    width = unet.config.cross_attention_dim
    condition = {"encoder_hidden_states": torch.zeros(1, 77, width, dtype=x.dtype, device=x.device)}
    if unet.config.addition_embed_type:
        condition["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, 1280, dtype=x.dtype, device=x.device),
            "time_ids": torch.zeros(1, 6, dtype=x.dtype, device=x.device),
        }
    return unet(x, torch.tensor([500.0], device=x.device), **condition)


class Flash(torch.autograd.Function):
    """Stands in for a fused attention kernel when counting: it keeps q, k, v and its output, never the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


@contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device PyTorch would choose the kernel that keeps the scores."""
    real = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **kwargs: Flash.apply(q, k, v)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = real


class Kept:
    """Bytes of the storages it is shown, each once; weights left out."""

    def __init__(self, unet: Any) -> None:
        self.sizes = {p.untyped_storage()._cdata: 0 for p in unet.parameters()}
        self.held: list[Any] = []

    def add(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.sizes.setdefault(value.untyped_storage()._cdata, value.untyped_storage().nbytes())
            self.held.append(value)  # or a later storage could get the same identity
        elif isinstance(value, (tuple, list)):
            for item in value:
                self.add(item)
        elif isinstance(value, dict):
            self.add(tuple(value.values()))
        return value

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def saved_bytes(unet: Any, cells: int, checkpoint: bool) -> tuple[int, int]:
    """Return the bytes kept for one gradient through the features, and by the largest block; with `checkpoint` the blocks' inputs."""
    kept, marks = Kept(unet), [0]
    x = torch.zeros(1, 4, cells, cells, dtype=torch.float16, device="meta", requires_grad=True)
    parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]

    def before(module: Any, args: Any, kwargs: Any) -> None:
        if checkpoint:
            kept.add((args, kwargs))
        marks.append(kept.bytes)

    handles = [part.register_forward_pre_hook(before, with_kwargs=True) for part in parts]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t if checkpoint else kept.add(t), lambda t: t)
    with fused_attention(), hooks, torch.enable_grad():
        unet_features(unet, lambda: call(unet, x), default_blocks(len(unet.up_blocks)), checkpoint)
    for handle in handles:
        handle.remove()
    marks.append(kept.bytes)
    return kept.bytes, max(after - start for start, after in zip(marks, marks[1:]))


def bank_bytes(unet: Any, cells: int, config: EditConfig) -> int:
    """Return the bytes of keys and values of all steps that an edit reads."""
    sizes: list[int] = []

    def hook(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        sizes.append(k.nbytes + v.nbytes)
        return attend(q, k, v)

    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    with model.self_attention(hook), torch.no_grad():
        call(unet, torch.zeros(1, 4, cells, cells, dtype=torch.float16, device="meta"))
    return sum(sizes) * len(steps_in(KEYS, config.steps))


def measured(name: str, cells: int, checkpoint: bool) -> str:
    """Return peak memory and time of one gradient on a GPU."""
    unet = make_unet(name, "cuda")
    x = torch.randn(1, 4, cells, cells, dtype=torch.float16, device="cuda", requires_grad=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.enable_grad():
            maps = unet_features(unet, lambda: call(unet, x), default_blocks(len(unet.up_blocks)), checkpoint)
            torch.autograd.grad(sum(m.float().square().mean() for m in maps), x)
        end.record()
        torch.cuda.synchronize()
    return f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB, {start.elapsed_time(end):.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024])
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    print(
        "| model | picture | activations GiB | with low_memory | bank, 16 steps | bank, 50 steps |"
        + (" GPU peak, time |" if on_gpu else "")
    )
    print("|---" * (7 if on_gpu else 6) + "|")
    for name in SHAPES:
        unet = make_unet(name, "meta")
        for size in args.sizes:
            cells = size // 8
            (whole, largest), (inputs, _) = saved_bytes(unet, cells, False), saved_bytes(unet, cells, True)
            figures = [whole, inputs + largest]
            figures += [bank_bytes(unet, cells, config) for config in (EditConfig.fast(), EditConfig())]
            line = " | ".join(f"{f / GIB:.2f}" for f in figures)
            print(
                f"| {name} | {size} | {line} |" + (f" {measured(name, cells, False)} |" if on_gpu else ""), flush=True
            )


if __name__ == "__main__":
    main()
