"""Seeded inputs, good, odd and hostile: numbers, texts, tensors, masks, images, JSON, and settings of any dataclass."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pathlib
import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, 7, 8, -1, -0.0, 0.5, 1.0, 1.5, 1e-9, 1e-50, 1e30, 1e308, 2**31, 2**63, 2**64 - 1, 2**64, 10**400, math.nan,
    math.inf, -math.inf, True, np.int64(3), np.uint8(200), np.float32(0.25), np.float64("nan"), np.bool_(True),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "ein roter Kreis", "\u8d64\u3044\u5186", "\U0001f98a" * 50, "a\0b", "\ud800", "caf\udce9", "\x1b[2J", "\u202eabc",
    "a" * 5000,
    "(a:1.3)", "nan", "1e400", "-1", "%s%n", "../../etc/passwd", "'; DROP TABLE job", "{}", "[1, 2]", "10, 20 -> 30, 40", "\n\n",
)  # fmt: skip
FORMATS = (
    (".png", ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")), (".jpg", ("RGB", "L", "CMYK")), (".webp", ("RGB", "RGBA")),
    (".gif", ("P", "L")), (".bmp", ("RGB", "1")), (".tif", ("RGB", "RGBA", "F", "I;16", "CMYK", "1", "P")),
)  # fmt: skip
ORIENTATION = 0x0112
OTHERS: tuple[Any, ...] = (None, (), [], {}, [1, 2], (0.0, 1.0), {"a": 1}, b"x", object(), 1j)


class Inputs(random.Random):
    """One case: everything drawn from its seed."""

    def number(self) -> Any:
        return self.choice((self.choice(NUMBERS), self.uniform(-2, 2), self.randrange(-2, 40), self.random()))

    def text(self) -> str:
        if self.random() < 0.5:
            return self.choice(TEXTS)
        letters = "abc XYZ0123456789.,:;->()[]{}\"'\\/#%\n\t\0é\ud801"
        return "".join(self.choice(letters) for _ in range(self.randrange(30)))

    def anything(self) -> Any:
        return self.choice((self.number, self.number, self.text, lambda: self.choice(OTHERS), self.tensor))()

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.randrange(2**31))

    def size(self) -> int:
        return self.choice((1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33))

    def tensor(self, *shape: int) -> Tensor:
        """Return a tensor of any kind: of `shape`, else of any."""
        shape = shape or tuple(self.choice((0, 1, 2, 3, 4, 8)) for _ in range(self.randrange(5)))
        x = torch.rand(shape, generator=self.generator())
        kind = self.randrange(12)
        if kind == 0 and x.numel():
            x.view(-1)[self.randrange(x.numel())] = self.choice((math.nan, math.inf, -math.inf, 1e38))
        dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.int64)
        if 0 < kind <= len(dtypes):
            return (x * 255 if not dtypes[kind - 1].is_floating_point else x).to(dtypes[kind - 1])
        return x * self.choice((1, 1, 1, 255, -1))

    def image(self) -> Tensor:
        return self.tensor(self.choice((1, 1, 2)), self.size(), self.size(), self.choice((3, 3, 4, 1, 2)))

    def mask(self, height: int | None = None, width: int | None = None) -> Tensor:
        shape = (height or self.size(), width or self.size())
        if self.random() < 0.2:
            return torch.full(shape, float(self.choice((0, 1))))
        mask = self.tensor(*self.choice(((), (1,), (2,), (1, 1))), *shape)
        return (mask > 0.5).float() if mask.is_floating_point() and self.random() < 0.5 else mask

    def sigmas(self) -> Any:
        count = self.randrange(1, 8)
        values = sorted((self.uniform(0, 15) for _ in range(count)), reverse=True)
        if self.random() < 0.7:
            values[-1] = 0.0
        if self.random() < 0.3:
            values[self.randrange(count)] = float(self.choice((0, -1, math.nan, math.inf, 1e-50, 1e30, values[0])))
        return torch.tensor(values, dtype=self.choice((torch.float32, torch.float32, torch.float64, torch.float16)))

    def image_file(self, path: pathlib.Path) -> pathlib.Path:
        """Write an image of any size, mode and format, turned by its EXIF, at times damaged, empty or no image at all."""
        suffix, modes = self.choice(FORMATS)
        side, many = self.size, self.random() < 0.1
        exif = Image.Exif()
        exif[ORIENTATION] = self.randrange(10)
        image = Image.effect_noise((side() * (9 if many else 1), side()), 90).convert("L")
        mode = self.choice(modes)
        if mode in ("RGBA", "LA"):
            image = image.convert(mode)
            image.putalpha(Image.effect_noise(image.size, self.choice((0, 200))).convert("L"))
        elif mode in ("F", "I;16"):
            scale, kind = (255, np.float32) if mode == "F" else (1 / 257, np.uint16)
            image = Image.fromarray((np.asarray(image) / scale).astype(kind))
        buffer = io.BytesIO()
        image.convert(mode).save(
            buffer, Image.registered_extensions()[suffix], **({} if suffix in (".gif", ".bmp") else {"exif": exif})
        )
        data, kind = buffer.getvalue(), self.random()
        path = path.with_suffix(suffix)
        path.write_bytes(
            data if kind < 0.9 else self.bytes_like(data) if kind < 0.97 else self.choice((b"", b"text\n", b"\0" * 99))
        )
        return path

    def bytes_like(self, good: bytes) -> bytes:
        """Return a file with some of its bytes changed, left out or cut off."""
        data = bytearray(good)
        for _ in range(self.randrange(1, 6)):
            if not data:
                break
            at = self.randrange(len(data))
            change = self.randrange(4)
            if change == 0:
                data[at] = self.randrange(256)
            elif change == 1:
                del data[at : at + self.randrange(1, 50)]
            elif change == 2:
                data[at:at] = self.randbytes(self.randrange(1, 20))
            else:
                del data[max(at, len(data) // 4) :]
        return bytes(data)

    def json_like(self, good: Any) -> Any:
        """Return a JSON value in which a few entries, at any depth, are replaced, removed or new."""
        value = copy.deepcopy(good)
        for _ in range(self.randrange(1, 4)):
            places = list(_places(value))
            owner, key = self.choice(places)
            change = self.randrange(4)
            if change == 0 and isinstance(owner, dict):
                del owner[key]
            elif change == 1 and isinstance(owner, dict):
                owner[self.text()] = self.json_value()
            else:
                owner[key] = self.json_value()
        return value

    def json_value(self) -> Any:
        numbers = tuple(n for n in NUMBERS if type(n) in (int, float, bool))
        return self.choice((self.choice(numbers), self.text(), None, [], {}, [1, "a"], {"a": [None]}, self.random()))

    def settings(self, config: type[Any], **given: Any) -> dict[str, Any]:
        """Return keyword arguments for a dataclass: most as by default, some of its own kind, a few of any."""
        found = dict(given)
        for field in dataclasses.fields(config):
            if not field.init or field.name in given or self.random() < 0.6:
                continue
            default = field.default
            if self.random() < 0.3:
                found[field.name] = self.anything()
            elif isinstance(default, str):
                found[field.name] = self.text()
            elif isinstance(default, bool):
                found[field.name] = self.random() < 0.5
            elif isinstance(default, tuple):
                found[field.name] = tuple(self.number() for _ in default)
            else:
                found[field.name] = self.number()
        return found


def _places(value: Any) -> Any:
    """Yield every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def numbers_in(value: Any) -> list[float]:
    """Return every float of a dataclass, also in tuples."""
    if dataclasses.is_dataclass(value):
        return [n for f in dataclasses.fields(value) for n in numbers_in(getattr(value, f.name))]
    if isinstance(value, (tuple, list)):
        return [n for inner in value for n in numbers_in(inner)]
    return [float(value)] if isinstance(value, (float, np.floating)) else []
