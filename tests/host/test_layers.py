"""Layer masks on the host's own architectures: blocks are found by what they return, left out for real, and put back."""

from __future__ import annotations

from typing import Any

import pytest
from graph import node

U_NET = [
    *(f"down_blocks.{i}.{kind}.0" for i in (0, 1) for kind in ("resnets", "attentions")), "down_blocks.2.resnets.0",
    "mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1", "up_blocks.0.resnets.0", "up_blocks.0.resnets.1",
    *(f"up_blocks.{i}.{kind}.{j}" for i in (1, 2) for j in (0, 1) for kind in ("resnets", "attentions")),
]  # fmt: skip
REFINED = ["context_refiner.0", "noise_refiner.0", "layers.0", "layers.1"]
# Each family's blocks in the order of a call, and those that are followed by a block of the same stream. Chroma also holds a block
# that computes modulation out of a level alone: it is none of them.
FAMILIES = {
    "sd15": (U_NET, ["down_blocks.0.resnets.0", "down_blocks.2.resnets.0", "mid_block.resnets.0", "mid_block.attentions.0"]),
    "flux": (["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"], ["double_blocks.0", "single_blocks.0"]),
    "chroma": (["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"], ["double_blocks.0", "single_blocks.0"]),
    "sd3": (["joint_blocks.0", "joint_blocks.1"], ["joint_blocks.0"]),
    "lumina2": (REFINED, ["layers.0"]),
    "qwen_image": (["transformer_blocks.0", "transformer_blocks.1"], ["transformer_blocks.0"]),
    "omnigen2": (REFINED, ["layers.0"]),
    "cosmos2": (["blocks.0", "blocks.1"], ["blocks.0"]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_is_left_out_alone(host: Any, report: Any, family: str) -> None:
    """Measured in two network calls; then it is not computed, the block after it takes what it took, and all others run."""
    blocks, passed = FAMILIES[family]
    found = report(host.run({"look": node("ProbeLayers", family=family)}))
    assert list(found["costs"]) == blocks
    assert all(0 < cost < 1 for cost in found["costs"].values())
    assert sum(found["costs"].values()) < 1
    assert found["measuring"] in (2, 4)  # positive and negative prompt together, or one after the other
    steps = 2 * found["measuring"] // 2
    assert found["calls"] == {name: [0, steps] for name in blocks}
    assert found["passed"] == passed
    assert found["changed"] == blocks
    assert found["restored"]
