"""The published StreamDiffusion, frame by frame, against recorded runs (tests/golden/stream)."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file
from slipstream.core import Conditioning, DiffusersDenoiser, ReplayNoise, SeededNoise
from slipstream.core.pipeline import Pipeline
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.stream import SimilarityFilter, StreamBatch, StreamConfig
from slipstream.stream.config import boundary_scalings, lcm_timesteps
from slipstream.stream.similarity import similarity

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "golden" / "stream"
CASES = {c["name"]: c for c in json.loads((FOLDER / "cases.json").read_text())["cases"]}
REFERENCE = {c["name"]: c for c in json.loads((FOLDER / "reference.json").read_text())["cases"]}
TOLERANCE = 1e-5

RUNS = {n: c for n, c in CASES.items() if c["mode"] in ("img2img", "txt2img")}
BATCHED = [n for n, c in RUNS.items() if c["ok"] and c["use_denoising_batch"]]
# `self` with one step feeds its noise back from frame to frame there and diverges: a defect, see test_guidance.py.
DIVERGING = [n for n in BATCHED if RUNS[n]["cfg_type"] == "self" and len(RUNS[n]["t_index_list"]) == 1]
FAITHFUL = [n for n in BATCHED if n not in DIVERGING]
SEQUENTIAL = [n for n, c in RUNS.items() if c["ok"] and not c["use_denoising_batch"]]
BROKEN = [n for n, c in RUNS.items() if not c["ok"]]


@pytest.fixture(scope="module")
def tensors():
    return load_file(FOLDER / "cases.safetensors")


@pytest.fixture(scope="module")
def model():
    from diffusers import UNet2DConditionModel

    return DiffusersDenoiser(
        UNet2DConditionModel.from_pretrained(FOLDER / "unet").eval(), scaled_linear_alphas_cumprod()
    )


def prompt(tensors, name: str) -> Conditioning:
    return Conditioning(tensors[f"shared/prompt_{name}"])


def config_of(case, **changes) -> StreamConfig:
    """The settings of a recorded case in our words."""
    settings = {
        "t_index_list": case["t_index_list"],
        "num_inference_steps": case.get("num_inference_steps", 50),
        "guidance": case["cfg_type"],
        "cfg_scale": case["guidance_scale"],
        "delta": case["delta"],
        "seed": case.get("seed", 2),
        "frame_group": case.get("frame_buffer_size", 1),
        "from_noise": case.get("mode") == "txt2img",
        "renoise": "fixed" if case.get("do_add_noise", True) else "none",
        "consistency": True,
    }
    return StreamConfig(**{**settings, **changes})


def frames_of(case, tensors) -> torch.Tensor:
    return tensors["shared/frames" if case["mode"] == "img2img" else "shared/txt2img_noise"]


def run(case, tensors, model) -> list[torch.Tensor]:
    """Push the recorded frames and return all results by frame."""
    stream = StreamBatch(
        model, prompt(tensors, case["prompt"]), prompt(tensors, case["negative_prompt"]), config_of(case)
    )
    group, switch = case["frame_buffer_size"], case.get("prompt_switch", {"before_call": None})
    finished = []
    for call in range(case["n_calls"]):
        if call == switch["before_call"]:
            stream.update(cond=prompt(tensors, switch["prompt"]))
        finished += stream.push(frames_of(case, tensors)[call * group : (call + 1) * group])
    return [frame.latents for frame in finished + stream.drain()]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", REFERENCE)
def test_each_frame_is_denoised_as_if_alone(name, tensors, model) -> None:
    case = REFERENCE[name]
    stream = StreamBatch(model, prompt(tensors, "A"), prompt(tensors, "NEG"), config_of(case))
    finished = [f for frame in tensors["shared/frames"][:16].split(1) for f in stream.push(frame)] + stream.drain()
    assert [f.id for f in finished] == list(range(16))
    assert_close(torch.cat([f.latents for f in finished]), load_file(FOLDER / "reference.safetensors")[name])


@pytest.mark.parametrize("name", FAITHFUL)
def test_published_run(name, tensors, model) -> None:
    case, expected = RUNS[name], tensors[f"{name}/out"]
    group, delay = case["frame_buffer_size"], len(case["t_index_list"]) - 1
    got = run(case, tensors, model)
    for call in range(delay, case["n_calls"]):  # before that the published batch decodes its empty buffer
        first = (call - delay) * group
        assert_close(torch.cat(got[first : first + group]), expected[call])


@pytest.mark.parametrize("name", DIVERGING)
def test_published_feedback_is_not_copied(name, tensors, model) -> None:
    case, expected = RUNS[name], tensors[f"{name}/out"]
    got = torch.cat(run(case, tensors, model))
    recorded = expected.flatten(0, 1)
    frames = frames_of(case, tensors)
    assert (got - recorded).abs().max() > TOLERANCE * recorded.abs().max()
    if case["mode"] == "img2img":  # every frame's result depends on that frame alone
        alone = StreamBatch(model, prompt(tensors, "A"), None, config_of(case))
        last = case["n_calls"] * case["frame_buffer_size"] - 1
        result = (alone.push(frames[last : last + 1]) or alone.drain())[0]
        assert_close(got[-1:], result.latents)


@pytest.mark.parametrize("name", BROKEN)
def test_settings_that_fail_there_work_here(name, tensors, model) -> None:
    case = RUNS[name]
    got = run(case, tensors, model)
    assert len(got) == case["n_calls"] * case["frame_buffer_size"]
    assert all(torch.isfinite(latents).all() for latents in got)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_published_sequential_mode(name, tensors, model) -> None:
    """Without its batch the published code takes fresh noise, the last noised latent as the first noise, and no residual."""
    case, expected = RUNS[name], tensors[f"{name}/out"]
    group, steps = case["frame_buffer_size"], len(case["t_index_list"])
    # A zero residual is delta 0; "initialize" asks the negative prompt at every step.
    guidance = "full" if case["cfg_type"] == "initialize" else case["cfg_type"]
    config = config_of(case, guidance=guidance, delta=0.0, renoise="fresh", from_noise=True)
    frames, scale, level = frames_of(case, tensors), *first_level(case, model)
    previous = SeededNoise(case["seed"])(frames[:1])
    for call in range(case["n_calls"]):
        x = frames[call * group : (call + 1) * group]
        if case["mode"] == "img2img":
            x = previous = scale * x + level * previous[:1]
        draws = list(tensors[f"{name}/renoise_draws"][call]) if steps > 1 else []
        noise = ReplayNoise([torch.zeros(steps, *x.shape[1:]), *draws])
        stream = StreamBatch(model, prompt(tensors, "A"), prompt(tensors, "NEG"), config, noise)
        assert_close(torch.cat([f.latents for f in stream.push(x) + stream.drain()]), expected[call])


def first_level(case, model) -> tuple[float, float]:
    abar = scaled_linear_alphas_cumprod()[lcm_timesteps(case["num_inference_steps"])[case["t_index_list"][0]]]
    return float(abar.sqrt()), float((1 - abar).sqrt())


def test_turbo_text_to_image(tensors, model) -> None:
    """One step from pure noise without boundary scalings, a group of independent images."""
    config = StreamConfig(t_index_list=[0], guidance="none", from_noise=True, frame_group=3)
    stream = StreamBatch(model, prompt(tensors, "A"), None, config)
    got = stream.push(tensors["sd_turbo_txt2img/x_T"])
    assert_close(torch.cat([f.latents for f in got]), tensors["sd_turbo_txt2img/out"])


def test_image_level_with_a_tiny_vae(tensors, model) -> None:
    """Images in [0, 1] to images in [0, 1] through the pipeline: 2x - 1, encode, stream, decode, clamp(x / 2 + 0.5)."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(FOLDER / "vae_tiny").eval()
    pipe = Pipeline(model, [], vae, torch.device("cpu"), torch.float32)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = StreamConfig(t_index_list=[32, 45], guidance="self", cfg_scale=1.4, delta=0.5, consistency=True)
    stream = StreamBatch(model, prompt(tensors, "A"), None, config)
    finished = [
        f for image in images for f in stream.push(pipe.encode_image(image.movedim(0, -1)[None]))
    ] + stream.drain()
    got = pipe.decode(torch.cat([f.latents for f in finished]))
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latents
        alone = [StreamBatch(model, prompt(tensors, "A"), None, config) for _ in images]
        denoised = torch.cat([(s.push(x) + s.drain())[0].latents for s, x in zip(alone, latents.split(1))])
        expected = (vae.decode(denoised).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(got.movedim(-1, 1), expected, rtol=1e-4, atol=1e-4)


def test_recorded_time_steps_and_scalings() -> None:
    for case in RUNS.values():
        if "sub_timesteps" in case:
            grid = lcm_timesteps(case["num_inference_steps"])
            assert [grid[i] for i in case["t_index_list"]] == case["sub_timesteps"]
    skip, out = boundary_scalings(torch.tensor([19, 99, 359]))
    torch.testing.assert_close(skip, torch.tensor([6.9252e-06, 2.5508e-07, 1.9398e-08]), rtol=1e-4, atol=0)
    torch.testing.assert_close(out**2 + 0.25 * skip / 0.25, torch.ones(3), rtol=1e-5, atol=0)


class PublishedFilter(SimilarityFilter):
    """The published filter counts skips since the last forced frame, so that frames are forced at random moments."""

    def keep(self, image):
        draws, skips, draw = [], self.skips, self.rng
        self.rng = lambda: draws.append(draw()) or draws[-1]
        reference = self.reference
        kept = super().keep(image)
        self.rng = draw
        if kept and reference is not None and self.skip_probability(similarity(image, reference)) < draws[0]:
            self.skips = skips  # taken by chance, not forced
        return kept


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c["mode"] == "similarity_filter"])
def test_filter_decisions(name, tensors) -> None:
    case = CASES[name]
    draws = iter([draw for draw in case["random_draws"] if draw is not None])
    chooser = PublishedFilter(case["threshold"], case["max_skip_frame"], rng=lambda: next(draws))
    decisions, counters = [], []
    for frame in tensors[name]:
        decisions.append("process" if chooser.keep(frame) else "skip")
        counters.append(chooser.skips)
    assert decisions == case["decisions"]
    assert counters == case["skip_count_after"]
    assert next(draws, None) is None
