"""Operators of one pass of a stream, before and after `core.fused` and `core.codec`: what costs launches on a GPU.

    python benchmarks/stream_ops.py             # also the full widths, without values (meta device)
    python benchmarks/stream_ops.py --check     # networks with the blocks of SD-Turbo and SDXL-Turbo and few channels; TAESD

"operators" are the aten operators that torch dispatches in inference mode, as a stream runs; "kernels" are those of them that compute
or copy (no views, no dropout, no cast to the same type). Levels and prompts stay as they are, as in a steady stream. The numbers of both
forms are compared where there are any. On the meta device attention gives its result in a layout that a GPU's does not, which counts as
one copy more for each in both columns.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from _common import ROOT  # noqa: F401  makes `slipstream` importable from a checkout
from slipstream.core.codec import Codec, TinyCodec
from slipstream.core.fused import FusedUnet, Prepared, read_diffusers
from stream_gpu import SD, SDXL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = (
    "view transpose permute reshape unsqueeze squeeze slice select expand chunk split split_with_sizes unbind unflatten flatten t alias "
    "detach movedim narrow as_strided dropout to _unsafe_view lift_fresh contiguous"
).split()


class Count(TorchDispatchMode):
    """Counts operators by name; `kernels` leaves out what only changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        self.found[name] += 1
        if name in ("contiguous", "reshape", "to", "flatten") and isinstance(args[0], Tensor):
            self.copies += result.dtype != args[0].dtype or not _same_memory(result, args[0])
        return result

    @property
    def operators(self) -> int:
        return sum(self.found.values())

    @property
    def kernels(self) -> int:
        return sum(n for name, n in self.found.items() if name not in VIEWS) + self.copies


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


@dataclass(frozen=True)
class Row:
    """Operators and kernels of one part before and after, and the largest relative difference of the numbers (None without values)."""

    name: str
    operators: tuple[int, int]
    kernels: tuple[int, int]
    difference: float | None

    def text(self) -> str:
        parts = [
            f"{kind} {before} -> {after} ({after / before - 1:+.0%})"
            for kind, (before, after) in (("operators", self.operators), ("kernels", self.kernels))
        ]
        same = "" if self.difference is None else f", relative difference {self.difference:.1e}"
        return f"{self.name:22} {', '.join(parts)}{same}"


def counted(run: Callable[[], Tensor]) -> tuple[Tensor, Count]:
    with torch.inference_mode(), Count() as count:
        return run(), count


def compare(name: str, before: Callable[[], Tensor], after: Callable[[], Tensor]) -> Row:
    (old, first), (new, second) = counted(before), counted(after)
    difference = None if old.is_meta else float((new - old).abs().max() / old.abs().max())
    return Row(name, (first.operators, second.operators), (first.kernels, second.kernels), difference)


# The blocks of the published networks with few channels: as many operators, and numbers to compare.
NARROW: dict[str, dict[str, Any]] = {
    "SD-Turbo": {**SD, "block_out_channels": (32, 64, 64, 64), "attention_head_dim": (1, 2, 2, 2), "cross_attention_dim": 64},
    "SDXL-Turbo": {
        **SDXL, "block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2), "cross_attention_dim": 64,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
}  # fmt: skip


def unet_row(name: str, config: dict[str, Any], device: str, rows: int = 1) -> Row:
    """Compare a UNet's own call with that of its `FusedUnet`, bound."""
    from diffusers import UNet2DConditionModel

    side = 16 if device == "cpu" else 64
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**config).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        x = torch.randn(rows, 4, side, side).to(memory_format=torch.channels_last)
        time, context = torch.full((rows,), 299.0), torch.randn(rows, 77, config.get("cross_attention_dim", 1280))
        added = {"text_embeds": torch.randn(rows, 1280), "time_ids": torch.full((rows, 6), 512.0)}
    condition: dict[str, Any] = {"encoder_hidden_states": context}
    if config.get("addition_embed_type"):
        condition["added_cond_kwargs"] = added
    fused = FusedUnet(read_diffusers(unet))
    with torch.inference_mode():
        tensors = Prepared(fused, time, **condition).tensors()
    label = f"{name}, {rows} row{'s' * (rows > 1)}"
    return compare(label, lambda: unet(x, time, **condition, return_dict=False)[0], lambda: fused(x, *tensors))


def vae_rows(name: str, config: dict[str, Any], device: str) -> list[Row]:
    """Compare both ways of a TAESD, from bytes and to bytes."""
    from diffusers import AutoencoderTiny

    side = 64 if device == "cpu" else 512
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderTiny(**config).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        pixels = torch.rand(1, side, side, 3).movedim(-1, 1)
        latents = torch.randn(1, 4, side // 8, side // 8).to(memory_format=torch.channels_last)
    plain, tiny = Codec(vae), TinyCodec(vae)
    return [
        compare(f"{name} encode", lambda: plain.encode(pixels), lambda: tiny.encode(pixels)),
        compare(f"{name} decode", lambda: plain.decode(latents), lambda: tiny.decode(latents)),
    ]


def total(name: str, rows: list[Row]) -> Row:
    sums = [tuple(sum(getattr(row, kind)[i] for row in rows) for i in (0, 1)) for kind in ("operators", "kernels")]
    return Row(name, sums[0], sums[1], None)  # type: ignore[arg-type]


def measure(check: bool) -> list[Row]:
    narrow = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    taesd = vae_rows("TAESD", narrow, "cpu")
    found = []
    for name, config in NARROW.items():
        unet = unet_row(name, config, "cpu", 2)
        found += [unet, total(f"{name} + TAESD", [unet, *taesd])]
    if not check:
        full = {"SD-Turbo, full width": SD, "SDXL-Turbo, full width": SDXL}
        found += [unet_row(name, config, "meta", rows) for name, config in full.items() for rows in (1, 4)]
    return found + taesd


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="tiny networks only")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    rows = measure(args.check)
    print("\n".join(row.text() for row in rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.difference is not None and row.difference > 1e-5 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
