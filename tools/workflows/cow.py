"""Cyclic One-Way Diffusion on the bundled photo."""

from __future__ import annotations

from typing import Any


def cow_photo(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket-flow")
    photo = g.add("SlipstreamExamplePhoto", photo="astronaut")
    canvas = g.add(
        "SlipstreamSeedCanvas", image=photo["image"], keep=photo["keep"], model=model, scale=0.5, x=0.5, y=1.0, softness=1,
        size=(440, 0),
    )  # fmt: skip
    prompt = g.add(
        "CLIPTextEncode", clip=model, text="a small rocket on the left on a blue shaded background", title="Prompt"
    )
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")
    encoded = g.add("VAEEncode", pixels=canvas["canvas"], vae=model)
    noise = g.add("RandomNoise", noise_seed=0)
    guider = g.add("CFGGuider", model=model, positive=prompt, negative=blank, cfg=3.0)
    sampler = g.add("SlipstreamCowSampler", keep=canvas["keep"], vae=model, photo=canvas["photo"])
    sigmas = g.add("BasicScheduler", model=model, scheduler="simple", steps=20, denoise=1.0)
    sampled = g.add(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=encoded
    )  # fmt: skip
    grown = g.add("VAEDecode", samples=sampled["output"], vae=model)
    pasted = g.add(
        "ImageCompositeMasked", destination=grown, source=canvas["photo"], mask=canvas["paste"], x=0, y=0,
        resize_source=False, title="Original pixels back",
    )  # fmt: skip
    both = g.add(
        "SlipstreamBeforeAfter",
        before=canvas["canvas"],
        after=pasted,
        captions="Your subject | The scene",
        size=(440, 0),
    )
    result = g.add("SaveImage", images=pasted, filename_prefix="slipstream/cow_photo", title="Saved")
    g.section("1 Your photo and the scene", [photo, prompt, model])
    g.section("2 Where the subject goes", [canvas])
    g.section("3 Result", [both])
    g.section("How", [encoded, blank, noise], [guider, sigmas], [sampler], [sampled, grown, pasted], [result], row=1)
    g.note(
        "# Grow a scene around a subject\n\n"
        "For a photo of your own: put **Load Image** in place of Example Photo, paint the subject on the "
        "canvas, press *Move* and place it, write the scene, **Run**.\n\n"
        "The astronaut is kept, the scene grows around her. Bypass the last composite node to see what the model makes of the "
        "subject.\n\n"
        "**Your own model**: choose a checkpoint in *Load Model*, write prompts of its kind and set cfg to 7. The size "
        "follows the model; **width** and **height** give another one. The bundled model is tiny: it knows sixty things "
        "and six shapes on coloured backgrounds.",
    )


def cow_photo_xl(g: Any) -> None:
    cow_photo(g)
    url = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors"
    text = "an astronaut on a beach at sunset, palm trees, photograph"
    g.on_checkpoint(url, "6.9 GB", Prompt={"text": text}, CFGGuider={"cfg": 7.0})


WORKFLOWS = {"04 Grow a scene around a subject": cow_photo, "16 Grow a scene around a subject, SDXL": cow_photo_xl}
