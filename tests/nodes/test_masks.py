"""What nodes hand on of a mask."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from slipstream.core.drawing import Shape
from slipstream.core.images import read_image, read_mask
from slipstream.cow.photos import PHOTOS
from slipstream.lmd import FillConfig
from slipstream.lmd import LatentFill as Fill
from slipstream.nodes.canvas import drawn_mask
from slipstream.nodes.cow import ExamplePhoto
from slipstream.nodes.edit import ChangeAppearance, DragPoints
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


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 64, 64), torch.full((1, 30, 40), 0.05)])
def test_an_empty_mask_beside_what_is_painted_counts_as_none(mask: torch.Tensor | None) -> None:
    """Load Image gives 64 x 64 black pixels for a photo without transparency."""
    image, expected = torch.rand(1, 30, 40, 3), torch.zeros(1, 30, 40)
    expected[:, 5:15, 10:30] = 1
    drawing = '{"size": [40, 30], "shapes": [{"box": [10, 5, 30, 15]}]}'
    assert torch.equal(drawn_mask("Move", drawing, mask, image), expected)
    assert torch.equal(drawn_mask("Move", drawing, mask, None), expected)
    area = [Shape("box", ((10.0, 5.0), (30.0, 15.0)))]
    assert torch.equal(drawn_mask("Drag", "", mask, image, otherwise=area), expected)


def test_a_painted_mask_stands_beside_the_shapes_that_count_without_one() -> None:
    mask = torch.zeros(1, 30, 40)
    mask[:, 20:25, 20:25] = 1
    area = [Shape("box", ((10.0, 5.0), (30.0, 15.0)))]
    assert torch.equal(drawn_mask("Drag", "", mask, torch.rand(1, 30, 40, 3), otherwise=area), mask)


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 64, 64), torch.ones(1, 30, 40)], ids=["none", "empty", "mask"])
@pytest.mark.parametrize("drawing", ['"shapes": []', '"shapes": [{"box": [1, 1, 9, 9]}]'], ids=["points", "shapes"])
def test_what_was_drawn_on_an_image_of_another_size_is_named(
    caplog: pytest.LogCaptureFixture, drawing: str, mask: torch.Tensor | None
) -> None:
    """Points alone have a size too: on another photo they lie elsewhere."""
    pull = functools.partial(DragPoints().make, "[[8, 9]]", "[[20, 9]]", "warp", mask, None, torch.rand(1, 30, 40, 3))
    for size, said in (("[40, 30]", 0), ("[20, 15]", 1), ("null", 0)):
        caplog.clear()
        pull(f'{{"size": {size}, {drawing}}}')
        found = [
            r.message
            for r in caplog.records
            if "`canvas` was drawn on 20 x 15 pixels, but the image has 40 x 30" in r.message
        ]
        assert len(found) == said, size


def test_a_message_names_the_canvas_that_is_empty() -> None:
    with pytest.raises(ValueError, match="no `mask` and an empty `canvas`"):
        drawn_mask("Appearance", "", None, None)
    with pytest.raises(ValueError, match="no `reference_mask` and an empty `reference_canvas`"):
        drawn_mask("Appearance", "", None, None, "reference_mask")
    assert "`reference_canvas` as JSON" in str(ChangeAppearance.VALIDATE_INPUTS("", "{"))
    assert "`canvas` as JSON" in str(ChangeAppearance.VALIDATE_INPUTS("{", ""))
    assert ChangeAppearance.VALIDATE_INPUTS("", None) is True
