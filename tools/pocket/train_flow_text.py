"""Stage `flow-text`: tokenizer and text encoder of pocket-flow, trained to keep what a caption says, then frozen."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch
from torch import Tensor, nn

from .flow_scenes import KINDS, NOUNS, WORDS, Scenes, caption, sample_scenes
from .models import build_tokenizer, make_text_encoder, tokenize
from .scenes import COLOURS, PLACES, SIZES
from .train_text import readable_loss
from .training import Loop, apply_gradients, cosine, rank

LENGTH = 24  # tokens; no caption of the grammar is longer
WIDTH = 128
# background, kind, count, then noun, size, colour, place of either object; the last class stands for "not said" or "not there"
_OBJECT = (len(NOUNS) + 1, len(SIZES) + 1, len(COLOURS) + 1, len(PLACES) + 1)
CLASSES = (len(COLOURS), len(KINDS), 2, *_OBJECT, *_OBJECT)


@dataclasses.dataclass(frozen=True)
class FlowTextSettings:
    """Enough for all attributes to be readable."""

    minutes: float = 4.0
    batch: int = 64
    lr: float = 2e-3
    full_share: float = 0.5


def caption_classes(scenes: Scenes, i: int, text: str) -> list[int]:
    """What `text` says about scene `i`, one class per entry of `CLASSES`."""
    said = [int(scenes.background[i]), int(scenes.kind[i]), int(scenes.noun[i, 1] >= 0)]
    if KINDS[said[1]] not in text:
        said[1] = 0  # a plain background is said by naming no other kind
    parts = text.split(" background")[0].split(" and ") + [""]
    for k, part in enumerate(parts[:2]):
        values = (scenes.noun[i, k], scenes.size[i, k], scenes.colour[i, k], scenes.place[i, k])
        words = (NOUNS, SIZES, COLOURS, [*PLACES.values()])
        inside = part.rsplit(" on a ", 1)[0]
        for value, names in zip(values, words):
            said.append(int(value) if value >= 0 and names[int(value)] in inside else len(names))
    return said


def _batch(tokenizer: object, rng: np.random.Generator, settings: FlowTextSettings) -> tuple[Tensor, Tensor]:
    scenes = sample_scenes(settings.batch, rng, pairs=0.4, shapes=0.35)
    texts = [caption(scenes, i, rng, full=rng.random() < settings.full_share) for i in range(len(scenes))]
    return tokenize(tokenizer, texts), torch.tensor([caption_classes(scenes, i, t) for i, t in enumerate(texts)])


def train_flow_text(work: pathlib.Path, device: str, settings: FlowTextSettings) -> None:
    """Train and write `work`/tokenizer and `work`/text_encoder; frozen afterwards."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(work / "tokenizer", WORDS, LENGTH)
    text = make_text_encoder(tokenizer, WIDTH).to(device).train()
    heads = nn.Linear(WIDTH, sum(CLASSES)).to(device)
    optimizer = torch.optim.AdamW(
        [*text.parameters(), *heads.parameters()], lr=settings.lr, weight_decay=1e-3, betas=(0.9, 0.99)
    )
    loop = Loop(work / "text.pt", settings.minutes, {"text": text, "heads": heads, "optimizer": optimizer})
    rng = np.random.default_rng([rank(), loop.step])
    for share in loop:
        ids, truth = (x.to(device) for x in _batch(tokenizer, rng, settings))
        hidden = text(ids)[0]
        loss = readable_loss(hidden, ids, truth, heads, tokenizer.eos_token_id, CLASSES)
        apply_gradients(loss, settings.lr * cosine(share), optimizer)
        loop.report(loss=loss)
    if rank() == 0:
        ids, truth = (
            x.to(device) for x in _batch(tokenizer, np.random.default_rng(7), dataclasses.replace(settings, batch=512))
        )
        right = (
            (torch.stack([x.argmax(-1) for x in heads(text(ids)[0][:, -1]).split(CLASSES, -1)], 1) == truth)
            .float()
            .mean(0)
        )
        loop.log(right=[round(x, 3) for x in right.tolist()])
        text.cpu().eval().save_pretrained(work / "text_encoder")
