"""The bundled model follows captions: bars with a margin below the measured figures (benchmarks/pocket_captions.py), fixed seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slipstream_tools.pocket import checker as reading
from slipstream_tools.pocket import sampling
from slipstream_tools.pocket.scenes import caption, pixel_check, sample_scene

COUNT = 32


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(2024)
    return [sample_scene(rng, 1) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def captions(scenes):
    return [caption(s) for s in scenes]


@pytest.fixture(scope="module")
def teacher_pictures(root, captions):
    pipe = sampling.load_pipeline(root / "pocket")
    noise = sampling.start_noise(pipe.unet, COUNT, seed=0)
    return sampling.decode(pipe.vae, sampling.ddim_latents(pipe, captions, noise, steps=10, cfg_scale=3.0))


def test_teacher_draws_what_the_caption_says(teacher_pictures, scenes):
    scores = reading.score(reading.load_checker(), teacher_pictures, scenes)
    bars = {"background": 0.94, "colour": 0.94, "place": 0.94, "shape": 0.85}
    assert {k: v for k, v in scores.items() if v < bars.get(k, 0)} == {}


def test_pixels_alone_say_the_same(teacher_pictures, scenes):
    seen = pixel_check(teacher_pictures)
    assert np.mean([s["background"] == scene.background for s, scene in zip(seen, scenes)]) >= 0.85
    assert np.mean([s["colour"] == scene.items[0].colour for s, scene in zip(seen, scenes)]) >= 0.85
    assert np.mean([s["place"] == scene.items[0].place for s, scene in zip(seen, scenes)]) >= 0.85


def test_the_caption_matters(teacher_pictures, scenes):
    scores = reading.score(reading.load_checker(), teacher_pictures, scenes[::-1])
    assert scores["background"] < 0.5


def test_pictures_are_finite(teacher_pictures):
    assert teacher_pictures.shape == (COUNT, 3, 128, 128)
    assert teacher_pictures.isfinite().all()
    assert torch.stack([p.std() for p in teacher_pictures]).min() > 0.01


@pytest.fixture(scope="module")
def student_pictures(root, captions):
    pipe = sampling.load_pipeline(root / "pocket", student=True)
    noise = sampling.start_noise(pipe.unet, COUNT, seed=0)
    return {n: sampling.decode(pipe.vae, sampling.lcm_latents(pipe, captions, noise, n, seed=0)) for n in (4, 1)}


@pytest.mark.parametrize("steps", [4, 1])
def test_student_draws_what_the_caption_says_in_few_steps(student_pictures, scenes, steps):
    scores = reading.score(reading.load_checker(), student_pictures[steps], scenes)
    bars = {
        4: {"background": 0.94, "colour": 0.9, "place": 0.94, "shape": 0.8},
        1: {"background": 0.94, "colour": 0.9, "place": 0.94, "shape": 0.8},
    }
    assert {k: v for k, v in scores.items() if v < bars[steps].get(k, 0)} == {}
