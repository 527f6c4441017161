"""The host's own UNet in its fused form, beside its own call; runs inside the host's Python and prints one JSON line for each check.

COMFYUI_PATH=... PYTHON_OF_THE_HOST tests/host/fused_checks.py
"""

from __future__ import annotations

import copy
import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import comfy.patcher_extension as extension
import family_checks  # noqa: F401  makes the host and slipstream importable
import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from slipstream.core.graphs import record_again
from slipstream.core.transfer import to_device
from slipstream.nodes.host import fused as fused_module
from slipstream.nodes.host.fused import FusedNetwork, unknown_part
from slipstream_tests.fake_cuda import DEVICE, fake_cuda
from tiny_models import randomise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SD = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2], "channel_mult": [1, 2],
    "transformer_depth": [1, 1, 1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "num_heads": -1, "num_head_channels": 32, "use_spatial_transformer": True, "context_dim": 24, "legacy": False, "dtype": torch.float32,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "sd": {}, "sd2": {"use_linear_in_transformer": True},
    "sdxl": {"use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 20, "transformer_depth": [0, 0, 2, 2],
             "transformer_depth_output": [0, 0, 0, 2, 2, 2], "transformer_depth_middle": 2},
}  # fmt: skip


class Count(TorchDispatchMode):
    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Count.found += 1
        return func(*args, **(kwargs or {}))


def made(kind: str) -> tuple[Any, dict[str, Any]]:
    """Return a tiny network and its arguments."""
    config = copy.deepcopy({**SD, **KINDS[kind]})  # the host empties the lists
    with torch.inference_mode(False):
        network = UNetModel(**config).eval().requires_grad_(False)
        randomise(network)
    torch.manual_seed(0)
    given: dict[str, Any] = {"timesteps": torch.tensor([900.0, 300.0]), "context": torch.randn(2, 7, 24)}
    if "adm_in_channels" in config:
        given["y"] = torch.randn(2, 20)
    return network, given


def options(fused: FusedNetwork | None, **more: Any) -> dict[str, Any]:
    """Return transformer_options with the wrapper of ours, as a sampling has them."""
    found: dict[str, Any] = {**more}
    if fused is not None:
        extension.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "slipstream", fused, found)
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def check_numbers(kind: str) -> dict[str, Any]:
    network, given = made(kind)
    fused = FusedNetwork(network)
    sigma, items = torch.tensor([5.0, 1.0]), [(SimpleNamespace(), 0), (SimpleNamespace(), 1)]
    worst, counts = 0.0, []
    for side in ((8, 8), (7, 9)):
        x = torch.randn(2, 4, *side)
        for _ in range(2):
            with fused.bound(sigma, items), Count():
                Count.found = 0
                got = network(x, **given, transformer_options=options(fused))
                counts.append(Count.found)
        with Count():
            Count.found = 0
            plain = network(x, **given, transformer_options={})
        worst = max(worst, difference(got, plain))
    return {"difference": worst, "refusal": fused.refusal, "calls": fused.calls, "share": counts[-1] / Count.found}


def check_weights(kind: str) -> dict[str, Any]:
    """A LoRA of the host puts new parameters into the layers; another one writes into them."""
    network, given = made(kind)
    fused, x = FusedNetwork(network), torch.randn(2, 4, 8, 8)
    sigma, items = torch.tensor([5.0, 1.0]), [(SimpleNamespace(), 0), (SimpleNamespace(), 1)]

    def both() -> tuple[Tensor, Tensor]:
        with fused.bound(sigma, items):
            return network(x, **given, transformer_options=options(fused)), network(x, **given, transformer_options={})

    found, before = [difference(*both())], both()[1]
    names = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "emb_layers.1", "in_layers.2", "time_embed.2", "out.2")
    for name in names:
        layer = next(m for path, m in network.named_modules() if path.endswith(name))
        with torch.inference_mode(False), torch.no_grad():
            layer.weight = torch.nn.Parameter(-1.2 * layer.weight, requires_grad=False)
        found.append(difference(*both()))
        with torch.inference_mode(False), torch.no_grad():
            layer.weight.mul_(0.7)
        found.append(difference(*both()))
    return {"difference": max(found), "changed": difference(both()[1], before), "calls": fused.calls}


def check_patches(kind: str) -> dict[str, Any]:
    """What works inside the network acts as without us; a ControlNet is added, and hooks and replaced calls are seen."""
    network, given = made(kind)
    fused, x = FusedNetwork(network), torch.randn(2, 4, 8, 8)
    plain = network(x, **given, transformer_options={})

    def scaled(q: Tensor, k: Tensor, v: Tensor, extra: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, 1.5 * v

    def replaced(q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        return torch.tanh(q)

    def skips(h: Tensor, hsp: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        return 1.2 * h, 0.8 * hsp

    block = next(i for i, m in enumerate(network.input_blocks) if len(m) > 1)
    cases: dict[str, dict[str, Any]] = {
        "attn2_patch": {"patches": {"attn2_patch": [scaled]}}, "attn1_patch": {"patches": {"attn1_patch": [scaled]}},
        "output_block_patch": {"patches": {"output_block_patch": [skips]}},
        "attn2_replace": {"patches_replace": {"attn2": {("input", block, 0): replaced, ("input", block): replaced}}},
    }  # fmt: skip
    if kind == "sdxl":
        cases.pop("attn2_replace")  # the first block with attention comes later
    found = {}
    for name, more in cases.items():
        got, wanted = (network(x, **given, transformer_options=options(f, **more)) for f in (fused, None))
        found[name] = [difference(got, wanted), difference(wanted, plain)]
    calls = fused.calls

    def control() -> dict[str, list[Any]]:
        torch.manual_seed(3)
        shapes: list[Tensor] = []
        h, hs = x, []
        for module in network.input_blocks:
            h = module(h, network.time_embed(torch.zeros(2, 32)), given["context"], {})
            hs.append(0.1 * torch.randn(h.shape))
        return {"input": [], "middle": [0.1 * torch.randn(h.shape)], "output": hs, "shapes": shapes}

    got, wanted = (network(x, **given, control=control(), transformer_options=options(f)) for f in (fused, None))
    found["control"] = [difference(got, wanted), difference(wanted, plain)]
    seen: list[Any] = []
    handle = network.middle_block[1].register_forward_hook(lambda *call: seen.append(call))
    network(x, **given, transformer_options=options(fused))
    handle.remove()
    return {"found": found, "fused": fused.calls - calls, "hooks": len(seen)}


def check_recording(kind: str) -> dict[str, Any]:
    network, given = made(kind)
    replays, recorded = list[int](), list[int]()

    def record(run: Any) -> Any:
        recorded.append(1)
        replay, output = record_again(run)
        return (lambda: (replays.append(1), replay())), output

    told: list[str] = []
    fused = FusedNetwork(network, "graph", 3, told.append, record)
    worst = 0.0
    for rows in (2, 1, 2):
        x, some = torch.randn(rows, 4, 8, 8), {name: t[:rows] for name, t in given.items()}
        got = network(x, **some, transformer_options=options(fused))
        worst = max(worst, difference(got, network(x, **some, transformer_options={})))
    cpu: list[str] = []
    eager = FusedNetwork(network, "graph", 2, cpu.append)
    x = torch.randn(2, 4, 8, 8)
    worst = max(
        worst,
        difference(
            network(x, **given, transformer_options=options(eager)), network(x, **given, transformer_options={})
        ),
    )
    layer = next(m for path, m in network.named_modules() if path.endswith("attn1.to_q"))
    with torch.inference_mode(False), torch.no_grad():
        layer.weight = torch.nn.Parameter(-1.2 * layer.weight, requires_grad=False)  # a LoRA, between two runs
    plain = network(x, **given, transformer_options={})
    after = FusedNetwork(network, "graph", 2, told.append, record)
    for _ in range(2):
        worst = max(worst, difference(network(x, **given, transformer_options=options(after)), plain))
    before = len(replays)
    patched = options(fused, patches={"attn2_output_patch": [lambda n, extra: n]})
    network(x, **given, transformer_options=patched)
    counts = {"replays": before, "after": len(replays) - before}
    moved, made_of = FusedNetwork(network, "graph", 2, told.append, record), []
    for for_good in (None, False, True):  # the host has moved its weights; it does so at each call
        if for_good is not None:
            moved.forget(for_good)
        worst = max(worst, difference(network(x, **given, transformer_options=options(moved)), plain))
        made_of.append((len(recorded), len(replays)))
    return {"difference": worst, **counts, "forgotten": made_of, "told": told, "cpu": cpu}


def check_lanes(kind: str) -> dict[str, Any]:
    """Two lanes on the fake CUDA device: each records for itself and none waits; recorded again for other rows and prompts."""
    network, given = made(kind)
    made_of: list[int] = []

    def record(run: Any) -> Any:
        made_of.append(1)
        output = run()
        return lambda: output.copy_(run()), output

    def call(where: FusedNetwork | None, x: Tensor, some: dict[str, Tensor]) -> Tensor:
        return network(x, **some, transformer_options=options(where))

    tokens = {**given, "context": torch.randn(2, 9, 24)}  # a longer prompt
    steps = [(1, given), (1, given), (2, given), (2, given), (2, tokens), (2, tokens), (2, tokens), (1, tokens)]
    torch.manual_seed(5)
    inputs = [[torch.randn(rows, 4, 8, 8) for rows, _ in steps] for _ in range(2)]
    wanted = [
        [call(None, x, {n: t[: len(x)] for n, t in some.items()}) for x, (_, some) in zip(xs, steps)] for xs in inputs
    ]
    told: list[str] = []
    informed: list[str] = []
    counts, worst = [], 0.0
    with fake_cuda() as machine, patch.object(fused_module, "_plain", lambda layer: True):
        machine.put_module(network)
        first = FusedNetwork(network, "graph", 1, told.append, record, informed.append)
        lanes = [(first, torch.cuda.Stream()), (first.again(), torch.cuda.Stream())]
        for _, stream in lanes:
            stream.wait_stream(torch.cuda.current_stream())
        for i, (rows, some) in enumerate(steps):
            for n, (lane, stream) in enumerate(lanes):
                lane.rows = rows
                with torch.cuda.stream(stream):
                    x = to_device(inputs[n][i], DEVICE)
                    got = call(lane, x, {name: to_device(t[:rows], DEVICE) for name, t in some.items()})
                    worst = max(worst, difference(got.inner, wanted[n][i]))
            counts.append(len(made_of))
        apart = all(stream.clock[other] == 0 for _, stream in lanes for _, other in lanes if other is not stream)
        waits = machine.waits
    return {
        "difference": worst,
        "recorded": counts,
        "told": told,
        "informed": len(informed),
        "apart": apart,
        "waits": waits,
    }


def check_compiled(kind: str) -> dict[str, Any]:
    """torch reads the host's own layers as one piece; what it makes of them is left out, which takes minutes."""
    network, given = made(kind)
    pieces: list[int] = []

    def backend(module: Any, example: Any) -> Any:
        pieces.append(1)
        return module.forward

    true, told, informed = torch.compile, [], []
    x, worst = torch.randn(2, 4, 8, 8), 0.0
    compiled = lambda function, **more: true(function, backend=backend, fullgraph=True, **more)  # noqa: E731
    with patch.object(torch, "compile", compiled):
        fused = FusedNetwork(network, "compile", 2, told.append, inform=informed.append)
        for _ in range(2):
            got = network(x, **given, transformer_options=options(fused))
            worst = max(worst, difference(got, network(x, **given, transformer_options={})))
    return {"difference": worst, "told": told, "informed": informed, "pieces": len(pieces)}


def check_refusals(kind: str) -> dict[str, Any]:
    network, _ = made(kind)
    network._forward = lambda *a, **k: None
    first = unknown_part(network)
    other, _ = made(kind)
    other.middle_block[0].use_scale_shift_norm = True
    return {"replaced": first, "setting": unknown_part(other), "class": unknown_part(torch.nn.Linear(2, 2))}


CHECKS = {
    "sd": (check_numbers, check_weights, check_patches, check_recording, check_refusals, check_lanes, check_compiled),
    "sd2": (check_numbers,),
    "sdxl": (check_numbers, check_weights),
}  # fmt: skip

if __name__ == "__main__":
    attention.optimized_attention = attention.attention_pytorch  # as on a GPU; the CPU's way has operators of its own
    with torch.inference_mode():
        for kind, checks in CHECKS.items():
            for check in checks:
                sys.stdout.write(json.dumps({"kind": kind, "check": check.__name__, **check(kind)}) + "\n")
    sys.exit(0)
