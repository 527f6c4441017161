"""Every entry of the library takes tensors from any device and gives its results where its docstring says.

Run on every accelerator of this machine; where there is none, on a fake CUDA device (see `fake_cuda`), which raises as CUDA does
where tensors of two devices meet in one operation, and as others do for float64.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import slipstream
import torch
from slipstream.core import CFG, SAMPLERS, Conditioning, Pipeline, SeededNoise, make_sigmas, sample
from slipstream.core.guidance import RCFG, denoise_many
from slipstream.cow import CowConfig, generate
from slipstream.edit import Appearance, Drag, EditConfig, Move, Paste, edit, finish, fit, invert
from slipstream.lmd import (
    FillConfig,
    LatentFill,
    RegenerateConfig,
    TrainConfig,
    drag_field,
    influence,
    mask_schedule,
    optical_flow,
    regenerate,
    stretch_map,
    train,
)
from slipstream.search import Paired, SearchConfig, compare, search
from slipstream.search.features import LatentFeatures, PixelFeatures
from slipstream.search.objectives import ReferenceImages, SelfDistribution
from slipstream.search.paths import ModelPath
from slipstream.stream import SimilarityFilter, StreamBatch, StreamConfig
from slipstream.stream.queues import StreamThreads
from slipstream_tests.devices import CPU, Place, beside_the_cpu, small_denoiser, values
from slipstream_tests.fake_cuda import fake_cuda
from slipstream_tests.rounding import Rounding
from torch import Tensor

# What an entry gives: (tensor, where it must be): "cpu", "model" or the device of an input.
Found = dict[str, tuple[Tensor, Any]]


class Put:
    """Puts tensors on a device where `pattern`, from its start again and again, is true; and modules always."""

    def __init__(self, place: Place, pattern: list[bool]) -> None:
        self.place, self.turns = place, itertools.cycle(pattern)

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.place.put(tensor) if next(self.turns) else tensor


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(batch: int = 1, size: int = 64) -> Tensor:
    ramp = torch.linspace(0.1, 0.8, size).expand(batch, size, size).clone()
    ramp[:, 16:40, 16:40] = 0.95
    return torch.stack([ramp, ramp.flip(2), ramp.transpose(1, 2)], -1)


def box(low: int = 16, high: int = 40, size: int = 64) -> Tensor:
    mask = torch.zeros(1, size, size)
    mask[:, low:high, low:high] = 1
    return mask


def texts(pipe: Pipeline, put: Put, count: int = 2) -> list[Conditioning]:
    """Conditionings, each put by itself; random, as the text encoder is an entry of its own."""
    return [Conditioning(drawn(1, 7, 8, seed=50 + i)).map(put) for i in range(count)]


def encode_and_decode(pipe: Pipeline, put: Put) -> Found:
    picture = put(image(2))
    latents = pipe.encode_image(picture)
    there, counted = put(drawn(2, 4, 8, 8)), pipe.decode_async(put(drawn(1, 4, 8, 8)), torch.uint8)
    return {
        "latents": (latents, "model"), "bytes": (pipe.encode_image(put((image() * 255).byte())), "model"),
        "half": (pipe.encode_image(put(image().half())), "model"), "decoded": (pipe.decode(there), "cpu"),
        "of half": (pipe.decode(there.half()), "cpu"), "async": (counted.get().float(), "cpu"),
    }  # fmt: skip


def prompts(pipe: Pipeline, put: Put) -> Found:
    cond = pipe.encode_text(["a red circle", ""])
    return {"context": (cond.context, "model")}


def model_call(pipe: Pipeline, put: Put) -> Found:
    model = pipe.model
    x, sigma = put(drawn(2, 4, 8, 8)), put(torch.tensor([5.0, 1.0]))
    one, other = texts(pipe, put)
    many = denoise_many(model, x, sigma, [one, other])
    features = model.features(x, sigma, one)
    return {
        "denoised": (model(x, sigma, one), x.device), "many 0": (many[0], x.device), "many 1": (many[1], x.device),
        "one level": (CFG(model, one, other, 3.0)(x, put(torch.tensor(2.0))), x.device), "features": (features[0], "model"),
        "half": (model(put(drawn(1, 4, 8, 8).half()), put(torch.tensor([2.0])), one).float(), None),
    }  # fmt: skip


def samplers(pipe: Pipeline, put: Put) -> Found:
    one, other = texts(pipe, put)
    found: Found = {}
    for name in SAMPLERS:
        x = put(3 * drawn(1, 4, 8, 8))
        sigmas = put(torch.tensor([3.0, 1.0, 0.0]))
        found[name] = (
            sample(name, CFG(pipe.model, one, other, 2.0), x, sigmas, pipe.model.space, SeededNoise(1)),
            x.device,
        )
    latents, noise = put(drawn(1, 4, 8, 8)), put(drawn(1, 4, 8, 8, seed=1))
    space = pipe.model.space
    return {
        **found,
        "noised": (space.add_noise(latents, noise.to(latents.device), put(torch.tensor([2.0]))), latents.device),
    }


def cow(pipe: Pipeline, put: Put) -> Found:
    canvas, keep = put(drawn(1, 4, 8, 8)), put(box())
    cond, uncond, suppress, enhance = texts(pipe, put, 4)
    config = CowConfig(steps=5, cycles=1, cfg_scale=2.0)
    result = generate(pipe.model, canvas, keep, cond, uncond, config, SeededNoise(0))
    sigmas = put(make_sigmas("karras", pipe.model.levels, 6))
    more = generate(
        pipe.model,
        canvas,
        keep,
        cond,
        uncond,
        config,
        SeededNoise(0),
        sigmas=sigmas,
        suppress=suppress,
        enhance=enhance,
    )
    return {
        "latents": (result.latents, canvas.device), "cycle": (result.cycles[0], canvas.device),
        "repelled": (more.latents, canvas.device),
    }  # fmt: skip


def stream(pipe: Pipeline, put: Put) -> Found:
    found: Found = {}
    cond, uncond, own = texts(pipe, put, 3)
    for guidance in ("self", "onetime", "full"):
        batch = StreamBatch(pipe.model, cond, uncond, StreamConfig(strength=0.5, guidance=guidance, cfg_scale=1.5))
        frames = [
            f for i in range(3) for f in batch.push(put(drawn(1, 4, 8, 8, seed=i)), None, own if i == 1 else None)
        ]
        batch.update(cond=texts(pipe, put)[1])
        frames += batch.drain()
        found |= {f"{guidance} {i}": (frame.latents, "model") for i, frame in enumerate(frames)}
    chooser = SimilarityFilter()
    kept = [chooser.keep(put(image()[0])), chooser.keep(put(image()[0])), chooser.keep(put(image().flip(1)[0]))]
    return {**found, "kept": (torch.tensor(kept).float(), "cpu")}


def rcfg(pipe: Pipeline, put: Put) -> Found:
    cond, uncond = texts(pipe, put)
    sigmas = put(torch.tensor([3.0, 1.0, 0.0]))
    found: Found = {}
    for guidance in ("self", "onetime", "full"):
        reference, x = put(drawn(1, 4, 8, 8)), put(3 * drawn(1, 4, 8, 8, seed=1))
        guided = RCFG(pipe.model, cond, uncond, guidance, 1.5, 0.7, reference if guidance == "self" else None)
        found[guidance] = sample("euler", guided, x, sigmas, pipe.model.space), x.device
    return found


def threads(pipe: Pipeline, put: Put) -> Found:
    cond, uncond = texts(pipe, put)
    batch = StreamBatch(pipe.model, cond, uncond, StreamConfig(strength=0.5))
    got: list[Tensor] = []
    source = [(put(image()[0]), 0), (put(image().flip(1)[0]), 1)]
    running = StreamThreads(
        source, pipe.encode_image, batch, pipe.decode_async, lambda picture, *_: got.append(picture), live=False, queue=10,
        device=pipe.device,
    )  # fmt: skip
    for lane in running._lanes.values():
        lane.start()
    for thread in running._threads:
        running._run(*thread._args)  # type: ignore[attr-defined]
    running._threads.clear()  # one that has run lets go of what it ran
    if running.error is not None:
        raise running.error
    return {f"frame {i}": (picture, "cpu") for i, picture in enumerate(got)}


def edits(pipe: Pipeline, put: Put) -> Found:
    config = EditConfig(steps=3, mode="fine", anchor_object=(0.0, 0.3), anchor_fill=(0.0, 0.3), checkpoint=False)
    cond, uncond = texts(pipe, put)
    padded, canvas = fit(put(image()), pipe.downscale)
    inversion = invert(pipe.model, pipe.encode_image(padded), cond, config, canvas, put(image()))
    tasks = [
        Move(put(box()[0]), 8.0, 4.0),
        Paste(inversion, put(box()[0]), 30.0, 10.0, 0.8),
        Appearance(put(box(44, 60)[0]), inversion, put(box()[0])),
        Drag(put(box(8, 50)[0]), [((28.0, 28.0), (40.0, 30.0))]),
    ]
    found: Found = {"inverted": (inversion.latents, "cpu")}
    for task in tasks:
        picture = put(image())
        result = edit(pipe.model, inversion, task, cond, uncond, config, SeededNoise(1), encode=pipe.encode_image)
        name = type(task).__name__
        found[name] = result.latents, "cpu"
        found[f"{name} finished"] = finish(picture, result, pipe.decode), picture.device
    return found


def masks(pipe: Pipeline, put: Put) -> Found:
    latents = put(drawn(2, 4, 8, 8))
    cond, uncond = texts(pipe, put)
    config = RegenerateConfig(rounds=2, steps=2, cfg_scale=2.0, candidates=2)
    free = regenerate(pipe.model, latents, cond, uncond, config, SeededNoise(0))
    held = regenerate(
        pipe.model,
        latents,
        cond,
        uncond,
        config,
        SeededNoise(0),
        put(box()),
        put(torch.stack([box()[0], box(0, 32)[0]])),
    )
    half = put(drawn(1, 4, 8, 8).half())
    low = regenerate(pipe.model, half, cond, None, replace(config, candidates=1), SeededNoise(0))
    assert low.latents.dtype == torch.float16
    made = mask_schedule(3, height=8, width=8, region=put(box()))
    return {
        "free": (free.latents, latents.device), "errors": (free.errors, latents.device), "held": (held.latents, latents.device),
        "half": (low.latents.float(), half.device), "schedule": (made.masks, "cpu"),
    }  # fmt: skip


def fills(pipe: Pipeline, put: Put) -> Found:
    latents = put(drawn(3, 4, 8, 8))
    config = FillConfig(height=8, width=8, dim=16, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    trained = train(latents, config, TrainConfig(steps=2, batch=2), device=pipe.device)
    fill = LatentFill(config)
    if pipe.device == put.place.device:
        put.place.put_module(fill)
    there = put(drawn(2, 4, 8, 8))
    return {
        "filled": (fill.fill(there, put(box())), there.device),
        "trained": (trained.fill.fill(there, put(box())), there.device),
    }  # fmt: skip


def diagnostics(pipe: Pipeline, put: Put) -> Found:
    profile = influence(put(drawn(2, 1, 4, 8, 8)), put(drawn(2, 1, 4, 8, 8, seed=1)), put(box()[0]))
    wide = image(size=68).movedim(-1, 1)  # nothing enters the frame that was not there before: the flow has one answer
    first = put(wide[..., 2:66, 2:66])
    flow = optical_flow(first, put(wide[..., 2:66, 1:65]))
    field = put(drawn(1, 2, 8, 8))
    dragged = drag_field(put(torch.tensor([[4.0, 4.0]])), put(torch.tensor([[6.0, 5.0]])), 8, 8, 2.0)
    return {
        "influence": (profile.mean, "cpu"), "flow": (flow, first.device), "stretch": (stretch_map(field).stretch, field.device),
        "dragged": (dragged, "cpu"),
    }  # fmt: skip


class FewStock(ModelPath):
    """Two stock schedules beside the searched one instead of all: a fake device is slow, and each takes the same way."""

    def stock(self, steps: int) -> dict[str, Tensor]:
        return dict(itertools.islice(super().stock(steps).items(), 2))


def searches(pipe: Pipeline, put: Put) -> Found:
    cond, uncond = texts(pipe, put)
    path = FewStock(pipe.model, cond, uncond, (4, 8, 8), cfg_scale=2.0, batch=2)
    config = SearchConfig(steps=2, pairs=2, holdout_pairs=2, evaluations=2, teacher_steps=2, finalists=1)
    result = search(path, config)
    pixels, latent = PixelFeatures(pipe.decode), LatentFeatures(pipe.encode_image, (64, 64))
    reference = [put(image()[0]), put(image().flip(1)[0]), put(image().flip(2)[0])]
    objectives = [Paired(pixels), SelfDistribution(distance="mmd")]
    objectives += [ReferenceImages(reference, latent, "mmd")]
    schedules = {"a": put(torch.tensor([9.0, 2.0, 0.0])), "b": put(torch.tensor([14.0, 1.0, 0.0]))}
    compared = compare(path, schedules, objectives, pairs=2, repeats=1, teacher_steps=2)
    scores = [interval.mean for row in compared.rows for interval in row.scores.values()]
    return {"levels": (torch.tensor(result.schedule.levels), "cpu"), "scores": (torch.tensor(scores), "cpu")}


ENTRIES: tuple[Callable[[Pipeline, Put], Found], ...] = (
    encode_and_decode, prompts, model_call, samplers, cow, stream, rcfg, threads, edits, masks, fills, diagnostics, searches,
)  # fmt: skip


@pytest.fixture(scope="module")
def pocket() -> Pipeline:
    """The bundled text encoder and VAE with the smallest network that has every ability: a fake device is slow."""
    pipe = slipstream.load("pocket", device="cpu", dtype=torch.float32)
    return replace(pipe, model=small_denoiser())


@pytest.fixture(scope="module")
def expected() -> dict[Any, Found]:
    """What each entry gives with everything on the CPU, made when it is first asked for."""
    return {}


def moved(pipe: Pipeline, place: Place) -> Pipeline:
    """Return a copy of `pipe` with its networks on the device."""
    model = copy.copy(pipe.model)
    model.network, vae = (place.put_module(copy.deepcopy(network)) for network in (pipe.model.network, pipe.vae))
    text = [replace(t, encoder=place.put_module(copy.deepcopy(t.encoder))) for t in pipe.text]
    return replace(pipe, model=model, vae=vae, text=text, device=place.device, key=None)


# Whether the model is on the device, and which of its inputs, in turn. Each input is on the host in one, on the device in another.
WHERE = {
    "model on the device, inputs here and there": (True, [False, True]),
    "model on the device, inputs there and here": (True, [True, False]),
    "model on the host, inputs on the device": (False, [True]),
}
TOGETHER = {  # what most people do; too slow on the fake device, where it finds nothing more
    "model and inputs on the device": (True, [True]),
    "model on the device, inputs on the host": (True, [False]),
}


def cases() -> Iterator[Any]:
    for place in beside_the_cpu():
        for where, entry in itertools.product(WHERE if place.fake else {**WHERE, **TOGETHER}, ENTRIES):
            yield pytest.param(place, entry, where, id=f"{place}-{entry.__name__}-{where}")


@pytest.mark.parametrize(("place", "entry", "where"), cases())
def test_inputs_on_any_device(
    pocket: Pipeline, expected: dict[Any, Found], place: Place, entry: Any, where: str
) -> None:
    on_device, pattern = {**WHERE, **TOGETHER}[where]
    wanted = expected.get(entry) or expected.setdefault(entry, entry(pocket, Put(Place(CPU), [True])))
    with place.open():
        found = entry(moved(pocket, place) if on_device else pocket, Put(place, pattern))
        home = place.device if on_device else CPU
        for part, (tensor, at) in found.items():
            expected_at = {"cpu": CPU, "model": home, None: tensor.device}.get(at, at)
            assert tensor.device == expected_at, f"{part} is on {tensor.device}, not {expected_at}"
    for part, (tensor, _) in found.items():
        message = functools.partial("{}: {}".format, part)
        torch.testing.assert_close(values(tensor), wanted[part][0], atol=1e-3, rtol=1e-3, msg=message)


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_order_of_additions_changes_nothing(pocket: Pipeline, expected: dict[Any, Found], entry: Any) -> None:
    """A GPU rounds otherwise than the CPU: no entry may make more of that than it is."""
    wanted = expected.get(entry) or expected.setdefault(entry, entry(pocket, Put(Place(CPU), [True])))
    with Rounding(1e-7):
        found = entry(pocket, Put(Place(CPU), [True]))
    for part, (tensor, _) in found.items():
        message = functools.partial("{}: {}".format, part)
        torch.testing.assert_close(tensor, wanted[part][0], atol=1e-3, rtol=1e-3, msg=message)


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_entry_keeps_the_model(pocket: Pipeline, entry: Any) -> None:
    """A model that lives on in a cycle holds its memory, and its recordings, until garbage is collected."""
    pipe = replace(pocket, model=copy.copy(pocket.model))
    alive = weakref.ref(pipe.model)
    gc.collect()
    gc.disable()
    try:
        entry(pipe, Put(Place(CPU), [True]))
        del pipe
        assert alive() is None
    finally:
        gc.enable()


# -- the fake device refuses what CUDA refuses


@pytest.mark.parametrize(
    "mix",
    {
        "add": lambda there, here: there + here,
        "cat": lambda there, here: torch.cat([there, here]),
        "stack of single values": lambda there, here: torch.stack([there.sum(), here.sum()]),
        "where": lambda there, here: torch.where(here > 0, there, there),
        "in place": lambda there, here: here.add_(there),
        "lerp": lambda there, here: torch.lerp(there, there, here),
        "linear": lambda there, here: torch.nn.functional.linear(there, here),
        "numpy": lambda there, here: there.numpy(),
        "generator": lambda there, here: torch.randn(2, device=there.device, generator=torch.Generator()),
        "index_select": lambda there, here: there.index_select(0, torch.tensor([0])),
    }.items(),
    ids=lambda mix: mix[0],
)
def test_mixing_devices_is_noticed(mix: tuple[str, Callable[[Tensor, Tensor], Any]]) -> None:
    with fake_cuda(may_wait=True) as machine, pytest.raises((RuntimeError, TypeError)):
        mix[1](machine.put(torch.ones(2, 2)), torch.ones(2, 2))


def test_what_cuda_allows_is_allowed() -> None:
    with fake_cuda(may_wait=True) as machine:
        there, here = machine.put(torch.ones(2, 2)), torch.tensor(2.0)
        assert float((there * here + here / there).sum()) == 16
        assert there[torch.tensor([0])].shape == (1, 2)
        assert bool((there > 0).all())
        assert torch.equal(there.cpu(), torch.ones(2, 2))
        assert here.to(there.device).device == there.device
