"""A small search job that tests run here, in other processes and in Ray workers: `python jobs.py STORE [SECONDS PER CALL]`."""

from __future__ import annotations

import importlib.util
import pathlib
import sqlite3
import sys
import time
from typing import Any

import torch

if __name__ == "__main__":  # another process: nothing has made the packages importable yet
    conftest = pathlib.Path(__file__).resolve().parent.parent / "conftest.py"
    spec = importlib.util.spec_from_file_location("slipstream_conftest", conftest)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

from slipstream.core.denoiser import Conditioning
from slipstream.search import ModelPath, SearchConfig, search
from slipstream.search.evaluation import Task
from slipstream.search.objectives import Paired

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def stored(path: pathlib.Path) -> int:
    """Return how many evaluations a store holds, also while another process makes it."""
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(path, timeout=5) as db:
            return db.execute("SELECT COUNT(*) FROM evaluation").fetchone()[0]
    except sqlite3.OperationalError:  # the tables are being made
        return 0


def mixtures() -> Any:
    """Import benchmarks/_mixtures.py by path."""
    name = "slipstream_mixtures"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "_mixtures.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class SlowPath(ModelPath):
    """Takes its time, so that a process can be killed in the middle."""

    seconds = 0.0

    def sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().sample(*args, **kwargs)


def make_path(seconds: float = 0.0, **changes: Any) -> ModelPath:
    model = mixtures().ring()
    options = {"size": model.size, "seed": 7, "batch": 64, "name": "ring", **changes}
    path = SlowPath(model, Conditioning(torch.zeros(1, 1, 1)), **options)
    path.seconds = seconds
    return path


def make_config(**changes: Any) -> SearchConfig:
    defaults = {"steps": 3, "pairs": 48, "holdout_pairs": 48, "evaluations": 40, "teacher_steps": 30, "finalists": 3}
    return SearchConfig(**{**defaults, **changes})


def make_task(seconds: float = 0.0) -> Task:
    return Task(make_path(seconds), Paired(), make_config())


if __name__ == "__main__":
    result = search(make_path(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0), make_config(), store=sys.argv[1])
    sys.stdout.write(f"{result.schedule.levels}\n")
