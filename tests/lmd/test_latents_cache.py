from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from slipstream.core import images
from slipstream.core.images import image_files
from slipstream.lmd.latents_cache import encode_files, encode_images


class Encoder:
    """A stand-in VAE: 8 x 8 means. Counts the images of the caller's size that it sees."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain, self.seen = gain, 0

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.seen += len(image) if image.shape[1:3] != (64, 64) else 0
        return self.gain * F.avg_pool2d(image.movedim(-1, 1), 8)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "images"
    (root / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "deeper/c.PNG"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


def images_in(root: pathlib.Path) -> list[pathlib.Path]:
    return image_files(root, below=True)


def test_latents_are_cached_by_content_not_by_name(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    encode, cache = Encoder(), tmp_path / "cache"
    first = encode_files(images_in(folder), encode, 16, 24, cache)
    assert first.shape == (6, 3, 2, 3)
    assert torch.allclose(first[1], first[0].flip(-1), atol=1e-6)  # the mirrored image
    assert encode.seen == 6
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "a.png").rename(moved / "z.png")
    second = encode_files(images_in(moved), encode, 16, 24, cache)
    assert encode.seen == 6
    assert torch.equal(second.sort(0).values, first.sort(0).values)


def test_another_size_picture_or_encoder_is_encoded_again(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cache, files = tmp_path / "cache", images_in(folder)
    encode_files(files, Encoder(), 16, 24, cache)
    other_size, other_vae, changed = Encoder(), Encoder(0.5), Encoder()
    encode_files(files, other_size, 24, 24, cache)
    encode_files(files, other_vae, 16, 24, cache)
    Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    encode_files(files, changed, 16, 24, cache)
    assert (other_size.seen, other_vae.seen, changed.seen) == (6, 6, 2)


def test_another_way_to_resize_encodes_again(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, files, sharper = tmp_path / "cache", images_in(folder), Encoder()
    encode_files(files, Encoder(), 16, 24, cache)
    monkeypatch.setattr(images, "resize_pixels", lambda x, h, w, mode: F.interpolate(x, (h, w), mode="nearest"))
    encode_files(files, sharper, 16, 24, cache)
    assert sharper.seen == 6


def test_a_damaged_entry_is_encoded_again(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cache, files, encode = tmp_path / "cache", images_in(folder), Encoder()
    first = encode_files(files, encode, 16, 24, cache)
    next(iter(sorted(cache.iterdir()))).write_bytes(b"rubbish")
    assert torch.equal(encode_files(files, encode, 16, 24, cache), first)
    assert encode.seen == 8


def test_unreadable_images_are_left_out_and_none_left_is_refused(folder: pathlib.Path) -> None:
    (folder / "b.jpg").write_bytes(b"not an image")
    assert len(encode_files(images_in(folder), Encoder(), 16, 24, mirror=False)) == 2
    with pytest.raises(ValueError, match=r"1 that cannot be read"):
        encode_files([folder / "b.jpg"], Encoder(), 16, 24)


def test_a_stop_keeps_what_was_encoded(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    encode, cache = Encoder(), tmp_path / "cache"

    def stop(done: int, total: int) -> None:
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_files(images_in(folder), encode, 16, 24, cache, callback=stop)
    encode_files(images_in(folder), encode, 16, 24, cache)
    assert encode.seen == 6


def test_a_batch_in_memory_is_encoded_like_files() -> None:
    images = torch.rand(2, 40, 50, 3, generator=torch.Generator().manual_seed(0))
    assert encode_images(images, Encoder(), 16, 24).shape == (4, 3, 2, 3)
    assert encode_images(images, Encoder(), 16, 24, mirror=False).shape == (2, 3, 2, 3)
