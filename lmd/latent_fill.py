"""LatentFill: a small masked autoencoder on latents (arXiv 2312.07971 on arXiv 2111.06377) that fills a hole in one pass.

Its output is the mean of what could be there, so it is blurred: use it as the start of a short denoise, not as a result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..core.checks import check_finite, check_integer, check_range, check_shape
from ..core.files import save_tensors, write_beside
from ..core.masks import as_mask, touched
from ..core.noise import NoiseSource, SeededNoise
from .tokens import from_tokens, to_tokens, tokens_to_cells, tokens_touched

FORMAT = "slipstream latent fill 1"


@dataclass(frozen=True)
class FillConfig:
    """Shape of a `LatentFill` and what its latents are.

    Args:
        channels, height, width: the latents it was trained on, in cells; height and width are multiples of `patch`.
        patch: side of a token in cells.
        dim, depth, heads: the encoder, which sees the visible tokens only.
        decoder_dim, decoder_depth, decoder_heads: the decoder, which sees every place.
        interpolate: add the network's output to a smooth interpolation of the visible cells, so that it learns what that misses.
            The published autoencoder has no such base; with it an undertrained fill is never worse than interpolation.
        mean, std: of each channel over the training latents.
        latents: the kind of latents as `latents_kind` names it, or "" to accept any.
    """

    channels: int = 4
    height: int = 16
    width: int = 16
    patch: int = 2
    dim: int = 96
    depth: int = 4
    heads: int = 4
    decoder_dim: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 4
    interpolate: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    latents: str = ""

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width", "patch", "dim", "decoder_dim"):
            check_integer(name, getattr(self, name), 1, 4096)
        for name in ("depth", "heads", "decoder_depth", "decoder_heads"):
            check_integer(name, getattr(self, name), 1, 64)
        for name in ("height", "width"):
            _check_multiple(name, getattr(self, name), self.patch)
        for name, heads in (("dim", self.heads), ("decoder_dim", self.decoder_heads)):
            _check_multiple(name, getattr(self, name), 4 * heads)
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
            if len(getattr(self, name)) not in (0, self.channels):
                raise ValueError(
                    f"Expected `{name}` with {self.channels} values, one per channel, but got {len(getattr(self, name))}."
                )
        for value in self.std:
            check_range("std", value, 1e-8)

    @property
    def tokens(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)


class Size(TypedDict):
    """The fields of a `FillConfig` that say how large the network is."""

    dim: int
    depth: int
    heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int


# Rough sizes: a hundred thousand latents of a small folder overfit "large".
SIZES: dict[str, Size] = {
    "small": {"dim": 96, "depth": 4, "heads": 4, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4},
    "medium": {"dim": 192, "depth": 6, "heads": 6, "decoder_dim": 128, "decoder_depth": 3, "decoder_heads": 4},
    "large": {"dim": 384, "depth": 8, "heads": 6, "decoder_dim": 256, "decoder_depth": 4, "decoder_heads": 8},
}


def latents_kind(channels: int, scale: float, shift: float | None = None) -> str:
    """Return the name of a kind of latents, from what every VAE config and every host latent format knows."""
    return f"{channels} channels, scale {scale:.5g}, shift {shift or 0.0:.5g}"


def _check_multiple(name: str, value: int, unit: int) -> None:
    if value % unit:
        raise ValueError(
            f"Expected `{name}` to be a multiple of {unit}, but got {value}. Use {value // unit * unit or unit}."
        )


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, operations: Any) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = operations.LayerNorm(dim), operations.LayerNorm(dim)
        self.qkv, self.out = operations.Linear(dim, 3 * dim), operations.Linear(dim, dim)
        self.mlp = nn.Sequential(operations.Linear(dim, 4 * dim), nn.GELU(), operations.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b t (qkv heads d) -> qkv b heads t d", qkv=3, heads=self.heads)
        x = x + self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads t d -> b t (heads d)"))
        return x + self.mlp(self.norm2(x))


def position_embedding(rows: int, columns: int, dim: int) -> Tensor:
    """Return fixed sine and cosine embeddings (rows * columns, dim) of the token grid (arXiv 2111.06377, appendix A.1)."""
    frequencies = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([y.reshape(-1, 1) * frequencies, x.reshape(-1, 1) * frequencies], 1)
    return torch.cat([angles.sin(), angles.cos()], 1)


def interpolate(latents: Tensor, visible: Tensor, power: float = 3.0) -> Tensor:
    """Return the mean of the visible cells of `latents` (B, C, H, W), weighted by 1 / (distance + 0.1)^power, for every cell.

    `visible` (B, 1, H, W) is 1 or 0. A visible cell does not count for itself. Shepard's interpolation, by Fourier transform.
    """
    height, width = latents.shape[-2:]
    y = torch.arange(1 - height, height, dtype=torch.float32, device=latents.device)[:, None]
    x = torch.arange(1 - width, width, dtype=torch.float32, device=latents.device)
    kernel = 1 / (torch.hypot(y, x) + 0.1) ** power
    kernel[height - 1, width - 1] = 0
    size = (2 * height, 2 * width)
    spectrum = torch.fft.rfft2(kernel, s=size)
    both = torch.cat([torch.where(visible > 0, latents, 0.0), visible], 1)
    spread = torch.fft.irfft2(torch.fft.rfft2(both, s=size) * spectrum, s=size)
    spread = spread[..., height - 1 : size[0] - 1, width - 1 : size[1] - 1]
    return spread[:, :-1] / spread[:, -1:].clamp(min=1e-6)


class LatentFill(nn.Module):
    """A masked autoencoder over latent patches; `fill` is what a user calls, `predict` what training calls."""

    def __init__(
        self, config: FillConfig, noise: NoiseSource | None = None, weights: dict[str, Tensor] | None = None,
        operations: Any = nn,
    ) -> None:  # fmt: skip
        """Build with the given weights, else drawn from `noise` (seed 0 by default), never from the global generator.

        `operations` has the classes Linear and LayerNorm: torch's, or in ComfyUI the host's (comfy.ops).
        Raises ValueError when `weights` do not fit; nothing is allocated before that is known.
        """
        super().__init__()
        self.config = config
        values = config.channels * config.patch**2
        # Building on the meta device keeps torch from drawing initial weights out of the global generator.
        with torch.device("meta"):
            self.embed = operations.Linear(values, config.dim)
            self.encoder = nn.ModuleList(Block(config.dim, config.heads, operations) for _ in range(config.depth))
            self.encoder_norm = operations.LayerNorm(config.dim)
            self.bridge = operations.Linear(config.dim, config.decoder_dim)
            self.mask_token = nn.Parameter(torch.empty(config.decoder_dim))
            self.decoder = nn.ModuleList(
                Block(config.decoder_dim, config.decoder_heads, operations) for _ in range(config.decoder_depth)
            )
            self.decoder_norm = operations.LayerNorm(config.decoder_dim)
            self.head = operations.Linear(config.decoder_dim, values)
        if weights is None:
            self.to_empty(device="cpu")
            self._initialise(noise or SeededNoise(0))
        else:
            self._check_weights(weights)
            self.load_state_dict(weights, assign=True)
        self.encoder_places: Tensor
        self.decoder_places: Tensor
        self.mean: Tensor
        self.std: Tensor
        grid = config.height // config.patch, config.width // config.patch
        self.register_buffer("encoder_places", position_embedding(*grid, config.dim), persistent=False)
        self.register_buffer("decoder_places", position_embedding(*grid, config.decoder_dim), persistent=False)
        mean = config.mean or (0.0,) * config.channels
        std = config.std or (1.0,) * config.channels
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def _initialise(self, noise: NoiseSource) -> None:
        """Xavier for matrices, 0 for biases, 1 for norms, 0.02 for the mask token."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deviation = (2 / sum(parameter.shape)) ** 0.5
                parameter.copy_(noise(parameter) * deviation)
            elif name == "mask_token":
                parameter.copy_(noise(parameter) * 0.02)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        if self.config.interpolate:
            self.head.weight.zero_()  # training starts from the interpolation itself

    def normalise(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.std

    def predict(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return every token (B, L, V) as predicted from the ones that `hidden` (B, L), bool, leaves visible.

        Tokens are normalised. Every row hides the same number of tokens and leaves at least one.
        """
        rows, count = len(tokens), int((~hidden[0]).sum())
        visible = (~hidden).nonzero()[:, 1].reshape(rows, count)
        kept = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
        x = self.embed(kept) + self.encoder_places[visible]
        for block in self.encoder:
            x = block(x)
        x = self.bridge(self.encoder_norm(x))
        full = self.mask_token.to(x).expand(rows, tokens.shape[1], -1)
        full = full.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x) + self.decoder_places
        for block in self.decoder:
            full = block(full)
        output = self.head(self.decoder_norm(full))
        return output + self._base(tokens, hidden) if self.config.interpolate else output

    def _base(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the interpolation (B, L, V) of the visible tokens."""
        height, width, patch = self.config.height, self.config.width, self.config.patch
        shown = (~hidden).to(tokens).unflatten(1, (height // patch, width // patch))
        visible = tokens_to_cells(shown, patch, height, width)[:, None]
        return to_tokens(interpolate(from_tokens(tokens, patch, height, width), visible), patch)

    @torch.no_grad()
    def fill(self, latents: Tensor, mask: Tensor, kind: str = "") -> Tensor:
        """Return `latents` (B, C, H, W) with the cells that `mask` (B or 1, h, w), 1 = fill, touches predicted in one pass.

        All other cells are returned bit for bit. A patch with any masked cell is hidden from the network. `kind` names the
        caller's latents (see `latents_kind`). Raises ValueError for another size, another kind, or nothing left to see.
        """
        self.check_fits(latents, kind)
        cells = touched(as_mask(mask, len(latents), *latents.shape[-2:])).to(latents.device)
        hidden = tokens_touched(cells, self.config.patch).flatten(1)
        if bool(hidden.all(1).any()):
            raise ValueError(
                "Expected `mask` to leave at least one patch visible, but got a mask that touches all of them. "
                "Paint less, or start from an empty latent."
            )
        clean = torch.where(cells[:, None], self.mean.to(latents), latents)
        check_finite("latents", clean)
        tokens = to_tokens(self.normalise(clean.to(self.mean)), self.config.patch)
        # Rows may hide different numbers of patches, so each is a pass of its own; a row that hides none needs no pass.
        filled = [
            self.predict(t[None], h[None]) if h.any() else t[None] for t, h in zip(tokens, hidden.to(tokens.device))
        ]
        predicted = from_tokens(torch.cat(filled), self.config.patch, *latents.shape[-2:]) * self.std + self.mean
        check_finite(
            "the filled latents", predicted, "The file of the fill is damaged, or of another model: train it again."
        )
        return torch.where(cells[:, None], predicted.to(latents), latents)

    def check_fits(self, latents: Tensor, kind: str = "") -> None:
        """Raise ValueError unless `latents` (B, C, H, W) are of the kind and size this fill was trained on."""
        config = self.config
        if kind and config.latents and kind != config.latents:
            raise ValueError(
                f"Expected `latents` of the kind this fill was trained on ({config.latents}), but got {kind}. "
                "Use the model it was trained with, or train a fill for this one."
            )
        check_shape(
            "latents", latents, (None, config.channels, None, None), "This fill belongs to another model's VAE."
        )
        if latents.shape[-2:] != (config.height, config.width):
            raise ValueError(
                f"Expected `latents` of {config.height} x {config.width} cells, the size this fill was trained on, "
                f"but got {latents.shape[-2]} x {latents.shape[-1]}. Resize the image, or train a fill at this size."
            )

    def save(self, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write weights and config to a .safetensors file; an interrupted write leaves the old file whole."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_tensors(path, state, {"config": dataclasses.asdict(self.config), **metadata})

    @classmethod
    def load(cls, path: str | os.PathLike[str], operations: Any = nn) -> LatentFill:
        """Read a file written by `save` or by training; raises ValueError for any other file, naming what is wrong."""
        tensors, metadata = read_tensors(path)
        config = read_config(path, metadata)
        return cls.from_tensors(tensors, config, path, operations).eval().requires_grad_(False)

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], config: FillConfig, path: str | os.PathLike[str], operations: Any = nn
    ) -> LatentFill:
        """Build from a file's tensors, leaving its training state aside."""
        try:
            weights = {
                n: v.float() if v.is_floating_point() else v for n, v in tensors.items() if not n.startswith("train.")
            }
            return cls(config, weights=weights, operations=operations)
        except ValueError as error:
            raise bad_file(path, str(error)) from error

    def _check_weights(self, weights: dict[str, Tensor]) -> None:
        expected = self.state_dict()
        wrong = sorted(
            name for name in expected.keys() | weights.keys()
            if name not in expected or name not in weights or expected[name].shape != weights[name].shape
            or not weights[name].is_floating_point()
        )  # fmt: skip
        if wrong:
            raise ValueError(f"tensors that do not fit its config: {', '.join(wrong[:3])}")
        if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            raise ValueError("NaN or infinite weights")


def bad_file(path: str | os.PathLike[str], got: str) -> ValueError:
    """Return the error for a file that is no latent fill."""
    return ValueError(
        f"Expected `{pathlib.Path(path).name}` to be a latent fill, but got {got}. Delete it, or turn resume off, and train it again."
    )


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a .safetensors file; a failed write leaves the older one."""
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Expected `path` to end in .safetensors, but got {path.name!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {name: json.dumps(value) for name, value in metadata.items()}
    with write_beside(path) as file:
        save_tensors(tensors, file, {"format": FORMAT, **text})


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and decoded metadata of a fill file; raises ValueError for any other file, OSError if there is none."""
    from safetensors import SafetensorError, safe_open

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(
            f"Expected `path` to be a latent fill file, but got nothing at {path}. Train one first."
        )
    try:
        with safe_open(path, "pt") as file:
            text = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if text.pop("format", None) != FORMAT:
            raise bad_file(path, "a safetensors file of something else")
        return tensors, {name: json.loads(value) for name, value in text.items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise bad_file(path, f"a damaged file ({error})") from error


def read_config(path: str | os.PathLike[str], metadata: dict[str, Any]) -> FillConfig:
    """Return the config of a file's metadata; raises ValueError when it is missing or not a legal one."""
    try:
        return FillConfig(**metadata["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise bad_file(path, f"a config that is not legal ({error})") from error
