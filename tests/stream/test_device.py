"""On a GPU a stream neither waits nor grows: shown on a machine without one, by tensors that refuse what would make it wait."""

from __future__ import annotations

import functools
import itertools
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from slipstream.core import Conditioning, DiffusersDenoiser, Pipeline
from slipstream.core.graphs import ReplayedVae, replayed_pipeline
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.core.transfer import Arrival, to_device
from slipstream.nodes.host.vae import FrameVae, has_room, tiny_copy, vae_lanes
from slipstream.stream import StreamBatch, StreamConfig, queues
from slipstream.stream.prompts import BlendedStream, PromptBlend
from slipstream.stream.queues import Lane, StreamThreads
from slipstream.stream.stability import Motion
from slipstream_tests.fake_cuda import DEVICE, DeviceTensor, HostWaitError, RaceError, fake_cuda

STEPS = {1: [35], 2: [35, 45], 4: [5, 20, 30, 44]}
FRAMES = 9


class Small(torch.nn.Module):
    """Stands in for a UNet: every input counts, every row for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4, addition_embed_type=None)
        self.conv, self.text = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Linear(8, 4)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True) -> tuple[torch.Tensor]:
        text = self.text(encoder_hidden_states).mean(1)[..., None, None]
        return ((self.conv(sample) * torch.cos(timestep / 300)[:, None, None, None] + text).tanh(),)


def tiny_unet(**more: Any) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more,
    )  # fmt: skip


SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}


def network(kind: str = "small", prediction: str = "epsilon") -> DiffusersDenoiser:
    torch.manual_seed(0)
    unet = Small() if kind == "small" else tiny_unet(**(SDXL if kind == "sdxl" else {}))
    table = None if prediction == "flow" else scaled_linear_alphas_cumprod()
    return DiffusersDenoiser(unet.eval().requires_grad_(False), table, prediction)


def prompts(kind: str = "small") -> list[Conditioning]:
    torch.manual_seed(1)
    extra = {"pooled": torch.randn(1, 8), "extra": {"time_ids": torch.full((1, 6), 64.0)}} if kind == "sdxl" else {}
    return [Conditioning(torch.randn(1, 3, 8), **extra) for _ in range(4)]


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def run(model, cond, uncond, frames, settings, own=()) -> list[torch.Tensor]:
    """Fill, drain and fill again, with a skipped frame and a changed setting on the way."""
    stream = StreamBatch(model, cond, uncond, StreamConfig(**settings))
    out = []
    for half in (frames[:5], frames[5:]):
        for i, frame in enumerate(half):
            out += stream.push(frame, None, own[i % len(own)] if own else None)
        out += stream.skip()
        stream.update(cfg_scale=1.5)
        out += stream.drain()
    return [frame.latents for frame in out]


def check(pictures, settings, model, conds, own: bool = False, waits: int = 0) -> None:
    """Compare a run on the fake device, where waiting raises, with the same run on the CPU."""
    expected = run(model, *conds[:2], list(pictures.split(1)), settings, conds[2:] if own else ())
    with fake_cuda() as machine:
        machine.put_module(model.unet)
        there = [c.map(machine.put) for c in conds]
        frames = [machine.put(frame) for frame in pictures.split(1)]
        got = run(model, *there[:2], frames, settings, there[2:] if own else ())
        assert machine.waits == waits
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.inner, b, rtol=1e-5, atol=1e-5)


CASES: dict[str, dict[str, Any]] = {
    **{
        f"{guidance}-{n}": {"guidance": guidance, "t_index_list": indices}
        for guidance in ("none", "self", "onetime", "full")
        for n, indices in STEPS.items()
    },
    **{f"renoise-{kind}": {"renoise": kind, "t_index_list": STEPS[4]} for kind in ("fresh", "none", "ddim")},
    **{
        f"static-{guidance}": {"guidance": guidance, "static_rows": True, "t_index_list": STEPS[4]}
        for guidance in ("none", "onetime", "full")
    },
    "delta": {"delta": 0.6, "guidance": "onetime"},
    "groups": {"frame_group": 2, "t_index_list": STEPS[4]},
    "consistency": {"consistency": True},
    "feedback": {"feedback": 0.4},
    "from-noise": {"from_noise": True, "guidance": "onetime"},
}


@pytest.mark.parametrize("own", [False, True], ids=["one-prompt", "own-prompts"])
@pytest.mark.parametrize("case", CASES)
def test_no_pass_waits_and_the_numbers_are_those_of_the_cpu(pictures, case, own) -> None:
    check(pictures, CASES[case], network(), prompts(), own)


@pytest.mark.parametrize(
    ("kind", "prediction", "settings"),
    [
        ("sd", "epsilon", {"guidance": "onetime", "cross_frame": True}),
        ("sdxl", "v_prediction", {"guidance": "full", "static_rows": True}),
        ("sd", "flow", {"delta": 0.5}),
    ],
)
def test_diffusers_networks(pictures, kind, prediction, settings) -> None:
    check(pictures[:6], settings, network(kind, prediction), prompts(kind), own=True)


def test_motion_waits_for_a_value_of_the_frame_before_only(pictures) -> None:
    """At rest the levels are those of the CPU; a change counts one frame later."""
    still = pictures[:1].expand(FRAMES, -1, -1, -1)
    check(still, {"motion": 1.0}, network(), prompts(), waits=FRAMES - 2)


def test_on_the_device_a_change_counts_one_frame_later(pictures) -> None:
    frames = [pictures[i : i + 1] * (1 + i % 3) for i in range(FRAMES)]
    motion = Motion()
    expected = [motion.factor(frame, 0.7) for frame in frames]
    with fake_cuda() as machine:
        motion = Motion()
        got = [motion.factor(machine.put(frame), 0.7) for frame in frames]
    assert got == [1.0, *expected[:-1]]
    assert len(set(expected)) > 2


@pytest.mark.parametrize("mode", ["linear", "slerp"])
def test_prompts_that_move(pictures, mode) -> None:
    def run_blend(put) -> list[torch.Tensor]:
        conds = [c.map(put) for c in prompts()]
        stream = BlendedStream(model, conds[:2], PromptBlend([1, 0], [0, 1], mode), FRAMES)
        out = [f for i in range(FRAMES) for f in stream.push(put(pictures[i : i + 1]))]
        stream.update(cond=conds[2])
        return [f.latents for f in out + stream.push(put(pictures[:1])) + stream.drain()]

    model = network()
    expected = run_blend(lambda t: t)
    with fake_cuda() as machine:
        machine.put_module(model.unet)
        got = run_blend(machine.put)
        assert machine.waits == 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.inner, b, rtol=1e-5, atol=1e-5)


# -- memory


def footprints(model, pictures, settings, own: bool = False) -> list[tuple[int, int, int, int]]:
    """Return, for each push, new device blocks and bytes, new pinned blocks, and the device bytes that are held after it."""
    seen = []
    with fake_cuda() as machine:
        machine.put_module(model.unet)
        cond, uncond, *others = (c.map(machine.put) for c in prompts())
        stream = StreamBatch(model, cond, uncond, StreamConfig(**settings))
        frames = machine.put(pictures[:1].expand(settings.get("frame_group", 1), -1, -1, -1).clone())
        for i in range(12):
            before = machine.blocks, machine.bytes, len(machine.pinned)
            stream.push(frames, None, others[i % 2] if own else None)
            after = machine.blocks, machine.bytes, len(machine.pinned)
            seen.append((*(b - a for a, b in zip(before, after)), machine.live_bytes()))
    return seen


@pytest.mark.parametrize("own", [False, True], ids=["one-prompt", "own-prompts"])
@pytest.mark.parametrize("case", CASES)
def test_a_steady_pass_takes_the_same_memory_every_time(pictures, case, own) -> None:
    """What a pass takes it gives back: torch's allocator serves all of it from what it has, and asks the device for none."""
    seen = footprints(network(), pictures, CASES[case], own)
    assert len(set(seen[7:])) == 1, seen
    # Pinned memory is taken for fresh noise only.
    assert seen[-1][2] == (CASES[case].get("renoise") == "fresh")


# -- threads, each with its own CUDA stream


def pipeline() -> Pipeline:
    from diffusers import AutoencoderTiny

    torch.manual_seed(2)
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    return Pipeline(network(), [], vae.eval().requires_grad_(False), torch.device("cpu"), torch.float32)


def clip(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8, generator=generator) for _ in range(count)]


def stages(threads: StreamThreads) -> None:
    """Run the threads' parts one after the other in this thread; the order of the CUDA streams is what it is with threads."""
    for lane in threads._lanes.values():
        lane.start()
    for thread in threads._threads:
        threads._run(*thread._args)  # type: ignore[attr-defined]
    if threads.error is not None:
        raise threads.error


def stream_clip(pipe, conds, images, device, sink, dtype=torch.uint8, lanes=None, **settings) -> StreamThreads:
    batch = StreamBatch(pipe.model, *conds[:2], StreamConfig(**settings))
    decode = functools.partial(pipe.decode_async, dtype=dtype)
    source = [(image, i) for i, image in enumerate(images)]
    more = {"live": False, "queue": 100, "device": device, "lanes": lanes}
    return StreamThreads(source, pipe.encode_image, batch, decode, sink, **more)


def recording(run):
    """Stands in for a CUDA graph."""
    output = run()
    return lambda: output.copy_(run()), output


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "settings", [{"guidance": "onetime"}, {"renoise": "fresh", "static_rows": True}, {"feedback": 0.5}]
)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "recorded"])
def test_the_lanes_of_a_stream_are_in_order_and_wait_for_pictures_only(dtype, settings, graph) -> None:
    pipe, conds, images = pipeline(), prompts(), clip()
    expected: list[torch.Tensor] = []
    stages(stream_clip(pipe, conds, images, None, lambda image, *_: expected.append(image), dtype, **settings))
    got: list[torch.Tensor] = []
    with fake_cuda() as machine:
        machine.put_module(pipe.vae)
        machine.put_module(pipe.model.unet)
        conds = [Conditioning(to_device(c.context, DEVICE)) for c in conds]  # on the stream of the caller
        if graph:
            pipe = replayed_pipeline(pipe, StreamConfig(**settings).rows, 16, 24, conds[0], record=recording)
            assert isinstance(pipe.vae, ReplayedVae)
        threads = stream_clip(pipe, conds, images, DEVICE, lambda image, *_: got.append(image), dtype, **settings)
        stages(threads)
        # One look back per image that was begun, two waits for the one that has come (for the lane, and for the copy).
        assert machine.waits == 2 * len(images) + len(images) - 1
    assert len(got) == len(expected) == len(images)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1)


def test_the_vae_may_share_a_lane_beside_the_network_on_the_callers_stream() -> None:
    """As in the host, whose prompts and weights are on the stream of the caller."""
    pipe, conds, images = pipeline(), prompts(), clip()
    expected: list[torch.Tensor] = []
    stages(stream_clip(pipe, conds, images, None, lambda image, *_: expected.append(image), guidance="onetime"))
    got: list[torch.Tensor] = []
    with fake_cuda() as machine:
        machine.put_module(pipe.vae)
        machine.put_module(pipe.model.unet)
        conds = [c.map(machine.put) for c in conds]
        host = SimpleNamespace(vae=SimpleNamespace(first_stage_model=pipe.vae), network=None)
        lanes = vae_lanes(host, host_denoiser(pipe.model.unet, DEVICE))
        assert lanes["encode"] is lanes["decode"]
        assert lanes["denoise"].stream is torch.cuda.current_stream()
        threads = stream_clip(
            pipe, conds, images, None, lambda image, *_: got.append(image), lanes=lanes, guidance="onetime"
        )
        stages(threads)
    assert len(got) == len(images)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-5, atol=1)


def host_denoiser(network: torch.nn.Module, device: torch.device) -> SimpleNamespace:
    resident = all(weight.device == device for weight in network.parameters())
    return SimpleNamespace(device=device, resident=resident, model=SimpleNamespace(diffusion_model=network))


def test_the_vae_has_no_lane_of_its_own_where_weights_travel_or_nothing_is_cuda() -> None:
    vae = SimpleNamespace(vae=SimpleNamespace(first_stage_model=torch.nn.Linear(1, 1)), network=None)
    assert vae_lanes(vae, host_denoiser(torch.nn.Linear(1, 1), torch.device("cpu"))) == {}
    with fake_cuda() as machine:
        network = torch.nn.Linear(1, 1)
        machine.put_module(network)
        assert vae_lanes(vae, host_denoiser(network, DEVICE)) == {}  # the host keeps the VAE in host memory
        vae.network = network  # of which the stream has a copy
        assert vae_lanes(vae, host_denoiser(network, DEVICE)).keys() == {"encode", "denoise", "decode"}


class TAESD(torch.nn.Module):
    """Stands in for the host's tiny VAE: every pixel of a cell counts."""

    def __init__(self, latent_channels: int = 4) -> None:
        super().__init__()
        self.taesd_encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8))
        self.taesd_decoder = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 3, 8, 8))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.taesd_encoder(x)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.taesd_decoder(x)


class VAE:
    """The host's calls, as far as they count here: on the CPU before and after the network."""

    vae_dtype, downscale_ratio, latent_channels, output_channels = torch.float32, 8, 4, 3

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.first_stage_model = TAESD().eval().requires_grad_(False)
        self.calls = 0

    def process_input(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2.0 - 1.0

    def process_output(self, images: torch.Tensor) -> torch.Tensor:
        return images.add_(1.0).div_(2.0).clamp_(0.0, 1.0)  # in place, as newer hosts do

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.first_stage_model.encode(self.process_input(images.movedim(-1, 1)))

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.process_output(self.first_stage_model.decode(samples)).movedim(1, -1)


VAE.__module__ = "comfy.sd"


def images_of(got: torch.Tensor | Arrival) -> torch.Tensor:
    return got.get() if isinstance(got, Arrival) else got


@torch.no_grad()
def both_ways(vae: FrameVae, images: torch.Tensor) -> list[torch.Tensor]:
    samples = vae.encode(images)
    return [samples.inner if isinstance(samples, DeviceTensor) else samples, images_of(vae.decode(samples))]


def on_device(machine: Any, host: VAE) -> FrameVae:
    """Return the VAE of a stream on the fake device, where a module is not moved by `to`."""
    vae = FrameVae(host, torch.device("cpu"))
    vae.network, vae.device = tiny_copy(host, torch.device("cpu")), DEVICE
    if vae.network is not None:
        machine.put_module(vae.network)
    return vae


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "recorded"])
def test_a_tiny_vae_of_the_host_never_waits_and_gives_what_the_host_gives(graph: bool) -> None:
    images = torch.randint(0, 256, (3, 20, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    host, replays = VAE(), list[int]()
    expected = both_ways(FrameVae(host, torch.device("cpu")), images)
    assert host.calls == 2
    with fake_cuda() as machine:
        vae = on_device(machine, host)
        if graph:
            vae.record(3, 20, 16, record=counting(replays))
        samples, decoded = both_ways(vae, images)
        fewer = both_ways(vae, images[:1])
        assert machine.waits == 2, "one for each image that came back"
    assert host.calls == 2, "the host's own call was not needed"
    assert len(replays) == (5 if graph else 0)  # one of them while the decoder was recorded
    torch.testing.assert_close(samples, expected[0])
    torch.testing.assert_close(decoded, expected[1], rtol=0, atol=1)
    torch.testing.assert_close(fewer[1], expected[1][:1], rtol=0, atol=1)


def counting(replays: list[int]) -> Any:
    def record(run: Any) -> Any:
        output = run()

        def replay() -> None:
            replays.append(1)
            output.copy_(run())

        return replay, output

    return record


@torch.no_grad()
def test_a_tiny_vae_is_a_copy_so_that_the_host_may_unload_its_own() -> None:
    images, host = torch.full((1, 16, 16, 3), 200, dtype=torch.uint8), VAE()
    expected = both_ways(FrameVae(host, torch.device("cpu")), images)
    with fake_cuda() as machine:
        vae = on_device(machine, host)
        for weight in host.first_stage_model.parameters():
            weight.zero_()
        torch.testing.assert_close(both_ways(vae, images)[0], expected[0])


@torch.no_grad()
def test_a_vae_without_memory_on_the_device_leaves_the_frame_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    images, host, told = torch.full((1, 16, 16, 3), 200, dtype=torch.uint8), VAE(), list[str]()

    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FrameVae, "_encode", full)
    with fake_cuda(may_wait=True) as machine:
        vae = on_device(machine, host)
        vae.record(1, 16, 16, told.append, counting([]))
        assert told == ["The VAE could not be recorded and runs as it is: CUDA out of memory."]
        samples = vae.encode(images)
        assert host.calls == 1
        torch.testing.assert_close(samples, host.encode(images.float() / 255))


def test_nan_of_a_vae_on_the_device_is_raised_when_the_image_arrives() -> None:
    host = VAE()
    host.first_stage_model.taesd_decoder[0].bias[0] = float("nan")
    with fake_cuda() as machine, torch.no_grad():
        arrival = on_device(machine, host).decode(machine.put(torch.zeros(1, 4, 2, 2)))
        assert isinstance(arrival, Arrival)
        with pytest.raises(ValueError, match="image"):
            arrival.get()


class AutoencoderKL(TAESD):
    """A larger VAE, whose calls are the host's."""


@pytest.mark.parametrize(
    "changed",
    [{"encode": len}, {"format_encoded": len}, {"output_channels": 4}, {"first_stage_model": AutoencoderKL()}],
    ids=lambda c: next(iter(c)),
)
def test_a_vae_that_is_larger_or_does_more_is_called_by_the_host(changed: dict[str, Any]) -> None:
    host = VAE()
    assert tiny_copy(host, torch.device("cpu")) is not None
    vars(host).update(changed)
    assert tiny_copy(host, torch.device("cpu")) is None


ROOM = [
    (3.0, 0.0, 1.0, True), (3.0, 1.9, 1.0, True), (3.0, 2.7, 1.0, False), (1.6, 0.0, 1.0, True), (1.6, 0.0, 0.0, False),
    (2.2, 0.0, 0.0, True),
]  # fmt: skip


@pytest.mark.parametrize(("free", "memory", "loaded", "room"), ROOM)
def test_the_host_has_room_for_what_is_missing_of_a_model_and_for_its_work(
    monkeypatch: pytest.MonkeyPatch, free: float, memory: float, loaded: float, room: bool
) -> None:
    management = ModuleType("comfy.model_management")
    management.__dict__.update(
        is_device_cpu=lambda device: device == "cpu", minimum_inference_memory=lambda: 0.9, extra_reserved_memory=lambda: 0.4,
        get_free_memory=lambda device: free,
    )  # fmt: skip
    package = ModuleType("comfy")
    package.__dict__["model_management"] = management
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    patcher = SimpleNamespace(load_device="cuda", model_size=lambda: 1.0, loaded_size=lambda: loaded)
    assert has_room(patcher, memory) == room
    patcher.load_device = "cpu"
    assert has_room(patcher, 100.0), "on a CPU nothing is moved"
    assert has_room(None)


@pytest.mark.parametrize("part", ["receive", "start"])
def test_lanes_without_their_order_are_noticed(monkeypatch, part) -> None:
    monkeypatch.setattr(*((Lane, part) if part == "start" else (queues, part)), lambda *_: None)
    pipe, conds = pipeline(), prompts()
    with fake_cuda() as machine:
        machine.put_module(pipe.vae)
        machine.put_module(pipe.model.unet)
        noise = to_device(torch.zeros(1, 4, 2, 3), DEVICE)  # made by the caller, read on the lanes
        threads = stream_clip(pipe, [c.map(machine.put) for c in conds], clip(2), DEVICE, lambda *_: None)
        threads.encode = (lambda encode: lambda image: encode(image) + noise)(threads.encode)
        noise.record_stream(threads._lanes["encode"].stream)
        with pytest.raises(RaceError):
            stages(threads)


def test_a_prompt_from_another_stream_is_waited_for(pictures) -> None:
    """`update` while the passes run on a CUDA stream of their own; without `mark` and `receive` this raises RaceError."""
    model, conds = network(), prompts()
    with fake_cuda() as machine:
        machine.put_module(model.unet)
        stream = StreamBatch(model, Conditioning(to_device(conds[0].context, DEVICE)), None, StreamConfig())
        lane = torch.cuda.Stream()
        for i in range(6):
            if i == 3:
                stream.update(cond=Conditioning(to_device(conds[1].context, DEVICE)))
            if i == 5:
                stream.cond, stream._handed = Conditioning(to_device(conds[2].context, DEVICE)), None
                stream._plans.clear()
            with torch.cuda.stream(lane):
                frame = to_device(pictures[i : i + 1], DEVICE)
                if i < 5:
                    stream.push(frame)
                else:
                    with pytest.raises(RaceError):
                        stream.push(frame)


def test_nan_ends_the_stream_with_its_error_and_keeps_what_came_before() -> None:
    pipe, conds, images = pipeline(), prompts(), clip(6)
    got: list[int] = []
    with fake_cuda() as machine:
        machine.put_module(pipe.vae)
        machine.put_module(pipe.model.unet)
        conds = [c.map(machine.put) for c in conds]
        threads = stream_clip(pipe, conds, images, DEVICE, lambda image, meta, frame: got.append(meta))
        calls, encode = itertools.count(), threads.encode
        threads.encode = lambda image: encode(image) * (float("nan") if next(calls) == 3 else 1.0)
        with pytest.raises(ValueError, match="`latents` to be finite everywhere, but got 24 NaN"):
            stages(threads)
    assert got == [0, 1, 2]


# -- the detector detects


class Looking(Small):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        (output,) = super().forward(*args, **kwargs)
        return (self.look(output),)


@pytest.mark.parametrize(
    "look",
    {
        "item": lambda x: x * x.sum().item(),
        "float": lambda x: x * float(x.mean()),
        "if": lambda x: x if (x == x).all() else x + 1,
        "cpu": lambda x: x.cpu().to(x.device),
        "numpy": lambda x: x + x.numpy().sum(),
        "mask": lambda x: x.masked_fill(x > 0, 0) + x[x > 0].sum(),
        "nonzero": lambda x: x * len(x.nonzero()),
        "constant": lambda x: x * torch.tensor([2.0], device=x.device),
        "pageable": lambda x: x + torch.ones(1, 1, 1, 1).to(x.device, non_blocking=True),
        "index": lambda x: x[torch.tensor([0])],
        "synchronize": lambda x: torch.cuda.synchronize() or x,
    }.items(),
    ids=lambda look: look[0],
)
def test_a_network_that_makes_the_host_wait_is_noticed(pictures, look) -> None:
    model = network()
    model.unet.__class__ = type("Looks", (Looking,), {"look": staticmethod(look[1])})
    with pytest.raises(HostWaitError):
        footprints(model, pictures, {"guidance": "none"})


def test_memory_that_is_kept_is_noticed(pictures) -> None:
    kept: list[torch.Tensor] = []
    model = network()
    model.unet.__class__ = type("Keeps", (Looking,), {"look": lambda self, x: kept.append(x) or x})
    seen = footprints(model, pictures, {"guidance": "none"})
    assert seen[-1][-1] > seen[-2][-1]
