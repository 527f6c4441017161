"""One thread's features, attention hooks, layer skips and gradients, and everybody else on the same network."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from slipstream.core import Conditioning, DiffusersDenoiser, graphs
from slipstream.core.attention import Attend
from slipstream.core.identity import identify
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.core.taps import routed
from torch import Tensor, nn

SIGMA = torch.tensor([2.0])
SKIPPED = ["mid_block.attentions.0", "up_blocks.1.resnets.0"]


def make_unet() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=8,
            attention_head_dim=2, down_block_types=["CrossAttnDownBlock2D"] * 3, up_block_types=["CrossAttnUpBlock2D"] * 3,
        ).eval()  # fmt: skip


def make_model(unet: Any) -> DiffusersDenoiser:
    return DiffusersDenoiser(unet, scaled_linear_alphas_cumprod())


@pytest.fixture
def model() -> DiffusersDenoiser:
    return make_model(make_unet())


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cond() -> Conditioning:
    return Conditioning(torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2)))


def louder(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    return attend(q, k, 3 * v)


def gradient(model: Any, x: Tensor, cond: Conditioning, checkpoint: bool) -> Tensor:
    with torch.enable_grad():
        at = x.clone().requires_grad_(True)
        value = sum(f.square().mean() for f in model.features(at, SIGMA, cond, checkpoint=checkpoint))
        return torch.autograd.grad(value, at)[0]


def within(context: Any, model: Any, x: Tensor, cond: Conditioning) -> Tensor:
    with context:
        return model(x, SIGMA, cond)


ABILITIES: dict[str, Callable[[Any, Tensor, Conditioning], Tensor]] = {
    "features": lambda m, x, c: m.features(x, SIGMA, c)[0],
    "gradient": lambda m, x, c: gradient(m, x, c, False),
    "checkpoint": lambda m, x, c: gradient(m, x, c, True),
    "attention": lambda m, x, c: within(m.self_attention(louder), m, x, c),
    "skipping": lambda m, x, c: within(m.skipping(SKIPPED), m, x, c),
    "measuring": lambda m, x, c: torch.tensor([layer.cost for layer in m.layers(x, SIGMA, c)]),
}


@pytest.mark.parametrize("ability", ABILITIES)
@torch.no_grad()
def test_another_thread_on_the_same_network_gets_the_plain_result(
    model: Any, x: Tensor, cond: Conditioning, ability: str
) -> None:
    other, use = make_model(model.unet), ABILITIES[ability]
    expected, plain = use(model, x, cond), other(x, SIGMA, cond)
    found: list[Tensor] = []
    errors: list[BaseException] = []
    used = threading.Event()

    @torch.no_grad()
    def plain_calls() -> None:
        try:
            used.wait(10)
            for _ in range(16):
                found.append(other(x, SIGMA, cond))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=plain_calls)
    thread.start()
    results = []
    while thread.is_alive() or len(results) < 2:
        results.append(use(model, x, cond))
        used.set()
    thread.join()
    assert not errors
    assert [torch.equal(f, plain) for f in found] == [True] * 16
    assert all(torch.equal(r, expected) for r in results)
    assert other.calls == 17


@pytest.mark.parametrize("ability", ["attention", "skipping"])
@torch.no_grad()
def test_a_call_in_the_middle_of_a_tapped_one(model: Any, x: Tensor, cond: Conditioning, ability: str) -> None:
    """The other thread calls while this one is inside the network, and begins while the taps are already there."""
    plain, inside = model(x, SIGMA, cond), []

    def call_elsewhere(*_: Any) -> None:
        with torch.no_grad():
            thread = threading.Thread(target=lambda: inside.append(torch.no_grad()(model)(x, SIGMA, cond)))
            thread.start()
            thread.join()

    expected = ABILITIES[ability](model, x, cond)
    handle = model.unet.up_blocks[0].register_forward_pre_hook(
        lambda *args: call_elsewhere() if threading.current_thread() is threading.main_thread() else None
    )
    assert torch.equal(ABILITIES[ability](model, x, cond), expected)
    handle.remove()
    assert torch.equal(inside[0], plain)
    assert not torch.equal(expected, plain)


def test_weights_are_constant_for_this_thread_only(model: Any, x: Tensor, cond: Conditioning) -> None:
    """Another thread may train while this one takes gradients of features, from which no weight gets a gradient."""
    parameters = list(model.unet.parameters())
    assert all(p.requires_grad for p in parameters)
    trained: list[Tensor] = []

    def train(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        thread = threading.Thread(
            target=lambda: trained.extend(torch.autograd.grad(make_model(model.unet)(x, SIGMA, cond).sum(), parameters))
        )
        thread.start()
        thread.join()

    expected = torch.autograd.grad(model(x, SIGMA, cond).sum(), parameters)
    handle = model.unet.mid_block.register_forward_pre_hook(train)
    at = x.clone().requires_grad_(True)
    value = model.features(at, SIGMA, cond)[0].sum()
    handle.remove()
    assert len(trained) == len(parameters)
    assert all(torch.equal(a, b) for a, b in zip(trained, expected))
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(value, parameters[0])


@contextmanager
def counted_saves(kept: list[int]) -> Iterator[None]:
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield
    kept.append(sum(sizes.values()))


@pytest.mark.parametrize("trainable", [False, True])
def test_what_a_gradient_keeps(model: Any, x: Tensor, cond: Conditioning, trainable: bool) -> None:
    """Trainable weights cost nothing; checkpointing keeps the inputs of blocks."""
    model.unet.requires_grad_(trainable)
    kept: list[int] = []
    for checkpoint in (False, True):
        with counted_saves(kept):
            model.features(x.clone().requires_grad_(True), SIGMA, cond, checkpoint=checkpoint)
    model.unet.requires_grad_(False)
    with counted_saves(kept):
        model.features(x.clone().requires_grad_(True), SIGMA, cond)
    assert kept[0] == kept[2]
    assert kept[1] < 0.2 * kept[0]


@pytest.mark.parametrize("context", ["skipping", "attention"])
def test_the_backward_pass_of_checkpointed_blocks_sees_what_the_forward_pass_saw(
    model: Any, x: Tensor, cond: Conditioning, context: str
) -> None:
    found = []
    for checkpoint in (False, True):
        at = x.clone().requires_grad_(True)
        with model.skipping(SKIPPED) if context == "skipping" else model.self_attention(louder):
            value = model.features(at, SIGMA, cond, checkpoint=checkpoint)[1].sum()
        # Outside the context, with another one in its place, and in another thread: as autograd's of a GPU.
        with model.skipping(["down_blocks.0.resnets.0"]):
            thread = threading.Thread(target=lambda at=at, value=value: found.extend(torch.autograd.grad(value, at)))
            thread.start()
            thread.join()
    torch.testing.assert_close(found[0], found[1])
    plain = x.clone().requires_grad_(True)
    (plain_gradient,) = torch.autograd.grad(model.features(plain, SIGMA, cond)[1].sum(), plain)
    assert not torch.allclose(found[0], plain_gradient)


@torch.no_grad()
def test_requests_of_one_thread_add_up(model: Any, x: Tensor, cond: Conditioning) -> None:
    with model.skipping(SKIPPED):
        both = model(x, SIGMA, cond)
    with model.skipping(SKIPPED[:1]), model.skipping(SKIPPED[1:]):
        assert torch.equal(model(x, SIGMA, cond), both)
        with model.self_attention(louder):
            heard = model(x, SIGMA, cond)
            features = model.features(x, SIGMA, cond)
        assert torch.equal(model(x, SIGMA, cond), both)
    assert not torch.equal(heard, both)
    with model.self_attention(louder), model.skipping(SKIPPED):
        assert torch.equal(model(x, SIGMA, cond), heard)
        assert all(torch.equal(a, b) for a, b in zip(model.features(x, SIGMA, cond), features))


@torch.no_grad()
def test_features_inside_features(model: Any, x: Tensor, cond: Conditioning) -> None:
    """The inner call is cut off where it wants to be, the outer one where that wants to be."""
    expected, inner = model.features(x, SIGMA, cond, (2,)), []
    first = model.features(x, SIGMA, cond, (0,))

    def again(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        if not inner:
            inner.append(None)
            inner[0] = model.features(x, SIGMA, cond, (0,))[0]
        return attend(q, k, v)

    with model.self_attention(again):
        found = model.features(x, SIGMA, cond, (2,))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(inner, first)


@torch.no_grad()
def test_contexts_that_end_in_another_order(model: Any, x: Tensor, cond: Conditioning) -> None:
    plain = model(x, SIGMA, cond)
    first, second = model.skipping(SKIPPED[:1]), model.skipping(SKIPPED[1:])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    left = model(x, SIGMA, cond)
    second.__exit__(None, None, None)
    assert torch.equal(model(x, SIGMA, cond), plain)
    with model.skipping(SKIPPED[1:]):
        assert torch.equal(left, model(x, SIGMA, cond))


def classes(unet: nn.Module) -> list[type]:
    return [type(m) for m in unet.modules()]


@pytest.mark.parametrize("ability", ABILITIES)
def test_an_error_inside_leaves_nothing_behind(model: Any, x: Tensor, cond: Conditioning, ability: str) -> None:
    before = classes(model.unet), [set(vars(m)) for m in model.unet.modules()]
    with torch.no_grad():
        plain = model(x, SIGMA, cond)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = model.unet.up_blocks[0].attentions[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        ABILITIES[ability](model, x, cond)
    handle.remove()
    assert (classes(model.unet), [set(vars(m)) for m in model.unet.modules()]) == before
    with torch.no_grad():
        assert torch.equal(model(x, SIGMA, cond), plain)


@torch.no_grad()
def test_copies_and_files_made_meanwhile_are_plain(model: Any, x: Tensor, cond: Conditioning) -> None:
    plain, names, kinds = model(x, SIGMA, cond), list(model.unet.state_dict()), classes(model.unet)
    with model.skipping(SKIPPED), model.self_attention(louder):
        copied = copy.deepcopy(model.unet)
        written = pickle.dumps(model.unet)
        assert list(model.unet.state_dict()) == names
        assert [type(m).__name__ for m in model.unet.modules()] == [kind.__name__ for kind in kinds]
        assert torch.equal(make_model(copied)(x, SIGMA, cond), plain)
        assert not torch.equal(model(x, SIGMA, cond), plain)
    assert classes(copied) == kinds
    read = pickle.load(io.BytesIO(written))
    assert classes(read) == kinds
    assert torch.equal(make_model(read)(x, SIGMA, cond), plain)


def test_a_compiled_network_stays_whole_and_is_not_compiled_again_and_again() -> None:
    from torch._dynamo.testing import CompileCounter

    net, x, counter = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.ones(2, 3), CompileCounter()
    plain, compiled = net(x), torch.compile(net, backend=counter)
    for _ in range(5):
        assert torch.equal(compiled(x), plain)
        with routed({net[0]: lambda call, x: x, net[2]: lambda call, x: 2 * call(x)}):
            assert torch.equal(compiled(x), plain)
            assert not torch.equal(net(x), plain)
    assert counter.frame_count <= 2  # with taps and without


@torch.no_grad()
def test_a_denoiser_of_a_compiled_network_runs_its_taps_eagerly(model: Any, x: Tensor, cond: Conditioning) -> None:
    compiled = make_model(torch.compile(model.unet, backend="eager"))
    for name, use in ABILITIES.items():
        assert torch.equal(use(compiled, x, cond), use(model, x, cond)), name


@torch.no_grad()
def test_a_recording_made_meanwhile_by_another_thread_is_plain(model: Any, x: Tensor, cond: Conditioning) -> None:
    plain = model(x, SIGMA, cond)

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        output = run()
        return lambda: output.copy_(run()), output

    recorded: list[DiffusersDenoiser] = []
    with model.skipping(SKIPPED):
        thread = threading.Thread(
            target=lambda: recorded.append(graphs.replayed(model, 1, 8, 12, cond, record=record))  # type: ignore[arg-type]
        )
        thread.start()
        thread.join()
        skipped = model(x, SIGMA, cond)
    torch.testing.assert_close(recorded[0](x, SIGMA, cond), plain)
    assert (skipped - plain).abs().max() > 0.01


@pytest.mark.parametrize("ability", ABILITIES)
def test_networks_and_activations_are_freed_at_once(x: Tensor, cond: Conditioning, ability: str) -> None:
    model = make_model(make_unet())
    with torch.no_grad():
        ABILITIES[ability](model, x, cond)  # what is cached for good, is now
    gc.collect()
    gc.disable()
    try:
        seen: list[Any] = []
        handle = model.unet.down_blocks[1].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out[0])))
        with torch.no_grad():
            ABILITIES[ability](model, x, cond)
        handle.remove()
        assert seen
        assert all(ref() is None for ref in seen)
        network = weakref.ref(model.unet)
        del model, handle
        gc.enable()
        gc.collect()
        assert network() is None
    finally:
        gc.enable()


def test_a_module_that_another_tool_has_changed_meanwhile_keeps_the_change() -> None:
    layer = nn.Linear(2, 2)
    with routed({layer: lambda call, x: 2 * call(x)}):
        torch.nn.utils.parametrizations.orthogonal(layer)
    assert torch.nn.utils.parametrize.is_parametrized(layer)
    assert layer(torch.ones(1, 2)).shape == (1, 2)


def test_what_is_skipped_or_hooked_is_part_of_the_identity(model: Any) -> None:
    """An inversion made inside a context is not reused outside it."""
    plain = identify(model.identity).digest
    found = []
    for context in (model.skipping(SKIPPED[:1]), model.skipping(SKIPPED[1:]), model.self_attention(louder)):
        with context:
            found.append(identify(model.identity).digest)
    with model.skipping(SKIPPED[:1]):
        assert identify(model.identity).digest == found[0]
    assert len({plain, *found}) == 4
    assert identify(model.identity).digest == plain
