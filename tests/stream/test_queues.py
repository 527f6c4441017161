"""Queues and threads: order, drops, stop, and what happens when a part of the stream dies."""

from __future__ import annotations

import threading
import time
import traceback
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from slipstream.core.transfer import DEVICE_WORK
from slipstream.stream import SimilarityFilter, StreamBatch, StreamConfig
from slipstream.stream.queues import AHEAD, FrameQueue, Lane, Statistics, StreamThreads, percentile
from slipstream_tests.analytic import GaussianDenoiser, constant_cond

COUNT = 30


def encode(image):
    return image.movedim(-1, 1)[:, :1].expand(-1, 4, -1, -1).contiguous()


def decode(latents):
    return latents[:, :3].movedim(1, -1)


def frames(count: int = COUNT, delay: float = 0.0):
    for i in range(count):
        time.sleep(delay)
        yield torch.full((4, 6, 3), i / count), i


def make_batch(model=None, **settings) -> StreamBatch:
    return StreamBatch(
        model or GaussianDenoiser(), constant_cond(), None, StreamConfig(strength=0.6, steps=3, **settings)
    )


def make(source=None, sink=None, batch=None, **more) -> StreamThreads:
    parts = {"source": source or frames(), "encode": encode, "batch": batch or make_batch(), "decode": decode}
    return StreamThreads(**{**parts, "sink": sink or (lambda *_: None), "live": False, **more})


# -- recordings


class RecordingModel(GaussianDenoiser):
    """A model that records at every call, as lanes do at their first and others when steps change."""

    def __init__(self, others: set[str]) -> None:
        super().__init__()
        self.others, self.met = others, list[set[str]]()

    def __call__(self, x, sigma, cond):
        with DEVICE_WORK.alone():
            time.sleep(0.003)
            self.met.append(set(self.others))
        return super().__call__(x, sigma, cond)


def test_no_other_stage_uses_the_device_while_one_records() -> None:
    """With cudaMallocAsync, what another thread allocates meanwhile breaks the recording and ends the process."""
    others: set[str] = set()

    def during(name, work):
        def call(x):
            others.add(name)
            time.sleep(0.002)
            found = work(x)
            others.remove(name)
            return found

        return call

    model, came = RecordingModel(others), []
    stages = {"encode": during("encode", encode), "decode": during("decode", decode)}
    with make(batch=make_batch(model), sink=lambda image, i, frame: came.append(i), **stages) as threads:
        threads.wait(60)
    assert came == list(range(COUNT))
    assert len(model.met) >= COUNT
    assert not set.union(*model.met)


class SlowModel(GaussianDenoiser):
    """A model whose calls are known while they last."""

    def __init__(self) -> None:
        super().__init__()
        self.at_work = False

    def __call__(self, x, sigma, cond):
        self.at_work = True
        time.sleep(0.003)
        found = super().__call__(x, sigma, cond)
        self.at_work = False
        return found


def test_the_network_rests_while_another_stage_has_the_device_for_itself() -> None:
    """As in the host, which may move the network's weights then."""
    model, met, came = SlowModel(), list[bool](), []

    def alone(work):
        def call(x):
            with DEVICE_WORK.alone():
                time.sleep(0.002)
                met.append(model.at_work)
                return work(x)

        return call

    stages = {"encode": alone(encode), "decode": alone(decode)}
    with make(batch=make_batch(model), sink=lambda image, i, frame: came.append(i), **stages) as threads:
        threads.wait(60)
    assert came == list(range(COUNT))
    assert len(met) == 2 * COUNT
    assert not any(met)


# -- queues


def test_live_queue_keeps_the_newest_and_counts_drops() -> None:
    queue = FrameQueue(2, live=True)
    for i in range(5):
        assert queue.put(i)
    queue.close()
    assert list(queue) == [3, 4]
    assert queue.dropped == 3
    assert not queue.put(9)


def test_patient_queue_makes_the_producer_wait() -> None:
    queue = FrameQueue(1, live=False)
    producer = threading.Thread(target=lambda: [queue.put(i) for i in range(50)] + [queue.close()])
    producer.start()
    assert list(queue) == list(range(50))
    producer.join()
    assert queue.dropped == 0


def test_closing_frees_a_waiting_producer() -> None:
    queue = FrameQueue(1, live=False)
    queue.put(1)
    taken = []
    producer = threading.Thread(target=lambda: taken.append(queue.put(2)))
    producer.start()
    queue.close()
    producer.join(5)
    assert taken == [False]
    with pytest.raises(ValueError, match="`size`"):
        FrameQueue(0)


def test_percentiles() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile([], 50)) == (51.0, 100.0, 0.0)


# -- streams


def test_every_frame_of_a_file_comes_out_in_order_as_if_alone() -> None:
    got = []
    threads = make(sink=lambda image, meta, frame: got.append((image, meta, frame)))
    with threads:
        summary = threads.wait(60)
    assert [meta for _, meta, _ in got] == list(range(COUNT))
    assert [frame.id for *_, frame in got] == list(range(COUNT))
    batch = make_batch()
    expected = [f for image, _ in frames() for f in batch.push(encode(image[None]))] + batch.drain()
    for (image, *_), frame in zip(got, expected):
        torch.testing.assert_close(image, decode(frame.latents)[0])
    assert (summary["frames_in"], summary["frames_out"], summary["dropped_in"]) == (COUNT, COUNT, 0)
    assert 0 < summary["latency_p50_ms"] <= summary["latency_p95_ms"] <= summary["latency_p99_ms"]
    assert summary["fps_out"] > 0
    assert f"{COUNT} of {COUNT} frames" in threads.statistics.text()


def test_the_parts_run_at_the_same_time() -> None:
    """While the first frame is being decoded, later ones are encoded and denoised."""
    encoded, denoised, waited = threading.Event(), threading.Event(), []
    model = GaussianDenoiser()

    def watching_encode(image):
        if float(image.max()) >= 5 / 12:
            encoded.set()
        if model.calls >= 4:
            denoised.set()
        return encode(image)

    def slow_decode(latents):
        if not waited:
            waited.append(encoded.wait(20) and denoised.wait(20))
        return decode(latents)

    with make(frames(12), encode=watching_encode, batch=make_batch(model), decode=slow_decode, queue=4) as threads:
        threads.wait(60)
    assert waited == [True]


def test_a_camera_faster_than_the_model_loses_old_frames_only() -> None:
    class Slow(GaussianDenoiser):
        def __call__(self, *args):
            time.sleep(0.01)
            return super().__call__(*args)

    got = []
    threads = make(frames(200, 0.0005), lambda image, meta, frame: got.append(meta), make_batch(Slow()), live=True)
    with threads:
        summary = threads.wait(60)
    assert got == sorted(set(got))
    assert got[-1] == 199  # the newest frame is never the one that is dropped
    assert summary["dropped_in"] + len(got) + summary["dropped_out"] == 200
    assert summary["dropped_in"] > 50


def test_a_camera_slower_than_the_model_loses_nothing() -> None:
    got = []
    with make(frames(8, 0.02), lambda image, meta, frame: got.append(meta), live=True) as threads:
        threads.wait(60)
    assert got == list(range(8))


def test_still_frames_are_skipped_and_shown_again() -> None:
    model = GaussianDenoiser()
    still = ((torch.full((4, 6, 3), 0.7), i) for i in range(20))
    got = []
    chooser = SimilarityFilter(0.9, max_skip=100, rng=lambda: 0.5)
    sink = lambda image, meta, frame: got.append((image, meta, frame.repeated))  # noqa: E731
    with make(still, sink, make_batch(model), chooser=chooser) as t:
        summary = t.wait(60)
    assert [meta for _, meta, _ in got] == list(range(20))
    assert [repeated for *_, repeated in got] == [False] + [True] * 19
    assert all(torch.equal(image, got[0][0]) for image, *_ in got)
    assert model.rows == 3
    assert summary["skipped"] == 19


def test_what_is_begun_does_not_pile_up_before_a_slow_device(monkeypatch) -> None:
    """Starting work is quick and its end takes long: frames are dropped at the entrance, not after they were computed."""

    class Later:
        def synchronize(self) -> None:
            self.done.wait()

    begun: list[int] = []
    arrived: list[int] = []

    def work() -> None:
        for later in iter(queue.get, None):
            time.sleep(0.005)
            arrived.append(1)
            later.done.set()

    def mark(lane: Lane) -> Later | None:
        if lane is not threads._lanes["decode"]:
            return None
        later = Later()
        later.done = threading.Event()
        queue.put(later)
        begun.append(len(begun) + 1 - len(arrived))
        return later

    queue: Any = SimpleQueue()
    device = threading.Thread(target=work)
    device.start()
    monkeypatch.setattr(Lane, "mark", mark)
    threads = make(frames(200, 0.0005), live=True)
    with threads:
        summary = threads.wait(60)
    queue.put(None)
    device.join()
    assert max(begun) <= AHEAD + 2, "one more is being begun, another has come without being counted yet"
    assert summary["dropped_out"] == 0
    assert summary["dropped_in"] > 50


def test_prompt_changes_while_it_runs() -> None:
    batch = make_batch()
    got = []

    def sink(image, meta, frame) -> None:
        got.append(float(image.mean()))
        if meta == 10:
            batch.update(cond=constant_cond(5.0))

    with make(frames(60), sink, batch) as threads:
        threads.wait(60)
    assert len(got) == 60
    assert got[-1] > 2


# -- the end, wanted and unwanted


def test_stop_is_heard_between_passes() -> None:
    got = []
    begun = threading.Event()

    def endless():
        i = 0
        while True:
            yield torch.zeros(4, 6, 3), i
            i += 1

    def sink(image, meta, frame) -> None:
        got.append(meta)
        begun.set()

    threads = make(endless(), sink).start()
    assert begun.wait(30)
    threads.stop()
    threads.wait(30)
    assert got == list(range(len(got)))


def die(*_):
    raise RuntimeError("the cable was pulled")


def dying_source(after: int):
    yield from frames(after)
    die()


def test_a_dying_producer_loses_no_frame() -> None:
    got = []
    with make(dying_source(7), lambda image, meta, frame: got.append(meta)) as threads:
        with pytest.raises(RuntimeError, match="cable") as caught:
            threads.wait(30)
    assert got == list(range(7))
    assert "dying_source" in "".join(traceback.format_tb(caught.value.__traceback__))


class DyingModel(GaussianDenoiser):
    def __call__(self, *args):
        if self.calls >= 10:
            die()
        return super().__call__(*args)


def dying_after(count: int, work):
    calls = []

    def part(*args):
        calls.append(1)
        return work(*args) if len(calls) <= count else die()

    return part


@pytest.mark.parametrize("part", ["encode", "denoise", "decode", "sink"])
@pytest.mark.parametrize("live", [True, False])
def test_an_error_anywhere_ends_the_stream_and_keeps_what_is_finished(part, live) -> None:
    got = []
    keep = lambda image, meta, frame: got.append(meta)  # noqa: E731
    parts = {
        "encode": {"encode": dying_after(10, encode)},
        "denoise": {"batch": make_batch(DyingModel())},
        "decode": {"decode": dying_after(8, decode)},
        "sink": {"sink": dying_after(8, keep)},
    }[part]
    with make(**{"sink": keep, "live": live, "source": frames(30, 0.002 if live else 0), **parts}) as threads:
        with pytest.raises(RuntimeError, match="cable"):
            threads.wait(30)
    expected = {"encode": 10, "denoise": 8, "decode": 8, "sink": 8}[part]
    assert len(got) == expected if not live else len(got) <= expected
    assert got == sorted(got)
    assert not any(thread.is_alive() for thread in threads._threads)


def test_frames_of_changing_size_are_refused() -> None:
    got = []
    source = [(torch.zeros(4, 6, 3), 0), (torch.zeros(8, 6, 3), 1)]
    with make(source, lambda image, meta, frame: got.append(meta)) as threads:
        with pytest.raises(ValueError, match=r"frames of size \(4, 6, 3\) as at the start, but got \(8, 6, 3\)"):
            threads.wait(30)
    assert got == [0]


def test_a_frame_with_nan_is_refused() -> None:
    source = [(torch.zeros(4, 6, 3), 0), (torch.full((4, 6, 3), float("nan")), 1)]
    with make(source) as threads, pytest.raises(ValueError, match="finite"):
        threads.wait(30)


def test_alpha_is_dropped() -> None:
    source = [(torch.zeros(4, 6, 4), 0)]
    got = []
    with make(source, lambda image, *_: got.append(image.shape)) as threads:
        threads.wait(30)
    assert got == [(4, 6, 3)]


def test_an_empty_source_ends_at_once() -> None:
    with make(iter(())) as threads:
        assert threads.wait(30)["frames_out"] == 0


def test_waiting_with_a_limit() -> None:
    release = threading.Event()

    def source():
        release.wait(30)
        yield torch.zeros(4, 6, 3), 0

    threads = make(source()).start()
    with pytest.raises(TimeoutError, match="still runs"):
        threads.wait(0.05)
    release.set()
    assert threads.wait(30)["frames_out"] == 1


def test_statistics_count_frames_and_rates(monkeypatch) -> None:
    """Ten frames come in 10 ms apart, eight leave 20 ms apart with latencies of 1 to 8 ms, two of them repeats."""
    clock = iter([0.01 * i for i in range(10)] + [1 + 0.02 * (i // 2) for i in range(16)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    statistics = Statistics()
    entrance, exit = FrameQueue(1), FrameQueue(1)
    statistics.queues = entrance, exit
    for i in range(10):
        statistics.arrived()
        entrance.put(i)
    for i in range(8):
        statistics.left(0.001 * (i + 1), skipped=i in (3, 5))
        statistics.spent("decode", 0.004 if i % 2 else 0.002)
    summary = statistics.summary()
    counted = {"frames_in": 10, "frames_out": 8, "dropped_in": 9, "dropped_out": 0, "skipped": 2}
    assert {name: summary[name] for name in counted} == counted
    rates = {"fps_in": 100, "fps_out": 50, "decode_ms": 3, "encode_ms": 0}
    assert {name: summary[name] for name in rates} == pytest.approx(rates)
    latencies = {"latency_p50_ms": 5, "latency_p95_ms": 8, "latency_p99_ms": 8}
    assert {name: summary[name] for name in latencies} == pytest.approx(latencies)
    assert "8 of 10 frames, 50.0 fps (in 100.0), latency p50 5 / p95 8 / p99 8 ms" in statistics.text()
    assert "dropped 9, skipped 2" in statistics.text()


def test_statistics_of_the_last_seconds_forget_what_was_before(monkeypatch) -> None:
    """A stream that got slower tells its times of now; without frames for so long it tells none, and all of it at the end."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    statistics = Statistics(seconds=4)
    for at, seconds in ((0.0, 0.002), (10.0, 0.1), (10.2, 0.3)):
        now[0] = at
        statistics.spent("denoise", seconds)
        statistics.left(2 * seconds, skipped=False)
    found = statistics.summary()
    assert (found["denoise_ms"], found["latency_p50_ms"], found["fps_out"]) == pytest.approx((200, 600, 5))
    assert statistics.limit() == "denoise: at most 5.0 frames per second"
    now[0] = 20.0
    found = statistics.summary()
    assert (found["denoise_ms"], found["latency_p95_ms"], found["fps_out"], statistics.limit()) == (0, 0, 0, "")
    statistics.seconds = float("inf")
    assert statistics.summary()["denoise_ms"] == pytest.approx(402 / 3)


def test_statistics_of_nothing() -> None:
    assert Statistics().summary()["fps_out"] == 0
    assert "0 of 0 frames" in Statistics().text()
