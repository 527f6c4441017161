"""`slipstream edit` on the bundled model."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from PIL import Image
from slipstream.cli import main
from slipstream.core.images import read_image


@pytest.fixture
def photo(tmp_path: pathlib.Path) -> pathlib.Path:
    picture = Image.new("RGB", (120, 90), (45, 85, 215))
    picture.paste((220, 40, 40), (20, 30, 50, 60))
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(photo: pathlib.Path, *words: str, out: str = "out.png") -> tuple[int, pathlib.Path]:
    target = photo.parent / out
    prompt = "a large red square on a blue background"
    code = main(["edit", "--image", str(photo), "--prompt", prompt, "--out", str(target), "--steps", "6", *words])
    return code, target


def test_a_move_by_a_box_leaves_the_rest_of_the_photo_untouched(photo: pathlib.Path, capsys: Any) -> None:
    code, out = run(photo, "--move", "20:30:50:60", "50", "5")
    assert code == 0
    before, after = read_image(photo), read_image(out)
    assert after.shape == before.shape
    assert torch.equal(after[:, :15], before[:, :15])
    assert float(after[0, 50, 85, 0]) > 0.6  # red has arrived
    assert float(after[0, 45, 35, 0]) < 0.4  # and left
    assert "network calls" in capsys.readouterr().out


def test_scale_and_angle_follow_the_shift(photo: pathlib.Path) -> None:
    code, out = run(photo, "--move", "20:30:50:40", "40", "0", "1", "90", "--only-preview", out="turned.png")
    assert code == 0
    image = read_image(out)[0]
    white = (image.amin(-1) > 0.85).nonzero()[:, 0]  # the outline of the target: 30 pixels high
    assert white.max() - white.min() == pytest.approx(29, abs=2)


def test_two_tasks_and_a_second_picture(photo: pathlib.Path) -> None:
    code, out = run(
        photo, "--paste", str(photo), "20:30:50:60", "50", "10", "0.5", "--drag", "2:2:60:80", "35,45:38,45"
    )
    assert code == 0
    assert read_image(out).shape == (1, 90, 120, 3)


def test_a_preview_needs_no_model(photo: pathlib.Path) -> None:
    code, out = run(
        photo, "--move", "20:30:50:60", "50", "5", "--only-preview", "--model", "no/such/model", out="preview.png"
    )
    assert code == 0
    assert not torch.equal(read_image(out), read_image(photo))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "at least one of --move"), (["--move", "20:30:50:60", "5"], "3 to 5 values"), (["--move", "20:30:50:60", "a", "b"], "numbers"),
        (["--move", "gone.png", "5", "5"], "no such file"), (["--drag", "20:30:50:60", "12,40"], "handle:target"),
        (["--move", "0:0:0:0", "5", "5"], "empty mask"), (["--move", "20:30:50:60", "900", "5"], "moved out"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(photo: pathlib.Path, capsys: Any, words: list[str], message: str) -> None:
    code, _ = run(photo, *words)
    assert code == 2
    assert message in capsys.readouterr().err


def test_an_object_is_removed(photo: pathlib.Path) -> None:
    code, out = run(photo, "--remove", "20:30:50:60")
    assert code == 0
    before, after = read_image(photo), read_image(out)
    assert torch.equal(before[:, 80:], after[:, 80:])
    assert not torch.equal(before, after)
