"""Pictures up and down: nothing waits, NaN is told on arrival, pinned memory is left alone while it is on its way."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from slipstream.core import Pipeline
from slipstream.core.transfer import DeviceWork, mark, receive, to_device, to_host
from slipstream_tests.fake_cuda import DEVICE, DeviceTensor, HostWaitError, RaceError, fake_cuda

CPU = torch.device("cpu")


def tiny_vae(kind: str) -> torch.nn.Module:
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(0)
    if kind == "taesd":
        vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    else:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4,
        )  # fmt: skip
    return vae.eval().requires_grad_(False)


def make_pipe(kind: str) -> Pipeline:
    return Pipeline(SimpleNamespace(latent_channels=4), [], tiny_vae(kind), CPU, torch.float32)


def picture(rows: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["taesd", "kl"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bytes_are_the_same_picture(kind, channels) -> None:
    pipe, image = make_pipe(kind), picture()[..., [0, 1, 2, 0][:channels]]
    latents = pipe.encode_image(image / 255)
    assert torch.equal(pipe.encode_image(image), latents)
    decoded = pipe.decode(latents)
    assert torch.equal(pipe.decode_async(latents).get(), decoded)
    got = pipe.decode_async(latents, torch.uint8).get()
    assert got.dtype == torch.uint8
    assert torch.equal(got, (decoded * 255).round().to(torch.uint8))


@pytest.mark.parametrize("kind", ["taesd", "kl"])
@pytest.mark.parametrize("bytes_", [True, False])
def test_a_picture_goes_up_and_down_without_waiting(kind, bytes_) -> None:
    pipe, image = make_pipe(kind), picture(2)
    image = image if bytes_ else image / 255
    expected = pipe.decode(pipe.encode_image(image))
    with fake_cuda() as machine:
        machine.put_module(pipe.vae)
        latents = pipe.encode_image(image)
        coming = pipe.decode_async(latents)
        assert machine.waits == 0
        assert coming.tensor.isnan().all(), "not there yet"
        torch.testing.assert_close(coming.get(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(coming.get(), coming.tensor)
        torch.testing.assert_close(pipe.decode(latents), expected, rtol=1e-5, atol=1e-5)


def test_a_long_clip_is_decoded_in_parts(monkeypatch) -> None:
    pipe = make_pipe("taesd")
    latents = torch.randn(5, 4, 2, 3)
    whole = pipe.decode(latents)
    monkeypatch.setattr("slipstream.core.pipeline.VAE_PIXELS", 2 * 16 * 24)
    torch.testing.assert_close(pipe.decode(latents), whole)
    torch.testing.assert_close(pipe.decode_async(latents).get(), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_nan_on_the_device_is_told_on_arrival(dtype) -> None:
    pipe = make_pipe("taesd")
    bad = torch.zeros(1, 4, 2, 3)
    bad[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    message = r"Expected `latents` to be finite everywhere, but got 2 NaN or infinite values in shape \(1, 4, 2, 3\)"
    with pytest.raises(ValueError, match=message):
        pipe.decode(bad)
    with pytest.raises(ValueError, match=message):
        pipe.decode_async(bad, dtype)
    with fake_cuda() as machine:
        machine.put_module(pipe.vae)
        latents = machine.put(bad)
        coming = pipe.decode_async(latents, dtype)
        with pytest.raises(ValueError, match=message):
            coming.get()
        with pytest.raises(ValueError, match=message):
            pipe.decode(latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_vae_that_makes_nan_is_found_out(dtype) -> None:
    pipe = make_pipe("taesd")
    pipe.vae.decoder.layers[-1].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"Expected `pixels` to be finite everywhere, but got 384 NaN .* fp16"):
        pipe.decode_async(torch.zeros(1, 4, 2, 3), dtype).get()


def test_nan_in_a_picture_is_refused_before_it_travels() -> None:
    image = torch.zeros(1, 16, 24, 3)
    image[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="Expected `image` to be finite everywhere, but got 1 NaN"):
        make_pipe("taesd").encode_image(image)


def test_laid_out_and_cast_on_the_device() -> None:
    x = torch.randn(4, 6)
    with fake_cuda() as machine:
        got = to_device(x.t(), DEVICE, torch.float16)
        assert isinstance(got, DeviceTensor)
        assert torch.equal(got.inner, x.t().half())
        assert torch.equal(to_host(got).get(), x.t().half())
        assert to_device(got, DEVICE) is got
        pinned = x.pin_memory()
        to_device(pinned, DEVICE)
        assert len(machine.pinned) == 4, "two up, image and count down; what is pinned is not copied again"
    assert to_device(x, CPU) is x


def test_streams_hand_over_in_order_or_not_at_all() -> None:
    """What `mark` and `receive` are for, and that the fake device would notice without them."""
    with fake_cuda():
        one, two = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(one):
            x = torch.zeros(3, device=DEVICE)
            ready = mark({"a": [x]})
        with torch.cuda.stream(two):
            with pytest.raises(RaceError, match="before what another stream wrote"):
                x + 1
            two.wait_event(ready)
            with pytest.raises(RaceError, match="record_stream"):
                x + 1
            receive(ready, x, None, "no tensor")
            y = x + 1
        with torch.cuda.stream(one), pytest.raises(RaceError, match="while another stream reads"):
            x.zero_()
        assert mark(torch.zeros(3)) is None
        receive(None, y)


def test_pinned_memory_must_be_left_alone() -> None:
    def hasty() -> None:
        with fake_cuda():
            pinned = torch.zeros(3).pin_memory()
            to_device(pinned, DEVICE)
            pinned.fill_(1)

    with pytest.raises(AssertionError, match="pinned memory was overwritten"):
        hasty()


def test_reading_too_early_shows_rubbish() -> None:
    with fake_cuda() as machine:
        coming = to_host(machine.put(torch.ones(2)))
        assert coming.tensor.isnan().all()
        with pytest.raises(HostWaitError):
            torch.cuda.current_stream().synchronize()
        coming.wait()
        assert torch.equal(coming.tensor, torch.ones(2))


# -- threads beside each other, and one alone


def at_work(work: DeviceWork, ways: str, rounds: int = 30) -> list[str]:
    """Run a thread for each of `ways` ("beside", "alone", "within": alone while beside) and return what was at work together."""
    lock, now, seen = threading.Lock(), list[str](), set[str]()

    def note(way: str) -> None:
        with lock:
            now.append(way)
            seen.add(" ".join(sorted(now)))
        time.sleep(0.0005)
        with lock:
            now.remove(way)

    def thread(way: str) -> None:
        for _ in range(rounds):
            if way == "alone":
                with work.alone():
                    note("alone")
            else:
                with work.beside():
                    note("beside")
                    if way == "within":
                        with work.alone(), work.beside():
                            note("alone")
                        note("beside")

    threads = [threading.Thread(target=thread, args=(way,), daemon=True) for way in ways.split()]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive(), "threads wait for each other"
    return sorted(seen)


def test_one_is_alone_and_others_are_beside_each_other() -> None:
    assert "beside beside" in at_work(DeviceWork(), "beside beside")
    for ways in ("beside beside alone", "beside within", "within within", "within alone within beside"):
        together = at_work(DeviceWork(), ways)
        assert "alone" in together
        assert not [found for found in together if "alone" in found and found != "alone"], ways


def test_an_error_lets_the_others_in() -> None:
    work = DeviceWork()
    for way in (work.alone, work.beside):
        with pytest.raises(RuntimeError, match="broke"), way():
            raise RuntimeError("broke")
    assert at_work(work, "alone") == ["alone"]


def test_a_cancelled_wait_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a recording waits for a stream."""
    work, inside, leave = DeviceWork(), threading.Event(), threading.Event()

    def stay() -> None:
        with work.beside():
            inside.set()
            leave.wait(60)

    def cancel(*_: object) -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=stay, daemon=True)
    thread.start()
    assert inside.wait(60)
    with monkeypatch.context() as patched:
        patched.setattr(work._changed, "wait_for", cancel)
        with pytest.raises(KeyboardInterrupt), work.alone():
            pass
    assert at_work(work, "beside") == ["beside"]
    leave.set()
    thread.join(60)
    assert at_work(work, "alone beside") == ["alone", "beside"]
