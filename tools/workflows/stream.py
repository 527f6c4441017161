"""StreamDiffusion: a video through a Stream Batch, and residual CFG beside plain CFG."""

from __future__ import annotations

from typing import Any

GREEN = "a large yellow circle on a green background"
RED = "a large blue circle on a red background"


def _prompts(g: Any, model: Any, text: str) -> tuple[Any, Any]:
    return (
        g.add("CLIPTextEncode", clip=model, text=text, title="Prompt"),
        g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt"),
    )


def stream_video(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket-lcm")
    prompt, blank = _prompts(g, model, GREEN)
    clip = g.add("SlipstreamExampleClip", model=model)
    stream = g.add(
        "SlipstreamStreamFrames", model=model, positive=prompt, negative=blank, vae=model, frames=clip["frames"],
        strength=0.75, steps=2, guidance="none", guidance_scale=1.0, seed=3,
    )  # fmt: skip
    both = g.add(
        "SlipstreamBeforeAfter", before=clip["frames"], after=stream, captions="Your clip | Repainted", size=(440, 0)
    )
    result = g.add("CreateVideo", images=both, fps=clip["fps"])
    video = g.add("SaveVideo", video=result, filename_prefix="slipstream/stream", size=(440, 460))
    report = g.add("PreviewAny", source=stream["report"], title="Report", size=(440, 200))
    g.section("1 Your clip and the look", [clip, prompt, model])
    g.section("2 How it is repainted", [stream])
    g.section("3 Result", [video])
    g.section("More", [blank], [result], [both], [report], row=1)
    g.blueprint(
        "Repaint frames", "Repaints the frames of a clip with one noise for all of them, so that what rests does not flicker.",
        [node for node in g.nodes if node not in (model, prompt, blank, stream)],
        [(model, "model"), (prompt, "text"), (stream, "strength"), (stream, "steps")],
    )  # fmt: skip
    g.app([(prompt, "text"), (stream, "strength"), (stream, "steps")], [video])
    g.note(
        "# Repaint a clip\n\n"
        "Every frame of the clip is repainted by the same noise, so what rests does not flicker. **strength** says how much; "
        "**steps** 1 to 4 are enough for LCM and Turbo models, which need no guidance; for others choose onetime and 4 steps "
        "or more. For a clip of your own put **Load Video** and **Get Video Components** in place of Example Clip, and connect "
        "images, audio and fps: the sound is kept.\n\n**Your own model**: choose a checkpoint in *Load Model* and write prompts of "
        "its kind. The example clip takes the size of the model; a clip of your own should be near it."
    )


def paint_over_webcam(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket-lcm")
    prompt, blank = _prompts(g, model, RED)
    live = g.add(
        "SlipstreamLiveStream", model=model, vae=model, positive=prompt, negative=blank, clip=model, prompt=RED, strength=0.75,
        steps=1, guidance="none", guidance_scale=1.0, size=(640, 1180),
    )  # fmt: skip
    frames = g.add("PreviewImage", images=live, title="The last frames", size=(420, 420))
    report = g.add("PreviewAny", source=live["report"], title="Report", size=(420, 200))
    g.section("1 Model and look", [model, prompt, blank])
    g.section("2 Press Start in the panel", [live])
    g.section("3 After Stop", [frames, report])
    g.note(
        "# Paint over my webcam\n\n"
        "Press **Start** in the panel and allow the camera; or choose a screen, a video file, or frames that a program pushes. "
        "Type another **prompt** and move **strength** while it runs: each takes effect at once, and stays in the node. The line "
        "under the images says how many frames a second come out and which stage limits. **Stop** gives the last frames. A "
        "tiny VAE (TAESD) in place of that of a large model makes it several times faster.\n\n**Your own model**: on a GPU choose "
        "SD-Turbo or an LCM checkpoint in *Load Model*. The frames have the size that the model was made for; smaller ones are "
        "faster. The bundled model makes a few small frames a second on a CPU."
    )


def paint_over_webcam_turbo(g: Any) -> None:
    paint_over_webcam(g)
    text = "an oil painting of a person, thick brush strokes, warm light"
    url = "https://huggingface.co/stabilityai/sd-turbo/resolve/main/sd_turbo.safetensors"
    g.on_checkpoint(
        url,
        "5.2 GB",
        Prompt={"text": text},
        SlipstreamLiveStream={"prompt": text, "strength": 0.5, "acceleration": "graph"},
    )


def stream_blend(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket-lcm")
    first, blank = _prompts(g, model, GREEN)
    second = g.add("CLIPTextEncode", clip=model, text=RED, title="Prompt at the end")
    clip = g.add("SlipstreamExampleClip", model=model, frames=16)
    prompt = g.add(
        "SlipstreamBlendPrompts",
        first=first,
        second=second,
        weight=0.0,
        mode="linear",
        frames=clip["frames"],
        weight_end=1.0,
    )
    stream = g.add(
        "SlipstreamStreamFrames", model=model, positive=prompt, negative=blank, vae=model, frames=clip["frames"],
        strength=0.75, steps=2, guidance="none", guidance_scale=1.0, seed=3,
    )  # fmt: skip
    g.add("PreviewImage", images=stream, title="From one prompt to the other")
    some = g.add("ImageFromBatch", image=stream, batch_index=6, length=4)
    g.add("PreviewImage", images=some, title="Frames 6 to 9: half way")
    g.note(
        "**Blend Prompts** with a clip makes one prompt for each frame, from **weight** to **weight_end**; Stream Frames takes "
        "each frame through all its steps with its own. Without a clip it makes a single prompt, for any sampler."
    )


def rcfg_guider(g: Any) -> None:
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt, blank = _prompts(g, model, "a large red circle on a blue background")
    plain = g.add("CFGGuider", model=model, positive=prompt, negative=blank, cfg=2.0, title="Plain CFG: 2 N rows")
    ours = g.add(
        "SlipstreamRCFGGuider", model=model, positive=prompt, negative=blank, guidance="onetime", guidance_scale=1.5,
        delta=0.25, title="RCFG: N + 1 rows",
    )  # fmt: skip
    noise = g.add("RandomNoise", noise_seed=11)
    sampler = g.add("KSamplerSelect", sampler_name="euler")
    sigmas = g.add("BasicScheduler", model=model, scheduler="normal", steps=20, denoise=1.0)
    latent = g.add("SlipstreamEmptyLatent", model=model, batch_size=2)
    images = []
    for guider in (plain, ours):
        samples = g.add(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
        )
        images.append(g.add("VAEDecode", samples=samples, vae=model))
    both = g.add("ImageStitch", image1=images[0], image2=images[1], direction="down", spacing_width=4)
    g.add("SaveImage", images=both, filename_prefix="slipstream/rcfg")
    g.note(
        "Above plain CFG, below residual CFG from the same noise, for about half the work. A guidance scale of 1.2 to 1.6 is "
        "enough here; with many steps a small **delta** keeps the colours natural."
    )


def similarity_filter(g: Any) -> None:
    clip = g.add("SlipstreamExampleClip")
    kept = g.add(
        "SlipstreamSimilarityFilter", frames=clip["frames"], similarity=0.8, max_skip=10, blocks=1, filter_seed=0
    )
    g.add("PreviewImage", images=kept, title="Kept frames")
    g.add("PreviewAny", source=kept["indices"], title="Their numbers")
    g.add("PreviewAny", source=kept["count"], title="How many")
    g.note(
        "Frames that look like the last kept one are left out, the more alike the likelier. **blocks** 1 compares whole "
        "images, as published; more blocks notice small things that move. Stream Frames has the same filter built in."
    )


WORKFLOWS = {
    "02 Repaint a clip": stream_video,
    "13 Paint over my webcam": paint_over_webcam,
    "15 Paint over my webcam, SD Turbo": paint_over_webcam_turbo,
}
TRIED = {"stream_blend": stream_blend, "rcfg_guider": rcfg_guider, "similarity_filter": similarity_filter}
