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
    return model, guider, sampler, g.add("EmptyLatentImage", width=128, height=128)


def _prompted(g: Any) -> tuple[Any, Any, Any]:
    model = g.add("SlipstreamLoadModel", model="pocket")
    prompt = g.add("CLIPTextEncode", clip=model, text=PROMPT, title="Prompt")
    return model, prompt, g.add("CLIPTextEncode", clip=model, text="", title="Negative prompt")


def search_schedule(g: Any) -> None:
    model, guider, sampler, empty = _guided(g)
    found = g.add(
        "SlipstreamSearchSchedule", guider=guider, sampler=sampler, latent_image=empty, clip=model, steps=3,
        evaluations=30, pairs=8, prompts=PROMPTS,
    )  # fmt: skip
    noise = g.add("RandomNoise", noise_seed=7)
    shown = []
    karras = g.add("BasicScheduler", model=model, scheduler="karras", steps=3, denoise=1.0)
    for title, sigmas in (("Searched", found["sigmas"]), ("Karras, also 3 steps", karras)):
        batch = g.add("EmptyLatentImage", width=128, height=128, batch_size=1)
        samples = g.add(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=batch
        )
        shown.append(g.add("VAEDecode", samples=samples["output"], vae=model, title=title))
    both = g.add("ImageStitch", image1=shown[0], image2=shown[1], direction="right", spacing_width=4)
    g.add("SaveImage", images=both, filename_prefix="slipstream/search_pictures")
    g.add("PreviewAny", source=found["report"], title="Report")
    g.add("SlipstreamSaveSchedule", schedule=found["schedule"], name="pocket_3_steps", overwrite=True)
    g.add("SaveImage", images=found["chart"], filename_prefix="slipstream/search_schedule", title="Chart")
    g.note(
        "Press **Run**: the best score so far shows as a live plot on the node. Cancel whenever you like; Run goes on where "
        "it was. The schedule is saved, so that Load Schedule lists it. Left picture: searched levels, right: karras.",
        height=180,
    )


def fewer_calls(g: Any) -> None:
    model, prompt, blank = _prompted(g)
    guider = g.add("CFGGuider", model=model, positive=prompt, negative=blank, cfg=3.0)
    sampler = g.add("KSamplerSelect", sampler_name="euler")
    empty = g.add("EmptyLatentImage", width=128, height=128)
    full = g.add("BasicScheduler", model=model, scheduler="karras", steps=12, denoise=1.0, title="What you use today")
    found = g.add(
        "SlipstreamSearchSchedule", guider=guider, sampler=sampler, latent_image=empty, clip=model, steps=12,
        computed=4, sigmas=full, evaluations=30, pairs=8, prompts=PROMPTS,
    )  # fmt: skip
    reusing = g.add("SlipstreamApplyCallReuse", model=model, schedule=found["schedule"])
    fast = g.add("CFGGuider", model=reusing, positive=prompt, negative=blank, cfg=3.0)
    plain = g.add("BasicScheduler", model=model, scheduler="karras", steps=4, denoise=1.0, title="Plain 4 steps")
    noise = g.add("RandomNoise", noise_seed=7)
    shown = []
    for title, sigmas, with_guider in (
        ("12 calls", full, guider),
        ("4 searched calls", found["sigmas"], fast),
        ("4 plain steps", plain, guider),
    ):
        batch = g.add("EmptyLatentImage", width=128, height=128, batch_size=1)
        samples = g.add(
            "SamplerCustomAdvanced", noise=noise, guider=with_guider, sampler=sampler, sigmas=sigmas, latent_image=batch
        )
        shown.append(g.add("VAEDecode", samples=samples["output"], vae=model, title=title))
    both = g.add("ImageStitch", image1=shown[0], image2=shown[1], direction="right", spacing_width=4)
    both = g.add("ImageStitch", image1=both, image2=shown[2], direction="right", spacing_width=4)
    g.add("PreviewAny", source=found["report"], title="Report")
    g.add("SaveImage", images=both, filename_prefix="slipstream/fewer_calls")
    g.note(
        "Your 12 steps with 4 network calls. Left: 12 calls. Middle: the same 12 steps, of which the search lets 4 call the model. "
        "Right: 4 plain steps of the same schedule.",
        height=140,
    )


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
        "Is it better than karras, beta, Align Your Steps? Every schedule is sampled on the same fresh noise; bars are 95 % "
        "intervals over three repeats, in the latents and in the decoded pictures. Add as many schedules as you like with Add "
        "Schedule to Compare.",
        height=160,
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
    many = g.add("EmptyLatentImage", width=128, height=128, batch_size=12, title="12 references")
    references = g.add(
        "KSampler", model=model, positive=prompt, negative=blank, latent_image=many, seed=99, steps=20, cfg=3.0,
        sampler_name="euler", scheduler="normal", title="References",
    )  # fmt: skip
    pictures = g.add("VAEDecode", samples=references, vae=model)
    goal = g.add("SlipstreamReferenceObjective", vae=model, features="pixels", distance="mmd", images=pictures)
    result = g.add(
        "SlipstreamCompareSchedules", guider=guider, sampler=sampler, latent_image=empty, stock_steps=2, pairs=8, repeats=3,
        custom_objective=goal,
    )  # fmt: skip
    g.add("PreviewAny", source=result["table"], title="Table")
    g.add("SaveImage", images=result["chart"], filename_prefix="slipstream/compare_to_pictures", title="Chart")
    g.note(
        "Which stock schedule comes closest to reference pictures in two steps? Here the references are the model's own; "
        "with yours, name a folder or connect a batch. mmd needs fewer pictures than frechet.",
        height=160,
    )


WORKFLOWS = {
    "search_schedule": search_schedule,
    "fewer_calls": fewer_calls,
    "compare_schedules": compare_schedules,
    "search_layers": search_layers,
    "compare_to_pictures": compare_to_pictures,
}
