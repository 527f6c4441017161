"""Lanes and groups: the images of one Stream Batch, in order, whatever runs side by side."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slipstream.cli.live import Networks
from slipstream.core import Conditioning, graphs
from slipstream.core.graphs import replayed
from slipstream.core.transfer import to_device
from slipstream.stream import PromptBlend, StreamBatch, StreamConfig, StreamFrame, StreamLanes
from slipstream.stream.lanes import Width, room_for, width_of
from slipstream.stream.live.settings import LiveSettings
from slipstream.stream.prompts import blended
from slipstream.stream.queues import StreamThreads
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.fake_cuda import DEVICE, RaceError, fake_cuda
from slipstream_tests.stream.test_device import network, pipeline, prompts, recording, stages
from torch import Tensor

COUNT = 11


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return torch.randn(COUNT, 4, 6, 8, generator=torch.Generator().manual_seed(3))


def stream(lanes: int, **settings: Any) -> StreamBatch | StreamLanes:
    conds = constant_cond(0.4), constant_cond(-0.2)
    config = StreamConfig(**{"strength": 0.7, **settings})
    batches = [StreamBatch(GaussianDenoiser(), *conds, config) for _ in range(lanes)]
    return batches[0] if lanes == 1 else StreamLanes(batches)


def through(found: Any, frames: Tensor, skipped: tuple[int, ...] = ()) -> list[StreamFrame]:
    """Push and skip, look at the end of every call, and drain in the middle."""
    out: list[StreamFrame] = []
    for i, frame in enumerate(frames.split(1)):
        out += found.skip(i) if i in skipped else found.push(frame, i)
        if i == 5:
            out += found.drain()
            assert found.in_flight == 0
    return out + found.drain()


@pytest.mark.parametrize(("steps", "guidance"), [(1, "self"), (2, "onetime"), (2, "full"), (4, "none")])
@pytest.mark.parametrize(("lanes", "group"), [(1, 4), (2, 1), (3, 1), (2, 2), (4, 3)])
def test_every_width_gives_the_same_frames_in_order(
    frames: Tensor, lanes: int, group: int, steps: int, guidance: str
) -> None:
    settings = {"steps": steps, "guidance": guidance, "cfg_scale": 1.5}
    alone = through(stream(1, **settings), frames)
    found = through(stream(lanes, frame_group=group, **settings), frames)
    assert [f.id for f in found] == [f.meta for f in found] == list(range(COUNT))
    torch.testing.assert_close(
        torch.cat([f.latents for f in found]), torch.cat([f.latents for f in alone]), rtol=1e-5, atol=1e-5
    )
    assert not any(f.repeated for f in found)


@pytest.mark.parametrize("skipped", [(1,), (3, 4), (6, 7, 10), tuple(range(1, COUNT))])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("lanes", [2, 3])
def test_a_skipped_frame_repeats_the_one_before_it_in_whatever_lane(
    frames: Tensor, lanes: int, steps: int, skipped: tuple[int, ...]
) -> None:
    found = through(stream(lanes, steps=steps), frames, skipped)
    wanted = through(stream(1, steps=steps), frames, skipped)
    assert [f.meta for f in found] == list(range(COUNT))
    assert [f.meta for f in found if f.repeated] == list(skipped)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Expected a frame before the first skip"):
        stream(lanes).skip()


def test_a_frame_at_one_step_does_not_wait_for_others(frames: Tensor) -> None:
    lanes = stream(3, steps=1)
    assert [len(lanes.push(frame)) for frame in frames.split(1)] == [1] * COUNT
    assert len(stream(1, steps=1, frame_group=4).push(frames[:3])) == 0


def test_settings_prompts_and_frames_of_their_own_prompt(frames: Tensor) -> None:
    found = []
    for lanes in (1, 3):
        s, out = stream(lanes, steps=2), []
        for i, frame in enumerate(frames.split(1)):
            if i == 4:
                out += s.drain()
                s.update(cond=constant_cond(0.9), strength=0.4, steps=2, seed=5)
            out += s.push(frame, None, constant_cond(-0.7) if i == 8 else None)
        found.append(torch.cat([f.latents for f in out + s.drain()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_clear_forgets_all_and_goes_on(frames: Tensor) -> None:
    s = stream(2, steps=3)
    for frame in frames[:5].split(1):
        s.push(frame)
    s.clear()
    assert s.in_flight == 0
    out = s.push(frames[5:7], ["a", "b"]) + s.drain()
    assert [f.meta for f in out] == ["a", "b"]
    assert [f.id for f in out] == [5, 6]


@pytest.mark.parametrize("tie", [{"feedback": 0.3}, {"motion": 0.5}, {"cross_frame": True}, {"renoise": "fresh"}])
def test_frames_that_depend_on_each_other_go_one_by_one(tie: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected frames that do not depend on each other"):
        stream(2, **tie)
    with pytest.raises(ValueError, match="Expected frames that do not depend on each other"):
        stream(2).update(**tie)
    for priority in ("throughput", 2, "3"):
        width = width_of(priority, StreamConfig(**tie))
        assert (width.lanes, width.group) == (1, 1)
        assert next(iter(tie)) in width.reason


def test_lanes_without_delay_are_used_while_no_frame_waits_for_another(frames: Tensor) -> None:
    """Steps and feedback that change meanwhile, as on the live panel: the frames of one Stream Batch, each at once at one step."""
    changes = [{}, {"feedback": 0.4}, {"feedback": 0.0}, {"steps": 2}, {"steps": 1}]
    results = []
    for lanes in (1, 3):
        config = StreamConfig(strength=0.7, steps=1)
        batches = [StreamBatch(GaussianDenoiser(), constant_cond(0.4), None, config) for _ in range(lanes)]
        s = StreamLanes(batches, no_delay=True) if lanes > 1 else batches[0]
        used, out = [], []
        for change in changes:
            s.update(**change)
            for i, frame in enumerate(frames[:6].split(1)):
                found = s.push(frame)
                assert len(found) == 1 or s.config.steps == 2, (change, i)
                out += found
            out += s.drain()
            used.append(s.lanes)
        assert used == ([3, 1, 3, 1, 3] if lanes == 3 else [1] * 5)
        assert [f.id for f in out] == list(range(len(changes) * 6))
        results.append(torch.cat([f.latents for f in out]))
    for part in (slice(0, 6), slice(12, None)):  # with feedback the first frame follows the last one of its own lane
        torch.testing.assert_close(results[1][part], results[0][part])


@pytest.mark.parametrize(("kind", "acceleration", "count", "room"), [
    ("cuda:0", "graph", 132, 4), ("cuda:0", "compile", 68, 2), ("cuda:0", "graph", 28, 1), ("cuda:0", "none", 132, 1),
    ("cpu", "compile", 132, 1),
])  # fmt: skip
def test_a_device_has_room_for_recorded_passes_by_its_size(
    kind: str, acceleration: str, count: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=count))
    assert room_for(torch.device(kind), acceleration) == room


def test_what_a_priority_means() -> None:
    widths = {
        (p, n): width_of(p, StreamConfig(strength=0.5, steps=n))
        for p in ("latency", "throughput", 3, "2")
        for n in (1, 2, 4, 8, 9)
    }
    assert {w for (p, _), w in widths.items() if p == "latency"} == {Width(1, 1, no_delay=True)}
    recorded = [
        width_of("latency", StreamConfig(strength=0.5, steps=n, feedback=f), 4)
        for n, f in ((1, 0.0), (2, 0.0), (1, 0.3))
    ]
    assert [(w.lanes, w.group, w.reason, w.no_delay) for w in recorded] == [(n, 1, "", True) for n in (4, 1, 1)]
    assert [widths["throughput", n].group for n in (1, 2, 4, 8, 9)] == [4, 4, 4, 2, 1]
    assert [widths["throughput", n].delay for n in (1, 2, 4, 8, 9)] == [3, 3, 3, 1, 0]
    assert {(widths[p, n].lanes, widths[p, n].group) for p in (3,) for n in (1, 2, 4)} == {(3, 1)}
    assert widths["2", 1].lanes == 2
    for bad in ("fast", 0, 9, "0"):
        with pytest.raises(ValueError, match="Expected `priority`"):
            width_of(bad, StreamConfig())


def test_an_error_in_one_lane_loses_no_other_frame(frames: Tensor) -> None:
    s = stream(2, steps=1)
    plain, failing = s.batches[1].model, {"now": True}  # type: ignore[union-attr]

    def model(*args: Any) -> Tensor:
        if failing["now"]:
            raise RuntimeError("the device is gone")
        return plain(*args)

    model.space, model.levels = plain.space, plain.levels  # type: ignore[attr-defined]
    s.batches[1].model = model  # type: ignore[union-attr]
    assert [f.id for f in s.push(frames[:1])] == [0]
    with pytest.raises(RuntimeError, match="device is gone"):
        s.push(frames[1:2])
    failing["now"] = False
    assert [f.id for f in s.push(frames[2:3])] == []
    assert [f.id for f in s.drain()] == [1, 2]


# -- a prompt that moves


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("lanes", "group"), [(2, 1), (3, 1), (1, 4), (2, 2)])
def test_a_prompt_moves_from_frame_to_frame_whatever_lane_they_go_to(
    frames: Tensor, lanes: int, group: int, steps: int
) -> None:
    found = []
    for width, size in ((1, 1), (lanes, group)):
        config = StreamConfig(strength=0.7, steps=steps, guidance="none", frame_group=size)
        models = [GaussianDenoiser() for _ in range(width)]
        s = blended(models, [constant_cond(0.1)], PromptBlend([1.0]), 0, None, config)
        out: list[StreamFrame] = []
        for i, frame in enumerate([*frames.split(1)] * 3):
            if i == 4:
                out += s.drain()
                s.fade(constant_cond(0.9), 5)
                assert s.moving
            out += s.skip() if i == 6 else s.push(frame)
        out += s.drain()
        assert not s.moving
        assert s._length == 0, "the last prompt has become that of the stream"
        assert float(s.newest_prompt().context.mean()) == pytest.approx(0.9)
        found.append(torch.cat([f.latents for f in out]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert (found[0][11] - found[0][0]).abs().max() > 0.1, "the same frame before the fade and after it"


# -- on a device


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_prompt_that_another_cuda_stream_made_is_waited_for(frames: Tensor, lanes: int) -> None:
    config = StreamConfig(strength=0.6, steps=1, guidance="none")
    with fake_cuda() as machine:
        models = []
        for _ in range(lanes):
            models.append(network())
            machine.put_module(models[-1].unet)
        before, after = (to_device(c.context, DEVICE) for c in prompts()[:2])
        s = blended(models, [Conditioning(before)], PromptBlend([1.0]), 0, None, config)
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            after.record_stream(torch.cuda.current_stream())
            s.fade(Conditioning(after * 1.0), 3)
        for _ in range(8):
            for frame in frames[:4].split(1):
                s.push(to_device(frame, DEVICE))
        assert machine.waits == 0


@pytest.mark.parametrize("priority", ["throughput", "2", "latency"])
def test_a_live_stream_records_again_what_other_settings_need(
    frames: Tensor, priority: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and guidance change the rows of a call: they are recorded for these, and the images are those of a stream without."""
    made: list[int] = []

    def counted(run: Any) -> Any:
        made.append(1)
        return recording(run)

    monkeypatch.setattr(graphs, "record_cuda", counted)
    changes = [{"steps": 2}, {"guidance": "onetime"}, {"steps": 1, "guidance": "none"}, {"seed": 7}]
    results = []
    for device in (None, DEVICE):
        pipe, out = pipeline(), []
        with fake_cuda() if device else nullcontext() as machine:
            conds = prompts()
            if machine is not None:
                machine.put_module(pipe.vae)
                machine.put_module(pipe.model.unet)
                pipe = dataclasses.replace(pipe, device=DEVICE)
                conds = [Conditioning(to_device(c.context, DEVICE)) for c in conds]
            networks = Networks(pipe, "none" if machine is None else "graph", priority)
            settings = LiveSettings(steps=1, guidance="none", strength=0.6)
            config = StreamConfig(**settings.updates(), static_rows=machine is not None)
            width = width_of(priority, config, room_for(pipe.device, networks.acceleration))
            config = config.changed(frame_group=width.group)
            models = networks.fit(config, (48, 64), conds[0], width.lanes)
            s = blended(models, [conds[0]], PromptBlend([1.0]), 0, conds[1], config, width.no_delay)
            counts = [len(made)]
            for change in ({}, *changes):
                settings = settings.changed(change)
                group = width_of(priority, config.changed(**settings.updates())).group
                s.update(None, None, **settings.updates(), frame_group=group)
                s.use(networks.fit(s.config, (48, 64), conds[0], s.lanes))
                counts.append(len(made))
                for i in range(8):
                    out += s.push(to_device(frames[i : i + 1], DEVICE) if machine else frames[i : i + 1])
                out += s.drain()
            if machine is not None:
                assert machine.waits == 0
                for frame in out:
                    if frame.ready is not None:
                        torch.cuda.current_stream().wait_event(frame.ready)
                        frame.latents.record_stream(torch.cuda.current_stream())
                found = torch.cat([(f.latents + 0).inner for f in out])
            else:
                found = torch.cat([f.latents for f in out])
        results.append(found)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    # The network in each lane, and the VAE both ways. Of several steps a frame would wait for others of its lane: one lane.
    again = {"latency": [0, 3, 3, 6, 0], "2": [0, 4, 4, 4, 0], "throughput": [0, 3, 3, 3, 0]}[priority]
    assert [b - a for a, b in zip(counts, counts[1:])] == again


@pytest.mark.parametrize(("lanes", "group", "steps", "kind"), [(3, 1, 1, "unet"), (2, 2, 2, "small")])
def test_recordings_run_beside_each_other_and_nothing_waits(
    frames: Tensor, lanes: int, group: int, steps: int, kind: str
) -> None:
    config = StreamConfig(strength=0.6, steps=steps, guidance="self", frame_group=group, static_rows=True)
    model, conds, frames = network(kind), prompts(kind), frames[:6]
    wanted = [f.latents for f in through(StreamBatch(model, conds[0], None, config), frames)]
    with fake_cuda() as machine:
        machine.put_module(model.unet)
        cond = Conditioning(to_device(conds[0].context, DEVICE))
        models = [replayed(model, config.rows, 6, 8, cond, record=recording) for _ in range(lanes)]
        s = StreamLanes([StreamBatch(m, cond, None, config) for m in models])
        out = [f for i in range(6) for f in s.push(to_device(frames[i : i + 1], DEVICE), i)]
        clocks = {id(lane.stream): lane.stream.clock for lane in s._lanes}
        for a, b in itertools.permutations(s._lanes, 2):
            mine, other = clocks[id(a.stream)][a.stream], clocks[id(b.stream)][a.stream]
            assert other < mine, "a lane must not wait for the newest pass of another"
        out += s.drain()
        assert machine.waits == 0
        assert len({id(f.ready) for f in out}) > 1
        with pytest.raises(RaceError):
            out[-1].latents + 0
        for frame, latents in zip(out, wanted):
            torch.cuda.current_stream().wait_event(frame.ready)
            frame.latents.record_stream(torch.cuda.current_stream())
            torch.testing.assert_close((frame.latents + 0).inner, latents, rtol=1e-5, atol=1e-5)
    assert [f.meta for f in out] == list(range(6))


def run(
    pipe: Any, cond: Any, images: list[Tensor], config: StreamConfig, lanes: int, device: Any, got: list[Tensor], calls: list[int]
) -> None:  # fmt: skip
    """Take images through threads; `calls` collects how many images were decoded at once."""
    made = [StreamBatch(pipe.model, cond, None, config) for _ in range(lanes)]

    def decode(latents: Tensor) -> Any:
        calls.append(len(latents))
        return pipe.decode_async(latents, torch.uint8)

    source = [(image, i) for i, image in enumerate(images)]
    batch = made[0] if lanes == 1 else StreamLanes(made)
    sink = lambda image, *_: got.append(image.clone())  # noqa: E731
    stages(StreamThreads(source, pipe.encode_image, batch, decode, sink, live=False, queue=100, device=device))


@pytest.mark.parametrize(("lanes", "group"), [(2, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("device", [None, DEVICE], ids=["cpu", "fake"])
def test_threads_encode_and_decode_together_what_travels_together(lanes: int, group: int, device: Any) -> None:
    pipe, conds = pipeline(), prompts()
    images = [
        torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        for i in range(7)
    ]
    results, calls = [], []
    for width in ((1, 1), (lanes, group)):
        config = StreamConfig(strength=0.6, steps=2, guidance="none", frame_group=width[1])
        got: list[Tensor] = []
        calls.clear()

        if device is not None and width != (1, 1):
            with fake_cuda() as machine:
                machine.put_module(pipe.vae)
                machine.put_module(pipe.model.unet)
                run(pipe, conds[0].map(machine.put), images, config, lanes, device, got, calls)
        else:
            run(pipe, conds[0], images, config, width[0], None, got, calls)
        results.append(torch.stack(got))
    assert len(results[1]) == len(images)
    assert (results[1].int() - results[0].int()).abs().max() <= 1
    assert sum(calls) == len(images)
    assert max(calls) == group
