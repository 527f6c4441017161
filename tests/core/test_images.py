"""Image files: exact values in every mode of every format, masks with alpha, natural order, animations, and bad files."""

from __future__ import annotations

import ast
import pathlib
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from slipstream.core.images import (
    check_image_name,
    count_frames,
    cover,
    image_files,
    mask_of,
    natural_key,
    pad_to_multiple,
    read_frames,
    read_image,
    read_mask,
    resize_premultiplied,
    save_image,
    side_by_side,
)
from slipstream.core.masks import clean
from slipstream.lmd.latents_cache import encode_files
from slipstream.search.features import load_images
from slipstream.stream.video import FolderSource

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RAMP = np.arange(256).reshape(16, 16)


def png(path: pathlib.Path, samples: np.ndarray, colour: int, bits: int = 16) -> pathlib.Path:
    """Write samples (H, W, C) as a PNG of 16 bits per channel: Pillow cannot."""
    assert bits == 16
    height, width = samples.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )
    return path


def tiff(path: pathlib.Path, values: np.ndarray, kind: int, order: str = "<", zero: int = 1) -> pathlib.Path:
    """Write values (H, W) as a TIFF of one channel; `kind` is the sample format (1 unsigned, 2 signed, 3 float), `zero` 0 makes 0 white."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, values.itemsize * 8), (259, 1), (262, zero), (273, 8 + 2 + 10 * 12 + 4),
            (277, 1), (278, height), (279, len(data)), (339, kind)]  # fmt: skip
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    path.write_bytes(head + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0) + data)
    return path


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp", "gif", "pgm"])
def test_8_bit_grey(tmp_path, suffix):
    Image.fromarray(RAMP.astype(np.uint8)).save(
        tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {})
    )
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (1, 16, 16, 3)
    assert torch.equal(image, torch.from_numpy(RAMP / 255).float()[None, ..., None].expand(1, 16, 16, 3))


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp", "gif"])
def test_8_bit_colour(tmp_path, suffix):
    pixels = np.stack([RAMP // 64 * 64, RAMP[::-1] // 64 * 64, RAMP * 0 + 7], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert torch.equal(read_image(tmp_path / f"a.{suffix}"), torch.from_numpy(pixels)[None] / 255)


def grey(values: np.ndarray, full: float) -> torch.Tensor:
    return torch.from_numpy(values / full).float()[None, ..., None].expand(*(1, *values.shape), 3)


DEEP = np.array([[0, 1, 255, 256], [300, 32767, 32768, 65535]])


def test_16_bit_grey_png(tmp_path):
    assert torch.equal(read_image(png(tmp_path / "a.png", DEEP[..., None], 0)), grey(DEEP, 65535))
    Image.fromarray(DEEP.astype(np.uint16)).save(tmp_path / "b.png")
    assert torch.equal(read_image(tmp_path / "b.png"), grey(DEEP, 65535))
    found = read_mask(tmp_path / "b.png")
    torch.testing.assert_close(found, grey(DEEP, 65535)[..., 0], atol=1e-7, rtol=0)


def test_16_bit_grey_png_with_a_transparent_value(tmp_path):
    path = png(tmp_path / "a.png", DEEP[..., None], 0)
    data = path.read_bytes()
    clear = b"tRNS" + struct.pack(">H", 300)
    at = data.index(b"IDAT") - 4
    path.write_bytes(data[:at] + struct.pack(">I", 2) + clear + struct.pack(">I", zlib.crc32(clear)) + data[at:])
    image = read_image(path)
    assert torch.equal(image[..., :3], grey(DEEP, 65535))
    assert image[0, ..., 3].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_png_is_read_as_8_bits(tmp_path, colour, channels):
    # Pillow keeps the high byte: within one of 255 levels, white and black exact.
    samples = np.stack([DEEP + 0 * c if c < 3 else DEEP[::-1] for c in range(channels)], -1)
    image = read_image(png(tmp_path / "a.png", samples, colour))
    assert image.shape == (1, 2, 4, 4 if channels in (2, 4) else 3)
    expected = samples[..., [0, 0, 0, 1] if channels == 2 else list(range(channels))] / 65535
    assert float((image[0] - torch.from_numpy(expected)).abs().max()) < 1 / 255
    assert (float(image.min()), float(image.max())) == (0, 1)


DEEP_TIFFS = {
    "u2": (1, 2**16 - 1, "<>"), "i2": (2, 2**15 - 1, "<>"), "u4": (1, 2**32 - 1, "<"), "i4": (2, 2**31 - 1, "<>"),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "order"), [(dtype, order) for dtype, row in DEEP_TIFFS.items() for order in row[2]])
def test_deep_tiff(tmp_path, dtype, order):
    kind, full, _ = DEEP_TIFFS[dtype]
    values = np.array([[0, full // 3, full // 2, full]], dtype)
    image = read_image(tiff(tmp_path / "a.tif", values, kind, order))
    torch.testing.assert_close(image, grey(values.astype(np.float64), full), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("dtype", "kind", "full"), [("u1", 1, 255), ("u2", 1, 65535), ("f4", 3, 1)])
def test_a_tiff_whose_zero_is_white(tmp_path, dtype, kind, full):
    values = np.array([[0, full / 4, full / 2, full]]).astype(dtype)
    found = read_image(tiff(tmp_path / "a.tif", values, kind, zero=0))
    torch.testing.assert_close(found, 1 - grey(values.astype(np.float64), full), atol=1e-7, rtol=0)


def test_12_bit_tiff(tmp_path):
    path = tiff(tmp_path / "a.tif", np.zeros((1, 3), np.uint8), 1)  # three bytes hold two values
    data = path.read_bytes()
    data = data.replace(struct.pack("<HHII", 258, 4, 1, 8), struct.pack("<HHII", 258, 4, 1, 12))
    data = data.replace(struct.pack("<HHII", 256, 4, 1, 3), struct.pack("<HHII", 256, 4, 1, 2))
    path.write_bytes(data[:-3] + (0xFFF << 12 | 0x400).to_bytes(3, "big"))
    torch.testing.assert_close(read_image(path)[0, 0, :, 0], torch.tensor([1, 1024 / 4095]), atol=1e-7, rtol=0)


@pytest.mark.parametrize("order", ["<", ">"])
def test_float_tiff(tmp_path, order):
    values = np.array([[0, 0.25, 1e-3, 1]], "f4")
    assert torch.equal(read_image(tiff(tmp_path / "a.tif", values, 3, order)), grey(values, 1))
    over = tiff(tmp_path / "b.tif", np.array([[-0.1, 1.1]], "f4"), 3, order)  # the overshoot of a resize
    assert torch.equal(read_image(over), grey(np.array([[0, 1]]), 1))


@pytest.mark.parametrize("values", [[0, 255], [-3, 1], [0, np.nan], [0, np.inf]])
def test_floats_of_another_scale_are_refused(tmp_path, values):
    path = tiff(tmp_path / "a.tif", np.array([values], "f4"), 3)
    with pytest.raises(ValueError, match=r"a\.tif to be an image, but .* lie between .* instead of 0 and 1"):
        read_image(path)


def test_a_deep_portable_greymap_of_any_range(tmp_path):
    # 1000 is white in this file.
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 1000\n" + struct.pack(">HHH", 0, 500, 1000))
    torch.testing.assert_close(read_image(tmp_path / "a.pgm")[0, 0, :, 0], torch.tensor([0, 0.5, 1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "pbm", "gif"])
def test_1_bit(tmp_path, suffix):
    bits = RAMP % 3 == 0
    Image.fromarray(bits).save(tmp_path / f"a.{suffix}")
    assert torch.equal(read_image(tmp_path / f"a.{suffix}"), grey(bits, 1))
    assert torch.equal(read_mask(tmp_path / f"a.{suffix}"), torch.from_numpy(bits).float()[None])


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits(tmp_path, bits):
    values = np.arange(2**bits, dtype=np.uint8)[None]
    packed = np.packbits(((values[..., None] >> np.arange(bits - 1, -1, -1)) & 1).flatten())
    path = png(tmp_path / "a.png", np.zeros((1, values.size, 1)), 0)
    data = path.read_bytes()
    head = struct.pack(">IIBBBBB", values.size, 1, bits, 0, 0, 0, 0)
    body = zlib.compress(b"\0" + packed.tobytes())
    parts = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    path.write_bytes(
        data[:8] + b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    )
    assert torch.equal(read_image(path), grey(values, 2**bits - 1))


def test_palettes_and_their_transparency(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    colours = torch.eye(3)
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "one.gif", transparency=1)
    palette.save(tmp_path / "many.png", transparency=bytes([255, 0, 51]))
    assert torch.equal(read_image(tmp_path / "plain.png")[0, 0], colours)
    one, many = read_image(tmp_path / "one.gif")[0, 0], read_image(tmp_path / "many.png")[0, 0]
    assert torch.equal(many[:, :3], colours)
    assert one[:, 3].tolist() == [1, 0, 1]
    assert many[:, 3].tolist() == pytest.approx([1, 0, 0.2])


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7)), ("1", 0)])
def test_one_transparent_colour(tmp_path, mode, key):
    image = Image.new("L", (2, 1))
    image.putdata([7, 200])
    image.convert(mode, dither=Image.Dither.NONE).save(tmp_path / "a.png", transparency=key)
    assert read_image(tmp_path / "a.png")[0, 0, :, 3].tolist() == [0, 1]


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_kept_and_hidden_colours_too(tmp_path, mode, suffix):
    pixels = np.stack([RAMP, RAMP, RAMP, RAMP[::-1]], -1).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    assert torch.equal(read_image(tmp_path / f"a.{suffix}"), torch.from_numpy(pixels)[None] / 255)


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk(tmp_path, suffix):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image.paste((0, 0, 0, 255), (8, 0, 16, 16))
    image.save(tmp_path / f"a.{suffix}", quality=100, **({"subsampling": 0} if suffix == "jpg" else {}))
    found = read_image(tmp_path / f"a.{suffix}")
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([1.0, 0, 0]), atol=2 / 255, rtol=0)
    torch.testing.assert_close(found[0, 0, 15], torch.zeros(3), atol=2 / 255, rtol=0)


TURNED = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "deep"])
@pytest.mark.parametrize("orientation", TURNED)
def test_every_camera_rotation(tmp_path, kind, orientation):
    values = np.kron(np.array([[0, 80], [160, 240]]), np.ones((16, 24)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = Image.fromarray((values * 257).astype(np.uint16) if kind == "deep" else values.astype(np.uint8))
    path = tmp_path / ("a.png" if kind == "deep" else f"a.{kind}")
    source.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpg" else {}))
    wanted = torch.tensor([{"a": 0, "b": 80, "c": 160, "d": 240}[c] for c in TURNED[orientation]]).reshape(2, 2) / 255
    image = read_image(path)[0, ..., 0]
    height, width = image.shape
    assert (height, width) == ((48, 32) if orientation > 4 else (32, 48))
    found = image[height // 4 :: height // 2, width // 4 :: width // 2]
    torch.testing.assert_close(found, wanted, atol=2 / 255, rtol=0)


def test_a_turned_image_changes_its_sides(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (1, 6, 2, 3)


def test_round_trip(tmp_path):
    image = torch.rand(1, 5, 7, 3)
    path = save_image(image, tmp_path / "new" / "a.png")
    assert (read_image(path) - image).abs().max() <= 0.5 / 255 + 1e-6


# ------------------------------------------------------------------------------------------------ one reader


class Kept:
    """An encoder that keeps what it is given."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.movedim(-1, 1)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_every_reader_of_folders_gives_the_same_tensor(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(32 * 16).reshape(16, 32) * 128
    source = (
        Image.fromarray(values.astype(np.uint16))
        if name != "a.jpg"
        else Image.fromarray((values // 256).astype(np.uint8))
    )
    source.save(tmp_path / name, exif=exif)
    image = read_image(tmp_path / name)
    assert image.shape == (1, 32, 16, 3)
    assert torch.equal(load_images(tmp_path)[0], image[0])
    assert torch.equal(next(iter(FolderSource(tmp_path)))[0], image[0])
    assert torch.equal(encode_files(image_files(tmp_path), Kept(), 32, 16, mirror=False), image.movedim(-1, 1))


def test_no_other_module_opens_image_files():
    found = set()
    for path in ROOT.glob("*/**/*.py"):
        if path.relative_to(ROOT).parts[0] in ("core", "cow", "stream", "search", "edit", "lmd", "nodes", "cli"):
            calls = (n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
            if any(ast.unparse(call).split(".")[-2:] == ["Image", "open"] for call in calls):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"core/images.py"}


# ------------------------------------------------------------------------------------------------ masks with alpha


SUBJECT = np.zeros((24, 32), bool)
SUBJECT[6:14, 8:20] = True
BLACK_WHITE = np.repeat(SUBJECT[..., None] * 255, 3, 2)
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(20, 230, (24, 32, 3))
FLAT_PHOTO = np.where(SUBJECT[..., None], (230, 110, 180), (60, 40, 40))


def rgba(colour: Any, alpha: Any) -> np.ndarray:
    shape = SUBJECT.shape
    return np.dstack([np.broadcast_to(colour, (*shape, 3)), np.broadcast_to(alpha, shape)]).astype(np.uint8)


OPAQUE = SUBJECT * 255
MASKS = {
    "black and white": BLACK_WHITE.astype(np.uint8),
    "opaque": rgba(BLACK_WHITE, 255),
    "almost opaque": rgba(BLACK_WHITE, 255 - RNG.integers(0, 2, SUBJECT.shape)),
    "opaque but for noise": rgba(BLACK_WHITE, 255 - RNG.integers(0, 20, SUBJECT.shape)),
    "half transparent all over": rgba(BLACK_WHITE, 128),
    "white on a transparent layer": rgba(255, OPAQUE),
    "white on an erased layer": rgba(BLACK_WHITE, OPAQUE),
    "black on a transparent layer": rgba(0, OPAQUE),
    "black on an erased white layer": rgba(255 - BLACK_WHITE, OPAQUE),
    "red on a transparent layer": rgba((230, 30, 20), OPAQUE),
    "red on an erased layer": rgba(np.where(SUBJECT[..., None], (230, 30, 20), 0), OPAQUE),
    "black and white with the rest erased": rgba(BLACK_WHITE, np.where(np.arange(32) < 24, 255, 0)),
    "photo with a hole": rgba(PHOTO, 255 - OPAQUE),
    "photo with an erased hole": rgba(np.where(SUBJECT[..., None], 0, PHOTO), 255 - OPAQUE),
    "flat photo with a hole": rgba(FLAT_PHOTO, 255 - OPAQUE),
    "grey photo with a hole": rgba(PHOTO[..., :1].repeat(3, 2), 255 - OPAQUE),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_read_from_what_carries_it(tmp_path, name):
    Image.fromarray(MASKS[name]).save(tmp_path / "a.png")
    mask = clean(read_mask(tmp_path / "a.png"))
    wanted = torch.from_numpy(SUBJECT).float()[None]
    assert torch.equal((mask > 0.45).float() if name == "half transparent all over" else mask, wanted)


def test_soft_alpha_keeps_its_weight():
    soft = torch.linspace(0, 1, 32).expand(24, 32)
    white, photo = torch.ones(1, 24, 32, 4), torch.rand(1, 24, 32, 4)
    white[..., 3] = photo[..., 3] = soft
    assert torch.equal(mask_of(white)[0], soft)
    assert torch.equal(mask_of(photo)[0], 1 - soft)


@pytest.mark.parametrize("mode", ["LA", "P"])
def test_a_mask_with_alpha_in_other_modes(tmp_path, mode):
    image = Image.fromarray(MASKS["white on a transparent layer"])
    image = image.convert("LA") if mode == "LA" else image.quantize(4)
    image.save(tmp_path / "a.png")
    assert torch.equal(read_mask(tmp_path / "a.png"), torch.from_numpy(SUBJECT).float()[None])


# ------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize(
    "names",
    [
        ["1", "2", "9", "10", "11", "100"],
        ["frame_1", "frame_2", "frame_10"],
        ["a2_9", "a2_10", "a10_1"],
        ["007", "8", "0009", "10"],
        ["Frame1", "frame2", "FRAME10"],
        ["img", "img1", "img1b", "img2"],
        ["shot 1 (2)", "shot 1 (10)", "shot 2 (1)"],
    ],
)
def test_natural_order(tmp_path, names):
    shuffled = [f"{n}.png" for n in names]
    random.Random(1).shuffle(shuffled)
    for name in shuffled:
        Image.new("L", (2, 2)).save(tmp_path / name)
    wanted = [f"{n}.png" for n in names]
    assert [p.name for p in image_files(tmp_path)] == wanted
    assert sorted(shuffled, key=natural_key) == wanted


def test_equal_numbers_have_an_order_of_their_own(tmp_path):
    assert sorted(["a01.png", "a1.png", "a1.jpg"], key=natural_key) == sorted(
        ["a1.jpg", "a1.png", "a01.png"], key=natural_key
    )


def test_folders_below_and_files_that_are_no_images(tmp_path):
    names = ["b/2.png", "b/10.PNG", "a.jpg", "b.jpg", ".hidden/1.png", "._a.jpg", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [p.relative_to(tmp_path).as_posix() for p in image_files(tmp_path, below=True)] == [
        "a.jpg",
        "b.jpg",
        "b/2.png",
        "b/10.PNG",
    ]
    assert [p.name for p in image_files(tmp_path)] == ["a.jpg", "b.jpg"]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"Expected `images` with images \(\.png, .*\), but got none in .*\. Add some"):
        image_files(tmp_path, name="images")
    for path in (tmp_path / "none", save_image(torch.zeros(1, 2, 2, 3), tmp_path / "a.png")):
        with pytest.raises(ValueError, match="Expected `folder` to be a folder of images, but got"):
            image_files(path)


# ------------------------------------------------------------------------------------------------ animations


def frames(count: int = 5, mode: str = "L") -> list[Image.Image]:
    return [Image.new("L", (8, 6), 40 * i).convert(mode) for i in range(count)]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_every_frame_of_an_animation(tmp_path, suffix):
    first, *rest = frames(mode="RGB")
    more = {"lossless": True} if suffix == "webp" else {}
    first.save(
        tmp_path / f"a.{suffix}", save_all=True, append_images=rest, duration=[40, 80, 40, 40, 200], loop=0, **more
    )
    path = tmp_path / f"a.{suffix}"
    found = list(read_frames(path))
    assert count_frames(path) == len(found) == 5
    assert [round(float(image.mean()) * 255) for image, _ in found] == [0, 40, 80, 120, 160]
    assert all(image.shape == (1, 6, 8, 3) for image, _ in found)
    assert [seconds for _, seconds in found] == [0.04, 0.08, 0.04, 0.04, 0.2]
    assert torch.equal(read_image(path), found[0][0])


def test_a_still_image_is_one_frame_of_no_known_length(tmp_path):
    path = save_image(torch.rand(1, 4, 4, 3), tmp_path / "a.png")
    assert count_frames(path) == 1
    [(image, seconds)] = read_frames(path)
    assert torch.equal(image, read_image(path))
    assert seconds == 0


def test_the_still_of_a_png_animation_is_no_frame(tmp_path):
    still, *rest = frames()
    still.save(tmp_path / "a.png", save_all=True, append_images=rest, default_image=True, duration=100)
    assert [round(float(image.mean()) * 255) for image, _ in read_frames(tmp_path / "a.png")] == [40, 80, 120, 160]
    assert count_frames(tmp_path / "a.png") == 4


@pytest.mark.parametrize("suffix", ["tif", "mpo"])
def test_pages_and_views_are_no_animation(tmp_path, suffix):
    first, *rest = frames(mode="RGB")
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=rest)
    assert count_frames(tmp_path / f"a.{suffix}") == 1
    assert float(read_image(tmp_path / f"a.{suffix}").max()) == 0


def test_an_animation_that_is_cut_off_gives_what_can_be_read(tmp_path):
    first, *rest = (Image.fromarray(RNG.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(5))
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=40)
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[: len(data) * 3 // 5])
    reader = read_frames(tmp_path / "a.gif")
    assert next(reader)[0].shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match=r"a\.gif to be an image, but it cannot be read"):
        list(reader)


# ------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30, b"GIF89a", b"RIFF\0\0\0\0WEBP"]
)
def test_a_corrupt_file_says_what_to_do(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for read in (read_image, read_mask, count_frames, lambda path: list(read_frames(path))):
        with pytest.raises(
            ValueError, match=r"a\.png to be an image, but it cannot be read .* Save it again as PNG or JPEG"
        ):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_a_truncated_file_says_what_to_do(tmp_path, suffix):
    save_image(torch.rand(1, 64, 64, 3), tmp_path / f"a.{suffix}")
    data = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_one_kind_of_error(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {} if suffix in ("bmp", "gif") else {"exif": exif}
    Image.fromarray(RNG.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(tmp_path / f"a.{suffix}", **more)
    data, dice = (tmp_path / f"a.{suffix}").read_bytes(), random.Random(7)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 3, 20))):
            damaged[dice.randrange(min(len(data), dice.choice((60, 10**6))))] = dice.randrange(256)
        (tmp_path / f"b.{suffix}").write_bytes(damaged)
        try:
            image = read_image(tmp_path / f"b.{suffix}")
        except ValueError as error:
            assert str(error).startswith("Expected")  # noqa: PT017
        else:
            assert bool(((image >= 0) & (image <= 1)).all())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_camera_data_does_not_cost_the_image(tmp_path, suffix):
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / f"a.{suffix}", exif=exif)
        assert read_image(tmp_path / f"a.{suffix}").shape == (1, 16, 16, 3)


def test_missing_files_folders_and_unknown_formats(tmp_path):
    with pytest.raises(
        ValueError, match=r"Expected an image at .*none\.png, but there is no such file\. Check the path"
    ):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"but it is a folder\. Name a file in it"):
        read_image(tmp_path)
    for name in ("a\0b.png", "a" * 500 + ".png"):
        with pytest.raises(ValueError, match="Expected"):
            read_image(name)
    with pytest.raises(ValueError, match=r"an image name such as out\.png"):
        save_image(torch.zeros(1, 2, 2, 3), tmp_path / "a.xyz")


def test_an_image_too_large_names_the_limit(tmp_path, monkeypatch):
    """A file of 10 kB that would take gigabytes is refused by its header; so is what Pillow itself refuses."""
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 20_000
    for read in (read_image, read_mask, lambda path: next(read_frames(path)), count_frames):
        with pytest.raises(ValueError, match=r"at most 67\.1 megapixels, but .*a\.png is larger\. Reduce it first"):
            read(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match="megapixels"):
        read_image(tmp_path / "a.png")


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("size", [(16, 24), (24, 24), (40, 50), (64, 16), (80, 100)])
def test_cover_takes_the_middle_and_keeps_the_range(size):
    image = torch.zeros(1, 40, 50, 3)
    image[:, :, 25:] = 1
    fitted = cover(image, *size)
    assert fitted.shape == (1, *size, 3)
    assert float(fitted.mean()) == pytest.approx(0.5, abs=1e-5)
    assert (float(fitted.min()), float(fitted.max())) == (0, 1)
    assert torch.equal(cover(image[0], *size), fitted[0])


@pytest.mark.parametrize(
    ("sides", "size"), [((1, 1), (2, 24)), ((1, 30), (40, 2)), ((300, 1), (2, 24)), ((1, 1), (1, 500))]
)
def test_cover_keeps_at_least_one_pixel(sides: tuple[int, int], size: tuple[int, int]) -> None:
    """One row could be asked for a twelfth of a row: an error of torch."""
    assert torch.equal(cover(torch.full((1, *sides, 3), 0.5), *size), torch.full((1, *size, 3), 0.5))


def test_cover_crops_without_resizing_where_one_side_fits():
    image = torch.zeros(10, 30, 3)
    image[:, 10:20] = 1
    assert torch.equal(cover(image, 10, 10), torch.ones(10, 10, 3))
    assert cover(image, 10, 30) is image
    assert cover((image * 255).byte(), 20, 20).dtype == torch.float32


def test_alpha_weighs_the_colours_when_it_is_resized_with_them():
    image = torch.zeros(1, 32, 32, 4)
    image[..., 1] = 1
    image[:, 5:27, 5:27] = torch.tensor([1.0, 0, 0, 1])
    for mode in ("bilinear", "bicubic"):
        pixels = image.movedim(-1, 1)
        small = resize_premultiplied(pixels[:, :3], pixels[:, 3:], 13, 13, mode)
        shown = small[0, :, small[0, 3] > 0.01]
        torch.testing.assert_close(
            shown[:3], torch.tensor([1.0, 0, 0])[:, None].expand(3, shown.shape[1]), atol=1e-4, rtol=0
        )
        assert bool(((small[0, 3] > 0.01) & (small[0, 3] < 0.99)).any())
    assert torch.equal(cover(image, 13, 13)[0, 0, 0], torch.tensor([0.0, 1, 0, 0]))


def test_side_by_side():
    row = side_by_side([torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 5, 4)], gap=2)
    assert row.shape == (1, 4, 10, 3)
    assert (row[:, :, 3:5] == 1).all()


def test_padding_repeats_the_edge_and_a_crop_undoes_it() -> None:
    image = torch.arange(5 * 7 * 3, dtype=torch.uint8).reshape(5, 7, 3)
    padded = pad_to_multiple(image, 4)
    assert padded.shape == (8, 8, 3)
    assert torch.equal(padded[:5, :7], image)
    assert torch.equal(padded[5:, :7], image[4:].expand(3, 7, 3))
    assert torch.equal(padded[:, 7], padded[:, 6])
    assert pad_to_multiple(padded, 4) is padded
    assert pad_to_multiple(torch.rand(2, 1, 1, 4), 8).shape == (2, 8, 8, 4)


@pytest.mark.parametrize("name", ["a.h5", "a.txt", "a", "a.mp4", ".png"])
def test_names_of_what_is_no_image_format_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"such as out\.png"):
        check_image_name(name)


def test_a_failed_write_leaves_the_older_image(tmp_path: pathlib.Path) -> None:
    save_image(torch.zeros(1, 4, 4, 3), tmp_path / "a.jpg")
    with pytest.raises(OSError, match=r"Could not write .*a\.jpg \(cannot write mode RGBA as JPEG\)"):
        save_image(torch.ones(1, 4, 4, 4), tmp_path / "a.jpg")
    assert float(read_image(tmp_path / "a.jpg").mean()) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpg"]
