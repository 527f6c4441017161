"""DiffusersDenoiser.bind: the numbers of a plain call, with everything that does not depend on x computed once."""

from __future__ import annotations

import pytest
import torch
from slipstream.core import Conditioning, DiffusersDenoiser
from slipstream.core.schedules import scaled_linear_alphas_cumprod


def tiny_unet(**more):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
@torch.no_grad()
def test_bound_call_equals_plain_call(kind) -> None:
    table = None if kind == "flow" else scaled_linear_alphas_cumprod()
    model = DiffusersDenoiser(tiny_unet(), table, kind)
    x, cond = torch.randn(3, 4, 8, 6), Conditioning(torch.randn(1, 5, 8))
    sigma = torch.tensor([0.9, 0.4, 0.05])
    bound = model.bind(sigma, cond)
    for scale in (1.0, 2.0):
        torch.testing.assert_close(bound(x * scale), model(x * scale, sigma, cond), rtol=1e-6, atol=1e-6)
    assert (model.calls, model.rows) == (4, 12)


@torch.no_grad()
def test_bound_sdxl_conditioning() -> None:
    unet = tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32
    )
    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    cond = Conditioning(torch.randn(2, 5, 8), torch.randn(2, 8), {"time_ids": torch.full((2, 6), 64.0)})
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 1.0])
    torch.testing.assert_close(model.bind(sigma, cond)(x), model(x, sigma, cond))
