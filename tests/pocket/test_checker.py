"""The attribute checker reads real scenes, and only the right ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slipstream_tools.pocket import checker as reading
from slipstream_tools.pocket.scenes import COLOURS, PLACES, SHAPES, Item, Scene, render, sample_scene


@pytest.fixture(scope="module")
def checker():
    return reading.load_checker()


def drawn(objects: int, count: int = 128) -> list[Scene]:
    rng = np.random.default_rng([11, objects])
    return [sample_scene(rng, objects) for _ in range(count)]


@pytest.mark.parametrize("objects", [1, 2])
def test_real_scenes_are_read_right(checker, objects):
    scenes = drawn(objects)
    scores = reading.score(checker, render(scenes), scenes)
    assert min(scores[k] for k in ("background", "kind", "count", "colour", "place")) >= 0.98
    assert scores["shape"] >= 0.94
    assert scores["all"] >= 0.9
    assert ("shape2" in scores) == (objects == 2)


def test_scores_fall_for_other_pictures(checker):
    scenes = drawn(1)
    scores = reading.score(checker, render(scenes[::-1]), scenes)
    assert scores["background"] < 0.4
    assert scores["shape"] < 0.4
    assert scores["all"] < 0.05


def test_labels_are_the_scene():
    one = Item("star", "red", "small", "left", 0.13, 0.25, 0.5)
    two = Item("ring", "green", "large", "right", 0.2, 0.75, 0.5)
    truth = reading.labels([Scene("blue", (one,)), Scene("blue", (one, two))])
    assert list(truth) == list(reading.HEADS)
    assert truth["background"].tolist() == [COLOURS.index("blue")] * 2
    assert truth["count"].tolist() == [0, 1]
    assert truth["place"].tolist() == [list(PLACES).index("left")] * 2
    assert truth["shape2"].tolist() == [-100, SHAPES.index("ring")]
    assert truth["size2"].tolist() == [-100, 1]


def test_features_are_per_picture(checker):
    pictures = render(drawn(1, 4))
    together = reading.features(checker, pictures)
    assert together.shape == (4, 128)
    apart = torch.cat([reading.features(checker, p[None]) for p in pictures])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
