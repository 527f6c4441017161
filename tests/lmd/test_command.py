"""`slipstream lmd` on the bundled model."""

from __future__ import annotations

import pathlib

import pytest
import torch
from slipstream.cli import main
from slipstream.core.images import read_image, save_image
from slipstream.lmd import LatentFill
from slipstream_tools.pocket.scenes import render, sample_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Eight scenes of 128 x 128 pixels, and a mask whose white box is x 32..96, y 32..96."""
    import numpy as np

    root = tmp_path_factory.mktemp("lmd")
    rng = np.random.default_rng(0)
    for index, picture in enumerate(render([sample_scene(rng) for _ in range(8)])):
        save_image((picture.movedim(0, -1)[None] + 1) / 2, root / "scenes" / f"{index}.png")
    mask = torch.zeros(1, 128, 128, 3)
    mask[:, 32:96, 32:96] = 1
    save_image(mask, root / "mask.png")
    return root


def lmd(part: str, *words: object) -> int:
    return main(["lmd", part, *map(str, words)])


def changed(one: pathlib.Path, other: pathlib.Path) -> torch.Tensor:
    return (read_image(one) - read_image(other)).abs().amax(-1)[0]


def test_masks_prints_the_ratios_and_draws_them(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        lmd("masks", "--kind", "piecewise", "--steps", 7, "--direction", "increasing", "--out", tmp_path / "m.png") == 0
    )
    assert capsys.readouterr().out.splitlines()[0] == "0.150 0.400 0.400 0.575 0.750 0.750 0.750"
    assert read_image(tmp_path / "m.png").shape[1] > 400


def test_regenerate_keeps_to_its_mask(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = folder / "scenes" / "0.png"
    common = ("--image", image, "--prompt", "a red circle", "--steps", 2, "--rounds", 2, "--strength", 1)
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        assert (
            lmd("regenerate", *common, "--mask", folder / "mask.png", "--seed", seed, "--out", tmp_path / f"{out}.png")
            == 0
        )
    assert "8 network rows in 4 calls" in capsys.readouterr().err
    assert lmd("regenerate", *common, "--low", 0, "--high", 0, "--out", tmp_path / "same.png") == 0
    assert changed(tmp_path / "a.png", tmp_path / "b.png").max() == 0
    assert changed(tmp_path / "a.png", tmp_path / "c.png").max() > 0.05
    difference = changed(tmp_path / "a.png", image)
    assert difference[40:88, 40:88].mean() > 0.02
    difference[32:96, 32:96] = 0
    assert difference.max() == 0


def test_train_then_fill_then_resume_is_instant(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill, image = tmp_path / "f.safetensors", folder / "scenes" / "1.png"
    train = (
        "--images",
        folder / "scenes",
        "--out",
        fill,
        "--width",
        128,
        "--height",
        128,
        "--patch",
        2,
        "--steps",
        5,
        "--batch",
        4,
    )
    assert lmd("train", *train, "--chart", tmp_path / "chart.png") == 0
    assert LatentFill.load(fill).config.latents.startswith("4 channels, scale ")
    assert len(list((tmp_path / "f.cache").iterdir())) == 8
    stamp = fill.stat().st_mtime_ns
    assert lmd("train", *train) == 0
    assert fill.stat().st_mtime_ns == stamp
    common = ("--fill", fill, "--image", image, "--mask", folder / "mask.png")
    assert lmd("fill", *common, "--steps", 0, "--out", tmp_path / "only.png") == 0
    assert (
        lmd("fill", *common, "--steps", 2, "--strength", 1, "--prompt", "a red circle", "--out", tmp_path / "both.png")
        == 0
    )
    capsys.readouterr()
    assert changed(tmp_path / "only.png", tmp_path / "both.png")[40:88, 40:88].mean() > 0.01
    assert changed(tmp_path / "both.png", image)[:32].max() == 0
    assert lmd("train", *train, "--seed", 1) == 2
    assert "other values of seed" in capsys.readouterr().err
    assert lmd("train", *train, "--seed", 1, "--anew") == 0


def test_influence_and_stretch_report_and_draw(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = folder / "scenes" / "0.png", folder / "scenes" / "1.png"
    assert (
        lmd("influence", "--before", one, "--after", one, "--mask", folder / "mask.png", "--out", tmp_path / "i.png")
        == 0
    )
    assert "0% of the difference lies outside; mean inside 0" in capsys.readouterr().out
    assert lmd("stretch", "--image", one, "--drag", "64,64 -> 104,64", "--radius", 12, "--out", tmp_path / "d.png") == 0
    assert "map 1: largest stretch x3.02" in capsys.readouterr().out
    assert lmd("stretch", "--image", one, "--next", other, "--out", tmp_path / "s.png") == 0
    assert all((tmp_path / f"{name}.png").exists() for name in "ids")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("stretch", "--image", "{one}"), "Expected `--drag` or `--next`"),
        (("stretch", "--image", "none.png", "--drag", "1,1->2,2"), "no such file"),
        (("fill", "--fill", "none.safetensors", "--image", "{one}", "--mask", "{one}"), "Train one first"),
        (("train", "--images", "nowhere", "--out", "x.safetensors"), "Expected `images` to be a folder of images"),
        (("regenerate", "--image", "{one}", "--prompt", "x", "--high", "2"), "Expected `high` between"),
    ],
)
def test_mistakes_print_one_sentence(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    assert lmd(*(word.format(one=folder / "scenes" / "0.png") for word in words)) == 2
    assert expected in capsys.readouterr().err
