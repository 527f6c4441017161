"""Recorded runs of the published code: the stand-in network, its image prompt, and one function that repeats a run."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slipstream.core import Conditioning, DiffusersDenoiser, ReplayNoise
from slipstream.core.attention import attend_heads
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.edit import Appearance, Canvas, Drag, Move, Paste
from slipstream_tests.reference.edit import (
    DEFAULTS,
    Landmarks,
    PublishedConfig,
    edit_published,
    invert_published,
    scale_about_centre,
)
from torch import Tensor

# Another folder with the same files (more runs, all of them in full) can be named here.
OTHER = os.environ.get("SLIPSTREAM_GOLDEN_EDIT")
FOLDER = pathlib.Path(OTHER or pathlib.Path(__file__).resolve().parent.parent / "golden" / "edit")
# To save time these runs stop after the first steps, where they differ from the others; set the variable to run them to the end.
SHORT = () if OTHER else ("resize_up", "appearance", "drag", "paste")


class Enough(Exception):  # noqa: N818
    """Stops a short run."""


def names() -> list[str]:
    return sorted(p.stem.removeprefix("run_") for p in FOLDER.glob("run_*.safetensors"))


def read(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def network() -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(json.loads((FOLDER / "tiny_unet_config.json").read_text()))
    unet.load_state_dict(read("tiny_unet"), strict=True)
    return unet.eval()


class Recorded(DiffusersDenoiser):
    """Keeps what the network was given on full calls, as variance-preserving latents."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet, scaled_linear_alphas_cumprod())
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.seen.append(self.prediction.network_input(x, sigma)[:1].detach().clone())
        return super().__call__(x, sigma, cond)


class ImagePrompted:
    """The same network with decoupled cross-attention (IP-Adapter, arXiv 2308.06721) over `cond.extra["image_tokens"]`."""

    def __init__(self, plain: Recorded, scale: float) -> None:
        self.plain, self.weights, self.scale = plain, read("tiny_ip"), scale
        self.space, self.levels = plain.space, plain.levels

    def self_attention(self, hook: Any) -> Any:
        return self.plain.self_attention(hook)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert cond.extra is not None
        with self.cross_attention(cond.extra["image_tokens"]):
            return self.plain(x, sigma, cond)

    @contextmanager
    def cross_attention(self, tokens: Tensor) -> Iterator[None]:
        layers = {n: m for n, m in self.plain.unet.named_modules() if n.endswith("attn2")}
        before = {n: m.processor for n, m in layers.items()}
        for name, layer in layers.items():
            layer.set_processor(self._processor(name, tokens))
        yield
        for name, layer in layers.items():
            layer.set_processor(before[name])

    def _processor(self, name: str, tokens: Tensor) -> Any:
        to_k, to_v = (self.weights[f"{name}.processor.to_{kind}_ip.weight"] for kind in "kv")

        def process(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kw: Any) -> Tensor:
            attend, q = attend_heads(attn.heads, attn.scale), attn.to_q(hidden_states)
            out = attend(q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
            out = out + self.scale * attend(q, tokens @ to_k.T, tokens @ to_v.T)
            return attn.to_out[0](out)

        return process


def encode(inputs: dict[str, Tensor], name: str, scale: float = 1.0) -> Tensor:
    """The recordings' stand-in for a VAE: colours pooled 8 x 8."""
    pixels = inputs[name].permute(2, 0, 1)[None].float() / 255 * 2 - 1
    pooled = torch.nn.functional.avg_pool2d(scale_about_centre(pixels, scale), 8)
    return torch.einsum("oc,bchw->bohw", inputs["fake_vae"], pooled)


def mode_of(name: str) -> str:
    return next(m for k, m in MODES.items() if name.startswith(k))


MODES = {
    "move": "move", "resize": "move", "drag": "drag", "appearance": "appearance", "paste": "paste", "landmark": "landmarks",
}  # fmt: skip


def config_of(name: str, args: dict[str, Any]) -> PublishedConfig:
    same = {k: args[k] for k in ("w_edit", "w_content", "w_contrast", "w_inpaint", "energy_scale") if k in args}
    eta = args.get("SDE_strength", 0.0)
    return replace(DEFAULTS[mode_of(name)], cfg_scale=args["guidance_scale"], eta=eta, **same)


def conditions(name: str, inputs: dict[str, Tensor]) -> tuple[Conditioning, Conditioning]:
    """(cond, uncond) of the sampling; for two images the base's image tokens slip in among the text tokens, as published."""
    cross = mode_of(name) in ("appearance", "paste")
    tokens = [inputs["ip_replace" if cross else "ip_base"], inputs["ip_uncond"]]
    texts = [inputs["text_p"], inputs["text_uncond"]]
    if cross:
        texts = [torch.cat(pair, 1) for pair in zip(texts, [inputs["ip_base"], inputs["ip_uncond"]])]
    cond, uncond = (Conditioning(t, extra={"image_tokens": i}) for t, i in zip(texts, tokens))
    return cond, uncond


def pairs(points: list[list[float]]) -> list[Any]:
    return [(tuple(a), tuple(b)) for a, b in zip(points[::2], points[1::2])]


def repeat(name: str) -> tuple[Any, list[Any], Any, Recorded]:
    """Repeat a run; returns (result, inversions, problem's start, model with its counters and inputs)."""
    record, inputs = read(f"run_{name}"), read("inputs")
    args = json.loads((FOLDER / "runs.json").read_text())[name]["args"]
    config, model = config_of(name, args), Recorded(network())
    height, width = inputs["image"].shape[:2]
    canvas = Canvas((height, width), (height // 8, width // 8), 8)
    image_model = ImagePrompted(model, args["ip_scale"])
    scale = args.get("resize_scale", 1.0)
    inversions = [invert_published(model, encode(inputs, "image"), Conditioning(inputs["text_p"]), config, canvas)]
    if mode_of(name) in ("appearance", "paste"):
        latents = encode(inputs, "image_replace", scale)
        inversions.append(invert_published(model, latents, Conditioning(inputs["text_q"]), config, canvas))
    task = make_task(name, args, record, inversions)
    inverted_calls = model.calls
    model.seen.clear()
    cond, uncond = conditions(name, inputs)
    noise = ReplayNoise(list(record["sde_noise"].unsqueeze(1))) if "sde_noise" in record else seeded(args["seed"])
    if name in SHORT:
        with pytest.raises(Enough):
            edit_published(model, inversions[0], task, cond, uncond, config, noise, image_model, stop_after(75))
        return None, inversions, task, model
    result = edit_published(model, inversions[0], task, cond, uncond, config, noise, image_model)
    model.inverted_calls = inverted_calls  # type: ignore[attr-defined]
    return result, inversions, task, model


def stop_after(index: int) -> Any:
    def callback(step: Any) -> None:
        if step.index >= index:
            raise Enough

    return callback


def seeded(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator)


def make_task(name: str, args: dict[str, Any], record: dict[str, Tensor], inversions: list[Any]) -> Any:
    mode, mask = mode_of(name), record.get("img.mask", record.get("img.mask_base"))
    points = pairs(args.get("selected_points", []))
    if mode == "move":
        (x, y), (u, v) = points[0]
        return Move(mask, u - x, v - y, args["resize_scale"], "image", fill_from=record.get("img.mask_ref"))
    if mode == "drag":
        return Drag(mask, points, method="energy")
    if mode == "appearance":
        return Appearance(mask, inversions[1], record["img.mask_replace"])
    if mode == "paste":
        return Paste(inversions[1], mask, args["dx"], args["dy"], args["resize_scale"], "image")
    return Landmarks(points)
