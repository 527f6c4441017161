"""Picture files: round trips, alpha, camera rotation, and files that are no pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from slipstream.core.images import read_image, save_image, side_by_side


def test_round_trip(tmp_path):
    image = torch.rand(1, 5, 7, 3)
    path = save_image(image, tmp_path / "new" / "a.png")
    assert (read_image(path) - image).abs().max() <= 0.5 / 255 + 1e-6


def test_alpha_is_kept(tmp_path):
    Image.new("RGBA", (4, 3), (255, 0, 0, 51)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 3, 4, 4)
    assert float(image[0, 0, 0, 3]) == pytest.approx(0.2)


def test_camera_rotation_is_applied(tmp_path):
    pixels = np.zeros((2, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (1, 6, 2, 3)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_a_corrupt_file_says_what_to_do(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"a\.png to be an image, but it cannot be read .* Save it again as PNG or JPEG"
    ):
        read_image(tmp_path / "a.png")


def test_a_truncated_file_says_what_to_do(tmp_path):
    save_image(torch.rand(1, 64, 64, 3), tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path / "b.png")


def test_missing_file_and_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"an image name such as out\.png"):
        save_image(torch.zeros(1, 2, 2, 3), tmp_path / "a.xyz")


def test_side_by_side():
    row = side_by_side([torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 5, 4)], gap=2)
    assert row.shape == (1, 4, 10, 3)
    assert (row[:, :, 3:5] == 1).all()
