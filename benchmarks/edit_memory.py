"""Memory of an edit at SD1.5 and SDXL shapes: activations of the gradient pass and the attention bank, counted without weights.

    python benchmarks/edit_memory.py [--sizes 512 768 1024]

The network is built on the meta device, so that nothing is computed: what autograd would keep for the backward pass is counted as it
is saved (each storage once, weights left out), and the bank from the shapes of the keys and values it would store. Batch 1, fp16,
fused attention (no score matrix). With low_memory: the inputs of all blocks and the activations of the largest one.

Mode draft keeps no gradient and no bank. Its table counts every tensor that is alive when the network is called, beside a plain sampling
with cfg at the same size: what an edit adds to the peak, its image and masks included, whatever the network.

On a machine with CUDA the true peak and the time of one gradient are measured as well, with random weights.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import _common  # noqa: F401  makes `slipstream` importable from a checkout
import torch
from slipstream.core.attention import Attend
from slipstream.core.denoiser import FLOW, Conditioning
from slipstream.core.diffusers_model import DiffusersDenoiser
from slipstream.core.features import default_blocks, unet_features
from slipstream.core.guidance import CFG
from slipstream.core.samplers import sample
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.edit import Canvas, Move, edit, invert
from slipstream.edit.config import KEYS, EditConfig, steps_in
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.edit import small
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


class Watched(GaussianDenoiser):
    """A network without weights; `held` is the most bytes of tensors that were alive when it was called, `most` its most rows a call."""

    held = most = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        # By type, since isinstance would ask lazy modules of other libraries for their class.
        alive = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor
        }
        self.held, self.most = max(self.held, sum(alive.values())), max(self.most, len(x))
        return super().__call__(x, sigma, cond)


def draft_bytes(size: int) -> tuple[int, Watched]:
    """Return what a Move of an image of size x size holds beyond a plain sampling of its latents, and the network that was called."""
    config = EditConfig(steps=16, mode="draft", anchor_object=(0.0, 0.2), anchor_fill=(0.0, 0.2))
    conds = constant_cond(0.4), constant_cond(-0.2)
    plain, drafted = Watched(std=0.5, space=FLOW), Watched(std=0.5, space=FLOW)
    with torch.no_grad():
        sigmas = config.sigmas(plain.levels).float()
        start = torch.randn(1, 4, size // 8, size // 8)
        sample("euler", CFG(plain, *conds, config.cfg_scale), start, sigmas, FLOW)
        del start, sigmas
        image = torch.rand(1, size, size, 3)
        canvas = Canvas((size, size), (size // 8, size // 8), 8)
        mask = small.box(size // 8, size // 8, size // 3, size // 3, (size, size))
        photo = invert(drafted, small.encode(image), conds[0], config, canvas, image)
        edit(drafted, photo, Move(mask, size / 3, 0.0), *conds, config, encode=small.encode)
    return drafted.held - plain.held, drafted


def draft_table(sizes: list[int]) -> None:
    print("\n| image | mode draft holds beyond plain sampling, GiB | rows | rows a call |\n|---|---|---|---|")
    for size in sizes:
        more, network = draft_bytes(size)
        print(f"| {size} | {more / GIB:.3f} | {network.rows} | {network.most} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024])
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    print(
        "| model | image | activations GiB | with low_memory | bank, 16 steps | bank, 50 steps |"
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
    draft_table(args.sizes)


if __name__ == "__main__":
    main()
