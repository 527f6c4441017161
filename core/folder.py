"""A diffusers folder, described once for `load` and for Load Model in the host: networks, weight files, levels, prediction."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .checkpoint import refuse_pickle
from .checks import printable
from .files import PathLike
from .schedules import alphas_cumprod_of

UNETS = ("UNet2DConditionModel",)
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
VAES = ("AutoencoderKL", "AutoencoderTiny")
SUPPORTED = "SD1.5, SD2.x and SDXL folders (a UNet2DConditionModel)"
REMEDY = "Load one of those; in ComfyUI the host's own loaders read other models, and all nodes take their MODEL."

# Full precision before half, as diffusers does without `variant`; any other variant ("non_ema") after them.
STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("", "fp32", "bf16", "fp16")

# The schedulers of diffusers that step through a table of alphas_cumprod; how they step does not matter here.
TABLE_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
        "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
        "UniPCMultistep",
    )
)  # fmt: skip
# Settings that turn a scheduler of a table into one of another kind, with the values that leave it as it is.
OTHER_KINDS: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (None, False), "timestep_type": (None, "discrete"), "sigma_data": (None,), "snr_shift_scale": (None, 1.0),
}  # fmt: skip
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


@dataclass(frozen=True)
class Network:
    """One network of a folder: its config, its class and the safetensors files that hold its weights."""

    config: dict[str, Any]
    kind: str
    files: tuple[pathlib.Path, ...]


@dataclass(frozen=True, eq=False)
class Folder:
    """A diffusers folder of a UNet2DConditionModel or of a transformer; nothing is loaded yet.

    `scheduler` is its config. From it follow `prediction_type`, one of `PREDICTIONS` or "flow", and the levels: `alphas_cumprod`
    (T,) of a UNet, `shift` of a flow. `text` and `tokenizers` are one to three.
    """

    path: pathlib.Path
    network: Network
    text: tuple[Network, ...]
    tokenizers: tuple[pathlib.Path, ...]
    scheduler: dict[str, Any]
    alphas_cumprod: Tensor | None
    prediction_type: str
    shift: float = 1.0


@contextmanager
def described_by(path: PathLike) -> Iterator[None]:
    """Turn what a library raises over the files of a model into one ValueError that names them; our own errors are left."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, (ValueError, OSError)) and str(error).startswith("Expected"):
            raise
        reason = printable(str(error)).strip()[:200]
        raise ValueError(
            f"Expected files of a model that belong together in {path}, but got {type(error).__name__}: {reason}. "
            "Download it again, config and weights together."
        ) from error


def read_folder(
    path: pathlib.Path,
    network: str = "unet",
    scheduler: str = "scheduler",
    transformers: Mapping[str, Collection[str]] | None = None,
) -> Folder:
    """Describe a diffusers folder; `network` and `scheduler` name the parts to take (the bundled model holds two of each).

    `transformers` are the classes that may stand in the place of a UNet, each with those of its text encoders beside CLIP; they
    lie in the folder "transformer" unless `network` names another.

    Raises FileNotFoundError or ValueError, one sentence with the remedy, for a path that is none, parts that are missing,
    damaged or pickled, and models or schedulers of kinds that are not sampled here.
    """
    path = path.parent if path.name == "model_index.json" else path
    known = transformers or {}
    if (
        network == "unet"
        and _class_in(path / "transformer") in known
        and not (path / network / "config.json").is_file()
    ):
        network = "transformer"
    _check_is_folder(path, network, known)
    found = read_network(path / network, UNETS if network.startswith("unet") else known)
    config = read_json(path / scheduler / "scheduler_config.json")
    texts = (*TEXT_ENCODERS, *known.get(found.kind, ()))
    names = [f"text_encoder{s}" for s in ("", "_2", "_3") if (path / f"text_encoder{s}" / "config.json").is_file()]
    encoders = tuple(read_network(path / name, texts) for name in names)
    tokenizers = tuple(path / name.replace("text_encoder", "tokenizer") for name in names)
    if found.kind in known:
        return Folder(path, found, encoders, tokenizers, config, None, "flow", shift_of(config))
    _check_unet(found, path / network)
    return Folder(path, found, encoders, tokenizers, config, alphas_cumprod_of(config), prediction_of(config))


def _class_in(folder: pathlib.Path) -> str | None:
    """Return the class of the network in a folder, None where there is none."""
    path = folder / "config.json"
    return read_json(path).get("_class_name") if path.is_file() else None


def shift_of(config: Mapping[str, Any]) -> float:
    """Return the timestep shift of a flow scheduler's config: where it depends on the size of the image, that of the largest.

    Raises ValueError by name for a scheduler of another kind.
    """
    if config.get("_class_name") not in FLOW_SCHEDULERS:
        raise ValueError(
            f"Expected {' or '.join(FLOW_SCHEDULERS)} for this transformer, but got {config.get('_class_name')}. Download the whole "
            "folder again."
        )
    if config.get("use_dynamic_shifting"):
        return math.exp(config.get("max_shift", 1.15))
    return float(config.get("shift", 1.0))


def read_network(folder: pathlib.Path, kinds: Collection[str]) -> Network:
    """Describe one network of a folder; raises ValueError unless its class is one of `kinds`."""
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or (config.get("architectures") or ["nothing"])[0]
    if kind not in kinds:
        raise ValueError(
            f"Expected {' or '.join(kinds)} in {folder}, but got {kind}. Load an SD1.5, SD2.x or SDXL model."
        )
    return Network(config, kind, weight_files(folder))


def read_vae(folder: pathlib.Path, shifted: bool = False, kinds: Collection[str] = VAES) -> Network:
    """Describe a VAE of one of `kinds` in its folder or in that of its model; raises ValueError for one that shifts its latents unless
    `shifted`.
    """
    inner = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (inner / "config.json").is_file():
        raise FileNotFoundError(f"Expected a VAE in {inner}, but found none. Give a VAE folder or file.")
    network = read_network(inner, kinds)
    for name in ("shift_factor", "latents_mean"):
        if network.config.get(name) and not shifted:
            raise ValueError(
                f"Expected a VAE that only scales its latents, but {inner} shifts them (`{name}` in its config.json). "
                "Give the VAE of an SD1.5, SD2.x or SDXL model."
            )
    return network


def prediction_of(config: Mapping[str, Any]) -> str:
    """Return the prediction type of a scheduler's config; raises ValueError by name for a kind that is not sampled here."""
    name, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
    strange = [f"{key} {config[key]!r}" for key, plain in OTHER_KINDS.items() if config.get(key) not in plain]
    if (name or "DDIMScheduler") not in TABLE_SCHEDULERS or prediction not in PREDICTIONS or strange:
        got = ", ".join([str(name), f"prediction_type {prediction!r}", *strange])
        raise ValueError(
            "Expected a scheduler with a table of noise levels (DDIM, PNDM, Euler, DPM-Solver ...) and eps, v or x0 prediction, "
            f"but got {got}. A UNet of this kind cannot be sampled here: load an SD1.5, SD2.x or SDXL model."
        )
    return str(prediction)


def weight_files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Return the safetensors files of a network: one, or the shards that an index lists; see `VARIANTS` for which."""
    for stem in STEMS:
        found = {
            file.name[len(stem) :].replace(ending, "").removesuffix(".json").strip("."): file
            for ending in (".safetensors.index", ".safetensors")
            for file in folder.glob(f"{stem}*{ending}*")
        }
        others = sorted(variant for variant in found if variant not in VARIANTS and "-of-" not in variant)
        for file in (found[variant] for variant in (*VARIANTS, *others) if variant in found):
            return (file,) if file.suffix == ".safetensors" else _shards(file)
    names = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".safetensors", ".gguf"))
    for name in names:
        refuse_pickle(folder / name)
    got = f"only {', '.join(names)}" if names else "none"
    raise FileNotFoundError(f"Expected a .safetensors file in {folder}, but found {got}. Download the model again.")


def _shards(index: pathlib.Path) -> tuple[pathlib.Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"Expected an index of shards in {index}, but it lists none. Download the model again.")
    files = tuple(index.parent / name for name in sorted(set(names.values())))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"Expected the shard {file}, but it is missing. Download the model again.")
    return files


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises FileNotFoundError or ValueError with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected {path}, but it is missing. Download the whole folder.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Expected JSON in {path}, but could not read it ({error}). Download the file again."
        ) from error


def _check_is_folder(path: pathlib.Path, network: str, transformers: Collection[str]) -> None:
    """Raise an error that names what a path is instead of a diffusers folder with that network."""
    if not path.is_dir():
        raise FileNotFoundError(f"Expected a model at {path}, but found nothing. Check the path, or use 'pocket'.")
    if (path / network / "config.json").is_file():
        return
    if (path / "model_index.json").is_file():
        others = f", or those of a {', '.join(transformers)}" if transformers else ""
        raise ValueError(f"Expected {SUPPORTED}{others}, but {path} is {_contents(path, network)}. {REMEDY}")
    raise ValueError(
        f"Expected a diffusers folder with {network}/config.json, but {path} has none. {_where_instead(path)}"
    )


def _contents(path: pathlib.Path, network: str) -> str:
    """Say what a folder with a model_index.json holds."""
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name", "a pipeline without a name")
    parts = {name: part[-1] for name, part in index.items() if isinstance(part, list) and part and part[-1]}
    if network in parts:
        return f"a {pipeline} without its {network}/config.json: download the whole folder"
    kind = next((parts[name] for name in ("transformer", "prior", "unet") if name in parts), None)
    return f"a {pipeline}" + (f" with a {kind}" if kind else "")


def _where_instead(path: pathlib.Path) -> str:
    """Return the remedy for a folder that is none of diffusers: the one above or below it, or a file in it."""
    above = next((p for p in (path.parent, path.parent.parent) if (p / "model_index.json").is_file()), None)
    if above is not None:
        return f"It is a part of a model: give {above}."
    # A Hugging Face cache keeps the folder in snapshots/<commit>.
    below = [p.parent for pattern in ("*", "*/*") for p in sorted(path.glob(f"{pattern}/model_index.json"))]
    if below:
        return f"Give {below[-1]}."
    files = sorted(path.glob("*.safetensors"))
    if files:
        return f"Give the folder that holds model_index.json, or a checkpoint file such as {files[0]}."
    return "Give the folder that holds model_index.json."


def _check_unet(network: Network, folder: pathlib.Path) -> None:
    # Both loaders would leave its weights aside and sample at no guidance at all.
    if network.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"Expected a UNet without a guidance embedding, but {folder} has one (`time_cond_proj_dim`, a distilled LCM). Use its base "
            "model with an LCM LoRA."
        )
