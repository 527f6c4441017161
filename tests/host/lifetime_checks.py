"""What is left of a run when it has ended, without a collection of garbage; runs inside the host's Python, one JSON line for each check.

COMFYUI_PATH=... PYTHON_OF_THE_HOST tests/host/lifetime_checks.py
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import family_checks as checks  # makes the host and slipstream importable
import tiny_models
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from slipstream.core.layers import LayerMask
from slipstream.core.reuse import ReuseSpan
from slipstream.nodes import stream
from slipstream.nodes.host.denoiser import HostDenoiser
from slipstream.nodes.host.layers import blocks_of, with_masks
from slipstream.nodes.host.reuse import with_reuse
from slipstream.nodes.host.session import Session
from slipstream.search import Schedule

KINDS = (ModelPatcher, CFGGuider, HostDenoiser, Session)


def streams(tiny: tiny_models.Tiny) -> None:
    """Frames that share their attention, and frames in lanes of recordings."""
    frames = torch.rand(4, 64, 64, 3, generator=torch.Generator().manual_seed(9))
    given = tiny.model, *tiny.prompts, checks.fake_vae(tiny), frames
    for more in ({"cross_frame": True}, {"acceleration": "compile", "priority": "2"}):
        with patch.object(torch, "compile", lambda function, **_: function):
            stream.StreamFrames().stream(
                *given, strength=0.7, steps=1, guidance="self", guidance_scale=1.4, seed=2, **more
            )


def masked(tiny: tiny_models.Tiny) -> None:
    """A MODEL with layer masks, sampled once and let go."""
    name = next(iter(blocks_of(tiny.model)))
    model = with_masks(tiny.model, [LayerMask(1e9, 0.0, (name,))])
    checks.sampled(
        checks.cfg_guider(tiny._replace(model=model), 2.0), checks.comfy.samplers.sampler_object("euler"), checks.sigmas_of(tiny, 3),
        torch.zeros(1, *tiny.shape), checks.noise(tiny),
    )  # fmt: skip


CHECKS = {name: check for name, check in checks.CHECKS.items() if name in checks.TECHNIQUES} | {
    "streams": streams,
    "layer masks": masked,
}


def left_by(run: Callable[[], Any]) -> list[str]:
    """Return the types of what `run` made, of `KINDS`, that lives on."""
    gc.collect()
    gc.freeze()  # what was there before
    gc.disable()
    try:
        run()
        return sorted(type(found).__name__ for found in gc.get_objects() if isinstance(found, KINDS))
    finally:
        gc.enable()
        gc.unfreeze()


def reusing(tiny: tiny_models.Tiny) -> tiny_models.Tiny:
    """Return it with a step cache on its MODEL, which some techniques leave out by a clone of their own."""
    sigmas = checks.sigmas_of(tiny, 4)
    spans = (ReuseSpan(float(sigmas[2]), float(sigmas[3]), "last"),)
    return tiny._replace(model=with_reuse(tiny.model, Schedule(tuple(sigmas.tolist()), {}, reuse=spans)))


def main() -> None:
    tiny = tiny_models.make("sd15")
    cached = reusing(tiny)
    checks.influence_profile(tiny)  # imports matplotlib, which catches errors meanwhile whose frames hold ours
    kept: list[Any] = []

    def keep() -> None:
        kept.append(kept)
        kept.append(tiny.model.clone())

    print(json.dumps({"check": "a clone in a cycle is seen", "left": left_by(keep)}), flush=True)
    kept.clear()
    for name, check in CHECKS.items():
        for kind, given in (("plain", tiny), ("step cache", cached)):
            said: list[str] = []
            left = left_by(lambda: said.append(checks.result(check, given)))  # noqa: B023
            print(json.dumps({"check": f"{name}, {kind}", "said": said[0], "left": left}), flush=True)


if __name__ == "__main__":
    main()
