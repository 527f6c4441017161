"""The quality bar on exact Gaussian fields: a small version of benchmarks/cow_quality.py."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def quality(root):
    """benchmarks/cow_quality.py and its neighbours, by path and for this module only."""
    folder = str(root / "benchmarks")
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location("cow_quality", root / "benchmarks" / "cow_quality.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["cow_quality"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)


def test_the_default_meets_the_bar_and_the_alternatives_do_not(quality):
    """Seed RMSE at most 0.12, seam after paste at most 1.3, background variance at least 0.75, in about 36 network calls."""
    methods = ("COW (default)", "paste + img2img 0.7", "masked replacement, eta 0", "RePaint, 6 levels x 5")
    found = {
        name: {key: sum(values) / len(values) for key, values in row.items()}
        for name, row in quality.measure_fields(64, 2, methods).items()
    }
    ours = found["COW (default)"]
    assert ours["calls"] == 36
    assert ours["seed RMSE"] <= 0.12
    assert ours["seam after paste"] <= 1.3
    assert ours["background variance"] >= 0.75
    for name in methods[1:]:
        assert (
            found[name]["seed RMSE"] > 0.12
            or found[name]["seam after paste"] > 1.3
            or found[name]["background variance"] < 0.75
        ), name
    # The measures know the truth.
    truth = found["the fields themselves"]
    assert truth["seed RMSE"] == 0
    assert truth["seam"] == pytest.approx(1, abs=0.06)
    assert truth["background variance"] == pytest.approx(1, abs=0.06)
    assert truth["Mahalanobis"] == pytest.approx(1, abs=0.03)


SIDE, BASE = 64, 24


def one_scene(quality, other: bool):
    """A subject of 16 x 16 pixels on plain ground, with or without its twin 12 pixels beside it."""
    mask, empty = torch.zeros(1, SIDE, SIDE), torch.full((1, SIDE, SIDE, 3), 0.2)
    mask[:, BASE : BASE + 16, BASE : BASE + 16] = 1
    if other:
        empty[:, BASE : BASE + 16, BASE + 28 : BASE + 36] = 0.9
    truth = torch.where(mask[..., None] == 1, torch.tensor(0.9), empty)
    return quality.Kept(None, truth, empty, mask, [""], None, {}, {})


@pytest.mark.parametrize("wider", [0, 1, 3, 5])
@pytest.mark.parametrize("twin", [False, True])
def test_growth_is_the_area_by_which_a_subject_is_larger(quality, wider, twin):
    scenes = one_scene(quality, twin)
    image = scenes.truth.clone()
    image[:, BASE - wider : BASE + 16 + wider, BASE - wider : BASE + 16 + wider] = 0.9
    assert quality.growth(scenes, image) == pytest.approx([100 * ((16 + 2 * wider) ** 2 / 16**2 - 1)])


def test_what_belongs_to_the_scene_is_no_growth(quality):
    """The twin drawn nearer to the subject or larger, another object there, or the ground where the twin should be."""
    scenes = one_scene(quality, True)
    for columns, colour in ((slice(-12 + 36, -4 + 36), 0.9), (slice(24, 36), 0.9), (slice(28, 36), 0.2)):
        image = scenes.truth.clone()
        image[:, BASE : BASE + 16, BASE + 16 :][:, :, : SIDE - BASE - 16] = 0.2
        image[:, BASE : BASE + 16, BASE + columns.start : BASE + columns.stop] = colour
        assert quality.growth(scenes, image) == [0]
    scenes.empty[:, :8] = torch.tensor([0.9, 0.1, 0.1])
    image = scenes.empty.clone()
    image[:, BASE - 4 : BASE] = torch.tensor([0.9, 0.1, 0.1])
    assert quality.growth(scenes, image) == [0]


def test_a_blurred_ground_is_no_growth(quality):
    """A checkered ground whose fields run into each other takes the colour of a subject between them."""
    scenes = one_scene(quality, False)
    fields = (torch.arange(SIDE) // 8)[:, None] + (torch.arange(SIDE) // 8)
    scenes.empty[:] = torch.where(fields[..., None] % 2 == 0, 0.2, 0.9)
    scenes.truth[:] = torch.where(scenes.masks[..., None] == 1, 0.55, scenes.empty)
    image = scenes.truth.clone()
    image[:, :, BASE + 16 : BASE + 24] = 0.55
    assert quality.growth(scenes, image) == [0]


def test_a_second_subject_near_the_first_is_growth(quality):
    scenes = one_scene(quality, False)
    image = scenes.truth.clone()
    image[:, BASE : BASE + 16, BASE + 18 : BASE + 26] = 0.9
    assert quality.growth(scenes, image) == [50]
