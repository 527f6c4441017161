"""One reader of diffusers folders: weight files, levels and prediction, and one sentence for every folder that is no SD UNet."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import diffusers
import pytest
import slipstream
import torch
from safetensors.torch import load_file, save_file
from slipstream.core.folder import TABLE_SCHEDULERS, prediction_of, read_folder, read_vae, weight_files
from slipstream.core.loading import BUNDLED
from slipstream.core.schedules import DiscreteLevels, alphas_cumprod_of


@pytest.fixture
def pocket(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the bundled folder, without the student."""
    return shutil.copytree(BUNDLED, tmp_path / "model", ignore=shutil.ignore_patterns("*_lcm"))


def change(path: pathlib.Path, **fields: Any) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**config, **fields}.items() if v != "remove"}))


def sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text.startswith("Expected ")
    assert "\n" not in text
    return text


class TestLevels:
    # Two of them need packages that the project does not have.
    @pytest.mark.parametrize("name", sorted(TABLE_SCHEDULERS - {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}))
    def test_the_table_of_every_scheduler_is_that_of_diffusers(self, name: str) -> None:
        """With the settings of its class, and with none written down at all."""
        cls = getattr(diffusers, name)
        scheduler = cls()
        for config in (dict(scheduler.config), {"_class_name": name}):
            config.pop("rescale_betas_zero_snr", None)
            torch.testing.assert_close(
                alphas_cumprod_of(config), scheduler.alphas_cumprod.float(), atol=1e-6, rtol=1e-4
            )
        assert prediction_of({**scheduler.config, "_class_name": name}) == "epsilon"

    @pytest.mark.parametrize(
        "config",
        [{"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
         {"trained_betas": [0.1, 0.2, 0.3], "beta_schedule": "scaled_linear"}],
    )  # fmt: skip
    def test_other_tables(self, config: dict[str, Any]) -> None:
        wanted = diffusers.DDIMScheduler(**config).alphas_cumprod
        # abar falls by three digits in the last step of a cosine: compare its levels.
        sigmas = [DiscreteLevels(table).sigmas for table in (alphas_cumprod_of(config), wanted)]
        torch.testing.assert_close(sigmas[0], sigmas[1], atol=0, rtol=1e-3)

    @pytest.mark.parametrize(
        ("scheduler", "named"),
        [
            (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "FlowMatchEulerDiscreteScheduler"),
            (diffusers.FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler"),
            (diffusers.EDMEulerScheduler(), "EDMEulerScheduler"),
            (diffusers.EDMDPMSolverMultistepScheduler(), "EDMDPMSolverMultistepScheduler"),
            (diffusers.CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler"),
            (diffusers.IPNDMScheduler(), "IPNDMScheduler"),
            (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow_prediction"),
            (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas True"),
            (diffusers.EulerDiscreteScheduler(timestep_type="continuous", sigma_max=700.0), "timestep_type 'continuous'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_a_scheduler_of_another_kind_is_refused_by_name(
        self, pocket: pathlib.Path, scheduler: Any, named: str
    ) -> None:
        scheduler.save_config(pocket / "scheduler")
        with pytest.raises(ValueError, match="prediction_type") as error:
            slipstream.load(pocket, "cpu")
        assert named in sentence(error)

    @pytest.mark.parametrize(
        "fields", [{"_class_name": "MyScheduler"}, {"prediction_type": "flow"}, {"prediction_type": "v"}]
    )
    def test_unknown_names(self, pocket: pathlib.Path, fields: dict[str, str]) -> None:
        change(pocket / "scheduler" / "scheduler_config.json", **fields)
        with pytest.raises(ValueError, match=next(iter(fields.values()))) as error:
            read_folder(pocket)
        sentence(error)

    def test_an_unknown_beta_schedule(self, pocket: pathlib.Path) -> None:
        change(pocket / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")
        with pytest.raises(ValueError, match=r"`beta_schedule`.*'sigmoid'"):
            read_folder(pocket)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_prediction(self, pocket: pathlib.Path, kind: str) -> None:
        change(pocket / "scheduler" / "scheduler_config.json", prediction_type=kind)
        assert slipstream.load(pocket, "cpu").model.prediction.kind == kind


class TestWeightFiles:
    def files(self, folder: pathlib.Path, *names: str) -> list[str]:
        for name in names:
            (folder / name).write_bytes(b"")
        return [path.name for path in weight_files(folder)]

    @pytest.mark.parametrize(
        ("names", "wanted"),
        [
            (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
            (["model.fp16.safetensors", "model.non_ema.safetensors"], "model.fp16.safetensors"),
            (["model.fp32.safetensors", "model.fp16.safetensors"], "model.fp32.safetensors"),
            (["model.ema.safetensors", "pytorch_model.bin"], "model.ema.safetensors"),
            (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        ],
    )
    def test_full_precision_goes_first(self, tmp_path: pathlib.Path, names: list[str], wanted: str) -> None:
        assert self.files(tmp_path, *names) == [wanted]

    @pytest.mark.parametrize("variant", ["", ".fp16"])
    def test_shards(self, tmp_path: pathlib.Path, variant: str) -> None:
        names = [f"model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        index = {"weight_map": {"a": names[1], "b": names[0], "c": names[1]}}
        (tmp_path / f"model.safetensors.index{variant}.json").write_text(json.dumps(index))
        assert self.files(tmp_path, *names) == names
        (tmp_path / names[1]).unlink()
        with pytest.raises(FileNotFoundError, match=f"the shard .*{names[1]}"):
            weight_files(tmp_path)

    def test_full_shards_before_a_single_half(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-1-of-1.safetensors"}})
        )
        assert self.files(tmp_path, "model.fp16.safetensors", "model-1-of-1.safetensors") == [
            "model-1-of-1.safetensors"
        ]

    def test_pickles_and_nothing(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(FileNotFoundError, match="found none"):
            weight_files(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"found only other\.safetensors"):
            self.files(tmp_path, "other.safetensors")
        with pytest.raises(ValueError, match="pickle"):
            self.files(tmp_path, "diffusion_pytorch_model.bin")

    def test_the_file_that_is_read_is_the_full_one(self, pocket: pathlib.Path) -> None:
        path = pocket / "unet" / "diffusion_pytorch_model.safetensors"
        shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
        state = load_file(path)
        state["conv_out.bias"] += 1
        save_file(state, path)
        bias = slipstream.load(pocket, "cpu").model.unet.conv_out.bias
        torch.testing.assert_close(bias, state["conv_out.bias"].float())


PIPELINES = {
    "Flux2Pipeline": "Flux2Transformer2DModel",
    "ChromaPipeline": "ChromaTransformer2DModel",
    "AuraFlowPipeline": "AuraFlowTransformer2DModel",
    "HiDreamImagePipeline": "HiDreamImageTransformer2DModel",
    "PixArtSigmaPipeline": "PixArtTransformer2DModel",
    "SanaPipeline": "SanaTransformer2DModel",
    "WanPipeline": "WanTransformer3DModel",
}


class TestOtherModels:
    @pytest.mark.parametrize("pipeline", PIPELINES)
    def test_a_pipeline_that_is_not_read_is_named(self, tmp_path: pathlib.Path, pipeline: str) -> None:
        index = {
            "_class_name": pipeline,
            "transformer": ["diffusers", PIPELINES[pipeline]],
            "scheduler": ["diffusers", "X"],
        }
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "transformer").mkdir()
        (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": PIPELINES[pipeline]}))
        with pytest.raises(ValueError) as error:
            slipstream.load(tmp_path)
        text = sentence(error)
        assert f"a {pipeline} with a {PIPELINES[pipeline]}" in text
        assert "SD1.5, SD2.x and SDXL" in text
        with pytest.raises(ValueError, match="It is a part of a model: give"):
            slipstream.load(tmp_path / "transformer")

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"_class_name": "UNetSpatioTemporalConditionModel"}, "UNetSpatioTemporalConditionModel"),
            ({"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
            ({"class_embed_type": "projection"}, "class_embed_type"),
            ({"num_class_embeds": 1000}, "num_class_embeds"),
            ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type"),
            ({"addition_embed_type": "image"}, "addition_embed_type"),
            ({"in_channels": 9}, "inpainting"),
        ],
    )
    def test_unets_of_other_kinds(self, pocket: pathlib.Path, fields: dict[str, Any], named: str) -> None:
        change(pocket / "unet" / "config.json", **fields)
        with pytest.raises(ValueError, match=named) as error:
            slipstream.load(pocket, "cpu")
        sentence(error)

    def test_other_text_encoders(self, pocket: pathlib.Path) -> None:
        change(pocket / "text_encoder" / "config.json", architectures=["T5EncoderModel"])
        with pytest.raises(ValueError, match="T5EncoderModel"):
            read_folder(pocket)

    @pytest.mark.parametrize("field", [{"shift_factor": 0.1}, {"latents_mean": [0.1, 0.0, 0.0, 0.0]}])
    def test_a_vae_that_shifts_its_latents(self, pocket: pathlib.Path, field: dict[str, Any]) -> None:
        change(pocket / "vae" / "config.json", **field)
        for run in (lambda: read_vae(pocket), lambda: slipstream.load("pocket", "cpu", vae=pocket)):
            with pytest.raises(ValueError, match=next(iter(field))) as error:
                run()
            sentence(error)

    @pytest.mark.parametrize("name", ["flux.gguf", "flux.safetensors"])
    def test_a_gguf_is_named_whatever_its_file_is_called(self, tmp_path: pathlib.Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ValueError, match="is a GGUF file of quantised weights") as error:
            slipstream.load(tmp_path / name)
        sentence(error)

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize(
        ("weight", "family"),
        [("double_blocks.0.img_attn.qkv.weight", "Flux"), ("joint_blocks.0.x.weight", "SD3"), ("cap_embedder.1.weight", "Lumina2"),
         ("txt_norm.weight", "Qwen-Image"), ("blocks.0.self_attn.q.weight", "Wan")],
    )  # fmt: skip
    def test_single_files_of_transformers_are_named(
        self, tmp_path: pathlib.Path, prefix: str, weight: str, family: str
    ) -> None:
        save_file({prefix + weight: torch.zeros(4, 4)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=family) as error:
            slipstream.load(tmp_path / "model.safetensors")
        sentence(error)


class TestPaths:
    def test_model_index_and_its_folder_are_one(self, pocket: pathlib.Path) -> None:
        one, other = slipstream.load(pocket, "cpu"), slipstream.load(pocket / "model_index.json", "cpu")
        assert one.model.unet is other.model.unet

    @pytest.mark.parametrize("part", ["unet", "vae", "tokenizer", "scheduler"])
    def test_a_part_of_a_model_names_the_whole(self, pocket: pathlib.Path, part: str) -> None:
        with pytest.raises(ValueError) as error:
            slipstream.load(pocket / part)
        assert sentence(error).endswith(f"give {pocket}.")

    def test_a_folder_around_a_model_names_it(self, pocket: pathlib.Path) -> None:
        hub = pocket.parent / "hub" / "snapshots"
        hub.mkdir(parents=True)
        pocket.rename(hub / "abc")
        for outer in (hub, hub.parent):
            with pytest.raises(ValueError) as error:
                slipstream.load(outer)
            assert sentence(error).endswith(f"Give {hub / 'abc'}.")

    def test_a_folder_of_single_files_names_one(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "sdxl.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"sdxl\.safetensors"):
            slipstream.load(tmp_path)

    def test_an_index_without_its_unet(self, pocket: pathlib.Path) -> None:
        shutil.rmtree(pocket / "unet")
        with pytest.raises(
            ValueError, match=r"StableDiffusionPipeline without its unet/config\.json: download the whole folder"
        ):
            slipstream.load(pocket)

    def test_a_missing_scheduler(self, pocket: pathlib.Path) -> None:
        shutil.rmtree(pocket / "scheduler")
        with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json"):
            slipstream.load(pocket)
