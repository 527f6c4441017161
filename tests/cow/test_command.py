"""`slipstream cow` and `slipstream demo` on the bundled model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from slipstream.cli import main
from slipstream.cli.cow import MASK, PHOTO
from slipstream.core.images import read_image


def cow(out, **changes) -> int:
    options = {
        "image": PHOTO, "mask": MASK, "prompt": "a red circle on a blue background", "width": 64, "height": 64,
        "scale": 0.1, "steps": 10, "cycles": 1, **changes,
    }  # fmt: skip
    words = [w for k, v in options.items() if v is not None for w in (f"--{k.replace('_', '-')}", str(v))]
    return main(["cow", "--out", str(out), *words])


def test_the_subjects_pixels_are_the_photos_own(tmp_path):
    assert cow(tmp_path / "a.png", strip=tmp_path / "strip.png", softness=0) == 0
    picture, strip = read_image(tmp_path / "a.png"), read_image(tmp_path / "strip.png")
    assert picture.shape == (1, 64, 64, 3)
    canvas, result = strip[:, :, :64], strip[:, :, -64:]
    assert torch.equal(result, picture)
    differs = (canvas - picture).abs().amax(-1)[0]
    assert (differs[40:60, 30:36] <= 1 / 255 + 1e-6).all()  # the suit
    assert float(differs[:10].mean()) > 0.1  # the background is another


def test_same_seed_same_picture_and_another_seed_another(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cow(tmp_path / f"{name}.png", seed=seed) == 0
    a, b, c = (read_image(tmp_path / f"{n}.png") for n in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_odd_sizes_keep_their_size(tmp_path):
    """The subject stands in the corner, where cells are padded; its pixels are the photo's own there too."""
    sizes = {"width": 61, "height": 75, "x": 1.0, "steps": 5, "softness": 0, "strip": tmp_path / "strip.png"}
    assert cow(tmp_path / "a.png", **sizes) == 0
    image, strip = read_image(tmp_path / "a.png"), read_image(tmp_path / "strip.png")
    assert image.shape == (1, 75, 61, 3)
    canvas = strip[:, :, :61]
    same = ((canvas - image).abs().amax(-1)[0] <= 1 / 255 + 1e-6).float()
    assert float(same[60:, 45:57].mean()) > 0.8
    assert float(same[:20].mean()) < 0.2


def test_alpha_serves_as_the_mask(tmp_path):
    photo, keep = Image.open(PHOTO).convert("RGB"), Image.open(MASK).convert("L")
    photo.putalpha(keep)
    photo.save(tmp_path / "cut.png")
    assert cow(tmp_path / "a.png") == 0
    assert cow(tmp_path / "b.png", image=tmp_path / "cut.png", mask=None) == 0
    assert (read_image(tmp_path / "a.png") - read_image(tmp_path / "b.png")).abs().max() < 1.5 / 255


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "none.png"}, "no such file"),
        ({"mask": None}, "Expected `--mask` for an image without transparent parts"),
        ({"scale": 1.0}, "a canvas of at least"),
        ({"steps": 2}, "but got none in 2 steps"),
        ({"background": "#xyz"}, "as #rrggbb"),
        ({"model": "nowhere"}, "nowhere"),
        ({"cycles": 0}, "`cycles`"),
    ],
)
def test_a_users_mistake_is_one_sentence(tmp_path, capsys, changes, message):
    assert cow(tmp_path / "a.png", **changes) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "a.png").exists()


def test_corrupt_and_empty_masks(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"oops")
    assert cow(tmp_path / "a.png", mask=tmp_path / "bad.png") == 2
    Image.fromarray(np.zeros((512, 512), np.uint8)).save(tmp_path / "empty.png")
    assert cow(tmp_path / "a.png", mask=tmp_path / "empty.png") == 2
    assert "at least one painted pixel" in capsys.readouterr().err


def test_demo_makes_pictures_and_says_where(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), "--scenes", "1"]) == 0
    named = capsys.readouterr().out.split()
    assert named[-1].endswith("cow_strip.png")
    for path in named:
        assert float(read_image(path).std()) > 0.1
