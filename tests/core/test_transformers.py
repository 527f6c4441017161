"""Flow transformers of diffusers: a folder loads with its text encoder, and gives what diffusers' own pipeline gives."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import slipstream
import torch
from slipstream.core import FLOW, Denoiser
from slipstream.core.folder import read_folder
from slipstream.core.loading import BUNDLED
from slipstream_tests import denoiser_contract as contract
from slipstream_tests.core.checkpoints import VOCABULARY, randomise
from slipstream_tests.denoiser_contract import CONTRACT
from torch import Tensor

WORDS = ["a", "red", "circle", "on", "blue", "background", "large", "green", "square", "the", "quick", "user", "system"]
PROMPTS = ["a red circle on a blue background", "a large green square"]
CHAT = "{% for message in messages %}user {{ message.content }} {% endfor %}system"


def words_tokenizer(chat: str | None = None) -> Any:
    """A tokenizer with a token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.padding_side, fast.chat_template = "right", chat
    return fast


def make_vae(channels: int = 16, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.3611,
        shift_factor=0.1159, mid_block_add_attention=False, **more,
    )  # fmt: skip


def lumina(clip: bool = False) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, Gemma2Config, Gemma2Model

    if clip:
        text: Any = CLIPTextModel.from_pretrained(BUNDLED / "text_encoder")
        tokenizer: Any = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    else:
        text = Gemma2Model(
            Gemma2Config(
                vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=32, num_hidden_layers=3, head_dim=8,
                num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=8,
            )
        )  # fmt: skip
        tokenizer = words_tokenizer()
    network = Lumina2Transformer2DModel(
        sample_size=16, in_channels=16, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 8, 8), axes_lens=(300, 64, 64),
        cap_feat_dim=text.config.hidden_size,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return {
        "transformer": network,
        "text_encoder": text,
        "tokenizer": tokenizer,
        "scheduler": scheduler,
        "vae": make_vae(),
    }


def z_image() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    text = Qwen3Model(
        Qwen3Config(
            vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=32, num_hidden_layers=3, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    network = ZImageTransformer2DModel(
        in_channels=16, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 8, 8], axes_lens=[128, 64, 64],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {
        "transformer": network, "text_encoder": text, "tokenizer": words_tokenizer(CHAT), "scheduler": scheduler,
        "vae": make_vae(),
    }  # fmt: skip


def clip(projection: bool, width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=width, eos_token_id=2,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(WORDS) + 3, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    )


def sd3() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTokenizer

    network = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=24, out_channels=16, pos_embed_max_size=16,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    words = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    return {
        "transformer": network, "text_encoder": clip(True, 8), "text_encoder_2": clip(True, 16), "text_encoder_3": t5(),
        "tokenizer": words, "tokenizer_2": words, "tokenizer_3": words_tokenizer(), "vae": make_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip


def flux(guidance: bool = True) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTokenizer

    network = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=8, guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    words = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    return {
        "transformer": network, "text_encoder": clip(False, 8), "text_encoder_2": t5(), "tokenizer": words,
        "tokenizer_2": words_tokenizer(), "vae": make_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip


def qwen_image() -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(WORDS) + 3, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    network = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return {
        "transformer": network, "tokenizer": words_tokenizer(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eyes)),
        "vae": vae,
    }  # fmt: skip


PIPELINES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "lumina2": ("Lumina2Pipeline", lumina),
    "z-image": ("ZImagePipeline", z_image),
    "sd3": ("StableDiffusion3Pipeline", sd3),
    "flux dev": ("FluxPipeline", flux),
    "flux schnell": ("FluxPipeline", lambda: flux(guidance=False)),
    "qwen-image": ("QwenImagePipeline", qwen_image),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[pathlib.Path, Any]]:
    """Each family's folder, and the pipeline of diffusers that it was saved from."""
    import diffusers

    made = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, (pipeline, parts) in PIPELINES.items():
            modules = parts()
            for module in modules.values():
                if isinstance(module, torch.nn.Module):
                    randomise(module)
                    module.eval()
            path = tmp_path_factory.mktemp(name)
            pipe = getattr(diffusers, pipeline)(**modules)
            pipe.save_pretrained(path)
            made[name] = path, pipe
    return made


@pytest.fixture(scope="module")
def pipes(folders: dict[str, tuple[pathlib.Path, Any]]) -> dict[str, slipstream.core.Pipeline]:
    return {name: slipstream.load(path, "cpu") for name, (path, _) in folders.items()}


def own_prompt(theirs: Any, prompt: str) -> Tensor:
    """Return diffusers' embeddings (T, D) of a prompt without padding."""
    kind = type(theirs).__name__
    if kind == "Lumina2Pipeline":
        embeddings, mask = theirs._get_gemma_prompt_embeds(prompt, "cpu")
        return embeddings[0][mask[0].bool()]
    if kind == "ZImagePipeline":
        return theirs.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[0][0]
    if kind == "QwenImagePipeline":
        embeddings, mask = theirs._get_qwen_prompt_embeds(prompt, "cpu")
        return embeddings[0][mask[0].bool()]
    more = {"prompt_3": None, "do_classifier_free_guidance": False} if kind == "StableDiffusion3Pipeline" else {}
    return theirs.encode_prompt(prompt, prompt_2=None, device="cpu", **more)[0][0]


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_prompts_are_those_of_diffusers(folders: Any, pipes: Any, name: str) -> None:
    cond = pipes[name].encode_text(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        wanted = own_prompt(folders[name][1], prompt)
        torch.testing.assert_close(cond.context[i][cond.counted[i]], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_a_sampling_is_that_of_diffusers(folders: Any, pipes: Any, name: str) -> None:
    """Euler over the pipeline's own levels from the same noise: network, sign, time, text, VAE and its shift."""
    pipe, theirs = pipes[name], folders[name][1]
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = pipe.encode_text(PROMPTS[:1])
    given: dict[str, Any] = {"prompt": PROMPTS[:1], "latents": noise.clone(), "guidance_scale": 1.0}
    if name == "lumina2":  # its pipeline would put a system prompt before ours
        embeddings = own_prompt(theirs, PROMPTS[0])[None]
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
        given |= {"prompt": None, "prompt_embeds": embeddings, "prompt_attention_mask": mask}
    if name == "z-image":  # counts from 0
        given["guidance_scale"] = 0.0
    if name.startswith("flux"):
        given |= {"latents": theirs._pack_latents(noise, 1, 16, 8, 8), "guidance_scale": 3.5}
    if name == "qwen-image":
        given |= {"latents": theirs._pack_latents(noise, 1, 16, 8, 8), "true_cfg_scale": 1.0}
        del given["guidance_scale"]
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(height=64, width=64, num_inference_steps=3, output_type="pt", **given).images
    sigmas = theirs.scheduler.sigmas
    x = slipstream.core.samplers.euler(
        lambda x, sigma: pipe.model(x, sigma.expand(len(x)), cond), noise, sigmas, pipe.model.space
    )
    torch.testing.assert_close(pipe.decode(x).movedim(-1, 1), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", PIPELINES)
def test_levels_are_those_of_the_scheduler(folders: Any, pipes: Any, name: str) -> None:
    scheduler = folders[name][1].scheduler
    scheduler.set_timesteps(7)
    model = pipes[name].model
    assert model.space is FLOW
    inner = scheduler.sigmas[:-1]
    shift = scheduler.config.shift
    wanted = 1000 * inner / (shift - (shift - 1) * inner)
    torch.testing.assert_close(model.levels.sigma_to_t(inner), wanted, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", PIPELINES)
def test_contract(pipes: Any, name: str, check: Callable[..., None]) -> None:
    model, cond = pipes[name].model, pipes[name].encode_text(PROMPTS)
    assert isinstance(model, Denoiser)
    other = {"other": cond.take([1])} if check is contract.conditioning_is_batched else {}
    check(model, cond.take([0]), (16, 8, 8), **other)


@torch.no_grad()
def test_four_rows_at_four_levels_are_four_calls(pipes: Any) -> None:
    """Prompts of unequal length in one call: no row sees another's padding."""
    for pipe in pipes.values():
        cond = pipe.encode_text(
            ["a red circle", "a large green square on a blue background", "a", "the quick red circle"]
        )
        x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        sigma = torch.tensor([0.95, 0.7, 0.4, 0.1])
        together = pipe.model(x, sigma, cond)
        for i in range(4):
            alone = pipe.model(x[i : i + 1], sigma[i : i + 1], cond.take([i]))
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_odd_sizes_are_padded(pipes: Any) -> None:
    for pipe in pipes.values():
        x = torch.randn(1, 16, 7, 9, generator=torch.Generator().manual_seed(1))
        cond, sigma = pipe.encode_text(PROMPTS[:1]), torch.tensor([0.5])
        padded = torch.nn.functional.pad(x, (0, 1, 0, 1), mode="circular")
        assert torch.equal(pipe.model(x, sigma, cond), pipe.model(padded, sigma, cond)[..., :7, :9])


def test_latents_have_the_shift_of_the_vae(pipes: Any, folders: Any) -> None:
    image = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(0))
    for name, pipe in pipes.items():
        vae, x = folders[name][1].vae, image.movedim(-1, 1) * 2 - 1
        with torch.no_grad():
            if name == "qwen-image":
                code = vae.encode(x[:, :, None]).latent_dist.mode()[:, :, 0]
                mean, deviation = (
                    torch.tensor(each)[:, None, None] for each in (vae.config.latents_mean, vae.config.latents_std)
                )
                wanted = (code - mean) / deviation
            else:
                wanted = (vae.encode(x).latent_dist.mode() - 0.1159) * 0.3611
        torch.testing.assert_close(pipe.encode_image(image), wanted, atol=1e-5, rtol=1e-5)


def test_clip_as_the_text_encoder_of_a_lumina_model(tmp_path: pathlib.Path) -> None:
    """A small model may read its prompts with CLIP: in chunks of 77 tokens, all of which count."""
    modules = lumina(clip=True)
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        modules[name].save_pretrained(tmp_path / name)
    shutil.copytree(BUNDLED / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
    pipe = slipstream.load(tmp_path, "cpu")
    cond = pipe.encode_text(PROMPTS)
    assert cond.context.shape == (2, 77, 64)
    assert torch.equal(cond.context, slipstream.load("pocket", "cpu").encode_text(PROMPTS).context)
    assert torch.isfinite(pipe.model(torch.zeros(2, 16, 8, 8), torch.tensor([1.0, 0.1]), cond)).all()


def test_the_template_of_qwen_image_is_dropped_but_for_its_end(pipes: Any) -> None:
    conds = [pipes["qwen-image"].encode_text([text]).context for text in ("a", "a red circle", "a red square")]
    assert conds[1].shape[1] - conds[0].shape[1] == 2
    assert not torch.allclose(conds[1], conds[2])


def test_sd3_without_t5(folders: Any, tmp_path: pathlib.Path) -> None:
    """Folders come without the largest text encoder: its tokens are zeros, as in diffusers."""
    path = shutil.copytree(folders["sd3"][0], tmp_path / "model", ignore=shutil.ignore_patterns("*_3"))
    cond = slipstream.load(path, "cpu").encode_text(PROMPTS[:1])
    with torch.no_grad():
        whole = own_prompt(folders["sd3"][1], PROMPTS[0])
    torch.testing.assert_close(cond.context[0, :77], whole[:77], atol=1e-5, rtol=1e-5)
    assert cond.context.shape == (1, *whole.shape)
    assert not cond.context[0, 77:].any()


def test_the_guidance_of_flux_is_a_part_of_the_conditioning(pipes: Any) -> None:
    pipe = pipes["flux dev"]
    cond = pipe.encode_text(PROMPTS)
    x, sigma = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
    guided = dataclasses.replace(cond, extra={"guidance": torch.tensor([3.5, 1.0])})
    with torch.no_grad():
        plain, rows = pipe.model(x, sigma, cond), pipe.model(x, sigma, guided)
    assert torch.equal(plain[0], rows[0])
    assert not torch.allclose(plain[1], rows[1], atol=1e-3)


def test_the_shift_that_depends_on_the_size_is_that_of_the_largest_image(folders: Any, tmp_path: pathlib.Path) -> None:
    path = shutil.copytree(folders["flux schnell"][0], tmp_path / "model")
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dynamic_shifting": True, "max_shift": 1.15}))
    assert slipstream.load(path, "cpu").model.levels.shift == pytest.approx(3.158, abs=1e-3)


class TestBadInput:
    @pytest.fixture
    def folder(self, folders: Any, tmp_path: pathlib.Path) -> pathlib.Path:
        return shutil.copytree(folders["lumina2"][0], tmp_path / "model")

    def refused(self, folder: pathlib.Path, match: str, **load: Any) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
            slipstream.load(folder, "cpu", **load)
        assert str(error.value).startswith("Expected ")

    def change(self, path: pathlib.Path, **fields: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def test_a_scheduler_of_another_kind(self, folder: pathlib.Path) -> None:
        self.change(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
        self.refused(folder, "FlowMatchEulerDiscreteScheduler.*DDIMScheduler")

    def test_another_prediction(self, folder: pathlib.Path) -> None:
        self.refused(folder, "'flow' or None for a Lumina2 model, but got 'epsilon'", prediction_type="epsilon")

    def test_a_vae_of_another_family(self, folder: pathlib.Path) -> None:
        self.refused(folder, "16 latent channels for this model, but got 4", vae=BUNDLED / "vae")

    def test_a_text_encoder_of_another_family(self, folder: pathlib.Path) -> None:
        self.change(folder / "text_encoder" / "config.json", architectures=["Qwen3Model"])
        self.refused(folder, "Gemma2Model.*Qwen3Model")

    def test_no_tokenizer(self, folder: pathlib.Path) -> None:
        shutil.rmtree(folder / "tokenizer")
        self.refused(folder, "Expected a tokenizer .*Copy it from the folder of the model")

    def test_a_network_that_is_not_known(self, folder: pathlib.Path) -> None:
        self.change(folder / "transformer" / "config.json", _class_name="WanTransformer3DModel")
        self.refused(folder, "Lumina2Transformer2DModel.*a Lumina2Pipeline with a")

    def test_extra_channels(self, folder: pathlib.Path) -> None:
        self.change(folder / "transformer" / "config.json", in_channels=32, out_channels=16)
        self.refused(folder, "as many channels in as out, but got 32")

    def test_a_vae_of_videos_belongs_to_one_family(self, folder: pathlib.Path, folders: Any) -> None:
        self.refused(
            folder,
            "AutoencoderKL or AutoencoderTiny in .* but got AutoencoderKLQwenImage",
            vae=folders["qwen-image"][0] / "vae",
        )
        self.refused(folders["qwen-image"][0], "AutoencoderKLQwenImage in .* but got AutoencoderKL", vae=folder / "vae")

    def test_a_layered_qwen_image(self, folders: Any, tmp_path: pathlib.Path) -> None:
        path = shutil.copytree(folders["qwen-image"][0], tmp_path / "layered")
        self.change(path / "transformer" / "config.json", use_additional_t_cond=True)
        self.refused(path, "`use_additional_t_cond`")

    def test_without_the_list_of_transformers_it_is_no_folder(self, folder: pathlib.Path) -> None:
        with pytest.raises(ValueError, match="a Lumina2Pipeline with a"):
            read_folder(folder)
