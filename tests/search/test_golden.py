"""The recorded runs of AutoDiffusion's published code: what is equal to it, and what is corrected."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from slipstream.core import VE, samplers
from slipstream.core.layers import measure, skippable, skipping
from slipstream.core.schedules import DiscreteLevels, with_zero
from slipstream.search import Schedule
from slipstream.search.comparison import calls_per_sample
from slipstream.search.config import SearchConfig
from slipstream.search.space import Candidate, Space, candidate_of
from slipstream.search.statistics import frechet_distance
from slipstream.search.strategies import cross, mutate
from slipstream_tests.search import jobs
from slipstream_tests.search.adm import TinyADM
from torch import Tensor


@pytest.fixture(scope="module")
def golden(golden_path: pathlib.Path) -> pathlib.Path:
    return golden_path / "search"


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("index", range(11))
def test_frechet_distance_equals_the_reference(golden: pathlib.Path, index: int) -> None:
    case = read(golden / "fid_cases.json")[index]
    arrays = np.load(golden / "fid_cases.npz")
    mean1, cov1, mean2, cov2 = (torch.from_numpy(arrays[f"{index}_{kind}"]) for kind in ("mu1", "s1", "mu2", "s2"))
    singular = case["warned_singular"] or "rank" in case["name"]
    value = frechet_distance(mean1, cov1, mean2, cov2)
    if singular:
        assert value == pytest.approx(case["fid"], abs=2e-5)
    else:
        assert value == pytest.approx(case["fid"], rel=1e-9, abs=1e-9)


# ------------------------------------------------------------------------------------------------------- layers


@pytest.fixture(scope="module")
def unet(golden: pathlib.Path) -> TinyADM:
    model = TinyADM()
    state = load_file(golden / "tiny_unet_fp16.safetensors")
    model.load_state_dict({k.removeprefix("unet."): v.float() for k, v in state.items()})
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def recorded(golden: pathlib.Path) -> dict[str, Tensor]:
    return load_file(golden / "tiny_unet_skip.safetensors")


@pytest.fixture(scope="module")
def table(golden: pathlib.Path) -> list[dict]:
    return read(golden / "ddim_and_unet.json")["unet"]["layers"]


def test_the_blocks_found_are_the_published_ones(unet: TinyADM, table: list[dict]) -> None:
    assert {name for name, _ in skippable(unet)} == {row["module"] for row in table}


@pytest.mark.parametrize("layer", range(14))
def test_each_skipped_block_gives_the_recorded_output(unet: TinyADM, recorded: dict, table: list, layer: int) -> None:
    with skipping(unet, [table[layer]["module"]]):
        output = unet(recorded["in.x"], recorded["in.t"])
    torch.testing.assert_close(output, recorded[f"out.skip{layer}"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "layers"), [("full", []), ("multi", [1, 4, 7]), ("all", range(14))])
def test_several_skipped_blocks(unet: TinyADM, recorded: dict, table: list, name: str, layers: list[int]) -> None:
    with skipping(unet, [table[i]["module"] for i in layers]):
        output = unet(recorded["in.x"], recorded["in.t"])
    torch.testing.assert_close(output, recorded[f"out.{name}"], atol=2e-5, rtol=1e-4)


def test_costs_leave_out_what_a_skip_still_computes(unet: TinyADM, recorded: dict) -> None:
    layers = measure(unet, lambda: unet(recorded["in.x"], recorded["in.t"]))
    assert len(layers) == 14
    assert layers[0].name == "input_blocks.1.0"
    assert 0.5 < sum(layer.cost for layer in layers) < 1
    # The 1x1 shortcut of a block that changes channels runs also when skipped: 64x128 3x3 + 64x64 3x3, not + 64x128.
    by_name = {layer.name: layer.cost for layer in layers}
    convs = (128 * 64 + 64 * 64) * 9 * 64 * 2 * 2 + 128 * 128 * 2 * 2
    same = 2 * 64 * 64 * 9 * 64 * 2 * 2 + 128 * 128 * 2 * 2
    assert by_name["output_blocks.0.0"] / by_name["middle_block.0"] == pytest.approx(convs / same, rel=1e-6)


def test_masks_bind_to_their_own_step(unet: TinyADM, recorded: dict, table: list, golden: pathlib.Path) -> None:
    """D2: the published code hands the masks out by rank of the step; ours follow sigma."""
    case = read(golden / "ddim_and_unet.json")["ddim_masks"]
    alphas = load_file(golden / "ddim_custom_steps.safetensors")["linear.alphas_cumprod"]
    levels = DiscreteLevels(alphas)
    order = sorted(range(3), key=lambda i: -case["requested"][i])
    steps = [case["requested"][i] for i in order]
    sigmas = with_zero(levels.t_to_sigma(torch.tensor(steps)))
    candidate = Candidate(
        tuple(sigmas.tolist()), tuple(frozenset(table[j]["module"] for j in case["masks"][i]) for i in order)
    )
    own = recorded["ddim_masks.traj_own_binding"]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        skip = [n for m in candidate.layer_masks() if m.holds(float(sigma)) for n in m.skip]
        t = levels.sigma_to_t(sigma.reshape(1)).round().expand(len(x))
        with skipping(unet, skip):
            eps = unet(x / (sigma**2 + 1).sqrt(), t)
        return (x - sigma * eps).clamp(-1, 1)  # the recorded run clips its estimate

    x = own[0] * (sigmas[0] ** 2 + 1).sqrt()
    final = samplers.sample("euler", denoise, x, sigmas, VE)
    torch.testing.assert_close(final, own[-1], atol=2e-4, rtol=2e-4)
    assert (final - recorded["ddim_masks.traj_ref_binding"][-1]).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("case", ["imagenet4", "lsun5", "mixed"])
def test_euler_on_sigmas_is_ddim_on_custom_steps(golden: pathlib.Path, kind: str, case: str) -> None:
    data = load_file(golden / "ddim_custom_steps.safetensors")
    steps = read(golden / "ddim_and_unet.json")["ddim"][f"{kind}.{case}"]["timestep_map"][::-1]
    abar = data[f"{kind}.alphas_cumprod"].double()
    sigmas = ((1 - abar) / abar).sqrt()[steps]
    by_sigma = {float(s): t for s, t in zip(sigmas, steps)}
    trajectory = data[f"{kind}.{case}.clip0.traj"].double()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        u = by_sigma[float(sigma)] / 1000
        scaled = x / (sigma**2 + 1).sqrt()
        return x - sigma * (torch.tanh(scaled * (0.3 + 0.6 * u)) + 0.1 * torch.sin(torch.tensor(6 * u).double()))

    x = trajectory[0] * (sigmas[0] ** 2 + 1).sqrt()
    final = samplers.euler(denoise, x, with_zero(sigmas), VE)
    expected = trajectory[-1]
    assert float((final - expected).abs().max() / expected.abs().max()) < 2e-6


@pytest.mark.parametrize("case", ["custom4", "uniform4", "uniform6", "custom10", "uniform10"])
def test_stable_diffusion_s_ddim_ends_at_the_first_level_not_at_zero(golden: pathlib.Path, case: str) -> None:
    """T2: its last jump goes to alphas_cumprod[0]. A schedule with that terminal gives the recorded result."""
    data = load_file(golden / "sd_samplers_custom_steps.safetensors")
    steps = read(golden / "sd_samplers_custom_steps.json")[f"ddim.{case}"]["model_t_inputs"]
    abar = data["alphas_cumprod"].double()
    table = ((1 - abar) / abar).sqrt()
    sigmas = torch.cat([table[steps], table[:1]])
    by_sigma = {float(s): t for s, t in zip(sigmas, steps)}

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        u = by_sigma[float(sigma)] / 1000
        scaled = x / (sigma**2 + 1).sqrt()
        return x - sigma * (torch.tanh(scaled * (0.3 + 0.6 * u)) + 0.1 * torch.sin(torch.tensor(6 * u).double()))

    x = data["noise"].double() * (sigmas[0] ** 2 + 1).sqrt()
    final = samplers.euler(denoise, x, sigmas, VE) / (table[0] ** 2 + 1).sqrt()
    torch.testing.assert_close(final.float(), data[f"ddim.{case}"], atol=2e-5, rtol=2e-5)


DPM_CASES = ["uniform4", "found4", "uniform6", "uniform10", "custom6"]


class ClosedForm:
    """The recorded runs' "network" as a denoiser on sigmas; remembers the times that it was asked at."""

    def __init__(self, times: dict[float, float]) -> None:
        self.times, self.asked = times, []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        t = self.times[float(sigma)]
        self.asked.append(t)
        scaled = x / (sigma**2 + 1).sqrt()
        return x - sigma * (
            torch.tanh(scaled * (0.3 + 0.6 * t / 1000)) + 0.1 * torch.sin(torch.tensor(6 * t / 1000).double())
        )


@pytest.mark.parametrize("case", DPM_CASES)
def test_dpm_solver_on_custom_steps(golden: pathlib.Path, case: str) -> None:
    """The recorded solver stops above 0, at its last of K + 1 times for K calls (D10), with a last step of first order."""
    data = load_file(golden / "sd_samplers_custom_steps.safetensors")
    run = read(golden / "sd_samplers_custom_steps.json")[f"dpmpp2m.{case}"]
    sigmas = torch.tensor(run["sigma_edm"], dtype=torch.float64)
    denoise = ClosedForm(dict(zip(sigmas.tolist(), run["model_time_inputs"])))
    x = data["noise"].double() * (sigmas[0] ** 2 + 1).sqrt()
    before = samplers.dpmpp_2m(denoise, x, sigmas[:-1], VE)
    final = samplers.euler(denoise, before, sigmas[-2:], VE) / (sigmas[-1] ** 2 + 1).sqrt()
    torch.testing.assert_close(final.float(), data[f"dpmpp2m.{case}"], atol=2e-5, rtol=2e-5)
    assert denoise.asked == run["model_time_inputs"]
    assert len(denoise.asked) == run["nfe"] == run["steps"] == len(sigmas) - 1


def test_the_recorded_search_result_is_the_preset(golden: pathlib.Path, root: pathlib.Path) -> None:
    """AutoDiffusion's one list for Stable Diffusion: five levels, four calls, the end above 0."""
    run = read(golden / "sd_samplers_custom_steps.json")["dpmpp2m.found4"]
    found = [s for p in (root / "search" / "presets").glob("*.json") if (s := Schedule.load(p)).sampler == "dpmpp_2m"]
    assert [s.levels for s in found] == [pytest.approx(run["sigma_edm"], rel=1e-4)]
    assert found[0].nfe == run["nfe"]


def plms(denoise: Any, x: Tensor, sigmas: Tensor, *_: Any, **__: Any) -> Tensor:
    """Pseudo linear multistep (arXiv 2202.09778), as the recorded runs have it: the first step calls twice."""
    slopes: list[Tensor] = []
    for sigma, after in zip(sigmas[:-1], sigmas[1:]):
        slopes.append((x - denoise(x, sigma)) / sigma)
        e = slopes[::-1]
        if len(e) == 1:
            ahead = x + (after - sigma) * e[0]
            slope = (e[0] + (ahead - denoise(ahead, after)) / after) / 2
        elif len(e) == 2:
            slope = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            slope = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            slope = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = x + (after - sigma) * slope
    return x


@pytest.mark.parametrize("case", ["uniform4", "uniform6", "uniform10", "custom4", "custom10"])
def test_a_sampler_that_calls_twice_in_a_step_is_counted_so(
    golden: pathlib.Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D10: PLMS makes K + 1 calls in K steps. None is built in; one written here meets the recording and the recorded count."""
    data = load_file(golden / "sd_samplers_custom_steps.safetensors")
    run = read(golden / "sd_samplers_custom_steps.json")[f"plms.{case}"]
    steps = list(dict.fromkeys(run["model_t_inputs"]))
    abar = data["alphas_cumprod"].double()
    table = ((1 - abar) / abar).sqrt()
    sigmas = torch.cat([table[steps], table[:1]])
    denoise = ClosedForm({float(s): t for s, t in zip(sigmas, steps)})
    x = data["noise"].double() * (sigmas[0] ** 2 + 1).sqrt()
    final = plms(denoise, x, sigmas) / (table[0] ** 2 + 1).sqrt()
    torch.testing.assert_close(final.float(), data[f"plms.{case}"], atol=2e-5, rtol=2e-5)
    assert denoise.asked == run["model_t_inputs"]

    monkeypatch.setitem(samplers.SAMPLERS, "plms", plms)
    path = jobs.make_path(sampler="plms")
    assert calls_per_sample(path, candidate_of(path.stock(run["K"])["karras"])) == run["nfe"]


# ------------------------------------------------------------------------------------------------------ operators


@pytest.fixture(scope="module")
def space() -> Space:
    table = torch.linspace(0.03, 14.6, 1000, dtype=torch.float64)
    return Space(table, SearchConfig(steps=4, pin_first=False, min_gap=1))


def test_mutants_keep_the_published_properties(golden: pathlib.Path, space: Space) -> None:
    """Recorded mutants: length kept, no duplicates, new entries from outside the parent. Ours too, and sorted (D5)."""
    for case in read(golden / "ops_time_only.json")["mutation"]:
        parents = [set(p) for p in case["parents"]]
        assert all(len(c) == case["K"] == len(set(c)) for c in case["out"])
        assert any(set(case["out"][0]) & p for p in parents)
    parent = tuple(sorted(read(golden / "ops_time_only.json")["mutation"][0]["parents"][0], reverse=True))
    rng = random.Random(0)
    changed = 0
    for _ in range(200):
        child, masks, _ = mutate(space, (parent, (), ()), 0.25, 0.0, rng)
        assert len(child) == len(set(child)) == 4
        assert list(child) == sorted(child, reverse=True)
        assert masks == ()
        changed += len(set(child) - set(parent))
    assert 150 < changed < 250  # 200 mutants x 4 levels x 0.25


def test_crossings_of_recorded_parents_never_lose_a_step(golden: pathlib.Path, space: Space) -> None:
    """D4: position-wise crossover can draw the same step twice; the published sampler then runs fewer steps."""
    parents = [tuple(sorted(p, reverse=True)) for p in read(golden / "ops_time_only.json")["crossover"][0]["parents"]]
    rng = random.Random(1)
    for _ in range(300):
        a, b = rng.choice(parents), rng.choice(parents)
        child, _, _ = cross(space, (a, (), ()), (b, (), ()), rng)
        assert len(set(child)) == 4
        assert list(child) == sorted(child, reverse=True)
    same_rank = cross(space, ((900, 500, 300, 1), (), ()), ((800, 500, 200, 2), (), ()), rng)[0]
    assert all(v in pair for v, pair in zip(same_rank, [(900, 800), (500,), (300, 200), (1, 2)]))
    clash = cross(space, ((900, 500, 499, 498), (), ()), ((500, 499, 498, 497), (), ()), rng)[0]
    assert len(set(clash)) == 4


def test_masks_mutate(golden: pathlib.Path) -> None:
    """D1: all 200 recorded mutants carry a parent's masks unchanged."""
    noop = read(golden / "ops_time_and_layers.json")["mutation_noop"]
    assert noop["mutants"] == noop["mutants_whose_whole_mask_list_equals_a_parent"] == 200
    costs = {f"block{i}": 0.05 for i in range(14)}
    space = Space(torch.linspace(0.03, 14.6, 1000, dtype=torch.float64), SearchConfig(steps=4, layers=True), costs)
    rng = random.Random(0)
    parent = ((999, 600, 300, 50), (frozenset({"block1"}), frozenset(), frozenset({"block2"}), frozenset()), ())
    mutants = [mutate(space, parent, 0.0, 1.0, rng) for _ in range(200)]
    different = [m for _, m, _ in mutants if m != parent[1]]
    assert len(different) > 150
    for genome, masks, _ in mutants:
        assert space.cost(masks, len(genome)) <= 4 + 1e-9
        assert max(len(m) for m in masks or (frozenset(),)) <= space.most_skipped()
