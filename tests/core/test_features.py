"""Decoder features and self-attention of a diffusers UNet in our hands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slipstream.core import Conditioning, DiffusersDenoiser
from slipstream.core.attention import Attend, AttentionBank, AttentionModel, token_grid
from slipstream.core.features import FeatureModel, default_blocks
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from torch import Tensor

SIGMA = torch.tensor([2.0])


@pytest.fixture(scope="module")
def model() -> DiffusersDenoiser:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=["CrossAttnDownBlock2D"] * 3, up_block_types=["CrossAttnUpBlock2D"] * 3,
    )  # fmt: skip
    return DiffusersDenoiser(unet.eval().double(), scaled_linear_alphas_cumprod())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def cond() -> Conditioning:
    return Conditioning(torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2)))


def test_features_are_the_blocks_outputs_and_the_rest_is_not_run(model: Any, x: Tensor, cond: Conditioning) -> None:
    seen: dict[int, Tensor] = {}
    handles = [
        b.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out)) for i, b in enumerate(model.unet.up_blocks)
    ]  # fmt: skip
    with torch.no_grad():
        model(x, SIGMA, cond)
        expected = dict(seen)
        seen.clear()
        found = model.features(x, SIGMA, cond)
    for handle in handles:
        handle.remove()
    assert model.feature_blocks == (0, 1)
    assert [f.shape[-2:] for f in found] == [(4, 6), (8, 12)]
    assert all(torch.equal(f, expected[b]) for f, b in zip(found, model.feature_blocks))
    assert 2 not in seen
    assert isinstance(model, FeatureModel)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_equal_finite_differences(model: Any, x: Tensor, cond: Conditioning, checkpoint: bool) -> None:
    def value(at: Tensor) -> Tensor:
        return sum(f.square().mean() for f in model.features(at, SIGMA.double(), cond, checkpoint=checkpoint))  # type: ignore[return-value]

    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    at = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(at), at)
    with torch.no_grad():
        numeric = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-5)
    assert all(p.requires_grad for p in model.unet.parameters())  # frozen only while the graph is built


def test_a_call_for_features_is_counted(model: Any, x: Tensor, cond: Conditioning) -> None:
    calls, rows = model.calls, model.rows
    with torch.no_grad():
        model.features(x, SIGMA, cond, (0,))
    assert (model.calls - calls, model.rows - rows) == (1, 1)


@pytest.mark.parametrize("blocks", [(), (3,), (-1,)])
def test_unknown_blocks_are_refused(model: Any, x: Tensor, cond: Conditioning, blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="blocks"):
        model.features(x, SIGMA, cond, blocks)


def test_default_blocks() -> None:
    assert default_blocks(4) == (1, 2)
    assert default_blocks(3) == (0, 1)
    with pytest.raises(ValueError, match="at least 3"):
        default_blocks(2)


@torch.no_grad()
def test_recording_changes_nothing_and_replaying_the_own_keys_neither(
    model: Any, x: Tensor, cond: Conditioning
) -> None:
    plain, bank = model(x, SIGMA, cond), AttentionBank()
    with model.self_attention(bank.recorder(0)):
        torch.testing.assert_close(model(x, SIGMA, cond), plain)
    assert len(bank.entries) == 6  # three decoder blocks of two layers

    def replay(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        return attend(q, *bank.get(0, layer, k))

    with model.self_attention(replay):
        torch.testing.assert_close(model(x, SIGMA, cond), plain)
        assert not torch.allclose(model(x + 1, SIGMA, cond), plain)
    assert isinstance(model, AttentionModel)


@torch.no_grad()
def test_keys_appended_twice_change_nothing_and_other_keys_do(model: Any, x: Tensor, cond: Conditioning) -> None:
    def append(scale: float) -> Any:
        return lambda layer, q, k, v, attend: attend(q, torch.cat([k, k], 1), torch.cat([v, scale * v], 1))

    plain = model(x, SIGMA, cond)
    with model.self_attention(append(1.0)):
        torch.testing.assert_close(model(x, SIGMA, cond), plain)
    with model.self_attention(append(3.0)):
        assert not torch.allclose(model(x, SIGMA, cond), plain)


def test_an_error_inside_puts_the_attention_back(model: Any, x: Tensor, cond: Conditioning) -> None:
    before = dict(model.unet.attn_processors)

    def fail(*args: Any) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), model.self_attention(fail):
        model(x, SIGMA, cond)
    assert model.unet.attn_processors == before


def test_a_second_hook_is_refused(model: Any) -> None:
    hook = AttentionBank().recorder(0)
    with model.self_attention(hook), pytest.raises(ValueError, match="one attention hook"):
        with model.self_attention(hook):
            pass


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [(96, (8, 12), (8, 12)), (24, (8, 12), (4, 6)), (20, (7, 9), (4, 5)), (6, (7, 9), (2, 3))],
)
def test_token_grids_halve_upwards(tokens: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert token_grid(tokens, *size) == grid


def test_a_layer_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens"):
        token_grid(25, 8, 12)
