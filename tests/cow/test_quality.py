"""The quality bar on exact Gaussian fields: a small version of benchmarks/cow_quality.py."""

from __future__ import annotations

import importlib.util
import sys

import pytest


@pytest.fixture(scope="module")
def quality(root):
    """benchmarks/cow_quality.py and its neighbours, by path and for this module only."""
    folder = str(root / "benchmarks")
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location("cow_quality", root / "benchmarks" / "cow_quality.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["cow_quality"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)


def test_the_default_meets_the_bar_and_the_alternatives_do_not(quality):
    """Seed RMSE at most 0.12, seam after paste at most 1.3, background variance at least 0.75, in about 36 network calls."""
    methods = ("COW (default)", "paste + img2img 0.7", "masked replacement, eta 0", "RePaint, 6 levels x 5")
    found = {
        name: {key: sum(values) / len(values) for key, values in row.items()}
        for name, row in quality.measure_fields(64, 2, methods).items()
    }
    ours = found["COW (default)"]
    assert ours["calls"] == 36
    assert ours["seed RMSE"] <= 0.12
    assert ours["seam after paste"] <= 1.3
    assert ours["background variance"] >= 0.75
    for name in methods[1:]:
        assert (
            found[name]["seed RMSE"] > 0.12
            or found[name]["seam after paste"] > 1.3
            or found[name]["background variance"] < 0.75
        ), name
    # The measures know the truth.
    truth = found["the fields themselves"]
    assert truth["seed RMSE"] == 0
    assert truth["seam"] == pytest.approx(1, abs=0.06)
    assert truth["background variance"] == pytest.approx(1, abs=0.06)
    assert truth["Mahalanobis"] == pytest.approx(1, abs=0.03)
