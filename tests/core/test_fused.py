"""Fused networks: the numbers of the network itself, fewer operators, and never a weight, adapter or hook missed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from slipstream.core import Conditioning, DiffusersDenoiser
from slipstream.core.fused import FusedUnet, Prepared, Resample, fused_unet, read_diffusers, unknown_part
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.stream import StreamBatch, StreamConfig
from slipstream_tests.core.checkpoints import UNETS, make_unet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def network(kind: str = "sd15") -> Any:
    torch.manual_seed(0)
    return make_unet(kind).eval().requires_grad_(False)


def arguments(unet: Any, rows: int = 3, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    found: dict[str, Any] = {"encoder_hidden_states": torch.randn(rows, 7, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type:
        found["added_cond_kwargs"] = {"text_embeds": torch.randn(rows, 128), "time_ids": 64 * torch.rand(rows, 6)}
    return found


TIME = torch.tensor([900.0, 500.0, 10.0])


@pytest.mark.parametrize("side", [(8, 8), (7, 12)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", list(UNETS))
@torch.no_grad()
def test_it_gives_what_the_network_gives(kind: str, masked: bool, side: tuple[int, int]) -> None:
    unet = network(kind)
    x, given = torch.randn(3, 4, *side), arguments(unet)
    if masked:
        given["encoder_attention_mask"] = torch.arange(7) < torch.tensor([[7], [4], [1]])
    for layout in (torch.contiguous_format, torch.channels_last):
        unet, x = unet.to(memory_format=layout), x.contiguous(memory_format=layout)
        plain = unet(x, TIME, **given, return_dict=False)[0]
        fused = FusedUnet(read_diffusers(unet))
        found = fused(x, *Prepared(fused, TIME, **given).tensors())
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert fused.extra_bytes == sum(3 * a.owner.to_q.weight.nbytes for a in fused.selves)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_pass_of_a_stream_has_a_third_fewer_operators_and_computes_no_text_or_time() -> None:
    unet = network("sd2").to(memory_format=torch.channels_last)
    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    sigma, cond = torch.tensor([5.0, 1.0]), Conditioning(arguments(unet, 2)["encoder_hidden_states"])
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    bound = model.bind(sigma, cond)
    bound(x)
    with Count() as steady:
        bound(x)
    with Count() as plain:
        unet(x, TIME[:2], cond.context, return_dict=False)
    layers = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    blocks = [m for m in unet.modules() if type(m).__name__ == "Transformer2DModel"]
    assert len(steady.names) <= 0.65 * len(plain.names) + 6  # six are of the denoiser, around the network
    # qkv, its output, q, its output, two of the feed-forward; in and out of each block: nothing of time and text is left.
    assert steady.names.count("linear") == 6 * len(layers) + 2 * len(blocks)
    assert not {"contiguous", "div", "dropout", "sin"} & set(steady.names)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: layer.weight.mul_(-1.5),
    "copied in": lambda layer: layer.load_state_dict({n: -2 * t for n, t in layer.state_dict().items()}),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(-layer.weight.clone(), requires_grad=False)),
    "new memory": lambda layer: setattr(layer.weight, "data", -layer.weight.data),
}
PLACES = {
    "text": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "value": "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "self": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "time": "time_embedding.linear_2",
    "projection": "up_blocks.0.resnets.0.time_emb_proj",
    "convolution": "mid_block.resnets.0.conv1",
    "elsewhere": "conv_out",
}


def denoiser_of(unet: Any) -> tuple[DiffusersDenoiser, Conditioning, torch.Tensor, torch.Tensor]:
    """Return a denoiser of the network with a prompt, latents of one row and their level."""
    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    cond = Conditioning(arguments(unet, 1)["encoder_hidden_states"])
    return model, cond, torch.randn(1, 4, 8, 8), torch.tensor([2.0])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@torch.no_grad()
def test_weights_that_change_count_from_the_next_pass_on(place: str, change: Callable[[Any], Any]) -> None:
    unet = network()
    model, cond, x, sigma = denoiser_of(unet)
    bound = model.bind(sigma, cond)
    before = bound(x)
    change(unet.get_submodule(place))
    after = model(x, sigma, cond)
    torch.testing.assert_close(bound(x), after, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
def test_an_edit_through_data_is_seen_by_the_next_stream_and_after_refresh() -> None:
    """torch cannot tell: `.data` has the same memory and a count of changes of its own."""
    unet = network()
    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    cond, x = Conditioning(arguments(unet, 1)["encoder_hidden_states"]), torch.randn(1, 4, 8, 8)
    config, sigma = StreamConfig(sigmas=[2.0], guidance="none"), torch.tensor([2.0])
    running = StreamBatch(model, cond, config=config)
    running.push(x)
    for name in ("self", "text"):
        unet.get_submodule(PLACES[name]).weight.data *= -1.5
    new = StreamBatch(model, cond, config=config)
    noisy = running.push(x)[0].latents
    torch.testing.assert_close(new.push(x)[0].latents, noisy)
    torch.testing.assert_close(model.bind(sigma, cond)(x), model(x, sigma, cond), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_new_prompt_has_its_own_keys_and_values() -> None:
    unet = network()
    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    first, second = (Conditioning(arguments(unet, 1, seed)["encoder_hidden_states"]) for seed in (1, 2))
    frame, config = torch.randn(1, 4, 8, 8), StreamConfig(sigmas=[2.0], guidance="none")
    stream = StreamBatch(model, first, config=config)
    before = stream.push(frame)[0].latents
    stream.update(cond=second)
    after = stream.push(frame)[0].latents
    alone = StreamBatch(model, second, config=config).push(frame)[0].latents
    assert torch.equal(after, alone)
    assert (after - before).abs().max() > 1e-3


class Adapter(nn.Module):
    """A layer with a low-rank addition, as adapters (PEFT) put in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, torch.randn(4, base.in_features), torch.randn(base.out_features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("place", ["text", "self", "projection"])
@torch.no_grad()
def test_an_adapter_in_the_place_of_a_layer_acts_at_once_and_its_removal_too(place: str) -> None:
    unet = network()
    model, cond, x, sigma = denoiser_of(unet)
    bound, before = model.bind(sigma, cond), model(x, sigma, cond)
    owner, _, name = PLACES[place].rpartition(".")
    layer = unet.get_submodule(PLACES[place])
    unet.get_submodule(owner)._modules[name] = Adapter(layer)
    adapted = model(x, sigma, cond)
    assert (adapted - before).abs().max() > 1e-3
    for run in (bound, model.bind(sigma, cond)):
        torch.testing.assert_close(run(x), adapted, rtol=1e-5, atol=1e-5)
    assert unknown_part(unet)
    unet.get_submodule(owner)._modules[name] = layer
    for run in (bound, model.bind(sigma, cond)):
        torch.testing.assert_close(run(x), before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hooks_freeu_and_processors_of_the_user_act() -> None:
    unet = network()
    model, cond, x, sigma = denoiser_of(unet)
    bound = model.bind(sigma, cond)
    bound(x)
    seen: list[Any] = []
    handle = unet.mid_block.attentions[0].register_forward_hook(lambda *call: seen.append(call))
    torch.testing.assert_close(bound(x), model(x, sigma, cond))
    assert len(seen) == 2
    handle.remove()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    torch.testing.assert_close(bound(x), model(x, sigma, cond))
    unet.disable_freeu()
    unet.fuse_qkv_projections()
    torch.testing.assert_close(bound(x), model(x, sigma, cond))


def test_gradients_go_through_the_network_itself() -> None:
    unet = network()
    model = DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())
    cond, x = Conditioning(arguments(unet, 1)["encoder_hidden_states"]), torch.randn(1, 4, 8, 8, requires_grad=True)
    sigma = torch.tensor([2.0])
    found = torch.autograd.grad(model.bind(sigma, cond)(x).sum(), x)[0]
    assert torch.equal(found, torch.autograd.grad(model(x, sigma, cond).sum(), x)[0])


def test_nothing_is_left_on_the_network_and_one_form_is_shared() -> None:
    unet = network()
    before = copy.deepcopy({name: dict(vars(module)) for name, module in unet.named_modules()})
    models = [DiffusersDenoiser(unet, scaled_linear_alphas_cumprod()) for _ in range(2)]
    cond = Conditioning(arguments(unet, 1)["encoder_hidden_states"])
    with torch.no_grad():
        for model in models:
            model.bind(torch.tensor([2.0]), cond)(torch.randn(1, 4, 8, 8))
    assert models[0]._kept is models[1]._kept is fused_unet(unet)
    assert {name: vars(module).keys() for name, module in unet.named_modules()} == {
        n: v.keys() for n, v in before.items()
    }
    del models, model
    gc.collect()
    assert id(unet) not in __import__("slipstream.core.fused", fromlist=["_shared"])._shared


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("resnet_time_scale_shift", "scale_shift"), ("class_embed_type", "timestep"), ("cross_attention_norm", "layer_norm"),
        ("mid_block_scale_factor", 2.0), ("only_cross_attention", True), ("act_fn", "gelu"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_what_no_rule_knows_runs_as_it_is(setting: str, value: Any) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **{setting: value},
    ).eval()  # fmt: skip
    assert unknown_part(unet)
    assert fused_unet(unet) is None
    with pytest.raises(ValueError, match="Expected a UNet of the usual blocks, but got"):
        FusedUnet(read_diffusers(unet))


def test_it_compiles_as_one_graph() -> None:
    unet = network("sdxl")
    fused = FusedUnet(read_diffusers(unet))
    with torch.no_grad():
        tensors, x = Prepared(fused, TIME, **arguments(unet)).tensors(), torch.randn(3, 4, 8, 8)
        compiled = torch.compile(fused, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x, *tensors), fused(x, *tensors))


def test_no_layer_is_reached_through_a_default_of_a_function() -> None:
    """Else the weight's place in a kept graph names a default, which torch 2.11 cannot read again: every start compiles again."""
    steps = [step for step in read_diffusers(make_unet("sd15")).steps() if isinstance(step, Resample)]
    assert steps
    assert not any(getattr(step.call, "__defaults__", None) for step in steps)
