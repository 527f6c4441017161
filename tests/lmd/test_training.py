from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import safetensors.torch
import torch
from slipstream.lmd import FillConfig, LatentFill, TrainConfig, TrainStep, train
from slipstream.lmd.latent_fill import read_tensors
from slipstream.lmd.tokens import masked_count
from slipstream.lmd.training import FAMILIES, RATIO_KINDS, learning_rate, training_masks

FILL = FillConfig(
    channels=2, height=8, width=8, dim=32, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2
)
QUICK = TrainConfig(steps=12, batch=8)


def waves(count: int = 64) -> torch.Tensor:
    """Latents whose every part follows from every other: plane waves of one frequency and random phase."""
    generator = torch.Generator().manual_seed(0)
    phase = torch.rand(count, 2, 1, 1, generator=generator) * 6.2832
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    return 3 + 2 * torch.sin(0.7 * x + 0.4 * y + phase)


def weights(fill: LatentFill) -> torch.Tensor:
    return torch.cat([p.flatten() for p in fill.parameters()])


def test_training_learns_what_the_mean_cannot_say() -> None:
    latents = waves(256)
    result = train(latents, FILL, TrainConfig(steps=300, batch=32, learning_rate=2e-3, seed=1))
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 2:6] = 1
    test = waves(300)[256:]
    hole = mask.bool()[:, None].expand_as(test)
    error = (result.fill.fill(test, mask) - test)[hole].square().mean()
    assert error < 0.5 * test[hole].var()
    assert sum(result.losses[-10:]) < 0.6 * sum(result.losses[:10])
    assert result.fill.config.mean == pytest.approx(latents.mean((0, 2, 3)).tolist(), rel=1e-5)


@pytest.mark.parametrize("stop_at", [1, 5, 11])
@pytest.mark.parametrize("ratio", ["random", "cosine"])
def test_an_interrupted_run_resumed_equals_an_uninterrupted_one(
    tmp_path: pathlib.Path, stop_at: int, ratio: str
) -> None:
    config = dataclasses.replace(QUICK, ratio=ratio)
    whole = train(waves(), FILL, config)
    path = tmp_path / "fill.safetensors"

    def stop(step: TrainStep) -> None:
        if step.index == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(waves(), FILL, config, path, callback=stop)
    assert len(read_tensors(path)[1]["losses"]) == stop_at
    LatentFill.load(path)  # usable as it is
    seen: list[int] = []
    resumed = train(waves(), FILL, config, path, callback=lambda s: seen.append(s.index))
    assert seen == list(range(stop_at + 1, 13))
    assert resumed.losses == whole.losses
    assert torch.equal(weights(resumed.fill), weights(whole.fill))
    assert torch.equal(weights(LatentFill.load(path)), weights(whole.fill))
    assert not any(name.startswith("train.") for name in read_tensors(path)[0])


def test_an_error_in_the_middle_of_a_step_keeps_the_last_checkpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fill.safetensors"
    step, calls = torch.optim.AdamW.step, []

    def dying(self: torch.optim.AdamW, closure: None = None) -> None:
        calls.append(1)
        if len(calls) == 8:
            raise MemoryError
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", dying)
    with pytest.raises(MemoryError):
        train(waves(), FILL, QUICK, path, checkpoint_every=5)
    assert len(read_tensors(path)[1]["losses"]) == 5
    monkeypatch.undo()
    assert torch.equal(weights(train(waves(), FILL, QUICK, path).fill), weights(train(waves(), FILL, QUICK).fill))


def test_a_finished_file_is_returned_and_not_trained_again(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "fill.safetensors"
    first = train(waves(), FILL, QUICK, path)
    stamp = path.stat().st_mtime_ns
    again = train(waves(), FILL, QUICK, path, callback=lambda s: pytest.fail("trained"))
    assert torch.equal(weights(again.fill), weights(first.fill))
    assert again.losses == first.losses
    assert path.stat().st_mtime_ns == stamp
    assert not again.fill.training


def test_resuming_with_other_settings_or_images_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "fill.safetensors"
    train(waves(), FILL, QUICK, path)
    before = path.read_bytes()
    for fill, config, latents, name in (
        (FILL, dataclasses.replace(QUICK, batch=4), waves(), "batch"),
        (dataclasses.replace(FILL, depth=2), QUICK, waves(), "depth"),
        (FILL, QUICK, waves() + 1, "mean"),
    ):
        with pytest.raises(ValueError, match=f"other values of {name}.*turn resume off"):
            train(latents, fill, config, path)
    assert path.read_bytes() == before
    train(waves(), FILL, dataclasses.replace(QUICK, batch=4), path, resume=False)
    assert path.read_bytes() != before


def stop_at_two(step: TrainStep) -> None:
    if step.index == 2:
        raise KeyboardInterrupt


def test_a_new_run_replaces_a_finished_fill_only_when_it_is_finished(tmp_path: pathlib.Path) -> None:
    path, unfinished = tmp_path / "fill.safetensors", tmp_path / "fill.unfinished.safetensors"
    train(waves(), FILL, QUICK, path)
    before, other = path.read_bytes(), dataclasses.replace(QUICK, seed=1)
    with pytest.raises(KeyboardInterrupt):
        train(waves(), FILL, other, path, resume=False, callback=stop_at_two)
    assert path.read_bytes() == before
    assert len(read_tensors(unfinished)[1]["losses"]) == 2
    assert train(waves(), FILL, QUICK, path).losses == read_tensors(path)[1]["losses"]
    seen: list[int] = []
    resumed = train(waves(), FILL, other, path, callback=lambda step: seen.append(step.index))
    assert seen == list(range(3, 13))
    assert resumed.losses == train(waves(), FILL, other).losses
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert torch.equal(weights(LatentFill.load(path)), weights(resumed.fill))


def test_a_full_disk_costs_no_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint that fails is tried again at the next; a run that ends on a full disk hands the fill out all the same."""
    path, save, full = tmp_path / "fill.safetensors", safetensors.torch.save_file, {4, 12}

    def saving(tensors: dict, file: pathlib.Path, metadata: dict) -> None:
        if len(json.loads(metadata["losses"])) in full:
            raise safetensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        save(tensors, file, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", saving)
    expected = train(waves(), FILL, QUICK)
    result = train(waves(), FILL, QUICK, path, checkpoint_every=4)
    assert result.losses == expected.losses
    assert torch.equal(weights(result.fill), weights(expected.fill))
    assert "No space left" in result.problem
    assert f"Could not write {path}" in result.problem
    assert "Step 4 is in memory only" in caplog.text
    assert len(read_tensors(path)[1]["losses"]) == 8
    full.clear()
    assert train(waves(), FILL, QUICK, path).problem == ""
    full.add(2)
    with pytest.raises(KeyboardInterrupt):  # not the error of the disk
        train(waves(), FILL, QUICK, tmp_path / "b.safetensors", callback=stop_at_two)


def test_a_checkpoint_without_its_training_state_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "fill.safetensors"
    result = train(waves(), FILL, QUICK)
    result.fill.save(path, training=dataclasses.asdict(QUICK), losses=[1.0])
    with pytest.raises(ValueError, match=r"a checkpoint without 'train.step"):
        train(waves(), FILL, QUICK, path)


def test_same_seed_same_fill_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = train(waves(), FILL, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(weights(first.fill), weights(train(waves(), FILL, QUICK).fill))
    assert not torch.equal(weights(first.fill), weights(train(waves(), FILL, dataclasses.replace(QUICK, seed=1)).fill))


def test_training_works_inside_inference_mode_as_the_host_runs_it() -> None:
    with torch.inference_mode():
        latents = waves()
        result = train(latents, FILL, QUICK)
        assert torch.isfinite(result.fill.fill(latents[:1], torch.eye(8)[None])).all()
    assert result.losses == train(waves(), FILL, QUICK).losses


@pytest.mark.parametrize("family", [*FAMILIES, "mixed"])
@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.75, 1.0])
def test_every_mask_family_hides_exactly_the_ratio_but_never_nothing_nor_all(family: str, ratio: float) -> None:
    masks = training_masks(family, ratio, 9, 6, 8, torch.Generator().manual_seed(0))
    expected = min(max(masked_count(48, ratio), 1), 47)
    assert masks.sum(1).tolist() == [expected] * 9


def test_families_look_like_what_they_are_called() -> None:
    def borders(family: str) -> float:
        """Mean number of neighbouring pairs of which one is hidden: high for scattered, low for compact masks."""
        masks = (
            training_masks(family, 0.25, 64, 16, 16, torch.Generator().manual_seed(1)).float().unflatten(1, (16, 16))
        )
        return float((masks.diff(dim=1).abs().sum((1, 2)) + masks.diff(dim=2).abs().sum((1, 2))).mean())

    assert borders("random") > 150
    assert borders("half") < borders("block") < borders("stroke") < 90
    assert borders("half") < 30


def test_mixed_masks_deal_out_all_families() -> None:
    mixed = training_masks("mixed", 0.5, 8, 16, 16, torch.Generator().manual_seed(2)).float().unflatten(1, (16, 16))
    edges = mixed.diff(dim=1).abs().sum((1, 2)) + mixed.diff(dim=2).abs().sum((1, 2))
    assert (edges[[0, 4]] > 180).all()
    assert (edges[[1, 2, 3, 5, 6, 7]] < 100).all()


@pytest.mark.parametrize("ratio", RATIO_KINDS)
def test_the_ratio_follows_its_schedule(ratio: str) -> None:
    seen: list[float] = []
    train(waves(), FILL, dataclasses.replace(QUICK, ratio=ratio), callback=lambda s: seen.append(s.ratio))
    assert all(0.15 <= r <= 0.75 + 1e-9 for r in seen)
    if ratio == "fixed":
        assert set(seen) == {0.75}
    elif ratio == "random":
        assert len(set(seen)) == 12
        assert seen != sorted(seen)
    else:
        assert seen == sorted(seen)
        assert (seen[0], seen[-1]) == pytest.approx((0.15, 0.75))


def test_the_learning_rate_warms_up_and_ends_at_nothing() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)
    assert all(b <= a for a, b in zip(rates[5:], rates[6:]))
    assert rates[-1] < 1e-3
    assert learning_rate(TrainConfig(steps=1), 0) > 0


def test_a_single_image_and_a_batch_larger_than_the_data_work() -> None:
    result = train(waves(1), FILL, dataclasses.replace(QUICK, steps=2, batch=16))
    assert len(result.losses) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "`steps` between 1"),
        ({"learning_rate": 0.0}, "`learning_rate` between"),
        ({"ratio": "up"}, "`ratio` to be one of"),
        ({"masks": "dots"}, "`masks` to be one of"),
        ({"high": 0.1}, "`high` between 0.15"),
        ({"low": 0.0, "high": 0.0}, "`high` between 1e-06"),
    ],
)
def test_bad_settings_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_bad_latents_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"`latents` of shape"):
        train(torch.zeros(3, 2, 8, 10), FILL, QUICK)
    with pytest.raises(ValueError, match=r"at least one image"):
        train(torch.zeros(0, 2, 8, 8), FILL, QUICK)
    with pytest.raises(ValueError, match=r"`latents` to be finite"):
        train(torch.full((3, 2, 8, 8), torch.nan), FILL, QUICK)


def test_a_run_that_diverges_stops_with_the_remedy_and_keeps_the_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, predict = tmp_path / "fill.safetensors", LatentFill.predict
    calls: list[int] = []

    def diverging(self: LatentFill, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return predict(self, tokens, hidden) * (torch.inf if len(calls) == 7 else 1)

    monkeypatch.setattr(LatentFill, "predict", diverging)
    with pytest.raises(ValueError, match=r"`loss` to be finite, but got .* at step 7. Lower `learning_rate`"):
        train(waves(), FILL, QUICK, path, checkpoint_every=5)
    assert len(read_tensors(path)[1]["losses"]) == 5
