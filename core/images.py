"""Image files: the one reader and writer of IMAGE tensors, for the library, every command and every node."""

from __future__ import annotations

import functools
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .files import write_beside
from .masks import NOISE
from .tensors import image_to_numpy, numpy_to_image

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

IMAGE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Formats whose further frames come after the first in time; pages of a TIFF and the views of an MPO do not.
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
# A file of a few kilobytes may hold any number of pixels, and each takes 16 bytes in memory and more on the way.
MAX_PIXELS = 1 << 26
# TIFF 6.0
SAMPLE_FORMAT, BITS_PER_SAMPLE, PHOTOMETRIC = 339, 258, 262
SIGNED, WHITE_IS_ZERO = 2, 0


def natural_key(path: str | pathlib.PurePath) -> tuple[object, ...]:
    """Return a sort key that puts 2.png before 10.png: digits by value, letters without case."""
    parts = pathlib.PurePath(path).parts
    stems = [*parts[:-1], pathlib.PurePath(path).stem]
    return tuple(_natural(part) for part in stems), str(path)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    pieces = re.split(r"(\d+)", name.casefold())
    return tuple((0, int(piece), "") if at % 2 else (1, 0, piece) for at, piece in enumerate(pieces) if piece)


def image_files(folder: str | os.PathLike[str], below: bool = False, name: str = "folder") -> list[pathlib.Path]:
    """Return the image files of a folder, with `below` also those of its subfolders, in natural order; hidden ones are left out.

    Raises ValueError, naming the argument `name`, when there is no such folder or no image in it.
    """
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"Expected `{name}` to be a folder of images, but got {str(root)!r}. Check the path.")
    found = (p.relative_to(root) for p in (root.rglob("*") if below else root.iterdir()))
    images = (p for p in found if p.suffix.lower() in IMAGE_SUFFIXES and not any(s.startswith(".") for s in p.parts))
    files = [root / p for p in sorted(images, key=natural_key) if (root / p).is_file()]
    if not files:
        raise ValueError(
            f"Expected `{name}` with images ({', '.join(IMAGE_SUFFIXES)}), but got none in {str(root)!r}. Add some."
        )
    return files


@contextmanager
def opened_image(path: str | os.PathLike[str]) -> Iterator[PilImage]:
    """Open an image file; whatever its decoder raises within the context becomes one ValueError."""
    file = pathlib.Path(path).expanduser()

    def opened() -> BinaryIO:
        if not file.is_file():
            got = "it is a folder. Name a file in it" if file.is_dir() else "there is no such file. Check the path"
            raise FileNotFoundError(f"Expected an image at {file}, but {got}.")
        # Given a name, Pillow maps some TIFF files into memory and mixes up the sides of turned ones.
        return file.open("rb")

    with _decoding(str(file), opened) as image:
        yield image


@contextmanager
def _decoding(
    name: str,
    opened: Callable[[], BinaryIO],
    most: int = MAX_PIXELS,
    formats: list[str] | tuple[str, ...] | None = None,
) -> Iterator[PilImage]:
    """Open an image of at most so many pixels; whatever its decoder raises within the context becomes one ValueError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with opened() as stream, Image.open(stream, formats=formats) as image:
            if image.width * image.height > most:
                raise Image.DecompressionBombError
            yield image
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"Expected an image of at most {most / 1e6:.3g} megapixels, but {name} is larger. Reduce it first."
        ) from error
    except Exception as error:  # a decoder may raise anything on damaged bytes
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"Expected {name} to be an image, but it cannot be read ({reason}). Save it again as PNG or JPEG."
        ) from error


def read_encoded(data: bytes, most: int = MAX_PIXELS) -> Tensor:
    """Return uint8 (H, W, 3) of a JPEG, WebP or PNG in memory; raises ValueError for others and above `most` pixels."""
    with _decoding("the frame", lambda: io.BytesIO(data), most, ("JPEG", "WEBP", "PNG")) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def encode_jpeg(image: Tensor, quality: int = 85) -> bytes:
    """Return a JPEG of IMAGE (H, W, 3), in [0, 1] or uint8."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image_to_numpy(image)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Return IMAGE (1, H, W, 3 or 4) in [0, 1] of an image file, upright as its camera says; alpha is kept, grey is repeated.

    Reads 1, 8, 16 and 32 bits per channel (colour beyond 8 bits is read as 8), palettes, CMYK, and the first frame of an
    animation. Float channels must lie in [0, 1]. Raises ValueError for a file that is missing, too large or no image.
    """
    with opened_image(path) as image:
        return _image(image)


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """Return MASK (1, H, W) in [0, 1] of an image file, 1 = painted; `mask_of` decides what carries it. Errors as `read_image`."""
    return mask_of(read_image(path))


def mask_of(image: Tensor) -> Tensor:
    """Return MASK (B, H, W) of IMAGE (B, H, W, 1, 3 or 4): what its alpha tells if that tells anything, else its brightness.

    Without alpha, or with one that differs by at most 0.1, the mask is the brightness: white is painted. Otherwise,
    one colour drawn on a transparent layer: alpha. Black and white drawn on a transparent layer: the brightness on black. Any
    other image is a photo with a hole, as the host's mask editor saves it and Load Image reads it: 1 - alpha.
    """
    colour = image[..., :3]
    brightness = colour.mean(-1)
    if image.shape[-1] < 4 or _spread(image[..., 3].reshape(-1, 1)) <= NOISE:
        return brightness
    alpha = image[..., 3]
    shown = alpha > alpha.amax() / 2
    seen, hidden = colour[shown], colour[~shown]
    erased = bool((hidden <= NOISE).all()) or bool((hidden >= 1 - NOISE).all())
    if _spread(seen) <= 2 * NOISE and (erased or _spread(colour.reshape(-1, 3)) <= 2 * NOISE):
        return alpha
    return brightness * alpha if _black_and_white(seen) else 1 - alpha


def _spread(values: Tensor) -> float:
    """Return how far values (N, C) lie apart in the channel where they differ most."""
    return float((values.amax(0) - values.amin(0)).amax())


def _black_and_white(colours: Tensor) -> bool:
    """Return whether colours (N, 3) are those of a mask: both black and white, and hardly anything else."""
    low, high = colours.amin(-1), colours.amax(-1)
    black, white = high <= NOISE, low >= 1 - NOISE
    return bool(black.any()) and bool(white.any()) and float((black | white).float().mean()) > 0.9


def read_frames(path: str | os.PathLike[str]) -> Iterator[tuple[Tensor, float]]:
    """Yield every frame of an animated GIF, WebP, PNG or AVIF as in `read_image`, and the seconds it is shown (0: not known).

    Any other image gives its one frame. Raises ValueError as `read_image` does, at the frame that cannot be read.
    """
    with opened_image(path) as image:
        for index in _frames(image):
            image.seek(index)
            frame = _image(image)
            yield frame, float(image.info.get("duration") or 0) / 1000  # known once the frame is loaded


def count_frames(path: str | os.PathLike[str]) -> int:
    """Return how many frames `read_frames` gives; raises ValueError as it does."""
    with opened_image(path) as image:
        return len(_frames(image))


def _frames(image: PilImage) -> range:
    count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
    # The still image that some PNG animations show where animation is not known is no frame of them.
    return range(int(bool(image.info.get("default_image")) and count > 1), count)


def _image(image: PilImage) -> Tensor:
    deep = _scale(image)
    image.load()
    upright = _upright(image)
    if deep is not None:
        values = torch.from_numpy(_grey(np.asarray(upright), *deep))
        if isinstance(key := image.info.get("transparency"), int):
            return torch.stack([values, values, values, (values != key / deep[1]).float()], -1)[None]
        return values.expand(3, -1, -1).movedim(0, -1)[None].contiguous()
    has_alpha = upright.mode[-1] in "Aa" or "transparency" in upright.info
    return numpy_to_image(np.array(upright.convert("RGBA" if has_alpha else "RGB")))


def _upright(image: PilImage) -> PilImage:
    """Return a loaded image turned as its camera says; what a damaged camera record says is ignored."""
    from PIL import ImageOps

    # Pillow turns a TIFF itself as it loads it, and older versions would turn it twice.
    if image.format == "TIFF":
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the parser of EXIF may raise anything on damaged bytes
        return image


def _scale(image: PilImage) -> tuple[float, float] | None:
    """Return the values of black and white in an image of one deep channel; None for 8 bits, which Pillow can convert."""
    if image.mode[0] not in "IF":
        return None
    tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    # Pillow gives formats of 16 bits as "I" or "I;16", depending on its version.
    signed = tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
    white = 1.0 if image.mode == "F" else float(2 ** (tags.get(BITS_PER_SAMPLE, (16,))[0] - signed) - 1)
    return (white, 0.0) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (0.0, white)


def _grey(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Return one deep channel as float32 (H, W) in [0, 1]."""
    if max(black, white) == 2**32 - 1:
        values = values.view(np.uint32)  # Pillow keeps unsigned values in signed ones
    values = (values.astype(np.float64) - black) / (white - black)
    low, high = float(values.min()), float(values.max())
    # Resampling may overshoot a little; values beyond that have another scale, which the file does not tell.
    if not (low > -0.5 and high < 1.5):
        raise ValueError(f"its values lie between {low:.4g} and {high:.4g} instead of 0 and 1")
    return values.clip(0, 1).astype(np.float32)


def check_image_name(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless `path` names an image format that can be written: ask before the work, not after it."""
    path = pathlib.Path(path).expanduser()
    if not _writes(path.suffix.lower()) or path.is_dir():
        raise ValueError(f"Expected an image name such as out.png, but got {path.name!r}. Add .png or .jpg.")


@functools.cache
def _writes(suffix: str) -> bool:
    """Try it: Pillow also registers formats for which it has no encoder."""
    from PIL import Image

    Image.init()
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), Image.EXTENSION[suffix])
    except (KeyError, OSError, ValueError):
        return False
    return True


def save_image(image: Tensor, path: str | os.PathLike[str]) -> pathlib.Path:
    """Write the first image of IMAGE (B, H, W, 3) in [0, 1]; folders are made, the format follows the name."""
    from PIL import Image

    check_image_name(path)
    path = pathlib.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(path) as file:
        Image.fromarray(image_to_numpy(image[:1])[0]).save(file, Image.EXTENSION[path.suffix.lower()], quality=92)
    return path


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Return IMAGE (..., H, W, C) whose last row and column are repeated until both sides are multiples; crop to undo it."""
    rows, columns = (torch.arange(-(-n // multiple) * multiple, device=image.device) for n in image.shape[-3:-1])
    height, width = image.shape[-3:-1]
    if (len(rows), len(columns)) == (height, width):
        return image
    return image[..., rows.clamp(max=height - 1), :, :][..., columns.clamp(max=width - 1), :]


def cover(image: Tensor, height: int, width: int) -> Tensor:
    """Return IMAGE (B, H, W, C) or (H, W, C) as (..., height, width, C): its largest middle part of that shape, resized.

    Bilinear with antialiasing, which never leaves [0, 1]; alpha (C = 4) weighs the colours. Bytes become float, unless the size
    is right already.
    """
    if image.shape[-3:-1] == (height, width):
        return image
    image = image / 255 if image.dtype == torch.uint8 else image
    rows, columns = image.shape[-3:-1]
    scale = min(rows / height, columns / width)
    crop_h, crop_w = (min(max(round(n * scale), 1), most) for n, most in ((height, rows), (width, columns)))
    top, left = (rows - crop_h) // 2, (columns - crop_w) // 2
    part = image[..., top : top + crop_h, left : left + crop_w, :].float().movedim(-1, -3)
    batch = part if part.ndim == 4 else part[None]
    if batch.shape[1] == 4:
        resized = resize_premultiplied(batch[:, :3], batch[:, 3:], height, width, "bilinear")
    else:
        resized = resize_pixels(batch, height, width, "bilinear")
    return resized.clamp(0, 1).reshape(*image.shape[:-3], -1, height, width).movedim(-3, -1)


def resize_pixels(pixels: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Return (B, C, height, width) of (B, C, H, W), antialiased; `mode` is "bilinear" or "bicubic" (sharper, may overshoot)."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode=mode, antialias=True, align_corners=False)


def resize_premultiplied(pixels: Tensor, alpha: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Return (B, C + 1, height, width) in [0, 1]: pixels (B, C, H, W) and their alpha (B, 1, H, W) resized together.

    Colours are weighted by alpha, so that what alpha hides does not fringe what it shows; where nothing shows, the plain
    resize remains.
    """
    if pixels.shape[-2:] == (height, width):
        return torch.cat([pixels, alpha], 1)
    plain, weighted, weight = (resize_pixels(x, height, width, mode) for x in (pixels, pixels * alpha, alpha))
    shown = torch.where(weight > 1 / 512, weighted / weight.clamp(min=1 / 512), plain)
    return torch.cat([shown, weight], 1).clamp(0, 1)


def side_by_side(images: Sequence[Tensor], gap: int = 4) -> Tensor:
    """Return one IMAGE (1, H, W, 3) with images (1, H, W, 3) of equal height in a row, `gap` white pixels between."""
    space = torch.ones(1, images[0].shape[1], gap, 3)
    parts = [part for image in images for part in (space, image[..., :3].cpu())][1:]
    return torch.cat(parts, 2)
