"""Scenes, captions and the pixel check: deterministic, exact, and in agreement with each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from slipstream_tools.pocket import scenes
from slipstream_tools.pocket.scenes import Item, Scene


def draw(seed: int, count: int, objects: int | None = None) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, objects) for _ in range(count)]


def test_same_seed_gives_same_scenes_captions_and_pixels():
    one, two = draw(3, 8), draw(3, 8)
    assert one == two
    assert torch.equal(scenes.render(one, 64), scenes.render(two, 64))
    words = [[scenes.caption(s, np.random.default_rng(1), full=False) for s in part] for part in (one, two)]
    assert words[0] == words[1]
    assert one != draw(4, 8)


@pytest.mark.parametrize("objects", [1, 2])
def test_number_of_objects_is_as_asked(objects):
    assert {len(s.items) for s in draw(0, 40, objects)} == {objects}


def test_a_mixture_has_both_and_every_attribute():
    many = draw(0, 600)
    assert {len(s.items) for s in many} == {1, 2}
    assert {s.background for s in many} == set(scenes.COLOURS)
    assert {s.kind for s in many} == {"plain", "gradient"}
    items = [i for s in many for i in s.items]
    assert {i.shape for i in items} == set(scenes.SHAPES)
    assert {i.place for i in items} == set(scenes.PLACES)


def test_objects_differ_in_colour_from_background_and_each_other():
    for scene in draw(1, 200):
        colours = [scene.background, *(i.colour for i in scene.items)]
        assert len(set(colours)) == len(colours)


def test_captions_use_only_the_vocabulary():
    rng = np.random.default_rng(0)
    for scene in draw(2, 200):
        for full in (True, False):
            assert set(scenes.caption(scene, rng, full).split()) <= set(scenes.VOCABULARY)


def test_a_full_caption_says_everything():
    scene = Scene("blue", (Item("star", "red", "small", "left", 0.13, 0.25, 0.5),), kind="gradient")
    assert scenes.caption(scene) == "a small red star on the left on a blue gradient background"
    pair = Scene("white", (scene.items[0], Item("ring", "green", "large", "right", 0.2, 0.74, 0.5)))
    wanted = "a small red star on the left and a large green ring on the right on a white background"
    assert scenes.caption(pair) == wanted


def test_a_random_caption_needs_a_generator():
    with pytest.raises(ValueError, match="numpy Generator"):
        scenes.caption(draw(0, 1)[0], full=False)


@pytest.mark.parametrize("objects", [0, 3, "two"])
def test_other_numbers_of_objects_are_refused(objects):
    with pytest.raises(ValueError, match="1, 2 or None"):
        scenes.sample_scene(np.random.default_rng(0), objects)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi),
        ("square", 1.72**2),
        ("triangle", 3 * math.sqrt(3) * 0.55**2),
        ("ring", math.pi * (1.03**2 - 0.53**2)),
        ("cross", 2 * 2.1 * 0.68 - 0.68**2),
        ("star", 10 * 0.5 * 1.15**2 * 0.45 * math.sin(math.pi / 5)),
    ],
)
def test_areas_are_those_of_geometry(shape, area):
    radius = 0.25
    mask = scenes.coverage(Item(shape, "red", "large", "center", radius, 0.5, 0.5), 256)
    assert mask.mean().item() == pytest.approx(area * radius**2, rel=0.02)


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="circle"):
        scenes.coverage(Item("blob", "red", "large", "center", 0.2, 0.5, 0.5), 32)


def test_pictures_have_range_and_place():
    scene = Scene("black", (Item("circle", "white", "small", "left", 0.13, 0.25, 0.5),))
    picture = scenes.render([scene], 64)[0]
    assert picture.shape == (3, 64, 64)
    assert picture.min() >= -1
    assert picture.max() <= 1
    assert picture[:, 32, 16].min() > 0.9 > -0.7 > picture[:, 32, 48].max()


@pytest.mark.parametrize("res", [64, 128])
def test_pixel_check_agrees_with_the_renderer(res):
    drawn = draw(5, 96, 1)
    for scene, seen in zip(drawn, scenes.pixel_check(scenes.render(drawn, res))):
        (item,) = scene.items
        assert seen == {"background": scene.background, "colour": item.colour, "place": item.place}


def test_pixel_check_survives_a_flat_picture():
    seen = scenes.pixel_check(torch.zeros(1, 3, 64, 64))
    assert set(seen[0]) == {"background", "colour", "place"}
