"""The host's MODEL as a core `Denoiser`, and the host's CONDITIONING with core's row operations.

Every network call goes through `comfy.samplers.calc_cond_batch`, so patches, LoRA, ControlNet, hooks, keyed wrappers and the
host's memory management keep working. One call may hold rows of several conditionings, each row at its own noise level.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.checks import check_shape
from ...core.compiling import nobody
from ...core.denoiser import FLOW, VE, Counter, NoiseSpace, per_row
from ...core.graphs import Tell
from ...core.guidance import denoise_many
from ...core.identity import Identity
from ...core.lifetime import weakly
from ...core.schedules import TRAIN_STEPS, DiscreteLevels, FlowLevels, Levels
from .descent import Descent
from .fused import FusedNetwork
from .guidance import Group, acts, asks_itself
from .identity import entries_of, model_identity

WRAPPER_KEY = "slipstream"
# Written by Blend Prompts: the tokens of each row of a batch of prompts of unequal length.
TOKENS = "slipstream_tokens"
# What makes one entry of a CONDITIONING depend on where or when it applies, so that its rows cannot be mixed with others'.
PARTLY = ("area", "mask", "default", "timestep_start", "timestep_end")
PLACED = (*PARTLY, "gligen")


@dataclass(frozen=True, eq=False)
class Source:
    """One CONDITIONING as the host prepared it for this sampling: its list of entries, never changed.

    `kind` is 1 for the negative prompt and 0 for any other, as in the host's `cond_or_uncond`.
    """

    name: str
    entries: tuple[dict[str, Any], ...]

    @property
    def kind(self) -> int:
        return int(self.name == "negative")

    @property
    def rows(self) -> int:
        """Rows held: 1 for a prompt, more for a batch of prompts. What has the shape of the noise (`images`) does not count."""
        conds = [c for e in self.entries for c in e["model_conds"].values() if type(c).__name__ != "CONDNoiseShape"]
        parts = [c.cond for c in conds if isinstance(c.cond, Tensor)]
        return max((len(part) for part in parts), default=1)

    @property
    def images(self) -> int:
        """Rows of what has the shape of the noise (an inpaint model's mask and image): one per latent of the sampling."""
        conds = [c for e in self.entries for c in e["model_conds"].values() if type(c).__name__ == "CONDNoiseShape"]
        return max((len(c.cond) for c in conds if isinstance(c.cond, Tensor)), default=1)

    @property
    def simple(self) -> bool:
        """One entry that holds for the whole image at every level: its rows may share a network call with others."""
        return len(self.entries) == 1 and not any(k in self.entries[0] for k in PLACED) and not self.level_sensitive

    def reference(self, sigma: float) -> Source:
        """Return the first prompt that acts at `sigma`, over the whole image: itself where no other acts."""
        acting = [e for e in self.entries if e.get("timestep_start", math.inf) >= sigma >= e.get("timestep_end", 0.0)]
        placed = any(k in e for e in self.entries for k in ("area", "mask", "default"))
        return self if len(acting) == 1 and not placed else Source(self.name, tuple(acting[:1])).without(*PARTLY)

    def without(self, *names: str) -> Source:
        """Return it without these parts of its entries."""
        return Source(self.name, tuple({k: v for k, v in e.items() if k not in names} for e in self.entries))

    @property
    def level_sensitive(self) -> bool:
        """Whether the host looks at the level of the first row only (time ranges, hooks), so that levels must not mix."""
        return any(
            "timestep_start" in e or "timestep_end" in e or e.get("hooks") is not None or _ranged(e.get("control"))
            for e in self.entries
        )


def _ranged(control: Any) -> bool:
    """Whether a ControlNet, or one chained before it, acts in a part of the sampling only."""
    while control is not None:
        if tuple(control.timestep_percent_range) != (0.0, 1.0):
            return True
        control = control.previous_controlnet
    return False


class HostConditioning:
    """Rows of host conditioning, with the row API of `slipstream.core.Conditioning`: rows, take, expand, join, to.

    Each row is (source, index into the source's batch). Area, mask, ControlNet, hooks and time ranges are kept; rows whose
    conditioning cannot share a network call (regional prompts, different ControlNets, time ranges at different levels)
    cost one call for each group, which `HostDenoiser.calls` shows.
    """

    def __init__(self, items: Sequence[tuple[Source, int]], whole: bool = False) -> None:
        self.items = tuple(items)
        self.whole = whole  # one prompt for a whole batch: row i may still hold the image of latent i (inpainting)

    @classmethod
    def of(cls, source: Source) -> HostConditioning:
        return cls([(source, i) for i in range(source.rows)], whole=source.rows == 1)

    @property
    def rows(self) -> int:
        return len(self.items)

    @property
    def frames(self) -> int:
        """How many frames it tells apart: prompts, ControlNet images or an inpaint model's images that came as a batch."""
        source = self.items[0][0]
        return max(source.rows, source.images, *(hints(entry.get("control")) for entry in source.entries))

    @property
    def given(self) -> set[int]:
        """The sizes of the batches that were given: of prompts, ControlNet images, an inpaint model's images and masks."""
        source = self.items[0][0]
        batches = [e.get(name) for e in source.entries for name in ("concat_latent_image", "concat_mask")]
        sizes = {len(batch) for batch in batches if isinstance(batch, Tensor)}
        return {source.rows, *sizes, *(hints(entry.get("control")) for entry in source.entries)}

    def at(self, frame: int) -> HostConditioning:
        """Return the one row of a frame: its prompt and its ControlNet image out of a batch."""
        return HostConditioning([(self.items[0][0], frame)])

    def reference(self, sigma: float) -> HostConditioning:
        """Return what one network row over the whole image is conditioned on at `sigma`: the first prompt that acts there.

        Itself where every row has one such prompt only; see `slipstream.core.Conditioning.reference`.
        """
        items = [(source.reference(sigma), index) for source, index in self.items]
        same = all(a is b for (a, _), (b, _) in zip(items, self.items))
        return self if same else HostConditioning(items)

    def without(self, *names: str) -> HostConditioning:
        """Return it without these parts of a CONDITIONING ("control", "gligen")."""
        return HostConditioning([(source.without(*names), index) for source, index in self.items])

    @property
    def held_tensors(self) -> list[Tensor]:
        """What the host prepared of its prompts, which a CUDA stream of a lane reads too."""
        entries = [entry for source in {id(s): s for s, _ in self.items}.values() for entry in source.entries]
        return [c.cond for entry in entries for c in entry["model_conds"].values() if isinstance(c.cond, Tensor)]

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a network call with these rows depends on, for `core.identity`; the host's per-run uuid does not."""
        return tuple((source.kind, index, entries_of(source.entries)) for source, index in self.items)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> HostConditioning:
        """Return itself: the host moves and casts conditioning at the network call."""
        return self

    def take(self, rows: Sequence[int] | Tensor) -> HostConditioning:
        """Return the given rows, in that order; rows may repeat."""
        return HostConditioning([self.items[int(i)] for i in rows])

    def expand(self, rows: int) -> HostConditioning:
        """Return `rows` rows; a batch of another size is repeated in order or cut, as the host does it."""
        if self.whole:
            return HostConditioning([(self.items[0][0], i) for i in range(rows)], whole=rows == 1)
        return HostConditioning([self.items[i % self.rows] for i in range(rows)])

    def join(self, *others: HostConditioning) -> HostConditioning:
        """Return all rows as one batch."""
        return HostConditioning([item for c in (self, *others) for item in c.items])


def noise_space(model_sampling: Any) -> NoiseSpace:
    """Return the noise space of a host `model_sampling`; raises ValueError for the kinds we do not know."""
    import comfy.model_sampling as kinds

    image_to_image = tuple(getattr(kinds, name) for name in ("IMG_TO_IMG", "IMG_TO_IMG_FLOW") if hasattr(kinds, name))
    scale = float(getattr(model_sampling, "noise_scale", 1.0))
    if scale != 1:
        raise ValueError(
            f"Expected `model` with noise of scale 1, but got `noise_scale` {scale:g}. Slipstream cannot sample this kind of model: use "
            "a stock sampler."
        )
    if isinstance(model_sampling, kinds.CONST) and not isinstance(model_sampling, image_to_image):
        return FLOW
    # COSMOS_RFLOW asks its network as a flow, but its latents are x0 + sigma * n.
    if isinstance(model_sampling, (kinds.EPS, kinds.COSMOS_RFLOW)) and not isinstance(model_sampling, image_to_image):
        return VE
    names = [base.__name__ for base in type(model_sampling).__mro__[1:3]]
    raise ValueError(
        f"Expected `model` with epsilon, v, x0 or flow prediction, but got {' + '.join(names)}. "
        "Slipstream cannot sample this kind of model: use a stock sampler."
    )


def levels_of(model_sampling: Any) -> Levels:
    """Return core `Levels` for a host `model_sampling`: its table of 1000, its flow shift, or a table of 1000 shares of its own time.

    The last is for all that count otherwise (EDM, v of angles, LCM's table of 50, Cascade, Cosmos): the host's `percent_to_sigma`
    knows what a share of the sampling is for each.
    """
    import comfy.model_sampling as kinds

    if isinstance(model_sampling, kinds.ModelSamplingDiscrete) and len(model_sampling.sigmas) == TRAIN_STEPS:
        sigmas = model_sampling.sigmas.detach().to("cpu", torch.float64)
        whole_steps = type(model_sampling).timestep is kinds.ModelSamplingDiscrete.timestep
        return DiscreteLevels(1 / (sigmas**2 + 1), quantize=whole_steps)
    if isinstance(model_sampling, kinds.ModelSamplingDiscreteFlow):
        return FlowLevels(float(model_sampling.shift))
    if isinstance(model_sampling, kinds.ModelSamplingFlux):
        return FlowLevels(float(torch.tensor(model_sampling.shift).exp()))
    last = TRAIN_STEPS - 1
    inner = [float(model_sampling.percent_to_sigma(1 - step / last)) for step in range(1, last)]
    ends = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
    sigmas = torch.tensor([ends[0], *inner, ends[1]], dtype=torch.float64).clamp(*ends)
    # Some hold the level of their ends for several steps: each step needs a level of its own, if only by its seventh digit.
    rising = 1 + 1e-7 * torch.linspace(0, 1, TRAIN_STEPS, dtype=torch.float64)
    return DiscreteLevels(1 / ((sigmas * rising) ** 2 + 1))


class HostDenoiser:
    """core's `Denoiser` over a loaded host model; made by `run_on_model`, `make_sampler` and `make_guider`.

    Attributes: space, levels, sigma_min, sigma_max, latent_channels, device; `calls` and `rows` count true network calls.
    Before each network call the host's interrupt is checked (`InterruptProcessingException` passes through).
    Gradients flow through it inside `nodes.host.gradients.grad_ready`.

    Args:
        model: the host's `BaseModel` (`ModelPatcher.model`), loaded and prepared.
        model_options: the options of this sampling; copied, never changed.
        counter: of network calls and rows, shared with another denoiser.
        guider: the guider whose prediction the user's wrappers are to surround, None where the host has done it.
        descent: of this sampling, shared with another denoiser.
        patcher: the MODEL that `model` was loaded from, for `identity`.
    """

    def __init__(
        self, model: Any, model_options: dict[str, Any], counter: Counter | None = None, guider: Any = None,
        descent: Descent | None = None, patcher: Any = None,
    ) -> None:  # fmt: skip
        self.model, self.patcher = model, patcher
        self.counter = counter or Counter()
        self.guider = guider
        self.descent = descent or Descent(model, model_options)
        self.space = noise_space(model.model_sampling)
        self.levels = levels_of(model.model_sampling)
        self.sigma_min, self.sigma_max = self.levels.sigma_min, self.levels.sigma_max
        self.latent_channels = int(model.latent_format.latent_channels)
        self._labels: list[tuple[int, Any]] = []
        self.fused: FusedNetwork | None = None
        self._adopt(model_options)

    def adopt(self, model_options: dict[str, Any]) -> None:
        """Take over the options of the next call: a sampler may add to those of the sampling."""
        if model_options is not self.model_options:
            self.__dict__.pop("identity", None)
            self._adopt(model_options)

    def _adopt(self, model_options: dict[str, Any]) -> None:
        import comfy.model_patcher
        import comfy.patcher_extension as extension

        self.model_options = model_options
        self.options = comfy.model_patcher.create_model_options_clone(model_options)
        network_call, labelled_call = weakly(self._network_call), weakly(self._labelled_call)
        extension.add_wrapper_with_key(
            extension.WrappersMP.APPLY_MODEL, WRAPPER_KEY, network_call, self.options, is_model_options=True
        )
        # What may change a prompt on its way to the network.
        wrapped = extension.get_all_wrappers(extension.WrappersMP.APPLY_MODEL, model_options, is_model_options=True)
        self._alone = not wrapped and self.options.get("model_function_wrapper") is None
        if self.fused is not None:
            extension.add_wrapper_with_key(
                extension.WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY, self.fused, self.options, is_model_options=True
            )
        users = self.options.get("model_function_wrapper")
        self.options["model_function_wrapper"] = lambda apply, given: labelled_call(users, apply, given)
        ranges = acting_ranges(self.options.get("transformer_options", {}))
        self._ranges = [(a, b) for a, b in ranges if a < self.sigma_max or b > self.sigma_min]

    def fuse(self, acceleration: str = "none", rows: int = 1, tell: Tell = nobody, inform: Tell = nobody) -> None:
        """Let the network run in its fused form where it can, recorded or compiled as `acceleration` says; see `FusedNetwork`."""
        import comfy.model_management

        try:
            self.fused = FusedNetwork(self.model.diffusion_model, acceleration, rows, tell, inform=inform)
        except comfy.model_management.OOM_EXCEPTION:
            if acceleration != "none":
                tell("the device has no memory left for it")
            return
        self._adopt(self.model_options)

    def resize(self, rows: int) -> None:
        """Record the network for another number of rows, at its next call."""
        if self.fused is not None:
            self.fused.rows = rows

    def forget(self, for_good: bool = False) -> None:
        """Let go of the recording, whose weights may have moved: it is made again at the next call, or `for_good` never."""
        if self.fused is not None:
            self.fused.forget(for_good)

    @property
    def resident(self) -> bool:
        """Whether all weights of the network lie on its device: others the host brings for each call, by means that serve one caller."""
        there = torch.empty(0, device=self.device).device  # with its number
        return all(weight.device == there for weight in self.model.diffusion_model.parameters())

    @property
    def recorded(self) -> bool:
        """Whether the network is recorded or compiled, now or at its next call."""
        return self.fused is not None and self.fused.acceleration != "none"

    def lanes(self, count: int) -> list[HostDenoiser]:
        """Return this and others of the same model, counters and weights: `count` in all, each with a recording of its own."""
        found = [self]
        for _ in range(count - 1):
            other = HostDenoiser(self.model, self.model_options, self.counter, self.guider, self.descent, self.patcher)
            other.fused = None if self.fused is None else self.fused.again()
            other._adopt(self.model_options)
            found.append(other)
        return found

    @functools.cached_property
    def identity(self) -> Identity:
        """What the numbers depend on: the MODEL's weights and patches, and the options of this run."""
        if self.patcher is None:
            raise ValueError("Expected `patcher` to name this denoiser, but got None. Take the denoiser of a session.")
        return model_identity(self.patcher, self.model_options)

    @property
    def calls(self) -> int:
        return self.counter.calls

    @property
    def rows(self) -> int:
        return self.counter.rows

    def patched(self, change: Callable[[dict[str, Any]], None]) -> HostDenoiser:
        """Return a denoiser of the same model and counters whose `transformer_options` went through `change(options)`.

        For patches of our own at chosen calls (attn1 replacement, output block capture): `change` edits a private copy in
        place, with the host's layout (`patches`, `patches_replace`, ...), and the user's own patches are in it already.
        """
        import comfy.model_patcher

        options = comfy.model_patcher.create_model_options_clone(self.model_options)
        change(options.setdefault("transformer_options", {}))
        return HostDenoiser(self.model, options, self.counter, self.guider, self.descent, self.patcher)

    @property
    def guided(self) -> Callable[..., Tensor] | None:
        """See core's `Guided`; None where nothing acts around the network, so that cfg of two estimates is all there is."""
        return self._guided if acts(self.options, self.guider) else None

    def _guided(
        self, x: Tensor, sigma: Tensor, cond: HostConditioning, uncond: HostConditioning | None, cfg_scale: float,
        negative: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        sigma = per_row(sigma, x).flatten().expand(len(x))
        if asks_itself(self.options, self.guider):
            return self._by_level(x, sigma, cond, uncond, cfg_scale, negative)
        estimates: list[Tensor | None]
        if uncond is None or negative is not None or cfg_scale == 1:
            estimates = [*denoise_many(self, x, sigma, [cond]), None]
        else:
            estimates = [*denoise_many(self, x, sigma, [uncond, cond])[::-1]]
        return self._by_level(x, sigma, cond, uncond, cfg_scale, negative, estimates)

    def _by_level(
        self, x: Tensor, sigma: Tensor, cond: HostConditioning, uncond: HostConditioning | None, cfg_scale: float,
        negative: Tensor | None = None, estimates: Sequence[Tensor | None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Guide rows level by level, those together whose conditioning can share a call."""
        columns = [c.expand(len(x)).items for c in (cond, uncond) if c is not None]
        out = torch.empty_like(x)
        for rows in guided_groups(columns, sigma):
            index = torch.tensor(rows, device=x.device)
            entries = [merge_rows([items[row] for row in rows]) for items in columns]
            self.descent.at(sigma[index], [entry for part in entries for entry in part])
            group = Group(
                self.model, x[index], sigma[index], entries[0], entries[1] if len(entries) > 1 else None, cfg_scale,
                None if estimates is None else [None if e is None else e[index] for e in estimates],
                None if negative is None else negative[index],
            )  # fmt: skip
            out[index] = group.predict(self.options, None if estimates is not None else self.guider)
        return out

    @property
    def device(self) -> torch.device:
        # Not where the weights are: the host may keep some of them in host memory.
        return torch.device(self.model.device)

    def __call__(self, x: Tensor, sigma: Tensor, cond: HostConditioning) -> Tensor:
        """Denoise `x` (B, C, H, W) at one level per row `sigma` (B,), given 1 or B rows of `session.conds[...]`."""
        check_shape(
            "x", x, (None, self.latent_channels, *[None] * (x.ndim - 2)), "Use the VAE that belongs to this model."
        )
        check_shape("sigma", sigma, (len(x),), "Give one noise level per row.")
        if not isinstance(cond, HostConditioning):
            raise ValueError(f"Expected `cond` from `session.conds`, but got {type(cond).__name__}.")
        items = cond.expand(len(x)).items
        groups = group_rows(items, sigma, self._ranges)
        if len(groups) == 1:
            return self._call(x, sigma, items)
        out = torch.empty_like(x)
        parts = []
        for rows in groups:
            index = torch.tensor(rows, device=x.device)
            parts.append((index, self._call(x[index], sigma[index], [items[i] for i in rows])))
        for index, part in parts:
            out = out.index_copy(0, index, part)
        return out

    def _call(self, x: Tensor, sigma: Tensor, items: Sequence[tuple[Source, int]]) -> Tensor:
        import comfy.samplers

        entries = merge_rows(items)
        self.descent.at(sigma, entries)
        self._labels = labels(items) if len(entries) == 1 else []
        there = x.to(self.device), sigma.to(self.device)
        bound = (
            nullcontext()
            if self.fused is None or not self._alone or len(entries) > 1
            else self.fused.bound(sigma, items)
        )
        try:
            with bound:
                return comfy.samplers.calc_cond_batch(self.model, [entries], *there, self.options)[0].to(x.device)
        except (RuntimeError, ValueError, AssertionError) as error:
            refuse_shape(self.model, x, entries, error)
            raise
        finally:
            self._labels = []

    def _labelled_call(self, users: Any, apply: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        """Say which rows of a network call are cond and which uncond, to everything that the host runs for it."""
        if self._labels:
            kinds = [kind for kind, _ in self._labels]
            given = {**given, "cond_or_uncond": kinds}
            options = given["c"]["transformer_options"]
            options["cond_or_uncond"], options["uuids"] = list(kinds), [uuid for _, uuid in self._labels]
        if users is not None:
            return users(apply, given)
        return apply(given["input"], given["timestep"], **given["c"])

    def _network_call(self, execute: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Wrap one network call of the host: check for interrupt and count."""
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        self.counter.add(len(x))
        return execute(x, *args, **kwargs)


def refuse_shape(model: Any, x: Tensor, entries: Sequence[dict[str, Any]], error: Exception) -> None:
    """Raise ValueError in the place of `error` where the shape of `x` must be the reason.

    Some networks do not pad sides that are no multiple of their patch; an image-to-video model knows how many frames it makes.
    """
    import comfy.model_management

    if isinstance(error, comfy.model_management.OOM_EXCEPTION):
        return
    conds = [c.cond for e in entries for c in e["model_conds"].values() if type(c).__name__ == "CONDNoiseShape"]
    frames = {c.shape[2] for c in conds if isinstance(c, Tensor) and c.ndim == 5}
    if x.ndim == 5 and frames - {x.shape[2]}:
        raise ValueError(
            f"Expected latents of a video of {max(frames)} frames like the conditioning, but got {x.shape[2]}. Use the number of frames "
            "that the image-to-video node was given; streams and edits work on one image."
        ) from error
    network = model.diffusion_model
    patch = getattr(network, "patch_size", getattr(network, "patch_spatial", 1))
    patch = int(patch[-1]) if isinstance(patch, (list, tuple)) else int(patch)
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(
            f"Expected a latent whose sides are a multiple of {patch} cells for this model, but got {height} x {width}. Resize or crop "
            "the image."
        ) from error


def group_rows(
    items: Sequence[tuple[Source, int]], sigma: Tensor, ranges: Sequence[tuple[float, float]] = ()
) -> list[list[int]]:
    """Return lists of row numbers that may share a network call, in order of first appearance.

    `ranges` are the `acting_ranges` of patches: rows in them are kept apart from rows out of them.
    """
    levelled = bool(ranges) or any(source.level_sensitive for source, _ in items)
    levels = sigma.tolist() if levelled else [0.0] * len(items)
    groups: dict[Any, list[int]] = {}
    for row, (source, index) in enumerate(items):
        level = levels[row] if source.level_sensitive else 0.0
        acting = tuple(start >= levels[row] >= end for start, end in ranges)
        groups.setdefault((shared(source, index), level, acting), []).append(row)
    return list(groups.values())


def guided_groups(columns: Sequence[Sequence[tuple[Source, int]]], sigma: Tensor) -> list[list[int]]:
    """Return lists of row numbers of one level whose conditioning, in every column, can be merged."""
    groups: dict[Any, list[int]] = {}
    for row, level in enumerate(sigma.tolist()):
        groups.setdefault((level, *(shared(*items[row]) for items in columns)), []).append(row)
    return list(groups.values())


def shared(source: Source, index: int) -> tuple[Any, ...]:
    """Return what must be equal for rows of two conditionings to share a network call."""
    tokens = tuple(tokens_of(entry, index) for entry in source.entries)
    return ("simple", tokens, *signature(source.entries[0])) if source.simple else ("placed", tokens, id(source))


def tokens_of(entry: dict[str, Any], index: int) -> int | None:
    """Return how many tokens a row of a padded batch of prompts has (Blend Prompts over a clip), None where all count."""
    lengths = entry.get(TOKENS)
    return None if lengths is None else int(lengths[index % len(lengths)])


def acting_ranges(options: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (sigma_start, sigma_end) of each patch in `transformer_options` that says to act in a part of the sampling only.

    The host has no word for it, and such patches look at the level of a call's first row alone. What they have in common are
    these two names, as attributes, keyword arguments or variables of a closure (IP-Adapter nodes, the stock Deep Shrink).
    """
    patches = [patch for kind in options.get("patches", {}).values() for patch in kind]
    patches += [patch for kind in options.get("patches_replace", {}).values() for patch in kind.values()]
    found: dict[tuple[float, float], None] = {}
    for patch in patches:
        for names in _variables(patch):
            start, end = names.get("sigma_start"), names.get("sigma_end")
            if isinstance(start, (int, float)) and isinstance(end, (int, float)):
                found[start, end] = None
    return list(found)


def _variables(patch: Any) -> Iterator[dict[str, Any]]:
    """Yield what a patch knows by name: attributes, keyword arguments (one dict or a list of them), closure."""
    attributes = getattr(getattr(patch, "__self__", patch), "__dict__", {})
    kwargs = attributes.get("kwargs", [])
    function = getattr(patch, "__func__", patch)
    cells = zip(function.__code__.co_freevars, function.__closure__ or ()) if inspect.isfunction(function) else ()
    yield from (attributes, getattr(patch, "keywords", {}), {name: cell.cell_contents for name, cell in cells})
    yield from (each for each in (kwargs if isinstance(kwargs, list) else [kwargs]) if isinstance(each, dict))


def signature(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return what must be equal for entries to share a network call: ControlNet, parts and their shapes but for rows."""
    parts: list[tuple[str, Any]] = []
    for name, cond in sorted(entry["model_conds"].items()):
        value = cond.cond
        if not isinstance(value, Tensor):
            parts.append((name, repr(value) if isinstance(value, (int, float, str, bool)) else id(value)))
        else:
            parts.append((name, value.shape[1:]))
    return (id(entry.get("control")), *parts)


def merge_rows(items: Sequence[tuple[Source, int]]) -> list[dict[str, Any]]:
    """Return host conditioning entries whose tensors hold one row per item."""
    first = items[0][0]
    if all(source is first for source, _ in items):
        rows = [index for _, index in items]
        return [take_rows(entry, rows) for entry in first.entries]
    merged = dict(first.entries[0])
    parts = [take_rows(source.entries[0], [index])["model_conds"] for source, index in items]
    merged["model_conds"] = {
        name: cond._copy_with(cond.concat([part[name] for part in parts[1:]])) for name, cond in parts[0].items()
    }
    if merged.get("control") is not None:
        merged["control"] = take_hints(merged["control"], [index for _, index in items])
    return [merged]


def take_rows(entry: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return a copy of a conditioning entry with the given batch rows of every tensor; short batches repeat in order.

    Rows of a padded batch of prompts are cut to their length, which is that of all `rows`.
    """
    taken = dict(entry)
    taken["model_conds"] = {name: _take(cond, rows) for name, cond in entry["model_conds"].items()}
    tokens = tokens_of(entry, rows[0])
    if tokens is not None and "c_crossattn" in taken["model_conds"]:
        context = taken["model_conds"]["c_crossattn"]
        taken["model_conds"]["c_crossattn"] = context._copy_with(context.cond[:, :tokens])
    mask = entry.get("mask")
    if mask is not None and len(mask) > 1:
        taken["mask"] = mask[[i % len(mask) for i in rows]]
    if entry.get("control") is not None:
        taken["control"] = take_hints(entry["control"], rows)
    return taken


def _take(cond: Any, rows: Sequence[int]) -> Any:
    if isinstance(cond.cond, Tensor):
        return cond._copy_with(cond.cond[[i % len(cond.cond) for i in rows]])
    if isinstance(cond.cond, (list, tuple)) and all(isinstance(c, Tensor) for c in cond.cond):
        return cond._copy_with([c[[i % len(c) for i in rows]] for c in cond.cond])
    return cond


def hints(control: Any) -> int:
    """Return the number of images, or of masks beside them, that a ControlNet or one chained before it holds; 1 without any."""
    most = 1
    while control is not None:
        most = max(most, *(len(t) for t in given_hints(control)), 1)
        control = getattr(control, "previous_controlnet", None)
    return most


def given_hints(control: Any) -> list[Tensor]:
    """Return the image of one ControlNet and, of an inpainting one, its masks: a row for each frame, or one for all."""
    given = getattr(control, "cond_hint_original", None), *getattr(control, "extra_concat_orig", ())
    return [t for t in given if isinstance(t, Tensor)]


def take_hints(control: Any, rows: Sequence[int]) -> Any:
    """Return a ControlNet with the images and masks of the given rows, so that each row is steered by those of its own frame.

    A shallow copy shares the network and what the host prepared; one image and mask hold for all rows and need no copy.
    """
    if control is None or hints(control) == 1:
        return control
    taken = copy.copy(control)
    taken.previous_controlnet = take_hints(control.previous_controlnet, rows)
    if any(len(given) > 1 for given in given_hints(control)):
        # The host takes as many masks as there are images, so that one image is repeated too.
        image, *masks = (given[[i % len(given) for i in rows]] for given in given_hints(control))
        taken.cond_hint_original, taken.cond_hint = image, None
        if masks:
            taken.extra_concat_orig = masks
    return taken


def labels(items: Sequence[tuple[Source, int]]) -> list[tuple[int, Any]]:
    """Return (cond or uncond, uuid) of each chunk of a merged call: as few equal chunks as tell the rows apart."""
    sources = [source for source, _ in items]
    n = len(sources)
    for size in (s for s in range(n, 0, -1) if n % s == 0):
        chunks = [sources[i : i + size] for i in range(0, n, size)]
        if all(source is chunk[0] for chunk in chunks for source in chunk):
            return [(chunk[0].kind, chunk[0].entries[0].get("uuid")) for chunk in chunks]
    raise AssertionError("chunks of one row always hold one source")
