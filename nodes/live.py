"""The node of live streams: camera, screen, a video file or pushed frames through a MODEL, in one long execution."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.device import is_out_of_memory
from ..core.graphs import Tell
from ..core.images import pad_to_multiple
from ..core.transfer import DEVICE_WORK, Arrival
from ..stream import PromptBlend, StreamConfig
from ..stream.lanes import CHOICES, group_of, room_for, width_of
from ..stream.live.session import STREAMS, LiveStream, described
from ..stream.live.settings import LiveSettings, read_indices
from ..stream.prompts import blended
from .host.vae import cell_side
from .stream import (
    ACCELERATION,
    DISCARD,
    GUIDANCE_RULES,
    KEEP,
    LANES_RULE,
    BlendPrompts,
    accelerated_lanes,
    guidance_widgets,
    recordable,
)
from .unused import Unused
from .widgets import choice, integer, number, string

if TYPE_CHECKING:
    from .host.denoiser import HostDenoiser
    from .host.session import Session

NO_CLIP = "no CLIP is connected. Connect `clip` to type prompts while the stream runs."
SIZE_TIP = "The size of the frames; others are cropped to these proportions. 0: that of the images that the model was made for."
NO_ROOM = (
    "The device's memory does not hold the model beside the VAE and the text encoder: ComfyUI took weights of it away for them. Use a tiny "
    "VAE (TAESD), smaller frames or a smaller model."
)
MOST_STEPS = 4  # that memory is reserved for: more may be asked for while it runs


class LiveStreamNode:
    """A stream that runs until someone stops it."""

    CATEGORY = "slipstream/stream"
    DESCRIPTION = (
        "Repaints a live image with your own model (StreamDiffusion, arXiv 2312.12491): camera, screen or a video file of "
        "the browser, or frames that a program pushes. Prompt, strength and all settings change while it runs. Press Start "
        "in the panel; Stop gives the last frames. Best with few-step models (LCM, Turbo)."
    )
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("frames", "report")
    OUTPUT_TOOLTIPS = ("The last frames, at most `keep`.", "Frames, rates, delay and the limiting stage, as text.")
    FUNCTION = "run"
    OUTPUT_NODE = True

    UNUSED = (
        Unused("prompt negative_prompt", lambda v: v.clip is None, "without a CLIP. Connect `clip`."),
        Unused(
            "strength steps",
            lambda v: bool(v.t_index_list.strip()),
            "while `t_index_list` is set. Clear it to use them.",
        ),
        *GUIDANCE_RULES,
        LANES_RULE,
        Unused(
            "priority",
            lambda v: v.priority == "throughput" and group_of(len(read_indices(v.t_index_list)) or v.steps) == 1,
            "with more than eight steps, which fill a call alone. Choose latency.",
        ),
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        guidance = guidance_widgets("self", 1.2, 1.0)
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Any model, with its LoRA and patches."}),
                "vae": ("VAE", {"tooltip": "A tiny VAE (TAESD) makes streams several times faster."}),
                "positive": (
                    "CONDITIONING",
                    {"tooltip": "What the image shows, until `prompt` says something else."},
                ),
                "negative": ("CONDITIONING", {"tooltip": "Used by onetime and full guidance only."}),
                "prompt": string(
                    "", "What the image shows; typed while the stream runs. Needs `clip`.", multiline=True
                ),
                "width": integer(0, 0, 4096, SIZE_TIP, step=8),
                "height": integer(0, 0, 4096, SIZE_TIP, step=8),
                "strength": number(0.5, 0.02, 1.0, "How much of a frame is repainted.", display="slider"),
                "steps": integer(2, 1, 50, "Denoising steps of a frame. Each after the first adds a frame of delay."),
                "guidance": guidance["guidance"],
                "guidance_scale": guidance["guidance_scale"],
                "seed": integer(
                    2,
                    0,
                    2**64 - 1,
                    "The seed of the noise, which is the same for all frames.",
                    control_after_generate=False,
                ),
                "crossfade": integer(8, 0, 1000, "Frames over which a new prompt is faded in."),
                "feedback": number(
                    0.0, 0.0, 0.95, "Share of the last result in a new frame: less flicker, more trails.", 0.05
                ),
                "similarity": number(1.0, 0.0, 1.0, "Frames more alike than this are skipped; 1 skips none.", 0.001),
                "keep": integer(16, 1, 512, "How many of the last frames come out at the end."),
                "panel": (
                    "STRING",
                    {
                        "default": "",
                        "widgetType": "SLIPSTREAM_LIVE",
                        "socketless": True,
                        "tooltip": "Source and view, as JSON.",
                    },
                ),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "Encodes what is typed while the stream runs."}),
                "negative_prompt": string("", "What to avoid, in place of `negative`. Needs `clip`.", advanced=True),
                "t_index_list": string(
                    "", "In place of strength and steps: indices of the LCM grid, 32,45.", advanced=True
                ),
                "delta": guidance["delta"],
                "motion": number(0.0, 0.0, 1.0, "How much less a fast-moving frame is repainted.", 0.05, advanced=True),
                "on_interrupt": choice(
                    [KEEP, DISCARD], KEEP, "On cancel: return or discard the last frames.", advanced=True
                ),
                "acceleration": ACCELERATION,
                "priority": choice(
                    CHOICES,
                    "latency",
                    "latency: each frame as soon as it is there; with `acceleration` and one step, up to four calls side by side on a "
                    "large GPU. throughput: up to four frames share a network call: more frames a second on a large GPU, up to three "
                    "frames later. "
                    "A number: so many calls side by side, each with a recording (`acceleration`) and the memory of a pass.",
                    advanced=True,
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Never the same: each run is another stream."""
        return float("nan")

    def run(
        self, model: Any, vae: Any, positive: Any, negative: Any, prompt: str, width: int, height: int, strength: float, steps: int,
        guidance: str, guidance_scale: float, seed: int, crossfade: int, feedback: float, similarity: float, keep: int,
        panel: str = "", clip: Any = None, negative_prompt: str = "", t_index_list: str = "", delta: float = 1.0,
        motion: float = 0.0, on_interrupt: str = KEEP, acceleration: str = "none", priority: str = "latency",
        unique_id: Any = None,
    ) -> tuple[Tensor, str]:  # fmt: skip
        from .host.native import MOST_OF_IMAGE, frame_side, warn_of_size

        size = frame_side(model, "height", height), frame_side(model, "width", width)
        warn_of_size("Live Stream", model, "the stream is", *size[::-1], "Set it to {}, or to 0.", MOST_OF_IMAGE)
        texts = {"prompt": prompt, "negative": negative_prompt} if clip is not None else {}
        settings = LiveSettings(
            crossfade=crossfade, strength=strength, steps=steps, t_index_list=read_indices(t_index_list), guidance=guidance,
            guidance_scale=guidance_scale, delta=delta, seed=seed, feedback=feedback, motion=motion, similarity=similarity,
            **texts,
        )  # fmt: skip
        without = {} if clip is not None else dict.fromkeys(("prompt", "negative", "crossfade"), NO_CLIP)
        note = described(model.load_device, model.model_dtype(), acceleration)
        stream = STREAMS.open(LiveStream(settings, size, keep, note, without))
        try:
            room = room_for(model.load_device, acceleration)
            run = LiveRun(stream, vae, clip, str(unique_id), on_interrupt == KEEP, acceleration, priority, room)
            return run(model, positive, negative)
        except BaseException as error:
            stream.end(why(error))
            raise
        finally:
            STREAMS.close(stream)


class LiveRun:
    """One execution of Live Stream: the MODEL is loaded once, and frames go through it until the stream ends."""

    def __init__(
        self, stream: LiveStream, vae: Any, clip: Any, node_id: str, keep: bool, acceleration: str = "none", priority: str = "latency",
        room: int = 1,
    ) -> None:  # fmt: skip
        self.stream, self.vae, self.clip, self.node_id, self.keep = stream, vae, clip, node_id, keep
        self.acceleration, self.priority = acceleration, priority
        self.width = width_of(priority, self._config(stream.settings), room)
        # The host's memory management is not made for several threads: VAE and CLIP take turns.
        self.turn = threading.Lock()
        self.denoisers: list[HostDenoiser] = []
        self.crowded = False  # whether the VAE takes the network's memory for a frame
        self.ratio = cell_side(vae)

    def __call__(self, model: Any, positive: Any, negative: Any) -> tuple[Tensor, str]:
        from .host.descent import without_step_cache
        from .host.guidance import warn_of_patches
        from .host.live import announce
        from .host.progress import check_interrupt
        from .host.session import run_on_model

        settings = self.stream.settings
        model = recordable(without_step_cache(model, "Live Stream"), self.acceleration)
        warn_of_patches("Live Stream", model, settings.guidance, frames=True)
        announce(self.stream, self.node_id)
        if self.width.reason:
            self._warn(f"`priority` {self.priority} has no effect: {self.width.reason}. Choose latency.")
        self.given_positive, self.given_negative = positive, negative
        self.positive = self._typed("positive", positive, settings.prompt)
        self.negative = self._typed("negative", negative, settings.negative)
        check_interrupt()
        samples = self._samples(torch.zeros(1, *self.stream.size, 3))
        # The guidance may change while it runs, and with it the rows of a call. Lanes without delay are of one step, and no more than that.
        beside = 1 if self.width.no_delay else self.width.lanes
        rows = 2 * max(settings.stages * self.width.group, MOST_STEPS) * beside
        run_on_model(
            model,
            {"samples": samples},
            self._work,
            rows=rows,
            seed=settings.seed,
            positive=self.positive,
            negative=self.negative,
        )
        return self._images(), self.stream.text()

    def _images(self) -> Tensor:
        from .host.warnings import warn

        images = self.stream.images()
        if len(images):
            return images
        warn(
            "Live Stream",
            "no frame came before the stream ended: the result is a black image. Press Start in the panel.",
        )
        return torch.zeros(1, *self.stream.size, 3)

    def _work(self, session: Session) -> None:
        import comfy.model_management

        from .host.progress import check_interrupt
        from .host.vae import FrameVae, vae_lanes

        positive, negative = session.conds["positive"].at(0), session.conds["negative"].at(0)
        config = self._config(self.stream.settings)
        denoisers = self.denoisers = accelerated_lanes(
            session, self.acceleration, config, self.width, self._warn, self._informer()
        )
        batch = blended(denoisers, [positive], PromptBlend([1.0]), 0, negative, config, self.width.no_delay)

        vae = FrameVae(self.vae, session.denoiser.device, self._host_call)
        if self.acceleration != "none" or torch.version.hip is None:  # on a card of AMD only where it is asked for
            vae.record(config.frame_group, *self.stream.size, self._informer())

        def encode(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return session.process_in(vae.encode(images))

        def decode(latents: Tensor) -> Tensor | Arrival:
            with torch.inference_mode():
                return vae.decode(session.process_out(latents, latents.device))

        def apply(old: LiveSettings, new: LiveSettings) -> None:
            self._apply(session, batch, old, new)
            for denoiser in denoisers:
                denoiser.resize(batch.config.rows)

        try:
            lanes = vae_lanes(vae, session.denoiser)
            self.stream.run(batch, encode, decode, apply, check_interrupt, why=why, lanes=lanes)
        except comfy.model_management.InterruptProcessingException:
            if not self.keep or not len(self.stream.images()):
                raise

    def _samples(self, image: Tensor) -> Tensor:
        """Return the LATENT samples of IMAGE (1, H, W, 3), padded to whole latent cells."""
        from .host.vae import encode_images

        with torch.inference_mode():
            return encode_images(self.vae, pad_to_multiple(image, self.ratio))

    def _encoded(self, text: str) -> list[Any]:
        with self._host_call(getattr(self.clip, "patcher", None)), torch.inference_mode():
            return list(self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)))

    @contextmanager
    def _host_call(self, patcher: Any, memory: float = 0.0) -> Iterator[None]:
        """For a call of the host with a model: no other thread works meanwhile if the host may move the network's weights.

        It moves them to make room, and brings weights that travel by buffers that serve one caller at a time.
        """
        from .host.vae import has_room, while_sampling

        resident = all(denoiser.resident for denoiser in self.denoisers[:1])
        if resident and has_room(patcher, memory):
            with DEVICE_WORK.beside(), self.turn:
                yield
            return
        with DEVICE_WORK.alone():
            if self.denoisers and self.denoisers[0].device.type == "cuda":
                torch.cuda.synchronize(self.denoisers[0].device)  # what was begun still reads the weights
            with while_sampling() if self.denoisers else nullcontext():
                yield
            if resident:
                self._moved(at_each_frame=memory > 0)

    def _moved(self, at_each_frame: bool) -> None:
        """Let go of recordings, since the host may have taken weights away and brought them back elsewhere."""
        if not all(denoiser.resident for denoiser in self.denoisers[:1]):
            raise MemoryError(NO_ROOM)
        if at_each_frame and not self.crowded:
            self.crowded = True
            self._warn(
                "the device's memory does not hold model and VAE together, so each waits for the other. Use a tiny VAE (TAESD)."
            )
        for denoiser in self.denoisers:
            denoiser.forget(for_good=self.crowded)

    def _config(self, settings: LiveSettings) -> StreamConfig:
        config = StreamConfig(**settings.updates(), static_rows=self.acceleration != "none")
        return config.changed(frame_group=width_of(self.priority, config).group)

    def _warn(self, text: str) -> None:
        from .host.warnings import warn

        warn("Live Stream", text)
        self.stream.tell(text, bad=True)

    def _informer(self) -> Tell:
        """Return what shows a line of text in the panel and on the node, from any thread."""
        from .host.warnings import progress_text

        show = progress_text()

        def inform(text: str) -> None:
            show(text)
            self.stream.tell(text)

        return inform

    def _typed(self, name: str, given: list[Any], text: str) -> list[Any]:
        """Return a CONDITIONING with the text that was typed in place of its own; its area, mask and ControlNet stay."""
        if not text:
            return given
        if len(given) != 1:
            self._warn(
                f"the typed prompt takes the place of all {len(given)} prompts of `{name}`, with their areas and ControlNets. Connect one "
                "prompt to keep those."
            )
            return self._encoded(text)
        encoded = self._encoded(text)
        return list(BlendPrompts().mix(given, encoded, 1.0, "linear")[0]) if len(encoded) == 1 else encoded

    def _apply(self, session: Session, batch: Any, old: LiveSettings, new: LiveSettings) -> None:
        """Take changed settings over; raises ValueError for a prompt that cannot be faded in."""
        uncond = None
        if new.negative != old.negative:
            uncond = session.condition("negative", self._typed("negative", self.given_negative, new.negative)).at(0)
        batch.update(None, uncond, **new.updates(), frame_group=self._config(new).frame_group)
        if new.prompt != old.prompt:
            self._fade(session, batch, self._typed("positive", self.given_positive, new.prompt), new.crossfade)

    def _fade(self, session: Session, batch: Any, target: list[Any], frames: int) -> None:
        """Go from the prompt of the newest frame to `target`, one blend a frame, as Blend Prompts mixes them."""
        if frames < 2 or len(self.positive) != 1 or len(target) != 1:
            batch.update(session.condition("positive", target).at(0))
            self.positive = target
            return
        before = row_of(self.positive, batch.newest_prompt().items[0][1])
        path = BlendPrompts().mix(before, target, 1 / (frames + 1), "linear", torch.zeros(frames), 1.0)[0]
        cond = session.condition("positive", path)
        batch.move(cond.at, frames)
        self.positive = path


def why(error: BaseException) -> str:
    """Return what the panel says of an error that ended a stream."""
    import comfy.model_management

    if isinstance(error, comfy.model_management.InterruptProcessingException):
        return "Cancelled in ComfyUI."
    if is_out_of_memory(error):
        return "Out of memory. Choose a smaller size, fewer steps or a tiny VAE, and press Start again."
    return f"{type(error).__name__}: {error}"


def row_of(conditioning: list[Any], index: int) -> list[Any]:
    """Return one row of a CONDITIONING of one entry that holds a batch, as Blend Prompts makes it, as a CONDITIONING of its own."""
    from .host.denoiser import TOKENS

    context, options = conditioning[0]
    count = len(context)
    if count == 1:
        return conditioning
    kept = {
        k: v[index : index + 1] if isinstance(v, Tensor) and len(v) == count else v
        for k, v in options.items()
        if k != TOKENS
    }
    lengths = options.get(TOKENS)
    return [[context[index : index + 1, : lengths[index] if lengths else None], kept]]


NODES = {"SlipstreamLiveStream": (LiveStreamNode, "Live Stream")}
