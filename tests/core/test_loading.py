"""load(): the same pipeline from every way to store a model, and one useful sentence for everything that is not a model."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
import threading

import pytest
import slipstream
import torch
from safetensors.torch import load_file, save_file
from slipstream.core import checkpoint
from slipstream.core.cache import MODELS, PROMPTS
from slipstream.core.loading import BUNDLED, Part
from slipstream_tests.core.checkpoints import SCHEDULE, Tiny

PROMPT = ["a red circle on a blue background", ""]


def run(pipe: slipstream.core.Pipeline) -> tuple[torch.Tensor, ...]:
    """Return what each network of `pipe` makes of fixed input."""
    x = torch.linspace(-2, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    cond = pipe.encode_text(PROMPT)
    image = torch.linspace(0, 1, 32 * 48 * 3).reshape(1, 32, 48, 3)
    latents = pipe.encode_image(image)
    pooled = cond.context.new_zeros(1) if cond.pooled is None else cond.pooled
    denoised = pipe.model(x, torch.tensor([3.0, 0.5]), cond)
    return cond.context, pooled, denoised, latents, pipe.decode(latents)


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
def test_a_single_file_is_the_folder(kind: str, tmp_path: pathlib.Path) -> None:
    tiny = Tiny(kind)
    folder = slipstream.load(tiny.folder(tmp_path / "folder"))
    # Random weights predict neither noise nor velocity: the test says which to take.
    file = slipstream.load(tiny.file(tmp_path / "model.safetensors"), prediction_type="epsilon")
    assert folder.downscale == file.downscale == 4
    for one, other in zip(run(folder), run(file)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_text_names_of_old_files(tmp_path: pathlib.Path) -> None:
    tiny = Tiny("sd15")
    new = tiny.file(tmp_path / "new.safetensors")
    state = {n.replace(checkpoint.SD_TEXT, checkpoint.SD_OLD_TEXT): t for n, t in load_file(new).items()}
    save_file(state, tmp_path / "old.safetensors")
    pipes = [slipstream.load(tmp_path / f"{n}.safetensors", prediction_type="epsilon") for n in ("new", "old")]
    assert torch.equal(*(pipe.encode_text(PROMPT).context for pipe in pipes))


def test_a_folder_is_what_diffusers_loads(tmp_path: pathlib.Path) -> None:
    tiny = Tiny("sdxl")
    pipe = slipstream.load(tiny.folder(tmp_path / "folder"))
    cond = pipe.encode_text(PROMPT, size=(512, 768))
    assert cond.extra is not None
    assert cond.extra["time_ids"].tolist() == [[512, 768, 0, 0, 512, 768]] * 2
    ids = [torch.cat(encode.tokens(PROMPT)) for encode in pipe.text]
    outputs = [text.eval()(i, output_hidden_states=True) for text, i in zip(tiny.texts, ids)]
    torch.testing.assert_close(
        cond.context, torch.cat([o.hidden_states[-2] for o in outputs], -1), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(cond.pooled, outputs[1].text_embeds, atol=1e-5, rtol=1e-5)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 20])
    added = {"text_embeds": outputs[1].text_embeds, "time_ids": cond.extra["time_ids"]}
    eps = tiny.unet.eval()(x, t, cond.context, added_cond_kwargs=added).sample
    sigma = pipe.model.levels.t_to_sigma(t)
    scaled = x * (sigma**2 + 1).sqrt()[:, None, None, None]
    denoised = pipe.model(scaled, sigma, cond)
    torch.testing.assert_close((scaled - denoised) / sigma[:, None, None, None], eps, atol=1e-4, rtol=1e-4)


def test_weights_are_on_the_device_once_and_channels_last() -> None:
    pipe = slipstream.load("pocket", dtype="bfloat16")
    for network in (pipe.model.unet, pipe.vae, pipe.text[0].encoder):
        for parameter in network.parameters():
            assert parameter.dtype == torch.bfloat16
            assert not parameter.requires_grad
            assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=torch.channels_last)
    assert pipe.encode_text(PROMPT).context.dtype == torch.float32


def test_loading_again_shares_the_networks_and_counts_anew() -> None:
    one = slipstream.load("pocket")
    one.model(torch.zeros(1, 4, 16, 16), torch.ones(1), one.encode_text([""]))
    other = slipstream.load("pocket")
    assert other.model.unet is one.model.unet
    assert other.vae is one.vae
    assert (one.model.calls, other.model.calls) == (1, 0)


def test_a_replaced_file_is_noticed(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    before = slipstream.load(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.bias"] += 1
    save_file(state, weights)
    after = slipstream.load(folder)
    assert after.model.unet is not before.model.unet
    assert after.vae is before.vae
    difference = after.model.unet.conv_out.bias - before.model.unet.conv_out.bias
    torch.testing.assert_close(difference, torch.ones(4), atol=1e-2, rtol=0)


def test_two_threads_load_a_model_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    loaded, load, pipes = [], Part.load, []
    monkeypatch.setattr(Part, "load", lambda part, *place: loaded.append(part.architecture) or load(part, *place))
    threads = [threading.Thread(target=lambda: pipes.append(slipstream.load(folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loaded) == ["AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel"]
    assert len({id(pipe.model.unet) for pipe in pipes}) == 1
    assert len(pipes) == 4


def test_loaded_weights_do_not_lie_in_the_file(tmp_path: pathlib.Path) -> None:
    """A file that is written over must neither change nor crash a model in use."""
    path = Tiny("sd15").file(tmp_path / "model.safetensors")
    pipe = slipstream.load(path, prediction_type="epsilon")
    before = run(pipe)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    assert all(torch.equal(one, other) for one, other in zip(before, run(pipe)))


def test_prompt_embeddings_are_cached_and_safe_to_change() -> None:
    pipe = slipstream.load("pocket")
    cond = pipe.encode_text(["a blue ring", "a blue ring", ""])
    assert torch.equal(cond.context[0], cond.context[1])
    wanted = cond.context.clone()
    size = len(PROMPTS)
    cond.context.zero_()
    assert torch.equal(pipe.encode_text(["a blue ring", "a blue ring", ""]).context, wanted)
    assert len(PROMPTS) == size


class TestLongPrompts:
    def test_75_tokens_a_chunk_between_start_and_end(self) -> None:
        text = slipstream.load("pocket", device="cpu").text[0]
        start, end = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
        red, blue = (text.tokenizer(word, add_special_tokens=False).input_ids for word in ("red", "blue"))
        for count, chunks in ((0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3), (200, 3)):
            (ids,) = text.tokens([" ".join(["red"] * (count - 1) + ["blue"]) if count else ""])
            words = red * max(count - 1, 0) + (blue if count else [])
            assert ids.shape == (chunks, 77)
            for i, row in enumerate(ids.tolist()):
                cut = words[75 * i : 75 * (i + 1)]
                assert row == [start, *cut, end, *[text.tokenizer.pad_token_id] * (75 - len(cut))]

    @pytest.mark.parametrize("kind", ["sd15", "sdxl"])
    def test_chunks_are_encoded_apart_and_set_one_after_the_other(self, tmp_path: pathlib.Path, kind: str) -> None:
        pipe = slipstream.load(Tiny(kind).folder(tmp_path / "folder"), device="cpu")
        words = ["red", "circle", "on", "blue"] * 50
        long = pipe.encode_text([" ".join(words)])
        parts = [pipe.encode_text([" ".join(words[at : at + 75])]) for at in (0, 75, 150)]
        torch.testing.assert_close(long.context, torch.cat([p.context for p in parts], 1), atol=1e-5, rtol=1e-5)
        if kind == "sdxl":
            torch.testing.assert_close(long.pooled, parts[0].pooled, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_a_short_prompt_beside_a_long_one_is_as_alone(self) -> None:
        pipe = slipstream.load("pocket", device="cpu")
        prompts = ["a red circle", "a blue star " * 40]
        x, sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([4.0, 1.0])
        together = pipe.model(x, sigma, pipe.encode_text(prompts))
        for i, prompt in enumerate(prompts):
            alone = pipe.model(x[i : i + 1], sigma[i : i + 1], pipe.encode_text([prompt]))
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(
            together[1:], pipe.model(x[1:], sigma[1:], pipe.encode_text(["a blue star " * 25])), atol=1e-3
        )

    def test_padding_of_openclip_in_a_single_file(self, tmp_path: pathlib.Path) -> None:
        """OpenCLIP pads with token 0 whatever the tokenizer says."""
        pipe = slipstream.load(Tiny("sd2").file(tmp_path / "m.safetensors"), device="cpu", prediction_type="epsilon")
        (ids,) = pipe.text[0].tokens(["red " * 80])
        assert ids[1, -1] == 0
        assert ids[0, -1] == pipe.text[0].tokenizer.eos_token_id


def test_a_sharded_and_an_fp16_folder(tmp_path: pathlib.Path) -> None:
    tiny = Tiny("sd15")
    folder = tiny.folder(tmp_path / "folder")
    wanted = run(slipstream.load(folder))
    shutil.rmtree(folder / "unet")
    tiny.unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    for one, other in zip(run(slipstream.load(folder)), wanted):
        assert torch.equal(one, other)


def test_text_weights_with_and_without_the_prefix_of_transformers_4(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    assert all(name.startswith("text_model.") for name in state)
    save_file({name.removeprefix("text_model."): tensor for name, tensor in state.items()}, path)
    bundled = slipstream.load("pocket").encode_text(PROMPT)
    assert torch.equal(slipstream.load(folder).encode_text(PROMPT).context, bundled.context)


def test_the_attention_names_of_old_vae_folders(tmp_path: pathlib.Path) -> None:
    folder = Tiny("sd15").folder(tmp_path / "folder")
    wanted = run(slipstream.load(folder))
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for new, old in renames.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in state.items()}
    assert any("proj_attn" in name for name in state)
    save_file(state, path)
    for one, other in zip(run(slipstream.load(folder)), wanted):
        assert torch.equal(one, other)


def test_the_few_step_student_lies_beside_its_teacher(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pocket"
    shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*_lcm"))
    monkeypatch.setattr("slipstream.core.loading.BUNDLED", folder)
    with pytest.raises(ValueError, match="no 'pocket-lcm'"):
        slipstream.load("pocket-lcm")
    shutil.copytree(folder / "unet", folder / "unet_lcm")
    shutil.copytree(folder / "scheduler", folder / "scheduler_lcm")
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    state["conv_out.bias"] += 1
    save_file(state, folder / "unet_lcm" / "diffusion_pytorch_model.safetensors")
    teacher, student = slipstream.load("pocket"), slipstream.load("pocket-lcm")
    assert student.vae is teacher.vae
    difference = student.model.unet.conv_out.bias - teacher.model.unet.conv_out.bias
    torch.testing.assert_close(difference, torch.ones(4), atol=1e-2, rtol=0)


class TestPrediction:
    def test_the_bundled_unet_is_found_to_predict_noise(self) -> None:
        assert checkpoint.probed_prediction(slipstream.load("pocket").model.unet) == "epsilon"

    def test_the_same_network_made_to_predict_velocity_is_found_out(self) -> None:
        """v = (alpha x - x0) / sigma in variance-preserving terms, from the network's own noise estimate."""
        unet = slipstream.load("pocket").model.unet

        class Velocity(torch.nn.Module):
            config, dtype, device = unet.config, unet.dtype, unet.device

            def forward(self, x, t, context, **kwargs):  # type: ignore[no-untyped-def]
                alpha = 0.0683
                sigma = (1 - alpha**2) ** 0.5
                eps = unet(x, t, context, **kwargs)[0]
                return (alpha * eps - sigma * (x - sigma * eps) / alpha,)

        assert checkpoint.probed_prediction(Velocity()) == "v_prediction"

    @pytest.mark.parametrize(
        ("metadata", "extra", "wanted"),
        [
            ({"modelspec.prediction_type": "v"}, {}, "v_prediction"),
            ({"modelspec.prediction_type": "epsilon"}, {}, "epsilon"),
            ({}, {"v_pred": torch.tensor([])}, "v_prediction"),
        ],
    )
    def test_what_a_file_states_counts(
        self, tmp_path: pathlib.Path, metadata: dict[str, str], extra: dict[str, torch.Tensor], wanted: str
    ) -> None:
        path = Tiny("sd15").file(tmp_path / "m.safetensors", {"format": "pt", **metadata}, **extra)
        pipe = slipstream.load(path)
        assert pipe.model.prediction.kind == wanted

    def test_zero_terminal_snr_is_stated_by_an_entry(self, tmp_path: pathlib.Path) -> None:
        path = Tiny("sd15").file(tmp_path / "m.safetensors", v_pred=torch.tensor([]), ztsnr=torch.tensor([]))
        assert slipstream.load(path).model.sigma_max > 4000

    def test_the_config_of_a_folder_counts(self, tmp_path: pathlib.Path) -> None:
        folder = Tiny("sd2").folder(tmp_path / "folder")
        schedule = {**SCHEDULE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
        model = slipstream.load(folder).model
        assert model.prediction.kind == "v_prediction"
        assert model.sigma_max > 4000


class TestVae:
    def test_a_tiny_autoencoder_as_folder_file_and_original_pair(
        self, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffusers import AutoencoderTiny

        monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
        torch.manual_seed(0)
        tiny = AutoencoderTiny().eval()
        tiny.save_pretrained(tmp_path / "taesd")
        state = tiny.state_dict()
        encoder = {n.removeprefix("encoder.layers."): t for n, t in state.items() if n.startswith("encoder.")}
        decoder = {n.removeprefix("decoder.layers."): t for n, t in state.items() if n.startswith("decoder.")}
        shifted = {f"{int(n.split('.', 1)[0]) + 1}.{n.split('.', 1)[1]}": t for n, t in decoder.items()}
        save_file(encoder, tmp_path / "taesd_encoder.safetensors")
        save_file(shifted, tmp_path / "taesd_decoder.safetensors")
        image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
        # A tiny autoencoder works on the latents as the UNet has them: no scaling factor, no posterior.
        wanted = tiny.encode(image.movedim(-1, 1) * 2 - 1).latents
        for path in ("taesd", "taesd/diffusion_pytorch_model.safetensors", "taesd_decoder.safetensors"):
            pipe = slipstream.load("pocket", vae=tmp_path / path)
            torch.testing.assert_close(pipe.encode_image(image), wanted, atol=1e-5, rtol=1e-5)
            decoded = (tiny.decode(wanted).sample.movedim(1, -1) + 1) / 2
            torch.testing.assert_close(pipe.decode(wanted), decoded.clamp(0, 1), atol=1e-5, rtol=1e-5)
            assert pipe.downscale == 8
        assert not caplog.text  # no word about a config that is as diffusers wrote it

    def test_an_original_vae_file_with_and_without_prefix(self, tmp_path: pathlib.Path) -> None:
        tiny = Tiny("sd15")
        folder = slipstream.load(tiny.folder(tmp_path / "folder"))
        state = {n: t.contiguous() for n, t in tiny.original().items() if n.startswith(checkpoint.VAE)}
        save_file(state, tmp_path / "prefixed.safetensors")
        save_file({n.removeprefix(checkpoint.VAE): t for n, t in state.items()}, tmp_path / "bare.safetensors")
        image = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(1))
        for name in ("prefixed", "bare"):
            pipe = slipstream.load("pocket", vae=tmp_path / f"{name}.safetensors")
            torch.testing.assert_close(pipe.encode_image(image), folder.encode_image(image), atol=1e-5, rtol=1e-5)

    def test_one_of_another_kind_is_refused(self, tmp_path: pathlib.Path) -> None:
        from diffusers import AutoencoderKL

        AutoencoderKL(latent_channels=16, norm_num_groups=32).save_pretrained(tmp_path / "vae16")
        with pytest.raises(ValueError, match="VAE with 4 latent channels for this model, but got 16"):
            slipstream.load("pocket", vae=tmp_path / "vae16")

    def test_odd_sizes_and_wrong_latents_are_refused(self) -> None:
        pipe = slipstream.load("pocket")
        with pytest.raises(ValueError, match="divisible by 8, but got 65 x 64"):
            pipe.encode_image(torch.zeros(1, 65, 64, 3))
        with pytest.raises(ValueError, match="latents"):
            pipe.decode(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match="finite"):
            pipe.decode(torch.full((1, 4, 8, 8), torch.nan))

    def test_a_long_clip_is_decoded_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = slipstream.load("pocket")
        latents = torch.randn(5, 4, 4, 6, generator=torch.Generator().manual_seed(0))
        whole = pipe.decode(latents)
        monkeypatch.setattr("slipstream.core.pipeline.VAE_PIXELS", 2 * 32 * 48)
        torch.testing.assert_close(pipe.decode(latents), whole, atol=1e-5, rtol=1e-5)
        assert whole.shape == (5, 32, 48, 3)


class TestBadInput:
    @pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
    def test_a_pickle_is_refused_before_it_is_opened(self, tmp_path: pathlib.Path, suffix: str) -> None:
        with pytest.raises(ValueError, match="pickle runs whatever code"):
            slipstream.load(tmp_path / f"model{suffix}")

    def test_a_folder_of_pickles_is_refused(self, tmp_path: pathlib.Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(BUNDLED, folder)
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        path.rename(path.with_suffix(".bin"))
        with pytest.raises(ValueError, match="pickle"):
            slipstream.load(folder)

    def test_missing(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(FileNotFoundError, match="Check the path"):
            slipstream.load(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError, match="Check the path"):
            slipstream.load(tmp_path / "nothing.safetensors")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"model_index\.json"):
            slipstream.load(tmp_path / "empty")

    @pytest.mark.parametrize(
        "content", [b"", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
    )
    def test_not_safetensors(self, tmp_path: pathlib.Path, content: bytes) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged, cut short or of another format"):
            slipstream.load(path)

    def test_cut_short(self, tmp_path: pathlib.Path) -> None:
        path = Tiny("sd15").file(tmp_path / "model.safetensors")
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="cut short"):
            slipstream.load(path)
        folder = tmp_path / "model"
        shutil.copytree(BUNDLED, folder)
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="cut short"):
            slipstream.load(folder)

    def test_config_and_weights_that_differ(self, tmp_path: pathlib.Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(BUNDLED, folder)
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 96}))
        with pytest.raises(ValueError, match="of different models"):
            slipstream.load(folder)
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
        with pytest.raises(ValueError, match="another model or incomplete"):
            slipstream.load(folder)
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
        with pytest.raises(ValueError, match="inpainting"):
            slipstream.load(folder)
        (folder / "unet" / "config.json").write_text("{")
        with pytest.raises(ValueError, match="JSON"):
            slipstream.load(folder)
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "FluxTransformer2DModel"}))
        with pytest.raises(ValueError, match=r"Load an SD1\.5, SD2\.x or SDXL model"):
            slipstream.load(folder)

    def test_an_inpainting_model(self, tmp_path: pathlib.Path) -> None:
        state = Tiny("sd15").original()
        name = checkpoint.UNET + "input_blocks.0.0.weight"
        state[name] = torch.zeros(32, 9, 3, 3)
        save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "inpaint.safetensors")
        with pytest.raises(ValueError, match="inpainting"):
            slipstream.load(tmp_path / "inpaint.safetensors")

    def test_no_tokenizer_spoils_only_the_prompts(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
        path = Tiny("sd15").file(tmp_path / "model.safetensors")
        shutil.rmtree(tmp_path / "tokenizer")
        pipe = slipstream.load(path, prediction_type="epsilon")
        with pytest.raises(ValueError, match="`tokenizer=`"):
            pipe.encode_text(["a prompt"])
        assert pipe.encode_image(torch.zeros(1, 32, 32, 3)).shape == (1, 4, 8, 8)
        named = slipstream.load(path, prediction_type="epsilon", tokenizer=BUNDLED / "tokenizer")
        handed = slipstream.load(path, prediction_type="epsilon", tokenizer=named.text[0].tokenizer)
        assert torch.equal(named.encode_text(PROMPT).context, handed.encode_text(PROMPT).context)

    def test_a_tokenizer_in_the_local_hub_cache(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = Tiny("sd15").file(tmp_path / "model.safetensors")
        shutil.rmtree(tmp_path / "tokenizer")
        cached = str(BUNDLED / "tokenizer" / "vocab.json")
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: cached)
        assert slipstream.load(path, prediction_type="epsilon").encode_text(PROMPT).rows == 2

    def test_a_tokenizer_of_another_model(self, tmp_path: pathlib.Path) -> None:
        pipe = slipstream.load("pocket")
        pipe.text[0].encoder.config.vocab_size, kept = 10, pipe.text[0].encoder.config.vocab_size
        try:
            with pytest.raises(ValueError, match="Give the tokenizer that belongs to this model"):
                pipe.text[0].tokens(["a red circle"])
        finally:
            pipe.text[0].encoder.config.vocab_size = kept
        (tmp_path / "tokenizer").mkdir()
        with pytest.raises(FileNotFoundError, match="CLIP tokenizer"):
            slipstream.load("pocket", tokenizer=tmp_path / "tokenizer")

    def test_prompts_are_a_list(self) -> None:
        pipe = slipstream.load("pocket")
        for prompts in ("a red circle", []):
            with pytest.raises(ValueError, match="`prompts`"):
                pipe.encode_text(prompts)

    def test_device_and_dtype(self) -> None:
        with pytest.raises(ValueError, match="bfloat16"):
            slipstream.load("pocket", device="cpu", dtype=torch.float16)
        with pytest.raises(ValueError, match="`dtype`"):
            slipstream.load("pocket", dtype="int8")
        with pytest.raises(ValueError, match="`prediction_type`"):
            slipstream.load("pocket", prediction_type="noise")
        for device in ("abacus", "cuda:77"):
            with pytest.raises(ValueError, match="`device`"):
                slipstream.load("pocket", device=device)

    def test_a_failed_load_leaves_the_cache_as_it_was(self, tmp_path: pathlib.Path) -> None:
        size, used = len(MODELS), MODELS.used()
        path = tmp_path / "model.safetensors"
        path.write_bytes(b"broken")
        with pytest.raises(ValueError):
            slipstream.load(path)
        assert (len(MODELS), MODELS.used()) == (size, used)
        assert slipstream.load("pocket").encode_text([""]).rows == 1


def test_levels_are_asked_as_the_host_asks_them_with_quantize() -> None:
    exact, rounded = (slipstream.load("pocket", device="cpu", quantize=q) for q in (False, True))
    assert rounded.model.unet is exact.model.unet
    sigma = torch.tensor([0.7, 3.3])
    assert rounded.model.network_time(sigma).tolist() == exact.model.network_time(sigma).round().tolist()
    assert bool((exact.model.network_time(sigma).frac() > 0).all())
