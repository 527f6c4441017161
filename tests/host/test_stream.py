"""Stream nodes in a real host: agreement with the library, cost, interrupt, ControlNet per frame, mistakes."""

from __future__ import annotations

import io
import json
import pathlib
import shutil
from typing import Any

import av
import numpy as np
import pytest
import torch
from graph import DEVICE, node
from PIL import Image
from safetensors.torch import save_file
from slipstream.core import load
from slipstream.core.loading import BUNDLED
from slipstream.stream import BlendedStream, PromptBlend, SimilarityFilter, StreamBatch, StreamConfig
from slipstream.stream.similarity import select

ROOT = pathlib.Path(__file__).resolve().parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT = "a large red circle on a blue background"
SETTINGS = {"strength": 0.6, "steps": 3, "guidance": "onetime", "guidance_scale": 1.5, "seed": 5}


def base() -> dict[str, Any]:
    return {
        "1": node("SlipstreamLoadModel", model="pocket"),
        "p": node("CLIPTextEncode", clip=["1", 1], text=TEXT),
        "n": node("CLIPTextEncode", clip=["1", 1], text=""),
    }


def clip(count: int, height: int = 128, width: int = 128) -> np.ndarray:
    """Frames (count, H, W, 3) uint8: a bright box that moves over a dark gradient."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 2] = np.linspace(60, 160, width)[None, None]
    for i in range(count):
        frames[i, 40:80, 10 + 6 * i : 50 + 6 * i, 0] = 220
    return frames


def loaded(host: Any, graph: dict[str, Any], frames: np.ndarray) -> list[Any]:
    """Upload frames and add the nodes that make them one IMAGE batch; returns its socket."""
    socket: list[Any] = []
    for i, frame in enumerate(frames):
        data = io.BytesIO()
        Image.fromarray(frame).save(data, "PNG")
        name = host.upload_image(data.getvalue(), f"stream_{frame.shape[0]}_{i}.png")
        graph[f"f{i}"] = node("LoadImage", image=name)
        if socket:
            graph[f"b{i}"] = node("ImageBatch", image1=socket, image2=[f"f{i}", 0])
            socket = [f"b{i}", 0]
        else:
            socket = [f"f{i}", 0]
    return socket


def add_stream(graph: dict[str, Any], frames: list[Any], **changes: Any) -> None:
    sockets = {"model": ["1", 0], "positive": ["p", 0], "negative": ["n", 0], "vae": ["1", 2], "frames": frames}
    graph["s"] = node("SlipstreamStreamFrames", **{**sockets, **SETTINGS, **changes})
    graph["out"] = node("SaveImage", images=["s", 0], filename_prefix="stream")
    graph["text"] = node("PreviewAny", source=["s", 1])


def pictures(result: Any) -> np.ndarray:
    assert result.ok, result.explain()
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(f.read())).convert("RGB")) for f in result.files if f.node == "out"]
    )


def text_of(result: Any, node: str = "text") -> str:
    return "".join(result.outputs[node]["text"])


@pytest.fixture(scope="module")
def pipe():
    return load("pocket")


def streamed(pipe: Any, frames: np.ndarray) -> np.ndarray:
    """Return the library's result for uint8 frames (B, H, W, 3), unrounded, 0 to 255."""
    stream = StreamBatch(pipe.model, pipe.encode_text([TEXT]), pipe.encode_text([""]), StreamConfig(**SETTINGS))
    finished = stream.push(pipe.encode_image(torch.from_numpy(frames).float() / 255)) + stream.drain()
    return pipe.decode(torch.cat([f.latents for f in finished])).numpy() * 255


def assert_same(host_pictures: np.ndarray, library: np.ndarray) -> None:
    """SaveImage cuts off the fraction; nothing else separates the host's images from the library's unrounded ones."""
    lost = library - host_pictures
    assert lost.min() > -0.1
    assert lost.max() < 1.1


def test_frames_equal_the_librarys(host, pipe) -> None:
    frames, graph = clip(5), base()
    add_stream(graph, loaded(host, graph, frames))
    result = host.run(graph)
    got = pictures(result)
    assert got.shape == frames.shape
    assert_same(got, streamed(pipe, frames))
    report = text_of(result)
    assert "5 of 5 frames" in report
    assert f"7 passes, 7 network calls, {5 * 3 + 5} rows" in report
    assert len(result.previews) > 0
    assert result.progress("s")[-1] == (7, 7)


@pytest.mark.parametrize(("seconds", "shown"), [(0.013, [1, 5, 9, 13, 17, 20]), (0.2, list(range(1, 21)))])
def test_previews_are_throttled_and_the_last_one_always_shows(host, report, seconds, shown) -> None:
    """At most 20 a second: the host encodes them on its server thread and queues them without bound."""
    graph = {"1": node("SlipstreamLoadModel", model="pocket")}
    graph["report"] = node("ProbePreviews", model=["1", 0], steps=20, seconds=seconds)
    assert report(host.run(graph)) == shown


def test_the_video_of_the_example_holds_every_frame_side_by_side(host, example) -> None:
    result = host.run(
        example("Repaint a clip", {"SlipstreamStreamFrames.steps": 1, "SlipstreamExampleClip.frames": 12})
    )
    assert result.ok, result.explain()
    (file,) = [f for f in result.files if f.filename.endswith(".mp4")]
    with av.open(io.BytesIO(file.read())) as made:
        video = made.streams.video[0]
        assert (video.frames, video.height, video.width) == (12, 256, 2 * 256 + 6)  # enlarged for its captions
        assert video.average_rate == 12


def test_alpha_is_ignored(host) -> None:
    graph = base()
    socket = loaded(host, graph, clip(1))
    add_stream(graph, socket, steps=1)
    plain = pictures(host.run(graph))
    graph["mask"] = node("SolidMask", value=0.3, width=128, height=128)
    graph["alpha"] = node("JoinImageWithAlpha", image=socket, alpha=["mask", 0])
    graph["s"]["inputs"]["frames"] = ["alpha", 0]
    assert np.array_equal(pictures(host.run(graph)), plain)


def test_odd_sizes_come_back_as_they_went_in(host) -> None:
    graph = base()
    graph["e"] = node("EmptyImage", width=75, height=52, batch_size=3, color=0x3050A0)
    add_stream(graph, ["e", 0], steps=2)
    assert pictures(host.run(graph)).shape == (3, 52, 75, 3)


def test_frames_that_share_a_call_are_the_same_and_an_acceleration_without_effect_says_why(host) -> None:
    graph = base()
    socket = loaded(host, graph, clip(5))
    add_stream(graph, socket, steps=1, guidance="none", guidance_scale=1.0)
    plain = host.run(graph)
    graph["s"]["inputs"].update(priority="throughput", acceleration="graph")
    shared = host.run(graph)
    assert np.abs(pictures(shared).astype(int) - pictures(plain)).max() <= 1
    assert "5 passes, 5 network calls" in text_of(plain)
    assert "2 passes, 2 network calls" in text_of(shared)
    forgone = "`acceleration` has no effect: CUDA graphs need a CUDA device. Choose compile, or none."
    assert (forgone in text_of(shared)) == (DEVICE == "cpu")


OPTIONS = ({"cross_frame": True}, {"feedback": 0.5}, {"motion": 1.0}, {"renoise": "ddim"}, {"delta": 0.5})


@pytest.mark.parametrize("changes", OPTIONS)
def test_every_option_changes_the_picture_and_nothing_stays_behind(host, changes) -> None:
    graph = base()
    socket = loaded(host, graph, clip(4))
    add_stream(graph, socket)
    plain = pictures(host.run(graph))  # cached by the host from the second option on
    graph["s"]["inputs"].update(changes)
    assert np.abs(pictures(host.run(graph)).astype(int) - plain).max() > 3
    add_stream(graph, socket)
    graph["s"]["inputs"]["max_skip"] = 11  # without effect, but not in the host's cache
    assert np.array_equal(pictures(host.run(graph)), plain)


def add_lora(graph: dict[str, Any], name: str) -> None:
    model = {"model": ["1", 0], "clip": ["1", 1], "strength_model": 1.0, "strength_clip": 0.0}
    graph["m"] = node("LoraLoader", lora_name=name, **model)


def add_image_prompt(graph: dict[str, Any], _: str) -> None:
    """As IP-Adapter does it: a patch of the cross-attention."""
    graph["m"] = node("ProbePatchAttention", model=["1", 0], kind="attn2_output")


@pytest.mark.parametrize("add", [add_lora, add_image_prompt])
def test_what_is_on_the_model_acts_on_every_frame_and_leaves_no_trace(host, lora, add) -> None:
    graph = base()
    socket = loaded(host, graph, clip(4))
    add_stream(graph, socket)
    plain = pictures(host.run(graph))
    add(graph, lora)
    graph["s"]["inputs"]["model"] = ["m", 0]
    before = len(host.log())
    changed = pictures(host.run(graph)).astype(int)
    assert "NOT LOADED" not in host.log()[before:]
    assert (np.abs(changed - plain).max((1, 2, 3)) > 10).all()
    alone = {**graph, "s": node("SlipstreamStreamFrames", **{**graph["s"]["inputs"], "frames": ["f2", 0]})}
    assert np.abs(pictures(host.run(alone))[0] - changed[2]).max() <= 1  # in a batch as alone
    add_stream(graph, socket)
    graph["s"]["inputs"]["max_skip"] = 12 if add is add_lora else 13  # without effect, but not in the host's cache
    assert np.array_equal(pictures(host.run(graph)), plain)


IMAGE_PROMPT = {"weight": 0.4, "by_level": True, "start": 0.0, "end": 1.0}
PART = {"start": 0.0, "end": 0.75}  # of the sampling: the first of three steps from strength 0.6


@pytest.mark.parametrize(
    ("guidance", "kind", "settings", "calls"),
    [
        *((guidance, "ProbeImagePrompt", IMAGE_PROMPT, 6) for guidance in ("none", "self", "onetime", "full")),
        ("onetime", "ProbeImagePrompt", {**IMAGE_PROMPT, **PART}, 9),
        ("full", "ProbeImagePrompt", {**IMAGE_PROMPT, "start": 0.6}, 9),
        ("self", "PatchModelAddDownscale", {"start_percent": 0.0, "end_percent": 0.6}, 9),
    ],
)
def test_patches_that_look_at_rows_act_on_each_as_they_do_alone(host, guidance, kind, settings, calls) -> None:
    """They ask for `cond_or_uncond` and `sigmas` while rows of one call are at different steps; where one acts in a part of
    the sampling only, rows in it and rows out of it get calls of their own."""
    graph = base()
    socket = loaded(host, graph, clip(4))
    add_stream(graph, socket, guidance=guidance)
    plain = pictures(host.run(graph))
    if kind == "PatchModelAddDownscale":  # the stock Deep Shrink
        ways = {"downscale_method": "bicubic", "upscale_method": "bicubic", "downscale_after_skip": True}
        settings = {**settings, **ways, "block_number": 2, "downscale_factor": 2.0}
    graph["m"] = node(kind, model=["1", 0], **settings)
    graph["s"]["inputs"]["model"] = ["m", 0]
    result = host.run(graph)
    assert f"6 passes, {calls} network calls" in text_of(result)
    changed = pictures(result).astype(int)
    assert (np.abs(changed - plain).max((1, 2, 3)) > 10).all()
    for i in (0, 3):
        alone = {**graph, "s": node("SlipstreamStreamFrames", **{**graph["s"]["inputs"], "frames": [f"f{i}", 0]})}
        assert np.abs(pictures(host.run(alone))[0] - changed[i]).max() <= 1


def test_attention_across_frames_says_where_it_has_no_effect(host) -> None:
    graph = base()
    graph["m"] = node("ProbeImagePrompt", model=["1", 0], **{**IMAGE_PROMPT, **PART})
    add_stream(graph, loaded(host, graph, clip(3)), model=["m", 0], cross_frame=True)
    before = len(host.log())
    assert len(pictures(host.run(graph))) == 3
    assert host.log()[before:].count("`cross_frame` has no effect on passes") == 1


TAESD_SCALE = 0.18215  # built into the host for the files called taesd


@pytest.fixture(scope="module")
def tiny_vae(host_models, tmp_path_factory) -> pathlib.Path:
    """A random tiny autoencoder: TAESD's pair of files for the stock loader, a folder `vae` (returned) and its bare file."""
    from diffusers import AutoencoderTiny

    scale = load("pocket").vae.config.scaling_factor / TAESD_SCALE
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        vae = AutoencoderTiny(scaling_factor=scale)
        pixels = torch.from_numpy(clip(1)).movedim(-1, 1).float() / 127.5 - 1
        for name, parameter in vae.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()  # what comes in is not drowned
        # Latents as large as the model expects, and images of middle grey with visible contrast.
        vae.encoder.layers[-1].weight /= scale * vae.encode(pixels).latents.std()
        vae.decoder.layers[-1].weight *= 0.4 / (vae.decode(vae.encode(pixels).latents).sample + 1).std()
        vae.decoder.layers[-1].bias += 0.5
    folder = tmp_path_factory.mktemp("tiny") / "vae"
    vae.save_pretrained(folder)
    # The decoder's first layer in TAESD is a clamp without weights.
    for name, module, first in (("encoder", vae.encoder, 0), ("decoder", vae.decoder, 1)):
        parts = [(key.split(".", 2)[1:], tensor) for key, tensor in module.state_dict().items()]
        tensors = {f"{int(number) + first}.{rest}": tensor.contiguous() for (number, rest), tensor in parts}
        save_file(tensors, host_models / "vae_approx" / f"taesd_{name}.safetensors")
    return folder


def add_stock_tiny(graph: dict[str, Any], host_models: pathlib.Path, vae: pathlib.Path) -> list[Any]:
    graph["v"] = node("VAELoader", vae_name="taesd")
    return ["v", 0]


def add_tiny_folder(graph: dict[str, Any], host_models: pathlib.Path, vae: pathlib.Path) -> list[Any]:
    """A model folder whose own VAE is a tiny one."""
    folder = host_models / "diffusers" / "tiny-vae"
    shutil.copytree(BUNDLED, folder)
    shutil.rmtree(folder / "vae")
    shutil.copytree(vae, folder / "vae")
    graph["1"] = node("SlipstreamLoadModel", model="tiny-vae")
    return ["1", 2]


@pytest.mark.parametrize("add", [add_stock_tiny, add_tiny_folder])
def test_frames_through_a_tiny_autoencoder_equal_the_librarys(host, host_models, tiny_vae, add) -> None:
    frames, graph = clip(4), base()
    vae = add(graph, host_models, tiny_vae)
    add_stream(graph, loaded(host, graph, frames), vae=vae)
    got = pictures(host.run(graph))
    assert_same(got, streamed(load("pocket", vae=tiny_vae), frames))
    assert got.std() > 20
    assert np.abs(got[3].astype(int) - got[0]).mean() > 5  # the moving box is in the latents


def through(host: Any, report: Any, vae: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Encode and decode an image with a VAE; returns the result and the latents as an SD1.x UNet has them."""
    graph: dict[str, Any] = {"m": node("ProbeTinyNative", shape="sd15", dtype="float32"), "v": vae}
    graph["e"] = node("VAEEncode", pixels=loaded(host, graph, clip(1)), vae=["v", 0])
    graph["report"] = node("ProbeDump", latent=["e", 0], model=["m", 0])
    graph["d"] = node("VAEDecode", samples=["e", 0], vae=["v", 0])
    graph["out"] = node("SaveImage", images=["d", 0], filename_prefix="through")
    result = host.run(graph)
    found = report(result)
    return result, torch.tensor(found["scaled"]).reshape(found["shape"])


def test_a_bare_taesd_file_is_scaled_as_the_host_scales_it(host, host_models, tiny_vae, report) -> None:
    """TAESD works on latents as the UNet has them: the host divides by 0.18215 and SD1.x multiplies by it again."""
    result, seen_by_unet = through(host, report, node("VAELoader", vae_name="taesd"))
    for file in (host_models / "vae_approx" / "taesd_decoder.safetensors", tiny_vae / WEIGHTS):
        pipe = load("pocket", vae=file)
        latents = pipe.encode_image(torch.from_numpy(clip(1)).float() / 255)
        torch.testing.assert_close(latents, seen_by_unet, rtol=1e-4, atol=1e-5)
        assert_same(pictures(result), pipe.decode(latents).numpy() * 255)


def test_a_tiny_autoencoder_in_a_folder_of_a_known_family_gives_the_latents_of_the_family(
    host, tiny_vae, report
) -> None:
    """SD1.x in the host multiplies each LATENT by 0.18215, whatever the folder's tiny autoencoder asks for."""
    result, seen_by_unet = through(host, report, node("ProbeFolderVae", folder=str(tiny_vae), scale=TAESD_SCALE))
    pipe = load("pocket", vae=tiny_vae)
    latents = pipe.encode_image(torch.from_numpy(clip(1)).float() / 255)
    torch.testing.assert_close(latents, seen_by_unet, rtol=1e-4, atol=1e-5)
    assert_same(pictures(result), pipe.decode(latents).numpy() * 255)


def test_noise_levels_from_a_scheduler(host) -> None:
    graph = base()
    graph["e"] = node("EmptyImage", width=64, height=64, batch_size=3, color=0x3050A0)
    graph["sig"] = node("BasicScheduler", model=["1", 0], scheduler="normal", steps=4, denoise=0.5)
    add_stream(graph, ["e", 0], sigmas=["sig", 0])
    result = host.run(graph)
    assert len(pictures(result)) == 3
    assert "6 passes" in text_of(result)


def test_still_frames_are_skipped(host) -> None:
    graph = base()
    graph["e"] = node("EmptyImage", width=64, height=64, batch_size=10, color=0x3050A0)
    add_stream(graph, ["e", 0], similarity=0.9, max_skip=100)
    result = host.run(graph)
    got = pictures(result)
    assert len(got) == 10
    assert (got == got[:1]).all()
    assert "9 frames skipped" in text_of(result)


def test_similarity_filter_node(host) -> None:
    frames, graph = np.repeat(clip(4), 3, 0), base()
    settings = {"similarity": 0.9, "max_skip": 10, "blocks": 8, "filter_seed": 1}
    graph["f"] = node("SlipstreamSimilarityFilter", frames=loaded(host, graph, frames), **settings)
    graph["out"] = node("SaveImage", images=["f", 0], filename_prefix="kept")
    graph["text"] = node("PreviewAny", source=["f", 1])
    graph["count"] = node("PreviewAny", source=["f", 2])
    result = host.run(graph)
    pixels = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1
    expected = select(pixels, SimilarityFilter(0.9, seed=1, blocks=8))
    assert text_of(result) == ", ".join(map(str, expected))
    assert text_of(result, "count") == str(len(expected))
    assert np.array_equal(pictures(result), frames[expected])


def test_interrupt_throws_away_or_keeps(host, cancelled) -> None:
    graph = base()
    graph["e"] = node("EmptyImage", width=64, height=64, batch_size=200, color=0x3050A0)
    add_stream(graph, ["e", 0], steps=4)

    def under_way(event: Any) -> bool:
        return event.type == "progress" and event.data.get("value", 0) >= 8 and event.data.get("node") == "s"

    for choice, status in (("discard", "interrupted"), ("return finished frames", "success")):
        graph["s"]["inputs"]["on_interrupt"] = choice
        result, before, late = cancelled(graph, under_way)
        assert result.status == status, result.explain()
        assert before >= 8
        assert late <= 1  # the host is asked before each call; cancel may come right after
    assert 4 < len(pictures(result)) < 200
    assert "(interrupted)" in text_of(result)


def test_memory_that_is_freed_while_a_stream_runs_changes_nothing(host) -> None:
    """POST /free empties our caches at once, the host's own after the run."""
    graph = base()
    graph["e"] = node("EmptyImage", width=64, height=64, batch_size=24, color=0x3050A0)
    add_stream(graph, ["e", 0], steps=2)
    graph["s"]["inputs"]["seed"] = 77
    expected = pictures(host.run(graph))
    host.free()
    running = host.submit(graph)
    for at in (4, 12):
        running.wait_for(
            lambda e: e.type == "progress" and e.data.get("value", 0) >= at and e.data.get("node") == "s"  # noqa: B023
        )
        host.free()
    result = running.wait()
    assert result.ok, result.explain()
    assert "s" in result.executed_nodes
    assert len(expected) == 24
    assert np.array_equal(pictures(result), expected)


def test_each_frame_goes_with_its_own_controlnet_picture(host) -> None:
    """A batch of ControlNet images: frame by frame alone, with its own image, gives the same."""
    frames, graph = clip(4), base()
    hints = np.stack([np.full((128, 128, 3), 60 * i, np.uint8) for i in range(4)])
    graph["c"] = node("ProbeTinyControlNet", model=["1", 0])
    together = dict(graph)
    batch = loaded(host, together, frames)
    hint_graph: dict[str, Any] = {}
    hint_socket = loaded_as(host, hint_graph, hints, "h")
    together.update(hint_graph)
    add_controlled(together, hint_socket)
    add_stream(together, batch, positive=["a", 0], negative=["a", 1])
    result = host.run(together)
    got = pictures(result)
    assert "6 network calls" in text_of(result)  # rows of different frames share their calls
    for i in (1, 3):
        alone = dict(graph)
        alone["f"] = together[f"f{i}"]
        alone["hi"] = hint_graph[f"hf{i}"]
        add_controlled(alone, ["hi", 0])
        add_stream(alone, ["f", 0], positive=["a", 0], negative=["a", 1])
        single = pictures(host.run(alone))
        assert np.abs(single[0].astype(int) - got[i]).max() <= 2
    plain = dict(graph)
    batch = loaded(host, plain, frames)
    add_stream(plain, batch)
    assert np.abs(pictures(host.run(plain)).astype(int) - got)[3].max() > 3


def loaded_as(host: Any, graph: dict[str, Any], frames: np.ndarray, prefix: str) -> list[Any]:
    own: dict[str, Any] = {}
    socket: list[Any] = []
    for i, frame in enumerate(frames):
        data = io.BytesIO()
        Image.fromarray(frame).save(data, "PNG")
        own[f"{prefix}f{i}"] = node("LoadImage", image=host.upload_image(data.getvalue(), f"{prefix}_{i}.png"))
        if socket:
            own[f"{prefix}b{i}"] = node("ImageBatch", image1=socket, image2=[f"{prefix}f{i}", 0])
        socket = [f"{prefix}b{i}" if socket else f"{prefix}f{i}", 0]
    graph.update(own)
    return socket


def add_controlled(graph: dict[str, Any], image: list[Any]) -> None:
    graph["a"] = node(
        "ControlNetApplyAdvanced", positive=["p", 0], negative=["n", 0], control_net=["c", 0], image=image, strength=1.0,
        start_percent=0.0, end_percent=1.0,
    )  # fmt: skip


# -- several prompts

OTHER = "a small yellow square on a green background"


def add_blend(graph: dict[str, Any], **inputs: Any) -> list[Any]:
    """Add a node that blends the prompt and another one; returns its socket."""
    graph["q"] = node("CLIPTextEncode", clip=["1", 1], text=OTHER)
    settings = {"first": ["p", 0], "second": ["q", 0], "weight": 0.0, "mode": "linear", **inputs}
    graph["mix"] = node("SlipstreamBlendPrompts", **settings)
    return ["mix", 0]


@pytest.mark.parametrize("mode", ["linear", "slerp"])
def test_a_prompt_for_each_frame_goes_with_it(host, pipe, mode) -> None:
    """A batch of prompts: each frame alone, with its own prompt, gives the same; and the library does."""
    frames, graph = clip(4), base()
    socket = loaded(host, graph, frames)
    prompt = add_blend(graph, mode=mode, frames=socket, weight_end=1.0)
    add_stream(graph, socket, positive=prompt)
    result = host.run(graph)
    got = pictures(result)
    assert f"6 passes, 6 network calls, {4 * 3 + 4} rows" in text_of(
        result
    )  # frames of different prompts share their calls
    for i in (0, 2, 3):
        alone = base()
        alone["f"] = graph[f"f{i}"]
        add_stream(alone, ["f", 0], positive=add_blend(alone, mode=mode, weight=i / 3))
        assert np.abs(pictures(host.run(alone))[0].astype(int) - got[i]).max() <= 2
    plain = dict(graph)
    add_stream(plain, socket)
    assert np.abs(pictures(host.run(plain))[3].astype(int) - got[3]).max() > 30
    conds = [pipe.encode_text([text]) for text in (TEXT, OTHER)]
    fade = PromptBlend([1, 0], [0, 1], mode)
    stream = BlendedStream(pipe.model, conds, fade, 4, pipe.encode_text([""]), StreamConfig(**SETTINGS))
    finished = stream.push(pipe.encode_image(torch.from_numpy(frames).float() / 255)) + stream.drain()
    assert_same(got, pipe.decode(torch.cat([f.latents for f in finished])).numpy() * 255)


@pytest.mark.parametrize("guidance", ["onetime", "full"])
def test_pooled_text_of_each_frame_in_an_sdxl_model(host, guidance) -> None:
    """Pooled text and image sizes go with their rows: frames of different prompts share calls, negatives too."""
    frames, graph = clip(3), base()
    socket = loaded(host, graph, frames)
    graph["xl"] = node("ProbeTinyNative", shape="sdxl_pooled", dtype="float32")
    changes = {"model": ["xl", 0], "guidance": guidance}
    add_stream(graph, socket, positive=add_blend(graph, frames=socket), **changes)
    result = host.run(graph)
    got = pictures(result).astype(int)
    assert "5 passes, 5 network calls" in text_of(result)
    singles = []
    for i in range(3):
        alone = {**base(), "xl": graph["xl"], "f": graph[f"f{i}"]}
        add_stream(alone, ["f", 0], positive=add_blend(alone, weight=i / 2), **changes)
        singles.append(pictures(host.run(alone))[0].astype(int))
        assert np.abs(singles[i] - got[i]).max() <= 2
    add_stream(graph, socket, **changes)
    assert np.abs(pictures(host.run(graph))[2] - singles[2]).max() > 5


def test_a_negative_for_each_frame_too(host) -> None:
    """With full guidance, where every row has a negative one."""
    frames, graph = clip(3), base()
    socket = loaded(host, graph, frames)
    add_stream(graph, socket, negative=add_blend(graph, frames=socket), guidance="full")
    result = host.run(graph)
    got = pictures(result)
    assert f"5 passes, 5 network calls, {2 * 3 * 3} rows" in text_of(result)
    alone = base()
    alone["f"] = graph["f1"]
    add_stream(alone, ["f", 0], negative=add_blend(alone, weight=0.5), guidance="full")
    assert np.abs(pictures(host.run(alone))[0].astype(int) - got[1]).max() <= 2


def test_a_blend_in_a_stock_sampler(host, report) -> None:
    graph = base()
    graph["e"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    sampler = {"seed": 1, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    sockets = {"model": ["1", 0], "negative": ["n", 0], "latent_image": ["e", 0], **sampler}
    graph["k"] = node("KSampler", **sockets, positive=add_blend(graph, weight=0.25))
    stock = {"conditioning_to": ["p", 0], "conditioning_from": ["q", 0], "conditioning_to_strength": 0.75}
    graph["average"] = node("ConditioningAverage", **stock)
    graph["k2"] = node("KSampler", **sockets, positive=["average", 0])
    graph["d"] = node("ProbeCompare", one=["k", 0], other=["k2", 0])
    assert report(host.run(graph))["difference"] < 1e-4


def test_prompts_that_do_not_fit_the_clip_are_said(host) -> None:
    graph = base()
    socket = loaded(host, graph, clip(3))
    graph["some"] = node("ImageFromBatch", image=socket, batch_index=0, length=2)
    add_stream(graph, socket, positive=add_blend(graph, frames=["some", 0]), steps=1)
    before = len(host.log())
    assert len(pictures(host.run(graph))) == 3
    assert "2 prompts or ControlNet images for 3 frames" in host.log()[before:]


# -- RCFG as a GUIDER


def guided(
    guidance: str, scale: float = 2.0, sampler: str = "euler", picture: bool = True, **changes: Any
) -> dict[str, Any]:
    graph = base()
    graph["count"] = node("ProbeCount", model=["1", 0], name=f"{guidance} {scale} {sampler} {picture} {changes}")
    inputs = {"model": ["count", 0], "positive": ["p", 0], "negative": ["n", 0], "delta": 1.0, **changes}
    graph["g"] = node("SlipstreamRCFGGuider", guidance=guidance, guidance_scale=scale, **inputs)
    graph["i"] = node("EmptyImage", width=128, height=128, batch_size=1, color=0x3050A0)
    graph["e"] = node("EmptyLatentImage", width=128, height=128, batch_size=1)
    if picture:
        graph["e"] = node("VAEEncode", pixels=["i", 0], vae=["1", 2])
    graph["sig"] = node("BasicScheduler", model=["1", 0], scheduler="normal", steps=6, denoise=0.6 if picture else 1.0)
    graph["k"] = node("KSamplerSelect", sampler_name=sampler)
    graph["r"] = node("RandomNoise", noise_seed=3)
    sockets = {"noise": "r", "guider": "g", "sampler": "k", "sigmas": "sig", "latent_image": "e"}
    graph["x"] = node("SamplerCustomAdvanced", **{name: [source, 0] for name, source in sockets.items()})
    graph["d"] = node("ProbeCounted", after=["x", 0], name=graph["count"]["inputs"]["name"])
    return graph


ROWS = [("none", 2.0, 6), ("self", 2.0, 6), ("onetime", 2.0, 7), ("full", 2.0, 12), ("full", 1.0, 6)]


@pytest.mark.parametrize(("guidance", "scale", "rows"), ROWS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_guider_costs_n_or_n_plus_one_or_two_n_rows(host, report, guidance, scale, rows, sampler) -> None:
    assert sum(report(host.run(guided(guidance, scale, sampler)))) == rows


@pytest.mark.parametrize("image_prompt", [False, True])
def test_full_guidance_is_the_hosts_cfg(host, report, image_prompt) -> None:
    graph = guided("full", 3.0)
    if image_prompt:  # negative rows get image tokens of their own, as in the host's own calls
        graph["m"] = node("ProbeImagePrompt", model=["1", 0], **{**IMAGE_PROMPT, "by_level": False})
        graph["count"]["inputs"]["model"] = ["m", 0]
    graph["g2"] = node(
        "CFGGuider", model=graph["count"]["inputs"]["model"], positive=["p", 0], negative=["n", 0], cfg=3.0
    )
    graph["x2"] = node("SamplerCustomAdvanced", **{**graph["x"]["inputs"], "guider": ["g2", 0]})
    graph["d"] = node("ProbeCompare", one=["x", 0], other=["x2", 0])
    assert report(host.run(graph))["difference"] < 1e-4


def test_self_guidance_of_an_empty_latent_says_what_it_does_instead(host, report) -> None:
    assert sum(report(host.run(guided("self", picture=False)))) == 7
    assert "the latent is empty" in host.log()


def test_a_guider_can_be_used_twice(host, report) -> None:
    """The kept negative belongs to one sampling, not to the guider."""
    graph = guided("onetime", 2.5)
    graph["x2"] = node("SamplerCustomAdvanced", **{**graph["x"]["inputs"], "noise": ["r2", 0]})
    graph["r2"] = node("RandomNoise", noise_seed=3)
    graph["d"] = node("ProbeCompare", one=["x", 0], other=["x2", 0])
    assert report(host.run(graph))["difference"] == 0


# -- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 1.5}, "strength"),
        ({"delta": -0.5}, "delta"),
        ({"guidance": "cfg"}, "guidance"),
        ({"guidance_scale": 0.0}, "guidance_scale"),
    ],
)
def test_values_out_of_range_are_refused_before_running(host, changes, message) -> None:
    graph = base()
    graph["e"] = node("EmptyImage", width=64, height=64, batch_size=2, color=0)
    add_stream(graph, ["e", 0], **changes)
    with pytest.raises(Exception, match=message):
        host.run(graph)


def test_two_streams_on_one_model_in_one_graph(host) -> None:
    graph = base()
    graph["e"] = node("EmptyImage", width=64, height=64, batch_size=3, color=0x3050A0)
    add_stream(graph, ["e", 0])
    graph["s2"] = json.loads(json.dumps(graph["s"]))
    graph["s2"]["inputs"].update(frames=["s", 0], strength=0.3)
    graph["out2"] = node("SaveImage", images=["s2", 0], filename_prefix="second")
    result = host.run(graph)
    assert len([f for f in result.files if f.node == "out2"]) == 3


def test_a_stream_that_was_cancelled_runs_again(host) -> None:
    """The half result that a cancelled run returned must not answer the same prompt from the host's cache."""
    graph = base()
    graph["e"] = node("EmptyImage", width=64, height=64, batch_size=80, color=0x3050A1)
    add_stream(graph, ["e", 0], steps=4, on_interrupt="return finished frames")
    running = host.submit(graph)
    running.wait_for(
        lambda e: e.type == "progress" and e.data.get("value", 0) >= 8 and e.data.get("node") == "s", timeout=120
    )
    running.interrupt()
    assert 4 < len(pictures(running.wait())) < 80
    whole = host.run(graph)
    assert len(pictures(whole)) == 80
    assert "(interrupted)" not in text_of(whole)
    assert not host.run(graph).progress("s"), "a whole result is kept"


def test_a_curve_gives_each_frame_its_strength(host: Any) -> None:
    """The first and the last frame are those of a stream with their strength alone."""
    graph = base()
    frames = loaded(host, graph, clip(5, 64, 64))
    found = {}
    for name, changes in {
        "curve": {"strength_curve": "0: 0.2, 4: 0.8"},
        "low": {"strength": 0.2},
        "high": {"strength": 0.8},
    }.items():
        add_stream(graph, frames, **changes)
        found[name] = pictures(host.run(graph))
    assert np.array_equal(found["curve"][0], found["low"][0])
    assert np.array_equal(found["curve"][-1], found["high"][-1])
    assert not np.array_equal(found["curve"][2], found["low"][2])
    assert not np.array_equal(found["curve"][2], found["high"][2])
