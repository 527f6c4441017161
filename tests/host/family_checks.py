"""What our techniques do on every family of models, by the host's own networks at a tiny size; runs inside the host's Python.

    COMFYUI_PATH=... PYTHON_OF_THE_HOST tests/host/family_checks.py [--table] [family ...]

prints one JSON line for each family and check: "yes", "refused: ..." or "WRONG ...". `--table` prints the README's table instead.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import inside  # isort: skip  # before the host and the pack
import comfy.sample
import comfy.samplers
import comfy.sd
import slipstream
import tiny_models
import torch
from comfy.patcher_extension import WrappersMP
from slipstream.core.reuse import ReuseSpan
from slipstream.core.schedules import SCHEDULES, make_sigmas, sigma_at, table_of
from slipstream.cow import CowConfig
from slipstream.nodes import cow, edit, lmd, stream
from slipstream.nodes.host.denoiser import levels_of
from slipstream.nodes.host.reuse import with_reuse
from slipstream.nodes.host.search_path import HostPath
from slipstream.nodes.host.session import Session, run_on_model
from slipstream.search import Schedule, SearchConfig, search
from slipstream.stream import StreamConfig
from slipstream.stream.config import stage_sigmas
from tiny_models import FAMILIES, NEWER, OLD, SAMPLINGS, Tiny
from torch import Tensor

# -- the host's sampling, as SamplerCustomAdvanced does it


def noise(tiny: Tiny, rows: int = 1, seed: int = 3) -> Tensor:
    return torch.randn(rows, *tiny.shape, generator=torch.Generator().manual_seed(seed))


def sigmas_of(tiny: Tiny, steps: int, scheduler: str = "normal") -> Tensor:
    return comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), scheduler, steps)


def cfg_guider(tiny: Tiny, cfg: float) -> Any:
    guider = comfy.samplers.CFGGuider(tiny.model)
    guider.set_conds(*tiny.prompts)
    guider.set_cfg(cfg)
    return guider


def sampled(guider: Any, sampler: Any, sigmas: Tensor, samples: Tensor, given: Tensor) -> Tensor:
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    out: Tensor = guider.sample(given, samples, sampler, sigmas, disable_pbar=True, seed=5)
    return out


def expect(ok: Any, what: str) -> None:
    if not bool(ok):
        raise AssertionError(what)


def near(one: Tensor, other: Tensor, what: str, tolerance: float = 1e-3) -> None:
    expect(torch.isfinite(one).all(), f"{what}: not finite")
    error = float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))
    expect(error < tolerance, f"{what}: differs by {error:.2g}")


# -- the checks; each raises AssertionError for a wrong result, and ValueError "Expected ..." where it refuses


def rows(tiny: Tiny, shape: tuple[int, ...] | None = None) -> None:
    """Two prompts at four levels in one call are four calls, and each is the host's own call."""
    tiny = tiny._replace(shape=shape or tiny.shape)
    table = tiny.model.get_model_object("model_sampling").sigmas
    sigma = table[[len(table) // 5, len(table) // 2, 2 * len(table) // 3, len(table) - 1]].float()
    order = [0, 1, 1, 0]

    def work(session: Session) -> None:
        model = session.denoiser
        x = model.space.add_noise(0.5 * noise(tiny, 4, 4), noise(tiny, 4), sigma)
        conds = [session.conds[name] for name in ("positive", "negative")]
        joined = conds[0].take([0]).join(conds[1].take([0])).take(order)
        together = model(x, sigma, joined)
        for i, source in enumerate(order):
            alone = model(x[i : i + 1], sigma[i : i + 1], joined.take([i]))
            near(together[i : i + 1], alone, f"row {i} of one call")
            entries = list(conds[source].items[0][0].entries)
            own = comfy.samplers.calc_cond_batch(
                model.model, [entries], x[i : i + 1], sigma[i : i + 1], model.model_options
            )
            near(alone, own[0], f"row {i} beside the host's own call", 1e-5)

    latent = {"samples": torch.zeros(1, *tiny.shape)}
    run_on_model(tiny.model, latent, work, rows=4, positive=tiny.prompts[0], negative=tiny.prompts[1])


def odd_size(tiny: Tiny) -> None:
    rows(tiny, (*tiny.shape[:-2], tiny.shape[-2] - 1, tiny.shape[-1] + 1))


def levels(tiny: Tiny) -> None:
    """One unit of level: 1000 training steps whatever the model counts, and defaults that give a step."""
    own = tiny.model.get_model_object("model_sampling")
    found = levels_of(own)
    steps = torch.arange(1, 999, 7)
    sigmas = found.t_to_sigma(steps)
    expect((sigmas[1:] >= sigmas[:-1]).all() and sigmas.isfinite().all() and (sigmas > 0).all(), "levels do not rise")
    distinct = sigmas[1:] > sigmas[:-1]
    near(found.sigma_to_t(sigmas)[1:][distinct], steps.float()[1:][distinct], "timestep of sigma of timestep", 0.03)
    near(found.t_to_sigma(torch.tensor(999.0)), own.sigma_max.float(), "the last training step", 2e-3)
    for fraction in (0.2, 0.5, 0.8):  # the host's own word for shares of the sampling
        share = torch.tensor(float(own.percent_to_sigma(1 - fraction)))
        near(torch.tensor(sigma_at(found, fraction)), share, f"share {fraction}", 0.02)
    table = table_of(found)
    expect((table[1:] >= table[:-1]).all() and float(table[-1]) <= float(own.sigma_max) * 1.001, "table")
    for name in SCHEDULES:
        made = make_sigmas(name, found, 4, 0.6)
        expect(
            (made[1:] < made[:-1]).all() and made.isfinite().all() and made[-1] == 0,
            f"schedule {name}: {made.tolist()}",
        )
    stages = [stage_sigmas(StreamConfig(strength=strength, steps=2), found) for strength in (0.1, 0.5, 1.0)]
    expect(all(a[0] < b[0] for a, b in zip(stages, stages[1:])), f"strengths of a stream: {stages}")
    low, high = (sigma_at(found, value) for value in (CowConfig().low, CowConfig().high))
    inside = sigmas_of(tiny, 20)
    expect(((inside > low) & (inside < high)).any(), f"no step of 20 between {low} and {high}: {inside.tolist()}")


def rcfg(tiny: Tiny) -> None:
    """full and none are the host's guider, with CFG++ too; self and onetime are finite."""
    latent, sigmas = torch.zeros(2, *tiny.shape), sigmas_of(tiny, 3)

    def ours(kind: str, scale: float, sampler: str, samples: Tensor = latent, delta: float = 0.5) -> Tensor:
        guider = stream.RCFGGuider().guide(tiny.model, *tiny.prompts, kind, scale, delta)[0]
        return sampled(guider, sampler, sigmas, samples, noise(tiny, 2))

    for kind, cfg, sampler in (("none", 1.0, "euler"), ("full", 2.0, "euler"), ("full", 2.0, "euler_cfg_pp")):
        host = sampled(cfg_guider(tiny, cfg), sampler, sigmas, latent, noise(tiny, 2))
        near(ours(kind, 2.0, sampler), host, f"{kind} with {sampler}")
    given = noise(tiny, 2, 11)
    for kind, sampler in (
        ("onetime", "euler"),
        ("onetime", "euler_cfg_pp"),
        ("self", "euler"),
        ("self", "euler_cfg_pp"),
    ):
        found = ours(kind, 1.4, sampler, given if kind == "self" else latent)
        expect(found.isfinite().all(), f"{kind} with {sampler}: not finite")
    expect(not torch.equal(ours("self", 1.4, "euler", given), ours("none", 1.4, "euler", given)), "self has no effect")


def stream_frames(tiny: Tiny) -> None:
    """A frame in a stream is the frame alone."""
    vae = fake_vae(tiny)
    size = vae.spacial_compression_encode()
    frames = torch.rand(
        3, tiny.shape[-2] * size - 3, tiny.shape[-1] * size, 3, generator=torch.Generator().manual_seed(9)
    )

    def run(part: Tensor) -> Tensor:
        found = stream.StreamFrames().stream(
            tiny.model, *tiny.prompts, vae, part, strength=0.7, steps=2, guidance="self", guidance_scale=1.4, seed=2
        )
        return found[0]

    together = run(frames)
    expect(together.shape == frames.shape, f"{tuple(frames.shape)} in, {tuple(together.shape)} out")
    expect(float(together.std()) > 1e-3, "the frames are flat")
    expect(torch.isfinite(together).all(), "not finite")
    for i in range(3):
        expect(
            (together[i : i + 1] - run(frames[i : i + 1])).abs().max() < 2e-3, f"frame {i} differs from itself alone"
        )


def edits(tiny: Tiny) -> None:
    """Every task of a draft changes what it is for; what lies outside is the photo to the bit."""
    vae, photo, mask = photo_of(tiny)
    height, width = photo.shape[1:3]
    inversion = edit.Invert().invert(tiny.model, vae, photo, tiny.prompts[0], 4, 0.0, "auto")[0]
    shift = width // 2 - width % 4
    point = [json.dumps([{"x": x, "y": height // 4}]) for x in (width // 4 - 2, width // 4 + 2)]
    target = mask.roll(shift, 2)
    tasks = {
        "move": edit.MoveObject().make(shift, 0, 1.0, "object", mask),
        "remove": edit.RemoveObject().make(mask),
        "paste": edit.PasteObject().make(inversion, shift, 0, 1.0, "object", mask),
        "appearance": edit.ChangeAppearance().make(inversion, target, mask),
        "drag": edit.DragPoints().make(*point, "warp", mask),
    }
    for name, (task,) in tasks.items():
        found = edit.EditSampler().edit(
            tiny.model, vae, inversion, task, *tiny.prompts, 3, 1.5, 0.0, 0.4, 0.4, 0.0, 0, False
        )["result"]
        changed = (found[0] - photo).abs().amax(-1)
        expect(
            found[0].shape == photo.shape and found[0].isfinite().all(),
            f"{name}: {tuple(found[0].shape)}, or not finite",
        )
        expect(changed[found[2] == 0].max() == 0, f"{name}: pixels outside changed")
        expect(changed[found[2] > 0].mean() > 1e-3, f"{name}: nothing changed")


def harmonised(tiny: Tiny) -> None:
    """What was pasted changes, and what lies outside of it and its seam is the photo to the bit."""
    vae, photo, mask = photo_of(tiny)
    found = edit.Harmonise().harmonise(tiny.model, vae, photo, mask, *tiny.prompts, 3, 4, 1.5, 0.3, 0.0, 4, 0.0)[
        "result"
    ]
    changed = (found[0] - photo).abs().amax(-1)
    expect(found[0].isfinite().all(), "not finite")
    expect(changed[found[2] == 0].max() == 0, "pixels outside changed")
    expect(changed[found[2] > 0].mean() > 1e-3, "nothing changed")


def photo_of(tiny: Tiny) -> tuple[Any, Tensor, Tensor]:
    """A VAE, a photo (1, H, W, 3) of which a side is no whole number of cells, and an object's mask (1, H, W) in it."""
    vae = fake_vae(tiny)
    size = vae.spacial_compression_encode()
    height, width = tiny.shape[-2] * size - 2, tiny.shape[-1] * size
    photo = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(1, height, width)
    mask[:, height // 8 : 3 * height // 8, width // 8 : 3 * width // 8] = 1
    return vae, photo, mask


def cow_sampler(tiny: Tiny) -> None:
    """From the canvas and from noise: the subject stays, in every frame of a video, and the rest changes."""
    latent, mask = noise(tiny, 1, 11), torch.zeros(1, *tiny.shape[-2:])
    mask[:, 2:5, 2:5] = 1
    d = CowConfig()
    for start in ("canvas", "noise"):
        sampler = cow.CowSampler().make(
            mask, 2, 1.0, d.low, d.high, "training time", 1.5, 1.0, 0.1, 1.0, 1.0, start=start
        )[0]
        found = sampled(cfg_guider(tiny, 2.0), sampler, sigmas_of(tiny, 10), latent, noise(tiny))
        near(found[..., 2:5, 2:5], latent[..., 2:5, 2:5], f"the subject, from the {start}")
        change = (found - latent).abs()[..., 6:, 6:].mean()
        expect(torch.isfinite(found).all() and change > 1e-3, f"the background did not change, from the {start}")


def masked_regenerate(tiny: Tiny) -> None:
    """What is held stays to the bit, and one round over everything is KSampler."""
    latent, mask = noise(tiny, 2, 11), torch.zeros(1, *tiny.shape[-2:])
    mask[..., tiny.shape[-1] // 2 :] = 1
    common = {
        "seed": 4, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "schedule": "uniform", "strength_end": 0.0, "low": 0.15,
        "direction": "decreasing", "patch": 2, "nested": True,
    }  # fmt: skip
    node = lmd.MaskedRegenerate()

    def run(**more: Any) -> Tensor:
        samples: Tensor = node.regenerate(tiny.model, *tiny.prompts, {"samples": latent}, **common, **more)[0][
            "samples"
        ]
        return samples

    found = run(rounds=2, strength=0.6, kind="cosine", high=0.75, candidates=2, mask=mask)
    half = tiny.shape[-1] // 2
    expect(torch.equal(found[..., :half], latent[..., :half]), "cells outside the mask changed")
    expect(not torch.equal(found[..., half:], latent[..., half:]) and found.isfinite().all(), "nothing changed")
    for strength in (0.6, 1.0):
        ours = run(rounds=1, strength=strength, kind="fixed", high=1.0, candidates=1)
        host = comfy.sample.sample(
            tiny.model, comfy.sample.prepare_noise(latent, 4), 3, 2.0, "euler", "normal", *tiny.prompts, latent,
            denoise=strength, disable_pbar=True, seed=4,
        )  # fmt: skip
        near(ours, host, f"one round at strength {strength} beside KSampler", 2e-3)


def influence_profile(tiny: Tiny) -> None:
    before, mask = noise(tiny, 1, 11), torch.zeros(1, *tiny.shape[-2:])
    after = before.clone()
    mask[:, 2:5, 2:5] = 1
    after[..., 2:5, 2:5] += 1

    class Noise:
        seed = 3

        def generate_noise(self, latent: dict[str, Any]) -> Tensor:
            return noise(tiny)

    found = lmd.InfluenceProfile().measure(
        Noise(), cfg_guider(tiny, 2.0), comfy.samplers.sampler_object("euler"), sigmas_of(tiny, 4)[2:],
        {"samples": before}, mask, {"samples": after},
    )  # fmt: skip
    reach = found["result"][2] if isinstance(found, dict) else found[2]
    expect(not math.isnan(reach), "the reach is NaN")


def call_reuse(tiny: Tiny) -> None:
    """Steps that keep the last slope are Euler's steps without the levels between, whatever the shape of the latents."""
    sigmas, latent = sigmas_of(tiny, 6), torch.zeros(2, *tiny.shape)
    knots = sigmas[[0, 1, 3, 6]]
    spans = [ReuseSpan(float(sigmas[i]), float(sigmas[j]), "last") for i, j in ((2, 3), (4, 6))]
    schedule = Schedule(tuple(sigmas.tolist()), {}, reuse=tuple(spans))
    calls = {}

    def ours(levels: Tensor, model: Any, name: str) -> Tensor:
        counted = tiny._replace(model=model.clone())
        calls[name] = 0

        def count(execute: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return execute(*args, **kwargs)

        counted.model.add_wrapper(WrappersMP.PREDICT_NOISE, count)
        return sampled(cfg_guider(counted, 2.0), "euler", levels, latent, noise(tiny, 2))

    near(ours(sigmas, with_reuse(tiny.model, schedule), "reuse"), ours(knots, tiny.model, "plain"), "reuse", 1e-3)
    expect(calls == {"reuse": 3, "plain": 3}, f"calls: {calls}")
    path = HostPath(cfg_guider(tiny, 2.0), comfy.samplers.sampler_object("euler"), {"samples": latent}, batch=2)
    config = SearchConfig(
        steps=3, computed=2, full=tuple(sigmas.tolist()), pairs=1, holdout_pairs=1, evaluations=1, finalists=1
    )
    found = search(path, config)
    expect(found.schedule.nfe == 2, f"{found.schedule.nfe} calls")
    expect(found.schedule.objective["value"] <= min(found.baselines.values()), "worse than stock")  # type: ignore[index]


def other_channels(tiny: Tiny) -> None:
    """A latent of another family's VAE is refused in one sentence, where the host does not stop before: it scales by channel first."""
    count = tiny.shape[0]
    wrong = torch.ones(1, count + 3, *tiny.shape[1:])
    euler = comfy.samplers.sampler_object("euler")
    regenerate = {
        "seed": 4, "steps": 1, "cfg": 2.0, "sampler_name": "euler", "schedule": "uniform", "rounds": 1, "strength": 0.6,
        "strength_end": 0.0, "kind": "fixed", "low": 0.15, "high": 1.0, "direction": "decreasing", "patch": 2, "nested": True,
        "candidates": 1,
    }  # fmt: skip
    vae = fake_vae(tiny._replace(shape=wrong.shape[1:]))
    d, mask = CowConfig(), torch.zeros(1, *tiny.shape[-2:])
    mask[:, 2:5, 2:5] = 1
    keeping = cow.CowSampler().make(mask, 1, 1.0, d.low, d.high, "training time", 1.5, 1.0, 0.1, 1.0, 1.0)[0]
    tried: dict[str, Callable[[], Any]] = {
        "a session": lambda: run_on_model(tiny.model, {"samples": wrong}, lambda session: None, positive=tiny.prompts[0]),
        "Masked Regenerate": lambda: lmd.MaskedRegenerate().regenerate(
            tiny.model, *tiny.prompts, {"samples": wrong}, **regenerate
        ),
        "Stream Frames": lambda: stream.StreamFrames().stream(
            tiny.model, *tiny.prompts, vae, torch.rand(1, tiny.shape[-2] * 4, tiny.shape[-1] * 4, 3), strength=0.7, steps=1,
            guidance="none", guidance_scale=1.0, seed=2,
        ),
        "Search Schedule": lambda: HostPath(cfg_guider(tiny, 2.0), euler, {"samples": wrong}),
        "Influence Profile": lambda: lmd.InfluenceProfile().measure(
            None, cfg_guider(tiny, 2.0), euler, sigmas_of(tiny, 4), {"samples": wrong}, mask, {"samples": wrong + 1}
        ),
        "RCFG Guider": lambda: sampled(
            stream.RCFGGuider().guide(tiny.model, *tiny.prompts, "self", 2.0, 0.5)[0], euler, sigmas_of(tiny, 4), wrong, wrong
        ),
    }  # fmt: skip
    if tiny.shape[0] and len(tiny.shape) == 4 and tiny.shape[1] > 1:
        del tried["Stream Frames"]  # a video is no frame, whatever its channels
    with contextlib.suppress(RuntimeError):
        tiny.model.model.process_latent_in(wrong)
        tried["Cow Sampler"] = lambda: sampled(cfg_guider(tiny, 2.0), keeping, sigmas_of(tiny, 4), wrong, wrong)
    for name, run in tried.items():
        try:
            run()
        except ValueError as error:
            said = f"a latent of {count} channels for this model, but got {count + 3}. Encode"
            expect(said in str(error), f"{name} said {error}")
        else:
            raise AssertionError(f"{name} took it")


def fake_vae(tiny: Tiny) -> Any:
    """A VAE of the family's shape without weights: pixels averaged over a cell, in as many channels as the latents have."""
    channels, video, factor = tiny.shape[0], len(tiny.shape) == 4, 4

    class VAE:
        latent_dim = 3 if video else 2
        latent_channels = channels

        def spacial_compression_encode(self) -> int:
            return factor

        def encode(self, images: Tensor) -> Tensor:
            small = torch.nn.functional.avg_pool2d(images.movedim(-1, 1) * 2 - 1, factor)
            latents = small.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
            # As the host: the batch is the frames of one video.
            return latents.movedim(0, 1)[None, :, :1] if video else latents

        def decode(self, latents: Tensor) -> Tensor:
            flat = latents.movedim(2, 1).flatten(0, 1) if video else latents
            images = torch.nn.functional.interpolate(flat[:, :3], scale_factor=factor).movedim(1, -1)
            images = (images / 4 + 0.5).clamp(0, 1)
            return images.unflatten(0, (len(latents), -1)) if video else images

    return VAE()


CALL_REUSE, EDIT = "Apply Call Reuse", "Edit"
OWN = pathlib.Path(slipstream.__file__).parent
CHECKS: dict[str, Callable[[Tiny], None]] = {
    "rows": rows, "odd size": odd_size, "levels": levels, "other channels": other_channels,
    "RCFG Guider": rcfg, "Stream Frames": stream_frames,
    "Cow Sampler": cow_sampler, "Masked Regenerate": masked_regenerate, "Influence Profile": influence_profile,
    CALL_REUSE: call_reuse, EDIT: edits, "Harmonise": harmonised,
}  # fmt: skip
TECHNIQUES = (
    "RCFG Guider",
    "Stream Frames",
    "Cow Sampler",
    "Masked Regenerate",
    "Influence Profile",
    CALL_REUSE,
    EDIT,
    "Harmonise",
)


def result(check: Callable[[Tiny], None], tiny: Tiny) -> str:
    try:
        with torch.inference_mode():
            check(tiny)
    except AssertionError as error:
        return f"WRONG {error}"
    except ValueError as error:
        raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        own = raised_in.is_relative_to(OWN) and str(error).startswith("Expected ")
        return f"refused: {error}" if own else f"WRONG ValueError: {error}"
    except Exception as error:
        where = " < ".join(
            f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-8:-1]
        )
        return f"WRONG {type(error).__name__}: {error} ({where})"
    return "yes"


def table(found: dict[str, dict[str, str]]) -> str:
    """The README's support table in Markdown: what holds for every family of a column."""
    columns = list(dict.fromkeys(column for column, _ in FAMILIES.values()))
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for technique in TECHNIQUES:
        cells = []
        for column in columns:
            said = {n: found[n][technique] for n, (own, _) in FAMILIES.items() if own == column and n in found}
            others = [f"{name} {answer.split(':')[0]}" for name, answer in said.items() if answer != "yes"]
            cells.append("; ".join([*(["yes"] if len(others) < len(said) else []), *others]))
        lines.append(f"| {technique} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def listed(option: str) -> list[str]:
    """Return the names in an argument --option=a,b; none without it."""
    values = [a.partition("=")[2].split(",") for a in inside.ARGUMENTS if a.startswith(f"--{option}=")]
    return values[0] if values else []


def main() -> None:
    """--whole=family,... has all checks, every other family those of --cheap=check,...; without them all have all.

    Where a family is the network of another with other levels, only those are tried.
    """
    as_table, whole, cheap = "--table" in inside.ARGUMENTS, listed("whole"), listed("cheap")
    wanted = [a for a in inside.ARGUMENTS if not a.startswith("--")] or list(FAMILIES)
    found: dict[str, dict[str, str]] = {}
    for name in (name for name in wanted if not (OLD and name in NEWER)):
        tiny = tiny_models.make(name)
        found[name] = {}
        few = ["levels"] if name in SAMPLINGS else cheap
        for check in CHECKS if not whole or name in whole else few:
            begun = time.perf_counter()
            found[name][check] = said = result(CHECKS[check], tiny)
            seconds = round(time.perf_counter() - begun, 1)
            line = {"family": name, "column": FAMILIES[name][0], "check": check, "said": said, "seconds": seconds}
            print(json.dumps(line), file=sys.stderr if as_table else sys.stdout, flush=True)
    if as_table:
        print(table(found))


if __name__ == "__main__":
    main()
