"""Test-only nodes for editing: tiny native models with weights made in inference mode, patches, and a look at features."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch


def ours(name: str) -> Any:
    for module in list(sys.modules.values()):
        mapping = vars(module).get("NODE_CLASS_MAPPINGS")
        if isinstance(mapping, dict) and "SlipstreamLoadModel" in mapping and hasattr(module, "WEB_DIRECTORY"):
            return importlib.import_module(f"{module.__name__}.{name}")
    raise RuntimeError("the pack is not loaded")


# SD1.5 has four levels, SDXL three with many transformers each; both at a hundredth of the width.
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [1] * 4,
        "transformer_depth": [1, 1, 1, 0],
        "transformer_depth_output": [1] * 6 + [0] * 2,
        "transformer_depth_middle": 1,
    },
    "sdxl": {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [1] * 3,
        "transformer_depth": [0, 1, 2],
        "transformer_depth_output": [0, 0, 1, 1, 2, 2],
        "transformer_depth_middle": 2,
    },
}

# An inpaint model: the mask and the masked image are further channels.
SHAPES["inpaint"] = {**SHAPES["sd15"], "in_channels": 9}
# The same with SDXL's pooled text (64 wide, as the pocket model's CLIP has it) and six image sizes of 256 values each.
SHAPES["sdxl_pooled"] = {**SHAPES["sdxl"], "num_classes": "sequential", "adm_in_channels": 64 + 6 * 256}


class TinyNative:
    """A MODEL of a family's shape with random weights, made in inference mode as stock loaders do."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"shape": (list(SHAPES),), "dtype": (["float32", "float8"],)}}

    def make(self, shape: str, dtype: str) -> tuple[Any]:
        import comfy.model_base
        import comfy.model_management
        import comfy.model_patcher
        import comfy.supported_models

        pooled = shape == "sdxl_pooled"
        family = comfy.supported_models.SDXL if pooled else comfy.supported_models.SD15

        class Config(family):  # type: ignore[misc,valid-type]
            unet_config: dict[str, Any] = {}
            unet_extra_config: dict[str, Any] = {}

        unet = {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "context_dim": 64, "num_heads": 2,
            "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": shape != "sd15",
            "dtype": torch.float32, **{k: list(v) if isinstance(v, list) else v for k, v in SHAPES[shape].items()},
        }  # fmt: skip
        config = Config(unet)
        config.unet_config = unet
        assert torch.is_inference_mode_enabled()
        base = comfy.model_base.SDXL if pooled else comfy.model_base.BaseModel
        model = base(config, device="cpu")
        if shape == "inpaint":
            model.set_inpaint()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.diffusion_model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
            if dtype == "float8" and parameter.ndim == 2:
                parameter.data = parameter.data.to(torch.float8_e4m3fn)
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(model, device, device),)


class PatchAttention:
    """A MODEL whose attention another node has patched: attn1 replaced in the decoder, or attn2 output scaled."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "kind": (["attn1_replace", "attn2_output", "freeu"],)}}

    def patch(self, model: Any, kind: str) -> tuple[Any]:
        model = model.clone()
        if kind == "attn1_replace":
            model.set_model_attn1_replace(lambda q, k, v, extra: q, "output", 1)
        elif kind == "attn2_output":
            model.set_model_attn2_output_patch(lambda n, extra: n * 3)
        else:
            model.set_model_output_block_patch(lambda h, skip, options: (h * 1.5, skip))
        return (model,)


class TextBoxes(torch.nn.Module):
    """Stands in for a GLIGEN network: what it adds between the attentions depends on the position of a box."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.full((1,), 0.5))

    def set_position(self, shape: Any, boxes: Any, device: Any) -> Any:
        return lambda x, extra: x + self.gate.to(x) * x.roll(boxes, 1)

    def set_empty(self, shape: Any, device: Any) -> Any:
        return lambda x, extra: x


class Gligen:
    """A CONDITIONING with a GLIGEN text box, as the stock node leaves it."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "box": ("INT", {"default": 1})}}

    def make(self, conditioning: Any, box: int) -> Any:
        import comfy.model_management as management
        import comfy.model_patcher

        device = management.get_torch_device()
        patcher = comfy.model_patcher.ModelPatcher(TextBoxes(), device, device)
        return ([[text, {**rest, "gligen": ("position", patcher, box)}] for text, rest in conditioning],)


class LookAtFeatures:
    """Compares the MODEL's features with those of its own modules, and their gradient with finite differences."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "look", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), "checkpoint": ("BOOLEAN",)}}

    def look(self, model: Any, positive: Any, checkpoint: bool) -> Any:
        edit_model, session_module = ours("nodes.host.edit_model"), ours("nodes.host.session")

        def work(session: Any) -> dict[str, Any]:
            made = edit_model.HostEditModel(session.denoiser, model)
            cond = session.conds["positive"]
            with torch.inference_mode(False), torch.no_grad():
                x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
                sigma = torch.tensor([2.0])
                plain = made.features(x, sigma, cond)
                seen: list[Any] = []
                handles = [
                    made.network.output_blocks[i][-1].register_forward_hook(lambda m, a, out: seen.append(out)) for i in made.blocks[-2:]
                ]  # fmt: skip
                session.denoiser(x, sigma, cond)
                for handle in handles:
                    handle.remove()
            direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

            def value(at: Any) -> Any:
                return sum(f.double().square().mean() for f in made.features(at, sigma, cond, checkpoint=checkpoint))

            with torch.inference_mode(False), torch.enable_grad():
                at = x.clone().requires_grad_(True)
                (gradient,) = torch.autograd.grad(value(at), at)

            def kept(checkpoint: bool) -> int:
                """The bytes of activations that a gradient through the features keeps."""
                sizes: dict[int, int] = {}
                pack = lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t  # noqa: E731
                with (
                    torch.inference_mode(False),
                    torch.enable_grad(),
                    torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
                ):
                    made.features(x.clone().requires_grad_(True), sigma, cond, checkpoint=checkpoint)
                return sum(sizes.values())

            classes = [type(m) for m in made.network.modules()]
            saved = [kept(False), kept(True)]
            assert classes == [type(m) for m in made.network.modules()]
            with torch.inference_mode(False), torch.no_grad():
                step = 1e-2
                difference = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
            layers: list[str] = []

            def hook(layer: str, q: Any, k: Any, v: Any, attend: Any) -> Any:
                layers.append(layer)
                return attend(q, k, v)

            with torch.inference_mode(False), torch.no_grad():
                normal = made(x, sigma, cond)
                with made.self_attention(hook):
                    hooked = made(x, sigma, cond)
            return {
                "shapes": [list(f.shape) for f in plain],
                "same": all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, seen)),
                "analytic": float((gradient * direction).sum()),
                "numeric": float(difference),
                "layers": sorted(set(layers)),
                "unchanged": float((normal - hooked).abs().max()),
                "calls": made.calls,
                "saved": saved,
            }

        report = session_module.run_on_model(model, {"samples": torch.zeros(1, 4, 16, 16)}, work, positive=positive)
        return {"ui": {"report": [json.dumps(report)]}}


class CountPreparations:
    """How often one run of Edit prepares the edit, places a task and draws the cut-and-paste."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "count", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = {"model": "MODEL", "vae": "VAE", "inversion": "SLIPSTREAM_INVERSION", "tasks": "SLIPSTREAM_EDIT"}
        return {
            "required": {k: (v,) for k, v in {**names, "positive": "CONDITIONING", "negative": "CONDITIONING"}.items()}
        }

    def count(self, **inputs: Any) -> Any:
        guided, placing, nodes = ours("edit.guided"), ours("edit.placing"), ours("nodes.edit")
        counts: dict[str, int] = {}
        real = {
            (m, name): getattr(m, name) for m, name in ((guided, "GuidedEdit"), (placing, "place"), (placing, "draft"))
        }

        def counting(name: str, call: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                counts[name] = counts.get(name, 0) + 1
                return call(*args, **kwargs)

            return run

        for (module, name), call in real.items():
            setattr(module, name, counting(name, call))
        try:
            nodes.EditSampler().edit(**inputs, seed=0, cfg=2.0, guidance=0.1, hold_object=0.5, hold_fill=0.4, noise=0.4,
                                     feather=4, low_memory=False)  # fmt: skip
        finally:
            for (module, name), call in real.items():
                setattr(module, name, call)
        return {"ui": {"report": [json.dumps(counts)]}}


NODES = {
    "ProbeTinyNative": TinyNative,
    "ProbePatchAttention": PatchAttention,
    "ProbeFeatures": LookAtFeatures,
    "ProbeGligen": Gligen,
    "ProbeCountPreparations": CountPreparations,
}
