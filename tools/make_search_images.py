"""Draw the images of the schedule search's help pages into web/docs/img: python tools/make_search_images.py (three CPU minutes)."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _common  # noqa: E402, F401
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from slipstream import load  # noqa: E402
from slipstream.core.tensors import image_to_numpy  # noqa: E402
from slipstream.search import ModelPath, Paired, Schedule, SearchConfig, SelfDistribution, compare, search  # noqa: E402
from slipstream.search.charts import comparison_chart, search_chart  # noqa: E402
from slipstream.search.evaluation import teacher_sigmas  # noqa: E402
from torch import Tensor  # noqa: E402

FOLDER = ROOT / "web" / "docs" / "img"
PROMPTS = ["a large red circle on a blue background", "a small green star on a white background"]


def save(image: Tensor, name: str) -> None:
    path = FOLDER / f"{name}.png"
    Image.fromarray(image_to_numpy(image)[0]).quantize(64).save(path, optimize=True)
    print(path.name, tuple(image.shape[1:3]), path.stat().st_size)


def side_by_side(pipe: Any) -> None:
    """Ten captions in five rows: 50 steps, then 2 and 3 steps, each of beta and of the shipped schedule."""
    import schedule_quality

    path = schedule_quality.pocket_path(pipe, schedule_quality.captions(10, 5000)[1], 900)
    rows = [teacher_sigmas(path.table(), 50)]
    for steps in (2, 3):
        rows += [path.stock(steps)["beta"], Schedule.load(ROOT / "search" / "presets" / f"pocket_{steps}.json").sigmas]
    images = [torch.cat(list(pipe.decode(path.sample(sigmas, range(10)))), 1) for sigmas in rows]
    sheet = Image.fromarray(image_to_numpy(torch.cat(images)[None])[0])
    sheet.resize((960, 480), Image.Resampling.LANCZOS).save(FOLDER / "searched_steps.jpg", quality=85)


def main() -> None:
    pipe = load("pocket")
    side_by_side(pipe)
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
