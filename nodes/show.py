"""A node that shows what became of an image: before and after, with captions in the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .unused import Unused
from .widgets import string

CAPTIONS = "Before | After"


class BeforeAfter:
    """Joins two to four images with captions, and shows them."""

    CATEGORY = "slipstream/help"
    DESCRIPTION = (
        "Joins two or three images in a row, or four in a square, each with a caption in its corner, and shows them on the node. Images of "
        "other sizes are scaled to one height; of clips, every frame is joined."
    )
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The joined image, or one for each frame of a clip.",)
    FUNCTION = "join"
    OUTPUT_NODE = True
    UNUSED = (Unused("fourth", lambda v: v.third is None, "without `third`. Connect the image to `third`."),)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "before": ("IMAGE", {"tooltip": "The first image, or a clip."}),
                "after": ("IMAGE", {"tooltip": "The second image, or a clip."}),
                "captions": string(
                    CAPTIONS, "One caption for each image, with | between. An empty one leaves an image without."
                ),
            },
            "optional": {
                "third": ("IMAGE", {"tooltip": "One more image."}),
                "fourth": ("IMAGE", {"tooltip": "One more image; four are shown in a square."}),
            },
        }

    def join(
        self,
        before: Tensor,
        after: Tensor,
        captions: str = CAPTIONS,
        third: Tensor | None = None,
        fourth: Tensor | None = None,
    ) -> dict[str, Any]:
        from ..core.captions import font, sheet, undrawn
        from .host.preview import preview_images
        from .host.warnings import warn

        images = [before, after, *([] if third is None else [third, *([] if fourth is None else [fourth])])]
        lines = [line.strip() for line in captions.split("|")]
        if len(lines) > len(images):
            warn(
                "Before and After",
                f"`captions` has {len(lines)} parts, but there are {len(images)} images. Remove a part.",
            )
        if boxes := "".join(undrawn(font(20, line), line) for line in lines[: len(images)]):
            warn(
                "Before and After", f"`captions` has letters that no font here draws: {boxes}. They are shown as boxes."
            )
        joined = sheet(images, lines)
        return {"ui": preview_images(joined), "result": (joined,)}


NODES = {"SlipstreamBeforeAfter": (BeforeAfter, "Before and After")}
