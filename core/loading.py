"""load(): the bundled pocket model, a diffusers folder or a single-file checkpoint as a `Pipeline`, from local files only."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import checkpoint
from .cache import MODELS, fingerprint
from .checkpoint import Source, Weights
from .checks import check_choice
from .denoiser import PREDICTIONS
from .device import pick_device, pick_dtype, with_memory
from .diffusers_model import DiffusersDenoiser, NetworkDenoiser
from .folder import VAES, Network, described_by, read_folder, read_vae
from .pipeline import Pipeline
from .schedules import scaled_linear_alphas_cumprod, zero_terminal_snr
from .text import LanguageEncoder, TextEncoder
from .transformer_model import FAMILIES, Family, TransformerDenoiser

BUNDLED = pathlib.Path(__file__).resolve().parent.parent / "pocket"
# name: (folder beside `BUNDLED`, folder of the network, folder of the scheduler) of a bundled model
POCKETS = {
    "pocket": ("pocket", "unet", "scheduler"),
    "pocket-lcm": ("pocket", "unet_lcm", "scheduler_lcm"),
    "pocket-flow": ("pocket_flow", "transformer", "scheduler"),
}
ARCHITECTURES = {
    "UNet2DConditionModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "AutoencoderTiny": "diffusers",
    "AutoencoderKLQwenImage": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "T5EncoderModel": "transformers",
    "Gemma2Model": "transformers",
    "Qwen3Model": "transformers",
    "Qwen2_5_VLTextModel": "transformers",
    **dict.fromkeys(FAMILIES, "diffusers"),
}
# Language models with a head or eyes, of which the part between is the text encoder.
HEADLESS = {
    "Gemma2ForCausalLM": "Gemma2Model",
    "Qwen3ForCausalLM": "Qwen3Model",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VLTextModel",
}
SD_SCALING, SDXL_SCALING = 0.18215, 0.13025
PathLike = str | pathlib.Path


def init_config(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Return a config without what its class writes but does not take, about which diffusers would warn the user."""
    written = ("block_out_channels",) if architecture == "AutoencoderTiny" else ()
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in written}


class Unfilled(TorchFunctionMode):
    """Within the context, tensors that a module would fill at random are made on the meta device, and everything else as usual."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Part:
    """One network before it is loaded: how to make its skeleton, and which weight is where in which files."""

    config: dict[str, Any]
    architecture: str
    files: tuple[pathlib.Path, ...]
    source: Callable[[str], Source] | None = None
    prefixes: tuple[str, ...] = ()  # what to put before the names of each file, where the files' names collide

    def key(self, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
        content = json.dumps(self.config, sort_keys=True, default=str)
        return self.architecture, fingerprint(*self.files), content, str(device), str(dtype)

    def skeleton(self) -> nn.Module:
        """Return the network without weights (on the meta device); what it computes from its config is there."""
        import importlib

        library = ARCHITECTURES[self.architecture]
        cls = getattr(importlib.import_module(library), self.architecture)
        with described_by(self.files[0].parent), Unfilled():
            config = init_config(self.config, self.architecture)
            return cls(cls.config_class(**config)) if library == "transformers" else cls.from_config(config)

    def load(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Return the network in eval mode with each weight read from the mapped file straight to its place."""
        module = self.skeleton()
        files = zip(self.prefixes or [""] * len(self.files), map(Weights, self.files))
        holders = {prefix + name: (weights, name) for prefix, weights in files for name in weights.names}
        source = self.source or (lambda key: Source(_alias(key, holders.keys())))
        state = {}
        for key, empty in module.state_dict().items():
            at = source(key)
            if at.name not in holders:
                raise ValueError(
                    f"Expected the weight {at.name} in {self.files[0]}, but it is not there. The file is of another model "
                    "or incomplete: download it again, config and weights together."
                )
            weights, name = holders[at.name]
            tensor = weights.read(at._replace(name=name))
            state[key] = _placed(tensor, empty, device, dtype, f"{name} in {weights.path}")
        module.load_state_dict(state, assign=True)
        return module.to(device).eval().requires_grad_(False)


def _placed(tensor: Tensor, empty: Tensor, device: torch.device, dtype: torch.dtype, what: str) -> Tensor:
    """Return a copy of `tensor` on `device` in the shape of `empty`, channels last for convolutions."""
    if tensor.shape != empty.shape:
        # The original layout stores some linear layers as 1x1 convolutions.
        if tensor.shape != (*empty.shape, *[1] * (tensor.ndim - empty.ndim)):
            raise ValueError(
                f"Expected {what} of shape {tuple(empty.shape)}, but got {tuple(tensor.shape)}. The config and the weights "
                "are of different models: download both again."
            )
        tensor = tensor.reshape(empty.shape)
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    # A copy even where nothing changes: a weight that stays mapped would crash the process when the file is overwritten.
    return tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True, memory_format=layout)


# What stands before the names of a text encoder's weights in the files of one version of transformers and not of another.
PREFIXES = ("text_model.", "model.", "model.language_model.", "language_model.")
# Weights that are one in two places, of which files hold one.
TIED = {"encoder.embed_tokens.weight": "shared.weight", "shared.weight": "encoder.embed_tokens.weight"}


def _alias(key: str, names: Any) -> str:
    """Return the name under which a diffusers folder holds a weight: transformers and diffusers have renamed some over time."""
    old = key
    for new, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = old.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
    with_prefix = (prefix + key for prefix in PREFIXES)
    without = (key.removeprefix(prefix) for prefix in PREFIXES)
    for name in (key, *with_prefix, *without, old, TIED.get(key)):
        if name in names:
            return str(name)
    return key


def load(
    source: PathLike = "pocket", device: torch.device | str | None = None, dtype: torch.dtype | str | None = None, *,
    vae: PathLike | None = None, tokenizer: Any = None, prediction_type: str | None = None, quantize: bool = False,
) -> Pipeline:  # fmt: skip
    """Load a model as a `Pipeline`, without network access; the networks are cached by the content of their files.

    Args:
        source: "pocket", "pocket-lcm" (few steps, cfg_scale 1), "pocket-flow", a diffusers folder of SD1.5, SD2.x, SDXL or of a
            flow transformer (`core.transformer_model.FAMILIES`), or a .safetensors checkpoint of SD1.5, SD2.x or SDXL.
        device: by default what the environment variable SLIPSTREAM_DEVICE names, else CUDA when there is one, else the CPU.
        dtype: float16 on CUDA, else float32.
        vae: another VAE, as a folder or a .safetensors file: an AutoencoderKL or a tiny autoencoder (TAESD).
        tokenizer: CLIP's tokenizer for a single file, as a folder or an object. Without it one is looked for beside the file
            and in the local Hugging Face cache.
        prediction_type: overrides what the config says or what is found out about a single file.
        quantize: ask the network at whole timesteps only, as ComfyUI does; see `DiscreteLevels`.

    Raises:
        FileNotFoundError, ValueError: one sentence that says what to do, for a missing, damaged, pickled, unknown or unfitting file.
        MemoryError: the device or the host is full.
    """
    device = pick_device(device)
    dtype = pick_dtype(device, dtype)
    if prediction_type is not None:
        check_choice("prediction_type", prediction_type, PREDICTIONS)
    with described_by(source):
        parts = _file_parts(pathlib.Path(source).expanduser(), vae) if _is_file(source) else _folder_parts(source, vae)
        parts.check()
    if tokenizer is not None:
        parts.tokenizers = [tokenizer] * len(parts.text)
    remedy = "Close what else uses the device, or choose another `device` or `dtype`."
    return with_memory(lambda: parts.pipeline(device, dtype, prediction_type, quantize), f"load {source}", remedy)


def _is_file(source: PathLike) -> bool:
    path = pathlib.Path(source).expanduser()
    is_weights = path.suffix.lower() in (".safetensors", ".gguf", *checkpoint.PICKLES)
    return is_weights or (path.is_file() and path.name != "model_index.json")


@dataclass(eq=False)
class Parts:
    """What a folder or a file holds: networks that are not loaded yet, tokenizers, and how to read the network's output."""

    network: Part
    vae: Part
    text: list[Part]
    tokenizers: list[Any]
    pad_ids: list[int | None]
    alphas_cumprod: Tensor | None
    prediction_type: str | None
    shift: float = 1.0

    @property
    def family(self) -> Family | None:
        """The kind of transformer; None for a UNet."""
        return FAMILIES.get(self.network.architecture)

    def pipeline(
        self, device: torch.device, dtype: torch.dtype, prediction_type: str | None, quantize: bool = False
    ) -> Pipeline:
        is_xl = self.network.config.get("addition_embed_type") == "text_time"
        # SDXL's VAE overflows in float16, and its config tells; SD1.5's tells the same by default, but does not overflow.
        upcast = is_xl and dtype == torch.float16 and self.vae.config.get("force_upcast", True)
        vae_dtype = torch.float32 if upcast and self.vae.architecture == "AutoencoderKL" else dtype
        model = self._denoiser(_shared(self.network, device, dtype, self), prediction_type, quantize)
        text = [
            self._encoder(part, _shared(part, device, dtype, self), tokenizer, pad_id, is_xl)
            for part, tokenizer, pad_id in zip(self.text, self.tokenizers, self.pad_ids)
        ]
        vae = _shared(self.vae, device, vae_dtype, self)
        pipe = Pipeline(model, text, vae, device, dtype, self._text_key(device, dtype))
        MODELS.hold(self.network.key(device, dtype), model)
        for part, kept in ((self.vae, vae_dtype), *((part, dtype) for part in self.text)):
            MODELS.hold(part.key(device, kept), pipe)
        return pipe

    def _denoiser(self, network: Any, prediction_type: str | None, quantize: bool) -> NetworkDenoiser:
        if self.family is None:
            kind = prediction_type or self.prediction_type or checkpoint.probed_prediction(network)
            return DiffusersDenoiser(network, self.alphas_cumprod, kind, quantize=quantize)
        if prediction_type not in (None, "flow"):
            raise ValueError(
                f"Expected `prediction_type` 'flow' or None for a {self.family.name} model, but got {prediction_type!r}."
            )
        return TransformerDenoiser(network, self.family, self.shift)

    def _encoder(
        self, part: Part, network: Any, tokenizer: Any, pad_id: int | None, is_xl: bool
    ) -> TextEncoder | LanguageEncoder:
        reading = self.family.readings.get(part.architecture) if self.family else None
        if reading is not None:
            return LanguageEncoder(network, _tokenizer(tokenizer, clip=False), reading)
        penultimate = self.family.penultimate if self.family else is_xl
        return TextEncoder(network, _tokenizer(tokenizer), penultimate, pad_id)

    def check(self) -> None:
        """Raise ValueError for networks that do not fit each other or are of a kind that is not sampled here."""
        self._check_channels()
        self._check_conditioning()

    def _check_channels(self) -> None:
        """Raise ValueError for a network that takes more channels than it gives, and for a VAE of another family."""
        config = self.network.config
        latents = self.family.channels(config) if self.family else config.get("in_channels", 4)
        outputs = config.get("out_channels") or config.get("in_channels", 4)
        if config.get("in_channels", 4) not in (outputs, 4 * outputs if self.family else outputs):
            raise ValueError(
                f"Expected a network of as many channels in as out, but got {config['in_channels']} in: an inpainting or instruction "
                "model. Load its base model."
            )
        if vae_channels(self.vae.config) != latents:
            raise ValueError(
                f"Expected a VAE with {latents} latent channels for this model, but got {vae_channels(self.vae.config)}. "
                "Choose the VAE that belongs to the model."
            )

    def _check_conditioning(self) -> None:
        """Raise ValueError for a UNet that wants more than text, and for SDXL's image sizes."""
        config = self.network.config
        for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
            if config.get(name) is not None:
                raise ValueError(
                    f"Expected a UNet that is conditioned by text alone, but got one with `{name}` {config[name]!r} (an upscaler, "
                    "unCLIP, Kandinsky ...). Load an SD1.5, SD2.x or SDXL model."
                )
        if config.get("use_additional_t_cond"):
            raise ValueError(
                "Expected a Qwen-Image that is conditioned by text alone, but got one with `use_additional_t_cond` (layered). "
                "Load Qwen-Image."
            )
        if config.get("addition_embed_type") not in (None, "text_time"):
            raise ValueError(
                f"Expected a UNet of SD1.5, SD2.x or SDXL, but got one with `addition_embed_type` {config['addition_embed_type']!r}. "
                "Load one of those."
            )
        if config.get("addition_embed_type") and self.text:
            sizes = config["projection_class_embeddings_input_dim"] - self.text[-1].config.get("projection_dim", 512)
            if sizes != 6 * config["addition_time_embed_dim"]:
                raise ValueError(
                    f"Expected an SDXL model, which takes 6 sizes, but got one that takes {sizes / config['addition_time_embed_dim']:g}: "
                    "an SDXL refiner. Load the SDXL base model."
                )

    def _text_key(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if not all(isinstance(tokenizer, (str, pathlib.Path)) for tokenizer in self.tokenizers):
            return None
        words = [fingerprint(*sorted(p for p in pathlib.Path(t).glob("*") if p.is_file())) for t in self.tokenizers]
        return str([part.key(device, dtype) for part in self.text] + words)


def vae_channels(config: dict[str, Any]) -> int:
    """Return the latent channels of a VAE's config."""
    return int(config.get("latent_channels", config.get("z_dim", 4)))


def _shared(part: Part, device: torch.device, dtype: torch.dtype, user: Parts) -> Any:
    return MODELS.get(part.key(device, dtype), lambda: part.load(device, dtype), user)


def _tokenizer(source: Any, clip: bool = True) -> Any:
    """Return a tokenizer from a folder, that of CLIP or another; None and tokenizers stay as they are."""
    if not isinstance(source, (str, pathlib.Path)):
        return source
    # transformers makes an empty tokenizer of a folder without the files.
    if not _holds_tokenizer(pathlib.Path(source)):
        raise FileNotFoundError(
            f"Expected a {'CLIP ' * clip}tokenizer (tokenizer.json, or vocab.json and merges.txt) in {source}, but found none. "
            f"Copy {'the tokenizer folder of any Stable Diffusion model' if clip else 'it from the folder of the model'} there."
        )
    import transformers

    cls = transformers.CLIPTokenizer if clip else transformers.AutoTokenizer
    with described_by(source):
        return cls.from_pretrained(str(source), local_files_only=True)


def _holds_tokenizer(folder: pathlib.Path) -> bool:
    names = {path.name for path in folder.glob("*")}
    return bool(names & {"tokenizer.json", "spiece.model", "tokenizer.model"}) or {"vocab.json", "merges.txt"} <= names


def bundled(name: str) -> tuple[pathlib.Path, str, str] | None:
    """Return (model folder, network, scheduler) of a bundled model; None for another name."""
    if name not in POCKETS:
        return None
    folder, network, scheduler = POCKETS[name]
    return BUNDLED.with_name(folder), network, scheduler


def _folder_parts(source: PathLike, vae: PathLike | None) -> Parts:
    """Describe a diffusers folder or one of the bundled models."""
    ours = bundled(str(source))
    folder, network_folder, scheduler_folder = ours or (pathlib.Path(source).expanduser(), "unet", "scheduler")
    if ours is not None and not (folder / network_folder).is_dir():
        raise ValueError(
            f"Expected a bundled model, but this copy has no {source!r}. Use 'pocket', or install it again."
        )
    full = {
        network: [whole for whole, part in HEADLESS.items() if part in f.readings] for network, f in FAMILIES.items()
    }
    texts = {network: (*family.readings, *full[network]) for network, family in FAMILIES.items()}
    found = read_folder(folder, network_folder, scheduler_folder, texts)
    family = FAMILIES.get(found.network.kind)
    vaes = VAES if family is None else family.vaes
    return Parts(
        network=_part(found.network),
        vae=_vae_part(
            pathlib.Path(vae).expanduser() if vae else found.path / "vae", SD_SCALING, family is not None, vaes
        ),
        text=[_part(network) for network in found.text],
        tokenizers=[str(tokenizer) for tokenizer in found.tokenizers],
        pad_ids=[None for _ in found.text],
        alphas_cumprod=found.alphas_cumprod,
        prediction_type=found.prediction_type,
        shift=found.shift,
    )


def _part(network: Network) -> Part:
    config = network.config.get("text_config") or network.config
    return Part(config, HEADLESS.get(network.kind, network.kind), network.files)


def _vae_part(path: pathlib.Path, scaling_factor: float, shifted: bool = False, kinds: Collection[str] = VAES) -> Part:
    """Describe a VAE in a folder, a diffusers or original file, or TAESD's pair of files; a file does not hold its scale."""
    if path.is_dir() or not _is_file(path):
        return _part(read_vae(path, shifted, kinds))
    weights = Weights(path)
    if match := re.match(r"(.*)(encoder|decoder)(.*\.safetensors)$", path.name):
        if "0.weight" in weights.names or "1.weight" in weights.names:
            return _taesd_part([path.with_name(f"{match[1]}{side}{match[3]}") for side in ("encoder", "decoder")])
    if weights.has("encoder.layers.") and weights.has("decoder.layers."):
        return Part({"latent_channels": weights.shape("decoder.layers.0.weight")[1]}, "AutoencoderTiny", (path,))
    for prefix in (checkpoint.VAE, ""):
        if weights.has(f"{prefix}decoder.mid."):
            config = checkpoint.vae_config(weights, prefix, scaling_factor)
            return Part(config, "AutoencoderKL", (path,), checkpoint.vae_source(config, prefix))
    raise ValueError(
        f"Expected a VAE in {path.name}, but it holds something else. Give `vae=` an AutoencoderKL or TAESD file, or a VAE folder."
    )


def _taesd_part(files: Sequence[pathlib.Path]) -> Part:
    """Describe TAESD's original pair of files, whose decoder starts with a clamp that has no weights."""

    def source(key: str) -> Source:
        side, _, number, rest = key.split(".", 3)
        return Source(f"{side}.{int(number) + (side == 'decoder')}.{rest}")

    latents = Weights(files[1]).shape("1.weight")[1]
    return Part({"latent_channels": latents}, "AutoencoderTiny", tuple(files), source, ("encoder.", "decoder."))


def _file_parts(path: pathlib.Path, vae: PathLike | None) -> Parts:
    """Describe a single-file checkpoint."""
    weights = Weights(path)
    problem = checkpoint.describe_layout(weights)
    if problem:
        raise ValueError(f"Expected a model checkpoint, but {path.name} is {problem}.")
    config = checkpoint.unet_config(weights)
    is_xl = "addition_embed_type" in config
    prefixes = checkpoint.text_prefixes(weights)
    if vae is None and not weights.has(checkpoint.VAE):
        raise ValueError(f"Expected a checkpoint with a VAE, but {path.name} has none. Give one with `vae=`.")
    alphas = scaled_linear_alphas_cumprod()
    return Parts(
        network=Part(config, "UNet2DConditionModel", (path,), checkpoint.unet_source(config)),
        vae=_vae_part(pathlib.Path(vae).expanduser() if vae else path, SDXL_SCALING if is_xl else SD_SCALING),
        text=[_text_part(weights, prefix) for prefix in prefixes],
        tokenizers=[_nearby_tokenizer(path)] * len(prefixes),
        # OpenCLIP was trained with padding 0, whatever the tokenizer says.
        pad_ids=[0 if p in checkpoint.OPEN_CLIP else None for p in prefixes],
        alphas_cumprod=zero_terminal_snr(alphas) if "ztsnr" in weights.names else alphas,
        prediction_type=checkpoint.stated_prediction(weights),
    )


def _text_part(weights: Weights, prefix: str) -> Part:
    name = "CLIPTextModelWithProjection" if prefix == checkpoint.SDXL_TEXT_2 else "CLIPTextModel"
    return Part(checkpoint.text_config(weights, prefix), name, (weights.path,), checkpoint.text_source(prefix))


def _nearby_tokenizer(path: pathlib.Path) -> pathlib.Path | None:
    """Return the tokenizer folder beside a checkpoint, or CLIP's in the local Hugging Face cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache("openai/clip-vit-large-patch14", "vocab.json")
    folders = [path.parent / "tokenizer", *([pathlib.Path(cached).parent] if isinstance(cached, str) else [])]
    return next((folder for folder in folders if _holds_tokenizer(folder)), None)
