"""Photo editing: one example for each task on the bundled model, and one on a real photo."""

from __future__ import annotations

import json
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


def _invert(g: Any, model: Any, image: Any, prompt: Any, title: str = "", **settings: Any) -> Any:
    return g.add(
        "SlipstreamInvert", model=model, vae=model, image=image, positive=prompt, steps=16, title=title, **settings
    )


# Every ComfyUI has this photo among its inputs: 768 x 768.
PHOTO = "input/example.png"
CLOUD = [
    [525, 80], [527, 48], [575, 30], [632, 34], [658, 56], [692, 56], [736, 96], [718, 126], [690, 126], [666, 154], [638, 140], [622, 126],
    [641, 95], [634, 70], [608, 58], [560, 84],
]  # fmt: skip


def _drawing(size: tuple[int, int], *shapes: dict[str, Any]) -> str:
    """Return what a person paints on the canvas."""
    return json.dumps({"size": list(size), "shapes": list(shapes)})


def _result(
    g: Any, model: Any, photo: Any, inversion: Any, tasks: Any, prompt: Any, name: str, **settings: Any
) -> tuple[Any, Any]:
    """Add the edit and what it gives; returns (edit, result)."""
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")
    edit = g.add(
        "SlipstreamEditSampler", model=model, vae=model, inversion=inversion, tasks=tasks, positive=prompt, negative=blank, **settings
    )  # fmt: skip
    result = g.add(
        "SaveImage", images=edit["image"], filename_prefix=f"slipstream/{name}", title="After", size=(440, 500)
    )
    return (blank, edit), result


# The bundled model is tiny and has never seen a photo: it works at a low size, and a vacated area is held to a smooth fill.
ON_A_PHOTO = {"cfg": 1.0, "hold_fill": 0.9}
WITH_YOURS = (
    "**Your own model**: pick an SD1.5 or SDXL checkpoint in *Load Model*, describe the photo in *What the photo shows*, set "
    "megapixels 0.4 or 1.0, cfg 2 and hold_fill 0.3. The bundled model is tiny and has never seen a photo."
)


def _photo_workflow(
    g: Any, name: str, second: str, task: Any, note: str, photo: Any = None, megapixels: float = 0.07, **settings: Any
) -> None:
    """Lay out an edit of one photo; `task(g, photo)` adds the node that says what happens."""
    image = photo or g.add("LoadImage", image=g.upload(PHOTO), title="Your photo")
    tasks = task(g, image)
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt = g.add("CLIPTextEncode", clip=model, text="a photo", title="What the photo shows")
    inversion = _invert(g, model, image["IMAGE" if photo is None else "image"], prompt, megapixels=megapixels)
    (blank, edit), result = _result(g, model, image, inversion, tasks, prompt, name, **{**ON_A_PHOTO, **settings})
    g.note(f"{note}\n\n{WITH_YOURS}")
    g.section("1 Your photo", [image])
    g.section(f"2 {second}", [tasks])
    g.section("3 Result", [result])
    g.section("Model and settings", [model, prompt], [inversion, blank], [edit], row=1)


def edit_move(g: Any) -> None:
    def task(g: Any, photo: Any) -> Any:
        drawing = _drawing((768, 768), {"box": [449, 334, 604, 394]})
        return g.add(
            "SlipstreamMove", image=photo["IMAGE"], canvas=drawing, dx=-10.0, dy=-38.0, angle=-30.0, title="Move / Resize", size=(440, 0)
        )  # fmt: skip

    _photo_workflow(
        g, "edit_move", "What moves", task,
        "# Move an object in a photo\n\n1. Load your photo.\n2. Press *Clear*, then *Paint*, *Box* or *Lasso*: mark the object.\n"
        "3. Press *Move* and pull it to its place. Corners resize it, the blue knob turns it.\n4. Press **Run**.\n\n"
        "Every pixel outside the edit stays the photo's own. Invert runs once per photo: after that a new place costs only the edit.",
    )  # fmt: skip


def edit_paste(g: Any) -> None:
    photo = g.add("LoadImage", image=g.upload(PHOTO), title="Your photo")
    other = g.add("LoadImage", image=g.upload(PHOTO), title="The other photo")
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt = g.add("CLIPTextEncode", clip=model, text="a photo", title="What the photos show")
    inversion = _invert(g, model, photo["IMAGE"], prompt, megapixels=0.07)
    reference = _invert(g, model, other["IMAGE"], prompt, "Invert the other photo", megapixels=0.07)
    drawing = _drawing((768, 768), {"outline": CLOUD})
    tasks = g.add(
        "SlipstreamPaste",
        reference=reference,
        image=photo["IMAGE"],
        canvas=drawing,
        dx=20.0,
        dy=130.0,
        scale=0.8,
        size=(440, 0),
    )
    (blank, edit), result = _result(g, model, photo, inversion, tasks, prompt, "edit_paste", cfg=1.0)
    g.note(
        "# Paste an object of another photo\n\n1. Load both photos.\n2. Press *Clear* and mark the object on the other photo.\n"
        f"3. Press *Move* and place it on yours.\n4. Press **Run**.\n\n{WITH_YOURS}"
    )
    g.section("1 Your photos", [photo, other])
    g.section("2 What is pasted, and where", [tasks])
    g.section("3 Result", [result])
    g.section("Model and settings", [model, prompt], [inversion, reference], [edit], [blank], row=1)


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
    def task(g: Any, photo: Any) -> Any:
        points = [[{"x": 585, "y": 360}, {"x": 470, "y": 365}], [{"x": 590, "y": 322}, {"x": 470, "y": 365}]]
        handles, targets = (json.dumps(each) for each in points)
        drawing = _drawing((768, 768), {"brush": [[470, 350], [600, 335]], "width": 120})
        return g.add(
            "SlipstreamDrag", image=photo["IMAGE"], handles=handles, targets=targets, method="warp", canvas=drawing, size=(440, 0)
        )  # fmt: skip

    _photo_workflow(
        g, "edit_drag", "What is pulled", task,
        "# Pull points of a photo\n\n1. Load your photo.\n2. Press *Clear*, then press on a point and pull it to its target. A click pins "
        "a point.\n3. Press **Run**.\n\nOnly the shaded area may change: paint another one where that is too much.",
    )  # fmt: skip


def edit_photo(g: Any) -> None:
    photo = g.add("SlipstreamExamplePhoto", photo="astronaut")

    def task(g: Any, photo: Any) -> Any:
        drawing = _drawing((512, 512), {"brush": [[172, 385]], "width": 74})
        return g.add(
            "SlipstreamMove", image=photo["image"], canvas=drawing, dx=-62.0, dy=36.0, scale=0.8, size=(440, 0)
        )

    _photo_workflow(
        g, "edit_photo", "What moves", task,
        "# A badge moves\n\nThe badge moves and shrinks; every pixel outside the edit is the photo's own. The canvas shows the photo after "
        "the first run, because it does not come from a Load Image.", photo=photo,
    )  # fmt: skip


def harmonise(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    _, image = _picture(g, model, "a small red circle on the left on a blue background", 3, "The background's prompt")
    _, other = _picture(
        g, model, "a small yellow square in the center on a green background", 5, "The other image's prompt"
    )
    # The host's Compositor does the same with a mouse.
    cut = g.add("ImageCrop", image=other, width=64, height=64, x=32, y=32)
    pasted = g.add("ImageCompositeMasked", destination=image, source=cut, x=56, y=40, resize_source=False)
    there = _mask(g, 56, 40, 64, 64, title="Where it was pasted")
    text = "a small red circle on the left and a small yellow square on the right on a blue background"
    wanted = g.add("CLIPTextEncode", clip=model, text=text, title="What the result shows")
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")
    made = g.add(
        "SlipstreamHarmonise", model=model, vae=model, image=pasted, mask=there, positive=wanted, negative=blank, seed=1, hold_seam=0.0
    )  # fmt: skip
    joined = g.add("ImageStitch", image1=pasted, image2=made["image"], direction="right", spacing_width=4)
    g.add("SaveImage", images=joined, filename_prefix="slipstream/harmonise")
    g.note(
        "**Harmonise.** Left: composed by hand; the pasted piece has brought its own background along. Right: made one image. Compose "
        "with any node, the host's Compositor too, and give the mask of what was pasted."
    )


WORKFLOWS = {
    "edit_move": edit_move,
    "edit_paste": edit_paste,
    "edit_appearance": edit_appearance,
    "edit_drag": edit_drag,
    "edit_photo": edit_photo,
    "harmonise": harmonise,
}
