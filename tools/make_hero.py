"""Compose the README's first picture from pictures that the other tools made.

python tools/make_hero.py
"""

from __future__ import annotations

import pathlib

from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
WIDTH, GAP = 1296, 8
ROWS = [
    ["docs/img/cow_demo.jpg"],
    ["web/docs/img/edit_photo.jpg", "web/docs/img/stream_frames.jpg"],
    ["web/docs/img/edit_move.jpg", "web/docs/img/edit_paste.jpg", "web/docs/img/latent_fill.jpg"],
]


def row(paths: list[str]) -> Image.Image:
    """Return pictures side by side at one height, so that the row is WIDTH wide."""
    pictures = [Image.open(ROOT / path).convert("RGB") for path in paths]
    height = round((WIDTH - GAP * (len(pictures) - 1)) / sum(p.width / p.height for p in pictures))
    strip, x = Image.new("RGB", (WIDTH, height), "white"), 0
    for picture in pictures:
        picture = picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS)
        strip.paste(picture, (x, 0))
        x += picture.width + GAP
    return strip


def main() -> None:
    strips = [row(paths) for paths in ROWS]
    sheet = Image.new("RGB", (WIDTH, sum(s.height + GAP for s in strips) - GAP), "white")
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height + GAP
    sheet.save(ROOT / "docs/img/hero.jpg", quality=85)


if __name__ == "__main__":
    main()
