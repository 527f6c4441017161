"""Draw the pictures of the schedule search's help pages into web/docs/img: python tools/make_search_pictures.py (three CPU minutes)."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _common  # noqa: E402, F401
from PIL import Image  # noqa: E402
from slipstream import load  # noqa: E402
from slipstream.core.tensors import image_to_numpy  # noqa: E402
from slipstream.search import ModelPath, Paired, SearchConfig, SelfDistribution, compare, search  # noqa: E402
from slipstream.search.charts import comparison_chart, search_chart  # noqa: E402
from torch import Tensor  # noqa: E402

FOLDER = ROOT / "web" / "docs" / "img"
PROMPTS = ["a large red circle on a blue background", "a small green star on a white background"]


def save(image: Tensor, name: str) -> None:
    path = FOLDER / f"{name}.png"
    Image.fromarray(image_to_numpy(image)[0]).quantize(64).save(path, optimize=True)
    print(path.name, tuple(image.shape[1:3]), path.stat().st_size)


def main() -> None:
    pipe = load("pocket")
    path = ModelPath(
        pipe.model, pipe.encode_text(PROMPTS), pipe.encode_text([""]), (4, 16, 16), cfg_scale=3.0, name="pocket"
    )
    steps: list[Any] = []
    result = search(path, SearchConfig(steps=3, evaluations=60), callback=steps.append)
    stock = {name: sigmas.tolist() for name, sigmas in path.stock(3).items()}
    save(search_chart(steps[-1], result.schedule.levels, stock), "search_schedule")
    entries = {"searched": result.schedule.sigmas, **path.stock(3)}
    save(comparison_chart(compare(path, entries, [Paired(), SelfDistribution()])), "compare_schedules")


if __name__ == "__main__":
    main()
