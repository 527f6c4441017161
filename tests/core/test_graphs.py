"""Replay: what the eager model gives, from fixed memory; the recording itself is faked, as CUDA is not everywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import slipstream
import torch
from slipstream.core import graphs
from slipstream.core.features import FeatureModel
from slipstream_tests.core.checkpoints import Tiny
from torch import Tensor


class Recording:
    """Stands in for a CUDA graph: replays by running again into the same output, and counts."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        output = run()

        def replay() -> None:
            self.replays += 1
            output.copy_(run())

        return replay, output


@pytest.fixture
def pipe() -> slipstream.core.Pipeline:
    return slipstream.load("pocket")


def latents(rows: int, side: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_replay_gives_what_the_model_gives(pipe: slipstream.core.Pipeline) -> None:
    recording = Recording()
    cond = pipe.encode_text(["a red circle on a blue background", "", "a green square"])
    fast = graphs.replayed(pipe.model, 3, 16, 16, cond, record=recording)
    sigma = torch.tensor([5.0, 1.0, 0.2])
    first = fast(latents(3), sigma, cond)
    kept = first.clone()
    for rows in (3, 2, 1):
        x = latents(rows, seed=rows)
        wanted = pipe.model(x, sigma[:rows], cond.take(range(rows)))
        assert torch.allclose(fast(x, sigma[:rows], cond.take(range(rows))), wanted, atol=1e-4)
    assert recording.replays == 4
    assert torch.equal(first, kept), "a later replay must not write into an earlier result"
    assert (fast.calls, fast.rows) == (4, 9)
    assert fast.space is pipe.model.space


def test_other_shapes_and_gradients_run_eagerly(pipe: slipstream.core.Pipeline) -> None:
    recording = Recording()
    cond = pipe.encode_text(["a red circle"])
    fast = graphs.replayed(pipe.model, 2, 16, 16, cond, record=recording)
    sigma = torch.tensor([1.0, 1.0, 1.0])
    with torch.no_grad():
        for x in (latents(3), latents(2, 8)):
            torch.testing.assert_close(fast(x, sigma[: len(x)], cond), pipe.model(x, sigma[: len(x)], cond))
    x = latents(1).requires_grad_()
    fast(x, sigma[:1], cond).sum().backward()
    assert x.grad is not None
    assert recording.replays == 0


@torch.no_grad()
def test_sdxl_conditioning_is_part_of_the_recording(tmp_path: Any) -> None:
    pipe = slipstream.load(Tiny("sdxl").folder(tmp_path / "sdxl"))
    recording = Recording()
    cond, sigma = pipe.encode_text(["a red circle", "a blue ring"], size=(64, 64)), torch.tensor([2.0, 1.0])
    fast = graphs.replayed(pipe.model, 2, 8, 8, pipe.encode_text([""]), record=recording)
    torch.testing.assert_close(fast(latents(2, 8), sigma, cond), pipe.model(latents(2, 8), sigma, cond))
    assert recording.replays == 1


def test_the_cpu_runs_eagerly_and_says_so_once(
    pipe: slipstream.core.Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    graphs._say_once.cache_clear()
    cond = pipe.encode_text([""])
    with caplog.at_level(logging.INFO):
        assert graphs.replayed(pipe.model, 2, 16, 16, cond) is pipe.model
        assert graphs.replayed(pipe.model, 4, 16, 16, cond, compiled=True) is pipe.model
    assert [record.message for record in caplog.records] == [
        "CUDA graphs need a CUDA device: the network runs eagerly on cpu."
    ]


def test_a_failed_recording_leaves_the_eager_model(
    pipe: slipstream.core.Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(run: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert graphs.replayed(pipe.model, 2, 16, 16, pipe.encode_text([""]), record=fails) is pipe.model
    assert "runs eagerly: operation not permitted" in caplog.text


def test_a_replay_does_not_pretend_to_have_features(pipe: slipstream.core.Pipeline) -> None:
    fast = graphs.replayed(pipe.model, 1, 16, 16, pipe.encode_text([""]), record=Recording())
    assert isinstance(pipe.model, FeatureModel)
    assert not isinstance(fast, FeatureModel)
    with pytest.raises(AttributeError, match="use the model that it was recorded from"):
        fast.unet.up_blocks
