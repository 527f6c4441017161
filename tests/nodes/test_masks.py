"""What nodes hand on of a mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from slipstream.core.images import read_image, read_mask
from slipstream.cow.photos import PHOTOS
from slipstream.lmd import FillConfig
from slipstream.lmd import LatentFill as Fill
from slipstream.nodes.cow import ExamplePhoto
from slipstream.nodes.lmd import LatentFill
from slipstream_tests.noisy_masks import NOISY, noisy


@pytest.mark.parametrize("kind", NOISY)
def test_the_noise_mask_of_latent_fill_is_clean(kind: str) -> None:
    form = SimpleNamespace(latent_channels=4, scale_factor=1.0)
    model = SimpleNamespace(
        model=SimpleNamespace(latent_format=form, process_latent_in=lambda x: x, process_latent_out=lambda x: x)
    )
    shape = FillConfig(4, 8, 12, 2, dim=16, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    latent, mask = {"samples": torch.randn(1, 4, 8, 12)}, torch.zeros(1, 64, 96)
    mask[:, 16:40, 24:64] = 1
    [filled] = LatentFill().fill(model, latent, noisy(mask, kind), "", Fill(shape))
    assert torch.equal(filled["noise_mask"], mask[:, None])
    outside = mask[0, ::8, ::8] == 0
    assert torch.equal(filled["samples"][..., outside], latent["samples"][..., outside])
    assert bool((filled["samples"] != latent["samples"])[..., ~outside].all())


def test_the_example_photo_is_read_as_the_library_reads_it() -> None:
    image, keep = ExamplePhoto().load("astronaut")
    assert torch.equal(image, read_image(PHOTOS["astronaut"][0]))
    assert torch.equal(keep, read_mask(PHOTOS["astronaut"][1]))
