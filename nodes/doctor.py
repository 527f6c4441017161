"""A node that tells what a report of a fault should hold."""

from __future__ import annotations

from typing import Any

CATEGORY = "slipstream/help"


class Doctor:
    """Versions, devices and attention of this host, as text to paste."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows what a report of a fault should hold: versions, device, precision, the attention in use, and of a connected "
        "model its class and patches. Copy the text into the issue. It holds no path and no name."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("One line for each fact.",)
    FUNCTION = "look"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {},
            "optional": {
                "model": ("MODEL", {"tooltip": "Adds its class, precision and patches to the report."}),
                "vae": ("VAE", {"tooltip": "Adds its class and precision to the report."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Never the same: memory in use changes between runs."""
        return float("nan")

    def look(self, model: Any = None, vae: Any = None) -> dict[str, Any]:
        from .. import __version__
        from ..core import doctor
        from .host.facts import host_facts, model_facts, vae_facts

        parts = [{"Slipstream": __version__}, host_facts(), doctor.versions(), doctor.devices(), doctor.attention()]
        parts += [] if model is None else [model_facts(model)]
        parts += [] if vae is None else [vae_facts(vae)]
        text = doctor.report(*parts)
        return {"ui": {"text": (text,)}, "result": (text,)}


NODES = {"SlipstreamDoctor": (Doctor, "Doctor")}
