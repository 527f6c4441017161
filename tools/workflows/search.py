"""Example workflows of the schedule search; all finish within two minutes on two CPU cores."""

from __future__ import annotations

from typing import Any

PROMPTS = "\n".join(
    [
        "a large red circle on a blue background",
        "a small yellow star on the left on a purple background",
        "a large green square on the right on a white background",
        "a large orange ring at the top on a black background",
    ]
)
PROMPT = "a large red circle on a blue background"


def _guided(g: Any) -> tuple[Any, Any, Any, Any]:
    model, prompt, blank = _prompted(g)
    guider = g.add("CFGGuider", model=model, positive=prompt, negative=blank, cfg=3.0)
    sampler = g.add("KSamplerSelect", sampler_name="euler")
    return model, guider, sampler, g.add("SlipstreamEmptyLatent", model=model)


def _prompted(g: Any) -> tuple[Any, Any, Any]:
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt = g.add("CLIPTextEncode", clip=model, text=PROMPT, title="Prompt")
    return model, prompt, g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")


YOURS = (
    "**Your own model**: choose a checkpoint in *Load Model*, write prompts of its kind in *Search Schedule*, and set cfg to what you use. "
    "The size follows the model. More *evaluations* and *pairs* give a better schedule."
)


def search_schedule(g: Any) -> None:
    model, guider, sampler, empty = _guided(g)
    prompt, blank = (node for node in g.nodes if node.type == "CLIPTextEncode")
    found = g.add(
        "SlipstreamSearchSchedule", guider=guider, sampler=sampler, latent_image=empty, clip=model, steps=3,
        evaluations=30, pairs=8, prompts=PROMPTS, size=(440, 0),
    )  # fmt: skip
    noise = g.add("RandomNoise", noise_seed=7)
    scheduled = [
        (f"{steps} steps of {name}", g.add("BasicScheduler", model=model, scheduler=name, steps=steps, denoise=1.0))
        for steps, name in ((20, "normal"), (3, "karras"), (3, "normal"))
    ]
    images, sampled = [], []
    for _, sigmas in [*scheduled, ("", found["sigmas"])]:
        samples = g.add(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=empty
        )
        images.append(g.add("VAEDecode", samples=samples["output"], vae=model))
        sampled += [samples, images[-1]]
    captions = " | ".join([*(title for title, _ in scheduled), "3 searched steps"])
    shown = g.add(
        "SlipstreamBeforeAfter",
        before=images[0],
        after=images[1],
        third=images[2],
        fourth=images[3],
        captions=captions,
        size=(440, 0),
    )
    report = g.add("PreviewAny", source=found["report"], title="Report", size=(440, 0))
    kept = g.add("SlipstreamSaveSchedule", schedule=found["schedule"], name="pocket_3_steps", overwrite=True)
    chart = g.add("SaveImage", images=found["chart"], filename_prefix="slipstream/search_schedule", title="Chart")
    g.note(
        "# Find my fastest schedule\n\n"
        "Press **Run**: the best score so far shows as a live plot on the node. Cancel whenever you like; the next "
        "Run resumes it. The schedule is saved, and *Load Schedule* lists it.\n\nAll four images have the same prompt and noise.\n\n"
        + YOURS
    )
    g.section("1 Your model and prompt", [model, prompt])
    g.section("2 The search", [found])
    g.section("3 Result", [shown, report])
    g.section(
        "How",
        [blank, guider, sampler, empty],
        [noise, *(s for _, s in scheduled)],
        sampled[:4],
        sampled[4:],
        [kept, chart],
        row=1,
    )
    g.app([(model, "model"), (prompt, "text"), (found, "steps"), (found, "evaluations"), (found, "prompts")], [shown])


def fewer_calls(g: Any) -> None:
    model, prompt, blank = _prompted(g)
    guider = g.add("CFGGuider", model=model, positive=prompt, negative=blank, cfg=3.0)
    sampler = g.add("KSamplerSelect", sampler_name="euler")
    empty = g.add("SlipstreamEmptyLatent", model=model)
    full = g.add("BasicScheduler", model=model, scheduler="karras", steps=12, denoise=1.0, title="What you use today")
    found = g.add(
        "SlipstreamSearchSchedule", guider=guider, sampler=sampler, latent_image=empty, clip=model, steps=12,
        computed=4, sigmas=full, evaluations=30, pairs=8, prompts=PROMPTS, size=(440, 0),
    )  # fmt: skip
    reusing = g.add("SlipstreamApplyCallReuse", model=model, schedule=found["schedule"])
    fast = g.add("CFGGuider", model=reusing, positive=prompt, negative=blank, cfg=3.0)
    plain = g.add("BasicScheduler", model=model, scheduler="karras", steps=4, denoise=1.0, title="Plain 4 steps")
    noise = g.add("RandomNoise", noise_seed=7)
    images, sampled = [], []
    for sigmas, by in ((full, guider), (plain, guider), (found["sigmas"], fast)):
        samples = g.add(
            "SamplerCustomAdvanced", noise=noise, guider=by, sampler=sampler, sigmas=sigmas, latent_image=empty
        )
        images.append(g.add("VAEDecode", samples=samples["output"], vae=model))
        sampled += [samples, images[-1]]
    shown = g.add(
        "SlipstreamBeforeAfter", before=images[0], after=images[1], third=images[2],
        captions="12 calls | 4 plain steps | 4 searched calls", size=(600, 0),
    )  # fmt: skip
    report = g.add("PreviewAny", source=found["report"], title="Report", size=(600, 0))
    g.note(
        "# Keep my steps, make fewer calls\n\n"
        "Your 12 steps with 4 network calls: the search chooses which of your steps call the model and how "
        "the others reuse those calls.\n\n" + YOURS
    )
    g.section("1 Your model and steps", [model, prompt, full])
    g.section("2 The search", [found])
    g.section("3 Result", [shown, report])
    g.section("How", [blank, guider, sampler, empty], [reusing, fast, plain, noise], sampled[:4], sampled[4:], row=1)


def compare_schedules(g: Any) -> None:
    model, guider, sampler, empty = _guided(g)
    searched = g.add("SlipstreamLoadSchedule", file="preset: pocket_3", title="Searched for this model")
    published = g.add("SlipstreamLoadSchedule", file="preset: ays_sdxl_10", steps=3, title="Published for SDXL")
    more = g.add("SlipstreamAddSchedule", name="SDXL list, resampled", schedule=published["schedule"])
    beta = g.add("BasicScheduler", model=model, scheduler="beta", steps=4, denoise=1.0)
    more = g.add("SlipstreamAddSchedule", name="beta, one step more", sigmas=beta, schedules=more)
    goal = g.add("SlipstreamSelfObjective", vae=model, features="pixels", distance="paired")
    result = g.add(
        "SlipstreamCompareSchedules", guider=guider, sampler=sampler, latent_image=empty, clip=model, stock_steps=3,
        pairs=6, repeats=3, schedule=searched["schedule"], schedules=more, prompts=PROMPTS, custom_objective=goal,
    )  # fmt: skip
    g.add("PreviewAny", source=result["table"], title="Table")
    g.add("SaveImage", images=result["chart"], filename_prefix="slipstream/compare_schedules", title="Chart")
    g.note(
        "# Compare schedules\n\n"
        "Is it better than karras, beta, Align Your Steps? Every schedule is sampled on the same fresh noise; bars are 95 % "
        "intervals over three repeats, in the latents and in the decoded images. Add as many schedules as you like with Add "
        "Schedule to Compare.\n\n**Your own model**: choose a checkpoint in *Load Model*. The size follows the model.",
        height=240,
    )


def search_layers(g: Any) -> None:
    model, guider, sampler, empty = _guided(g)
    found = g.add(
        "SlipstreamSearchSchedule", guider=guider, sampler=sampler, latent_image=empty, clip=model, steps=2,
        evaluations=120, pairs=8, layers=True, prompts=PROMPTS,
    )  # fmt: skip
    g.add("PreviewAny", source=found["report"], title="Report")
    masked = g.add("SlipstreamApplyLayerMask", model=model, schedule=found["schedule"])
    positive = g.add("CLIPTextEncode", clip=model, text=PROMPT, title="Prompt, masked model")
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt, masked model")
    skipping = g.add("CFGGuider", model=masked, positive=positive, negative=blank, cfg=3.0)
    longer = g.add("SlipstreamResampleSchedule", schedule=found["schedule"], steps=6)
    noise = g.add("RandomNoise", noise_seed=7)
    shown = []
    for title, by, sigmas in (
        ("2 steps, masked", skipping, found["sigmas"]), ("Resampled to 6 steps", guider, longer["sigmas"])
    ):  # fmt: skip
        samples = g.add(
            "SamplerCustomAdvanced", noise=noise, guider=by, sampler=sampler, sigmas=sigmas, latent_image=empty
        )
        shown.append(g.add("VAEDecode", samples=samples["output"], vae=model, title=title))
    both = g.add("ImageStitch", image1=shown[0], image2=shown[1], direction="right", spacing_width=4)
    g.add("SaveImage", images=both, filename_prefix="slipstream/search_layers")
    g.note(
        "Searches two steps and, with them, blocks of the network to leave out: every block is tried, so this takes 120 "
        "evaluations. **Often no mask is better than none**: then Apply Layer Mask returns the model as it is.",
        height=180,
    )


def compare_to_pictures(g: Any) -> None:
    model, guider, sampler, empty = _guided(g)
    prompt = g.add("CLIPTextEncode", clip=model, text=PROMPT, title="What the references show")
    blank = g.add("CLIPTextEncode", clip=model, text="", title="Nothing")
    many = g.add("SlipstreamEmptyLatent", model=model, batch_size=12, title="12 references")
    references = g.add(
        "KSampler", model=model, positive=prompt, negative=blank, latent_image=many, seed=99, steps=20, cfg=3.0,
        sampler_name="euler", scheduler="normal", title="References",
    )  # fmt: skip
    decoded = g.add("VAEDecode", samples=references, vae=model)
    goal = g.add("SlipstreamReferenceObjective", vae=model, features="pixels", distance="mmd", images=decoded)
    result = g.add(
        "SlipstreamCompareSchedules", guider=guider, sampler=sampler, latent_image=empty, stock_steps=2, pairs=8, repeats=3,
        custom_objective=goal,
    )  # fmt: skip
    g.add("PreviewAny", source=result["table"], title="Table")
    g.add("SaveImage", images=result["chart"], filename_prefix="slipstream/compare_to_pictures", title="Chart")
    g.note(
        "Which stock schedule comes closest to reference images in two steps? Here the references are the model's own; "
        "with yours, name a folder or connect a batch. mmd needs fewer images than frechet.",
        height=160,
    )


WORKFLOWS = {
    "03 Find my fastest schedule": search_schedule,
    "10 Keep my steps, make fewer calls": fewer_calls,
    "11 Compare schedules": compare_schedules,
}
TRIED = {"search_layers": search_layers, "compare_to_pictures": compare_to_pictures}
