"""Test-only nodes that look at our adapters from inside a real host process; linked beside the pack by tests/host/conftest.py."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import pathlib
import sys
import time
import traceback
from typing import Any

import torch

from . import checkpoint_probe, edit_probe, flow_probe, guidance_probe, layers_probe

TESTS = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = {"model": ("MODEL",), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}


def pack() -> Any:
    """Return the pack's root package as the host loaded it, whatever the host named it."""
    for module in list(sys.modules.values()):
        mapping = vars(module).get("NODE_CLASS_MAPPINGS")
        if isinstance(mapping, dict) and "SlipstreamLoadModel" in mapping and hasattr(module, "WEB_DIRECTORY"):
            return module
    raise RuntimeError("the pack is not loaded")


def ours(name: str) -> Any:
    return importlib.import_module(f"{pack().__name__}.{name}")


def load(path: pathlib.Path) -> Any:
    sys.modules.setdefault("slipstream", pack())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Contract:
    """Runs every function of tests/denoiser_contract.py on a `HostDenoiser`; the report maps names to "ok" or a traceback."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**PROMPTS, "latent": ("LATENT",)}}

    def run(self, model: Any, positive: Any, negative: Any, latent: Any) -> Any:
        contract = load(TESTS / "denoiser_contract.py")
        session_module, gradients = ours("nodes.host.session"), ours("nodes.host.gradients")
        shape = tuple(latent["samples"].shape[1:])

        def work(session: Any) -> dict[str, str]:
            report = {"space": session.denoiser.space.name, "sigma_max": f"{session.denoiser.sigma_max:.4f}"}
            for test in contract.CONTRACT:
                more = {"other": session.conds["negative"]} if test.__name__ == "conditioning_is_batched" else {}
                try:
                    if test.__name__ == "gradients_reach_x":
                        with gradients.grad_ready(model):
                            test(session.denoiser, session.conds["positive"], shape, **more)
                    else:
                        test(session.denoiser, session.conds["positive"], shape, **more)
                    report[test.__name__] = "ok"
                except Exception:
                    report[test.__name__] = traceback.format_exc()
            return report

        report = session_module.run_on_model(model, latent, work, positive=positive, negative=negative)
        return {"ui": {"report": [json.dumps(report)]}}


class Rows:
    """Runs rows of two conditionings in one batch and row by row; reports the difference and the network calls."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**PROMPTS, "latent": ("LATENT",)}}

    def run(self, model: Any, positive: Any, negative: Any, latent: Any) -> Any:
        def work(session: Any) -> dict[str, Any]:
            denoiser, conds = session.denoiser, session.conds
            x = torch.randn(4, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(1))
            sigma = torch.tensor([0.6, 3.0, 1.0, 8.0])
            rows = conds["positive"].join(conds["negative"]).take([0, 1, 1, 0])
            together, calls = denoiser(x, sigma, rows), denoiser.calls
            single = torch.cat([denoiser(x[i : i + 1], sigma[i : i + 1], rows.take([i])) for i in range(4)])
            other = denoiser(x, sigma, conds["positive"].expand(4))
            return {
                "calls": calls,
                "difference": float((together - single).abs().max()),
                "effect": float((together - other).abs().max()),
            }

        session = ours("nodes.host.session")
        report = session.run_on_model(model, latent, work, positive=positive, negative=negative)
        return {"ui": {"report": [json.dumps(report)]}}


class Live:
    """Compares a prompt that is prepared while sampling runs with the same prompt given at the start."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**PROMPTS, "latent": ("LATENT",)}}

    def run(self, model: Any, positive: Any, negative: Any, latent: Any) -> Any:
        def work(session: Any) -> dict[str, Any]:
            x = torch.randn(2, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(1))
            sigma = torch.tensor([3.0, 1.0])
            given = session.denoiser(x, sigma, session.conds["negative"])
            live = session.denoiser(x, sigma, session.condition("live", negative))
            return {"difference": float((given - live).abs().max())}

        session = ours("nodes.host.session")
        report = session.run_on_model(model, latent, work, positive=positive, negative=negative)
        return {"ui": {"report": [json.dumps(report)]}}


class Sampler:
    """core's euler as a SAMPLER made by `make_sampler`, optionally sleeping before each step."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sleep": ("FLOAT", {}), "replaces": ("BOOLEAN", {}), "fail": ("BOOLEAN", {})}}

    def make(self, sleep: float, replaces: bool, fail: bool) -> Any:
        euler = ours("core.samplers").euler

        def run(session: Any) -> Any:
            if fail:
                raise ValueError("Expected `probe` to work, but got fail. Turn it off.")
            callback = session.callback(len(session.sigmas) - 1)

            def slow(step: Any) -> None:
                time.sleep(sleep)
                callback(step)

            x = session.denoiser.space.add_noise(session.latents, session.noise, session.sigmas[0])
            return euler(session.denoise, x, session.sigmas, session.denoiser.space, callback=slow)

        return (ours("nodes.host.sampling").make_sampler(run, "Probe", replaces),)


class Guider:
    """Classifier-free guidance as a GUIDER made by `make_guider`."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("GUIDER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**PROMPTS, "cfg": ("FLOAT", {"default": 3.0})}}

    def make(self, model: Any, positive: Any, negative: Any, cfg: float) -> Any:
        guided = ours("core.guidance").guided

        def start(session: Any) -> Any:
            conds = [session.conds[name] for name in ("positive", "negative")]
            return lambda x, sigma: guided(session.denoiser, x, sigma, *conds, session.cfg_scale)

        return (ours("nodes.host.sampling").make_guider(model, start, cfg, positive=positive, negative=negative),)


class Compare:
    """Reports the largest difference of two latents, and the largest value of the first."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"one": ("LATENT",), "other": ("LATENT",)}}

    def run(self, one: Any, other: Any) -> Any:
        a, b = one["samples"], other["samples"]
        same = a.shape == b.shape
        report = {
            "difference": float((a - b).abs().max()) if same else None,
            "largest": float(a.abs().max()),
            "shape": list(a.shape),
        }
        return {"ui": {"report": [json.dumps(report)]}}


class Dump:
    """Reports the latent's values, as they are and as the model has them, and the shared state of the model behind it."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",), "model": ("MODEL",)}}

    def run(self, latent: Any, model: Any) -> Any:
        weights = next(model.model.diffusion_model.parameters())
        report = {
            "shape": list(latent["samples"].shape),
            "values": latent["samples"].flatten().tolist(),
            "scaled": model.model.process_latent_in(latent["samples"]).flatten().tolist(),
            "dtype": str(weights.dtype),
            "inference": weights.is_inference(),
        }
        return {"ui": {"report": [json.dumps(report)]}}


class Clock:
    """A clock that advances by `step` seconds each time it is read."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 100.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


class Previews:
    """Reports at which of `steps` steps, `seconds` apart, the host's progress bar is given a preview of a MODEL's latents."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "steps": ("INT", {}), "seconds": ("FLOAT", {"step": 0.001})}}

    def run(self, model: Any, steps: int, seconds: float) -> Any:
        import comfy.utils

        progress, report_step = ours("nodes.host.progress"), ours("core.progress").Step
        shown: list[int] = []

        class Bar(comfy.utils.ProgressBar):
            def update_absolute(self, value: int, total: Any = None, preview: Any = None) -> None:
                shown.extend([value] if preview else [])
                super().update_absolute(value, total, preview)

        bar, clock = comfy.utils.ProgressBar, progress.time
        try:
            comfy.utils.ProgressBar, progress.time = Bar, Clock(seconds)
            callback = progress.host_callback(model, steps)
            for index in range(1, steps + 1):
                callback(report_step("probe", index, steps, 0.0, torch.zeros(1, 4, 8, 8)))
        finally:
            comfy.utils.ProgressBar, progress.time = bar, clock
        return {"ui": {"report": [json.dumps(shown)]}}


class FolderVae:
    """The VAE of a folder for a MODEL that multiplies each LATENT by `scale`."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("VAE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"folder": ("STRING", {}), "scale": ("FLOAT", {"step": 1e-6})}}

    def make(self, folder: str, scale: float) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            network = ours("core.folder").read_network(pathlib.Path(folder), ("AutoencoderKL", "AutoencoderTiny"))
            return (ours("nodes.host.diffusers_folder").load_vae(network, scale),)


class TinyControlNet:
    """A CONTROL_NET of random weights that fits the MODEL's UNet: the stock loader only knows full-size ones."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("CONTROL_NET",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def make(self, model: Any) -> Any:
        import comfy.cldm.cldm
        import comfy.controlnet
        import comfy.model_management as management

        config = dict(model.model.model_config.unet_config)
        operations = model.model.model_config.custom_operations
        with torch.inference_mode(False):
            network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=operations)
            generator = torch.Generator().manual_seed(0)
            for parameter in network.parameters():
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        return (comfy.controlnet.ControlNet(network, load_device=management.get_torch_device()),)


class TinyClipVision:
    """The host's own CLIP vision model at a size of its own: the stock loader only knows full-size ones."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("CLIP_VISION",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"folder": ("STRING", {})}}

    def make(self, folder: str) -> Any:
        import comfy.clip_vision
        import comfy.utils

        vision = comfy.clip_vision.ClipVisionModel(str(pathlib.Path(folder) / "config.json"))
        missing, unexpected = vision.load_sd(
            comfy.utils.load_torch_file(str(pathlib.Path(folder) / "model.safetensors"))
        )
        assert not missing, missing
        assert set(unexpected) <= {"vision_model.embeddings.position_ids"}, unexpected
        return (vision,)


class ImagePrompt:
    """A MODEL with an image for a prompt, in the way of IP-Adapter nodes: each cross-attention is replaced, and adds attention
    to image tokens, other ones for negative rows, from `start` to `end` of the sampling. `by_level` makes its weight follow each
    row's own noise level.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        part = {"start": ("FLOAT", {"default": 0.0}), "end": ("FLOAT", {"default": 1.0})}
        return {"required": {"model": ("MODEL",), "weight": ("FLOAT", {}), "by_level": ("BOOLEAN", {}), **part}}

    def patch(self, model: Any, weight: float, by_level: bool, start: float, end: float) -> Any:
        from comfy.ldm.modules.attention import optimized_attention

        sigma_start, sigma_end = map(model.get_model_object("model_sampling").percent_to_sigma, (start, end))

        def replace(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
            kinds = extra["cond_or_uncond"]
            rows = len(q) // len(kinds)
            # (cond, uncond) x (keys, values) x tokens x width, the same for every layer of that width
            generator = torch.Generator().manual_seed(q.shape[-1])
            tokens = torch.randn(2, 2, 4, q.shape[-1], generator=generator).to(q)
            keys, values = (torch.cat([tokens[kind, part].expand(rows, -1, -1) for kind in kinds]) for part in (0, 1))
            strength: Any = weight
            if by_level:
                level = extra["sigmas"].to(q)
                strength = weight * (level / (1 + level)).reshape(-1, 1, 1)
            heads = extra["n_heads"]
            if not sigma_end <= float(extra["sigmas"][0]) <= sigma_start:  # the first row's, as everybody does
                return optimized_attention(q, k, v, heads)
            return optimized_attention(q, k, v, heads) + strength * optimized_attention(q, keys, values, heads)

        patched = model.clone()
        network = model.model.diffusion_model
        for block, count in (
            ("input", len(network.input_blocks)),
            ("output", len(network.output_blocks)),
            ("middle", 2),
        ):
            for number in range(count):
                patched.set_model_attn2_replace(replace, block, number)
        return (patched,)


class AnyType(str):
    """An output type that fits every input."""

    def __ne__(self, other: object) -> bool:
        return False


COUNTS: dict[str, list[int]] = {}
RUN: dict[str, int] = {}
FACTOR: dict[str, float] = {}
# A loaded MODEL whose clone and parent are gone makes the host collect garbage at each further load: most of a test's time.
HELD: list[Any] = []
LATE: dict[str, int] = {}  # of these, calls that began when cancel had been pressed already


class Count:
    """Counts the rows of every network call of a MODEL under a name, by the host's own keyed wrapper.

    Nodes of one `run` count together; another run begins at none, and the host's cache answers for nothing behind this node.
    A run with `spoiled` gives NaN, as a passing fault of a device does: nothing of the MODEL tells it from another one.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "count", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "name": ("STRING", {})},
            "optional": {"run": ("INT", {}), "spoiled": ("BOOLEAN", {})},
        }

    def count(self, model: Any, name: str, run: int = 0, spoiled: bool = False) -> Any:
        import comfy.model_management as management
        import comfy.patcher_extension as extension

        if not run or RUN.get(name) != run:
            COUNTS[name], LATE[name], RUN[name] = [], 0, run
        counted = model.clone()
        HELD.append(counted)
        FACTOR[name] = math.nan if spoiled else 1.0

        def call(execute: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            COUNTS[name].append(len(x))
            LATE[name] += management.processing_interrupted()
            return FACTOR[name] * execute(x, *args, **kwargs)

        counted.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, "probe-count", call)
        return (counted,)


class Counted:
    """Reports the rows of each network call that `Count` saw, after `after` was made."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"after": (AnyType("*"),), "name": ("STRING", {})}}

    def run(self, after: Any, name: str) -> Any:
        return {"ui": {"report": [json.dumps(COUNTS[name])]}}


class Late:
    """Reports how many network calls `Count` saw under a name, and how many of them began after cancel was pressed."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, name: str) -> float:
        return float("nan")

    def run(self, name: str) -> Any:
        return {"ui": {"report": [json.dumps([len(COUNTS[name]), LATE[name]])]}}


class Edited:
    """Multiplies some weights of a MODEL or a VAE in place, as scripts do that edit `.data`, and returns the same object."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "edit", (AnyType("*"),)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"whose": (AnyType("*"),), "factor": ("FLOAT", {"step": 0.01})},
            "optional": {"run": ("INT", {})},
        }

    def edit(self, whose: Any, factor: float, run: int = 0) -> Any:
        patcher = getattr(whose, "patcher", whose)
        for weight in patcher.model.parameters():
            weight.data.mul_(factor)
        return (whose,)


class Strings:
    """A list of strings, for which the host runs a node once each."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_IS_LIST = "probe", "make", (AnyType("*"),), (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"values": ("STRING", {})}}

    def make(self, values: str) -> tuple[list[str]]:
        return (json.loads(values),)


class Told:
    """A node that is no output node and shows something all the same."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("STRING",)
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("STRING", {})}}

    def make(self, value: str) -> dict[str, Any]:
        return {"ui": {"told": [value]}, "result": (value,)}


class PromptDump:
    """Reports the embeddings of a CONDITIONING as a list of numbers with their shape."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "dump", "probe", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"cond": ("CONDITIONING",)}}

    def dump(self, cond):
        values = cond[0][0].float()
        report = {"shape": list(values.shape), "values": values.flatten().tolist()}
        return {"ui": {"report": [json.dumps(report)]}}


class Churned:
    """The host's euler with noise added before each step."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"churn": ("FLOAT", {})}}

    def make(self, churn: float) -> Any:
        import comfy.samplers

        return (comfy.samplers.ksampler("euler", {"s_churn": churn}),)


class Pairs:
    """Samples pairs of a schedule search together and one by one, and reports the largest difference and how far pairs differ."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = ("guider", "GUIDER"), ("sampler", "SAMPLER"), ("latent", "LATENT"), ("sigmas", "SIGMAS")
        return {"required": {name: (kind,) for name, kind in inputs}}

    def run(self, guider: Any, sampler: Any, latent: Any, sigmas: Any) -> Any:
        path = ours("nodes.host.search_path").HostPath
        together, alone = (path(guider, sampler, latent, 3, batch).sample(sigmas, [0, 1, 2]) for batch in (3, 1))
        report = [float((together - alone).abs().max()), float((together[0] - together[1]).abs().max())]
        return {"ui": {"report": [json.dumps(report)]}}


NODE_CLASS_MAPPINGS = {
    "ProbePairs": Pairs,
    "ProbeChurned": Churned,
    "ProbePromptDump": PromptDump,
    "ProbeStrings": Strings,
    "ProbeTold": Told,
    "ProbeCount": Count,
    "ProbeCounted": Counted,
    "ProbeEdited": Edited,
    "ProbeLate": Late,
    "ProbeImagePrompt": ImagePrompt,
    "ProbePreviews": Previews,
    "ProbeFolderVae": FolderVae,
    "ProbeTinyControlNet": TinyControlNet,
    "ProbeTinyClipVision": TinyClipVision,
    "ProbeContract": Contract,
    "ProbeRows": Rows,
    "ProbeLive": Live,
    "ProbeSampler": Sampler,
    "ProbeGuider": Guider,
    "ProbeCompare": Compare,
    "ProbeDump": Dump,
    **checkpoint_probe.NODES,
    **edit_probe.NODES,
    **flow_probe.NODES,
    **guidance_probe.NODES,
    **layers_probe.NODES,
}
