"""The batched samplers that measure the pocket model agree with diffusers."""

from __future__ import annotations

import pytest
import torch
from slipstream_tools.pocket import sampling

WORDS = [
    "a large red circle in the center on a white background",
    "a small blue star on the left on a yellow background",
]


@pytest.fixture(scope="module")
def pipe(root):
    pipe = sampling.load_pipeline(root / "pocket")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_ddim_equals_the_pipeline(pipe):
    noise = sampling.start_noise(pipe.unet, 2, seed=0)
    ours = sampling.ddim_latents(pipe, WORDS, noise, steps=5, cfg_scale=3.0)
    theirs = pipe(WORDS, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent").images
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_noise_of_a_picture_does_not_depend_on_how_many(pipe):
    assert torch.equal(sampling.start_noise(pipe.unet, 5, 3)[:2], sampling.start_noise(pipe.unet, 2, 3))


def test_contact_sheet_holds_every_picture():
    sheet = sampling.contact_sheet(torch.ones(3, 3, 64, 64), ["red"] * 3, columns=2)
    assert sheet.size == (2 * 68, 2 * (64 + 4 + 58))
