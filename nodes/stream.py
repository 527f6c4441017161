"""Nodes of StreamDiffusion: frames in and the same number of frames out, residual CFG as a GUIDER, the similarity filter."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_range
from ..core.denoiser import Conditioning
from ..core.graphs import ACCELERATIONS, Tell
from ..core.identity import Identity
from ..core.lifetime import weakly
from ..core.progress import Reporter
from ..core.tensors import check_image, image_to_pixels, unchecked_pixels
from ..stream import RCFG, PromptBlend, SimilarityFilter, StreamBatch, StreamConfig, StreamFrame
from ..stream.clip import FRAMES, RATE, ball_clip
from ..stream.config import GUIDANCE, LEAST_STRENGTH, RENOISE
from ..stream.curves import Curve, read_curve, value_at
from ..stream.guidance import BLENDS
from ..stream.lanes import ALONE, CHOICES, StreamLanes, Width, group_of, room_for, width_of
from ..stream.similarity import select
from ..stream.stability import join_rows
from .unused import Unused
from .widgets import Widget, choice, integer, number, seed, string, switch

if TYPE_CHECKING:
    from ..core.guidance import Denoise
    from .host.denoiser import HostDenoiser
    from .host.session import Session

# Frames that the VAE takes at once, and their pixels at most: between two such batches the host can interrupt.
VAE_BATCH, VAE_PIXELS = 16, 1 << 20
# What text encoders give beside the embeddings: masks (rows, T), and states of a second text model. Merged and blended as they are.
TEXT_MASKS = ("attention_mask", "attention_mask_mt5xl")
TEXT_STATES = ("conditioning_llama3", "conditioning_byt5small")
KEEP, DISCARD = "return finished frames", "discard"
INTERRUPTED: dict[str, int] = {}  # runs of Stream Frames that were cancelled and gave a part of the frames, by node


def _guidance(default: str) -> Widget:
    return choice(
        GUIDANCE[::-1],
        default,
        "self: the frame itself is the negative; costs nothing. onetime: the negative prompt is asked once per frame "
        "(N + 1 network rows for N steps). full: ordinary cfg (2N rows). none: the prompt alone.",
    )


def _delta(default: float) -> Widget:
    tooltip = (
        "Below 1 softens self and onetime guidance where there is much noise: the cure when self raises contrast. The "
        "paper uses 0.5 and 1."
    )
    return number(default, 0.0, 1.0, tooltip, 0.05, display="slider")


def guidance_widgets(guidance: str, scale: float, delta: float) -> dict[str, Widget]:
    """Return the three widgets that GUIDANCE_RULES speak of."""
    tooltip = "1 is off. self and onetime: 1.2 to 2. full: as cfg."
    return {
        "guidance": _guidance(guidance),
        "guidance_scale": number(scale, 1.0, 30.0, tooltip, 0.1),
        "delta": _delta(delta),
    }


def _unguided(v: Any) -> bool:
    return v.guidance == "none" or v.guidance_scale == 1


GUIDANCE_RULES = (
    Unused(
        "guidance_scale",
        lambda v: v.guidance == "none" and v.guidance_scale != 1,
        "with `guidance` none. Choose another guidance.",
    ),
    Unused(
        "guidance",
        lambda v: v.guidance != "none" and v.guidance_scale == 1,
        "at `guidance_scale` 1. Raise it, or choose none.",
    ),
    Unused("delta", _unguided, "without guidance. Choose self or onetime, and a `guidance_scale` above 1."),
    Unused(
        "delta",
        lambda v: v.guidance == "full" and v.guidance_scale > 1,
        "with `guidance` full. Choose self or onetime.",
    ),
)
FILTER_RULES = (
    Unused(
        "max_skip blocks filter_seed", lambda v: v.similarity == 1, "at `similarity` 1, which skips nothing. Lower it."
    ),
)


def _steps(v: Any) -> int:
    return int(v.steps if v.sigmas is None else (v.sigmas > 0).sum())


def _one_step(v: Any) -> bool:
    return _steps(v) == 1


ACCELERATION = choice(
    ACCELERATIONS,
    "none",
    "graph: record the network once and replay it (CUDA). compile: compile it before, up to a minute the first time, "
    "kept for later. For SD and SDXL without patches inside the network and without ControlNet.",
    advanced=True,
)
LANES_RULE = Unused(
    "priority",
    lambda v: v.priority.isdigit() and v.priority != "1" and v.acceleration == "none",
    "as a number without `acceleration`: so many calls side by side need recordings. Choose graph or compile, or latency.",
)


def recordable(model: Any, acceleration: str) -> Any:
    """Return a MODEL that the host loads as a whole where an acceleration is asked for; as it is where that cannot be, as the run tells."""
    from .host.session import whole

    with suppress(ValueError):
        return model if acceleration == "none" else whole(model)
    return model


def accelerated_lanes(
    session: Session, acceleration: str, config: StreamConfig, width: Width, tell: Tell, inform: Tell
) -> list[HostDenoiser]:
    """Return a denoiser for each lane: fused and accelerated where nothing works inside the network, else one as it is.

    `tell` gets what has no effect, `inform` what is compiled, and the memory of recordings.
    """

    def forgone(reason: str) -> None:
        tell(f"`acceleration` has no effect: {reason.rstrip('.')}. The network runs as it is.")

    session.denoiser.fuse(acceleration, config.rows, forgone, inform)
    recorded = session.denoiser.recorded
    if width.lanes > 1 and not width.no_delay and acceleration != "none" and not recorded:
        tell("`priority` has no effect: calls side by side need recordings. Choose latency.")
    return session.denoiser.lanes(width.lanes if recorded else 1)


class SharingDenoiser:
    """A host denoiser whose self-attention can be shared across rows, by the host's own attn1 patch."""

    def __init__(self, denoiser: HostDenoiser) -> None:
        self.blocks: Sequence[int] = ()
        self.split = False  # whether a call came that held a part of the rows only
        self._denoiser = denoiser.patched(self._patch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self._denoiser(x, sigma, cond)

    def _patch(self, options: dict[str, Any]) -> None:
        patches = options.setdefault("patches", {})
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), weakly(self._share)]

    def _share(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        # A pass may be split into calls (regional prompts); which rows a part has is not known here.
        if self.blocks and len(q) < sum(self.blocks) and not self.split:
            from .host.warnings import warn

            self.split = True
            warn(
                "Stream Frames",
                "`cross_frame` has no effect on passes that take several network calls (regional prompts, patches that act in "
                "a part of the sampling). Leave those out.",
            )
        if not self.blocks or len(q) < sum(self.blocks):
            return q, k, v
        return q, join_rows(k, self.blocks), join_rows(v, self.blocks)

    def sharing(self, blocks: Sequence[int]) -> AbstractContextManager[None]:
        @contextmanager
        def shared() -> Any:
            self.blocks = blocks
            try:
                yield
            finally:
                self.blocks = ()

        return shared()


class RCFGGuider:
    """Residual CFG as a GUIDER for the stock custom samplers."""

    CATEGORY = "slipstream/stream"
    DESCRIPTION = (
        "Guidance almost for free (StreamDiffusion, arXiv 2312.12491): the negative side is predicted instead of computed. "
        "Connect to SamplerCustomAdvanced. Image to image: self. Text to image: onetime."
    )
    RETURN_TYPES = ("GUIDER",)
    RETURN_NAMES = ("GUIDER",)
    OUTPUT_TOOLTIPS = ("For SamplerCustomAdvanced, with any sampler and schedule.",)
    FUNCTION = "guide"

    UNUSED = GUIDANCE_RULES

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Any model, with its LoRA and patches."}),
                "positive": ("CONDITIONING", {"tooltip": "What the image shows."}),
                "negative": ("CONDITIONING", {"tooltip": "Used by onetime and full only."}),
                "guidance": _guidance("onetime"),
                "guidance_scale": number(
                    1.4,
                    1.0,
                    30.0,
                    "1 is off. self and onetime: 1.2 to 1.6, more bleaches the image. full: as cfg.",
                    0.1,
                ),
                "delta": _delta(0.5),
            }
        }

    def guide(
        self, model: Any, positive: Any, negative: Any, guidance: str, guidance_scale: float, delta: float
    ) -> tuple[Any]:
        from .host import anchors
        from .host.guidance import warn_of_patches
        from .host.sampling import make_guider

        warn_of_patches("RCFG Guider", model, guidance if guidance_scale > 1 else "none")
        running: dict[int, RCFG] = {}

        def start(session: Session) -> Denoise:
            kind, reference = _anchored(guidance if guidance_scale > 1 else "full", session)
            rcfg = RCFG(
                session.denoiser, session.conds["positive"], session.conds["negative"], kind, guidance_scale, delta,
                reference,
            )  # fmt: skip
            running.clear()
            running[id(session)] = rcfg

            def denoise(x: Tensor, sigma: Tensor) -> Tensor:
                rcfg.cfg_scale = session.cfg_scale
                return rcfg(x, sigma)

            return denoise

        def end(session: Session, latents: Tensor) -> None:
            rcfg = running.pop(id(session), None)
            if rcfg is not None and rcfg.reference is not None and float(session.sigmas[-1]) > 0:
                anchors.keep(rcfg.guidance, _asked(rcfg.guidance, session), latents, rcfg.reference)

        # A patch may set another cfg for some steps (CFG Override): without guidance that is cfg beside the negative prompt.
        guidance, cfg_scale = ("full", 1.0) if guidance == "none" else (guidance, guidance_scale)
        settings = ("rcfg", guidance, delta)
        return (make_guider(model, start, cfg_scale, settings, end, positive=positive, negative=negative),)


def _asked(guidance: str, session: Session) -> Identity | None:
    """Return what the anchor of a guidance depends on besides the latents: of `self` it is the image itself."""
    from .host.identity import entries_of, host_identity

    negative = session.guider.original_conds["negative"]
    return host_identity(session.denoiser.identity, entries_of(negative)) if guidance == "onetime" else None


def _anchored(guidance: str, session: Session) -> tuple[str, Tensor | None]:
    """Return the guidance of one sampling, and its anchor where that is known at the start."""
    from .host import anchors
    from .host.warnings import warn

    if guidance not in ("self", "onetime"):
        return guidance, None
    if not torch.count_nonzero(session.latents):
        if guidance == "self":
            warn("RCFG Guider", "the latent is empty, so `self` has no image to guide from; `onetime` is used.")
        return "onetime", None
    if torch.count_nonzero(session.noise):
        return guidance, session.latents if guidance == "self" else None
    # Without fresh noise the latents hold that of an earlier part. `self` from an empty latent has become `onetime` there.
    for kind in dict.fromkeys((guidance, "onetime")):
        anchor = anchors.find(kind, _asked(kind, session), session.latents)
        if anchor is not None:
            if kind != guidance:
                warn(
                    "RCFG Guider", f"`{guidance}` has no image to guide from here: the earlier part's `{kind}` is used."
                )
            return kind, anchor
    does = "asks the negative prompt again" if guidance == "onetime" else "has no clean image, and `onetime` is used"
    warn(
        "RCFG Guider",
        f"the latent holds noise of an earlier part that was sampled by other means, so `{guidance}` {does}. Sample all parts "
        "(SplitSigmas) through RCFG Guider with one model and one negative prompt in one session, or in one node.",
    )
    return "onetime", None


class ExampleClip:
    """A clip that comes with the pack."""

    CATEGORY = "slipstream/stream"
    DESCRIPTION = (
        "A short clip that comes with this pack, to try the examples with: a ball that bounces through a room."
    )
    RETURN_TYPES = ("IMAGE", "MASK", "FLOAT")
    RETURN_NAMES = ("frames", "mask", "fps")
    OUTPUT_TOOLTIPS = (
        "The frames, 128 x 128, or of the size of `model`.",
        "The ball in each frame: 1 = ball.",
        "Frames per second, for Create Video.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "clip": choice(
                    ["bouncing ball"], "bouncing ball", "bouncing ball: drawn by this pack, in the public domain."
                ),
                "frames": integer(FRAMES, 1, FRAMES, f"Number of frames from the start; {RATE} are one second."),
            },
            "optional": {"model": ("MODEL", {"tooltip": "Draws the clip at the size that this model was made for."})},
        }

    def load(self, clip: str, frames: int, model: Any = None) -> tuple[Tensor, Tensor, float]:
        from .host.native import frame_side

        size = {} if model is None else {"size": frame_side(model, "model", 0)}
        return (*ball_clip(frames, **size), float(RATE))


class SimilarityFilterNode:
    """Frames worth processing, and which they are."""

    CATEGORY = "slipstream/stream"
    DESCRIPTION = (
        "Leaves out frames that look like the last kept one, with a probability that grows with the likeness "
        "(StreamDiffusion, arXiv 2312.12491). The first frame is always kept."
    )
    RETURN_TYPES = ("IMAGE", "STRING", "INT")
    RETURN_NAMES = ("frames", "indices", "count")
    OUTPUT_TOOLTIPS = (
        "The kept frames.",
        "Their numbers in the input, from 0, separated by commas.",
        "How many were kept.",
    )
    FUNCTION = "choose"

    UNUSED = FILTER_RULES

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"frames": ("IMAGE", {"tooltip": "Frames in order."}), **_filter_inputs(0.98)}}

    def choose(
        self, frames: Tensor, similarity: float, max_skip: int, blocks: int, filter_seed: int
    ) -> tuple[Tensor, str, int]:
        kept = select(image_to_pixels(frames), SimilarityFilter(similarity, max_skip, seed=filter_seed, blocks=blocks))
        return frames[kept], ", ".join(map(str, kept)), len(kept)


class BlendPrompts:
    """One prompt between two, or one for each frame of a clip."""

    CATEGORY = "slipstream/stream"
    DESCRIPTION = (
        "Mixes two prompts of one CLIP into one. With a clip connected the weight moves from its first frame to its last: "
        "Stream Frames gives each frame its own prompt."
    )
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("One prompt, for any sampler; with a clip one per frame, for Stream Frames.",)
    FUNCTION = "mix"

    UNUSED = (
        Unused("weight_end", lambda v: v.frames is None, "without a clip. Connect `frames`."),
        Unused(
            "weight_end", lambda v: v.frames is not None and len(v.frames) == 1, "on a clip of one frame. Set `weight`."
        ),
        Unused(
            "mode",
            lambda v: v.weight in (0, 1) and (v.frames is None or len(v.frames) == 1 or v.weight_end == v.weight),
            "where one prompt has all the weight. Set `weight` between 0 and 1.",
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "first": (
                    "CONDITIONING",
                    {"tooltip": "A prompt. Its area, mask and ControlNet are kept."},
                ),
                "second": ("CONDITIONING", {"tooltip": "Another prompt from the same CLIP. Only its text counts."}),
                "weight": number(
                    0.5, 0.0, 1.0, "Share of the second prompt; with a clip, at its first frame.", display="slider"
                ),
                "mode": choice(
                    BLENDS,
                    "linear",
                    "linear: the weighted mean. slerp: along an arc, which keeps the embeddings' length.",
                ),
            },
            "optional": {
                "frames": ("IMAGE", {"tooltip": "A clip: the result holds one prompt for each of its frames."}),
                "weight_end": number(
                    1.0, 0.0, 1.0, "Share of the second prompt at the last frame of the clip.", display="slider"
                ),
            },
        }

    def mix(
        self, first: Any, second: Any, weight: float, mode: str, frames: Tensor | None = None, weight_end: float = 1.0
    ) -> tuple[Any]:
        from .host.denoiser import TOKENS
        from .host.warnings import warn

        end = weight if frames is None else weight_end
        prompts = PromptBlend([1 - weight, weight], [1 - end, end], mode)
        for name, conditioning in (("first", first), ("second", second)):
            if len(conditioning) != 1:
                raise ValueError(
                    f"Expected `{name}` with one prompt, but got {len(conditioning)}. Blend before they are combined."
                )
        (one, options), (other, others) = first[0], second[0]
        if one.shape[2] != other.shape[2]:
            raise ValueError(
                f"Expected `second` of width {one.shape[2]} like `first`, but got {other.shape[2]}. Encode both "
                "with one CLIP."
            )
        left_out = sorted(set(others) - set(options) - {"pooled_output", *TEXT_MASKS, *TEXT_STATES})
        if left_out:
            warn("Blend Prompts", f"`{left_out[0]}` of the second prompt has no effect. Put it on the first.")
        if weight == end and weight in (0, 1):
            whole = options if weight == 0 else others
            names = (TOKENS, *TEXT_MASKS, *TEXT_STATES)
            text = {name: whole[name] for name in ("pooled_output", *names) if name in whole}
            kept = {name: value for name, value in options.items() if name not in names}
            return ([[one if whole is options else other, {**kept, **text}]],)
        return ([self._mixed(first, second, prompts, frames)],)

    @staticmethod
    def _mixed(first: Any, second: Any, prompts: PromptBlend, frames: Tensor | None) -> list[Any]:
        """Return the one entry of the blend, with a row for each frame."""
        from .host.denoiser import TOKENS

        (one, options), (other, others) = first[0], second[0]
        both = {
            name: (options[name], others[name])
            for name in (*TEXT_MASKS, *TEXT_STATES)
            if name in options and name in others
        }
        shapes = {
            name: [max(sizes) for sizes in zip(both[name][0].shape, both[name][1].shape)]
            for name in both
            if name in TEXT_STATES
        }
        count = max(len(one), len(other), 0 if frames is None else len(frames))
        conds = [_prompt(first, shapes).expand(count), _prompt(second, shapes).expand(count)]
        mixed = [prompts.at([cond.take([i]) for cond in conds], i, count) for i in range(count)]
        cond = mixed[0].join(*mixed[1:])
        masks = {name: _mixed_mask(both[name]) for name in both if name in TEXT_MASKS}
        pooled = {} if cond.pooled is None else {"pooled_output": cond.pooled}
        lengths = [each.context.shape[1] for each in mixed]
        # Stacked, rows of unequal length are padded; Stream Frames gives the network each as long as it is.
        tokens = {TOKENS: lengths} if len(set(lengths)) > 1 and not masks else {}
        kept = {name: value for name, value in options.items() if name != TOKENS}
        return [cond.context, {**kept, **pooled, **masks, **(cond.extra or {}), **tokens}]


def _prompt(conditioning: Any, shapes: dict[str, list[int]]) -> Conditioning:
    """Return a CONDITIONING of one entry as core's, with the further states of its text padded to `shapes`."""
    context, options = conditioning[0]
    states = {}
    for state, shape in shapes.items():
        padding = [n for have, want in zip(options[state].shape[:0:-1], shape[:0:-1]) for n in (0, want - have)]
        states[state] = F.pad(options[state], padding)
    return Conditioning(context, options.get("pooled_output"), states or None)


def _mixed_mask(masks: Sequence[Tensor]) -> Tensor:
    """Return the tokens (1, T) that count in any of several prompts' masks (rows, T)."""
    tokens = max(mask.shape[1] for mask in masks)
    padded = torch.cat([F.pad(mask, (0, tokens - mask.shape[1])) for mask in masks])
    return padded.amax(0, keepdim=True)


def _filter_inputs(similarity: float) -> dict[str, Any]:
    return {
        "similarity": number(
            similarity,
            0.0,
            1.0,
            "Likeness at which frames begin to be skipped; 1 skips none. The paper uses 0.98.",
            0.001,
            display="slider",
        ),
        "max_skip": integer(10, 0, 1000, "Process a frame after more than this many skips.", advanced=True),
        "blocks": integer(
            8,
            1,
            64,
            "Compare in blocks x blocks parts and take the least alike: small moving things count. 1 compares "
            "the whole image, as published.",
            advanced=True,
        ),
        "filter_seed": integer(0, 0, 2**32 - 1, "The seed of the filter's own random choice.", advanced=True),
    }


class StreamFrames:
    """Video frames through a Stream Batch."""

    CATEGORY = "slipstream/stream"
    DESCRIPTION = (
        "Repaints the frames of a video with your own model (StreamDiffusion, arXiv 2312.12491): all frames in flight are "
        "denoised together, each at its own step, with the same noise for every frame, so that a scene at rest does not "
        "flicker. As many frames come out as went in. Best with few-step models (LCM, Turbo)."
    )
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("frames", "report")
    OUTPUT_TOOLTIPS = ("The repainted frames, as many as went in.", "Frames, passes, speed and latency, as text.")
    FUNCTION = "stream"

    UNUSED = (
        Unused(
            "strength steps strength_curve",
            lambda v: v.sigmas is not None,
            "while `sigmas` is connected. Disconnect it to use them.",
        ),
        Unused(
            "strength",
            lambda v: v.sigmas is None and bool(v.strength_curve.strip()),
            "while `strength_curve` is set. Clear it to use `strength`.",
        ),
        Unused("strength_curve", lambda v: len(v.frames) == 1, "on one frame. Set `strength`."),
        *GUIDANCE_RULES,
        Unused("renoise", _one_step, "with one step: it acts between steps. Use 2 `steps` or more."),
        Unused("cross_frame", _one_step, "with one step: only one frame is in flight. Use 2 `steps` or more."),
        Unused("feedback motion cross_frame priority", lambda v: len(v.frames) == 1, "on one frame. Connect a clip."),
        Unused(
            "priority",
            lambda v: v.priority == "throughput" and len(v.frames) > 1 and group_of(_steps(v)) == 1,
            "with more than eight steps, which fill a call alone. Choose latency.",
        ),
        Unused(
            "acceleration",
            lambda v: v.cross_frame and v.acceleration != "none",
            "with `cross_frame`. Turn one of them off.",
        ),
        LANES_RULE,
        *FILTER_RULES,
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Any model, with its LoRA, ControlNet and patches."}),
                "positive": ("CONDITIONING", {"tooltip": "What the video shows."}),
                "negative": ("CONDITIONING", {"tooltip": "Used by onetime and full guidance only."}),
                "vae": ("VAE", {"tooltip": "A tiny VAE (TAESD) makes streams several times faster."}),
                "frames": ("IMAGE", {"tooltip": "Frames in order, for example from Load Video."}),
                "strength": number(
                    0.5,
                    0.02,
                    1.0,
                    "How much of a frame is repainted. 0.3 keeps the scene, 0.7 keeps its layout.",
                    display="slider",
                ),
                "steps": integer(
                    2,
                    1,
                    50,
                    "Denoising steps of a frame: 1 to 4 for LCM and Turbo models. A live stream lags by "
                    "steps - 1 frames.",
                ),
                "guidance": _guidance("self"),
                "guidance_scale": number(1.2, 1.0, 30.0, "1 is off. self and onetime: 1.2 to 2. full: as cfg.", 0.1),
                "seed": seed("The seed of the noise, which is the same for all frames.", 2),
            },
            "optional": {
                "sigmas": (
                    "SIGMAS",
                    {"tooltip": "Noise levels of the steps, instead of strength and steps: from any scheduler node."},
                ),
                "delta": _delta(1.0),
                "renoise": choice(
                    RENOISE,
                    "fixed",
                    "Noise between steps. fixed: the same for all frames, the steadiest. ddim: what the frame "
                    "holds already. fresh: new each time, flickers. none: as in the published screen demo.",
                ),
                "consistency": switch(False, "Boundary scalings of LCM models; no visible effect from step 2 on."),
                "feedback": number(
                    0.0,
                    0.0,
                    0.95,
                    "Share of the last finished frame in a new one: less flicker, more trails.",
                    0.05,
                    display="slider",
                ),
                "motion": number(
                    0.0, 0.0, 1.0, "How much less a fast-moving frame is repainted.", 0.05, display="slider"
                ),
                "cross_frame": switch(
                    False, "Frames in flight attend to each other: steadier look, more compute. Needs 2 steps or more."
                ),
                **_filter_inputs(1.0),
                "on_interrupt": choice([DISCARD, KEEP], DISCARD, "On cancel: return or discard the finished frames."),
                "strength_curve": string(
                    "",
                    "Strength by frame in place of strength: 0: 0.3, 24: 0.8 rises evenly over the first 24 frames and stays.",
                    advanced=True,
                ),
                "acceleration": ACCELERATION,
                "priority": choice(
                    CHOICES,
                    "latency",
                    "throughput: up to four frames share a network call: faster on a large GPU, same images, more memory. "
                    "latency: each frame alone, as in a live stream; with `acceleration` and one step, up to four calls side by side on a "
                    "large GPU. A number: so many calls side by side, each with a recording (`acceleration`) and the memory of a pass.",
                    advanced=True,
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, unique_id: Any = None, **_: Any) -> int:
        """How often a run was cancelled and gave a part of the frames: the next run must not take that from the host's cache."""
        return INTERRUPTED.get(str(unique_id), 0)

    def stream(
        self, model: Any, positive: Any, negative: Any, vae: Any, frames: Tensor, strength: float, steps: int,
        guidance: str, guidance_scale: float, seed: int, sigmas: Tensor | None = None, delta: float = 1.0,
        renoise: str = "fixed", consistency: bool = False, feedback: float = 0.0, motion: float = 0.0,
        cross_frame: bool = False, similarity: float = 1.0, max_skip: int = 10, blocks: int = 8, filter_seed: int = 0,
        on_interrupt: str = DISCARD, strength_curve: str = "", acceleration: str = "none", priority: str = "latency",
        unique_id: Any = None,
    ) -> tuple[Tensor, str]:  # fmt: skip
        from .host.native import MOST_OF_IMAGE, warn_of_size

        curve = read_curve("strength_curve", strength_curve) if sigmas is None else []
        for frame, value in curve:
            check_range("strength_curve", value, LEAST_STRENGTH, 1, f"Change the value of frame {frame}.")
            StreamConfig(strength=value, steps=steps)
        config = StreamConfig(
            strength=(value_at(curve, 0) if curve else strength) if sigmas is None else None, steps=steps, sigmas=sigmas, guidance=guidance,
            cfg_scale=guidance_scale, delta=delta, renoise=renoise, seed=seed, consistency=consistency,
            feedback=feedback, motion=motion, cross_frame=cross_frame, static_rows=acceleration != "none",
        )  # fmt: skip
        width = self._width(priority, config, curve, room_for(model.load_device, acceleration))
        config = config.changed(frame_group=width.group)
        chooser = SimilarityFilter(similarity, max_skip, seed=filter_seed, blocks=blocks) if similarity < 1 else None
        run = StreamRun(vae, frames, config, chooser, on_interrupt == KEEP, curve, acceleration, width)
        warn_of_size(
            "Stream Frames", model, "the frames are", run.size[1], run.size[0], "Scale them to {}.", MOST_OF_IMAGE
        )
        found = run(model, positive, negative)
        if run.interrupted:
            INTERRUPTED[str(unique_id)] = INTERRUPTED.get(str(unique_id), 0) + 1
        return found

    def _width(self, priority: str, config: StreamConfig, curve: Curve, room: int) -> Width:
        from .host.warnings import warn

        width = width_of(priority, config, room)
        moves = width.group > 1 and len({value for _, value in curve}) > 1
        reason = (
            "`strength_curve` gives each frame its own strength, so frames go one by one" if moves else width.reason
        )
        if reason:
            warn("Stream Frames", f"`priority` {priority} has no effect: {reason}. Choose latency.")
        return ALONE if moves else width


class StreamRun:
    """One execution of Stream Frames: encode all, stream, decode all, with the time of each.

    Only the latents of a clip and the images of the result are held whole; pixels in a few at a time.
    """

    def __init__(
        self, vae: Any, frames: Tensor, config: StreamConfig, chooser: SimilarityFilter | None, keep: bool, curve: Curve = (),
        acceleration: str = "none", width: Width = ALONE,
    ) -> None:  # fmt: skip
        self.vae, self.config, self.chooser, self.keep = vae, config, chooser, keep
        self.curve, self.acceleration, self.width, self.lanes = curve, acceleration, width, 1
        check_image(frames, finite=False)
        self.frames = frames if frames.ndim == 4 else frames[None]
        if not len(self.frames):
            raise ValueError(
                "Expected `frames` with at least one frame, but got an empty batch. Check the loader's range."
            )
        self.size = self.frames.shape[1:3]
        self.batch = max(1, min(VAE_BATCH, VAE_PIXELS // (self.size[0] * self.size[1])))
        for part in self.frames.split(self.batch):
            check_image(part)
        self.interrupted = False
        self.passes = self.calls = self.rows = 0
        self.seconds = dict.fromkeys(("encode", "denoise", "decode"), 0.0)

    def __call__(self, model: Any, positive: Any, negative: Any) -> tuple[Tensor, str]:
        from .host.descent import without_step_cache
        from .host.guidance import acts_on, warn_of_patches
        from .host.session import run_on_model

        samples = self._encode()
        # What acts around the network may ask for the negative prompt though the guidance does not.
        guided = {"negative": negative} if self.config.guided or acts_on(model) else {}
        rows = (
            (self.config.stages * (2 if self.config.guidance == "full" else 1) + 1)
            * self.config.frame_group
            * self.width.lanes
        )
        model = recordable(
            without_step_cache(model, "Stream Frames"), "none" if self.config.cross_frame else self.acceleration
        )
        warn_of_patches("Stream Frames", model, self.config.guidance, frames=True)
        finished = run_on_model(
            model, {"samples": samples}, lambda session: self._denoise(session, samples), rows=rows,
            seed=self.config.seed, positive=positive, **guided,
        )  # fmt: skip
        images = self._decode(finished)
        return images, self._report(finished[: len(images)])

    def _encode(self) -> Tensor:
        from .host.progress import check_interrupt
        from .host.vae import cell_side, encode_images

        begun = time.perf_counter()
        ratio = cell_side(self.vae)
        height, width = self.size
        found = []
        for part in self.frames.split(self.batch):
            padded = F.pad(unchecked_pixels(part), (0, -width % ratio, 0, -height % ratio), mode="replicate")
            found.append(encode_images(self.vae, ((padded + 1) / 2).movedim(1, -1)))
            check_interrupt()
        self.seconds["encode"] = time.perf_counter() - begun
        return torch.cat(found)

    def _denoise(self, session: Session, samples: Tensor) -> list[tuple[StreamFrame, Tensor]]:
        """Return every finished frame with its LATENT samples (1, C, h, w)."""
        import comfy.model_management

        begun = time.perf_counter()
        denoisers = self._networks(session)
        self.lanes = len(denoisers)
        positive, negative = session.conds["positive"], session.conds.get("negative")
        self._warn_of_repeats(positive, negative)
        prompts = positive.at(0), None if negative is None else negative.at(0)
        batches = [StreamBatch(denoiser, *prompts, self.config) for denoiser in denoisers]
        batch = batches[0] if self.lanes == 1 else StreamLanes(batches, self.width.no_delay)
        latents = session.process_in(samples)
        total = (
            len(latents)
            + (self.config.stages - 1) * min(self.lanes, len(latents))
            + (len(latents) % self.config.frame_group > 0)
        )
        report = Reporter(total, session.callback(total))
        finished: list[StreamFrame] = []
        try:
            for i, row in enumerate(latents.split(1)):
                if self.curve and value_at(self.curve, i) != batch.config.strength:
                    batch.update(strength=value_at(self.curve, i), steps=self.config.steps)
                if self.chooser is not None and not self.chooser.keep(unchecked_pixels(self.frames[i])[0]):
                    finished += batch.skip()
                else:
                    # A batch of prompts or of ControlNet images is one per frame, and goes with it.
                    own = [c.at(i) if c is not None and c.frames > 1 else None for c in (positive, negative)]
                    finished += batch.push(row, None, *own)
                report("stream", 0.0, finished[-1].latents if finished else None)
            while batch.in_flight:
                finished += batch.advance()
                report("stream", 0.0, finished[-1].latents if finished else None)
        except comfy.model_management.InterruptProcessingException:
            if not self.keep or not finished:
                raise
            self.interrupted = True
        self.passes, self.calls, self.rows = batch.passes, denoisers[0].calls, denoisers[0].rows
        self.seconds["denoise"] = time.perf_counter() - begun
        return [(frame, session.process_out(frame.latents)) for frame in finished]

    def _networks(self, session: Session) -> list[Any]:
        """Return the denoisers of a run, one for each lane."""
        from .host.warnings import progress_text, warn

        if self.config.cross_frame:
            return [SharingDenoiser(session.denoiser)]
        tell = functools.partial(warn, "Stream Frames")
        return accelerated_lanes(session, self.acceleration, self.config, self.width, tell, progress_text())

    def _warn_of_repeats(self, *conds: Any) -> None:
        from .host.warnings import warn

        for count in {n for c in conds if c is not None for n in c.given} - {1, len(self.frames)}:
            warn(
                "Stream Frames",
                f"{count} prompts or ControlNet images for {len(self.frames)} frames: they go by turns. Give one, or one "
                "per frame.",
            )

    def _decode(self, finished: list[tuple[StreamFrame, Tensor]]) -> Tensor:
        """Return the images of the finished frames; after a cancel those of the parts that are decoded, if they are asked for."""
        import comfy.model_management

        from .host.progress import check_interrupt
        from .host.vae import decode_images

        begun = time.perf_counter()
        distinct = [samples for frame, samples in finished if not frame.repeated]
        index = torch.tensor([not frame.repeated for frame, _ in finished]).cumsum(0) - 1
        images = torch.empty(len(finished), *self.size, 3)
        done = 0
        for first in range(0, len(distinct), self.batch):
            if first:
                try:
                    check_interrupt()
                except comfy.model_management.InterruptProcessingException:
                    if not self.keep:
                        raise
                    self.interrupted = True
                    break
            part = decode_images(self.vae, torch.cat(distinct[first : first + self.batch]))
            end = done + int((index[done:] < first + len(part)).sum())
            images[done:end] = part[index[done:end] - first, : self.size[0], : self.size[1]]
            done = end
        self.seconds["decode"] = time.perf_counter() - begun
        return images[:done]

    def _report(self, finished: list[tuple[StreamFrame, Tensor]]) -> str:
        count, total = len(finished), sum(self.seconds.values())
        lag = (self.config.stages - 1) * self.lanes + self.config.frame_group - 1
        per_frame = ", ".join(f"{name} {1000 * s / count:.1f}" for name, s in self.seconds.items())
        skipped = sum(frame.repeated for frame, _ in finished)
        lines = [
            f"{count} of {len(self.frames)} frames" + (" (interrupted)" if self.interrupted else ""),
            f"{self.passes} passes, {self.calls} network calls, {self.rows} rows, {skipped} frames skipped",
            f"{count / max(total, 1e-9):.1f} fps; ms per frame: {per_frame}",
            f"latency of a live stream: {lag} frame{'s' * (lag != 1)} and one pass",
        ]
        return "\n".join(lines)


NODES: dict[str, tuple[type, str]] = {
    "SlipstreamStreamFrames": (StreamFrames, "Stream Frames"),
    "SlipstreamBlendPrompts": (BlendPrompts, "Blend Prompts"),
    "SlipstreamRCFGGuider": (RCFGGuider, "RCFG Guider"),
    "SlipstreamExampleClip": (ExampleClip, "Example Clip"),
    "SlipstreamSimilarityFilter": (SimilarityFilterNode, "Similarity Filter"),
}
