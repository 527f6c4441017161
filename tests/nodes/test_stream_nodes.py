"""Stream nodes without a host: blends of prompts, and which rows may share a network call with a patched model."""

from __future__ import annotations

import functools
import logging
import sys
import types
from typing import Any

import pytest
import slipstream
import torch
import torch.nn.functional as F
from slipstream.core.cache import tensors_in
from slipstream.nodes.host.denoiser import (
    HostConditioning,
    Source,
    acting_ranges,
    group_rows,
    hints,
    take_hints,
    take_rows,
)
from slipstream.nodes.host.session import check_places
from slipstream.nodes.stream import StreamFrames, StreamRun
from slipstream.stream import StreamConfig

Blend = slipstream.NODE_CLASS_MAPPINGS["SlipstreamBlendPrompts"]


def prompt(value: float, rows: int = 1, width: int = 4, tokens: int = 3, **more: Any) -> list[Any]:
    return [[torch.full((rows, tokens, width), value), {"pooled_output": torch.full((rows, 2), value), **more}]]


def mix(*args: Any, **more: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    (result,) = Blend().mix(*args, **more)
    assert len(result) == 1
    return result[0][0], result[0][1]


def test_one_row_with_everything_that_hangs_on_the_first() -> None:
    first, second = prompt(1.0, mask="mine"), prompt(5.0)
    context, more = mix(first, second, 0.25, "linear")
    assert context.shape == (1, 3, 4)
    assert float(context.mean()) == float(more["pooled_output"].mean()) == 2.0
    assert more["mask"] == "mine"
    assert float(first[0][0].mean()) == float(first[0][1]["pooled_output"].mean()) == 1.0  # not changed


def test_one_row_per_frame() -> None:
    context, more = mix(prompt(0.0), prompt(1.0), 0.0, "linear", torch.zeros(5, 8, 8, 3), 0.5)
    assert context.mean((1, 2)).tolist() == more["pooled_output"].mean(1).tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]


def test_blends_of_blends_keep_a_row_per_frame() -> None:
    clip = torch.zeros(3, 8, 8, 3)
    (moving,) = Blend().mix(prompt(0.0), prompt(1.0), 0.0, "linear", clip, 1.0)
    context, _ = mix(moving, prompt(4.0), 0.5, "linear")
    assert context.mean((1, 2)).tolist() == [2.0, 2.25, 2.5]
    with pytest.raises(ValueError, match="1 or 5 rows, but got 3"):
        mix(moving, prompt(4.0), 0.5, "linear", torch.zeros(5, 8, 8, 3))


def test_prompts_of_unequal_length_and_without_pooled_text() -> None:
    first, second = prompt(1.0, tokens=2), prompt(3.0, tokens=4)
    for each in (first, second):
        del each[0][1]["pooled_output"]
    context, more = mix(first, second, 0.5, "linear")
    assert context[0, :, 0].tolist() == [2.0, 2.0, 1.5, 1.5]
    assert more == {}


@pytest.mark.parametrize("mode", ["linear", "slerp"])
def test_a_prompt_with_all_the_weight_is_that_prompt(mode) -> None:
    """Also in what its encoder gives beside the embeddings; the rest of the first stays."""
    ones = functools.partial(torch.ones, dtype=torch.long)
    first = prompt(1.0, tokens=2, attention_mask=ones(1, 2), conditioning_llama3=torch.ones(1, 4, 2, 3), mask="mine")
    second = prompt(3.0, tokens=5, attention_mask=ones(1, 5), conditioning_llama3=torch.zeros(1, 4, 5, 3))
    for weight, expected in ((0.0, first), (1.0, second)):
        context, more = mix(first, second, weight, mode)
        assert context is expected[0][0]
        assert more == {**expected[0][1], "mask": "mine"}


def test_masks_and_states_of_a_second_text_model_are_mixed_too() -> None:
    first = prompt(1.0, tokens=2, attention_mask=torch.ones(1, 2), conditioning_llama3=torch.ones(1, 4, 2, 3))
    second = prompt(3.0, tokens=5, attention_mask=torch.ones(1, 5), conditioning_llama3=torch.zeros(1, 4, 5, 3))
    context, more = mix(first, second, 0.25, "linear")
    assert context.shape[1] == 5
    assert more["attention_mask"].tolist() == [[1.0] * 5]
    assert more["conditioning_llama3"][0, 0, :, 0].tolist() == [0.75, 0.75, 0.0, 0.0, 0.0]


def test_frames_of_unequal_length_carry_their_tokens_to_the_stream() -> None:
    clip = torch.zeros(3, 8, 8, 3)
    (moving,) = Blend().mix(prompt(1.0, tokens=2), prompt(3.0, tokens=5), 0.0, "linear", clip, 1.0)
    assert moving[0][1]["slipstream_tokens"] == [2, 5, 5]
    cond = CrossAttention(moving[0][0])
    entry = {"model_conds": {"c_crossattn": cond}, **moving[0][1]}
    assert take_rows(entry, [0])["model_conds"]["c_crossattn"].cond.shape == (1, 2, 4)
    assert take_rows(entry, [1, 2])["model_conds"]["c_crossattn"].cond.shape == (2, 5, 4)
    source = Source("positive", (entry,))
    assert group_rows([(source, 0), (source, 1), (source, 2)], torch.ones(3)) == [[0], [1, 2]]


class CrossAttention:
    """As the host's CONDCrossAttn."""

    def __init__(self, cond: torch.Tensor) -> None:
        self.cond = cond

    def _copy_with(self, cond: torch.Tensor) -> Any:
        return CrossAttention(cond)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (prompt(1.0) * 2, prompt(1.0), "`first` with one prompt, but got 2"),
        (prompt(1.0), [], "`second` with one prompt, but got 0"),
        (prompt(1.0), prompt(1.0, width=5), "`second` of width 4 like `first`, but got 5"),
    ],
)
def test_mistakes_are_one_sentence(first, second, message) -> None:
    with pytest.raises(ValueError, match="Expected") as caught:
        mix(first, second, 0.5, "linear")
    assert message in str(caught.value)


def test_settings_without_effect_warn(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        mix(prompt(1.0), prompt(1.0, control="net"), 0.5, "linear", weight_end=0.3)
    assert "`weight_end` has no effect" in caplog.text
    assert "`control` of the second prompt has no effect" in caplog.text
    caplog.clear()
    mix(prompt(1.0), prompt(1.0), 0.5, "slerp")
    assert not caplog.text


# -- frames


def test_bad_frames_are_refused_before_anything_is_loaded() -> None:
    for frames, message in (
        (torch.zeros(0, 8, 8, 3), "`frames` with at least one frame"),
        (torch.full((1, 8, 8, 3), float("nan")), "finite"),
        (torch.zeros(1, 8, 8, 2), "3 or 4"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamRun(None, frames, StreamConfig(), None, keep=False)


class Cancelled(BaseException):
    """The host's InterruptProcessingException."""


class Vae:
    """A VAE of factor 2 that notes how many frames it is given at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def spacial_compression_encode(self) -> int:
        return 2

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        return F.avg_pool2d(images.movedim(-1, 1), 2)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(samples))
        return samples.repeat_interleave(2, -1).repeat_interleave(2, -2).movedim(1, -1)


@pytest.fixture
def cancel_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that sets at which check the host finds cancel pressed."""
    left = [10**6]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Cancelled

    management = types.SimpleNamespace(
        throw_exception_if_processing_interrupted=check, InterruptProcessingException=Cancelled
    )
    comfy = types.SimpleNamespace(model_management=management)
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    return lambda checks: left.__setitem__(0, checks)


def finished_frames(samples: torch.Tensor, repeated: set[int]) -> list[Any]:
    return [(types.SimpleNamespace(repeated=i in repeated), samples[i : i + 1]) for i in range(len(samples))]


def test_cancel_is_seen_while_frames_are_encoded_and_decoded(cancel_after: Any) -> None:
    """Promised frames come out when cancel is pressed while they are decoded; repeats are those of the frame before."""
    frames = torch.rand(40, 7, 6, 3)
    for keep in (False, True):
        cancel_after(1)
        run = StreamRun(vae := Vae(), frames, StreamConfig(), None, keep)
        with pytest.raises(Cancelled):
            run._encode()
        assert vae.sizes == [16, 16]
    cancel_after(1000)
    samples = run._encode()
    assert samples.shape == (40, 3, 4, 3)
    done = finished_frames(samples, {1, 2, 20, 39})
    run = StreamRun(vae := Vae(), frames, StreamConfig(), None, keep=True)
    whole = run._decode(done)
    assert (whole.shape, vae.sizes, run.interrupted) == (frames.shape, [16, 16, 4], False)
    sources = [i for i in range(40) if i not in {1, 2, 20, 39}]
    shown = [max(s for s in sources if s <= i) for i in range(40)]
    torch.testing.assert_close(whole, Vae().decode(samples[shown])[:, :7, :6])
    cancel_after(1)
    part = run._decode(done)
    assert run.interrupted
    torch.testing.assert_close(part, whole[:35], rtol=0, atol=0)
    assert run._report(done[: len(part)]).startswith("35 of 40 frames (interrupted)")
    cancel_after(1)
    run.keep = False
    with pytest.raises(Cancelled):
        run._decode(done)


def test_the_vae_takes_a_megapixel_at_a_time(cancel_after: Any) -> None:
    for side, batch in ((16, 16), (512, 4), (1024, 1), (2048, 1)):
        assert StreamRun(Vae(), torch.zeros(1, side, side, 3), StreamConfig(), None, False).batch == batch


# -- rows and patches


class Replacement:
    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = [{"weight": 1.0}, kwargs]

    def __call__(self, *_: Any) -> None: ...


class Plain:
    sigma_start = "not a number"

    def __init__(self, start: float, end: float) -> None:
        self.sigma_start, self.sigma_end = start, end

    def method(self, *_: Any) -> None: ...


def closure(sigma_start: float, sigma_end: float) -> Any:
    return lambda h: sigma_start + sigma_end + h


def with_names(h: Any, sigma_start: float = 0, sigma_end: float = 0) -> None: ...


def test_patches_of_every_kind_tell_where_they_act() -> None:
    options = {
        "patches": {
            "input_block_patch": [
                closure(9.0, 1.0),
                lambda h: h,
                functools.partial(with_names, sigma_start=8, sigma_end=2),
            ],
            "output_block_patch": [closure(9.0, 1.0), closure(9.0, None), len],
        },
        "patches_replace": {
            "attn2": {("input", 1): Replacement(sigma_start=7.0, sigma_end=3.0), ("input", 2): Plain(6.0, 4.0)},
            "attn1": {("middle", 0): Plain(5.0, 4.5).method, ("output", 0): Plain},
        },
        "wrappers": {},
    }
    assert sorted(acting_ranges(options)) == [(5.0, 4.5), (6.0, 4.0), (7.0, 3.0), (8, 2), (9.0, 1.0)]
    assert acting_ranges({}) == []


def test_rows_where_a_patch_acts_are_kept_from_rows_where_it_rests() -> None:
    source = Source("positive", ({"model_conds": {}, "control": None},))
    items, sigma = [(source, 0)] * 5, torch.tensor([9.0, 5.0, 3.0, 1.0, 5.0])
    assert group_rows(items, sigma) == [[0, 1, 2, 3, 4]]
    assert group_rows(items, sigma, [(20.0, 4.0)]) == [[0, 1, 4], [2, 3]]
    assert group_rows(items, sigma, [(20.0, 5.0), (3.0, 0.0)]) == [[0, 1, 4], [2, 3]]
    assert group_rows(items, sigma, [(6.0, 2.0)]) == [[0, 3], [1, 2, 4]]


@pytest.mark.parametrize(("images", "masks"), [(4, 4), (1, 4), (4, 1)])
def test_each_frame_goes_with_the_image_and_the_mask_of_its_controlnet(images: int, masks: int) -> None:
    """As the host does it: as many masks are taken as there are images."""
    image, mask = torch.rand(images, 3, 8, 8), torch.rand(masks, 1, 8, 8)
    control = types.SimpleNamespace(
        cond_hint_original=image, extra_concat_orig=[mask], cond_hint="prepared", previous_controlnet=None
    )
    assert hints(control) == 4
    taken = take_hints(control, [2, 3])
    for found, given in ((taken.cond_hint_original, image), (taken.extra_concat_orig[0], mask)):
        assert torch.equal(found, given[2:4] if len(given) > 1 else given.expand(2, -1, -1, -1))
    assert taken.cond_hint is None
    assert control.cond_hint == "prepared"


def test_a_controlnet_of_one_image_and_mask_is_shared() -> None:
    control = types.SimpleNamespace(
        cond_hint_original=torch.rand(1, 3, 8, 8), extra_concat_orig=[torch.rand(1, 1, 8, 8)], previous_controlnet=None
    )
    assert take_hints(control, [2, 3]) is control


@pytest.mark.parametrize("samples", [types.SimpleNamespace(is_nested=True), torch.zeros(2, 1, 700)])
def test_a_latent_of_sound_and_video_is_refused_by_name_before_and_while_it_is_packed(samples: Any) -> None:
    with pytest.raises(ValueError, match=r"sound and video together \(LTX-2\)"):
        check_places(samples)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 1, 8, 8), (2, 64, 700), (1, 1, 8, 8)])
def test_latents_of_images_videos_and_sound_alone_have_places(shape: tuple[int, ...]) -> None:
    check_places(torch.zeros(shape))


def test_what_the_host_prepared_of_a_prompt_is_seen_by_the_streams_that_read_it() -> None:
    context, mask = torch.ones(1, 2, 3), torch.zeros(1, 1, 4, 4)
    conds = {
        "c_crossattn": types.SimpleNamespace(cond=context),
        "concat": types.SimpleNamespace(cond=mask),
        "n": types.SimpleNamespace(cond=5),
    }
    held = HostConditioning.of(Source("positive", ({"model_conds": conds},)))
    assert [id(tensor) for tensor in tensors_in((held, None))] == [id(context), id(mask)]


@pytest.mark.parametrize("curve", ["0: 2", "0: 0.5, 8: 0"])
def test_a_strength_out_of_range_names_the_curve_and_its_frame(curve: str) -> None:
    given = (None, None, None, None, torch.zeros(1, 8, 8, 3), 0.5, 2, "none", 1.0, 0)
    frame = curve.split(",")[-1].split(":")[0].strip()
    with pytest.raises(
        ValueError, match=f"Expected `strength_curve` between 0.001 and 1, .* Change the value of frame {frame}"
    ):
        StreamFrames().stream(*given, strength_curve=curve)
