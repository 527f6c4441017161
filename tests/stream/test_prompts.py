"""Blends of prompts that move over a clip, in the library and on the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slipstream.cli import main
from slipstream.cli.stream import prompts_of
from slipstream.core import Conditioning
from slipstream.core.images import read_image, save_image
from slipstream.stream import BlendedStream, PromptBlend, StreamBatch, StreamConfig, blend
from slipstream_tests.analytic import constant_cond

STEPS = StreamConfig(t_index_list=[5, 20, 30], guidance="none")
FADE = PromptBlend([1, 0], [0, 1])


def results(stream: StreamBatch, frames) -> torch.Tensor:
    return torch.cat(
        [f.latents for frame in frames.split(1) for f in stream.push(frame)] + [f.latents for f in stream.drain()]
    )


def test_weights_move_evenly_and_stay_at_the_end() -> None:
    conds = [constant_cond(1.0), constant_cond(4.0), constant_cond(16.0)]
    fade = PromptBlend([2, 2, 0], [0, 1, 3])
    assert fade.weights(0.5) == [1.0, 1.5, 1.5]
    got = [float(fade.at(conds, i, 3).context) for i in (0, 1, 2, 7)]
    assert got == pytest.approx([2.5, (1 + 6 + 24) / 4, 13.0, 13.0])
    assert fade.at(conds).context == pytest.approx(2.5)
    assert fade.moves
    assert not PromptBlend([1, 2]).moves
    assert not PromptBlend([1, 2], (1, 2)).moves


def test_slerp_over_a_clip() -> None:
    conds = [Conditioning(torch.tensor([[[1.0, 0.0]]])), Conditioning(torch.tensor([[[0.0, 1.0]]]))]
    fade = PromptBlend([1, 0], [0, 1], "slerp")
    for i in range(5):
        angle = torch.tensor(i * torch.pi / 8)
        torch.testing.assert_close(fade.at(conds, i, 5).context[0, 0], torch.stack([angle.cos(), angle.sin()]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (([1, 0], [1]), "2 prompts and 1 weights"),
        (([1, 0], [0, 0]), "sum above 0"),
        (([1, -1],), "at least 0"),
        (([],), "one weight per prompt"),
        (([1, 1], []), "2 prompts and 0 weights"),
        (([1, 1, 1], None, "slerp"), "Expected 2 prompts for slerp, but got 3"),
        (([1, 1], None, "cubic"), "`mode`"),
    ],
)
def test_bad_blends(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        PromptBlend(*settings)


def test_each_frame_keeps_the_blend_of_its_place(model, frames, cond, uncond) -> None:
    """At all its steps, whatever comes in after it: as if it ran alone with that prompt."""
    got = results(BlendedStream(model, [cond, uncond], FADE, len(frames), config=STEPS), frames)
    for i in range(len(frames)):
        prompt = blend([cond, uncond], [6 - i, i])
        alone = results(StreamBatch(model, prompt, None, STEPS), frames[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], alone)
    assert (got[0] - results(StreamBatch(model, uncond, None, STEPS), frames)[0]).abs().max() > 1e-2


def test_skipped_frames_and_batches_count(model, frames, cond, uncond) -> None:
    expected = results(BlendedStream(model, [cond, uncond], FADE, 7, config=STEPS), frames)
    stream = BlendedStream(model, [cond, uncond], FADE, 7, config=STEPS)
    out = stream.push(frames[:3]) + stream.skip() + stream.push(frames[4:]) + stream.drain()
    out = torch.cat([f.latents for f in out])
    torch.testing.assert_close(out[[0, 1, 2, 4, 5, 6]], expected[[0, 1, 2, 4, 5, 6]])
    assert torch.equal(out[3], out[2])


def test_a_live_prompt_ends_the_blend_for_later_frames(model, frames, cond, uncond) -> None:
    expected = results(BlendedStream(model, [cond, uncond], FADE, 7, config=STEPS), frames)
    other = results(StreamBatch(model, constant_cond(3.0), None, STEPS), frames)
    stream = BlendedStream(model, [cond, uncond], FADE, 7, config=STEPS)
    out = stream.push(frames[:4])
    stream.update(cond=constant_cond(3.0))
    out = torch.cat([f.latents for f in out + stream.push(frames[4:]) + stream.drain()])
    torch.testing.assert_close(out, torch.cat([expected[:4], other[4:]]))


def test_a_bad_frame_is_refused_and_the_blend_goes_on(model, frames, cond, uncond) -> None:
    expected = results(BlendedStream(model, [cond, uncond], FADE, 7, config=STEPS), frames)
    stream = BlendedStream(model, [cond, uncond], FADE, 7, config=STEPS)
    out = stream.push(frames[:3])
    for bad in (torch.zeros(0, 4, 8, 6), torch.zeros(4, 8, 6), [1], torch.full((1, 4, 8, 6), float("nan"))):
        with pytest.raises(ValueError, match="Expected `latents`"):
            stream.push(bad)
    out += stream.push(frames[3:]) + stream.drain()
    torch.testing.assert_close(torch.cat([f.latents for f in out]), expected)


# -- the command line


@pytest.mark.parametrize(
    ("options", "texts", "start", "end"),
    [
        (["a photo: 16:9"], ["a photo: 16:9"], [1.0], [1.0]),
        (["a:0.7", "b:.3"], ["a", "b"], [0.7, 0.3], [0.7, 0.3]),
        (["a", "b"], ["a", "b"], [1.0, 1.0], [1.0, 1.0]),
        (["a:1..0", "b:0..0.5", "16:9:2"], ["a", "b", "16:9"], [1.0, 0.0, 2.0], [0.0, 0.5, 2.0]),
        (["a: 0...5 ", "style: oil"], ["a", "style: oil"], [0.0, 1.0], [0.5, 1.0]),
    ],
)
def test_prompts_with_weights(options, texts, start, end) -> None:
    got, prompts = prompts_of(options, "linear")
    assert got == texts
    assert list(prompts.start) == start
    assert list(prompts.last) == end


def folder(path, count: int = 4):
    path.mkdir()
    for i in range(count):
        picture = torch.full((1, 64, 64, 3), 0.2)
        picture[:, 20:44, 4 * i : 24 + 4 * i, 0] = 0.9
        save_image(picture, path / f"{i}.png")
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a:0.7", "--prompt", "b:0,3"], "weights as numbers, but got 'b:0,3'"),
        (["--prompt", "a:0.7", "--prompt", "b:"], "weights as numbers"),
        (["--prompt", "a:0.7", "--prompt", "b:-1"], "argument --prompt: Expected `weights` of at least 0"),
        (["--prompt", "a:0..1", "--prompt", "b:0"], "sum above 0"),
        (["--prompt", "a", "--prompt", "b", "--prompt", "c", "--blend", "slerp"], "2 prompts for slerp, but got 3"),
        (["--prompt", "a:0..1", "--prompt", "b", "--drop"], "weights that stay"),
    ],
)
def test_a_users_mistake_is_one_sentence(tmp_path, capsys, options, message) -> None:
    source = folder(tmp_path / "in", 1)
    assert main(["stream", "--input", str(source), "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_command_moves_from_one_prompt_to_the_other(tmp_path) -> None:
    source = folder(tmp_path / "in")

    def run(name: str, *prompts: str) -> np.ndarray:
        options = ["--input", str(source), "--output", str(tmp_path / name), "--strength", "0.8", "--guidance", "none"]
        assert main(["stream", *options, *(part for prompt in prompts for part in ("--prompt", prompt))]) == 0
        pictures = [read_image(path) for path in sorted((tmp_path / name).glob("*.png"))]
        return (torch.cat(pictures) * 255).round().int().numpy()

    one, other = "a large yellow circle on a green background", "a large red square on a blue background"
    first, last = run("first", one), run("last", other)
    moved = run("moved", f"{one}:1..0", f"{other}:0..1")
    constant = run("constant", f"{one}:2", f"{other}:1")
    assert len(moved) == 4
    assert np.abs(moved[0] - first[0]).max() <= 1
    assert np.abs(moved[3] - last[3]).max() <= 1
    assert np.abs(moved[1] - constant[1]).max() <= 1  # a third of the way
    assert np.abs(first - last).mean() > 10
