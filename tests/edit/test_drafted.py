"""The draft mode and Harmonise: exact on analytic denoisers in both noise spaces, and no more rows than said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from slipstream.core import SeededNoise
from slipstream.core.denoiser import FLOW, VE, NoiseSpace
from slipstream.core.guidance import CFG
from slipstream.core.holding import held
from slipstream.core.samplers import sample
from slipstream.edit import (
    Appearance,
    Drag,
    EditConfig,
    Move,
    Paste,
    Remove,
    Task,
    edit,
    finish,
    harmonise,
    invert,
    prepare_draft,
    prepare_harmony,
    sample_draft,
)  # fmt: skip
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.edit import small
from slipstream_tests.edit.small import box
from torch import Tensor

CONFIG = EditConfig(steps=10, mode="draft", cfg_scale=3.0, anchor_object=(0.0, 0.7), anchor_fill=(0.0, 0.3), feather=2)
COND, UNCOND = constant_cond(0.4), constant_cond(-0.2)
SPACES = pytest.mark.parametrize("space", [VE, FLOW], ids=["ve", "flow"])


def photo(model: Any, image: Tensor | None = None) -> Any:
    image = small.picture() if image is None else image
    return invert(model, small.encode(image), COND, CONFIG, small.CANVAS, image)


def plain(model: Any, source: Tensor, config: EditConfig, first: int) -> Tensor:
    """Image to image from step `first`, nothing held."""
    sigmas = config.sigmas(model.levels).float()[first:]
    x = model.space.add_noise(source, SeededNoise(3)(source), sigmas[0])
    return sample("euler", CFG(model, COND, UNCOND, config.cfg_scale), x, sigmas, model.space)


@SPACES
def test_each_cell_is_image_to_image_from_its_own_level_and_the_rest_is_the_photo(space: NoiseSpace) -> None:
    """Pixels are independent under this denoiser, so that every cell has a closed form of its own."""
    model = GaussianDenoiser(std=0.5, space=space)
    base = photo(model)
    assert (model.rows, base.steps) == (0, 0)
    prepared = replace(prepare_draft(Move(box(), 40.0, 10.0), base, CONFIG, small.encode), known=None)
    assert set(prepared.hold.unique().tolist()) == pytest.approx([0.3, 0.7, 1.0])
    result = sample_draft(model, prepared, COND, UNCOND, SeededNoise(3))
    assert (model.rows, model.calls, prepared.calls) == (14, 7, 7)
    for first, share in ((3, 0.3), (7, 0.7)):
        cells = (prepared.hold == torch.tensor(share)).expand_as(base.clean)
        torch.testing.assert_close(result.latents[cells], plain(model, prepared.source, CONFIG, first)[cells])
    still = (prepared.hold == 1).expand_as(base.clean)
    assert torch.equal(result.latents[still], base.clean[still])
    assert 0.3 < float(still.float().mean()) < 0.9


@SPACES
def test_nothing_is_asked_of_the_network_where_everything_is_held(space: NoiseSpace) -> None:
    model = GaussianDenoiser(space=space)
    config = CONFIG.replace(anchor_object=(0.0, 1.0), anchor_fill=(0.0, 1.0))
    base = photo(model)
    result = edit(model, base, Move(box(), 40.0), COND, UNCOND, config, SeededNoise(0), encode=small.encode)
    assert model.rows == 0
    assert result.draft_latents is not None
    free = result.latents != base.clean
    assert torch.equal(result.latents[free], result.draft_latents[free])


@SPACES
def test_the_same_seed_gives_the_same_result_and_cfg_1_half_the_rows(space: NoiseSpace) -> None:
    model = GaussianDenoiser(std=0.5, space=space)
    base, config = photo(model), CONFIG.replace(cfg_scale=1.0)
    runs = [
        edit(model, base, Move(box(), 40.0), COND, UNCOND, config, SeededNoise(s), encode=small.encode)
        for s in (1, 1, 2)
    ]
    assert model.rows == 3 * 7
    assert torch.equal(runs[0].latents, runs[1].latents)
    assert not torch.equal(runs[0].latents, runs[2].latents)


def tasks_of(base: Any, other: Any) -> dict[str, Task]:
    return {
        "move": Move(box(), 40.0, 8.0, 0.9, angle=20.0),
        "paste": Paste(other, box(), 40.0, 8.0),
        "appearance": Appearance(box(), other, box(4, 60, 24, 90)),
        "drag warp": Drag(box(8, 8, 56, 72), [((28.0, 28.0), (44.0, 32.0))]),
        "drag energy": Drag(box(8, 8, 56, 72), [((28.0, 28.0), (44.0, 32.0))], "energy"),
    }


@SPACES
@pytest.mark.parametrize("kind", ["move", "paste", "appearance", "drag warp", "drag energy"])
def test_every_task_changes_its_own_region_only(space: NoiseSpace, kind: str) -> None:
    model = GaussianDenoiser(std=0.5, space=space)
    image, other = small.picture(), small.picture().flip(2)
    base = photo(model)
    task = tasks_of(base, photo(model, other))[kind]
    result = edit(model, base, task, COND, UNCOND, CONFIG, SeededNoise(0), encode=small.encode)
    out = finish(image, result, small.decode)
    outside = result.mask[0] == 0
    assert torch.equal(out[0][outside], image[0][outside])
    assert float((out - image)[0][~outside].abs().max()) > 0.1
    assert bool(torch.isfinite(out).all())
    assert any("by warp" in note for note in result.notes) == (kind == "drag energy")


def test_an_appearance_begins_with_the_other_objects_colours_and_none_of_its_surroundings() -> None:
    other = torch.zeros(1, 64, 96, 3)
    other[:, 20:40, 50:90] = torch.tensor([0.0, 1.0, 0.0])
    there = torch.zeros(64, 96)
    ys, xs = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    there[((ys - 29.5).abs() / 9 + (xs - 69.5).abs() / 19) <= 1] = 1  # a rhombus: its box has empty corners
    model = GaussianDenoiser()
    prepared = prepare_draft(Appearance(box(), photo(model, other), there), photo(model), CONFIG, small.encode)
    assert prepared.draft is not None
    inside = box() > 0
    torch.testing.assert_close(
        prepared.draft[0][inside], torch.tensor([0.0, 1.0, 0.0]).expand(int(inside.sum()), 3), atol=0.02, rtol=0
    )
    torch.testing.assert_close(prepared.draft[0][~inside], small.picture()[0][~inside])
    assert not bool(prepared.restore[0][inside].any())
    assert set(prepared.hold.unique().tolist()) == pytest.approx([0.3, 1.0])


def test_an_image_model_with_frames_is_as_one_without() -> None:
    """Qwen-Image has latents (1, C, 1, h, w)."""

    class Frames:
        def __init__(self) -> None:
            self.flat = GaussianDenoiser(std=0.5, space=FLOW)
            self.space, self.levels, self.device = self.flat.space, self.flat.levels, "cpu"

        def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            return self.flat(x.squeeze(2), sigma, cond).unsqueeze(2)

    model, image = Frames(), small.picture()
    flat = edit(
        model.flat, photo(model.flat), Move(box(), 40.0), COND, UNCOND, CONFIG, SeededNoise(0), encode=small.encode
    )
    base = invert(model, small.encode(image).unsqueeze(2), COND, CONFIG, small.CANVAS, image)  # type: ignore[arg-type,var-annotated]
    deep = edit(
        model, base, Move(box(), 40.0), COND, UNCOND, CONFIG, SeededNoise(0), encode=lambda i: small.encode(i).unsqueeze(2)  # type: ignore[arg-type]
    )  # fmt: skip
    assert deep.latents.shape == (1, 4, 1, 8, 12)
    torch.testing.assert_close(deep.latents.squeeze(2), flat.latents)
    cells = edit(model, base, Move(box(), 40.0), COND, UNCOND, CONFIG, SeededNoise(0))  # type: ignore[arg-type]
    assert cells.latents.shape == (1, 4, 1, 8, 12)
    with pytest.raises(ValueError, match="got 3 frames"):
        invert(model, torch.zeros(1, 4, 3, 8, 12), COND, CONFIG)  # type: ignore[arg-type]


def test_the_mode_follows_the_model_and_what_the_photo_was_prepared_for() -> None:
    model = GaussianDenoiser()
    assert invert(model, torch.zeros(1, 4, 8, 12), COND).steps == 0
    with pytest.raises(ValueError, match=r"mode fine.*one mode"):
        edit(model, photo(model), Move(box(), 40.0), config=CONFIG.replace(mode="fine"))
    unet, inversion = small.inverted()
    assert inversion.steps == small.FAST.steps
    rows = unet.rows
    drafted = edit(unet, inversion, Move(box(), 40.0), config=small.FAST.replace(mode="draft"), encode=small.encode)
    assert unet.rows - rows == 4
    assert bool(torch.isfinite(drafted.latents).all())
    with pytest.raises(ValueError, match="Use one mode"):
        edit(unet, inversion, Paste(photo(model), box(), 40.0), config=small.FAST)


def test_an_appearance_without_pixels_is_refused() -> None:
    model = GaussianDenoiser()
    base = invert(model, torch.zeros(1, 4, 8, 12), COND, CONFIG)
    with pytest.raises(ValueError, match="Give `image`"):
        edit(model, base, Appearance(box(), base, box(4, 60, 24, 90)), config=CONFIG)


def test_stopping_passes_through() -> None:
    class StopError(Exception):
        pass

    def stop(step: Any) -> None:
        if step.index == 2:
            raise StopError

    model = GaussianDenoiser()
    with pytest.raises(StopError):
        edit(model, photo(model), Move(box(), 40.0), COND, UNCOND, CONFIG, callback=stop, encode=small.encode)
    assert model.calls == 2


@SPACES
def test_what_is_held_is_shown_at_its_level_and_given_back(space: NoiseSpace) -> None:
    latents, noise, mask = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return x * 0 + 7

    x, sigma = torch.randn(1, 4, 8, 8), torch.tensor(0.3)
    out = held(denoise, space, latents, noise, lambda sigma: mask)(x, sigma)
    assert torch.equal(seen[0][..., :4], space.add_noise(latents, noise, sigma)[..., :4])
    assert torch.equal(seen[0][..., 4:], x[..., 4:])
    assert torch.equal(out[..., :4], latents[..., :4])
    assert bool((out[..., 4:] == 7).all())


@SPACES
def test_harmonise_leaves_everything_beyond_the_seam_and_paints_seam_and_object_anew(space: NoiseSpace) -> None:
    model, image = GaussianDenoiser(std=0.5, space=space), small.picture()
    result = harmonise(
        model, image, box(), COND, UNCOND, small.CANVAS, small.encode, CONFIG, seam=8, noise=SeededNoise(0)
    )
    out = finish(image, result, small.decode)
    assert model.rows == 14
    near = box(8, 8, 48, 48) > 0
    assert torch.equal(out[0][result.mask[0] == 0], image[0][result.mask[0] == 0])
    assert bool((result.mask[0][box(4, 4, 52, 52) == 0] == 0).all())
    assert float((out - image)[0][near].abs().max()) > 0.1
    hold = prepare_harmony(image, box(), small.CANVAS, small.encode, CONFIG, seam=8).hold[0, 0]
    assert hold[3, 3] == pytest.approx(0.7)  # the middle of the box of 3 x 3 cells
    assert hold[2, 2] == pytest.approx(0.3)
    assert hold[1, 1] == pytest.approx(0.3)
    assert hold[6, 6] == 1


@pytest.mark.parametrize(
    ("mask", "message"), [(torch.zeros(64, 96), "empty mask"), (torch.ones(10, 10), "image's size 96 x 64")]
)
def test_harmonise_says_what_is_wrong_with_a_mask(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_harmony(small.picture(), mask, small.CANVAS, small.encode)


def test_where_the_fill_goes_on_as_its_surroundings_do_it_is_followed_as_long_as_what_is_carried() -> None:
    image = torch.full((1, 64, 96, 3), 0.3)
    image[:, 16:40, 16:40] = torch.tensor([0.9, 0.2, 0.1])
    model = GaussianDenoiser()
    prepared = prepare_draft(Remove(box()), photo(model, image), CONFIG, small.encode)
    assert set(prepared.hold.unique().tolist()) == pytest.approx([0.7, 1.0])
    assert prepared.draft is not None
    assert torch.equal(prepared.draft, torch.full_like(prepared.draft, 0.3))
    grain = image + 0.3 * torch.rand(1, 64, 96, 1, generator=torch.Generator().manual_seed(0))
    doubted = prepare_draft(Remove(box()), photo(model, grain), CONFIG, small.encode)
    assert set(doubted.hold.unique().tolist()) == pytest.approx([0.3, 1.0])


@SPACES
def test_changes_of_what_is_known_count_beyond_the_networks_own_error_only(space: NoiseSpace) -> None:
    """A network that is off by as much everywhere is not believed, one that is off in one place of the object is."""

    class Off(GaussianDenoiser):
        extra = torch.zeros(1, 1, 8, 12)

        def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            return (base.clean + 0.2 + self.extra).expand(len(x), -1, -1, -1)

    base = photo(GaussianDenoiser())
    model = Off(space=space)
    prepared = prepare_draft(Paste(base, box()), base, CONFIG, small.encode)  # onto itself: the draft is the photo
    assert torch.equal(sample_draft(model, prepared, COND, UNCOND, SeededNoise(0)).latents, base.clean)
    model.extra = torch.zeros(1, 1, 8, 12)
    model.extra[..., 2, 4] = 2.0
    changed = sample_draft(model, prepared, COND, UNCOND, SeededNoise(0)).latents - base.clean
    expected = torch.zeros_like(changed)
    expected[..., 2, 4] = 2.2
    torch.testing.assert_close(changed, expected)


@pytest.mark.parametrize("mode", ["draft", "fine"])
def test_what_is_removed_is_gone_and_nothing_else_changes(mode: str) -> None:
    config = CONFIG.replace(mode=mode)
    model = GaussianDenoiser(std=0.5) if mode == "draft" else small.network()
    image = small.picture()
    base = invert(model, small.encode(image), small.cond(), config, small.CANVAS, image)
    cond = COND if mode == "draft" else small.cond()
    result = edit(model, base, Remove(box()), cond, None, config, SeededNoise(0), encode=small.encode)
    out = finish(image, result, small.decode)
    outside = result.mask[0] == 0
    assert torch.equal(out[0][outside], image[0][outside])
    assert result.draft is not None
    assert float(result.draft[0, 16:40, 16:40, 0].max()) < 0.1  # the box was 0.9 red
    with pytest.raises(ValueError, match="leaves a part of the image free"):
        edit(model, base, Remove(torch.ones(64, 96)), cond, None, config, encode=small.encode)
    with pytest.raises(ValueError, match="Remove and Move on the same one"):
        edit(model, base, Remove(box()) + Move(box(), 30.0), cond, None, config, encode=small.encode)


def test_an_edit_that_the_network_leaves_as_it_is_gives_the_draft_exactly() -> None:
    """Also with an autoencoder whose cells reach into each other."""

    class Agrees(GaussianDenoiser):
        def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            return prepared.source.expand(len(x), -1, -1, -1)

    def encode(image: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(small.encode(image), 3, 1, 1)

    image = small.picture()
    base = invert(Agrees(), encode(image), COND, CONFIG, small.CANVAS, image)
    prepared = prepare_draft(Move(box(), 40.0, 10.0), base, CONFIG, encode)
    result = sample_draft(Agrees(), prepared, COND, UNCOND, SeededNoise(0))
    assert result.draft is not None
    out, whole = finish(image, result, small.decode), result.mask[0] == 1
    torch.testing.assert_close(out[0][whole], result.draft[0][whole], atol=1e-6, rtol=0)


class Spoiling(GaussianDenoiser):
    """Sees the latents that are followed as they are, and the cells of `spoiled` (1, 1, h, w) brighter by 1."""

    def __init__(self, source: Tensor, spoiled: Tensor) -> None:
        super().__init__()
        self.seen = source + spoiled

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self.seen.expand_as(x)


@pytest.mark.parametrize(("mask", "small_object"), [(box(28, 28, 34, 35), True), (box(16, 16, 72, 72), False)])
def test_an_object_too_small_to_show_the_networks_error_inside_keeps_its_pixels(
    mask: Tensor, small_object: bool
) -> None:
    """The network spoils all cells that an object touches, or the rim of a large one: only the latter may be meant."""
    base = photo(GaussianDenoiser())
    prepared = prepare_draft(Paste(base, mask, 8.0, 8.0), base, CONFIG, small.encode)
    assert prepared.inside is not None
    assert prepared.known is not None
    rim = prepared.known.float() * (1 - prepared.inside[:, 1:].float().amax(1, keepdim=True))
    spoiled = prepared.known.float() if small_object else rim
    assert bool(spoiled.any())
    result = sample_draft(Spoiling(prepared.source, spoiled), prepared, COND)
    assert torch.equal(result.latents, prepared.source) == small_object
