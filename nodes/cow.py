"""Nodes of Cyclic One-Way Diffusion: a bundled photo, the canvas, and the sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.guidance import Denoise
from ..core.images import read_image, read_mask, resize_pixels
from ..core.masks import clean, resize_mask, touched
from ..core.noise import SeededNoise
from ..core.progress import Callback, Step
from ..cow import CowConfig, generate
from ..cow.canvas import (
    GREY,
    canvas_size,
    image_background,
    noise_background,
    on_scene,
    parse_colour,
    paste_mask,
    place,
    plain_background,
)
from ..cow.config import STARTS
from ..cow.photos import PHOTOS
from .canvas import STORED_TIP, canvas, check_canvas, drawn_mask, shown
from .unused import Unused
from .widgets import choice, integer, number, refusal, string, switch

if TYPE_CHECKING:
    from .host.session import Session

CATEGORY = "slipstream/subject"
BACKGROUNDS = ["colour", "noise", "picture"]
SIZE_TIP = "0 follows the photo's proportions; both 0 take the size of `model`, or that of the photo."
UNITS = {"training time": "time", "noise level": "sigma"}
# The dial: share of the levels of the last descent in which the subject is let go.
FOLLOW = {"keep the pixels": 0.0, "mostly pixels": 0.25, "between": 0.5, "mostly text": 0.75, "follow the text": 1.0}


class ExamplePhoto:
    """A photo that comes with the pack, and its subject."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "A public-domain photo that comes with this pack, and a mask of its subject, to try the examples with."
    )
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("image", "keep")
    OUTPUT_TOOLTIPS = ("The photo.", "Its subject: 1 = keep.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "astronaut: Eileen Collins, photographed by NASA, in the public domain."
        return {"required": {"photo": choice(PHOTOS, "astronaut", tooltip)}}

    def load(self, photo: str) -> tuple[Tensor, Tensor]:
        image, mask = PHOTOS[photo]
        return read_image(image), read_mask(mask)


class SeedCanvas:
    """A subject cut from a photo and placed on a canvas."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Cuts a subject out of a photo and places it on a canvas, for Cow Sampler. The preview shows the canvas before "
        "anything is sampled. Encode `canvas` with the model's VAE; after sampling, ImageCompositeMasked with `photo` and "
        "`paste` brings the photo's own pixels back."
    )
    RETURN_TYPES = ("IMAGE", "MASK", "MASK", "IMAGE")
    RETURN_NAMES = ("canvas", "keep", "paste", "photo")
    OUTPUT_TOOLTIPS = (
        "The subject on its background: to VAE Encode.",
        "1 on the subject, soft at its edge: to Cow Sampler.",
        "Where the photo's own pixels come back: mask of ImageCompositeMasked.",
        "The placed photo, not mixed with the background: source of ImageCompositeMasked.",
    )
    FUNCTION = "compose"
    OUTPUT_NODE = True

    # Not `noise_seed`: the frontend changes it after each run.
    UNUSED = (
        Unused("colour", lambda v: v.background != "colour", "on this `background`. Choose `colour`."),
        Unused("invert_keep", lambda v: v.keep is None, "without `keep`. Connect a mask, or paint the subject."),
        Unused("model", lambda v: v.width > 0 or v.height > 0, "while a size is given. Set `width` and `height` to 0."),
        Unused("picture", lambda v: v.background != "picture", "on this `background`. Choose `picture`."),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The photo."}),
                "invert_keep": switch(
                    False, "On for masks that are 1 around the subject, as Load Image gives for cut-out PNGs."
                ),
                "width": integer(0, 0, 16384, "Width of the canvas in pixels. " + SIZE_TIP, step=8),
                "height": integer(0, 0, 16384, "Height of the canvas in pixels. " + SIZE_TIP, step=8),
                "scale": number(
                    1.0,
                    0.01,
                    16.0,
                    "Size of the subject relative to the photo, or to the canvas if `width` or `height` is 0. Its proportions are kept.",
                ),
                "x": number(
                    0.5, 0.0, 1.0, "0 left edge, 0.5 middle, 1 right edge. Snaps to the latent grid.", display="slider"
                ),
                "y": number(
                    1.0, 0.0, 1.0, "0 top edge, 0.5 middle, 1 bottom edge. Snaps to the latent grid.", display="slider"
                ),
                "background": choice(BACKGROUNDS, "colour", "What the scene starts from. The paper uses grey."),
                "colour": string(GREY, "The colour of the background, as #rrggbb."),
                "noise_seed": integer(0, 0, 2**32 - 1, "The seed of the background noise.", advanced=True),
                "softness": integer(2, 0, 256, "Pixels over which the paste mask fades inside the subject's edge."),
            },
            "optional": {
                "keep": (
                    "MASK",
                    {
                        "tooltip": "Marks the subject (1). What is painted on the canvas is added. Not needed when it is painted there."
                    },
                ),
                "picture": (
                    "IMAGE",
                    {"tooltip": "Fills the background. Its proportions are kept, and what sticks out is cropped."},
                ),
                "mirror": switch(False, "Turns the subject left to right."),
                "canvas": canvas(
                    "Draw here: paint the subject on the photo, then press Move and place it. " + STORED_TIP
                ),
                "model": ("MODEL", {"tooltip": "Gives the size of the canvas where `width` and `height` are 0."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, colour: str | None = None, canvas: str | None = None, width: int | None = None, height: int | None = None
    ) -> bool | str:
        for check, value in (
            (parse_colour, {"colour": colour}),
            (check_canvas, {"canvas": canvas}),
            (check_side, {"width": width}),
            (check_side, {"height": height}),
        ):
            found = refusal(cls, check, **value)
            if found is not True:
                return found
        return True

    def compose(
        self, image: Tensor, invert_keep: bool, width: int, height: int, scale: float, x: float, y: float, background: str,
        colour: str, noise_seed: int, softness: int, keep: Tensor | None = None, picture: Tensor | None = None,
        mirror: bool = False, canvas: str = "", model: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        from .host.native import photo_pixels
        from .host.preview import preview_images
        from .host.warnings import warn

        check_side(width=width)
        check_side(height=height)
        pixels = None if model is None else photo_pixels(model, 0)
        height, width, filling = canvas_size((image.shape[1], image.shape[2]), width, height, pixels)
        ground = make_background(background, height, width, colour, noise_seed, picture)
        wired = 1 - keep if invert_keep and keep is not None else keep
        if wired is not None and canvas:  # what is painted counts in pixels of the photo
            wired = resize_mask(wired.reshape(-1, *wired.shape[-2:]).float(), *image.shape[1:3])
        subject = drawn_mask("Place Subject", canvas, wired, image, "keep")
        placed = place(image, subject, ground, scale, x, y, mirror=mirror, filling=filling)
        covered = touched(placed.keep)
        for name, across in (("x", covered.any(-2)), ("y", covered.any(-1))):
            if bool(across.all()):
                warn("Place Subject", f"`{name}` has no effect: the subject is as large as the canvas. Lower `scale`.")
        most = min(width, height) - 1
        if softness > most:
            warn("Place Subject", f"`softness` {softness} is more than this canvas allows: {most} is used.")
        softness = min(softness, most)
        result = placed.image, placed.keep, paste_mask(placed.keep, softness), placed.photo
        return {"ui": {**preview_images(placed.image), **shown(image, wired)}, "result": result}


def check_side(**side: int) -> None:
    """Raise ValueError unless a side of the canvas is a multiple of 8: the host's VAE Encode would crop it, and shift the subject."""
    for name, pixels in side.items():
        if pixels % 8:
            raise ValueError(
                f"Expected `{name}` as a multiple of 8, but got {pixels}. Use {max(8, round(pixels / 8) * 8)}."
            )


def make_background(kind: str, height: int, width: int, colour: str, noise_seed: int, picture: Tensor | None) -> Tensor:
    """Return the IMAGE (1, height, width, 3) that a subject is placed on; raises ValueError without an image where it needs one."""
    if kind == "colour":
        return plain_background(height, width, colour)
    if kind == "noise":
        return noise_background(height, width, SeededNoise(noise_seed))
    if picture is None:
        raise ValueError("Expected `picture` for the background `picture`, but nothing is connected. Connect an image.")
    return image_background(picture, height, width)


class CowSampler:
    """Cyclic One-Way Diffusion as a SAMPLER."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Cyclic One-Way Diffusion (arXiv 2306.08247): the subject of the canvas is kept while a scene grows around it, with "
        "any model and no training. Connect to SamplerCustomAdvanced with the encoded canvas as its latent. Network steps: "
        "the inversion, each cycle and the final phase; the inversion is remembered, so that another seed is cheaper."
    )
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = (
        "For SamplerCustomAdvanced, whose latent is the encoded canvas and whose sigmas are a whole schedule.",
    )
    FUNCTION = "make"

    UNUSED = (
        Unused("suppress enhance", lambda v: v.repel == 0, "at `repel` 0. Raise it, or disconnect them."),
        Unused(
            "repel",
            lambda v: v.suppress is None and v.enhance is None,
            "without `suppress` or `enhance`. Connect a prompt.",
        ),
        Unused(
            "preserve",
            lambda v: FOLLOW[v.follow] > 0,
            "unless `follow` keeps the pixels. Leave it at 1.",
        ),
        Unused("vae", lambda v: v.photo is None, "without `photo`. Connect that of Place Subject."),
        Unused("photo", lambda v: v.vae is None, "without `vae`. Connect the model's VAE."),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        d = CowConfig()
        return {
            "required": {
                "keep": (
                    "MASK",
                    {
                        "tooltip": "The subject on the canvas: 1 = keep. Soft values hold a place for that share of the steps."
                    },
                ),
                "cycles": integer(
                    d.cycles,
                    1,
                    1000,
                    "How often the scene is disturbed and reconstructed. 1 is enough with `start` noise; use 3 to 10 with canvas.",
                ),
                "preserve": number(
                    d.preserve,
                    0.0,
                    1.0,
                    "How long the subject is held in the final phase. 1: its latents stay exact. 0: free to follow the prompt.",
                    display="slider",
                ),
                "low": number(
                    d.low, 0.0, 1000.0, "The cycles go down to here. As training time: 0 clean, 1 pure noise."
                ),
                "high": number(
                    d.high,
                    0.0,
                    1000.0,
                    "The cycles go up to here. Higher changes more of the layout, lower keeps more.",
                ),
                "range_unit": choice(
                    UNITS,
                    "training time",
                    "What low and high mean: shares of training time (0 to 1), or noise levels (sigmas).",
                    advanced=True,
                ),
                "inversion_cfg": number(
                    d.inversion_cfg,
                    0.0,
                    100.0,
                    "Guidance of the inversion, 1 to 2; 1 costs half. The published 7.5 drifts on photos.",
                    0.1,
                    advanced=True,
                ),
                "eta": number(
                    d.eta,
                    0.0,
                    1.0,
                    "Fresh noise in the cycles: 1 ancestral, 0 deterministic. The paper's code uses 1.",
                    advanced=True,
                ),
                "final_eta": number(
                    d.final_eta, 0.0, 1.0, "Fresh noise in the final phase. The paper's code uses 0.1.", advanced=True
                ),
                "noise_limit": number(
                    d.noise_limit,
                    0.01,
                    1000.0,
                    "The subject's inverted noise is scaled back to this strength, against speckle around subjects that the "
                    "model does not know. 1 is right; 1000 is off.",
                    0.05,
                    advanced=True,
                ),
                "repel": number(d.repel, 0.0, 100.0, "Weight of suppress and enhance. No effect without them.", 0.05),
            },
            "optional": {
                "suppress": (
                    "CONDITIONING",
                    {
                        "tooltip": "The background is pushed away from this, for example a second face. Costs a third row in the cycles."
                    },
                ),
                "enhance": (
                    "CONDITIONING",
                    {"tooltip": "The background is pushed towards this. Costs one more row in the cycles."},
                ),
                "follow": choice(
                    FOLLOW,
                    "keep the pixels",
                    "From a subject whose pixels are kept to the end, to one that follows the text as the scene does.",
                ),
                "start": choice(
                    STARTS,
                    "noise",
                    "noise: the scene comes down around the subject, then cycles; nothing of the canvas's background is left. "
                    "canvas: it starts as the inverted canvas, as published, and keeps something of it; needs more cycles.",
                ),
                "vae": (
                    "VAE",
                    {
                        "tooltip": "With `photo`: the subject's edge is drawn on its scene, so the subject does not grow. The VAE "
                        "decodes and encodes once during sampling."
                    },
                ),
                "photo": ("IMAGE", {"tooltip": "The placed photo, from Place Subject. For `vae`."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, low: float | None = None, high: float | None = None, range_unit: str | None = None
    ) -> bool | str:
        def check(low: float, high: float, range_unit: str) -> None:
            CowConfig(low=low, high=high, unit=UNITS[range_unit])

        return refusal(cls, check, low=low, high=high, range_unit=range_unit)

    def make(
        self, keep: Tensor, cycles: int, preserve: float, low: float, high: float, range_unit: str, inversion_cfg: float,
        eta: float, final_eta: float, noise_limit: float, repel: float, suppress: Any = None, enhance: Any = None,
        follow: str = "keep the pixels", start: str = "canvas", vae: Any = None, photo: Tensor | None = None,
    ) -> tuple[Any]:  # fmt: skip
        from .host.sampling import make_sampler
        from .host.warnings import warn

        config = CowConfig(
            inversion_cfg=inversion_cfg, cycles=cycles, low=low, high=high, unit=UNITS[range_unit], eta=eta,
            final_eta=final_eta, preserve=preserve, noise_limit=noise_limit, repel=repel, follow=FOLLOW[follow], start=start,
        )  # fmt: skip
        if bool((clean(keep) == 1).all()):
            warn(
                "Cow Sampler",
                "`keep` covers the whole canvas, so `cycles`, `low`, `high` and `eta` have no effect. Connect Place Subject's `keep`.",
            )
        extra = {name: c for name, c in (("suppress", suppress), ("enhance", enhance)) if c is not None}
        placed = None if vae is None or photo is None else (vae, photo)
        return (
            make_sampler(lambda session: sample(session, keep, config, extra, placed), "Cow Sampler", replaces=True),
        )


def sample(
    session: Session, keep: Tensor, config: CowConfig, extra: dict[str, Any], placed: tuple[Any, Tensor] | None = None
) -> Tensor:
    """Run COW in a prepared sampling of the host; the guider's cfg and patches make the cycles and the final phase.

    With `placed`, VAE and photo, the subject's edge is redrawn on its scene.
    """
    from .host.native import warn_of_latents
    from .host.session import check_places
    from .host.warnings import warn, warn_of_stretch

    check_places(session.latents)
    if not torch.count_nonzero(session.latents):
        raise ValueError(
            "Expected the encoded canvas as `latent_image`, but got an empty latent. Encode Place Subject's `canvas` with the VAE."
        )
    if "negative" not in session.conds and config.inversion_cfg != CowConfig().inversion_cfg:
        warn("Cow Sampler", "`inversion_cfg` has no effect without a negative prompt. Use CFGGuider.")
    warn_of_stretch("Cow Sampler", "keep", keep, session.latents)
    warn_of_latents("Cow Sampler", session.guider.model_patcher, session.latents)
    if session.denoiser.identity.unnamed:
        warn("Cow Sampler", session.denoiser.identity.warning)
    config = replace(config, cfg_scale=session.cfg_scale)

    def denoise_where(unguided: Tensor) -> Denoise:
        return session.denoise_then(
            lambda made: torch.lerp(made["denoised"], made["cond_denoised"], unguided.to(made["denoised"]))
        )

    more = {name: session.condition(name, conditioning) for name, conditioning in extra.items()}
    redraw = None if placed is None else redrawer(session, *placed, keep)
    result = generate(
        session.denoiser, session.latents, keep, session.conds["positive"], session.conds.get("negative"),
        config, SeededNoise(session.seed), progress(session), sigmas=session.sigmas, denoise=session.denoise,
        suppress=more.get("suppress"), enhance=more.get("enhance"), denoise_where=denoise_where, redraw=redraw,
    )  # fmt: skip
    if redraw is not None and not redraw.calls:
        warn(
            "Cow Sampler",
            "`vae` and `photo` have no effect: the subject is not kept to the end, or nothing is beside it. Disconnect them.",
        )
    return result.latents


@dataclass
class Redraw:
    """Draws the subject of a placed `photo` (1 or B, H, W, 3) on a scene's clean latents, through the host's VAE."""

    session: Session
    vae: Any
    photo: Tensor
    keep: Tensor
    calls: int = 0

    def __call__(self, denoised: Tensor) -> Tensor:
        from .host.progress import check_interrupt
        from .host.vae import decode_images, encode_images, while_sampling

        self.calls += 1
        check_interrupt()
        with while_sampling():
            scene = decode_images(self.vae, self.session.process_out(denoised))[..., :3]
            height, width = scene.shape[1:3]
            photo = resize_pixels(self.photo[..., :3].movedim(-1, 1), height, width, "bicubic").movedim(1, -1)
            check_interrupt()
            samples = encode_images(self.vae, on_scene(scene, photo, self.keep, height // denoised.shape[-2]))
        return self.session.process_in(samples)


def redrawer(session: Session, vae: Any, photo: Tensor, keep: Tensor) -> Redraw | None:
    """Return `generate`'s `redraw`, None with a warning for a video; raises ValueError for a batch of photos that does not match."""
    from .host.warnings import warn, warn_of_stretch

    if session.latents.ndim > 4 and session.latents.shape[2] > 1:
        warn("Cow Sampler", "`vae` and `photo` have no effect on a video. Disconnect them.")
        return None
    if len(photo) not in (1, len(session.latents)):
        raise ValueError(f"Expected `photo` with 1 or {len(session.latents)} images, but got {len(photo)}.")
    warn_of_stretch("Cow Sampler", "photo", photo[..., 0], session.latents)
    return Redraw(session, vae, photo, keep)


def progress(session: Session) -> Callback:
    """Return a callback that opens the host's progress bar at the first step, which knows the total."""
    shown: list[Callback] = []

    def callback(step: Step) -> None:
        if not shown:
            shown.append(session.callback(step.total))
        shown[0](step)

    return callback


NODES = {
    "SlipstreamSeedCanvas": (SeedCanvas, "Place Subject"),
    "SlipstreamCowSampler": (CowSampler, "Cow Sampler"),
    "SlipstreamExamplePhoto": (ExamplePhoto, "Example Photo"),
}
