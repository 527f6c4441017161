"""Photo editing: one example for each task on the bundled model, and one on a real photo."""

from __future__ import annotations

from typing import Any

SIZE = 128


def _mask(
    g: Any, x: int, y: int, width: int, height: int, size: tuple[int, int] = (SIZE, SIZE), title: str = "Mask"
) -> Any:
    """Return a MASK with one painted box; a user paints it in the mask editor instead."""
    off = g.add("SolidMask", value=0.0, width=size[0], height=size[1])
    on = g.add("SolidMask", value=1.0, width=width, height=height)
    return g.add("MaskComposite", destination=off, source=on, x=x, y=y, operation="add", title=title)


def _picture(g: Any, model: Any, text: str, seed: int, title: str) -> tuple[Any, Any]:
    """Return the prompt and the picture of one pocket scene, the stand-in for a photo."""
    prompt = g.add("CLIPTextEncode", clip=model, text=text, title=title)
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Empty prompt")
    empty = g.add("EmptyLatentImage", width=SIZE, height=SIZE)
    latent = g.add(
        "KSampler", model=model, positive=prompt, negative=blank, latent_image=empty, seed=seed, steps=20, cfg=3.0,
        sampler_name="euler", scheduler="normal",
    )  # fmt: skip
    return prompt, g.add("VAEDecode", samples=latent, vae=model)


def _edit(
    g: Any, model: Any, image: Any, prompt: Any, wanted: str, tasks: Any, inversion: Any, name: str, **settings: Any
) -> Any:
    """Add preview, edit and a picture of before, preview and after."""
    positive = prompt if not wanted else g.add("CLIPTextEncode", clip=model, text=wanted, title="What the result shows")
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")
    preview = g.add("SlipstreamEditPreview", image=image, tasks=tasks)
    edited = g.add(
        "SlipstreamEditSampler", model=model, vae=model, inversion=inversion, tasks=tasks, positive=positive, negative=blank, **settings
    )  # fmt: skip
    joined = g.add("ImageStitch", image1=image, image2=preview["preview"], direction="right", spacing_width=4)
    joined = g.add("ImageStitch", image1=joined, image2=edited["image"], direction="right", spacing_width=4)
    return g.add("SaveImage", images=joined, filename_prefix=f"slipstream/{name}")


def _invert(g: Any, model: Any, image: Any, prompt: Any, title: str = "Invert Photo (Slipstream)") -> Any:
    return g.add("SlipstreamInvert", model=model, vae=model, image=image, positive=prompt, steps=16, title=title)


def edit_move(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt, image = _picture(g, model, "a small red circle on the left on a blue background", 3, "The photo's prompt")
    inversion = _invert(g, model, image, prompt)
    mask = _mask(g, 2, 42, 50, 48, title="Mask of the object")
    tasks = g.add("SlipstreamMove", mask=mask, dx=56.0, dy=-14.0, scale=1.25)
    wanted = "a small red circle on the right on a blue background"
    _edit(g, model, image, prompt, wanted, tasks, inversion, "edit_move")
    g.note(
        "**Move and resize.** Left: before. Middle: the preview, which samples nothing. Right: after. Paint the mask in the mask editor of "
        "your own photo; dx, dy are pixels. Invert runs once per photo: change dx and run again, only the edit is computed."
    )


def edit_paste(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt, image = _picture(g, model, "a small red circle on the left on a blue background", 3, "The photo's prompt")
    other_prompt, other = _picture(
        g, model, "a small yellow square in the center on a blue background", 5, "The other photo's prompt"
    )
    inversion = _invert(g, model, image, prompt)
    reference = _invert(g, model, other, other_prompt, "Invert the other photo")
    mask = _mask(g, 40, 40, 48, 48, title="Mask on the other photo")
    tasks = g.add("SlipstreamPaste", reference=reference, mask=mask, dx=24.0, dy=10.0, scale=0.9)
    wanted = "a small red circle on the left and a small yellow square on the right on a blue background"
    _edit(g, model, image, prompt, wanted, tasks, inversion, "edit_paste")
    g.note(
        "**Paste.** The object under the mask of the other photo goes into this one. dx, dy shift it from its place in its own photo."
    )


def edit_appearance(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt, image = _picture(g, model, "a large red circle in the center on a blue background", 7, "The photo's prompt")
    other_prompt, other = _picture(
        g, model, "a large green square in the center on a yellow background", 4, "The look's prompt"
    )
    inversion = _invert(g, model, image, prompt)
    reference = _invert(g, model, other, other_prompt, "Invert the photo with the look")
    mask = _mask(g, 30, 30, 68, 68, title="Mask of the object")
    other_mask = _mask(g, 46, 46, 36, 36, title="Mask of the look")
    tasks = g.add("SlipstreamAppearance", mask=mask, reference=reference, reference_mask=other_mask)
    wanted = "a large green circle in the center on a blue background"
    _edit(g, model, image, prompt, wanted, tasks, inversion, "edit_appearance", cfg=3.0)
    g.note(
        "**Appearance.** The object keeps its shape and takes the look of what is under the other mask. Say the new look in the prompt."
    )


def edit_drag(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt, image = _picture(g, model, "a large red circle in the center on a blue background", 7, "The photo's prompt")
    inversion = _invert(g, model, image, prompt)
    mask = _mask(g, 10, 10, 112, 108, title="What may change")
    handles = '[{"x": 86, "y": 64}, {"x": 42, "y": 64}]'
    targets = '[{"x": 106, "y": 50}, {"x": 42, "y": 65}]'
    tasks = g.add("SlipstreamDrag", mask=mask, handles=handles, targets=targets, method="warp")
    _edit(g, model, image, prompt, "", tasks, inversion, "edit_drag")
    g.note(
        "**Drag.** Each handle goes to its target; a handle that stays (here the left one) pins its place. The lists are what KJNodes' "
        "Points Editor gives. Only what is under the mask may change."
    )


def edit_photo(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    photo = g.add("SlipstreamExamplePhoto", photo="astronaut")
    prompt = g.add("CLIPTextEncode", clip=model, text="a photo", title="What the photo shows")
    inversion = g.add(
        "SlipstreamInvert", model=model, vae=model, image=photo["image"], positive=prompt, steps=16, megapixels=0.07
    )
    square = _mask(g, 148, 361, 48, 48, (512, 512), title="Mask of the badge")
    mask = g.add("GrowMask", mask=square, expand=19, tapered_corners=True)
    tasks = g.add("SlipstreamMove", mask=mask, dx=-62.0, dy=36.0, scale=0.8)
    _edit(g, model, photo["image"], prompt, "", tasks, inversion, "edit_photo", cfg=1.0, guidance=0.0, hold_fill=0.9)
    g.note(
        "**A real photo.** The badge moves and shrinks; every pixel outside the edit is the photo's own. The bundled model is tiny and has "
        "never seen a photo, so the vacated fabric is held to a smooth fill (hold_fill 0.9) at a low working size (megapixels 0.07). With "
        "an SD1.5 or SDXL checkpoint describe the photo in the prompt, set megapixels 0.4 or 1.0, cfg 2, guidance 0.1 and "
        "hold_fill 0.2 to 0.4: then it makes up the texture.",
        height=240,
    )


WORKFLOWS = {
    "edit_move": edit_move,
    "edit_paste": edit_paste,
    "edit_appearance": edit_appearance,
    "edit_drag": edit_drag,
    "edit_photo": edit_photo,
}
