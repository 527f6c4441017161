"""What needs weights where they are used, in hosts that bring them layer by layer (dynamic VRAM); runs inside the host's Python.

    COMFYUI_PATH=... PYTHON_OF_THE_HOST tests/host/vram_checks.py

That memory management needs an NVIDIA card. Here a MODEL stands in for one of it: it says that it is dynamic, offers another that the host
loads as a whole, and must not be loaded itself. One JSON line for each check.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import fault_checks as checks  # isort: skip  # makes the host and the pack importable
import comfy.model_patcher
import comfy.sd
import comfy.taesd.taesd
import torch
from slipstream.nodes import stream
from slipstream.nodes.host.vae import FrameVae, _copy_on
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
    copied.network = _copy_on(host, cpu)
    samples = own.encode(images), copied.encode(images)
    decoded = own.decode(samples[0]), copied.decode(samples[0]).get()
    return {
        "copied": own.network is None and copied.network is not None,
        "latents": float((samples[0] - samples[1]).abs().max() / samples[0].abs().max()),
        "bytes": int((decoded[0].int() - decoded[1].int()).abs().max()),
        "spread": float(decoded[0].float().std()),
        "shape": list(samples[1].shape),
    }


if __name__ == "__main__":
    with torch.inference_mode():
        for check in (check_tiny_vae, check_recordable, check_edit):
            sys.stdout.write(json.dumps({"check": check.__name__.removeprefix("check_"), **check()}) + "\n")
    sys.exit(0)
