"""Latent masking: masked regeneration, a trained fill, and the two diagnostics."""

from __future__ import annotations

from typing import Any

SAMPLING = {"steps": 12, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}


def _picture(g: Any, model: Any, text: str, seed: int) -> tuple[Any, Any, Any, Any]:
    """Return the prompt, the empty prompt, the sampled latent of one image of the pocket model, and the empty one."""
    prompt = g.add("CLIPTextEncode", clip=model, text=text, title="Prompt")
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")
    empty = g.add("SlipstreamEmptyLatent", model=model)
    latent = g.add(
        "KSampler",
        model=model,
        positive=prompt,
        negative=blank,
        latent_image=empty,
        seed=seed,
        title="First image",
        **SAMPLING,
    )
    return prompt, blank, latent, empty


def _box(g: Any, x: int, y: int, width: int, height: int) -> Any:
    """Return a MASK of 128 x 128 pixels with one painted box."""
    off = g.add("SolidMask", value=0.0, width=128, height=128)
    on = g.add("SolidMask", value=1.0, width=width, height=height)
    return g.add("MaskComposite", destination=off, source=on, x=x, y=y, operation="add", title="Mask")


def _side_by_side(g: Any, *images: Any) -> Any:
    joined = images[0]
    for image in images[1:]:
        joined = g.add("ImageStitch", image1=joined, image2=image, direction="right", spacing_width=4)
    return joined


def masked_regenerate(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket-flow")
    _, blank, latent, empty = _picture(g, model, "a large lion in the center on a blue striped background", 11)
    wanted = g.add(
        "CLIPTextEncode",
        clip=model,
        text="a large tiger in the center on a blue striped background",
        title="What it becomes",
    )
    masks = g.add(
        "SlipstreamMaskSchedule",
        steps=5,
        width=empty["width"],
        height=empty["height"],
        patch=0,
        low=0.5,
        high=0.75,
        nested=False,
        seed=3,
    )
    new = g.add(
        "SlipstreamMaskedRegenerate", model=model, positive=wanted, negative=blank, latent=latent, masks=masks["masks"],
        seed=1, steps=6, cfg=3.0, strength=0.9, strength_end=0.6,
    )  # fmt: skip
    before = g.add("VAEDecode", samples=latent, vae=model, title="Before")
    after = g.add("VAEDecode", samples=new, vae=model, title="After")
    g.add("SlipstreamBeforeAfter", before=before, after=after, size=(440, 0))
    g.add("SaveImage", images=after, filename_prefix="slipstream/masked_regenerate", title="Saved")
    g.note(
        "# Repaint a masked area in rounds\n\n"
        "Five rounds: in each one random patches are re-noised and denoised with the new prompt while the rest is held. "
        "Few patches stay visible at first, half of them at the end. Cost: 5 rounds x 6 steps.\n\n"
        "**Your own model**: choose a checkpoint in *Load Model* and write prompts of its kind. The size follows the model."
    )


def latent_fill(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt, blank, latent, _ = _picture(g, model, "a large yellow circle in the center on a purple background", 5)
    many = g.add(
        "SlipstreamEmptyLatent",
        model=model,
        batch_size=24,
        title="24 images to learn from",
    )
    learn = g.add(
        "KSampler", model=model, positive=blank, negative=blank, latent_image=many, seed=1, steps=6, cfg=1.0,
        sampler_name="euler", scheduler="normal",
    )  # fmt: skip
    decoded = g.add("VAEDecode", samples=learn, vae=model)
    trained = g.add(
        "SlipstreamTrainLatentFill", model=model, vae=model, images=decoded, name="pocket_example", folder="", steps=100,
        batch=16, learning_rate=0.002, width=128, height=128, patch=2,
    )  # fmt: skip
    mask = _box(g, 64, 56, 48, 48)
    filled = g.add("SlipstreamLatentFill", model=model, latent=latent, mask=mask, fill=trained["fill"])
    new = g.add(
        "KSampler", model=model, positive=prompt, negative=blank, latent_image=filled, seed=9, steps=6, cfg=3.0,
        sampler_name="euler", scheduler="normal", denoise=0.75, title="6 steps at denoise 0.75",
    )  # fmt: skip
    shown = [g.add("VAEDecode", samples=s, vae=model, title=t) for s, t in
             ((latent, "Image"), (filled, "Filled in one pass"), (new, "Denoised"))]  # fmt: skip
    g.add("SaveImage", images=_side_by_side(g, *shown), filename_prefix="slipstream/latent_fill")
    g.note(
        "Trains a small fill on 24 images, masks a box of the image, fills it in one pass and denoises it for 6 steps. "
        "The second run loads the finished fill. With your own images: name a folder and use some thousand steps.",
        height=200,
    )


def influence_profile(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt, blank, latent, empty = _picture(g, model, "a small white star in the center on a purple background", 4)
    other = g.add("CLIPTextEncode", clip=model, text="a large green circle on a red background")
    patch = g.add(
        "KSampler", model=model, positive=other, negative=blank, latent_image=empty, seed=2, title="Patch", **SAMPLING
    )
    mask = _box(g, 48, 48, 32, 32)
    changed = g.add(
        "LatentCompositeMasked", destination=latent, source=patch, x=0, y=0, mask=mask, title="One thing differs"
    )
    guider = g.add("CFGGuider", model=model, positive=prompt, negative=blank, cfg=3.0)
    result = g.add(
        "SlipstreamInfluenceProfile", noise=g.add("RandomNoise", noise_seed=11), guider=guider,
        sampler=g.add("KSamplerSelect", sampler_name="euler"),
        sigmas=g.add("BasicScheduler", model=model, scheduler="normal", steps=10, denoise=0.7),
        latent=latent, other_latent=changed, mask=mask,
    )  # fmt: skip
    g.add("PreviewAny", source=result["report"], title="Report")
    g.add("SaveImage", images=result["chart"], filename_prefix="slipstream/influence_profile")
    g.note(
        "Two image-to-image runs with the same noise whose starts differ in one box. The chart shows how far the difference "
        "reaches at each step: wide while the noise is high, closer and closer to the box later."
    )


def influence_of_edit(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    _, blank, latent, _ = _picture(g, model, "a small white star in the center on a purple background", 4)
    mask = _box(g, 48, 48, 32, 32)
    masked = g.add("SetLatentNoiseMask", samples=latent, mask=mask)
    other = g.add("CLIPTextEncode", clip=model, text="a small green circle in the center on a purple background")
    edited = g.add(
        "KSampler",
        model=model,
        positive=other,
        negative=blank,
        latent_image=masked,
        seed=2,
        title="Inpaint the box",
        **SAMPLING,
    )
    before = g.add("VAEDecode", samples=latent, vae=model, title="Before")
    after = g.add("VAEDecode", samples=edited, vae=model, title="After")
    result = g.add("SlipstreamInfluenceImages", before=before, after=after, mask=mask)
    g.add("PreviewAny", source=result["report"], title="Report")
    g.add("SaveImage", images=_side_by_side(g, before, after), filename_prefix="slipstream/influence_before_after")
    g.add("SaveImage", images=result["chart"], filename_prefix="slipstream/influence_of_edit", title="Chart")
    g.note(
        "Only the box is repainted, yet the pixels around it change too: the autoencoder reaches that far. The chart shows how "
        "far. Works on any two images of one size, for example a photo before and after an edit."
    )


def stretch_map(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    _, _, latent, _ = _picture(g, model, "a large orange ring on a black background", 3)
    image = g.add("VAEDecode", samples=latent, vae=model)
    result = g.add("SlipstreamStretchMap", image=image, points="48, 64 -> 68, 64\n88, 40 -> 88, 64", radius=12.0)
    g.add("PreviewAny", source=result["report"], title="Report")
    g.add("SaveImage", images=result["map"], filename_prefix="slipstream/stretch_map")
    g.note(
        "Two drags: 20 and 24 pixels with a radius of 12. A drag folds beyond 1.65 radii, so both do: red is torn, the outline "
        "is folded. For the motion of a stream, wire its frames and leave the points empty."
    )


WORKFLOWS = {"09 Repaint a masked area in rounds": masked_regenerate}
TRIED = {
    "latent_fill": latent_fill,
    "influence_profile": influence_profile,
    "influence_of_edit": influence_of_edit,
    "stretch_map": stretch_map,
}
