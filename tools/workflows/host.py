"""The bundled model on the host's own nodes."""

from __future__ import annotations

from typing import Any


def text_to_image(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket-flow")
    prompt = g.add(
        "CLIPTextEncode",
        clip=model,
        text="a large fox on the left and a small apple on the right on a blue shaded background",
        title="Prompt",
    )
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")
    latent = g.add("SlipstreamEmptyLatent", model=model, batch_size=4)
    samples = g.add(
        "KSampler", model=model, positive=prompt, negative=blank, latent_image=latent,
        seed=7, steps=20, cfg=3.0, sampler_name="euler", scheduler="simple",
    )  # fmt: skip
    image = g.add("VAEDecode", samples=samples, vae=model)
    doctor = g.add("SlipstreamDoctor", model=model, vae=model)
    report = g.add("PreviewAny", source=doctor["report"], title="Report")
    result = g.add(
        "SaveImage", images=image, filename_prefix="slipstream/text_to_image", title="Result", size=(440, 500)
    )
    g.section("1 Prompt", [prompt, blank])
    g.section("2 Model", [model, latent], [samples, image])
    g.section("3 Result", [result])
    g.section("What this model can do", [doctor], [report], row=1)
    g.note(
        "# Draw with the bundled model\n\n"
        "The bundled model pocket-flow runs on the host's own nodes, without a download. It is tiny and knows sixty things and six shapes, "
        "for example *a large lion in the center on a green striped background*.\n\n"
        "**Your own model**: choose a checkpoint in *Load Model*. The size follows the model."
    )


WORKFLOWS = {"12 Draw with the bundled model": text_to_image}
