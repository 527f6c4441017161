"""The published pipeline, number by number, against recorded runs (tests/golden/cow)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from slipstream.core import Conditioning, DiffusersDenoiser, ReplayNoise, SeededNoise
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream_tests.reference.cow import PublishedConfig, generate_published

BASE = "a017_small_n10"
CASES = (BASE, "a017_small_n10_vpred", "b027_small_n10")
TOLERANCE = 1e-4


class Recorded:
    """One recorded case: a tensor that is stored once for all cases is looked up in the first."""

    def __init__(self, folder, case: str) -> None:
        self.case = case
        self.tensors = load_file(folder / "cases.safetensors")
        about = json.loads((folder / "cases.json").read_text())
        self.settings, self.noise_keys = about["cases"][case], about["noise_in_order"]

    def __getitem__(self, key: str):
        return self.tensors[f"{self.case}/{key}" if f"{self.case}/{key}" in self.tensors else f"{BASE}/{key}"]

    def results(self) -> dict:
        inputs = ("noise", "latents", "mask", "embeds", "check")
        names = [k.split("/", 1)[1] for k in self.tensors if k.startswith(self.case + "/")]
        return {n: self[n] for n in names if not n.startswith(inputs)}

    def cond(self, name: str) -> Conditioning:
        return Conditioning(self.tensors[f"embeds/{name}"])


@pytest.fixture(scope="module")
def unet(golden_path):
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    return UNet2DConditionModel.from_pretrained(golden_path / "cow" / "unet").eval()


def run(recorded: Recorded, unet, noise, mask=None, trace=None, **changes):
    s = recorded.settings
    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod(), s["prediction_type"])
    config = {
        "steps": s["num_inference_steps"], "cycles": s["cycles"], "cfg_scale": s["guidance_scale"],
        "eta": s["eta_cycle"], "final_eta": s["eta_final"], "convention": s["diffusers"], **changes,
    }  # fmt: skip
    mask = recorded["mask/seed"][0, 0] if mask is None else mask
    with torch.no_grad():
        return generate_published(
            model, recorded["latents/seed"], recorded["latents/canvas"], mask,
            (s["y_offset_px"] // 8, s["x_offset_px"] // 8),
            *(recorded.cond(name) for name in ("prompt", "uncond", "neg", "sup", "div")),
            PublishedConfig(**config), noise, trace,
        )  # fmt: skip


def test_the_recorded_network_is_ours(golden_path, unet):
    recorded = Recorded(golden_path / "cow", BASE)
    for t in (1, 501, 701):
        out = unet(recorded.tensors["check/x"], t, recorded.cond("prompt").context).sample
        torch.testing.assert_close(out, recorded.tensors[f"check/out_t{t}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_tensor(golden_path, unet, case):
    recorded = Recorded(golden_path / "cow", case)
    noise = ReplayNoise([recorded[k] for k in recorded.noise_keys])
    ours: dict = {}
    ours["final/latents"] = run(recorded, unet, noise, trace=ours.__setitem__)
    assert noise.position == len(recorded.noise_keys)
    expected = recorded.results()
    assert {"final/latents", "cycle09/step05/replaced", "invert/canvas/05", "invert/seed/07"} <= set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_the_other_convention_is_another_picture(golden_path, unet):
    """The tolerance can tell the two inversion conventions apart by far."""
    recorded = Recorded(golden_path / "cow", BASE)
    noise = ReplayNoise([recorded[k] for k in recorded.noise_keys])
    other = run(recorded, unet, noise, convention="0.27.1")
    assert (other - recorded["final/latents"]).abs().max() > 0.1


def test_whole_image_is_the_inverted_seed_sampled_down(golden_path, unet):
    """With a full mask every cycle ends at the stored latents, and the final replacement is the stored z_F, bit for bit."""
    recorded = Recorded(golden_path / "cow", BASE)
    recorded.settings = {**recorded.settings, "x_offset_px": 0, "y_offset_px": 0}
    recorded.tensors[f"{BASE}/latents/seed"] = recorded["latents/canvas"]
    trace: dict = {}
    run(recorded, unet, SeededNoise(1), torch.ones(16, 16), trace.__setitem__, cycles=2)
    assert torch.equal(trace["cycle01/step05/replaced"], trace["invert/seed/05"])
    assert torch.equal(trace["final/step04/replaced"], trace["invert/seed/04"])


def test_steps_are_truncated_as_published():
    config = PublishedConfig(steps=25)
    assert (config.replace, config.back, config.final) == (12, 17, 10)
    assert PublishedConfig(steps=90).back == 62


def test_unknown_convention_is_refused():
    with pytest.raises(ValueError, match=r"Expected `convention` to be one of '0.17.1', '0.27.1', but got '0.30'"):
        PublishedConfig(convention="0.30")
