"""The schedule search in a real host: search, resume, interrupt, compare, files, layer masks; equal to the library."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pathlib
import sqlite3
from typing import Any

import numpy as np
import pytest
import torch
from graph import node
from PIL import Image
from safetensors.torch import save_file
from slipstream import load
from slipstream.core.reuse import ReuseSpan
from slipstream.search import LayerMask, ModelPath, Paired, Schedule, SearchConfig, search
from slipstream.search.evaluation import HOLDOUT, banks
from slipstream.search.features import NetworkFeatures
from slipstream.search.paths import model_identity
from slipstream.search.store import Store

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TEXT = "a large red circle on a blue background"
SEED = 5
POCKET_SCALE = json.loads((ROOT / "pocket" / "vae" / "config.json").read_text())["scaling_factor"]


def base(cfg: float = 3.0) -> dict[str, Any]:
    return {
        "m": node("SlipstreamLoadModel", model="pocket"),
        "p": node("CLIPTextEncode", clip=["m", 1], text=TEXT),
        "n": node("CLIPTextEncode", clip=["m", 1], text=""),
        "l": node("EmptyLatentImage", width=32, height=32, batch_size=1),
        "g": node("CFGGuider", model=["m", 0], positive=["p", 0], negative=["n", 0], cfg=cfg),
        "s": node("KSamplerSelect", sampler_name="euler"),
    }


def searching(**changes: Any) -> dict[str, Any]:
    inputs = {
        "guider": ["g", 0], "sampler": ["s", 0], "latent_image": ["l", 0], "steps": 2, "evaluations": 16, "minutes": 0.0,
        "objective": "same picture as many steps", "pairs": 2, "seed": SEED, "strategy": "auto", "layers": False,
        "batch": 16,
    }  # fmt: skip
    return node("SlipstreamSearchSchedule", **{**inputs, **changes})


def show(graph: dict[str, Any], name: str, source: list[Any]) -> None:
    graph[name] = node("PreviewAny", source=source)


def text_of(result: Any, name: str) -> str:
    assert result.ok, result.explain()
    return result.outputs[name]["text"][0]


def sampled(graph: dict[str, Any], sigmas: list[Any], guider: str = "g", name: str = "") -> str:
    """Add sampling and saving with fixed noise; returns the id of the save node."""
    graph["noise"] = node("RandomNoise", noise_seed=3)
    graph[f"x{name}"] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=[guider, 0], sampler=["s", 0], sigmas=sigmas,
        latent_image=["l", 0],
    )  # fmt: skip
    graph[f"d{name}"] = node("VAEDecode", samples=[f"x{name}", 0], vae=["m", 2])
    graph[f"i{name}"] = node("SaveImage", images=[f"d{name}", 0], filename_prefix=f"search{name}")
    return f"i{name}"


def pixels(result: Any, name: str) -> np.ndarray:
    assert result.ok, result.explain()
    (file,) = [f for f in result.files if f.node == name]
    return np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")).astype(int)


@functools.cache
def pocket() -> Any:
    return load("pocket")


def library_path(**changes: Any) -> ModelPath:
    pipe = pocket()
    options = {"size": (4, 4, 4), "sampler": "euler", "cfg_scale": 3.0, "seed": SEED, **changes}
    return ModelPath(pipe.model, pipe.encode_text([TEXT]), pipe.encode_text([""]), **options)


@pytest.fixture(scope="module")
def first(host: Any) -> tuple[dict[str, Any], Any]:
    graph = base()
    graph["search"] = searching()
    show(graph, "report", ["search", 3])
    graph["save"] = node("SlipstreamSaveSchedule", schedule=["search", 0], name="from test", overwrite=True)
    graph["chart"] = node("SaveImage", images=["search", 2], filename_prefix="chart")
    sampled(graph, ["search", 1])
    return graph, host.run(graph)


def test_a_search_feeds_the_stock_sampler_and_saves_a_file(host: Any, first: tuple[dict, Any]) -> None:
    _, result = first
    report = text_of(result, "report")
    assert "16 schedules tried" in report
    assert all(name in report for name in ("karras", "beta", "simple", "ays_sd15", "* this schedule"))
    schedule = Schedule.load(result.outputs["save"]["text"][0])
    assert schedule.steps == schedule.nfe == 2
    assert schedule.sampler == "euler"
    assert schedule.model["hash"] == model_identity(pocket().model)["hash"]  # one hash under both module namings
    assert schedule.cfg_scale == 3.0
    assert schedule.objective["value"] <= min(schedule.objective["baselines"].values())
    assert pixels(result, "i").std() > 1


def test_progress_rises_and_the_live_plot_is_a_readable_picture(first: tuple[dict, Any]) -> None:
    _, result = first
    bars = result.progress("search")
    # New hosts leave out what follows within a tenth of a second.
    searched = list(dict.fromkeys(value for value, most in bars if most == 16))
    assert searched == sorted(searched)
    assert (searched[0], searched[-1]) == (0, 16)
    # The many-step runs before the search and before the ranking have bars of their own: 50 steps of 2 and of 4 pairs.
    for most in (100, 200):
        values = [value for value, total in bars if total == most]
        assert values == sorted(set(values))
        assert values[-1] == most
    plots = [e for e in result.previews if e.node == "search"]
    assert plots
    assert Image.open(io.BytesIO(plots[-1].data["image"])).size == (960, 500)


def test_the_result_is_the_library_s(first: tuple[dict, Any]) -> None:
    """The same noise, model, prompt and sampler give the same schedule without a host."""
    _, result = first
    found = Schedule.load(result.outputs["save"]["text"][0])
    path = library_path()
    holdout = banks(path, SearchConfig(steps=2, pairs=2, holdout_pairs=4), Store())[HOLDOUT]
    score, stock = Paired().prepare(holdout), path.stock(2)
    scores = {name: score(path.sample(sigmas, holdout.pairs)) for name, sigmas in stock.items()}
    # The host's latents are not scaled by the VAE's factor, the library's are.
    scale = POCKET_SCALE**2
    for name in ("simple", "beta", "ays_sd15"):
        assert scores[name] / found.objective["baselines"][name] == pytest.approx(scale, rel=2e-3), name
    for name in (
        "karras",
        "exponential",
        "kl_optimal",
        "sgm_uniform",
    ):  # between the table's levels, where the host rounds timesteps
        assert scores[name] / found.objective["baselines"][name] == pytest.approx(scale, rel=3e-2), name


def evaluated(report: str) -> int:
    """Return how many evaluations a run made, as its report says."""
    return int(report.split(" evaluations in this run")[0].split(" ")[-1])


def test_run_again_goes_on_where_it_was(host: Any, first: tuple[dict, Any]) -> None:
    graph, _ = first
    again = host.run({**graph, "search": searching(evaluations=19)})
    report = text_of(again, "report")
    assert "19 schedules tried" in report
    done = evaluated(report)
    assert done < 12


def test_the_first_level_is_searched_when_asked_for(host: Any) -> None:
    graph = base()
    graph["search"] = searching(steps=1, evaluations=8, search_first_level=True)
    show(graph, "report", ["search", 3])
    graph["save"] = node("SlipstreamSaveSchedule", schedule=["search", 0], name="free start", overwrite=True)
    result = host.run(graph)
    assert "8 schedules tried" in text_of(result, "report")
    assert Schedule.load(result.outputs["save"]["text"][0]).sigmas[0] < pocket().model.sigma_max


def test_interrupt_keeps_every_finished_evaluation(host: Any) -> None:
    graph = base()
    graph["search"] = searching(seed=77, evaluations=30)
    show(graph, "report", ["search", 3])
    run = host.submit(graph)
    run.wait_for(
        lambda e: (
            e.type == "progress" and e.data.get("node") == "search" and e.data["max"] == 30 and e.data["value"] >= 14
        )
    )
    run.interrupt()
    assert run.wait().status == "interrupted"
    report = text_of(host.run({**graph, "search": searching(seed=77, evaluations=30)}), "report")
    total, now = int(report.split(" schedules tried")[0].split("\n")[-1]), evaluated(report)
    held_out = 5 + 12
    assert total == 30
    assert now <= 30 - 14 + held_out


def write_schedule(host: Any, name: str, masks: tuple[LayerMask, ...] = (), **changes: Any) -> None:
    levels = changes.pop("levels", (14.614647, 3.0, 0.6, 0.0))
    model = changes.pop("model", {"name": "x", "hash": "", "sigma_min": 0.03, "sigma_max": 14.6146})
    Schedule(levels, model, nfe=3, name=name, masks=masks, **changes).save(schedules(host) / f"{name}.json")


def schedules(host: Any) -> pathlib.Path:
    folder = pathlib.Path(host.base) / "user" / "slipstream" / "schedules"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fixed_noise(noise: torch.Tensor) -> type:
    """A noise source in the place of the library's that always gives the host's noise."""

    class Fixed:
        def __init__(self, sources: Any) -> None: ...
        def __call__(self, like: torch.Tensor) -> torch.Tensor:
            return noise

        def fork(self, name: str) -> Any:
            return self

    return Fixed


def library_pixels(sigmas: Any, masks: tuple[LayerMask, ...] = ()) -> np.ndarray:
    """What the library makes of the noise that `sampled` gives the host."""
    noise = torch.randn((1, 4, 4, 4), generator=torch.manual_seed(3))
    import slipstream.search.paths as paths

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "StackedNoise", fixed_noise(noise))
        latents = library_path().sample(torch.as_tensor(sigmas), [0], masks)
    found: np.ndarray = (pocket().decode(latents)[0].numpy() * 255).round().astype(int)
    return found


def test_a_file_of_the_host_samples_the_same_in_the_library(first: tuple[dict, Any]) -> None:
    _, result = first
    found = Schedule.load(result.outputs["save"]["text"][0])
    assert np.abs(library_pixels(found.sigmas) - pixels(result, "i")).max() <= 2


def test_a_file_of_the_library_samples_the_same_in_the_host(host: Any) -> None:
    config = SearchConfig(steps=3, evaluations=6, pairs=1, holdout_pairs=1, teacher_steps=4)
    schedule = search(library_path(), config).schedule
    schedule.save(schedules(host) / "library.json")
    graph = base()
    graph["load"] = node("SlipstreamLoadSchedule", file="library.json", steps=0)
    save = sampled(graph, ["load", 1])
    result = host.run(graph)
    assert np.abs(library_pixels(schedule.sigmas) - pixels(result, save)).max() <= 2


def test_a_layer_mask_samples_as_in_the_library_and_leaves_the_model_alone(host: Any) -> None:
    mask = LayerMask(3.0, 0.6, ("mid_block.resnets.0", "up_blocks.1.attentions.0", "down_blocks.0.resnets.0"))
    write_schedule(host, "masked", (mask,))
    graph = base()
    graph["load"] = node("SlipstreamLoadSchedule", file="masked.json", steps=0)
    graph["apply"] = node("SlipstreamApplyLayerMask", model=["m", 0], schedule=["load", 0])
    graph["g2"] = node("CFGGuider", model=["apply", 0], positive=["p", 0], negative=["n", 0], cfg=3.0)
    plain, masked = sampled(graph, ["load", 1]), sampled(graph, ["load", 1], "g2", "2")
    result = host.run(graph)
    assert np.abs(pixels(result, plain) - pixels(result, masked)).mean() > 1
    alone = {k: v for k, v in graph.items() if not k.endswith("2") and k != "apply"}
    alone["noise"] = node("RandomNoise", noise_seed=3)
    host.free()
    assert np.array_equal(pixels(host.run(alone), plain), pixels(result, plain))

    assert np.abs(library_pixels([14.614647, 3.0, 0.6, 0.0], (mask,)) - pixels(result, masked)).max() <= 2


@pytest.mark.parametrize(
    ("block", "network", "sentence"),
    [
        ("no.such.block", "UNetModel", "names 'no.such.block'. It was made for another model"),
        ("double_blocks.0", "", "names 'double_blocks.0'"),
        ("mid_block.resnets.0", "Flux", "Expected a layer mask for this model (UNetModel), but got one for Flux."),
    ],
)
def test_a_mask_of_another_model_is_refused(host: Any, block: str, network: str, sentence: str) -> None:
    model = {"name": "x", "hash": "", "class": network, "sigma_min": 0.03, "sigma_max": 14.6146}
    write_schedule(host, "foreign", (LayerMask(3.0, 0.6, (block,)),), model=model)
    graph = base()
    graph["load"] = node("SlipstreamLoadSchedule", file="foreign.json", steps=0)
    graph["apply"] = node("SlipstreamApplyLayerMask", model=["m", 0], schedule=["load", 0])
    graph["g2"] = node("CFGGuider", model=["apply", 0], positive=["p", 0], negative=["n", 0], cfg=3.0)
    sampled(graph, ["load", 1], "g2")
    result = host.run(graph)
    assert not result.ok
    assert sentence in result.explain()


def test_a_u_net_s_mask_on_a_transformer_is_refused(host: Any) -> None:
    write_schedule(host, "unet", (LayerMask(3.0, 0.6, ("mid_block.resnets.0",)),))
    graph = {"m": node("ProbeTinyFamily", family="flux")}
    graph["load"] = node("SlipstreamLoadSchedule", file="unet.json", steps=0)
    graph["apply"] = node("SlipstreamApplyLayerMask", model=["m", 0], schedule=["load", 0])
    graph["save"] = node("ModelSave", model=["apply", 0], filename_prefix="unused")
    text = host.run(graph).explain()
    assert (
        "names 'mid_block.resnets.0'. It was made for another model; this one has 4 blocks that can be skipped" in text
    )


def test_compare_any_number_of_schedules(host: Any) -> None:
    graph = base()
    graph["ays"] = node("SlipstreamLoadSchedule", file="preset: ays_sd15_10", steps=3)
    graph["re"] = node("SlipstreamResampleSchedule", schedule=["ays", 0], steps=2)
    graph["karras"] = node("BasicScheduler", model=["m", 0], scheduler="karras", steps=2, denoise=1.0)
    graph["a"] = node("SlipstreamAddSchedule", name="one", sigmas=["karras", 0])
    graph["b"] = node("SlipstreamAddSchedule", name="one", schedule=["re", 0], schedules=["a", 0])
    graph["objective"] = node("SlipstreamSelfObjective", vae=["m", 2], features="pixels", distance="paired")
    graph["c"] = node(
        "SlipstreamCompareSchedules", guider=["g", 0], sampler=["s", 0], latent_image=["l", 0], stock_steps=2, pairs=2,
        repeats=2, objective="same picture as many steps", seed=1, batch=16, schedule=["ays", 0],
        sigmas=["karras", 0], schedules=["b", 0], custom_objective=["objective", 0],
    )  # fmt: skip
    show(graph, "table", ["c", 1])
    graph["chart"] = node("SaveImage", images=["c", 0], filename_prefix="chart")
    sampled(graph, ["c", 2])
    result = host.run(graph)
    table = text_of(result, "table")
    for name in ("one ", "one (2)", "Align Your Steps", "sigmas", "karras", "beta", "paired/latents", "paired/pixels"):
        assert name in table, name
    chart = pixels(result, "chart")
    assert chart.shape[1] == 1220
    best = table.split("\n")[1]
    assert best.startswith("Align Your Steps")  # three steps against two
    # The many-step runs are bars of their own: 50 steps of 2 pairs, twice.
    many = [value for value, most in result.progress("c") if most == 100]
    assert len(set(many)) > 2
    assert many[-1] == 100
    assert pixels(result, "i").std() > 1


def test_reference_pictures_and_prompts(host: Any, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for i, size in enumerate([(64, 64), (80, 50), (33, 97)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    graph = base()
    graph["objective"] = node(
        "SlipstreamReferenceObjective", vae=["m", 2], features="pixels", distance="mmd", folder=str(tmp_path)
    )
    prompts = f"{TEXT}\n\na small green star\n"
    graph["search"] = searching(
        custom_objective=["objective", 0], clip=["m", 1], prompts=prompts, evaluations=12, pairs=4
    )
    show(graph, "report", ["search", 3])
    report = text_of(host.run(graph), "report")
    assert "12 schedules tried" in report
    assert "reference-mmd/pixels/3-" in report
    graph["search"] = searching(prompts=TEXT, evaluations=12)
    assert "Expected `clip` to encode `prompts`" in host.run(graph).explain()
    (tmp_path / "empty").mkdir()
    graph["objective"]["inputs"]["folder"] = str(tmp_path / "empty")
    graph["search"] = searching(custom_objective=["objective", 0])
    assert "Expected `folder` with images" in host.run(graph).explain()
    graph["objective"]["inputs"]["folder"] = "/usr/share"
    assert "Expected `folder` in ComfyUI's input or models folders" in host.run(graph).explain()


VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "projection_dim": 24, "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
}  # fmt: skip


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    """A folder with a CLIP vision model of random weights, and transformers' embedding with the same ones."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**VISION, "initializer_factor": 4.0})).eval()
    folder = tmp_path_factory.mktemp("vision")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(VISION))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)

    @torch.no_grad()
    def embed(images: torch.Tensor) -> torch.Tensor:
        pixels = images.movedim(-1, 1)
        if pixels.shape[-1] != 32:
            pixels = torch.nn.functional.interpolate(pixels, (32, 32), mode="bicubic", antialias=True)
        pixels = (255 * pixels).clamp(0, 255).round() / 255
        found = model(pixel_values=(pixels - mean) / deviation).image_embeds
        return found / found.norm(dim=1, keepdim=True)

    return folder, embed


def test_clip_vision_features_are_those_of_transformers(host: Any, tmp_path: pathlib.Path, vision: Any) -> None:
    """CMMD's features through the host's CLIP vision model; the scores of stock schedules equal the library's."""
    folder, embed = vision
    rng = np.random.default_rng(1)
    for i, size in enumerate([(64, 64), (80, 50), (33, 97), (40, 40)]):
        noise = rng.integers(0, 60, (*size, 3)) + rng.integers(0, 195, (1, 1, 3))
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / f"{i}.png")
    graph = base()
    graph["v"] = node("ProbeTinyClipVision", folder=str(folder))
    graph["objective"] = node(
        "SlipstreamReferenceObjective", vae=["m", 2], features="clip vision", distance="mmd", folder=str(tmp_path),
        clip_vision=["v", 0],
    )  # fmt: skip
    graph["search"] = searching(custom_objective=["own", 0], evaluations=13, pairs=4)
    graph["save"] = node("SlipstreamSaveSchedule", schedule=["search", 0], name="vision", overwrite=True)
    graph["own"] = node(
        "SlipstreamSelfObjective", vae=["m", 2], features="clip vision", distance="paired", clip_vision=["v", 0]
    )
    graph["c"] = node(
        "SlipstreamCompareSchedules", guider=["g", 0], sampler=["s", 0], latent_image=["l", 0], stock_steps=2, pairs=2,
        repeats=1, objective="same picture as many steps", seed=1, batch=16, custom_objective=["objective", 0],
    )  # fmt: skip
    show(graph, "table", ["c", 1])
    result = host.run(graph)
    assert "reference-mmd/clip-vision/4-" in text_of(result, "table")
    found = Schedule.load(result.outputs["save"]["text"][0]).objective
    assert found["id"] == "paired/clip-vision"

    path = library_path()
    features = NetworkFeatures(pocket().decode, embed, "clip-vision")
    holdout = banks(path, SearchConfig(steps=2, pairs=4, holdout_pairs=8), Store())[HOLDOUT]
    score = Paired(features).prepare(holdout)
    expected = {name: score(path.sample(path.stock(2)[name], holdout.pairs)) for name in ("simple", "beta", "ays_sd15")}
    assert max(expected.values()) > 1.2 * min(expected.values()), expected
    for name, value in expected.items():
        assert found["baselines"][name] == pytest.approx(value, rel=0.03), name

    graph["objective"]["inputs"].pop("clip_vision")
    assert "Expected `clip_vision` for these features" in host.run(graph).explain()


def test_searched_levels_drive_cow(host: Any, example: Any) -> None:
    changes = {
        "SlipstreamLoadModel.model": "pocket",
        "SlipstreamSeedCanvas.width": 128, "SlipstreamSeedCanvas.height": 128, "SlipstreamSeedCanvas.scale": 0.15,
        "SlipstreamCowSampler.cycles": 1, "BasicScheduler.steps": 10, "CFGGuider.cfg": 3.0,
    }  # fmt: skip
    graph = example("Grow a scene around a subject", changes)
    graph["searched"] = node("SlipstreamLoadSchedule", file="preset: pocket_3", steps=10)
    found = {}
    for name in ("scheduler", "searched"):
        if name == "searched":
            (sampling,) = [n for n in graph.values() if n["class_type"] == "SamplerCustomAdvanced"]
            sampling["inputs"]["sigmas"] = ["searched", 1]
        result = host.run(graph)
        assert result.ok, result.explain()
        (file,) = [f for f in result.files if f.type == "output"]
        found[name] = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")).astype(int)
    assert np.abs(found["scheduler"] - found["searched"]).max() > 2  # the levels are used


def test_searched_levels_drive_the_stream(host: Any, first: tuple[dict, Any]) -> None:
    """As many passes as frames and levels ask for, at the levels of the schedule: other ones give other images."""
    graph = {k: v for k, v in first[0].items() if k in ("m", "p", "n", "l", "g", "s", "search")}
    graph["frames"] = node("EmptyImage", width=64, height=64, batch_size=3, color=0x3050A0)
    graph["longer"] = node("SlipstreamResampleSchedule", schedule=["search", 0], steps=8)
    graph["karras"] = node("BasicScheduler", model=["m", 0], scheduler="karras", steps=8, denoise=1.0)
    for name, sigmas in (("a", ["longer", 1]), ("b", ["karras", 0])):
        graph[f"low{name}"] = node("SplitSigmas", sigmas=sigmas, step=5)
        graph[f"stream{name}"] = node(
            "SlipstreamStreamFrames", model=["m", 0], positive=["p", 0], negative=["n", 0], vae=["m", 2],
            frames=["frames", 0], sigmas=[f"low{name}", 1], strength=0.6, steps=2, guidance="self", guidance_scale=1.2, seed=5,
        )  # fmt: skip
        graph[f"out{name}"] = node("SaveImage", images=[f"stream{name}", 0], filename_prefix=name)
        show(graph, f"text{name}", [f"stream{name}", 1])
    result = host.run(graph)
    assert "5 passes" in text_of(result, "texta")  # 3 frames + 3 levels - 1
    files = [[f for f in result.files if f.node == f"out{name}"] for name in "ab"]
    found = [[np.asarray(Image.open(io.BytesIO(f.read()))).astype(int) for f in each] for each in files]
    assert [len(frames) for frames in found] == [3, 3]
    assert np.abs(found[0][0] - found[1][0]).max() > 2


def test_a_sampler_that_chooses_its_own_steps_is_refused(host: Any) -> None:
    graph = base()
    graph["s"] = node("KSamplerSelect", sampler_name="dpm_adaptive")
    graph["search"] = searching()
    show(graph, "report", ["search", 3])
    assert "Expected `sampler` to follow its sigmas, but got 'dpm_adaptive'" in host.run(graph).explain()


def test_budgets_and_pictures_that_cannot_be_used(host: Any, tmp_path: pathlib.Path) -> None:
    graph = base()
    graph["search"] = searching(evaluations=0)
    show(graph, "report", ["search", 3])
    assert "Expected a budget" in host.run(graph).explain()
    Image.new("RGB", (40, 40)).save(tmp_path / "only.png")
    graph["objective"] = node(
        "SlipstreamReferenceObjective", vae=["m", 2], features="pixels", distance="mmd", folder=str(tmp_path)
    )
    graph["search"] = searching(custom_objective=["objective", 0])
    assert "at least 2 reference images to have a distribution, but got 1" in host.run(graph).explain()
    graph["search"] = searching(steps=1, evaluations=3)
    assert "leaves nothing to search" in text_of(host.run(graph), "report")


def test_layers_are_searched_in_the_host(host: Any) -> None:
    """Candidates do skip blocks, those that the library finds in the same network."""
    graph = base()
    graph["search"] = searching(layers=True, evaluations=50, steps=2)
    show(graph, "report", ["search", 3])
    graph["apply"] = node("SlipstreamApplyLayerMask", model=["m", 0], schedule=["search", 0])
    graph["g2"] = node("CFGGuider", model=["apply", 0], positive=["p", 0], negative=["n", 0], cfg=3.0)
    sampled(graph, ["search", 1], "g2")
    folder = pathlib.Path(host.base) / "user" / "slipstream" / "search"
    before = set(folder.glob("*.sqlite"))
    report = text_of(host.run(graph), "report")
    assert "50 schedules tried" in report
    (store,) = set(folder.glob("*.sqlite")) - before
    with contextlib.closing(sqlite3.connect(store)) as connection:
        tried = [key for (key,) in connection.execute("SELECT DISTINCT candidate FROM evaluation")]
    masked = [key.split("|")[1] for key in tried if "|" in key]
    assert len(masked) >= 15
    skipped = {name.strip() for key in masked for step in key.split(";") for name in step.split(",")} - {""}
    assert skipped == {layer.name for layer in library_path().layers()}  # each is probed alone


def test_a_file_for_another_model_and_sampler_warns(host: Any) -> None:
    write_schedule(host, "other", sampler="heun", cfg_scale=9.0)
    graph = base()
    graph["load"] = node("SlipstreamLoadSchedule", file="other.json", steps=0, guider=["g", 0], sampler=["s", 0])
    show(graph, "info", ["load", 2])
    assert "for model x, sampler heun, cfg 9" in text_of(host.run(graph), "info")
    log = host.log()
    assert "searched with sampler 'heun', not 'euler'" in log
    assert "searched at cfg 9, not 3" in log


def test_a_broken_file_names_its_field(host: Any) -> None:
    write_schedule(host, "broken")
    path = pathlib.Path(host.base) / "user" / "slipstream" / "schedules" / "broken.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "steps": 9}))
    graph = base()
    graph["load"] = node("SlipstreamLoadSchedule", file="broken.json", steps=0)
    show(graph, "info", ["load", 2])
    assert "Expected `steps` 3 for 4 sigmas" in host.run(graph).explain()


LEVELS = (14.614647, 6.0, 3.0, 1.5, 0.7, 0.3, 0.0)
REUSE = (ReuseSpan(3.0, 0.7), ReuseSpan(0.3, 0.0, "last"))
FITTED = (
    ReuseSpan(14.614647, 3.0, "fitted", (1.02,)), ReuseSpan(3.0, 0.7, "fitted", (1.4, -0.38)),
    ReuseSpan(0.7, 0.0, "fitted", (1.2, -0.3, 0.1)),
)  # fmt: skip


def reusing(host: Any, name: str, sampler: str = "euler", reuse: tuple[ReuseSpan, ...] = REUSE) -> dict[str, Any]:
    """A graph that samples once with the schedule's call reuse and counts the network calls of it."""
    write_schedule(host, name, levels=LEVELS, reuse=reuse)
    graph = base()
    graph["s"] = node("KSamplerSelect", sampler_name=sampler)
    graph["load"] = node("SlipstreamLoadSchedule", file=f"{name}.json", steps=0)
    graph["count"] = node("ProbeCount", model=["m", 0], name=name)
    graph["apply"] = node("SlipstreamApplyCallReuse", model=["count", 0], schedule=["load", 0])
    graph["g2"] = node("CFGGuider", model=["apply", 0], positive=["p", 0], negative=["n", 0], cfg=3.0)
    save = sampled(graph, ["load", 1], "g2")
    graph["rows"] = node("ProbeCounted", after=["x", 0], name=name)
    return graph | {"last": graph.pop(save)}


def warned(result: Any) -> list[str]:
    """Return what the nodes warn of, but for the small images of these tests."""
    texts = [e.data["text"] for e in result.events if e.type == "slipstream.warning"]
    return [text for text in texts if "the empty latent is" not in text]


def counted(result: Any) -> list[int]:
    assert result.ok, result.explain()
    return json.loads(result.outputs["rows"]["report"][0])


@pytest.mark.parametrize(
    ("sampler", "calls"), [("euler", 3), ("dpmpp_2m", 3), ("heun", 5), ("dpm_2", 6), ("lms", 3), ("euler_ancestral", 3)]
)
def test_reused_calls_are_not_made(host: Any, sampler: str, calls: int) -> None:
    """Six steps of which three reuse; heun and dpm_2 call twice a step."""
    result = host.run(reusing(host, f"reuse {sampler}", sampler))
    assert counted(result) == [2] * calls
    assert pixels(result, "last").std() > 1
    assert not result.outputs.get("apply", {}).get("warnings")


@pytest.mark.parametrize("reuse", [REUSE, FITTED], ids=["left out", "fitted"])
def test_reuse_in_the_host_is_the_library_s(host: Any, reuse: tuple[ReuseSpan, ...]) -> None:
    import slipstream.search.paths as paths

    result = host.run(reusing(host, f"reuse library {reuse[0].kind}", reuse=reuse))
    assert not result.outputs.get("apply", {}).get("warnings")
    noise = torch.randn((1, 4, 4, 4), generator=torch.manual_seed(3))
    path = library_path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "StackedNoise", fixed_noise(noise))
        latents = path.sample(torch.tensor(LEVELS), [0], reuse=reuse)
    expected = (pocket().decode(latents)[0].numpy() * 255).round().astype(int)
    assert path.evaluations == 3
    assert np.abs(expected - pixels(result, "last")).max() <= 2


def test_a_search_of_call_reuse_is_applied_and_warns_of_other_sigmas(host: Any) -> None:
    graph = base()
    graph["full"] = node("BasicScheduler", model=["m", 0], scheduler="karras", steps=6, denoise=1.0)
    graph["search"] = searching(steps=6, computed=3, sigmas=["full", 0], evaluations=12)
    show(graph, "report", ["search", 3])
    graph["count"] = node("ProbeCount", model=["m", 0], name="searched")
    graph["apply"] = node("SlipstreamApplyCallReuse", model=["count", 0], schedule=["search", 0])
    graph["g2"] = node("CFGGuider", model=["apply", 0], positive=["p", 0], negative=["n", 0], cfg=3.0)
    sampled(graph, ["search", 1], "g2")
    graph["rows"] = node("ProbeCounted", after=["x", 0], name="searched")
    assert counted(host.run(graph)) == [2, 2, 2]

    other = reusing(host, "reuse other")
    other["x"]["inputs"]["sigmas"] = ["full", 0]
    other["full"] = graph["full"]
    result = host.run(other)
    assert result.ok, result.explain()
    (text,) = warned(result)
    assert "the sampler's sigmas are not those of `schedule`" in text


def test_fitted_coefficients_want_euler(host: Any) -> None:
    result = host.run(reusing(host, "reuse fitted", "dpmpp_2m", FITTED))
    assert result.ok, result.explain()
    (text,) = warned(result)
    assert "the sampler is dpmpp_2m" in text


def test_a_stream_leaves_call_reuse_out_with_a_warning(host: Any) -> None:
    graph = reusing(host, "reuse stream")
    for name in ("x", "last", "rows", "g2", "s"):
        graph.pop(name, None)
    graph["frames"] = node("EmptyImage", width=32, height=32, batch_size=2, color=0x1A3B64)
    graph["stream"] = node(
        "SlipstreamStreamFrames", model=["apply", 0], positive=["p", 0], negative=["n", 0], vae=["m", 2], frames=["frames", 0],
        strength=0.6, steps=2, guidance="none", guidance_scale=1.2, seed=2,
    )  # fmt: skip
    graph["out"] = node("PreviewImage", images=["stream", 0])
    result = host.run(graph)
    assert result.ok, result.explain()
    texts = [e.data["text"] for e in result.events if e.type == "slipstream.warning"]
    assert any("Apply Call Reuse has no effect here" in text for text in texts)


@pytest.mark.parametrize("other", ["EasyCache", "SlipstreamApplyCallReuse"])
def test_a_model_that_reuses_calls_already_is_refused(host: Any, other: str) -> None:
    graph = reusing(host, "reuse twice")
    easy = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    graph["easy"] = node(other, model=["m", 0], **(easy if other == "EasyCache" else {"schedule": ["load", 0]}))
    graph["apply"]["inputs"]["model"] = ["easy", 0]
    del graph["rows"], graph["count"]
    result = host.run(graph)
    assert not result.ok
    assert ("EasyCache" if other == "EasyCache" else "Apply Call Reuse") in result.explain()


def test_a_file_that_reuses_its_first_step_is_refused(host: Any) -> None:
    graph = reusing(host, "reuse first", reuse=(ReuseSpan(14.614647, 3.0),))
    result = host.run(graph)
    assert not result.ok
    assert "first step has nothing to reuse" in result.explain()


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "lcm", "churned"]
)
def test_a_pair_has_its_own_noise_in_any_batch(host: Any, report: Any, sampler: str) -> None:
    """A batch halved when memory runs out must not change what is measured."""
    graph = base()
    graph["s"] = node("KSamplerSelect", sampler_name=sampler)
    if sampler == "churned":
        graph["s"] = node("ProbeChurned", churn=2.0)
    graph["b"] = node("BasicScheduler", model=["m", 0], scheduler="karras", steps=3, denoise=1.0)
    graph["pairs"] = node("ProbePairs", guider=["g", 0], sampler=["s", 0], latent=["l", 0], sigmas=["b", 0])
    difference, effect = report(host.run(graph))
    assert difference < 1e-3 * effect


def test_a_search_begins_from_typed_and_wired_lists(host: Any) -> None:
    graph = base()
    graph["typed"] = node("SlipstreamAddSchedule", name="typed", levels="14.6, 2.5, 0.6")
    graph["few"] = node("BasicScheduler", model=["m", 0], scheduler="karras", steps=2, denoise=1.0)
    graph["wired"] = node("SlipstreamAddSchedule", name="wired", sigmas=["few", 0], schedules=["typed", 0])
    graph["search"] = searching(steps=3, evaluations=6, schedules=["wired", 0])
    show(graph, "report", ["search", 3])
    text = text_of(host.run(graph), "report")
    assert "  typed " in text
    assert "  wired " in text


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"levels": "1, 2"}, "descend strictly"),
        ({"levels": "one"}, "Expected `levels` as numbers separated by commas, but got 'one'"),
        ({"levels": "2, 1", "sigmas": ["few", 0]}, "Expected one of `sigmas`, `schedule` and `levels`"),
        ({}, "Expected one of `sigmas`, `schedule` and `levels`"),
    ],
)
def test_a_list_that_is_none_is_refused(complaint: Any, inputs: dict[str, Any], says: str) -> None:
    graph = base()
    graph["few"] = node("BasicScheduler", model=["m", 0], scheduler="karras", steps=2, denoise=1.0)
    graph["add"] = node("SlipstreamAddSchedule", name="", **inputs)
    graph["search"] = searching(steps=3, evaluations=1, schedules=["add", 0])
    show(graph, "report", ["search", 3])
    assert says in complaint(graph)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"hash": "0123456789abcdef", "name": "other", "sigma_min": 0.03, "sigma_max": 14.6146}, "searched for model 'other'"),
        ({"sigma_min": 0.001, "sigma_max": 1.0}, "made for noise levels up to 1, this model's go up to 14.61"),
    ],
)  # fmt: skip
def test_another_model_s_reuse_is_warned_of(host: Any, model: dict[str, Any], says: str) -> None:
    levels = LEVELS if model["sigma_max"] > 1 else (1.0, 0.8, 0.5, 0.2, 0.0)
    spans = (ReuseSpan(levels[2], levels[3]),)
    write_schedule(host, "another", model=model, levels=levels, reuse=spans)
    graph = base()
    graph["load"] = node("SlipstreamLoadSchedule", file="another.json", steps=0)
    graph["apply"] = node("SlipstreamApplyCallReuse", model=["m", 0], schedule=["load", 0])
    graph["g2"] = node("CFGGuider", model=["apply", 0], positive=["p", 0], negative=["n", 0], cfg=3.0)
    sampled(graph, ["load", 1], "g2")
    result = host.run(graph)
    assert result.ok, result.explain()
    (text,) = warned(result)
    assert says in text


def test_cow_reuses_calls_in_each_of_its_descents(host: Any) -> None:
    """The rounds go up in noise again: slopes from before are dropped, and the first call of each descent is made."""
    counts = {}
    for name, spans in (("cow reuse", (ReuseSpan(3.0, 1.5, "last"), ReuseSpan(0.7, 0.0, "last"))), ("cow plain", ())):
        graph = reusing(host, name, reuse=spans)
        graph["photo"] = node("EmptyImage", width=32, height=32, batch_size=1, color=0x1A3B64)
        graph["x"]["inputs"]["latent_image"] = ["canvas", 0]
        graph["canvas"] = node("VAEEncode", pixels=["photo", 0], vae=["m", 2])
        graph["keep2"] = node("SolidMask", value=1.0, width=16, height=32)
        graph["half"] = node("SolidMask", value=0.0, width=32, height=32)
        graph["keep"] = node("MaskComposite", destination=["half", 0], source=["keep2", 0], x=0, y=0, operation="add")
        graph["s"] = node(
            "SlipstreamCowSampler", keep=["keep", 0], cycles=2, preserve=1.0, low=0.2, high=0.7, range_unit="training time",
            eta=0.0, final_eta=0.0, noise_limit=0.1, inversion_cfg=1.0, repel=0.0,
        )  # fmt: skip
        counts[name] = len(counted(host.run(graph)))
    assert 0 < counts["cow reuse"] < counts["cow plain"]
