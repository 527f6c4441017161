"""A node that tells what a report of a fault should hold."""

from __future__ import annotations

from typing import Any

from .unused import Unused

CATEGORY = "slipstream/help"


class Doctor:
    """Versions, devices and attention of this host, as text to paste."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Lists what a bug report needs: versions, device, precision, attention, class and patches of a connected model, and the stage "
        "that limits a stream. Copy the text into the issue. It holds no path and no name."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("One line for each fact.",)
    FUNCTION = "look"
    OUTPUT_NODE = True

    UNUSED = (
        Unused(
            "positive",
            lambda v: v.model is None or v.vae is None,
            "without `model` and `vae`, which are timed. Connect both.",
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {},
            "optional": {
                "model": ("MODEL", {"tooltip": "Adds its class, precision and patches to the report."}),
                "vae": ("VAE", {"tooltip": "Adds its class and precision to the report."}),
                "positive": (
                    "CONDITIONING",
                    {
                        "tooltip": "With `model` and `vae`: times encode, denoise and decode of one frame of the model's own size, and "
                        "names the stage that limits a stream."
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Never the same: memory in use changes between runs."""
        return float("nan")

    def look(self, model: Any = None, vae: Any = None, positive: Any = None) -> dict[str, Any]:
        from .. import __version__
        from ..core import doctor
        from .host.facts import host_facts, model_facts, stream_facts, vae_facts

        parts = [{"Slipstream": __version__}, host_facts(), doctor.versions(), doctor.devices(), doctor.attention()]
        parts += [] if model is None else [model_facts(model)]
        parts += [] if vae is None else [vae_facts(vae)]
        timed = None not in (model, vae, positive)
        try:
            parts += [stream_facts(model, vae, positive)] if timed else []
        except (ValueError, RuntimeError) as error:  # the rest of the report is what helps then
            parts += [{"stream": f"not timed: {(str(error).splitlines() or [type(error).__name__])[0]}"}]
        text = doctor.report(*parts)
        return {"ui": {"text": (text,)}, "result": (text,)}


NODES = {"SlipstreamDoctor": (Doctor, "Doctor")}
