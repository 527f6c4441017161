"""Reuse between frames: equal to dense passes where nothing is left out, counted right, and never far from them."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from slipstream.core.fused import Prepared
from slipstream.stream import StreamBatch, StreamConfig
from slipstream.stream.resting import DECIDING, _Reuse, resting
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.stream.test_network import denoiser, rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

FRAMES = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(3))
ONE = StreamConfig(strength=0.7, steps=1, guidance="none")


def reusing(config: StreamConfig = ONE, **settings: Any) -> Any:
    return resting(denoiser(), rows(1), FRAMES[:2], config, **settings)


def through(model: Any, frames: Tensor, config: StreamConfig = ONE) -> list[Tensor]:
    stream = StreamBatch(model, rows(1), None, config)
    return [frame.latents for frame in [f for row in frames.split(1) for f in stream.push(row)] + stream.drain()]


def still_with_a_patch(count: int) -> Tensor:
    """Frames at rest but for a patch of 2 x 2 cells that moves."""
    frames = FRAMES[:1].repeat(count, 1, 1, 1)
    for i in range(count):
        frames[i, :, 2:4, i % 7 : i % 7 + 2] = 1.5
    return frames


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_all_of_the_operations_give_dense_results_bit_for_bit(steps: int, cells: bool) -> None:
    config = StreamConfig(strength=0.7, steps=steps, guidance="none")
    model = reusing(config, share=1.0, cells=cells)
    for found, expected in zip(through(model, FRAMES, config), through(denoiser(), FRAMES, config), strict=True):
        assert torch.equal(found, expected)
    assert model.network.operations.share > 1  # deciding counts too


@pytest.mark.parametrize("cells", [False, True])
def test_what_does_not_move_costs_only_the_decision(cells: bool) -> None:
    model, network = reusing(cells=cells), denoiser()
    still = FRAMES[:1].expand(3, -1, -1, -1)
    found = through(model, still)
    assert all(torch.equal(a, b) for a, b in zip(found, through(network, still), strict=True))
    operations, kept = model.network.operations, model.network._kept
    values = sum(x.numel() for x in kept)
    assert operations.done == operations.dense / 3 + 2 * DECIDING * values
    # A product of this network has 16 channels; with more, deciding is less of it.
    assert 2 * DECIDING * values < 0.1 * operations.dense


def test_operations_of_a_dense_pass_are_what_torch_counts() -> None:
    model, plain = reusing(), denoiser()
    sigma = plain.levels.t_to_sigma(torch.tensor([500.0])).float()
    arguments = Prepared(model.network.fused, plain.network_time(sigma), **plain.network_condition(rows(1))).tensors()
    # The counter does not know the kernel of attention on a CPU, but its products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.network.fused(FRAMES[:1], *arguments)
    with torch.no_grad():
        model.network.run(FRAMES[:1], *arguments)
    assert model.network.operations.dense == model.network.operations.done == counter.get_total_flops()


def test_an_attention_pays_for_new_queries_and_for_new_keys_of_the_others() -> None:
    # Two heads of width 3, five queries, four keys: 2 + 1 new queries, 1 + 4 new keys.
    reuse = _Reuse([], [], 0.0, False)
    queries, keys = torch.zeros(1, 2, 5, 1, dtype=torch.bool), torch.zeros(1, 2, 4, 1, dtype=torch.bool)
    queries[0, 0, :2] = queries[0, 1, 0] = keys[0, 0, 3] = keys[0, 1] = True
    reuse.changed = [queries, keys]
    reuse.attention(torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 4, 6))
    pair = 4 * 3
    assert reuse.operations.dense == pair * 2 * 5 * 4
    # First head: 2 queries x 4 keys, and 3 others x 1 key x 1.5. Second: all keys are new, so all over again.
    assert reuse.operations.done == pair * (2 * 4 + 3 * 1 * 1.5 + 5 * 4)


def test_a_channel_weighs_what_the_output_depends_on_it() -> None:
    model, layer = reusing(), denoiser().network.conv_out.weight
    # The last product, far from the sides: a value reaches the output through all of its weights.
    last = model.network._weights[-1][0, :, 2:-2, 2:-2].mean((1, 2))
    torch.testing.assert_close(last, layer.square().sum((0, 2, 3)).sqrt(), rtol=0.2, atol=0)


def test_slow_changes_are_noticed_however_small_each_is() -> None:
    model = reusing()
    model.network._follow = lambda reuse: None
    drift = FRAMES[:1] + torch.linspace(0, 2, 40)[:, None, None, None] * FRAMES[1:2]
    model.network.threshold = 1e-3
    found, dense = through(model, drift), through(denoiser(), drift)
    moved, off = (float((x - dense[-1]).abs().mean()) for x in (dense[0], found[-1]))
    assert off < 0.25 * moved
    assert model.network.operations.share < 0.9


def test_the_share_is_followed_and_more_of_it_is_nearer() -> None:
    frames = still_with_a_patch(30)
    dense, off = through(denoiser(), frames), []
    for share in (0.3, 0.6):
        model = reusing(share=share)
        off.append(float((torch.cat(through(model, frames)) - torch.cat(dense)).abs().mean()))
        assert 0.8 * share < model.network.operations.share < 1.2 * share
    stale = float((dense[0] - torch.cat(dense)).abs().mean())
    assert off[1] < off[0] < 0.5 * stale


def test_the_same_operations_do_more_by_values_than_by_cells() -> None:
    frames = still_with_a_patch(30)
    dense = torch.cat(through(denoiser(), frames))
    by_values, by_cells = (
        float((torch.cat(through(reusing(share=0.35, cells=cells), frames)) - dense).abs().mean())
        for cells in (False, True)
    )
    assert by_values < by_cells


def test_another_prompt_starts_over_and_another_size_runs_as_it_is() -> None:
    model = reusing()
    stream, plain = (StreamBatch(m, rows(1), None, ONE) for m in (model, denoiser()))
    for s in (stream, plain):
        s.push(FRAMES[:1])
        s.update(cond=rows(2))
    model.network.operations.done = model.network.operations.dense = 0.0
    (found,), (expected,) = (s.push(FRAMES[1:2]) for s in (stream, plain))
    assert torch.equal(found.latents, expected.latents)
    assert model.network.operations.share == 1
    counted = copy.copy(model.network.operations)
    larger = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(4))
    assert all(torch.equal(a, b) for a, b in zip(through(model, larger), through(denoiser(), larger), strict=True))
    assert model.network.operations == counted


def test_hooks_on_the_network_make_passes_dense() -> None:
    config = StreamConfig(strength=0.7, steps=2, guidance="none", cross_frame=True)
    model = reusing(config)
    for found, expected in zip(through(model, FRAMES, config), through(denoiser(), FRAMES, config), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.network.operations.dense == 0


def test_other_models_run_as_they_are_and_wrong_values_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    other = GaussianDenoiser(std=0.7, mean=0.2)
    with caplog.at_level(logging.WARNING):
        assert resting(other, constant_cond(0.5), FRAMES[:1], ONE) is other
    assert "needs a UNet of the usual blocks" in caplog.text
    with pytest.raises(ValueError, match=r"`share` between 0\.01 and 1\.0, but got 1\.5"):
        reusing(share=1.5)
    with pytest.raises(ValueError, match="`latents`"):
        resting(denoiser(), rows(1), torch.zeros(1, 3, 8, 8), ONE)
