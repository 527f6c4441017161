"""Replay: what the eager model gives, from fixed memory; the recording itself is faked, as CUDA is not everywhere."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import slipstream
import torch
from slipstream.core import graphs
from slipstream.core.transfer import DEVICE_WORK, to_device
from slipstream_tests.core.checkpoints import Tiny
from slipstream_tests.fake_cuda import DEVICE, RaceError, fake_cuda
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
        assert graphs.replayed(pipe.model, 4, 16, 16, cond) is pipe.model
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


@torch.no_grad()
def test_what_padding_holds_does_not_matter(pipe: slipstream.core.Pipeline) -> None:
    """NaN of an earlier call stays in the rows that a shorter one does not use, and in those only."""
    cond, sigma = pipe.encode_text(["a red circle"] * 3), torch.tensor([5.0, 1.0, 0.2])
    fast = graphs.replayed(pipe.model, 3, 16, 16, cond, record=Recording())
    bad = latents(3)
    bad[1:] = float("nan")
    assert fast(bad, sigma, cond)[1:].isnan().all()
    x = latents(1, seed=1)
    torch.testing.assert_close(fast(x, sigma[:1], cond.take([0])), pipe.model(x, sigma[:1], cond.take([0])))


def test_a_recording_made_in_inference_mode_serves_outside_and_the_other_way_round(
    pipe: slipstream.core.Pipeline,
) -> None:
    cond, sigma, x = pipe.encode_text(["a red circle"]), torch.tensor([1.0]), latents(1)
    with torch.inference_mode():
        inside = graphs.replayed(pipe.model, 1, 16, 16, cond, record=Recording())
    with torch.no_grad():
        outside = graphs.replayed(pipe.model, 1, 16, 16, cond, record=Recording())
        first = inside(x, sigma, cond)
    with torch.inference_mode():
        assert torch.equal(outside(x, sigma, cond), first)
        assert torch.equal(inside(x, sigma, cond), first)


def test_unequal_rows_are_not_replayed() -> None:
    """One time step for several rows would leave the others' old ones in place."""
    recording = Recording()
    replay = graphs.Replay(lambda t: t["a"] + t["b"], {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)}, recording)
    assert replay.fits({"a": torch.ones(2, 2), "b": torch.ones(2, 2)})
    assert not replay.fits({"a": torch.ones(2, 2), "b": torch.ones(1, 2)})
    assert not replay.fits({"a": torch.ones(4, 2), "b": torch.ones(4, 2)})
    assert not replay.fits({"a": torch.ones(3, 2)})


@torch.no_grad()
def test_a_pipeline_with_its_vae(pipe: slipstream.core.Pipeline) -> None:
    recording = Recording()
    cond, sigma = pipe.encode_text(["a red circle"]), torch.tensor([1.0])
    fast = graphs.replayed_pipeline(pipe, 2, 128, 128, cond, record=recording)
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    x = fast.encode_image(image)
    torch.testing.assert_close(x, pipe.encode_image(image))
    torch.testing.assert_close(fast.decode(x), pipe.decode(x))
    torch.testing.assert_close(fast.model(x, sigma, cond), pipe.model(x, sigma, cond))
    assert recording.replays == 3
    torch.testing.assert_close(fast.encode_image(image[:, :64]), pipe.encode_image(image[:, :64]))
    torch.testing.assert_close(fast.decode(x.expand(2, -1, -1, -1)), pipe.decode(x.expand(2, -1, -1, -1)))
    assert recording.replays == 3, "another size and two images run eagerly"
    assert (fast.downscale, fast.latent_channels) == (pipe.downscale, pipe.latent_channels)
    assert graphs.replayed_pipeline(pipe, 2, 128, 128, cond) is pipe


def test_a_vae_that_cannot_be_recorded_runs_eagerly(
    pipe: slipstream.core.Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Recording()

    def second_fails(run: Callable[[], Tensor]) -> Any:
        if seen:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        seen.append(1)
        return counted(run)

    seen: list[int] = []
    fast = graphs.replayed_pipeline(pipe, 2, 128, 128, pipe.encode_text([""]), record=second_fails)
    assert fast.vae is pipe.vae
    assert fast.model is not pipe.model
    assert (
        "The VAE could not be recorded and runs eagerly: operation not permitted when stream is capturing"
        in caplog.text
    )


class Graph:
    """What torch.cuda.graph is asked for."""

    asked: dict[str, Any] = {}

    def __init__(self, graph: Any, **options: Any) -> None:
        Graph.asked = options

    def __enter__(self) -> None:
        Graph.asked["alone"] = DEVICE_WORK._alone == threading.get_ident()
        Graph.asked["current"], Graph.asked["inside"] = torch.cuda.current_stream(), True
        self.inside = torch.cuda.stream(Graph.asked["stream"])
        self.inside.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.inside.__exit__(*exc)


class Captured:
    """The graph that `Graph` captures: where it was replayed, and how often waits were refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str = "native") -> None:
        self.replays, self.modes = list[Any](), ["default"]
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", Graph)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.modes[-1])
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.modes.append)

    def replay(self) -> None:
        self.replays.append(torch.cuda.current_stream())


@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_recordings_are_made_apart_from_the_streams_that_run(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Warmed up and captured on a stream of its own, in order with the caller's; other threads wait while it is captured."""
    with fake_cuda() as machine:
        graph = Captured(monkeypatch, backend)
        weights, x = machine.put(torch.ones(2)), machine.put(torch.zeros(3, 2))
        where, modes = list[Any](), list[str]()

        def run(given: dict[str, Tensor]) -> Tensor:
            where.append(torch.cuda.current_stream())
            modes.append(graph.modes[-1])
            # The fake is strict: to be held until the caller's stream has waited would do.
            given["x"].record_stream(where[-1])
            return given["x"] + weights

        mine = torch.cuda.current_stream()
        replay = graphs.Replay(run, {"x": x}, graphs.record_cuda)
        assert Graph.asked["capture_error_mode"] == "thread_local"
        assert Graph.asked["alone"]
        assert not DEVICE_WORK._alone
        assert not graph.replays
        assert len(where) == graphs.WARM_UP + 2
        assert set(where) == {Graph.asked["stream"]}
        assert mine not in where
        assert Graph.asked["current"] is mine
        assert replay.inputs["x"] is not x
        assert torch.equal(replay.output.inner, torch.ones(3, 2))
        # Where it would end the process, what waits is found before the capture, and waits are allowed again then.
        refused = ["default"] * graphs.WARM_UP + ["error" if backend == "cudaMallocAsync" else "default", "default"]
        assert modes == refused


def test_memory_of_a_recording_that_failed_exists_before_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda() as machine:
        graph = Captured(monkeypatch, "cudaMallocAsync")
        freed, x = list[int](), machine.put(torch.zeros(1))

        class Kept:
            def __del__(self) -> None:
                freed.append(len(graph.replays))

        def run(given: dict[str, Tensor]) -> Tensor:
            if Graph.asked.get("inside"):
                kept = Kept()
                raise RuntimeError(f"driver error {kept is None}")
            given["x"].record_stream(torch.cuda.current_stream())
            return given["x"] + 1

        Graph.asked = {}
        with pytest.raises(RuntimeError, match="driver error"):
            graphs.Replay(run, {"x": x}, graphs.record_cuda)
        gc.collect()
        assert freed == [1]
        assert not DEVICE_WORK._alone


class CachingAutotuner:
    """Stands in for torch's compiled kernels."""

    def run(self, *args: Any, stream: int) -> tuple[Any, ...]:
        return *args, stream


@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_compiled_kernels_get_addresses_where_the_driver_does_not_know_the_memory_of_a_recording(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setitem(
        sys.modules, "torch._inductor.runtime.triton_heuristics", SimpleNamespace(CachingAutotuner=CachingAutotuner)
    )
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    x, kernel, elsewhere = torch.ones(2), CachingAutotuner(), list[Any]()
    before = CachingAutotuner.run
    with graphs.addresses():
        assert kernel.run(x, 2, stream=7) == (x if backend == "native" else x.data_ptr(), 2, 7)
        other = threading.Thread(target=lambda: elsewhere.append(kernel.run(x, 2, stream=7)[0]))
        other.start()
        other.join()
    assert elsewhere[0] is x, "a kernel of another thread is none of the recording's"
    assert CachingAutotuner.run is before


@pytest.mark.parametrize("ordered", [True, False])
def test_two_streams_share_a_recording_in_turns(monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    if not ordered:
        monkeypatch.setattr(graphs.Replay, "_take_turn", lambda self: None)
    with fake_cuda() as machine:
        replay = graphs.Replay(lambda given: given["x"] * 2, {"x": machine.put(torch.zeros(2, 3))}, Recording())
        lanes = [torch.cuda.Stream(), torch.cuda.Stream()]
        results = []
        for i, lane in enumerate(lanes * 3):
            with torch.cuda.stream(lane), nullcontext() if ordered else pytest.raises(RaceError):
                results.append(replay({"x": to_device(torch.full((1 + i % 2, 3), float(i)), DEVICE)}))
        assert [float(r.inner.mean()) for r in results] == ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0] if ordered else [])
        assert machine.waits == 0


def test_a_replay_shows_its_features_eagerly(pipe: slipstream.core.Pipeline) -> None:
    """A recording has none to show; isinstance() does not call properties from Python 3.12 on, so it cannot say that either."""
    cond = pipe.encode_text([""])
    recording = Recording()
    fast = graphs.replayed(pipe.model, 1, 16, 16, cond, record=recording)
    x, sigma = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0])
    for ours, wanted in zip(fast.features(x, sigma, cond), pipe.model.features(x, sigma, cond), strict=True):
        assert torch.equal(ours, wanted)
    with pytest.raises(AttributeError, match="use the model that it was recorded from"):
        fast.unet.up_blocks


@torch.no_grad()
def test_a_compiled_network_and_vae_on_the_cpu(
    pipe: slipstream.core.Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    """Compiled is the fused form, once for each part and kept in a folder of ours (that it compiles: test_fused.py)."""
    made: list[str] = []

    def compile(function: Any, dynamic: bool) -> Any:
        made.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return lambda *given: function(*given)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    cond, sigma = pipe.encode_text(["a red circle"]), torch.tensor([1.0, 0.5])
    with caplog.at_level(logging.INFO):
        fast, models = graphs.accelerated(pipe, "compile", 2, 128, 128, cond, images=2, lanes=2)
    assert made == [str(tmp_path / "slipstream" / "compiled")] * 3, "lanes share what is compiled"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert "Compiling the network for 2 x 16 x 16 latents: up to a minute" in caplog.text
    assert "Compiled the VAE for 2 x 128 x 128 images in" in caplog.text
    for model in models:
        torch.testing.assert_close(
            model(latents(2), sigma, cond), pipe.model(latents(2), sigma, cond), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(fast.decode(latents(2)), pipe.decode(latents(2)), rtol=1e-4, atol=1e-4)
    assert models[0] is fast.model
    assert models[0].network.recording is not models[1].network.recording


def test_without_a_compiler_the_network_runs_eagerly(
    pipe: slipstream.core.Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile(function: Any, dynamic: bool) -> Any:
        raise RuntimeError("Failed to find a working C++ compiler.")

    monkeypatch.setattr(torch, "compile", compile)
    fast, models = graphs.accelerated(pipe, "compile", 1, 128, 128, pipe.encode_text([""]))
    assert fast.model is models[0] is pipe.model
    assert "The network could not be recorded and runs eagerly: Failed to find a working C++ compiler." in caplog.text


def test_accelerations_by_name(pipe: slipstream.core.Pipeline) -> None:
    assert graphs.accelerated(pipe, "none", 1, 128, 128, pipe.encode_text([""]), lanes=2) == (pipe, [pipe.model] * 2)
    with pytest.raises(ValueError, match="Expected `acceleration` to be one of"):
        graphs.accelerated(pipe, "turbo", 1, 128, 128, pipe.encode_text([""]))


@torch.no_grad()
def test_a_prompt_that_stays_is_copied_once_and_each_lane_has_memory_of_its_own(pipe: slipstream.core.Pipeline) -> None:
    cond, sigma = pipe.encode_text(["a red circle", "a green square"]), torch.tensor([1.0])
    _, (first, second) = graphs.accelerated(pipe, "graph", 1, 128, 128, cond, lanes=2, record=Recording())
    bound = [first.bind(sigma, cond.take([i])) for i in (0, 1)]
    copied: list[str] = []
    held = first.network.recording.inputs  # type: ignore[union-attr]

    class Watched(Tensor):
        def copy_(self, *args: Any, **kwargs: Any) -> Any:
            copied.append("copy")
            return super().copy_(*args, **kwargs)

    first.network.recording.inputs = {name: tensor.as_subclass(Watched) for name, tensor in held.items()}  # type: ignore[union-attr]
    counts = []
    for prompt in (0, 0, 1, 1, 0):
        copied.clear()
        torch.testing.assert_close(
            bound[prompt](latents(1)), pipe.model(latents(1), sigma, cond.take([prompt])), rtol=1e-4, atol=1e-4
        )
        counts.append(len(copied))
    assert counts == [3, 1, 3, 1, 3], "the latents each time, levels and prompt when they change"
    assert first.network.recording.output.data_ptr() != second.network.recording.output.data_ptr()  # type: ignore[union-attr]
