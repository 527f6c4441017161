"""A tiny U-Net with the module names of ADM (arXiv 2105.05233), to run the recorded weights and outputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Resample(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.factor > 1 else F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, resample: float = 0) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.updown = bool(resample)
        self.h_upd = self.x_upd = Resample(resample) if resample else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers[2](self.h_upd(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(embedding)[..., None, None].chunk(2, 1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.x_upd(x)) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, head: int = 16) -> None:
        super().__init__()
        self.heads = channels // head
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        b, c = x.shape[:2]
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).reshape(b * self.heads, 3 * c // self.heads, -1).chunk(3, 1)
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(c // self.heads), -1)
        return (flat + self.proj_out((v @ weight.transpose(1, 2)).reshape(b, c, -1))).reshape(x.shape)


class TinyADM(nn.Module):
    """32 and 64 channels, one block per level, attention at half size: 14 blocks that can be skipped."""

    def __init__(self) -> None:
        super().__init__()
        e = 128
        self.time_embed = nn.Sequential(nn.Linear(32, e), nn.SiLU(), nn.Linear(e, e))
        self.input_blocks = nn.ModuleList(
            [
                nn.ModuleList([nn.Conv2d(3, 32, 3, padding=1)]),
                nn.ModuleList([ResBlock(32, 32, e)]),
                nn.ModuleList([ResBlock(32, 32, e, 0.5)]),
                nn.ModuleList([ResBlock(32, 64, e), AttentionBlock(64)]),
            ]
        )
        self.middle_block = nn.ModuleList([ResBlock(64, 64, e), AttentionBlock(64), ResBlock(64, 64, e)])
        self.output_blocks = nn.ModuleList(
            [
                nn.ModuleList([ResBlock(128, 64, e), AttentionBlock(64)]),
                nn.ModuleList([ResBlock(96, 64, e), AttentionBlock(64), ResBlock(64, 64, e, 2)]),
                nn.ModuleList([ResBlock(96, 32, e)]),
                nn.ModuleList([ResBlock(64, 32, e)]),
            ]
        )
        self.out = nn.Sequential(nn.GroupNorm(32, 32), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(16) / 16)
        embedding = self.time_embed(torch.cat([angle.cos(), angle.sin()], 1))

        def run(blocks: nn.ModuleList, h: Tensor) -> Tensor:
            for block in blocks:
                h = block(h) if isinstance(block, nn.Conv2d) else block(h, embedding)
            return h

        kept = []
        h = x
        for blocks in self.input_blocks:
            h = run(blocks, h)
            kept.append(h)
        h = run(self.middle_block, h)
        for blocks in self.output_blocks:
            h = run(blocks, torch.cat([h, kept.pop()], 1))
        return self.out(h)
