"""SlipstreamLoadModel in a real host: stock nodes work on what it gives, and bad folders are refused in one sentence."""

from __future__ import annotations

import io
import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import slipstream
import torch
from graph import node
from PIL import Image
from safetensors.torch import load_file, save_file
from slipstream.core import CFG, make_sigmas
from slipstream.core.samplers import euler
from slipstream.core.tensors import image_to_numpy

PROMPT = "a large red circle on a blue background"
SIZE = {"width": 128, "height": 128, "batch_size": 1}


def base(**changes: Any) -> dict[str, Any]:
    """Return a text-to-image prompt on stock nodes: "1" loads, "p" and "n" encode, "l" latent, "k" samples, "d", "s" save."""
    sampler = {"seed": 7, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    graph = {
        "1": node("SlipstreamLoadModel", model=changes.pop("model", "pocket")),
        "p": node("CLIPTextEncode", clip=["1", 1], text=changes.pop("text", PROMPT)),
        "n": node("CLIPTextEncode", clip=["1", 1], text=""),
        "l": node("EmptyLatentImage", **{**SIZE, **{k: changes.pop(k) for k in list(changes) if k in SIZE}}),
        "k": node(
            "KSampler", model=["1", 0], positive=["p", 0], negative=["n", 0], latent_image=["l", 0],
            **{**sampler, **changes},
        ),
        "d": node("VAEDecode", samples=["k", 0], vae=["1", 2]),
        "s": node("SaveImage", images=["d", 0], filename_prefix="test"),
    }  # fmt: skip
    return graph


def pixels(result: Any, at: str = "s") -> np.ndarray:
    """Return the saved images (B, H, W, 3) as integers, so that differences do not wrap."""
    assert result.ok, result.explain()
    files = [f for f in result.files if f.node == at]
    return np.stack([np.asarray(Image.open(io.BytesIO(f.read())).convert("RGB")) for f in files]).astype(int)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


@pytest.fixture(scope="module")
def plain(host: Any) -> np.ndarray:
    return pixels(host.run(base()))


def test_the_example_runs_and_makes_pictures(host: Any, example: Callable[..., Any]) -> None:
    graph = example("Draw with the bundled model", {"KSampler.steps": 6})
    (shown,) = [name for name, found in graph.items() if found["class_type"] in ("PreviewImage", "SaveImage")]
    pictures = pixels(host.run(graph), at=shown)
    assert pictures.shape == (4, 128, 128, 3)
    background = np.median(pictures.reshape(4, -1, 3), axis=1)
    assert (background[:, 2] > background[:, 0] + 50).all()  # blue, as the prompt says


def test_ksampler_equals_sampler_custom_advanced(host: Any, report: Any) -> None:
    graph = base(batch_size=2)
    graph["g"] = node("CFGGuider", model=["1", 0], positive=["p", 0], negative=["n", 0], cfg=3.0)
    graph["noise"], graph["e"] = node("RandomNoise", noise_seed=7), node("KSamplerSelect", sampler_name="euler")
    graph["sig"] = node("BasicScheduler", model=["1", 0], scheduler="simple", steps=4, denoise=1.0)
    graph["a"] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["g", 0], sampler=["e", 0], sigmas=["sig", 0],
        latent_image=["l", 0],
    )  # fmt: skip
    graph["c"] = node("ProbeCompare", one=["k", 0], other=["a", 0])
    assert report(host.run(graph))["difference"] == 0


@pytest.mark.parametrize(("name", "cfg"), [("pocket", 3.0), ("pocket-lcm", 1.0)])
def test_library_and_host_agree_on_pixels(host: Any, name: str, cfg: float) -> None:
    assert difference(library_pixels(name, cfg), pixels(host.run(base(model=name, cfg=cfg)))) <= 2


def library_pixels(source: Any, cfg: float = 3.0) -> np.ndarray:
    """Return what the library makes of the settings of `base`."""
    pipe = slipstream.load(source, device="cpu")
    cond = pipe.encode_text([PROMPT, ""])
    sigmas = make_sigmas("simple", pipe.model.levels, 4)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        # The host starts at the top level from the variance of the noised data, not of the noise alone.
        x = noise * (1 + sigmas[0] ** 2).sqrt()
        latents = euler(CFG(pipe.model, cond.take([0]), cond.take([1]), cfg), x, sigmas, pipe.model.space)
        return image_to_numpy(pipe.decode(latents)).astype(int)


@pytest.mark.parametrize("count", [3, 75, 76, 200])
def test_a_prompt_of_any_length_is_encoded_alike_in_library_and_host(host: Any, count: int) -> None:
    words = "a large red circle on a blue background".split()  # each is one token
    text = " ".join(words[i % len(words)] for i in range(count))
    graph = {"1": node("SlipstreamLoadModel", model="pocket"), "p": node("CLIPTextEncode", clip=["1", 1], text=text)}
    result = host.run({**graph, "d": node("ProbePromptDump", cond=["p", 0])})
    assert result.ok, result.explain()
    found = json.loads(result.outputs["d"]["report"][0])
    ours = slipstream.load("pocket", device="cpu").encode_text([text]).context
    assert found["shape"] == list(ours.shape) == [1, 77 * -(-count // 75), 64]
    torch.testing.assert_close(torch.tensor(found["values"]).reshape(ours.shape), ours, atol=1e-4, rtol=1e-4)


def schedule(**fields: Any) -> Callable[[pathlib.Path], None]:
    """Return a change of the scheduler's config; None takes a field out."""

    def change(folder: pathlib.Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        config = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def shards(folder: pathlib.Path) -> None:
    """Cut each network's weights in two files, and put a half-precision variant of other values beside the UNet's."""
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        path = folder / part / f"{stem}.safetensors"
        state = load_file(path)
        names = sorted(state)
        files = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        for file, half in zip(files, halves):
            save_file({name: state[name] for name in half}, folder / part / file)
        index = {"weight_map": {name: file for file, half in zip(files, halves) for name in half}}
        (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        path.unlink()
        if part == "unet":
            wrong = {name: tensor * 0 for name, tensor in state.items()}
            save_file(wrong, folder / part / f"{stem}.fp16.safetensors")


FOLDERS = {
    "cosine": schedule(beta_schedule="squaredcos_cap_v2"),
    "trained": schedule(trained_betas=[0.0005 + 0.00002 * i for i in range(600)], num_train_timesteps=600),
    "no_betas": schedule(beta_schedule=None, beta_start=None, beta_end=None),
    "lcm_no_betas": schedule(_class_name="LCMScheduler", beta_schedule=None, beta_start=None, beta_end=None),
    "linear_500": schedule(beta_schedule="linear", num_train_timesteps=500),
    "v_zsnr": schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "x0": schedule(prediction_type="sample"),
    "shards": shards,
}


@pytest.mark.parametrize("name", FOLDERS)
def test_one_folder_is_one_model_in_library_and_host(host: Any, host_models: pathlib.Path, name: str) -> None:
    folder = copy_of_pocket(host_models, f"same_{name}")
    FOLDERS[name](folder)
    ours, theirs = library_pixels(folder), pixels(host.run(base(model=folder.name)))
    assert ours.std() > 5
    assert difference(ours, theirs) <= 2


def test_the_student_makes_the_picture_in_four_steps_without_guidance(host: Any) -> None:
    assert "pocket-lcm" in host.object_info()["SlipstreamLoadModel"]["input"]["required"]["model"][0]
    settings = {"sampler_name": "lcm", "scheduler": "sgm_uniform", "cfg": 1.0}
    student, teacher = (pixels(host.run(base(model=name, **settings)))[0] for name in ("pocket-lcm", "pocket"))
    assert difference(student, teacher) > 30
    border = np.median(student[[0, -1]].reshape(-1, 3), axis=0)
    assert border[2] > border[0] + 50  # a blue background ...
    red = student[..., 0] > student[..., 2] + 50
    assert 0.1 < red.mean() < 0.6  # ... with a large red thing on it
    rows, columns = np.nonzero(red)
    assert abs(int(np.ptp(rows)) - int(np.ptp(columns))) < 16  # as high as it is wide


def test_same_seed_same_picture_after_other_nodes_ran(host: Any, plain: np.ndarray) -> None:
    other = pixels(host.run(base(seed=8, sampler_name="euler_ancestral")))
    assert difference(other, plain) > 30
    graph = base()
    graph["1"]["_meta"] = {"title": "again"}
    graph["k"]["inputs"]["denoise"] = 0.9999  # another cache key, the same levels
    assert difference(pixels(host.run(graph)), plain) <= 1


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc"])
def test_other_samplers(host: Any, sampler: str) -> None:
    picture = pixels(host.run(base(sampler_name=sampler, steps=6)))
    assert picture.std() > 10


def test_non_square_batch(host: Any) -> None:
    assert pixels(host.run(base(width=192, height=96, batch_size=2, steps=2))).shape == (2, 96, 192, 3)


def test_half_precision_compute(host: Any, plain: np.ndarray) -> None:
    graph = base()
    graph["h"] = node("ModelComputeDtype", model=["1", 0], dtype="bf16")
    graph["k"]["inputs"]["model"] = ["h", 0]
    half = pixels(host.run(graph))
    assert 0 < np.abs(half - plain).mean() < 4


def test_image_to_image_and_tiles(host: Any, plain: np.ndarray) -> None:
    graph = base(denoise=0.5)
    graph["first"] = {**graph["k"], "inputs": {**graph["k"]["inputs"], "denoise": 1.0}}
    graph["fd"] = node("VAEDecode", samples=["first", 0], vae=["1", 2])
    graph["v"] = node("VAEEncode", pixels=["fd", 0], vae=["1", 2])
    graph["k"]["inputs"]["latent_image"] = ["v", 0]
    graph["round"] = node("VAEDecode", samples=["v", 0], vae=["1", 2])
    graph["tiles"] = node(
        "VAEDecodeTiled",
        samples=["first", 0],
        vae=["1", 2],
        tile_size=128,
        overlap=32,
        temporal_size=64,
        temporal_overlap=8,
    )
    for name in ("round", "tiles"):
        graph["s" + name] = node("SaveImage", images=[name, 0], filename_prefix=name)
    result = host.run(graph)
    assert np.abs(pixels(result, "sround") - plain).mean() < 8  # a second pass through a lossy VAE (about 30 dB)
    assert np.abs(pixels(result, "stiles") - plain).mean() < 2  # half-width tiles have norms of their own
    changed = np.abs(pixels(result) - plain).mean()
    assert 0.5 < changed < 40


def test_prompt_weights_and_clip_layer_have_an_effect(host: Any, plain: np.ndarray) -> None:
    assert difference(pixels(host.run(base(text="a large (red:1.6) circle on a blue background"))), plain) > 2
    graph = base()
    graph["skip"] = node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-2)
    graph["p"]["inputs"]["clip"] = ["skip", 0]
    assert difference(pixels(host.run(graph)), plain) > 2


def test_previews_show_the_picture(host: Any) -> None:
    result = host.run(base(seed=11, steps=24))
    assert len(result.previews) >= 5
    assert result.progress("k")[-1] == (24, 24)
    preview = Image.open(io.BytesIO(result.previews[-1].data["image"])).convert("RGB")
    last = np.asarray(preview.resize((16, 16), Image.Resampling.BOX)).astype(float)
    picture = pixels(result)[0].reshape(16, 8, 16, 8, 3).mean((1, 3))
    assert np.abs(last - picture).mean() < 25


def test_lora_changes_the_picture_and_leaves_no_trace(host: Any, lora: str, plain: np.ndarray) -> None:
    graph = base()
    graph["lora"] = node(
        "LoraLoader", model=["1", 0], clip=["1", 1], lora_name=lora, strength_model=1.0, strength_clip=1.0
    )
    graph["k"]["inputs"]["model"], graph["p"]["inputs"]["clip"] = ["lora", 0], ["lora", 1]
    before = len(host.log())
    assert difference(pixels(host.run(graph)), plain) > 30
    assert "NOT LOADED" not in host.log()[before:]  # every layer of the LoRA found its place
    again = base()
    again["k"]["inputs"]["seed"], again["k"]["inputs"]["denoise"] = 7, 0.99999
    assert difference(pixels(host.run(again)), plain) == 0


def test_control_net_reaches_each_row(host: Any, report: Any) -> None:
    graph = {key: base()[key] for key in ("1", "p", "n", "l")}
    graph["image"] = node("EmptyImage", width=128, height=128, batch_size=1, color=0xFF8000)
    graph["net"] = node("ProbeTinyControlNet", model=["1", 0])
    graph["apply"] = node(
        "ControlNetApplyAdvanced", positive=["p", 0], negative=["n", 0], control_net=["net", 0], image=["image", 0],
        strength=1.0, start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    graph["r"] = node("ProbeRows", model=["1", 0], positive=["apply", 0], negative=["apply", 1], latent=["l", 0])
    found = report(host.run(graph))
    assert found["calls"] == 1
    assert found["difference"] < 1e-3
    graph["apply"]["inputs"].update(start_percent=0.3, end_percent=0.8)
    found = report(host.run(graph))
    assert found["calls"] > 1  # a range of time acts on each row by its own level
    assert found["difference"] < 1e-3
    one_sided = {
        **graph,
        "r": node("ProbeRows", model=["1", 0], positive=["apply", 0], negative=["n", 0], latent=["l", 0]),
    }
    assert report(host.run(one_sided))["difference"] < 1e-3


PATCHES = {
    "FreeU_V2": {"b1": 1.4, "b2": 1.4, "s1": 0.5, "s2": 0.5},
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "TomePatchModel": {"ratio": 0.6},
    "SelfAttentionGuidance": {"scale": 1.0, "blur_sigma": 2.0},
    "RescaleCFG": {"multiplier": 0.9},
    "HyperTile": {"tile_size": 1, "swap_size": 2, "max_depth": 2, "scale_depth": False},
}


@pytest.mark.parametrize("patch", PATCHES)
def test_stock_patches_are_never_silent(host: Any, plain: np.ndarray, patch: str) -> None:
    """The UNet is the host's own, so every patch of a MODEL acts on it: none is a silent no-op."""
    size = {"width": 256, "height": 256, "steps": 1} if patch == "HyperTile" else {}  # it tiles large latents only
    reference = pixels(host.run(base(**size))) if size else plain
    graph = base(**size)
    graph["x"] = node(patch, model=["1", 0], **PATCHES[patch])
    graph["k"]["inputs"]["model"] = ["x", 0]
    assert difference(pixels(host.run(graph)), reference) > 1


def test_checkpoint_save(host: Any) -> None:
    graph = {"1": base()["1"]}
    graph["save"] = node("CheckpointSave", model=["1", 0], clip=["1", 1], vae=["1", 2], filename_prefix="test/pocket")
    result = host.run(graph)
    assert result.ok, result.explain()
    assert list(host.base.rglob("pocket_*.safetensors"))


def test_weights_can_be_differentiated(host: Any, report: Any) -> None:
    graph = base(steps=1)
    del graph["s"], graph["d"]
    graph["d"] = node("ProbeDump", latent=["k", 0], model=["1", 0])
    assert report(host.run(graph))["inference"] is False


# ------------------------------------------------------------------------------------------------- bad folders


def copy_of_pocket(host_models: pathlib.Path, name: str) -> pathlib.Path:
    folder = host_models / "diffusers" / name
    shutil.copytree(pathlib.Path(slipstream.core.loading.BUNDLED), folder)
    return folder


def truncate(folder: pathlib.Path) -> None:
    path = next((folder / "unet").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:5000])


def pickle_only(folder: pathlib.Path) -> None:
    path = next((folder / "unet").glob("*.safetensors"))
    path.rename(path.with_name("diffusion_pytorch_model.bin"))


def no_vae(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "vae")


def bad_json(folder: pathlib.Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


def set_field(name: str, value: Any) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def vae_class(name: str) -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": name})) and None


def flow_scheduler(folder: pathlib.Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))


BAD = {
    "truncated": (truncate, "damaged"),
    "pickle": (pickle_only, "pickle"),
    "no_vae": (no_vae, "vae"),
    "unknown_vae": (vae_class("VQModel"), "VQModel"),
    "other_vae": (vae_class("AutoencoderTiny"), "weights of an AutoencoderTiny"),
    "json": (bad_json, "unet/config.json"),
    "unknown_blocks": (set_field("down_block_types", ["AttnDownBlock2D"] * 3), "AttnDownBlock2D"),
    "unknown_scheduler": (flow_scheduler, "FlowMatch"),
    "unknown_time": (set_field("time_embedding_type", "fourier"), "time_embedding_type"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_and_the_host_goes_on(
    host: Any, host_models: pathlib.Path, plain: np.ndarray, name: str
) -> None:
    damage, word = BAD[name]
    damage(copy_of_pocket(host_models, name))
    result = host.run(base(model=name))
    assert result.status == "error"
    message = result.error["exception_message"].strip()
    assert message.startswith("Expected ")
    assert word in message
    assert "\n" not in message
    assert difference(pixels(host.run(base(denoise=0.99998))), plain) == 0


def test_a_replaced_folder_is_noticed(host: Any, host_models: pathlib.Path, plain: np.ndarray) -> None:
    folder = copy_of_pocket(host_models, "changing")
    assert difference(pixels(host.run(base(model="changing"))), plain) == 0
    set_field("norm_num_groups", 32)(folder)
    assert difference(pixels(host.run(base(model="changing"))), plain) > 2


def test_text_encoders_of_transformers_4_and_5_are_one(host: Any, host_models: pathlib.Path, plain: np.ndarray) -> None:
    """Version 5 drops a prefix from the names; the host alone would leave such an encoder at random values."""
    for prefix in ("text_model.", ""):
        folder = copy_of_pocket(host_models, f"text_{len(prefix)}")
        path = folder / "text_encoder" / "model.safetensors"
        tensors = {prefix + key.removeprefix("text_model."): tensor.clone() for key, tensor in load_file(path).items()}
        save_file(tensors, path)
        assert difference(pixels(host.run(base(model=folder.name))), plain) == 0


def test_an_unknown_name_is_rejected_by_the_host(host: Any) -> None:
    from comfy_host import PromptRejected

    with pytest.raises(PromptRejected, match="model"):
        host.run(base(model="../../etc"))


def test_interrupt_of_a_stock_sampler_leaves_the_host_usable(host: Any, plain: np.ndarray) -> None:
    run = host.submit(base(steps=200, seed=5))
    run.wait_for(lambda e: e.type == "progress" and e.data["value"] >= 2, timeout=120)
    run.interrupt()
    result = run.wait()
    assert result.status == "interrupted"
    assert result.progress("k")[-1][0] < 150
    assert difference(pixels(host.run(base(denoise=0.99997))), plain) == 0


def test_an_empty_latent_of_another_size_is_warned_of(host: Any) -> None:
    """Empty Latent's own default of 512 gave a dozen blobs after two minutes, without a hint."""
    result = host.run(base(width=512, height=512, steps=1))
    assert result.ok, result.explain()
    (warning,) = result.warnings
    assert warning[0] == "1"
    assert "made for images of 128 x 128, but the empty latent is 512 x 512. Set it to 128 x 128" in warning[1]
    linked = base(steps=1)
    linked["l"]["inputs"] |= {"width": ["1", 3], "height": ["1", 4]}
    result = host.run(linked)
    assert pixels(result).shape == (1, 128, 128, 3)
    assert not result.warnings


@pytest.mark.parametrize("model", ["pocket-lcm", "pocket-flow"])
def test_the_doctor_times_the_stages_of_a_stream_of_a_connected_model(host: Any, model: str) -> None:
    graph = {
        "1": node("SlipstreamLoadModel", model=model),
        "p": node("CLIPTextEncode", clip=["1", 1], text=PROMPT),
        "d": node("SlipstreamDoctor", model=["1", 0], vae=["1", 2], positive=["p", 0]),
    }
    result = host.run(graph)
    assert result.ok, result.explain()
    lines = "".join(result.outputs["d"]["text"]).splitlines()
    assert any(
        re.search(r"stream 128x128: .*encode [\d.]+ ms, denoise [\d.]+ ms, decode [\d.]+ ms", line) for line in lines
    )
    assert re.search(r"limited by: +(encode|denoise|decode): at most [\d.]+ frames per second", lines[-1])
    # A VAE of another family: the report comes all the same, with the reason.
    graph["other"] = node("SlipstreamLoadModel", model="pocket-lcm" if model == "pocket-flow" else "pocket-flow")
    graph["d"]["inputs"]["vae"] = ["other", 2]
    refused = host.run(graph)
    assert refused.ok, refused.explain()
    assert re.search(r"stream: +not timed: Expected a latent of", "".join(refused.outputs["d"]["text"]))
    del graph["d"]["inputs"]["positive"]
    plain = host.run(graph)
    assert "limited by" not in "".join(plain.outputs["d"]["text"])
