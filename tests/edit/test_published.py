"""Published mode against recordings of the published code: masks, energies, gradients, inversion and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slipstream.edit import Appearance, Canvas, Drag, Inversion, Move, Paste
from slipstream_tests.edit import published_runs as runs
from slipstream_tests.reference import edit as published
from slipstream_tests.reference.edit import Landmarks, nearest
from torch import Tensor

MASKS = json.loads((runs.FOLDER / "masks.json").read_text())
ENERGIES = json.loads((runs.FOLDER / "energies.json").read_text())
RECORDED_ENERGIES = runs.read("energies")
CASES = sorted({k.split("/")[0] for k in RECORDED_ENERGIES if "/" in k})


def box_mask(box: list[int], height: int = 128, width: int = 192) -> Tensor:
    mask = torch.zeros(height, width)
    mask[box[0] : box[1], box[2] : box[3]] = 1
    return mask


@pytest.mark.parametrize("name", sorted(MASKS))
def test_masks_equal_the_recordings(name: str) -> None:
    case, recorded = MASKS[name], runs.read("masks")
    mask = box_mask(case["box_y0y1x0x1"])
    if name.startswith("move"):
        made = published.move_masks(mask, case["dx"], case["dy"], case["resize_scale"], case["input_scale"])
        keys = {f"mask_{k}": v for k, v in made.items()}
    elif name.startswith("drag"):
        keys = {f"mask_{k}": v for k, v in published.drag_masks(mask, runs.pairs(case["points"])).items()}
    else:
        made = published.paste_masks(mask, case["dx"], case["dy"], case["resize_scale"])
        keys = {
            "mask_base_cur": made["base"], "mask_replace_cur": made["replace"],
            "dict_mask.base": made["base_pixels"], "dict_mask.replace": made["replace_pixels"],
        }  # fmt: skip
    for key, value in keys.items():
        expected = recorded[f"{name}/{key}"] > 0
        assert value.numel() == expected.numel(), key
        assert torch.equal(value.reshape(expected.shape), expected), key


def stand_in_features(z: Tensor) -> list[Tensor]:
    r = RECORDED_ENERGIES
    half = torch.einsum("oc,bchw->bohw", r["W0"], F.avg_pool2d(z, 2)) + 0.5 * r["B0"]
    return [torch.tanh(half), torch.tanh(torch.einsum("oc,bchw->bohw", r["W1"], z) + 0.5 * r["B1"])]


def recorded_edit(name: str) -> published.PublishedEdit:
    """The published edit of a case, its masks taken from the recording."""
    scalars = ENERGIES[name]["scalars"]
    case = {k.split("/")[1]: v for k, v in RECORDED_ENERGIES.items() if k.startswith(name + "/")}
    weights = {k: v for k, v in scalars.items() if k.startswith("w_")}
    mode = runs.mode_of(name)
    config = replace(published.DEFAULTS[mode], energy_scale=ENERGIES[name]["energy_scale"] / 1000, **weights)
    base = Inversion(torch.zeros(51, 4, 16, 24), torch.zeros(51), None, Canvas((128, 192), (16, 24), 8))  # type: ignore[arg-type]
    box, points = box_mask([48, 80, 72, 112]), [((60.0, 60.0), (84.0, 76.0))]
    tasks = {
        "move": Move(box, scale=scalars.get("resize_scale", 1)), "drag": Drag(box, points, "energy"),
        "landmarks": Landmarks(points), "appearance": Appearance(box, base, box), "paste": Paste(base, box),
    }  # fmt: skip
    made = published.EDITS[type(tasks[mode])](tasks[mode], base, config)
    names = {"tar": "mask_tar", "cur": "mask_cur", "other": "mask_other", "non_overlap": "mask_non_overlap"}
    names.update(base="mask_base_cur", replace="mask_replace_cur")
    made.masks = {k: case["kw." + n] > 0 for k, n in names.items() if "kw." + n in case}
    if mode == "move":
        made.region = made.to_grid(made.masks["cur"])
        made.inpaint_from = None
        if "kw.mask_x0_ref" in case:
            made.inpaint_from = nearest(published.binary(case["kw.mask_x0_ref"]), (32, 48)) > 0.5
    elif mode == "drag":
        made.region = made.to_grid(case["kw.mask_x0"])
    elif mode != "landmarks":
        made.region = made.to_grid(made.masks["base"])
    return made


@pytest.mark.parametrize("name", CASES)
def test_energies_and_gradients_equal_the_recordings(name: str) -> None:
    made = recorded_edit(name)
    case = {k.split("/")[1]: v for k, v in RECORDED_ENERGIES.items() if k.startswith(name + "/")}
    references = [[case[f"feat_ref{p}_{i}"] for i in range(2)] for p in range(2) if f"feat_ref{p}_0" in case]
    z = case["latent"].clone().requires_grad_(True)
    pulls = made.pulls(stand_in_features(z), references)
    order = ENERGIES[name]["order"]
    scale = ENERGIES[name]["energy_scale"]
    gradients = []
    for kind, pull in zip(("edit", "content"), pulls):
        index = order.index(kind)
        recorded = float(case[f"loss_{index}"])
        if recorded == recorded:  # NaN in the recording: no vacated cells
            assert pull.energy.item() * scale == pytest.approx(recorded, rel=1e-5)
        gradient = torch.autograd.grad(pull.energy, z, retain_graph=True)[0]
        gradients.append(gradient)
        torch.testing.assert_close(gradient * scale, case[f"grad_latent_{index}"], rtol=1e-4, atol=1e-6 * scale)
    guidance = made.scale(gradients, pulls, z)
    torch.testing.assert_close(guidance, case["guidance"], rtol=1e-4, atol=1e-6 * scale)


@pytest.fixture(scope="module")
def repeated() -> Any:
    kept: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in kept:
            kept[name] = runs.repeat(name)
        return kept[name]

    return get


@pytest.mark.parametrize("name", runs.names())
def test_whole_runs_equal_the_recordings(name: str, repeated: Any) -> None:
    record = runs.read(f"run_{name}")
    result, inversions, _, model = repeated(name)
    every = 5 if "inv_latents_every5" in record else 25
    for picture, inversion in enumerate(inversions):
        clean_first = (inversion.latents / (1 + inversion.sigmas**2).sqrt()[:, None, None, None]).flip(0)[::every]
        recorded = record[f"inv_latents_every{every}"][:, picture]
        # Published drag edits its inverted noise in place before it is recorded.
        upto = -1 if runs.mode_of(name) == "drag" else None
        torch.testing.assert_close(clean_first[:upto], recorded[:upto], rtol=0, atol=5e-5)
    calls = [int(i) for i in record["x_in_call_index"] if int(i) < len(model.seen)]
    seen = torch.cat([model.seen[i] for i in calls])
    assert len(calls) >= 3
    torch.testing.assert_close(seen[:1], record["latent_init"], rtol=0, atol=5e-5)
    torch.testing.assert_close(seen, record["x_in"][: len(calls)], rtol=0, atol=5e-3)
    if name not in runs.SHORT:
        torch.testing.assert_close(result.latents, record["out"], rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", [n for n in ("move", "drag") if n not in runs.SHORT])
def test_a_published_edit_costs_176_network_calls(name: str, repeated: Any) -> None:
    *_, model = repeated(name)
    assert model.inverted_calls == 50
    assert (model.calls, model.rows) == (176, 234)
    # 58 guided estimates and 12 steps back are whole calls; 28 x 2 energy calls stop at the second feature block.
    assert len(model.seen) == 58 + 12
