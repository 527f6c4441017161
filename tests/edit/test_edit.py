"""The default edit on a small random network: what must hold whatever the weights are."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest
import torch
from PIL import Image as PilImage
from slipstream.core import SeededNoise, Step
from slipstream.core.attention import AttentionBank
from slipstream.core.cache import GIB, Cache, footprint
from slipstream.core.images import read_mask
from slipstream.core.masks import grow
from slipstream.edit import (
    Appearance,
    Drag,
    EditConfig,
    Inversion,
    Move,
    Paste,
    edit,
    finish,
    fit,
    guided,
    invert,
    placing,
    prepare,
    sample_edit,
)
from slipstream.edit.guided import LIMIT
from slipstream.edit.preview import preview
from slipstream_tests.edit import small
from slipstream_tests.edit.small import FAST, box
from slipstream_tests.noisy_masks import NOISY, noisy
from torch import Tensor

MOVE = Move(box(), 36.0, 8.0)


@pytest.fixture(scope="module")
def inverted() -> Any:
    return small.inverted()


def run(inverted: Any, tasks: Any = MOVE, config: EditConfig = FAST, seed: int = 1, **more: Any) -> Any:
    model, inversion = inverted
    return edit(model, inversion, tasks, small.cond(2), small.cond(3), config, SeededNoise(seed), **more)


TASKS = {
    "move": lambda i: MOVE,
    "resize": lambda i: Move(box(), scale=1.5),
    "paste": lambda i: Paste(i, box(), 30.0, 10.0, 0.8),
    "appearance": lambda i: Appearance(box(), i, box(8, 50, 30, 80)),
    "drag by warp": lambda i: Drag(box(10, 10, 50, 66), [((28.0, 28.0), (48.0, 30.0))]),
    "drag by energy": lambda i: Drag(box(10, 10, 50, 66), [((28.0, 28.0), (48.0, 30.0))], "energy"),
    "two tasks": lambda i: Move(box(), 36.0, 8.0) + Appearance(box(44, 4, 60, 20), i, box()),
}


@pytest.mark.parametrize("name", TASKS)
def test_pixels_outside_the_edit_are_returned_untouched(name: str, inverted: Any) -> None:
    image = small.picture()
    result = run(inverted, TASKS[name](inverted[1]), encode=small.encode)
    out = finish(image, result, small.decode)
    outside = result.mask[0] == 0
    assert 0.1 < float(outside.float().mean()) < 0.95
    assert torch.equal(out[0][outside], image[0][outside])
    assert not torch.equal(out, image)
    assert bool(torch.isfinite(out).all())
    # Latents of cells that no part of the edit reaches are the image's own as well.
    far = torch.nn.functional.adaptive_max_pool2d(result.mask[None], (8, 12))[0, 0] == 0
    far = torch.nn.functional.max_pool2d((~far).float()[None, None], 3, 1, 1)[0, 0] == 0
    kept = (result.latents - small.encode(image))[0][:, far]
    assert kept.numel() == 0 or float(kept.abs().max()) < 1e-5


NOISY_TASKS = {
    "move": lambda i, m: Move(m(box()), 36.0, 8.0, fill_from=m(box(44, 60, 60, 90))),
    "paste": lambda i, m: Paste(i, m(box()), 30.0, 10.0, 0.8),
    "appearance": lambda i, m: Appearance(m(box()), i, m(box(8, 50, 30, 80))),
    "drag by warp": lambda i, m: Drag(m(box(10, 10, 50, 66)), [((28.0, 28.0), (48.0, 30.0))]),
}


@pytest.mark.parametrize("name", NOISY_TASKS)
def test_a_noisy_mask_edits_as_the_clean_one_does(name: str, inverted: Any) -> None:
    image, make = small.picture(), NOISY_TASKS[name]

    def edited(change: Any) -> tuple[Tensor, ...]:
        task = make(inverted[1], change)
        result = run(inverted, task, encode=small.encode)
        return finish(image, result, small.decode), result.mask, *preview(image, [task])

    wanted = edited(lambda m: m)
    for kind in NOISY:
        for clean, found in zip(wanted, edited(lambda m: noisy(m, kind))):  # noqa: B023
            assert torch.equal(clean, found), kind


@pytest.mark.parametrize("quality", [30, 75])
def test_a_jpeg_mask_edits_nearly_as_the_clean_one_does(quality: int, inverted: Any, tmp_path: pathlib.Path) -> None:
    hard = box(27, 13, 37, 26)  # across the blocks of JPEG
    PilImage.fromarray((hard * 255).byte().numpy()).save(tmp_path / "mask.jpg", quality=quality)
    read = read_mask(tmp_path / "mask.jpg")
    assert float(read[0][hard == 0].max()) > 0.01
    image = small.picture()
    clean, found = (
        finish(image, run(inverted, Move(m, 36.0), encode=small.encode), small.decode) for m in (hard, read)
    )
    assert float((clean - found).abs().mean()) < 0.005
    ring = grow(hard[None], 8)[0]  # JPEG reaches no further than its blocks
    far = torch.maximum(ring, torch.roll(ring, 36, 1))
    far = grow(far[None], 2 * FAST.feather)[0] == 0
    assert torch.equal(found[0][far], image[0][far])
    assert 0.3 < float(far.float().mean()) < 0.9


def test_the_mask_has_a_soft_seam_and_covers_old_and_new_place(inverted: Any) -> None:
    mask = run(inverted, config=FAST.replace(energy_scale=0.0)).mask[0]
    assert bool((mask[20:36, 20:36] > 0.99).all())
    assert bool((mask[28:44, 56:72] > 0.99).all())
    assert bool(((mask > 0.01) & (mask < 0.99)).any())
    hard = run(inverted, config=FAST.replace(energy_scale=0.0, feather=0)).mask
    assert set(hard.unique().tolist()) == {0.0, 1.0}


def test_the_same_seed_gives_the_same_result_and_another_does_not(inverted: Any) -> None:
    first, second, other = run(inverted), run(inverted), run(inverted, seed=2)
    assert torch.equal(first.latents, second.latents)
    assert not torch.equal(first.latents, other.latents)


def test_an_edit_does_not_change_its_inputs(inverted: Any) -> None:
    _, inversion = inverted
    before, mask = inversion.latents.clone(), MOVE.mask.clone()
    run(inverted)
    assert torch.equal(inversion.latents, before)
    assert torch.equal(MOVE.mask, mask)


@pytest.mark.parametrize("reference_size", ["same", "other"])
def test_a_bank_and_a_batch_row_give_the_same_edit(reference_size: str) -> None:
    results, rows = [], []
    for memory in ("bank", "row"):
        config = FAST.replace(memory=memory, energy_scale=0.0)
        model, base = small.inverted(config=config)
        task: Any = MOVE
        if reference_size == "other":
            padded, canvas = fit(torch.rand(1, 40, 56, 3, generator=torch.Generator().manual_seed(0)), 8)
            reference = invert(model, small.encode(padded), small.cond(4), config, canvas, padded)
            task = Paste(reference, box(8, 8, 30, 40, (40, 56)), 10.0)
        before = model.rows
        results.append(run((model, base), task, config).latents)
        rows.append(model.rows - before)
        assert base.memory == memory
    torch.testing.assert_close(results[0], results[1], atol=2e-4, rtol=1e-4)
    assert rows[1] > rows[0]


def test_a_bank_that_does_not_fit_switches_to_a_row_and_says_so(caplog: Any) -> None:
    _, inversion = small.inverted(config=FAST.replace(memory_limit=1000))
    assert inversion.memory == "row"
    assert inversion.bank is None
    assert "computed again in each step" in caplog.text


def test_a_bank_keeps_only_the_steps_that_are_read() -> None:
    _, inversion = small.inverted()
    assert inversion.bank is not None
    assert inversion.bank.steps == {1, 2, 3, 4, 5}


def test_rows_of_a_move() -> None:
    model, inversion = small.inverted()
    assert (model.calls, model.rows) == (6, 6)
    result = run((model, inversion))
    # Steps 0 and 1 follow the draft wholly and cost nothing; 2 is guided (reference, current); four steps of cfg.
    assert model.rows == 6 + 4 * 2 + 2
    run((model, inversion))
    assert model.rows == 6 + 2 * (4 * 2) + 2 + 1  # reference features are kept for re-edits
    assert result.notes == ()


def test_an_edit_is_prepared_once_and_each_task_placed_once(inverted: Any, monkeypatch: Any) -> None:
    counted: list[str] = []

    def count(module: Any, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (counted.append(name), real(*a, **k))[1])

    count(placing, "place")
    count(placing, "draft")
    count(guided, "GuidedEdit")
    problem = prepare(MOVE + Move(box(44, 4, 60, 20), 0.0, -30.0), inverted[1], FAST, small.encode)
    assert problem.calls > 0
    sample_edit(inverted[0], problem, small.cond(2), small.cond(3), SeededNoise(1))
    assert counted == ["place", "place", "draft", "GuidedEdit"]


def test_features_are_held_within_the_bound_of_the_cache(monkeypatch: Any) -> None:
    kept = Cache("inversions", GIB, GIB)
    monkeypatch.setattr(sys.modules["slipstream.edit.invert"], "INVERSIONS", kept)
    model, inversion = small.inverted()
    base = kept.get("photo", lambda: inversion)
    before, held = kept.used()[1], footprint(base)[1]
    assert before == held
    features = inversion.features(model, 2)
    assert footprint(base)[1] == held  # nothing grows inside the inversion
    assert kept.used()[1] == held + footprint(features)[1]
    rows = model.rows
    assert torch.equal(inversion.features(model, 2)[0], features[0])
    assert model.rows == rows
    monkeypatch.setattr(sys.modules["slipstream.edit.invert"], "INVERSIONS", Cache("inversions", GIB, 1000))
    inversion.features(model, 2)
    inversion.features(model, 2)
    assert model.rows == rows + 2  # too large to be kept


def test_without_guidance_half_the_rows_are_enough(inverted: Any) -> None:
    model, inversion = inverted
    before = model.rows
    edit(model, inversion, MOVE, config=FAST.replace(energy_scale=0.0, cfg_scale=1.0))
    assert model.rows - before == 4


def test_every_network_call_is_reported_and_may_stop_the_run(inverted: Any) -> None:
    steps: list[Step] = []
    config = FAST.replace(travel=(0.3, 1.0))
    run(inverted, config=config, callback=steps.append)
    total = prepare(MOVE, inverted[1], config).calls
    assert [s.index for s in steps] == list(range(1, total + 1))
    assert {s.total for s in steps} == {total}
    assert {s.phase for s in steps} == {"edit", "compare", "guide", "rewind"}

    class Cancelled(Exception):  # noqa: N818
        pass

    def cancel(step: Step) -> None:
        if step.index == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(inverted, callback=cancel)
    model = inverted[0]
    assert not any("Hook" in type(p).__name__ for p in model.unet.attn_processors.values())
    assert torch.equal(run(inverted).latents, run(inverted).latents)


def test_an_object_held_to_the_end_is_the_draft_pixel_for_pixel(inverted: Any) -> None:
    config = FAST.replace(anchor_object=(0.0, 1.0), anchor_fill=(0.0, 1.0))
    model = inverted[0]
    before = model.rows
    result = run(inverted, config=config, encode=small.encode)
    assert model.rows == before  # nothing is free: nothing to compute
    out = finish(small.picture(), result, small.decode)
    whole = result.mask[0] > 0.999
    torch.testing.assert_close(out[0][whole], result.draft[0][whole], atol=1e-5, rtol=0)


def test_an_energy_that_explodes_is_left_out_and_said(inverted: Any, monkeypatch: Any) -> None:
    model, inversion = inverted
    from slipstream.edit.parts import Part

    real = Part.fill_energy
    monkeypatch.setattr(Part, "fill_energy", lambda self, *a: real(self, *a) * torch.tensor(float("inf")))
    result = run((model, inversion))
    assert bool(torch.isfinite(result.latents).all())
    assert any("not finite" in note for note in result.notes)


def test_guidance_is_bounded_and_independent_of_the_energys_scale(inverted: Any) -> None:
    problem = prepare([MOVE], inverted[1], FAST.replace(energy_scale=0.9))
    eps = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    energies = problem.energies(*features_of(inverted))
    small_, large = (problem.guidance([gradient * s] * len(energies), energies, eps) for s in (1e-6, 1e6))
    torch.testing.assert_close(small_, large, rtol=1e-3, atol=1e-6)
    assert float(large.square().mean(1).sqrt().max()) <= LIMIT * float(eps.square().mean().sqrt()) + 1e-5
    assert float(problem.guidance([gradient * 0] * len(energies), energies, eps).abs().max()) == 0


def features_of(inverted: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
    model, inversion = inverted
    found = inversion.features(model, 2)
    return found, [found]


def test_energies_have_no_pole_and_no_nan_for_opposite_features(inverted: Any) -> None:
    found, references = features_of(inverted)
    problem = prepare([Move(box(), scale=1.4)], inverted[1], FAST)  # nothing vacated
    opposite = [(-f).clone().requires_grad_(True) for f in found]
    energies = problem.energies(opposite, references)
    for energy in energies:
        assert 0 <= float(energy.value.detach()) < 20
        gradients = torch.autograd.grad(energy.value, opposite, retain_graph=True, allow_unused=True)
        assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients)


def test_moving_onto_matching_features_lowers_the_energy(inverted: Any) -> None:
    found, references = features_of(inverted)
    task = Move(box(), 32.0, 8.0)
    problem = prepare([task], inverted[1], FAST)
    rolled = [torch.roll(f, (1 * f.shape[-2] // 8, 4 * f.shape[-1] // 12), (-2, -1)) for f in found]
    still, moved = (problem.energies(f, references)[0].value for f in (found, rolled))
    assert float(moved) < float(still)


def test_vacated_cells_start_from_fresh_noise_and_moved_ones_from_their_own(inverted: Any) -> None:
    _, inversion = inverted
    problem = prepare(
        [Move(box(), 40.0, 0.0)], inversion, FAST.replace(anchor_object=(0.0, 0.0), anchor_fill=(0.0, 0.0))
    )
    start = problem.start(SeededNoise(1)(problem.clean))
    sigma = inversion.sigmas[0]
    noise = (start - problem.clean) / sigma
    old = (inversion.at(0) - inversion.clean) / sigma
    torch.testing.assert_close(noise[..., 2:5, 7:10], old[..., 2:5, 2:5], atol=1e-5, rtol=0)
    assert float((noise[..., 2:5, 2:5] - old[..., 2:5, 2:5]).abs().min()) > 0
    torch.testing.assert_close(start[..., :1, :1], inversion.at(0)[..., :1, :1])


def test_attention_of_vacated_cells_cannot_read_the_object_that_left(inverted: Any) -> None:
    problem = prepare([Move(box(), 40.0, 0.0)], inverted[1], FAST)
    tokens = torch.arange(96).float()
    keys = tokens[None, :, None].expand(1, 96, 4)
    own = keys + 1000
    seen: dict[int, set[int]] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for query in q[0, :, 0].tolist():
            read = {int(t) for t in v[0, :, 0].tolist()}
            assert {t for t in read if t >= 1000} == set(range(1000, 1096))  # the own tokens are always read
            seen[int(query)] = {t for t in read if t < 1000}
        return q

    problem.attend(keys, own, own, [(keys, keys)], attend)
    grid = torch.arange(96).reshape(8, 12)
    the_object = set(grid[2:5, 2:5].flatten().tolist())
    assert not seen[int(grid[3, 3])] & the_object  # vacated
    assert seen[int(grid[3, 8])] == the_object  # target
    assert len(seen[0]) == 96  # the rest reads the whole image
    assert len(seen) == 96


def test_a_later_task_lies_on_top(inverted: Any) -> None:
    tasks = [Move(box(), 40.0, 0.0), Move(box(44, 10, 60, 20), 36.0, -20.0)]
    problem = prepare(tasks, inverted[1], FAST)
    first, second = (p.target for p in problem.parts)
    assert float((first * second).max()) <= 0.26
    assert float((first + second).max()) <= 1.0 + 1e-5


def test_an_image_prompt_is_used_in_its_span_only(inverted: Any) -> None:
    model, inversion = inverted
    used: list[float] = []

    class Prompted:
        def self_attention(self, hook: Any) -> Any:
            return model.self_attention(hook)

        def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            used.append(float(sigma[0]))
            return model(x, sigma, cond)

    config = FAST.replace(anchor_object=(0.0, 0.0), anchor_fill=(0.0, 0.0))
    run(inverted, config=config, image_model=Prompted())
    assert used == [float(s) for s in inversion.sigmas[1:2]]  # 20 to 40 % of six steps


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inversion_and_its_reverse_agree_for_every_prediction(prediction: str) -> None:
    """Reading the trajectory downwards with the recorded estimates gives the image back exactly (eq. of DDIM is linear)."""
    model = small.network(prediction)
    _, inversion = small.inverted(model)
    assert isinstance(inversion, Inversion)
    x = inversion.at(0)
    for step in range(inversion.steps):
        seen, sigma = inversion.network_row(step)
        denoised = model(seen, sigma.expand(1), small.cond())
        x = x + (inversion.sigmas[step + 1] - inversion.sigmas[step]) * (seen - denoised) / sigma
    torch.testing.assert_close(x, small.encode(small.picture()), atol=2e-3, rtol=1e-3)
    assert bool(torch.isfinite(run((model, inversion)).latents).all())


@pytest.mark.parametrize("size", [(61, 90), (40, 100)])
def test_odd_and_non_square_pictures(size: tuple[int, int]) -> None:
    model, image = small.network(), torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(0))
    padded, canvas = fit(image, 8)
    inversion = invert(model, small.encode(padded), small.cond(), FAST, canvas, image)
    encode = lambda drafted: small.encode(fit(drafted, 8, like=canvas)[0])  # noqa: E731
    result = edit(model, inversion, Move(box(8, 8, 24, 30, size), 40.0, 5.0), config=FAST, encode=encode)
    out = finish(image, result, small.decode)
    assert out.shape == image.shape
    assert torch.equal(out[0][result.mask[0] == 0], image[0][result.mask[0] == 0])


def test_too_few_steps_for_guidance_are_said() -> None:
    config = EditConfig(steps=2, mode="fine", anchor_fill=(0.0, 0.5), anchor_object=(0.0, 0.5))
    inverted = small.inverted(config=config)
    assert any("None of the 2 steps is guided" in note for note in run(inverted, config=config).notes)


def test_time_travel_to_the_end_stays_finite() -> None:
    config = EditConfig(steps=7, mode="fine", travel=(0.6, 1.0), anchor_fill=(0.0, 0.5), anchor_object=(0.0, 0.5))
    result = run(small.inverted(config=config), config=config)
    assert bool(torch.isfinite(result.latents).all())


def test_checkpointing_gives_the_same_edit(inverted: Any) -> None:
    a, b = run(inverted), run(inverted, config=FAST.replace(checkpoint=True))
    torch.testing.assert_close(a.latents, b.latents, atol=1e-5, rtol=1e-5)


def test_everything_runs_inside_inference_mode() -> None:
    """As in a host, where images, masks and conditioning are made in inference mode and gradients are still needed."""
    model = small.network()
    with torch.inference_mode():
        _, inversion = small.inverted(model)
        assert not inversion.latents.is_inference()
        result = run((model, inversion), Move(box(), 36.0, 8.0), encode=small.encode)
    torch.testing.assert_close(result.latents, run(small.inverted(model), encode=small.encode).latents)


def test_a_full_mask_can_be_edited(inverted: Any) -> None:
    result = run(inverted, Appearance(torch.ones(64, 96), inverted[1], box()))
    torch.testing.assert_close(result.mask, torch.ones_like(result.mask))
    assert bool(torch.isfinite(result.latents).all())


def test_bank_bytes_are_counted() -> None:
    bank = AttentionBank(budget=100)
    bank.put(0, "a", torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    assert (bank.bytes, bank.full) == (64, False)
    bank.put(1, "a", torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    assert (bank.bytes, bank.full, bank.steps) == (64, True, {0})
