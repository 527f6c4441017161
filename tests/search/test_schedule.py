from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slipstream.core.layers import LayerMask, skipped_at
from slipstream.core.schedules import DiscreteLevels, align_your_steps, kl_optimal, scaled_linear_alphas_cumprod
from slipstream.search.schedule import Schedule, ScheduleError, embed

LEVELS = DiscreteLevels(scaled_linear_alphas_cumprod())
MODEL = {"name": "m", "hash": "abc", "class": "UNet", "prediction": "epsilon", "sigma_min": 0.03, "sigma_max": 14.6}


def make(**changes: Any) -> Schedule:
    defaults = {
        "levels": (14.6, 4.0, 1.0, 0.2, 0.0),
        "model": {**MODEL, "shift": None},
        "sampler": "euler",
        "cfg_scale": 7.5,
        "nfe": 4,
        "name": "mine",
        "timesteps": (999.0, 700.0, 400.0, 100.0),
        "masks": (LayerMask(4.0, 1.0, ("down.0", "mid.1")),),
        "objective": {"id": "paired/latents", "value": 0.1, "baselines": {"karras": 0.2}},
        "search": {"method": "auto", "evaluations": 100},
        "source": "here",
        "warnings": ("a word",),
    }
    return Schedule(**{**defaults, **changes})


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_what_was_saved_is_what_is_loaded(tmp_path: pathlib.Path, suffix: str) -> None:
    schedule = make()
    assert Schedule.load(schedule.save(tmp_path / f"s{suffix}")) == schedule
    assert [p.name for p in tmp_path.iterdir()] == [f"s{suffix}"]


def test_a_model_file_can_carry_its_schedule(tmp_path: pathlib.Path) -> None:
    save_file({"w": torch.arange(4.0)}, tmp_path / "model.safetensors", {"author": "me"})
    embed(make(), tmp_path / "model.safetensors", tmp_path / "out.safetensors")
    assert Schedule.load(tmp_path / "out.safetensors") == make()
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], torch.arange(4.0))


def test_sigmas_are_what_samplers_take() -> None:
    sigmas = make().sigmas
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx([14.6, 4.0, 1.0, 0.2, 0.0])
    assert make().steps == 4
    assert make().logsnr[1] == pytest.approx(-2 * math.log(4))
    assert make().logsnr[-1] is None


def broken(**changes: Any) -> dict[str, Any]:
    data = make().to_dict()
    for name, value in changes.items():
        if value is KeyError:
            del data[name]
        else:
            data[name] = value
    return data


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("format", "something", "Expected `format` 'slipstream-schedule', but got 'something'"),
        ("version", 99, "Expected `version` 1 or 2, but got 99"),
        ("version", KeyError, "Expected `version` 1 or 2, but got None"),
        ("sigmas", KeyError, "Expected `sigmas`, but it is missing"),
        ("model", KeyError, "Expected `model`, but it is missing"),
        ("nfe", KeyError, "Expected `nfe`, but it is missing"),
        ("sampler", KeyError, "Expected `sampler`, but it is missing"),
        ("sigmas", "14 4 1 0", "Expected `sigmas` as a list, but got str"),
        ("sigmas", [14.6, 4.0, "1.0", 0.2, 0.0], "Expected `sigmas` as a number, but got '1.0'"),
        ("sigmas", [14.6, 4.0, True, 0.2, 0.0], "Expected `sigmas` as a number, but got True"),
        ("sigmas", [14.6, 1.0, 4.0, 0.2, 0.0], "Expected `sigmas` that descend strictly in float32, but got 1.0 then 4.0 at 2"),
        ("sigmas", [14.6, 4.0, 4.0, 0.2, 0.0], "descend strictly"),
        ("sigmas", [14.6, 4.0, float("nan"), 0.2, 0.0], "Expected `sigmas` as a finite number"),
        ("sigmas", [1e9, 4.0, 1.0, 0.2, 0.0], "Expected `sigmas` between 0 and 100000"),
        ("sigmas", [14.6, 4.0, 1.0, 0.2, -0.1], "Expected `sigmas` between 0"),
        ("sigmas", [14.6], "Expected `sigmas` with 2 to 1001 levels, but got 1"),
        ("sigmas", [], "Expected `sigmas` with 2 to"),
        ("sigmas", [float(i) for i in range(5000, 0, -1)], "Expected `sigmas` with at most 1001 entries, but got 5000"),
        ("sigmas", [10**400, 4.0, 1.0, 0.2, 0.0], "Expected `sigmas` as a finite number"),
        ("steps", 7, "Expected `steps` 4 for 5 sigmas"),
        ("steps", 3.5, "Expected `steps` as a whole number"),
        ("nfe", "4", "Expected `nfe` as a number"),
        ("cfg", [7.5], "Expected `cfg` as a number"),
        ("cfg", float("inf"), "Expected `cfg` as a finite number"),
        ("sampler", 3, "Expected `sampler` as a text"),
        ("model", [], "Expected `model` as an object"),
        ("model", {"sigma_min": 0.03}, "Expected `model.sigma_max`, but it is missing"),
        ("model", {**MODEL, "weight": 1}, "Expected no field `model.weight`, but got one"),
        ("model", {**MODEL, "sigma_max": "big"}, "Expected `model.sigma_max` as a number"),
        ("timesteps", [1.0], "Expected `timesteps` with one for each of the 4 levels above 0, but got 1"),
        ("logsnr", [1.0], "Expected `logsnr` with 5 values"),
        ("masks", {}, "Expected `masks` as a list"),
        ("masks", [{"sigma_high": 1.0}], r"Expected `masks\[0\]` as an object with sigma_high, sigma_low and skip"),
        ("masks", [{"sigma_high": 1.0, "sigma_low": 2.0, "skip": []}], r"Expected `masks\[0\]` with sigma_low below"),
        ("masks", [{"sigma_high": 1.0, "sigma_low": 0.0, "skip": [3]}], r"Expected `masks\[0\].skip` as a text"),
        ("objective", [1], "Expected `objective` as an object or null"),
        ("objective", {"id": "a"}, "Expected `objective.value`, but it is missing"),
        ("objective", {"id": "a", "value": "low"}, "Expected `objective.value` as a number"),
        ("objective", {"id": 3, "value": 1.0}, "Expected `objective.id` as a text"),
        ("objective", {"id": "a", "value": 1.0, "baselines": [1]}, "Expected `objective.baselines` as an object"),
        ("objective", {"id": "a", "value": 1.0, "baselines": {"karras": None}}, "`objective.baselines.karras` as a number"),
        ("objective", {"id": "a", "value": 1.0, "url": "x"}, "Expected no field `objective.url`"),
        ("search", {"seed": "x"}, "Expected `search.seed` as a number"),
        ("search", {"method": []}, "Expected `search.method` as a text"),
        ("search", {"command": "rm"}, "Expected no field `search.command`"),
        ("logsnr", [1.0, 2.0, "x", None, None], "Expected `logsnr` as a number"),
        ("version", True, "Expected `version` 1 or 2, but got True"),
        ("sigmas", [1.0, 0.5 + 1e-9, 0.5, 0.1, 0.0], "Expected `sigmas` that descend strictly in float32"),
        ("sigmas", [1.0, 0.5, 0.1, 1e-50, 0.0], "Expected `sigmas` that descend strictly in float32"),
        ("warnings", "none", "Expected `warnings` as a list"),
        ("comment", "hello", "Expected no field `comment`, but got one"),
    ],
)  # fmt: skip
def test_each_error_names_its_field(field: str, value: Any, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        Schedule.from_dict(broken(**{field: value}))


def test_texts_are_shown_without_control_characters() -> None:
    evil = "a\x1b[2J\nb\u202ec"
    schedule = Schedule.from_dict(
        broken(name=evil, model={**MODEL, "name": evil}, source=evil, warnings=[evil], sampler=evil,
               objective={"id": evil, "value": 1.0, "baselines": {evil: 2.0}}, search={"method": evil})
    )  # fmt: skip
    assert schedule.name == schedule.model["name"] == schedule.objective["id"] == "a [2J b c"
    assert json.dumps(schedule.to_dict(), ensure_ascii=False).isprintable()
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_dict(broken(**{evil: 1}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "to be valid JSON"),
        (b"\xff\xfe\x00", "to be valid JSON"),
        (b"[1, 2]", "Expected the schedule file to hold a JSON object, but got list"),
        (
            b'{"format": "slipstream-schedule", "version": 1, "nfe": NaN}',
            "Expected finite numbers in the schedule file, but got NaN",
        ),
        (b"[" * 100_000, "to be valid JSON"),
        (b"1" * 10_000, "to be valid JSON"),
        (b" " * (2 << 20), "Expected a file of at most"),
    ],
)
def test_files_that_are_no_schedule(tmp_path: pathlib.Path, content: bytes, says: str) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(ScheduleError, match=says):
        Schedule.load(path)


def test_safetensors_without_a_schedule(tmp_path: pathlib.Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ScheduleError, match="Expected 'slipstream_schedule' in the metadata"):
        Schedule.load(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ScheduleError, match="Expected a safetensors file"):
        Schedule.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize("steps", [2, 3, 4, 7, 30])
def test_resample_keeps_the_ends_and_descends(steps: int) -> None:
    schedule = make().resample(steps)
    assert schedule.steps == steps
    assert schedule.levels[0] == 14.6
    assert schedule.levels[-2:] == (0.2, 0.0)
    assert all(a > b for a, b in zip(schedule.levels, schedule.levels[1:]))


def test_resample_is_linear_in_log_snr() -> None:
    levels = make(levels=(8.0, 2.0, 0.5, 0.0), timesteps=None).resample(5).levels
    assert levels == pytest.approx((8.0, 4.0, 2.0, 1.0, 0.5, 0.0))
    flow = make(levels=(1.0, 0.8, 0.2, 0.0), model={**MODEL, "prediction": "flow"}, timesteps=None).resample(5).levels
    assert flow[0] == 1.0
    assert flow[2] == pytest.approx(0.8)
    assert flow[3] == pytest.approx(0.5)  # halfway in log-SNR between 0.8 and 0.2
    assert flow[4] == pytest.approx(0.2)


def test_resample_of_a_schedule_that_ends_above_zero() -> None:
    schedule = make(levels=(9.0, 3.0, 1.0), timesteps=None).resample(4)
    assert schedule.levels == pytest.approx((9.0, 27**0.5, 3.0, 3**0.5, 1.0))


def test_resample_to_its_own_length_changes_nothing_and_else_warns() -> None:
    assert make().resample(4) == make()
    assert "Resampled from 4 to 6" in make().resample(6).warnings[-1]
    assert make().resample(1).levels == (14.6, 0.0)
    with pytest.raises(ValueError, match="at least 2 steps"):
        make(levels=(14.6, 0.0), timesteps=None).resample(3)
    with pytest.raises(ValueError, match="Expected `steps`"):
        make().resample(0)


def test_mismatches_are_told() -> None:
    schedule = make()
    assert schedule.mismatches({"name": "m", "hash": "abc", "sigma_max": 14.6}, "euler", 7.5) == []
    told = schedule.mismatches({"name": "n", "hash": "def", "sigma_max": 1.0}, "heun", 1.0)
    assert len(told) == 4
    assert "'m'" in told[0]
    assert "'n'" in told[0]
    assert "above this model's 1" in told[1]
    assert "'heun'" in told[2]
    assert "cfg 7.5, not 1" in told[3]
    (same,) = schedule.mismatches({"name": "m", "hash": "def", "sigma_max": 14.6})
    assert "other weights of 'm' (another checkpoint, LoRA or strength)" in same


def test_masks_hold_for_their_interval() -> None:
    masks = make().masks
    assert skipped_at(masks, 4.0) == {"down.0", "mid.1"}
    assert skipped_at(masks, 2.0) == {"down.0", "mid.1"}  # the second call of a two-call sampler
    assert skipped_at(masks, 1.0) == frozenset()
    assert skipped_at(masks, 14.6) == frozenset()
    assert skipped_at(masks, float(torch.tensor(4.0, dtype=torch.float32)) * (1 + 1e-7)) == {"down.0", "mid.1"}


def presets(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted((root / "search" / "presets").glob("*.json"))


def test_every_preset_loads_and_names_its_source(root: pathlib.Path) -> None:
    assert len(presets(root)) >= 4
    for path in presets(root):
        schedule = Schedule.load(path)
        assert "arXiv" in schedule.source
        assert schedule.nfe == schedule.steps
        assert json.loads(path.read_text()) == schedule.to_dict()
        if schedule.timesteps is not None:
            sigmas = LEVELS.t_to_sigma(torch.tensor(schedule.timesteps, dtype=torch.float64))
            assert [s for s in schedule.levels if s > 0] == pytest.approx(sigmas.tolist(), rel=1e-4)


def test_align_your_steps_at_its_own_length_is_the_published_list(root: pathlib.Path) -> None:
    for name in ("ays_sd15", "ays_sdxl"):
        preset = Schedule.load(root / "search" / "presets" / f"{name}_10.json")
        torch.testing.assert_close(align_your_steps(LEVELS, 10, name), preset.sigmas, rtol=1e-4, atol=1e-5)
        four = align_your_steps(LEVELS, 4, name)
        assert four[0] == pytest.approx(14.6146, rel=1e-4)
        assert len(four) == 5
        assert four[-1] == 0
    # Log-linear at 2.5 of 10 positions: the geometric mean of the third and fourth level.
    assert float(align_your_steps(LEVELS, 4)[1]) == pytest.approx((3.863676 * 2.694616) ** 0.5, rel=1e-4)


def test_kl_optimal_is_even_in_arctan() -> None:
    sigmas = kl_optimal(LEVELS, 5)[:-1].double()
    assert torch.allclose(sigmas.atan().diff(), sigmas.atan().diff()[0], atol=1e-6)
    assert kl_optimal(LEVELS, 1).tolist() == pytest.approx([LEVELS.sigma_max, 0.0])
