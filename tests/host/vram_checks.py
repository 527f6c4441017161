"""What needs weights where they are used, in hosts that bring them layer by layer (dynamic VRAM); runs inside the host's Python.

    COMFYUI_PATH=... PYTHON_OF_THE_HOST tests/host/vram_checks.py

That memory management needs an NVIDIA card. Here a MODEL stands in for one of it: it says that it is dynamic, offers another that the host
loads as a whole, and must not be loaded itself. The host's own class, where it has one, is tried too, on the CPU, with a stand-in for its
native buffers. One JSON line for each check.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any
from unittest.mock import patch

import fault_checks as checks  # isort: skip  # makes the host and the pack importable
import comfy.model_patcher
import comfy.sd
import comfy.taesd.taesd
import torch
from slipstream.nodes import edit, live, stream
from slipstream.nodes.host import vae as vae_module
from slipstream.nodes.host.session import whole
from slipstream.nodes.host.vae import FrameVae, tiny_copy
from tiny_models import randomise

WHOLE = checks.MODEL


class Dynamic(comfy.model_patcher.ModelPatcher):
    """A MODEL of dynamic VRAM."""

    asked = 0

    def is_dynamic(self) -> bool:
        return True

    def get_non_dynamic_delegate(self) -> Any:
        Dynamic.asked += 1
        return WHOLE.clone()

    def load(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the dynamic MODEL was loaded")

    partially_load = load


class Unreadable(Dynamic):
    """One that the host cannot read again."""

    def get_non_dynamic_delegate(self) -> Any:
        raise RuntimeError("Cannot create non-dynamic delegate")


def of(kind: type[Dynamic]) -> Any:
    return kind(WHOLE.model, load_device=WHOLE.load_device, offload_device=WHOLE.offload_device)


def inverted(mode: str) -> Any:
    """Return an inversion of so many steps that some are guided."""
    return edit.Invert().invert(checks.MODEL, checks.VAE, checks.PHOTO, checks.PROMPTS[0], 10, 1.0, "auto", mode)[0]


def check_edit() -> dict[str, Any]:
    run = checks.edited("fine")
    checks.MODEL = WHOLE
    wanted = checks.fresh(run)
    checks.MODEL, Dynamic.asked = of(Dynamic), 0
    same = checks.near(checks.fresh(run), wanted, 1e-5)
    checks.MODEL = of(Unreadable)
    try:
        checks.fresh(run)
    except ValueError as error:
        return {"same": same, "asked": Dynamic.asked, "refused": str(error)}
    finally:
        checks.MODEL = WHOLE
    return {"same": same, "asked": Dynamic.asked, "refused": ""}


def check_recordable() -> dict[str, Any]:
    dynamic, Dynamic.asked = of(Dynamic), 0
    return {
        "as it is": stream.recordable(dynamic, "none") is dynamic,
        "asked": Dynamic.asked,
        "whole": type(stream.recordable(dynamic, "graph")) is type(WHOLE),
        "unreadable": type(stream.recordable(of(Unreadable), "graph")) is Unreadable,
        "plain": stream.recordable(WHOLE, "graph") is WHOLE,
    }


def check_tiny_vae() -> dict[str, Any]:
    """The copy of a stream gives what the host's own calls give."""
    with torch.inference_mode(False):
        network = comfy.taesd.taesd.TAESD()
        randomise(network)
        state = {**network.state_dict(), "vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.1)}
        host = comfy.sd.VAE(sd=state)
    images = torch.randint(0, 256, (2, 40, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    own, copied = FrameVae(host, cpu), FrameVae(host, cpu)
    copied.network = tiny_copy(host, cpu)
    samples = own.encode(images), copied.encode(images)
    decoded = own.decode(samples[0]), copied.decode(samples[0]).get()
    return {
        "copied": own.network is None and copied.network is not None,
        "latents": float((samples[0] - samples[1]).abs().max() / samples[0].abs().max()),
        "bytes": int((decoded[0].int() - decoded[1].int()).abs().max()),
        "spread": float(decoded[0].float().std()),
        "shape": list(samples[1].shape),
    }


class Buffer:
    """Stands in for a buffer of pinned memory."""

    size = 0

    def __init__(self, *_: Any) -> None: ...

    def truncate(self, *_: Any, **__: Any) -> None: ...


def check_host() -> dict[str, Any]:
    """A checkpoint that the host reads as dynamic: modes draft and fine, and a stream, equal those of the same checkpoint as a whole."""
    kind = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if kind is None:
        return {"known": False}
    import comfy_aimdo.host_buffer

    sys.path.insert(0, str(pathlib.Path(__file__).parent / "probe_pack"))
    import checkpoint_probe

    # Two levels that double their images: mode fine reads features of two.
    sizes = {"channel_mult": [1, 2, 2], "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 1]}
    checkpoint_probe.LAYERS.update(sizes, transformer_depth_output=[0, 0, 1, 1, 1, 1])
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(comfy_aimdo.host_buffer, "HostBuffer", Buffer),
        patch.object(kind, "__new__", staticmethod(lambda cls, *_, **__: object.__new__(cls))),  # on a CPU too
        patch.object(comfy.model_patcher, "CoreModelPatcher", kind),
    ):
        file = f"{folder}/tiny.safetensors"
        checkpoint_probe.TinyCheckpoint().run("SD15", file)
        model, clip, checks.VAE = comfy.sd.load_checkpoint_guess_config(file)[:3]
        checks.PROMPTS = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red circle", "")]
        found = {"known": True, "dynamic": model.is_dynamic(), "whole": not whole(model).is_dynamic()}
        for name, run in {"draft": checks.edited("draft"), "fine": checks.edited("fine"), "frames": frames}.items():
            checks.MODEL = model
            one = checks.fresh(run)
            checks.MODEL = whole(model)
            found[name] = checks.near(one, checks.fresh(run), 1e-4)
    return found


def check_live() -> dict[str, Any]:
    """A stream whose VAE may take the network's memory: each call of the host has the device for itself, and the images are the same."""
    wanted = checks.fresh(checks.live_stream)
    asked, told = list[float](), list[str]()
    without = patch.object(vae_module, "has_room", lambda patcher, memory=0.0: bool(asked.append(memory)))
    with without, patch.object(live.LiveRun, "_warn", lambda self, text: told.append(text)):
        same = checks.near(checks.fresh(checks.live_stream), wanted, 1e-5)
    return {"same": same, "calls": len(asked), "with memory": sum(n > 0 for n in asked), "told": told}


def frames() -> Any:
    clip = checks.PHOTO.expand(3, -1, -1, -1)
    return stream.StreamFrames().stream(checks.MODEL, *checks.PROMPTS, checks.VAE, clip, 0.5, 2, "self", 1.2, 3)


if __name__ == "__main__":
    checks.invert = inverted
    with torch.inference_mode():
        for check in (check_tiny_vae, check_recordable, check_edit, check_live, check_host):
            sys.stdout.write(json.dumps({"check": check.__name__.removeprefix("check_"), **check()}) + "\n")
    sys.exit(0)
