"""Faults at every heavy point of every node that samples, on the bundled model; runs inside the host's Python.

    COMFYUI_PATH=... PYTHON_OF_THE_HOST tests/host/fault_checks.py [--faults=cancel,...] [--most=N] [node ...]

A heavy point is a call of the network, the VAE or the text encoder. At each of them in turn (`--most`: at N of each node, the first, the
last and others evenly between) cancel is pressed, memory runs out, or an error is raised. A fault is survived when the run ends with it
(after "out of memory" it may also end well) before another heavy point begins (LATE names what still may), the MODEL is as it was, no
thread is left, and the next run equals an undisturbed one. One JSON line for each node and fault.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import inside  # isort: skip  # before the host and the pack
import comfy.model_management
import comfy.samplers
import folder_paths
import slipstream.search
import torch
from slipstream.core.cache import INVERSIONS
from slipstream.core.cache import PROMPTS as EMBEDDINGS
from slipstream.core.images import encode_jpeg, read_image
from slipstream.core.reuse import ReuseSpan
from slipstream.core.tensors import image_to_bytes
from slipstream.cow import CowConfig
from slipstream.nodes import cow, edit, live, lmd, models, search, stream
from slipstream.search import LayerMask, Schedule, SearchConfig, compare
from slipstream.stream.live import wire
from slipstream.stream.live.session import STREAMS, LiveStream
from torch import Tensor, nn

CANCEL, MEMORY, ERROR = "cancel", "out of memory", "error"
SIZE, CELLS = 64, 16
LEVELS = (14.614647, 6.0, 3.0, 1.5, 0.7, 0.3, 0.0)


class InjectedError(RuntimeError):
    """The error that is raised in the network."""


class Points:
    """Counts heavy points and does `fault` at number `at`, counted from 1."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.count, self.at, self.fault = 0, 0, ""
        for module in modules:
            module.register_forward_pre_hook(self.passed)

    def arm(self, at: int, fault: str) -> None:
        self.count, self.at, self.fault = 0, at, fault

    def passed(self, *_: Any) -> None:
        self.count += 1
        if self.count != self.at:
            return
        if self.fault == CANCEL:
            comfy.model_management.interrupt_current_processing()
        elif self.fault == MEMORY:
            raise comfy.model_management.OOM_EXCEPTION("injected")
        elif self.fault == ERROR:
            raise InjectedError("injected")


MODEL, CLIP, VAE = models.LoadModel().load("pocket")[:3]
PROMPTS = [CLIP.encode_from_tokens_scheduled(CLIP.tokenize(text)) for text in ("a red circle", "")]
PHOTO = read_image(inside.ROOT / "assets" / "astronaut.jpg")[:, 100 : 100 + SIZE, 200 : 200 + SIZE, :3].contiguous()
LATENT = VAE.encode(PHOTO)
MASK = torch.zeros(1, SIZE, SIZE)
MASK[:, 16:40, 16:40] = 1


class Noise:
    seed = 3

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))


def sigmas(steps: int) -> Tensor:
    found: Tensor = comfy.samplers.calculate_sigmas(MODEL.get_model_object("model_sampling"), "normal", steps)
    return found


def cfg_guider(model: Any = MODEL, cfg: float = 2.0) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*PROMPTS)
    guider.set_cfg(cfg)
    return guider


def euler() -> Any:
    return comfy.samplers.sampler_object("euler")


def sampled(guider: Any, sampler: Any = None, steps: int = 3, levels: Tensor | None = None) -> Tensor:
    """As SamplerCustomAdvanced does it."""
    levels = sigmas(steps) if levels is None else levels

    def callback(*_: Any) -> None:  # the host's own progress bar asks at every step
        comfy.model_management.throw_exception_if_processing_interrupted()

    noise = Noise().generate_noise({"samples": LATENT})
    found: Tensor = guider.sample(
        noise, LATENT, sampler or euler(), levels, callback=callback, disable_pbar=True, seed=3
    )
    return found


def rcfg(kind: str) -> Callable[[], Any]:
    return lambda: sampled(stream.RCFGGuider().guide(MODEL, *PROMPTS, kind, 1.4, 0.5)[0])


def cow_sampler() -> Any:
    d, keep = CowConfig(), torch.zeros(1, CELLS, CELLS)
    keep[:, 2:5, 2:5] = 1
    sampler = cow.CowSampler().make(keep, 2, 1.0, d.low, d.high, "training time", 1.5, 1.0, 0.1, 1.0, 1.0)[0]
    return sampled(cfg_guider(), sampler, 6)


def stream_frames() -> Any:
    frames = PHOTO.expand(3, -1, -1, -1).contiguous()
    return stream.StreamFrames().stream(
        MODEL, *PROMPTS, VAE, frames, strength=0.7, steps=2, guidance="onetime", guidance_scale=1.4, seed=2
    )[0]


class LivePage:
    """A page of a live stream: sends the next frame when a result comes, and stops after three."""

    def __init__(self) -> None:
        self.results, self.reason = 0, ""

    def attach(self, opened: LiveStream) -> LiveStream:
        self.stream, self.member = opened, opened.join(self)
        self.send()
        return opened

    def send(self) -> None:
        head = wire.Head(wire.FRAME, self.results + 1, 0.0)
        self.stream.receive(self.member, wire.pack(head, encode_jpeg(image_to_bytes(PHOTO[0]))))

    def offer(self, message: bytes) -> None:
        self.results += 1
        if self.results < 3:
            self.send()
        else:
            self.stream.end("Stopped.")

    def tell(self, message: str) -> None:
        found = json.loads(message)
        self.reason = found["reason"] if found["type"] == "ended" else self.reason


def live_stream() -> Any:
    """Whatever ends it, the page is told why, and the stream is forgotten."""
    page, opened, said = (
        LivePage(),
        STREAMS.open,
        ("Stopped.", "Cancelled in ComfyUI.", "Out of memory.", "InjectedError: injected"),
    )
    with patch.object(STREAMS, "open", lambda found: page.attach(opened(found))):
        try:
            return live.LiveStreamNode().run(
                MODEL, VAE, *PROMPTS, prompt="a red ball", width=SIZE, height=SIZE, strength=0.7, steps=1, guidance="onetime",
                guidance_scale=1.4, seed=2, crossfade=0, feedback=0.0, similarity=1.0, keep=3, clip=CLIP, on_interrupt=stream.DISCARD,
            )[0]  # fmt: skip
        finally:
            assert page.reason.startswith(said), f"the page was told {page.reason!r}"
            assert STREAMS.find(page.stream.id) is None, "the stream is still there"


def masked_regenerate() -> Any:
    return lmd.MaskedRegenerate().regenerate(
        MODEL, *PROMPTS, {"samples": LATENT}, seed=4, steps=2, cfg=2.0, sampler_name="euler", schedule="uniform", rounds=2,
        strength=0.6, strength_end=0.0, kind="cosine", low=0.15, high=0.75, direction="decreasing", patch=2, nested=True,
        candidates=1,
    )[0]  # fmt: skip


def influence_profile() -> Any:
    other = {"samples": LATENT + 1}
    return lmd.InfluenceProfile().measure(
        Noise(), cfg_guider(), euler(), sigmas(3), {"samples": LATENT}, MASK, other
    )["result"][:3]  # fmt: skip


def invert(mode: str) -> Any:
    return edit.Invert().invert(MODEL, VAE, PHOTO, PROMPTS[0], 4, 1.0, "auto", mode)[0]


def edited(mode: str) -> Callable[[], Any]:
    def run() -> Any:
        tasks = edit.MoveObject().make(12.0, 0.0, 1.0, "object", MASK)
        tasks = (tasks["result"] if isinstance(tasks, dict) else tasks)[0]
        inversion = invert(mode)
        comfy.model_management.throw_exception_if_processing_interrupted()  # as the host between two nodes
        found = edit.EditSampler().edit(
            MODEL, VAE, inversion, tasks, *PROMPTS, seed=1, cfg=2.0, guidance=0.1, hold_object=0.7, hold_fill=0.4, noise=0.4,
            feather=4, low_memory=False,
        )  # fmt: skip
        return found["result"][:3]

    return run


def harmonise() -> Any:
    return edit.Harmonise().harmonise(MODEL, VAE, PHOTO, MASK, *PROMPTS, 1, 4, 2.0, 0.7, 0.4, 4, 1.0)["result"][:3]


def search_schedule() -> Any:
    """With a short run to compare with: its 50 steps are one place."""
    short = partial(SearchConfig, teacher_steps=4)
    with tempfile.TemporaryDirectory() as folder, patch.object(search, "SearchConfig", short):
        folder_paths.set_user_directory(folder)
        return search.SearchSchedule().search(
            cfg_guider(), euler(), {"samples": torch.zeros(1, 4, 8, 8)}, 2, 3, 0.0, search.PAIRED, 2, 0, "auto", False, 2
        )[1]  # fmt: skip


def compare_schedules() -> Any:
    objective = search.SelfObjective().make(VAE, search.PIXELS, "paired")[0]
    with patch.object(slipstream.search, "compare", partial(compare, teacher_steps=4)):
        return search.CompareSchedules().compare(
            cfg_guider(), euler(), {"samples": torch.zeros(1, 4, 8, 8)}, 1, 2, 1, search.PAIRED, 0, 2, sigmas=sigmas(2),
            custom_objective=objective,
        )[2]  # fmt: skip


def with_schedule(node: Any, **fields: Any) -> Callable[[], Any]:
    """Sample with a MODEL that a schedule has changed."""

    def run() -> Any:
        schedule = Schedule(LEVELS, {"name": "x"}, nfe=len(LEVELS) - 1, **fields)
        return sampled(cfg_guider(node().apply(MODEL, schedule)[0]), levels=torch.tensor(LEVELS))

    return run


def train_latent_fill() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.models_dir = folder
        images = PHOTO.expand(4, -1, -1, -1).contiguous()
        found = lmd.TrainLatentFill().train(
            MODEL, VAE, "a", "", 2, 2, 1e-3, "small", SIZE, SIZE, 4, "random", "mixed", False, False, 0, images
        )
        return dict(found["result"][0].state_dict())


NODES: dict[str, Callable[[], Any]] = {
    "RCFG Guider, self": rcfg("self"), "RCFG Guider, onetime": rcfg("onetime"), "RCFG Guider, full": rcfg("full"),
    "Cow Sampler": cow_sampler, "Stream Frames": stream_frames, "Live Stream": live_stream,
    "Masked Regenerate": masked_regenerate,
    "Influence Profile": influence_profile, "Edit, draft": edited("draft"), "Edit, fine, with Invert": edited("fine"),
    "Harmonise": harmonise, "Search Schedule": search_schedule, "Compare Schedules": compare_schedules,
    "Apply Layer Mask": with_schedule(search.ApplyLayerMask, masks=(LayerMask(3.0, 0.6, ("mid_block.resnets.0",)),)),
    "Apply Call Reuse": with_schedule(search.ApplyCallReuse, reuse=(ReuseSpan(3.0, 0.7),)),
    "Train Latent Fill": train_latent_fill,
}  # fmt: skip
LATE = {"Live Stream": 1}  # heavy points after cancel: the frame that is finished is decoded


def tensors(value: Any) -> list[Tensor]:
    """Return every tensor in what a node gave."""
    if isinstance(value, Tensor):
        return [value.detach().cpu().float()]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [t for each in value for t in tensors(each)] if isinstance(value, (list, tuple)) else []


def fresh(run: Callable[[], Any]) -> list[Tensor]:
    """Run with nothing kept from before."""
    INVERSIONS.clear()
    EMBEDDINGS.clear()
    gc.collect()  # the cache finds what anybody still holds
    with torch.inference_mode():
        return tensors(run())


def state() -> list[str]:
    """Return what a node might leave on the MODEL it was given."""
    names = ("model_options", "patches", "object_patches", "wrappers", "callbacks", "injections", "forced_hooks")
    return [repr(getattr(MODEL, name, None)) for name in names]


def near(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= tolerance) for a, b in zip(one, other)
    )


def survived(points: Points, run: Callable[[], Any], at: int, fault: str, expected: list[Tensor], allowed: int) -> str:
    """Return "" where a fault at a point is survived, else what went wrong."""
    before, threads = state(), threading.active_count()
    points.arm(at, fault)
    wanted = {
        CANCEL: comfy.model_management.InterruptProcessingException, MEMORY: comfy.model_management.OOM_EXCEPTION, ERROR: InjectedError,
    }[fault]  # fmt: skip
    try:
        found: list[Tensor] | None = fresh(run)
    except wanted:
        found = None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        late = points.count - at - allowed
        comfy.model_management.interrupt_current_processing(False)
        points.arm(0, "")
    if found is not None and fault == ERROR:
        return "the error was swallowed"
    if found is not None and fault == CANCEL and late > 0:
        return "cancel was ignored"
    if found is not None and not near(found, expected, 0.05):
        return "another result"
    if fault == CANCEL and late > 0:
        return f"{late} heavy points began after cancel"
    if state() != before:
        return "the MODEL was changed"
    if threading.active_count() > threads:
        return "a thread is left"
    return "" if near(fresh(run), expected, 0.0) else "the next run differs"


def option(name: str, default: str) -> str:
    return next((a.partition("=")[2] for a in inside.ARGUMENTS if a.startswith(f"--{name}=")), default)


def spread(count: int, most: int) -> list[int]:
    """Return `most` of the numbers 1 to `count`, the first and the last among them, evenly spaced."""
    most = min(most, count)
    return [1 + round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]


def main() -> None:
    faults = option("faults", ",".join((CANCEL, MEMORY, ERROR))).split(",")
    names = [a for a in inside.ARGUMENTS if not a.startswith("--")] or list(NODES)
    logging.disable()
    text = [m for name, m in CLIP.cond_stage_model.named_modules() if name.endswith(".transformer")]
    # The embedding of time stands for the network: hooks of the network itself are not called where its layers are tapped.
    points = Points(
        [
            MODEL.model.diffusion_model.time_embed,
            VAE.first_stage_model.vae.encoder,
            VAE.first_stage_model.vae.decoder,
            *text,
        ]
    )
    for name in names:
        run = NODES[name]
        expected = fresh(run)
        points.arm(0, "")
        assert near(fresh(run), expected, 0.0), f"{name} does not repeat"
        count = points.count
        for fault in faults:
            places = spread(count, int(option("most", str(count))))
            wrong = {
                at: said for at in places if (said := survived(points, run, at, fault, expected, LATE.get(name, 0)))
            }
            tried = len(places)
            line = {
                "node": name,
                "fault": fault,
                "points": count,
                "tried": tried,
                "survived": tried - len(wrong),
                "wrong": wrong,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
