"""Stream Batch: the same numbers as frame by frame, M in and M out in M + N - 1 passes, live changes, bad input."""

from __future__ import annotations

import threading
import tracemalloc

import pytest
import torch
from slipstream.core import Conditioning, SeededNoise
from slipstream.stream import StreamBatch, StreamConfig, blend
from slipstream.stream.config import stage_sigmas
from slipstream_tests.analytic import GaussianDenoiser, constant_cond

RISING = {"t_index_list": [5, 20, 30, 44]}


def collect(stream: StreamBatch, frames, **more) -> list:
    return [f for frame in frames.split(1) for f in stream.push(frame, **more)] + stream.drain()


def stacked(finished) -> torch.Tensor:
    return torch.cat([f.latents for f in finished])


def alone(model, cond, uncond, config, frame, noise) -> torch.Tensor:
    """The definition: one frame, one step after another, guidance spelled out."""
    space, sigmas = model.space, stage_sigmas(config, model.levels)
    x = space.add_noise(frame, noise[:1], sigmas[0])
    anchor = frame
    for i, sigma in enumerate(sigmas):
        denoised = model(x, sigma.expand(1), cond)
        if config.guidance == "full" or (config.guidance == "onetime" and i == 0):
            anchor = model(x, sigma.expand(1), uncond)
        if config.guidance == "full":
            denoised = anchor + config.cfg_scale * (denoised - anchor)
        elif config.guidance != "none":
            # The first level of a flow model is noise only: it has no image to move towards.
            signal = space.scale(sigma) if space.name == "flow" else (sigma**2 + 1).rsqrt()
            delta = config.delta if signal >= 0.0625 else 1.0
            negative = anchor + (1 - delta) * (x / space.scale(sigma) - anchor)
            denoised = negative + config.cfg_scale * (denoised - negative)
        if i + 1 < len(sigmas):
            x = space.add_noise(denoised, noise[i + 1 : i + 2], sigmas[i + 1])
    return denoised


@pytest.mark.parametrize("guidance", ["none", "full", "self", "onetime"])
@pytest.mark.parametrize("delta", [1.0, 0.6])
@pytest.mark.parametrize("steps", [[45], [0], [32, 45], [5, 20, 30, 44]])
def test_stream_equals_frame_by_frame(model, frames, cond, uncond, guidance, delta, steps) -> None:
    config = StreamConfig(t_index_list=steps, guidance=guidance, cfg_scale=1.7, delta=delta)
    finished = collect(StreamBatch(model, cond, uncond, config), frames)
    noise = SeededNoise(config.seed)(frames.new_empty(len(steps), *frames.shape[1:]))
    expected = torch.cat([alone(model, cond, uncond, config, frame, noise) for frame in frames.split(1)])
    torch.testing.assert_close(stacked(finished), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("renoise", ["fixed", "fresh", "none", "ddim"])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_as_many_out_as_in_in_order(model, frames, cond, renoise, group, count) -> None:
    config = StreamConfig(renoise=renoise, frame_group=group, **RISING)
    stream = StreamBatch(model, cond, None, config)
    finished = collect(stream, frames[:count])
    groups = -(-count // group)
    assert [f.id for f in finished] == list(range(count))
    assert stream.passes == model.calls == groups + 4 - 1
    assert model.rows == count * 4
    assert stream.in_flight == 0
    assert all(f.age == 3 for f in finished)
    assert all(f.latency > 0 for f in finished)


@pytest.mark.parametrize(
    ("guidance", "rows"), [("none", 4 * 7), ("self", 4 * 7), ("onetime", 4 * 7 + 7), ("full", 2 * 4 * 7)]
)
def test_cost_in_rows(model, frames, cond, uncond, guidance, rows) -> None:
    collect(StreamBatch(model, cond, uncond, StreamConfig(guidance=guidance, **RISING)), frames)
    assert model.rows == rows


@pytest.mark.parametrize(("guidance", "width"), [("none", 4), ("self", 4), ("onetime", 5), ("full", 8)])
def test_static_rows_keep_one_shape_and_the_numbers(model, frames, cond, uncond, guidance, width) -> None:
    seen = []

    class Watching(GaussianDenoiser):
        def __call__(self, x, sigma, cond):
            seen.append(len(x))
            return super().__call__(x, sigma, cond)

    config = StreamConfig(guidance=guidance, **RISING)
    expected = stacked(collect(StreamBatch(model, cond, uncond, config), frames))
    watching = Watching(0.7, 0.2, model.space)
    padded = StreamBatch(watching, cond, uncond, config.changed(static_rows=True))
    torch.testing.assert_close(stacked(collect(padded, frames)), expected, rtol=1e-5, atol=1e-5)
    assert set(seen) == {width}


@pytest.mark.parametrize("guidance", ["none", "full", "self", "onetime"])
@pytest.mark.parametrize("steps", [[45], [32, 45], [5, 20, 30, 44]])
def test_groups_give_the_numbers_of_single_frames(model, frames, cond, uncond, guidance, steps) -> None:
    """For every number of steps and every guidance; the published code raises for most of these."""
    config = StreamConfig(t_index_list=steps, guidance=guidance, delta=0.7)
    single = collect(StreamBatch(model, cond, uncond, config), frames)
    for group in (2, 3, 9):
        model.calls = 0
        grouped = collect(StreamBatch(model, cond, uncond, config.changed(frame_group=group)), frames)
        torch.testing.assert_close(stacked(grouped), stacked(single))
        assert model.calls == -(-len(frames) // group) + len(steps) - 1


def test_fresh_noise_is_drawn_for_every_step_of_every_frame(model, frames, cond) -> None:
    """In closed form, with the draws as they come: the bank of entry noise first, then one for each row that continues."""
    config = StreamConfig(renoise="fresh", guidance="none", **RISING)
    draws: list[torch.Tensor] = []

    def source(like: torch.Tensor) -> torch.Tensor:
        draws.append(torch.randn(like.shape, generator=torch.Generator().manual_seed(len(draws))))
        return draws[-1]

    stream = StreamBatch(model, cond, None, config, source)
    got = stream.push(frames[:1]) + stream.drain()
    assert len(draws) == 4
    sigmas = stage_sigmas(config, model.levels)
    x = model.space.add_noise(frames[:1], draws[0][:1], sigmas[0])
    for sigma, low, noise in zip(sigmas, sigmas[1:], draws[1:]):
        x = model.space.add_noise(model(x, sigma.expand(1), cond), noise, low)
    torch.testing.assert_close(stacked(got), model(x, sigmas[-1:], cond), rtol=1e-5, atol=1e-5)


def test_a_batch_of_frames_is_a_row_of_frames(model, frames, cond) -> None:
    single = collect(StreamBatch(model, cond), frames)
    stream = StreamBatch(model, cond)
    torch.testing.assert_close(stacked(stream.push(frames) + stream.drain()), stacked(single), rtol=0, atol=0)


def test_equal_frames_give_equal_results(model, frames, cond) -> None:
    """Fixed noise: nothing flickers in a scene at rest."""
    still = frames[:1].expand(5, -1, -1, -1)
    results = stacked(collect(StreamBatch(model, cond), still))
    assert (results - results[:1]).abs().max() < 1e-6
    fresh = stacked(collect(StreamBatch(model, cond, None, StreamConfig(renoise="fresh", guidance="none")), still))
    assert (fresh - fresh[:1]).abs().max() > 1e-3


def test_same_seed_same_result_and_no_global_randomness(model, frames, cond) -> None:
    config = StreamConfig(renoise="fresh", seed=11)
    first = stacked(collect(StreamBatch(model, cond, None, config), frames))
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = stacked(collect(StreamBatch(model, cond, None, config), frames))
    assert torch.equal(first, again)
    torch.set_rng_state(state)
    other = stacked(collect(StreamBatch(model, cond, None, config.changed(seed=12)), frames))
    assert (first - other).abs().max() > 1e-3


def test_inputs_are_not_changed(model, frames, cond) -> None:
    before = frames.clone()
    collect(StreamBatch(model, cond), frames)
    assert torch.equal(frames, before)


def test_results_are_plain_tensors(model, frames, cond) -> None:
    """Streams run in inference mode, but what comes out can be trained on and written to."""
    stream = StreamBatch(model, cond)
    first = stream.push(frames[:3])[0].latents
    assert not first.is_inference()
    kept = first.clone()
    first.mul_(0)
    second = stream.push(frames[3:4])
    assert not torch.equal(first, kept)
    weight = torch.ones(1, requires_grad=True)
    (second[0].latents * weight).sum().backward()
    assert weight.grad is not None


def test_half_precision_frames_are_streamed_in_float32(model, frames, cond) -> None:
    half = frames.half()
    got = collect(StreamBatch(model, cond), half)
    assert torch.equal(stacked(got), stacked(collect(StreamBatch(model, cond), half.float())))
    assert got[0].latents.dtype == torch.float32


def test_meta_comes_back(model, frames, cond) -> None:
    stream = StreamBatch(model, cond)
    out = stream.push(frames[:3], ["a", "b", "c"]) + stream.push(frames[3:4], {"pts": 3}) + stream.drain()
    assert [f.meta for f in out] == ["a", "b", "c", {"pts": 3}]
    with pytest.raises(ValueError, match="2 entries in `meta`"):
        stream.push(frames[:2], ["a"])


def test_more_steps_than_frames(model, frames, cond) -> None:
    stream = StreamBatch(model, cond, None, StreamConfig(strength=0.9, steps=12))
    assert stream.push(frames[:1]) == []
    assert [f.id for f in stream.drain()] == [0]
    assert stream.passes == 12


def test_a_drained_stream_goes_on(model, frames, cond) -> None:
    stream = StreamBatch(model, cond)
    first = collect(stream, frames)
    second = collect(stream, frames)
    assert [f.id for f in second] == list(range(7, 14))
    torch.testing.assert_close(stacked(first), stacked(second), rtol=0, atol=0)
    assert stream.advance() == stream.drain() == []


def test_two_streams_on_one_model(model, frames, cond, uncond) -> None:
    configs = [StreamConfig(**RISING), StreamConfig(guidance="onetime", seed=5)]
    apart = [stacked(collect(StreamBatch(model, cond, uncond, c), frames)) for c in configs]
    streams = [StreamBatch(model, cond, uncond, c) for c in configs]
    together: list[list] = [[], []]
    for frame in frames.split(1):
        for stream, out in zip(streams, together):
            out += stream.push(frame)
    for stream, out, expected in zip(streams, together, apart):
        assert torch.equal(stacked(out + stream.drain()), expected)


# -- live changes


def test_a_new_prompt_shows_at_once_and_leaves_finished_frames(model, frames, cond, uncond) -> None:
    old = stacked(collect(StreamBatch(model, cond, None, StreamConfig(**RISING)), frames))
    new = stacked(collect(StreamBatch(model, uncond, None, StreamConfig(**RISING)), frames))
    stream = StreamBatch(model, cond, None, StreamConfig(**RISING))
    out = [f for frame in frames[:4].split(1) for f in stream.push(frame)]
    kept = out[0].latents.clone()
    stream.update(cond=uncond)
    out += [f for frame in frames[4:].split(1) for f in stream.push(frame)] + stream.drain()
    assert torch.equal(out[0].latents, kept)
    torch.testing.assert_close(kept, old[:1])
    torch.testing.assert_close(stacked(out[4:]), new[4:])  # frames that entered after the change know nothing else
    assert all((out[i].latents - old[i : i + 1]).abs().max() > 1e-3 for i in (1, 2, 3))  # visible within N frames


@pytest.mark.parametrize("guidance", ["full", "onetime"])
def test_a_new_negative_shows_and_leaves_finished_frames(model, frames, cond, uncond, guidance) -> None:
    config = StreamConfig(guidance=guidance, cfg_scale=2.0, **RISING)
    other = constant_cond(4.0)
    old = stacked(collect(StreamBatch(model, cond, uncond, config), frames))
    new = stacked(collect(StreamBatch(model, cond, other, config), frames))
    stream = StreamBatch(model, cond, uncond, config)
    out = stream.push(frames[:4])
    stream.update(uncond=other)
    out = stacked(out + stream.push(frames[4:]) + stream.drain())
    torch.testing.assert_close(out[:1], old[:1])
    torch.testing.assert_close(out[4:], new[4:])
    if guidance == "full":  # asked at every step, so within N frames
        assert all((out[i] - old[i]).abs().max() > 1e-3 for i in (1, 2, 3))
    else:  # asked at a frame's first step, and kept
        torch.testing.assert_close(out[1:4], old[1:4])


def test_a_blend_of_prompts_is_a_prompt_like_any_other(model, frames, cond, uncond) -> None:
    mixed = blend([cond, uncond], [3, 1])
    expected = stacked(collect(StreamBatch(model, mixed), frames))
    stream = StreamBatch(model, cond)
    out = stream.push(frames[:3])
    stream.update(cond=mixed)
    out = stacked(out + stream.push(frames[3:]) + stream.drain())
    torch.testing.assert_close(out[3:], expected[3:])
    assert (out[2] - expected[2]).abs().max() > 1e-4


def test_a_new_prompt_while_draining(model, frames, cond, uncond) -> None:
    stream = StreamBatch(model, cond, None, StreamConfig(**RISING))
    out = [f for frame in frames.split(1) for f in stream.push(frame)]
    out += stream.advance()
    stream.update(cond=uncond)
    out += stream.drain()
    assert [f.id for f in out] == list(range(7))
    assert torch.isfinite(stacked(out)).all()


@pytest.mark.parametrize("changes", [{"cfg_scale": 2.5}, {"delta": 0.3}, {"guidance": "none"}, {"seed": 9}])
def test_settings_change_without_losing_frames(model, frames, cond, changes) -> None:
    config = StreamConfig(**RISING)
    expected = stacked(collect(StreamBatch(model, cond, None, config.changed(**changes)), frames))
    stream = StreamBatch(model, cond, None, config)
    out = [f for frame in frames[:3].split(1) for f in stream.push(frame)]
    stream.update(**changes)
    out += [f for frame in frames[3:].split(1) for f in stream.push(frame)] + stream.drain()
    assert [f.id for f in out] == list(range(7))
    torch.testing.assert_close(stacked(out[3:]), expected[3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_number_of_steps_changes_and_frames_in_flight_stay(model, frames, cond, steps) -> None:
    before, after = StreamConfig(**RISING), StreamConfig(strength=0.8, steps=steps)
    stream = StreamBatch(model, cond, None, before)
    out = [f for frame in frames[:3].split(1) for f in stream.push(frame)]
    stream.update(strength=0.8, steps=steps)
    out += [f for frame in frames[3:].split(1) for f in stream.push(frame)] + stream.drain()
    assert [f.id for f in out] == list(range(7))
    old = stacked(collect(StreamBatch(model, cond, None, before), frames))
    torch.testing.assert_close(stacked(out[:3]), old[:3])  # each frame keeps the steps that it began with
    if steps <= 4:  # their noise is the same for the steps that there were
        new = stacked(collect(StreamBatch(model, cond, None, after), frames))
        torch.testing.assert_close(stacked(out[3:]), new[3:], rtol=1e-5, atol=1e-5)


def test_guidance_that_needs_a_negative_switched_on_late(model, frames, cond, uncond) -> None:
    stream = StreamBatch(model, cond, None, StreamConfig(guidance="onetime", cfg_scale=1.0, **RISING))
    out = stream.push(frames[:2])
    with pytest.raises(ValueError, match="`uncond`"):
        stream.update(cfg_scale=1.5)
    assert stream.config.cfg_scale == 1.0
    stream.update(uncond=uncond, cfg_scale=1.5)
    out += stream.push(frames[2:]) + stream.drain()
    assert len(out) == 7
    assert torch.isfinite(stacked(out)).all()


def test_updates_from_another_thread(model, frames, cond, uncond) -> None:
    stream = StreamBatch(model, cond, uncond)
    done = threading.Event()

    def turn_knobs() -> None:
        n = 0
        while not done.is_set():
            n += 1
            stream.update(cond=uncond if n % 2 else cond, strength=0.3 + 0.1 * (n % 5), steps=1 + n % 4)

    thread = threading.Thread(target=turn_knobs)
    thread.start()
    out = [f for _ in range(20) for f in stream.push(frames)]
    done.set()
    thread.join()
    out += stream.drain()
    assert [f.id for f in out] == list(range(140))
    assert torch.isfinite(stacked(out)).all()


def test_conditioning_of_a_frame_travels_with_it(model, frames, cond) -> None:
    """A frame's own conditioning (a prompt, or a ControlNet image in `extra`) holds at all its steps, for it alone."""
    special = stacked(collect(StreamBatch(model, constant_cond(3.0)), frames))
    plain = stacked(collect(StreamBatch(model, cond), frames))
    stream = StreamBatch(model, cond)
    out = stream.push(frames[:3]) + stream.push(frames[3:4], cond=constant_cond(3.0)) + stream.push(frames[4:])
    out = stacked(out + stream.drain())
    torch.testing.assert_close(out[3], special[3])
    torch.testing.assert_close(out[[0, 1, 2, 4, 5, 6]], plain[[0, 1, 2, 4, 5, 6]])


# -- frames that are left out


def test_a_skipped_frame_repeats_the_one_before_and_drains_first(model, frames, cond) -> None:
    plain = stacked(collect(StreamBatch(model, cond, None, StreamConfig(**RISING)), frames[:2]))
    model.calls = 0
    stream = StreamBatch(model, cond, None, StreamConfig(**RISING))
    out = stream.push(frames[:2], ["a", "b"])
    for n in range(6):
        out += stream.skip(f"skip {n}")
    assert model.calls == 5  # two frames of four steps, and then nothing
    assert [f.meta for f in out] == ["a", "b", *(f"skip {n}" for n in range(6))]
    assert [f.repeated for f in out] == [False, False, *[True] * 6]
    torch.testing.assert_close(stacked(out[:2]), plain)
    assert all(torch.equal(f.latents, out[1].latents) for f in out[2:])
    with pytest.raises(ValueError, match="first skip"):
        StreamBatch(model, cond).skip()


def test_skips_in_a_group_that_is_not_full(model, frames, cond) -> None:
    stream = StreamBatch(model, cond, None, StreamConfig(frame_group=3))
    out = (
        stream.push(frames[:4])
        + stream.skip()
        + stream.skip()
        + stream.push(frames[4:5])
        + stream.skip()
        + stream.drain()
    )
    assert [f.id for f in out] == list(range(8))
    assert [f.repeated for f in out] == [False, False, False, False, True, True, False, True]


# -- bad input


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(0, 4, 8, 6), "at least one frame"),
        (torch.zeros(4, 8, 6), "of shape"),
        ([1, 2], "list"),
        (torch.full((1, 4, 8, 6), float("nan")), "finite"),
        (torch.full((1, 4, 8, 6), float("inf")), "finite"),
        (torch.zeros(1, 4, 8, 5), "Resize the frames"),
        (torch.zeros(1, 3, 6, 5), "Use the VAE that belongs"),
    ],
)
def test_a_bad_frame_is_refused_and_the_stream_goes_on(model, frames, cond, latents, message) -> None:
    expected = stacked(collect(StreamBatch(model, cond), frames))
    stream = StreamBatch(model, cond)
    out = stream.push(frames[:3])
    with pytest.raises(ValueError, match=message):
        stream.push(latents)
    out += stream.push(frames[3:]) + stream.drain()
    assert torch.equal(stacked(out), expected)


def test_another_size_after_draining(model, frames, cond) -> None:
    stream = StreamBatch(model, cond)
    collect(stream, frames)
    larger = torch.zeros(3, 4, 8, 8)
    assert [f.latents.shape for f in collect(stream, larger)] == [(1, 4, 8, 8)] * 3


def test_bad_prompts(model, cond) -> None:
    with pytest.raises(ValueError, match="Tensor"):
        StreamBatch(model, torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="1 row, but got 2"):
        StreamBatch(model, constant_cond(0.0, rows=2))
    with pytest.raises(ValueError, match="`uncond` for guidance 'full'"):
        StreamBatch(model, cond, None, StreamConfig(guidance="full"))


def test_self_guidance_needs_a_picture() -> None:
    from slipstream.core.denoiser import FLOW

    model = GaussianDenoiser(space=FLOW)
    stream = StreamBatch(model, constant_cond(), None, StreamConfig(sigmas=[1.0, 0.5], from_noise=True))
    with pytest.raises(ValueError, match="image to start from"):
        stream.push(torch.randn(1, 4, 3, 3))
    stream.update(guidance="none")
    assert len(stream.push(torch.randn(1, 4, 3, 3)) + stream.drain()) == 2  # the refused frame was not lost


def test_consistency_scalings_are_for_consistency_models(cond) -> None:
    from slipstream.core.denoiser import FLOW

    with pytest.raises(ValueError, match="`consistency` off for a flow model"):
        StreamBatch(GaussianDenoiser(space=FLOW), cond, None, StreamConfig(consistency=True))


def test_a_failing_network_loses_no_frame(model, frames, cond) -> None:
    """The pass that failed can be tried again: out of memory, an interrupt."""
    expected = stacked(collect(StreamBatch(model, cond), frames))

    class Failing(GaussianDenoiser):
        left = 1000

        def __call__(self, x, sigma, cond):
            if self.left == 0:
                raise RuntimeError("no")
            self.left -= 1
            return super().__call__(x, sigma, cond)

    failing = Failing(0.7, 0.2, model.space)
    stream = StreamBatch(failing, cond)
    failing.left = 3  # of the five passes that this push needs
    with pytest.raises(RuntimeError, match="no"):
        stream.push(frames[:5])
    failing.left = 1000
    out = stream.advance() + stream.push(frames[5:])
    failing.left = 0
    with pytest.raises(RuntimeError, match="no"):
        stream.drain()
    failing.left = 1000
    out += stream.drain()
    assert [f.id for f in out] == list(range(7))
    assert torch.equal(stacked(out), expected)


def test_latents_of_another_model_leave_the_stream_as_it_was(model, frames, cond) -> None:
    stream = StreamBatch(model, cond)
    with pytest.raises(ValueError, match=r"^Expected `latents` of shape \(any, 4, any, any\)"):
        stream.push(torch.zeros(1, 5, 8, 8))
    assert [f.id for f in stream.push(frames) + stream.drain()] == list(range(7))


# -- pure noise, long runs, SDXL parts


@pytest.mark.parametrize("guidance", ["none", "full", "onetime"])
def test_from_noise_reaches_the_data(model, cond, uncond, guidance) -> None:
    """On Gaussian data N(0.7, 0.7^2) every DDIM step is one factor on the distance to the mean."""
    config = StreamConfig(strength=1.0, steps=50, from_noise=True, renoise="ddim", guidance=guidance, cfg_scale=1.0)
    stream = StreamBatch(model, cond, uncond, config)
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    got = stacked(stream.push(noise) + stream.drain())
    sigmas = [*stage_sigmas(config, model.levels).double(), torch.zeros((), dtype=torch.float64)]
    scales = [model.space.scale(s) for s in sigmas]
    distance = noise.double() * (scales[0] ** 2 + sigmas[0] ** 2).sqrt() - scales[0] * 0.7
    for sigma, low, scale, low_scale in zip(sigmas, sigmas[1:], scales, scales[1:]):
        gain = scale * 0.7**2 / (scale**2 * 0.7**2 + sigma**2)
        distance = distance * (low_scale * gain + low / sigma * (1 - scale * gain))
    torch.testing.assert_close(got.double(), 0.7 + distance, rtol=1e-4, atol=1e-4)
    assert float(got.std()) == pytest.approx(0.7, rel=0.05)


def test_soak_two_thousand_frames_in_bounded_memory(cond) -> None:
    stream = StreamBatch(GaussianDenoiser(), cond, None, StreamConfig(**RISING))
    frame = torch.zeros(1, 4, 2, 2)
    count = 0
    for n in range(2000):
        count += len(stream.push(frame) if n % 7 else stream.skip(n) if n else stream.push(frame))
        if n % 100 == 50:
            stream.update(cfg_scale=1.1 + n / 4000, strength=0.5, steps=1 + n % 5)
        if n == 500:
            tracemalloc.start()
            start = tracemalloc.get_traced_memory()[0]
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert count + len(stream.drain()) == 2000
    assert grown < 200_000
    assert len(stream._plans) <= 64


def test_pooled_text_and_time_ids_go_with_their_rows(frames) -> None:
    """SDXL: every row of a call carries its pooled text and time ids, negative rows first."""
    seen = []

    class Watching(GaussianDenoiser):
        def __call__(self, x, sigma, cond):
            cond = cond.expand(len(x))
            seen.append((cond.pooled[:, 0].tolist(), cond.extra["time_ids"][:, 0].tolist()))
            return super().__call__(x, sigma, cond)

    def sdxl(value: float) -> Conditioning:
        return Conditioning(
            torch.full((1, 2, 1), value), torch.full((1, 3), value), {"time_ids": torch.full((1, 6), 64.0)}
        )

    stream = StreamBatch(Watching(), sdxl(1.0), sdxl(-1.0), StreamConfig(guidance="onetime", **RISING))
    collect(stream, frames[:5])
    assert seen[4] == ([-1.0, 1.0, 1.0, 1.0, 1.0], [64.0] * 5)
    assert seen[-1] == ([1.0], [64.0])
