"""Photo editing: one example for each job, on a photo of one's own and with the canvas."""

from __future__ import annotations

import json
from typing import Any

# Every ComfyUI has this drawing among its inputs: 768 x 768.
PHOTO = "input/example.png"
SIZE = (768, 768)
CLOUD = [
    [520, 84], [522, 42], [574, 24], [636, 28], [662, 50], [696, 50], [742, 94], [722, 132], [694, 132], [668, 160], [632, 144],
    [616, 126], [641, 95], [634, 70], [608, 58], [560, 84],
]  # fmt: skip
DRESS = [
    [321, 330], [340, 321], [360, 322], [436, 323], [446, 346], [449, 384], [447, 420], [449, 458], [463, 490], [472, 518], [486, 552],
    [492, 588], [494, 612], [502, 636], [503, 652], [486, 660], [416, 666], [330, 666], [266, 664], [259, 640], [270, 612], [288, 564],
    [300, 516], [307, 468], [307, 440], [310, 408], [310, 384], [314, 348],
]  # fmt: skip
# The bundled model has never seen a photo: what was vacated is held to a smooth fill.
ON_A_PHOTO = {"cfg": 1.0, "hold_fill": 0.9}
WITH_YOURS = (
    "**Your own model**: choose an SD1.5 or SDXL checkpoint in *Load Model*, describe the photo in *What the photo shows*, and set cfg 2 "
    "and hold_fill 0.3. Sizes follow the photo and the model. The bundled model is tiny and has never seen a photo."
)


def _drawing(*shapes: dict[str, Any], size: tuple[int, int] = SIZE) -> str:
    """Return what a person paints on the canvas."""
    return json.dumps({"size": list(size), "shapes": list(shapes)})


def _invert(g: Any, model: Any, image: Any, prompt: Any, title: str = "") -> Any:
    return g.add("SlipstreamInvert", model=model, vae=model, image=image, positive=prompt, steps=16, title=title)


def _model(g: Any, text: str, title: str = "What the photo shows") -> tuple[Any, Any]:
    model = g.add("SlipstreamLoadModel", model="pocket")
    return model, g.add("CLIPTextEncode", clip=model, text=text, title=title)


def _edited(
    g: Any, model: Any, photo: Any, inversion: Any, tasks: Any, prompt: Any, name: str, **settings: Any
) -> tuple[Any, Any, Any, Any]:
    """Add the edit and what it gives; returns (negative prompt, edit, before and after, saved result)."""
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")
    edit = g.add(
        "SlipstreamEditSampler", model=model, vae=model, inversion=inversion, tasks=tasks, positive=prompt, negative=blank, **settings
    )  # fmt: skip
    both = g.add("SlipstreamBeforeAfter", before=photo["IMAGE"], after=edit["image"], size=(440, 0))
    saved = g.add("SaveImage", images=edit["image"], filename_prefix=f"slipstream/{name}", title="Saved")
    return blank, edit, both, saved


def _photo_workflow(g: Any, name: str, second: str, task: Any, note: str, **settings: Any) -> tuple[Any, Any, Any]:
    """Lay out an edit of one photo; `task(g, photo)` adds the node that says what happens. Returns (photo, task, result)."""
    photo = g.add("LoadImage", image=g.upload(PHOTO), title="Your photo")
    tasks = task(g, photo)
    model, prompt = _model(g, "a photo")
    inversion = _invert(g, model, photo["IMAGE"], prompt)
    blank, edit, both, saved = _edited(g, model, photo, inversion, tasks, prompt, name, **{**ON_A_PHOTO, **settings})
    g.note(f"{note}\n\n{WITH_YOURS}")
    g.section("1 Your photo", [photo])
    g.section(f"2 {second}", [tasks])
    g.section("3 Result", [both])
    g.section("Model and settings", [model, prompt], [inversion, blank], [edit], [saved], row=1)
    return photo, tasks, saved


def edit_move(g: Any) -> None:
    def task(g: Any, photo: Any) -> Any:
        drawing = _drawing({"box": [449, 332, 606, 390]})
        return g.add(
            "SlipstreamMove", image=photo["IMAGE"], canvas=drawing, dx=-10.0, dy=-38.0, angle=-30.0, size=(440, 0)
        )

    photo, tasks, saved = _photo_workflow(
        g, "edit_move", "What moves", task,
        "# Move an object in a photo\n\n1. Load your photo.\n2. Press *Clear*, then *Paint*, *Box* or *Lasso*: mark the object.\n"
        "3. Press *Move* and pull it to its place. Corners resize it, the blue knob turns it.\n4. Press **Run**.\n\n"
        "Every pixel outside the edit stays the photo's own.",
    )  # fmt: skip
    g.app([(photo, "image"), (tasks, "canvas")], [saved])
    named = {node.type: node for node in reversed(g.nodes)}
    # Newer frontends draw no canvas of a node inside a sub-graph on the sub-graph, so the node with the canvas stays outside.
    g.blueprint(
        "Edit a photo",
        "Moves, resizes, turns, pastes or removes an object of a photo: what Move / Resize Object, Paste Object, Appearance, "
        "Remove Object or Drag Points give goes into tasks. Paint on that node.",
        [photo, tasks, named["SlipstreamBeforeAfter"], saved],
        [(named["SlipstreamLoadModel"], "model"), (named["CLIPTextEncode"], "text")],
    )  # fmt: skip


def edit_move_sd(g: Any) -> None:
    edit_move(g)
    url = "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors"
    g.on_checkpoint(url, "2.1 GB", SlipstreamEditSampler={"cfg": 2.0, "hold_fill": 0.3})


def edit_paste(g: Any) -> None:
    photo = g.add("LoadImage", image=g.upload(PHOTO), title="Your photo")
    other = g.add("LoadImage", image=g.upload(PHOTO), title="The other photo")
    model, prompt = _model(g, "a photo", "What the photos show")
    inversion = _invert(g, model, photo["IMAGE"], prompt)
    reference = _invert(g, model, other["IMAGE"], prompt, "Invert the other photo")
    tasks = g.add(
        "SlipstreamPaste", reference=reference, image=photo["IMAGE"], canvas=_drawing({"outline": CLOUD}), dx=20.0, dy=140.0,
        size=(440, 0),
    )  # fmt: skip
    blank, edit, both, saved = _edited(g, model, photo, inversion, tasks, prompt, "edit_paste", cfg=1.0)
    g.note(
        "# Paste an object into a photo\n\n1. Load both photos.\n2. Press *Clear* and mark the object on the other photo.\n"
        f"3. Press *Move* and place it on yours.\n4. Press **Run**.\n\n{WITH_YOURS}"
    )
    g.section("1 Your photos", [photo, other])
    g.section("2 What is pasted, and where", [tasks])
    g.section("3 Result", [both])
    g.section("Model and settings", [model, prompt], [inversion, reference], [edit], [blank, saved], row=1)


def edit_appearance(g: Any) -> None:
    photo = g.add("LoadImage", image=g.upload(PHOTO), title="Your photo")
    other = g.add("LoadImage", image=g.upload(PHOTO), title="The photo with the look")
    model, prompt = _model(g, "a photo", "What the photos show")
    inversion = _invert(g, model, photo["IMAGE"], prompt)
    reference = _invert(g, model, other["IMAGE"], prompt, "Invert the photo with the look")
    tasks = g.add(
        "SlipstreamAppearance", reference=reference, image=photo["IMAGE"], canvas=_drawing({"outline": DRESS}),
        reference_canvas=_drawing({"box": [264, 226, 330, 282]}), size=(440, 0),
    )  # fmt: skip
    blank, edit, both, saved = _edited(
        g, model, photo, inversion, tasks, prompt, "edit_appearance", cfg=1.0, hold_fill=0.95
    )
    g.note(
        "# Give an object another look\n\n1. Load your photo and the photo with the look; they may be the same.\n2. Paint the object that "
        "changes on the upper canvas.\n3. Paint what it should look like on the lower one.\n4. Press **Run**.\n\nThe object keeps its "
        f"shape. A higher *hold_fill* keeps more of the look, a lower one leaves more to the model.\n\n{WITH_YOURS}"
    )
    g.section("1 Your photos", [photo, other])
    g.section("2 What changes, and what it looks like", [tasks])
    g.section("3 Result", [both])
    g.section("Model and settings", [model, prompt], [inversion, reference], [edit], [blank, saved], row=1)


def edit_drag(g: Any) -> None:
    def task(g: Any, photo: Any) -> Any:
        points = [[{"x": 585, "y": 360}, {"x": 470, "y": 365}], [{"x": 590, "y": 322}, {"x": 470, "y": 365}]]
        handles, targets = (json.dumps(each) for each in points)
        drawing = _drawing({"brush": [[470, 350], [600, 335]], "width": 120})
        return g.add(
            "SlipstreamDrag", image=photo["IMAGE"], handles=handles, targets=targets, method="warp", canvas=drawing, size=(440, 0)
        )  # fmt: skip

    _photo_workflow(
        g, "edit_drag", "What is pulled", task,
        "# Pull points of a photo\n\n1. Load your photo.\n2. Press *Clear*, then press on a point and pull it to its target. A click pins "
        "a point.\n3. Press **Run**.\n\nOnly the shaded area may change: paint another one where that is too much.",
    )  # fmt: skip


def _drawn(g: Any, model: Any, blank: Any, text: str, seed: int, title: str) -> tuple[Any, list[Any]]:
    """Add an image of the bundled model, the stand-in for a photo; returns it and its nodes."""
    prompt = g.add("CLIPTextEncode", clip=model, text=text, title=title)
    empty = g.add("SlipstreamEmptyLatent", model=model)
    latent = g.add(
        "KSampler", model=model, positive=prompt, negative=blank, latent_image=empty, seed=seed, steps=20, cfg=3.0,
        sampler_name="euler", scheduler="simple", title=title,
    )  # fmt: skip
    image = g.add("VAEDecode", samples=latent, vae=model)
    return image, [prompt, empty, latent, image]


def harmonise(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket-flow")
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")
    image, first = _drawn(g, model, blank, "a large lion on the left on a blue striped background", 3, "The background")
    other, second = _drawn(g, model, blank, "a large apple in the center on a green background", 5, "What is pasted")
    whole = g.add("SolidMask", value=1.0, width=first[1]["width"], height=first[1]["height"], title="All of it")
    collage = g.add(
        "SlipstreamSeedCanvas", image=other, keep=whole, picture=image, background="picture", width=first[1]["width"],
        height=first[1]["height"], scale=0.5, x=0.88, y=0.5, size=(440, 0),
    )  # fmt: skip
    text = "a large lion on the left and a small apple on the right on a blue striped background"
    wanted = g.add("CLIPTextEncode", clip=model, text=text, title="What the result shows")
    made = g.add(
        "SlipstreamHarmonise", model=model, vae=model, image=collage["canvas"], mask=collage["keep"], positive=wanted, negative=blank,
        seed=1, hold_seam=0.0, size=(440, 0),
    )  # fmt: skip
    both = g.add(
        "SlipstreamBeforeAfter",
        before=collage["canvas"],
        after=made["image"],
        captions="Collage | One image",
        size=(440, 0),
    )
    saved = g.add("SaveImage", images=made["image"], filename_prefix="slipstream/harmonise", title="Saved")
    g.note(
        "# Make a collage one image\n\n"
        "The pasted piece has brought its own background along. What was pasted follows the collage for most of the "
        "steps, the seam around it is painted again, everything else is the background's own.\n\n"
        "**With your own images**: connect Load Image to *picture* (the background) and to *image* of Place Subject, paint the piece, "
        "press *Move* and place it. Its mask comes from the canvas, so nothing is connected to *keep*. Describe what the result shows.\n\n"
        "**Your own model**: choose a checkpoint in *Load Model*, and write prompts of its kind. Sizes follow the model."
    )
    g.section("1 The collage", [collage])
    g.section("2 What it shows, and how", [wanted, made])
    g.section("3 Result", [both])
    g.section("The images, and the model", first, second, [whole, model], [blank, saved], row=1)


def edit_preview(g: Any) -> None:
    photo = g.add("LoadImage", image=g.upload(PHOTO), title="Your photo")
    goes = g.add("SlipstreamRemove", image=photo["IMAGE"], canvas=_drawing({"box": [60, 600, 160, 700]}))
    tasks = g.add(
        "SlipstreamMove",
        image=photo["IMAGE"],
        canvas=_drawing({"outline": CLOUD}),
        dx=20.0,
        dy=130.0,
        angle=20.0,
        tasks=goes,
    )
    g.add("SlipstreamEditPreview", image=photo["IMAGE"], tasks=tasks)
    g.note("Arrows, ghosts and masks of an edit before any sampling.")


WORKFLOWS = {
    "01 Move an object in a photo": edit_move,
    "05 Paste an object into a photo": edit_paste,
    "06 Give an object another look": edit_appearance,
    "07 Make a collage one image": harmonise,
    "08 Pull points of a photo": edit_drag,
    "14 Move an object in a photo, SD1.5": edit_move_sd,
}

TRIED = {"edit_preview": edit_preview}
