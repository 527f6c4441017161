"""Stage `text`: the text encoder's stand-in for CLIP's pre-training. Without it the UNet learns to read captions very slowly."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import TEXT_WIDTH, build_tokenizer, make_text_encoder, tokenize
from .scenes import COLOURS, KINDS, PLACES, SHAPES, Item, Scene, caption, sample_scene
from .training import Loop, apply_gradients, cosine, rank

# background, kind, count, then colour, shape, size of either object, place; each with a class for "not said" where it can be left out
CLASSES = (8, 4, 2, 9, 7, 3, 9, 7, 3, 8)


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Enough for all attributes to be readable; more changes nothing."""

    minutes: float = 2.0
    batch: int = 64
    lr: float = 2e-3
    full_share: float = 0.5


def _said(item: Item | None, text: str) -> list[int]:
    if item is None:
        return [len(COLOURS), len(SHAPES), 0]
    # The two colours of a pair differ, so this is unambiguous.
    size = 1 + int(item.size == "large") if f"{item.size} {item.colour} {item.shape}" in text else 0
    return [COLOURS.index(item.colour), SHAPES.index(item.shape), size]


def caption_classes(scene: Scene, text: str) -> list[int]:
    """What `text` says about its scene, one class per entry of `CLASSES`."""
    one = scene.items[0]
    two = scene.items[1] if len(scene.items) == 2 else None
    if two:
        place = 6 if one.place == "left" else 7
    else:
        place = list(PLACES).index(one.place) if PLACES[one.place] in text else 5
    # A plain background is said by naming no other kind.
    said = [COLOURS.index(scene.background), KINDS.index(scene.kind), len(scene.items) - 1]
    return [*said, *_said(one, text), *_said(two, text), place]


def _batch(tokenizer: object, rng: np.random.Generator, settings: TextSettings) -> tuple[Tensor, Tensor]:
    scenes = [sample_scene(rng) for _ in range(settings.batch)]
    texts = [caption(s, rng, full=rng.random() < settings.full_share) for s in scenes]
    return tokenize(tokenizer, texts), torch.tensor([caption_classes(s, t) for s, t in zip(scenes, texts)])


def readable_loss(
    hidden: Tensor, ids: Tensor, truth: Tensor, heads: nn.Module, end: int, classes: Sequence[int] = CLASSES
) -> Tensor:
    """Every attribute must be readable at the end token and at the pad tokens after it, two of which are drawn."""
    rows, tokens, width = hidden.shape
    first = (ids == end).float().argmax(1)
    spread = torch.rand(rows, 3, device=ids.device) * (tokens - first[:, None])
    spread[:, 0] = 0
    at = (first[:, None] + spread.long()).clamp(max=tokens - 1)
    logits = heads(hidden.gather(1, at[..., None].expand(-1, -1, width))).split(list(classes), -1)
    losses = [F.cross_entropy(logit.flatten(0, 1), truth[:, i].repeat_interleave(3)) for i, logit in enumerate(logits)]
    return torch.stack(losses).sum()


def train_text(work: pathlib.Path, device: str, settings: TextSettings) -> None:
    """Train and write `work`/tokenizer and `work`/text_encoder; frozen afterwards."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(work / "tokenizer")
    text = make_text_encoder(tokenizer).to(device).train()
    heads = nn.Linear(TEXT_WIDTH, sum(CLASSES)).to(device)
    parameters = [*text.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=1e-3, betas=(0.9, 0.99))
    loop = Loop(work / "text.pt", settings.minutes, {"text": text, "heads": heads, "optimizer": optimizer})
    rng = np.random.default_rng([rank(), loop.step])
    for share in loop:
        ids, truth = _batch(tokenizer, rng, settings)
        ids = ids.to(device)
        loss = readable_loss(text(ids)[0], ids, truth.to(device), heads, tokenizer.eos_token_id)
        apply_gradients(loss, settings.lr * cosine(share), optimizer)
        loop.report(loss=loss)
    if rank() == 0:
        text.cpu().eval().save_pretrained(work / "text_encoder")
