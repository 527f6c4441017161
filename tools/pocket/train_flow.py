"""Stage `flow-dit`: the diffusion transformer of pocket-flow by flow matching (Lipman et al. 2023), on cached latents."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import shutil
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .emoji import OBJECTS
from .flow_models import SIDE, Trainer, make_transformer, save_folder
from .flow_scenes import FEW_OBJECTS, WORDS, Scenes, caption, make_atlas, render, sample_scenes
from .train_flow_text import LENGTH
from .train_flow_vae import LATENT_CHANNELS, make_optimizers
from .training import Average, Loop, apply_gradients, cosine, processes, rank

_SHARD = 128  # scenes encoded at a time
_CAPTIONS = 4  # of each scene


@dataclasses.dataclass(frozen=True)
class FlowSettings:
    """Settings of the CPU; `on_gpu` changes them."""

    minutes: float = 65.0
    width: int = 128
    layers: int = 4
    heads: int = 4
    objects: tuple[str, ...] = FEW_OBJECTS
    shapes: float = 0.5  # share of objects that are coloured shapes
    latents: int = 12000  # scenes in all, of which `first` are there before the first step
    first: int = 512
    grow_every: int = 8  # steps between additions
    batch: int = 32
    lr: float = 3e-3
    ema: float = 0.99
    empty: float = 0.1  # share of empty captions, for guidance
    full: float = 0.7  # share of complete captions among the others
    mean: float = 0.4  # of the logit of the noise level
    save_every: float = 4.0  # minutes between writings of the folder
    encoded: int = 16  # scenes in one call of the autoencoder
    compiled: bool = False


def on_gpu(settings: FlowSettings) -> FlowSettings:
    """Settings of one GPU for five minutes: all objects, and as large a network as the bundled files have room for."""
    return dataclasses.replace(
        settings, minutes=5.0, width=224, layers=6, heads=7, objects=tuple(OBJECTS), shapes=0.25, latents=80_000, first=16_384,
        grow_every=4, batch=512, lr=2e-3, ema=0.999, save_every=60.0, encoded=_SHARD, compiled=True,
    )  # fmt: skip


def word_table(tokenizer: Any) -> dict[str, int]:
    """The token of each word of the vocabulary."""
    return {word: tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in set(WORDS)}


def word_ids(text: str, table: dict[str, int], tokenizer: Any) -> list[int]:
    """Token ids of a caption of known words, as the tokenizer gives them, without its cost."""
    ids = [tokenizer.bos_token_id, *(table[word] for word in text.split()), tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (LENGTH - len(ids))


class FlowBatches:
    """Batches of cached latents with text; the cache grows, and is kept in `work`/latents, during training."""

    def __init__(self, work: pathlib.Path, vae: Any, tokenizer: Any, settings: FlowSettings, device: str) -> None:
        self.folder, self.vae, self.tokenizer, self.settings, self.device = (
            work / "latents",
            vae,
            tokenizer,
            settings,
            device,
        )
        self.folder.mkdir(exist_ok=True)
        self.table, self.atlas = word_table(tokenizer), make_atlas().to(device)
        room = -(-settings.latents // _SHARD) * _SHARD
        self.latents = torch.empty(room, LATENT_CHANNELS, SIDE, SIDE, dtype=torch.float16, device=device)
        self.ids = torch.empty(room, _CAPTIONS, LENGTH, dtype=torch.long, device=device)
        self.filled = 0
        while self.filled < settings.first:
            self.grow()

    def grow(self) -> None:
        """Read or make one more shard."""
        number = self.filled // _SHARD * processes() + rank()
        path = self.folder / f"{number:05}.pt"
        if path.exists():
            latents, ids = torch.load(path)
        else:
            latents, ids = self._make(np.random.default_rng([5, number]))
            if self.device == "cpu":  # a GPU makes them again faster than it reads them
                torch.save((latents, ids), path.with_suffix(".partial"))
                os.replace(path.with_suffix(".partial"), path)
        self.latents[self.filled : self.filled + _SHARD] = latents
        self.ids[self.filled : self.filled + _SHARD] = ids
        self.filled += _SHARD

    @torch.no_grad()
    def _make(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        scenes = sample_scenes(_SHARD, rng, shapes=self.settings.shapes, objects=self.settings.objects)
        step = self.settings.encoded
        parts = [self._encode(scenes[i : i + step]) for i in range(0, _SHARD, step)]
        texts = [
            [caption(scenes, i, rng, rng.random() < self.settings.full) for _ in range(_CAPTIONS)]
            for i in range(_SHARD)
        ]
        ids = torch.tensor([[word_ids(t, self.table, self.tokenizer) for t in row] for row in texts])
        return torch.cat(parts), ids

    def _encode(self, scenes: Scenes) -> Tensor:
        images = render(scenes, self.atlas).contiguous(memory_format=torch.channels_last)
        return (self.vae.encode(images).latent_dist.mean * self.vae.config.scaling_factor).half()

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents (B, 16, 16, 16) and token ids (B, LENGTH)."""
        if step % self.settings.grow_every == 0 and self.filled < len(self.latents):
            self.grow()
        row = torch.randint(self.filled, (self.settings.batch,), device=self.device)
        return self.latents[row].float(), self.ids[row, torch.randint(_CAPTIONS, row.shape, device=self.device)]


def draw_times(count: int, mean: float, device: str) -> Tensor:
    """Times, 0 for noise and 1 for data, whose noise level is logit-normal (Esser et al. 2024, eq. 19); stratified."""
    uniform = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return torch.sigmoid(-mean - math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-0.9999, 0.9999)))


def flow_loss(net: nn.Module, clean: Tensor, context: Tensor, times: Tensor) -> Tensor:
    """Squared error of the velocity, data minus noise, on the straight line between them."""
    noise = torch.randn_like(clean)
    t = times.view(-1, 1, 1, 1)
    return (net(t * clean + (1 - t) * noise, times, context) - (clean - noise)).square().mean()


class Frozen:
    """The autoencoder, the text encoder and the tokenizer that earlier stages left in `work`."""

    def __init__(self, work: pathlib.Path, device: str) -> None:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, CLIPTokenizer

        for part in ("vae", "text_encoder"):
            if not (work / part).exists():
                raise FileNotFoundError(
                    f"Expected {work / part}, but it is not there. Run the stages flow-text and flow-vae first."
                )
        self.vae = AutoencoderKL.from_pretrained(work / "vae").to(device, memory_format=torch.channels_last).eval()
        self.text = CLIPTextModel.from_pretrained(work / "text_encoder").to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        for part in (self.vae, self.text):
            part.requires_grad_(False)


def train_flow(work: pathlib.Path, out: pathlib.Path, device: str, settings: FlowSettings) -> None:
    """Train and write the folder `out`, on the way too."""
    torch.manual_seed(0)  # all processes start from the same weights
    frozen = Frozen(work, device)
    model = make_transformer(settings.width, settings.layers, settings.heads).to(device).train()
    net = Trainer(model).to(device)
    if settings.compiled:
        net.compile_blocks()
    optimizers = make_optimizers(model, settings.lr, ("x_embedder", "norm_out", "time_caption_embed"))
    average = Average(model, settings.ema)
    parts = {"model": model, "muon": optimizers[0], "adam": optimizers[1], "average": average}
    loop = Loop(work / "dit.pt", settings.minutes, parts)
    torch.manual_seed(1000 * rank() + loop.step)
    batches = FlowBatches(work, frozen.vae, frozen.tokenizer, settings, device)
    empty = torch.tensor(frozen.tokenizer("", padding="max_length").input_ids, device=device)
    saved = time.monotonic()
    for share in loop:
        clean, ids = batches.draw(loop.step)
        ids = torch.where(torch.rand(len(ids), 1, device=device) < settings.empty, empty, ids)
        times = draw_times(len(clean), settings.mean, device)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            context = frozen.text(ids)[0]
            loss = flow_loss(net, clean, context, times)
        apply_gradients(loss, settings.lr * cosine(share), *optimizers)
        average.update()
        loop.report(loss=loss, every=25)
        if time.monotonic() - saved > 60 * settings.save_every:
            saved = time.monotonic()
            publish(out, frozen, model, average)
    publish(out, frozen, model, average)


def publish(out: pathlib.Path, frozen: Frozen, model: nn.Module, average: Average) -> None:
    """Put a folder with the averaged weights in the place of `out`; readers find the old one or the new one, each whole."""
    if rank() != 0:
        return
    live = [p.detach().clone() for p in model.parameters()]
    average.copy_to(model)
    new, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    save_folder(new, frozen.vae, frozen.text, frozen.tokenizer, model)
    with torch.no_grad():
        for p, value in zip(model.parameters(), live):
            p.copy_(value)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
