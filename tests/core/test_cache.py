"""The cache: bytes bounded, least recently used first, device before host, one build per key."""

from __future__ import annotations

import gc
import os
import pathlib
import threading
import time
from dataclasses import dataclass

import pytest
import slipstream
import torch
from slipstream.core import cache as module
from slipstream.core import device as device_module
from slipstream.core.cache import (
    GIB,
    Cache,
    device_memory,
    devices_of,
    fingerprint,
    footprint,
    host_memory,
    is_finite,
    moved,
    share,
    tensors_in,
)
from slipstream.core.device import free_memory, with_memory
from slipstream.core.identity import Identity
from torch import Tensor, nn

HOST, DEVICE = "host", "device"


class Blob:
    """A value of `size` bytes whose place is a word: there is no second device in a test."""

    def __init__(self, size: int, place: str = DEVICE) -> None:
        self.size, self.place = size, place


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(blob: Blob, places: list[torch.device]) -> Blob:
        return Blob(blob.size, HOST if places == [torch.device("cpu")] else DEVICE)

    monkeypatch.setattr(module, "footprint", lambda b: (b.size, 0) if b.place == DEVICE else (0, b.size))
    monkeypatch.setattr(module, "devices_of", lambda b: [torch.device("cpu" if b.place == HOST else "meta")])
    monkeypatch.setattr(module, "moved", place)


def fail() -> Blob:
    raise AssertionError("built again")


@pytest.mark.parametrize(("gib", "budget"), [(8, 6), (24, 18), (141, 105.75)])
def test_models_may_fill_three_quarters_of_the_card(monkeypatch: pytest.MonkeyPatch, gib: int, budget: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * GIB, gib * GIB))  # (free, total)
    assert Cache("test", share(device_memory, 3 / 4), 0).device_bytes == budget * GIB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_memory() == host_memory()


def test_bounds_are_shares_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 8 * GIB // 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: "max")
    assert host_memory() == 8 * GIB
    assert Cache("test", 0, share(host_memory, 1 / 8)).host_bytes == GIB
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: str(2 * GIB))  # the container's limit
    assert host_memory() == 2 * GIB


@pytest.mark.usefixtures("fake_device")
class TestTiers:
    def test_the_oldest_goes_to_the_host_and_comes_back(self) -> None:
        cache = Cache("test", 20, 20)
        for key in "abc":
            cache.get(key, lambda: Blob(10))
        assert cache.used() == (20, 10)
        assert cache.get("a", fail).place == DEVICE
        assert cache.used() == (20, 10), "b made room for a"

    def test_use_makes_young(self) -> None:
        cache = Cache("test", 20, 0)
        cache.get("a", lambda: Blob(10))
        cache.get("b", lambda: Blob(10))
        cache.get("a", fail)
        cache.get("c", lambda: Blob(10))
        assert "a" in cache
        assert "b" not in cache

    def test_the_oldest_on_the_host_goes_out(self) -> None:
        cache = Cache("test", 10, 20)
        for key in "abcd":
            cache.get(key, lambda: Blob(10))
        assert cache.used() == (10, 20)
        assert "a" not in cache
        assert cache.get("b", fail).place == DEVICE

    def test_what_is_in_use_from_the_start_is_not_copied_to_the_host(self) -> None:
        """The parts of one model, loaded one after another, on a card that cannot keep them all."""
        cache, user = Cache("test", 20, 100), nn.Identity()
        parts = [cache.get(key, lambda: Blob(10), user) for key in "abc"]
        assert cache.used() == (20, 0)
        assert "a" not in cache
        assert cache.get("a", fail, user) is parts[0], "still alive, so not built again"

    def test_a_bound_that_depends_on_the_device_is_asked_when_something_lies_there(self) -> None:
        asked: list[int] = []
        cache = Cache("test", lambda: asked.append(1) or 15, 100)
        cache.get("host", lambda: Blob(50, HOST))
        assert not asked
        for key in "ab":
            cache.get(key, lambda: Blob(10))
        assert cache.used() == (10, 60)
        assert asked == [1]

    def test_bounds_hold_for_any_order(self) -> None:
        cache = Cache("test", 25, 15)
        generator = torch.Generator().manual_seed(0)
        for key, size in torch.randint(1, 12, (200, 2), generator=generator).tolist():
            cache.get(key, lambda size=size: Blob(size))  # type: ignore[misc]
            on_device, on_host = cache.used()
            assert on_device <= 25
            assert on_host <= 15

    def test_a_value_over_budget_is_given_but_not_kept(self) -> None:
        cache = Cache("test", 5, 5)
        assert cache.get("a", lambda: Blob(10)).size == 10
        assert len(cache) == 0

    def test_a_value_that_somebody_holds_is_not_built_again(self) -> None:
        cache = Cache("test", 5, 5)
        held = cache.get("a", lambda: Blob(10))
        assert cache.get("a", fail) is held
        del held
        gc.collect()
        assert cache.get("a", lambda: Blob(1)).size == 1

    def test_a_parked_value_that_somebody_holds_is_that_value(self) -> None:
        cache = Cache("test", 10, 20)
        held = cache.get("a", lambda: Blob(10))
        cache.get("b", lambda: Blob(10))
        assert held.place == DEVICE, "whoever computes with a value must not find it moved"
        assert cache.get("a", fail) is held

    def test_a_value_in_use_is_forgotten_instead_of_copied(self) -> None:
        cache = Cache("test", 10, 20)
        user = Blob(0)
        value = cache.get("a", lambda: Blob(10))
        cache.hold("a", user)
        cache.get("b", lambda: Blob(10))
        assert cache.used() == (10, 0)
        assert cache.get("a", fail) is value

    def test_leaving_the_device(self) -> None:
        cache = Cache("test", 20, 20)
        cache.get("a", lambda: Blob(10))
        cache.get("b", lambda: Blob(5))
        assert cache.leave_device() == 15
        assert cache.used() == (0, 15)
        assert cache.get("b", fail).place == DEVICE
        assert repr(cache) == "<cache of 2 test: 0.00 of 0.00 GiB on devices, 0.00 of 0.00 GiB in host memory>"
        cache.clear()
        assert (len(cache), cache.used()) == (0, (0, 0))


class TestKeeping:
    def test_what_is_not_finite_is_given_but_not_kept(self) -> None:
        cache, values = Cache("test", 100, 100, finite=True), iter((torch.tensor([1, float("nan")]), torch.ones(2)))
        assert cache.get("a", lambda: next(values)).isnan().any()
        assert cache.get("a", lambda: next(values)).isfinite().all()
        assert torch.equal(cache.get("a", fail), torch.ones(2))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
    def test_one_bad_value_anywhere(self, dtype: torch.dtype, bad: float) -> None:
        good, spoilt = torch.full((2, 3), 6e4, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
        spoilt[1, 2] = bad
        assert is_finite([good, {"a": torch.arange(3)}, torch.zeros(0)])
        assert not is_finite([good, {"a": spoilt}])

    def test_a_value_that_was_changed_is_built_again(self) -> None:
        cache = Cache("test", 100, 100, stamp=lambda t: float(t.sum()))
        held = cache.get("a", lambda: torch.ones(2))
        assert cache.get("a", fail) is held
        held.data.mul_(2)
        assert torch.equal(cache.get("a", lambda: torch.ones(2)), torch.ones(2))
        assert torch.equal(cache.get("a", fail), torch.ones(2))

    def test_an_identity_with_unnamed_parts_is_no_key(self, caplog: pytest.LogCaptureFixture) -> None:
        cache = Cache("test", 100, 100)
        for count in (1, 2):
            assert cache.get(Identity("ab", ("patches (pack.Patch)",)), lambda c=count: torch.tensor(c)) == count
        assert "pack.Patch" in caplog.text
        assert cache.get(Identity("ab"), lambda: torch.tensor(3)) == cache.get(Identity("ab"), fail) == 3

    def test_what_is_being_built_while_the_cache_is_emptied_is_not_kept(self) -> None:
        cache = Cache("test", 100, 100)
        cache.get("a", lambda: cache.clear() or torch.ones(1))
        assert len(cache) == 0
        cache.get("a", lambda: torch.ones(1))
        assert len(cache) == 1

    def test_a_value_that_grows_is_measured_again(self) -> None:
        cache, value = Cache("test", 0, 100), Nested({"a": torch.zeros(10)}, nn.Identity())
        cache.get("a", lambda: value)
        value.tensors["b"] = torch.zeros(100)
        assert cache.get("a", fail) is value
        assert cache.used() == (0, 0), "larger than the bound: no longer kept"


class TestBuilding:
    def test_simultaneous_requests_build_once(self) -> None:
        cache, built, gate, found = Cache("test", 100, 100), [], threading.Barrier(8), []

        def build() -> Tensor:
            built.append(1)
            time.sleep(0.05)
            return torch.zeros(2)

        def ask() -> None:
            gate.wait()
            found.append(cache.get("key", build))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(built) == 1
        assert len(found) == 8
        assert all(value is found[0] for value in found)

    def test_one_key_does_not_wait_for_another(self) -> None:
        cache, inside, done = Cache("test", 100, 100), threading.Event(), threading.Event()

        def slow() -> Tensor:
            inside.set()
            assert done.wait(10)
            return torch.zeros(1)

        thread = threading.Thread(target=lambda: cache.get("slow", slow))
        thread.start()
        assert inside.wait(10)
        cache.get("fast", lambda: torch.zeros(1))
        done.set()
        thread.join()
        assert "slow" in cache
        assert "fast" in cache

    def test_a_failed_build_leaves_nothing_and_is_tried_again(self) -> None:
        cache = Cache("test", 100, 100)
        with pytest.raises(KeyboardInterrupt):
            cache.get("key", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "key" not in cache
        assert float(cache.get("key", lambda: torch.ones(1))) == 1
        assert len(cache._building) == 0


@dataclass(eq=False)
class Nested:
    tensors: dict[str, Tensor]
    network: nn.Module
    note: str = "kept"


class TestMoving:
    @torch.no_grad()
    def test_a_real_network_comes_back_whole(self) -> None:
        unet = slipstream.load("pocket").model.unet
        parked = moved(unet, [torch.device("meta")] * len(devices_of(unet)))
        assert {t.device.type for t in tensors_in(parked)} == {"meta"}
        twin = moved(unet, [t.device for t in tensors_in(unet)])
        x, context = torch.ones(1, 4, 16, 16), torch.ones(1, 77, 64)
        assert torch.equal(twin(x, 500, context).sample, unet(x, 500, context).sample)

    def test_every_tensor_is_found_and_counted_once(self) -> None:
        shared = torch.zeros(3)
        value = Nested({"a": shared, "b": torch.zeros(2)}, nn.BatchNorm2d(4))
        assert len(list(tensors_in([value, (shared, None)]))) == 3 + 5
        assert footprint([value, (shared,)]) == (0, 4 * (3 + 2 + 4 * 4) + 8)

    def test_a_copy_is_on_the_other_device_and_the_value_stays(self) -> None:
        value = Nested({"a": torch.zeros(3)}, nn.Linear(2, 2).requires_grad_(False))
        copy = moved(value, [torch.device("meta")] * 3)
        assert [t.device.type for t in tensors_in(copy)] == ["meta"] * 3
        assert [t.device.type for t in tensors_in(value)] == ["cpu"] * 3
        assert copy.note == "kept"
        assert isinstance(copy.network.weight, nn.Parameter)
        assert not copy.network.weight.requires_grad

    def test_tensors_that_stay_are_shared(self) -> None:
        value = [torch.zeros(3), nn.Linear(2, 2)]
        copy = moved(value, [torch.device("cpu")] * 3)
        assert copy[0] is value[0]
        assert copy[1].weight is value[1].weight
        assert copy[1] is not value[1]


def test_a_fingerprint_changes_with_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 200_000)
    stat = path.stat()
    first = fingerprint(path)
    assert fingerprint(path) == first
    for place in (0, 199_999):  # same size, same time
        changed = bytearray(b"a" * 200_000)
        changed[place] = 0
        path.write_bytes(changed)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert fingerprint(path) != first
    path.write_bytes(b"a" * 200_000)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint(path) != first


class TestOutOfMemory:
    def test_it_frees_and_tries_once_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        freed: list[int] = []
        monkeypatch.setattr(device_module, "free_memory", lambda: freed.append(1))

        def run() -> str:
            if not freed:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return "done"

        assert with_memory(run, "test") == "done"
        assert len(freed) == 1

    @pytest.mark.parametrize(
        "error",
        [
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes."),
        ],
    )
    def test_it_says_what_was_needed(self, error: RuntimeError) -> None:
        calls = []

        def run() -> None:
            calls.append(1)
            raise error

        with pytest.raises(
            MemoryError, match=r"Not enough memory to decode: needed (2.00 GiB|123 bytes) more.*smaller"
        ):
            with_memory(run, "decode")
        assert len(calls) == 2

    def test_a_network_call_is_tried_again_and_counted_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = slipstream.load("pocket")
        cond, x, sigma = pipe.encode_text([""]), torch.zeros(1, 4, 8, 8), torch.ones(1)
        wanted, forward, calls = pipe.model(x, sigma, cond), pipe.model.unet.forward, []

        def scarce(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) != 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(*args, **kwargs)

        monkeypatch.setattr(pipe.model.unet, "forward", scarce)
        assert torch.equal(pipe.model(x, sigma, cond), wanted)
        assert (pipe.model.calls, pipe.model.rows) == (2, 2)
        with pytest.raises(MemoryError, match=r"denoise 1 x 8 x 8 latents: needed 2\.00 GiB more"):
            pipe.model(x, sigma, cond)

    def test_other_errors_pass_at_once(self) -> None:
        calls = []

        def run() -> None:
            calls.append(1)
            raise RuntimeError("shapes differ")

        with pytest.raises(RuntimeError, match="shapes differ"):
            with_memory(run, "test")
        assert len(calls) == 1

    @pytest.mark.usefixtures("fake_device")
    def test_every_cache_leaves_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(device_module, "CACHES", caches := {Cache("one", 9, 9), Cache("two", 9, 9)})
        for cache in caches:
            cache.get("a", lambda: Blob(5))
        free_memory()
        assert all(cache.used() == (0, 5) for cache in caches)
