"""Options against flicker: feedback, motion-aware strength, attention across frames."""

from __future__ import annotations

import threading

import pytest
import torch
from slipstream.core import Conditioning, DiffusersDenoiser
from slipstream.core.graphs import replayed
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.stream import StreamBatch, StreamConfig
from slipstream.stream.stability import Motion, join_rows, sharing
from slipstream_tests.analytic import GaussianDenoiser, constant_cond


def results(stream: StreamBatch, frames) -> torch.Tensor:
    return torch.cat(
        [f.latents for frame in frames.split(1) for f in stream.push(frame)] + [f.latents for f in stream.drain()]
    )


def roughness(values: torch.Tensor) -> float:
    return float((values[1:] - values[:-1]).abs().mean())


# -- feedback


def test_feedback_mixes_in_the_last_result(frames, cond) -> None:
    config = StreamConfig(t_index_list=[20], guidance="none", feedback=0.4)
    got = results(StreamBatch(GaussianDenoiser(), cond, None, config), frames)
    plain = StreamBatch(GaussianDenoiser(), cond, None, config.changed(feedback=0.0))
    expected = plain.push(frames[:1])[0].latents
    for i in range(1, len(frames)):
        expected = plain.push(torch.lerp(frames[i : i + 1], expected, 0.4))[0].latents
        torch.testing.assert_close(got[i : i + 1], expected)


def test_feedback_damps_noisy_frames(frames, cond) -> None:
    plain = results(StreamBatch(GaussianDenoiser(), cond), frames)
    damped = results(StreamBatch(GaussianDenoiser(), cond, None, StreamConfig(feedback=0.6)), frames)
    assert roughness(damped) < 0.8 * roughness(plain)


def test_feedback_forgets_at_another_size(cond) -> None:
    stream = StreamBatch(GaussianDenoiser(), cond, None, StreamConfig(feedback=0.5))
    results(stream, torch.zeros(3, 4, 8, 8))
    assert results(stream, torch.zeros(3, 4, 4, 8)).shape == (3, 4, 4, 8)


# -- motion


def test_a_scene_at_rest_keeps_its_strength(frames, cond) -> None:
    still = frames[:1].expand(6, -1, -1, -1)
    plain = results(StreamBatch(GaussianDenoiser(), cond), still)
    aware = results(StreamBatch(GaussianDenoiser(), cond, None, StreamConfig(motion=1.0)), still)
    assert torch.equal(plain, aware)


def test_fast_frames_stay_closer_to_their_input(frames, cond) -> None:
    settings = {"t_index_list": [15], "guidance": "none"}
    plain = results(StreamBatch(GaussianDenoiser(), cond, None, StreamConfig(**settings)), frames)
    aware = results(StreamBatch(GaussianDenoiser(), cond, None, StreamConfig(motion=0.8, **settings)), frames)
    assert (aware - frames)[3:].abs().mean() < 0.9 * (plain - frames)[3:].abs().mean()


def test_motion_between_its_limits() -> None:
    motion = Motion()
    frame = torch.ones(1, 4, 2, 2)
    factors = [motion.factor(frame * (1 + i % 2), 0.6) for i in range(20)]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(0.4, abs=1 / 16)
    assert all(a >= b for a, b in zip(factors, factors[1:]))
    assert [motion.factor(frame, 0.6) for _ in range(20)][-1] == 1.0
    assert motion.factor(torch.zeros(1, 4, 2, 2), 1.0) > 0
    assert motion.factor(torch.zeros(1, 4, 3, 3), 1.0) > 0


def test_as_many_frames_out_as_in_at_changing_strength(frames, cond) -> None:
    stream = StreamBatch(GaussianDenoiser(), cond, None, StreamConfig(motion=1.0, strength=0.8, steps=4))
    finished = stream.push(torch.cat([frames, frames[:1].expand(5, -1, -1, -1)])) + stream.drain()
    assert [f.id for f in finished] == list(range(12))
    assert stream.passes == 12 + 3


# -- attention across frames


def test_rows_are_joined_within_their_block() -> None:
    tokens = torch.arange(5.0).reshape(5, 1, 1).expand(5, 2, 1)
    joined = join_rows(tokens, (2, 3))
    assert joined.shape == (5, 12, 1)
    assert set(joined[0].flatten().tolist()) == set(joined[1].flatten().tolist()) == {0.0, 1.0}
    assert set(joined[4].flatten().tolist()) == {2.0, 3.0, 4.0}
    assert [(joined[4] == value).sum() for value in (2, 3, 4)] == [4, 4, 4]  # equal weights after repeating
    padded = join_rows(tokens, (0, 3))
    assert set(padded[4].flatten().tolist()) == {0.0, 1.0, 2.0}


@pytest.fixture(scope="module")
def network() -> DiffusersDenoiser:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    return DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())


@pytest.mark.parametrize("guidance", ["self", "onetime", "full"])
def test_frames_in_flight_see_each_other(network, guidance) -> None:
    cond, uncond = Conditioning(torch.randn(1, 3, 8)), Conditioning(torch.randn(1, 3, 8))
    frames = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = StreamConfig(strength=0.6, steps=3, guidance=guidance, cross_frame=True)
    shared = results(StreamBatch(network, cond, uncond, config), frames)
    plain = results(StreamBatch(network, cond, uncond, config.changed(cross_frame=False)), frames)
    assert (shared - plain).abs().max() > 1e-3
    other = frames.clone()
    other[3] += 1.0
    changed = results(StreamBatch(network, cond, uncond, config), other)
    assert (changed - shared)[2].abs().max() > 1e-5  # in flight together with frame 3
    assert torch.equal(changed[0], shared[0])  # gone before it came
    padded = results(StreamBatch(network, cond, uncond, config.changed(static_rows=True)), frames)
    torch.testing.assert_close(padded, shared, rtol=1e-4, atol=1e-4)


def test_one_frame_in_flight_sees_itself_only(network) -> None:
    cond, frame = Conditioning(torch.randn(1, 3, 8)), torch.randn(1, 4, 8, 8)
    for steps in (1, 3):
        config = StreamConfig(strength=0.6, steps=steps)
        plain = results(StreamBatch(network, cond, None, config), frame)
        torch.testing.assert_close(
            results(StreamBatch(network, cond, None, config.changed(cross_frame=True)), frame), plain
        )


def test_the_network_is_left_as_it_was(network) -> None:
    before = dict(network.unet.attn_processors)
    cond = Conditioning(torch.randn(1, 3, 8))
    results(StreamBatch(network, cond, None, StreamConfig(cross_frame=True)), torch.randn(3, 4, 8, 8))
    assert network.unet.attn_processors == before


@pytest.mark.parametrize("other", [True, False])
def test_two_streams_in_two_threads_share_one_network(network, other) -> None:
    """Attention across frames stays in its own stream, beside another one that shares frames of its own or shares nothing."""
    cond = Conditioning(torch.randn(1, 3, 8))
    clips = torch.randn(2, 12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    configs = [StreamConfig(strength=0.6, steps=3, cross_frame=on) for on in (True, other)]
    expected = [results(StreamBatch(network, cond, None, c), clip) for c, clip in zip(configs, clips)]
    meeting = threading.Barrier(2, timeout=60)
    unet, processors = network.unet, network.unet.attn_processors

    class Meeting(torch.nn.Module):
        """Holds both streams inside the same pass of the network before either continues."""

        config = unet.config

        def forward(self, *args, **kwargs):
            meeting.wait()
            output = unet(*args, **kwargs)
            meeting.wait()
            return output

    together = DiffusersDenoiser(Meeting(), scaled_linear_alphas_cumprod())
    together.unet.up_blocks, together.unet.probe = unet.up_blocks, torch.nn.Parameter(torch.zeros(1))
    got, errors = {}, []

    def run(i: int) -> None:
        try:
            got[i] = results(StreamBatch(together, cond, None, configs[i]), clips[i])
        except Exception as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i in (0, 1):
        torch.testing.assert_close(got[i], expected[i], rtol=1e-4, atol=1e-5)
    assert unet.attn_processors == processors


def test_a_model_without_attention_is_refused() -> None:
    stream = StreamBatch(GaussianDenoiser(), constant_cond(), None, StreamConfig(cross_frame=True))
    with pytest.raises(ValueError, match="Switch `cross_frame` off"):
        stream.push(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="GaussianDenoiser"):
        sharing(GaussianDenoiser(), (0, 2))


# -- recorded networks


def test_a_recorded_network_gives_the_numbers_of_the_plain_one(network) -> None:
    """Static rows fit a network that is replayed for one shape (core/graphs.py; recorded by calling, without a GPU)."""

    def record(run):
        output = run()
        return lambda: output.copy_(run()), output

    cond, uncond = Conditioning(torch.randn(1, 3, 8)), Conditioning(torch.randn(1, 3, 8))
    frames = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for guidance, rows in (("self", 3), ("onetime", 4), ("full", 6)):
        config = StreamConfig(strength=0.6, steps=3, guidance=guidance)
        plain = results(StreamBatch(network, cond, uncond, config), frames)
        fast = replayed(network, rows, 8, 8, cond, record=record)
        assert fast is not network
        got = results(StreamBatch(fast, cond, uncond, config.changed(static_rows=True)), frames)
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
        assert fast.rows == rows * (5 + 3 - 1)
