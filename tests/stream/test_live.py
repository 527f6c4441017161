"""The live route: what travels, what is refused, what is changed while it runs, and how a stream ends. No host, no model."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from slipstream.core.images import encode_jpeg, read_encoded
from slipstream.stream import BlendedStream, PromptBlend, StreamConfig
from slipstream.stream.live import session, wire
from slipstream.stream.live.session import LiveStream, Streams, described
from slipstream.stream.live.settings import LiveSettings
from slipstream.stream.prompts import blended
from slipstream_tests.analytic import GaussianDenoiser, constant_cond

aiohttp = pytest.importorskip("aiohttp")
from slipstream.stream.live.routes import PATH, connect, same_origin  # noqa: E402

SIZE = (16, 24)


def jpeg(value: int = 128, size: tuple[int, int] = SIZE) -> bytes:
    return encode_jpeg(torch.full((*size, 3), value, dtype=torch.uint8))


# -- messages


def test_the_note_says_where_it_runs_and_what_would_make_it_faster() -> None:
    half, gpu = torch.float16, torch.device("cuda:0")
    assert described(torch.device("cpu"), torch.float32).endswith("the rate below is measured.")
    assert described(gpu, half).endswith("set `acceleration` to graph or compile.")
    assert described(gpu, half, "graph") == "On cuda:0, float16."
    assert described(torch.device("mps"), half) == "On mps, float16."


def test_a_frame_comes_back_as_it_was_packed() -> None:
    message = wire.pack(wire.Head(wire.FRAME, 2**40, 1234.5), b"body")
    assert len(message) == 24 + 4
    assert wire.unpack(message, (wire.FRAME,)) == ((wire.FRAME, 2**40, 1234.5), b"body")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "head of 24 bytes"),
        (b"SLIP", "head of 24 bytes"),
        (b"XXXX" + bytes(40), "head of 24 bytes"),
        (wire.pack(wire.Head(7, 1, 0.0), b"x"), "kind 1"),
        (wire.pack(wire.Head(wire.RESULT, 1, 0.0), b"x"), "kind 1"),
        (wire.pack(wire.Head(wire.FRAME, 1, float("nan")), b"x"), "finite time"),
        (wire.pack(wire.Head(wire.FRAME, 1, 0.0)), "got none"),
        (wire.pack(wire.Head(wire.FRAME, 1, 0.0), bytes(wire.MAX_FRAME)), "at most 4194304 bytes"),
    ],
)
def test_other_frames_are_refused(message: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        wire.unpack(message, (wire.FRAME,))


def test_a_repeat_does_not_take_the_place_of_the_image_that_it_repeats() -> None:
    """A slow client gets the image with the newer time, not the order to show an older one again."""
    first, second = (wire.pack(wire.Head(wire.RESULT, n, 10.0 * n), b"image %d" % n) for n in (1, 2))
    repeat = wire.pack(wire.Head(wire.REPEAT, 3, 30.0))
    assert wire.newest(None, repeat) == repeat
    assert wire.newest(first, second) == second
    assert wire.newest(repeat, second) == second
    assert wire.newest(repeat, repeat) == repeat
    assert wire.unpack(wire.newest(second, repeat), (wire.RESULT,)) == ((wire.RESULT, 3, 30.0), b"image 2")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", '{"a": 1}', '{"type": 3}', "[" * 9999, '{"type":"set"}' + " " * wire.MAX_TEXT]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Expected"):
        wire.read_text(text)


def test_images_of_every_kind_and_no_others() -> None:
    image = torch.randint(0, 256, (8, 12, 3), dtype=torch.uint8)
    for format in ("PNG", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(image.numpy()).save(file, format, lossless=True)
        assert torch.equal(read_encoded(file.getvalue()), image)
    assert (read_encoded(jpeg(77)).int() - 77).abs().max() <= 1
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    for data in (b"", b"no image", jpeg()[:100], bomb.getvalue(), b"GIF89a" + bytes(20)):
        with pytest.raises(ValueError, match="Expected"):
            read_encoded(data, wire.MAX_PIXELS)


# -- settings


def test_settings_say_what_a_config_needs() -> None:
    settings = LiveSettings(strength=0.4, steps=3, guidance_scale=1.5)
    assert StreamConfig(**settings.updates()) == StreamConfig(strength=0.4, steps=3, cfg_scale=1.5)
    listed = settings.changed({"t_index_list": "10, 20"})
    assert StreamConfig(**listed.updates()) == StreamConfig(t_index_list=[10, 20], cfg_scale=1.5)
    assert listed.changed({"t_index_list": []}) == settings
    assert LiveSettings().changed(json.loads(json.dumps(listed.as_json()))) == listed


@pytest.mark.parametrize(
    ("updates", "name"),
    [
        ({"strength": 2}, "strength"), ({"strength": "0.5"}, "strength"), ({"strength": None}, "strength"), ({"steps": 1.5}, "steps"),
        ({"steps": 0}, "steps"), ({"seed": -1}, "seed"), ({"similarity": 1.1}, "similarity"), ({"feedback": 1}, "feedback"),
        ({"guidance": "most"}, "guidance"), ({"guidance_scale": 0}, "cfg_scale"), ({"crossfade": -1}, "crossfade"),
        ({"t_index_list": [5, 5]}, "t_index_list"), ({"t_index_list": "a"}, "t_index_list"), ({"t_index_list": 3}, "t_index_list"),
        ({"prompt": 3}, "prompt"), ({"prompt": "x" * 4001}, "prompt"), ({"prompt": "\ud800"}, "prompt"), ({"size": 3}, "setting"),
        ({"strength": float("nan")}, "strength"), ({"strength": []}, "strength"), ({"strength": True}, "strength"),
        ({"seed": 10**5000}, "seed"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(updates: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected (`{name}`|a {name})"):
        LiveSettings().changed(updates)


@pytest.mark.parametrize(
    ("settings", "updates", "named"),
    [
        ({"t_index_list": [5]}, {"strength": 0.3}, "`strength` has no effect"),
        ({"t_index_list": [5]}, {"steps": 3}, "`steps` has no effect"),
        ({"guidance": "none"}, {"guidance_scale": 2}, "`guidance_scale` has no effect"),
        ({"guidance_scale": 1}, {"delta": 0.5}, "`delta` has no effect"),
        ({"guidance": "full"}, {"delta": 0.5}, "`delta` has no effect"),
        ({}, {"negative": "x"}, "`negative` has no effect"),
        ({}, {"strength": 0.3}, ""),
        ({"guidance": "full"}, {"negative": "x"}, ""),
    ],
)
def test_a_setting_without_effect_is_said(settings: dict[str, Any], updates: dict[str, Any], named: str) -> None:
    found = LiveSettings(**settings).changed(updates).warnings(updates)
    assert len(found) == bool(named)
    assert not named or named in found[0]


# -- a moving prompt


def test_a_prompt_moves_on_over_frames_and_stays() -> None:
    config = StreamConfig(strength=0.5, steps=2, guidance="none")
    stream = BlendedStream(GaussianDenoiser(), [constant_cond(0.0)], PromptBlend([1.0]), 0, config=config)
    frame, seen = torch.zeros(1, 4, 8, 8), []
    assert not stream.moving

    def push(count: int) -> None:
        for _ in range(count):
            seen.extend(float(f.latents.mean()) for f in stream.push(frame))

    push(4)
    stream.move(lambda i: constant_cond(float(i + 1)), 3)
    assert stream.moving
    push(2)
    assert float(stream.newest_prompt().context.mean()) == 2.0
    push(9)
    assert not stream.moving
    assert stream._length == 0  # the steady stream asks for no prompts by frame
    assert float(stream.newest_prompt().context.mean()) == 3.0
    push(1)
    assert seen[3] < seen[4] < seen[5] < seen[6]  # the first frame of the path has its first prompt at both steps
    assert len({round(v, 5) for v in seen[:4]}) == 1
    assert len({round(v, 5) for v in seen[6:]}) == 1


# -- a stream behind the route


class Gate:
    """A trivial model that may be made slow, or to fail."""

    def __init__(self) -> None:
        self.delay, self.error = 0.0, None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay)
        if self.error is not None:
            raise self.error
        return latents[:, :3].movedim(1, -1).clamp(0, 1)


class Running:
    """A live stream in a thread, as the node runs it."""

    def __init__(self, settings: LiveSettings | None = None, group: int = 1, lanes: int = 1, **more: Any) -> None:
        self.streams, self.gate = Streams(), Gate()
        self.live = self.streams.open(
            LiveStream(settings or LiveSettings(guidance="none", steps=1), SIZE, keep=3, **more)
        )
        self.interrupt: BaseException | None = None
        self.error: BaseException | None = None
        self.prompts: list[str] = []
        config = StreamConfig(**self.live.settings.updates(), frame_group=group)
        models = [GaussianDenoiser() for _ in range(lanes)]
        self.batch = blended(models, [constant_cond(0.0)], PromptBlend([1.0]), 0, constant_cond(0.0), config)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.live.run(self.batch, self._encode, self.gate.decode, self._apply, self._check)
        except BaseException as error:
            self.error = error

    def _encode(self, image: torch.Tensor) -> torch.Tensor:
        return (image.float() / 255).movedim(-1, 1)[:, [0, 1, 2, 0]]

    def _apply(self, old: LiveSettings, new: LiveSettings) -> None:
        if new.prompt == "bad":
            raise ValueError("Expected a better prompt, but got 'bad'.")
        if new.prompt != old.prompt:
            self.prompts.append(new.prompt)
        self.batch.update(**new.updates())

    def _check(self) -> None:
        if self.interrupt is not None:
            raise self.interrupt

    def close(self) -> None:
        self.streams.close(self.live)
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert not [t.name for t in threading.enumerate() if t.name.startswith("slipstream-")]


@pytest.fixture
def running() -> Iterator[Running]:
    found = Running()
    try:
        yield found
    finally:
        found.close()


class Page:
    """A client: sends frames, and notes what it is told."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.sent = socket, 0

    async def send(self, value: int = 128, sequence: int | None = None) -> None:
        self.sent = self.sent + 1 if sequence is None else sequence
        await self.socket.send_bytes(wire.pack(wire.Head(wire.FRAME, self.sent, 1000.0 * self.sent), jpeg(value)))

    async def told(self, kind: str) -> dict[str, Any]:
        """Wait for a text of this kind; others are passed over."""
        while True:
            message = await asyncio.wait_for(self.socket.receive(), 10)
            assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
            if message.type == aiohttp.WSMsgType.TEXT and (found := json.loads(message.data))["type"] == kind:
                return found

    async def shown(self) -> tuple[wire.Head, bytes]:
        while True:
            message = await asyncio.wait_for(self.socket.receive(), 10)
            assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
            if message.type == aiohttp.WSMsgType.BINARY:
                return wire.unpack(message.data, (wire.RESULT, wire.REPEAT))


def served(running: Running, visit: Callable[[Callable[..., Awaitable[Page]]], Awaitable[None]]) -> None:
    """Serve the stream, and let `visit(open)` open pages of it."""

    async def main() -> None:
        from aiohttp import web
        from aiohttp.test_utils import TestClient, TestServer

        app = web.Application()
        app.router.add_get(PATH, lambda request: connect(request, running.streams))
        async with TestClient(TestServer(app)) as client:

            async def opened(id: str = "", **options: Any) -> Page:
                key = options.pop("key", "")
                return Page(await client.ws_connect(f"/slipstream/live/{id or running.live.id}?key={key}", **options))

            await visit(opened)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_frame_goes_round_with_its_time(running: Running) -> None:
    async def visit(opened: Any) -> None:
        page = await opened()
        hello = await page.told("hello")
        assert hello["settings"]["steps"] == 1
        assert hello["size"] == [24, 16]
        assert (await page.told("role"))["producer"] is True
        for n in (1, 2, 3):
            await page.send(100)
            head, body = await page.shown()
            assert head == (wire.RESULT, n, 1000.0 * n)
            assert read_encoded(body).shape == (*SIZE, 3)
        report = await page.told("statistics")
        assert report["frames_out"] >= 1
        assert "frames per second" in report["limit"]
        await page.socket.send_str('{"type": "stop"}')
        assert (await page.told("ended"))["reason"] == "Stopped."
        assert (await page.socket.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)

    served(running, visit)
    running.thread.join(10)
    assert running.error is None
    assert running.live.images().shape == (3, *SIZE, 3)
    assert "3 of 3 frames" in running.live.text()


def test_a_viewer_never_takes_the_place_of_the_one_that_sends(running: Running) -> None:
    """One that joined as a viewer, and a page that gives its place to a program that pushes."""

    async def visit(opened: Any) -> None:
        viewer = await opened(key="v&view=1")
        assert (await viewer.told("role"))["producer"] is False
        page = await opened()
        assert (await page.told("role"))["producer"] is True
        await page.socket.send_str('{"type": "view"}')
        assert (await page.told("role"))["producer"] is False
        program = await opened()
        assert (await program.told("role"))["producer"] is True
        for other in (page, viewer):
            await other.socket.send_str('{"type": "view"}')
            assert (await other.told("role"))["producer"] is False
        await program.send()
        for client in (page, viewer, program):
            await client.shown()
        await program.socket.close()
        assert (await page.told("paused"))["reason"] == "page closed"
        await page.socket.send_str('{"type": "produce"}')
        assert (await page.told("role"))["producer"] is True

    served(running, visit)


def filming(page: Any) -> asyncio.Task[None]:
    """Send frames faster than they are taken, until the task is cancelled."""

    async def camera() -> None:
        while True:
            await page.send()
            await asyncio.sleep(0.005)

    return asyncio.create_task(camera())


@pytest.mark.parametrize(("group", "lanes", "steps"), [(4, 1, 1), (2, 1, 2), (1, 3, 1), (1, 2, 3)])
def test_frames_that_travel_together_or_side_by_side_keep_coming(group: int, lanes: int, steps: int) -> None:
    """So many are let in as fill every place; none waits for a frame that is not let in."""
    running = Running(LiveSettings(guidance="none", steps=steps), group, lanes)

    async def visit(opened: Any) -> None:
        page = await opened()
        await page.told("role")
        sending = filming(page)
        for _ in range(20):
            await page.shown()
        sending.cancel()
        if lanes > 1:
            await page.socket.send_str(json.dumps({"type": "set", "feedback": 0.3}))
            while "`feedback` ties each frame to others" not in (await page.told("refused"))["reason"]:
                pass

    try:
        served(running, visit)
    finally:
        running.close()
    assert running.live.statistics.summary()["latency_p50_ms"] < 2000


def test_fewer_steps_make_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames in flight outnumber the places then, and new ones have to push them out: none waits for a result."""
    for name in ("LEAST_WAIT", "MOST_WAIT"):
        monkeypatch.setattr(session, name, 1000.0)  # a frame that waited would never be shown
    running = Running(LiveSettings(guidance="none", steps=12))
    running.gate.delay = 0.02

    async def visit(opened: Any) -> None:
        page = await opened()
        await page.told("role")
        sending = filming(page)
        for _ in range(14):
            await page.shown()
        await page.socket.send_str(json.dumps({"type": "set", "steps": 1}))
        for _ in range(30):
            await page.shown()
        sending.cancel()

    try:
        served(running, visit)
    finally:
        running.close()


def test_news_reach_those_who_are_there_and_those_who_come(running: Running) -> None:
    async def visit(opened: Any) -> None:
        page = await opened()
        await page.told("role")
        running.live.tell("Compiling the network.")
        assert (await page.told("note"))["reason"] == "Compiling the network."
        running.live.tell("`acceleration` has no effect.", bad=True)
        assert (await page.told("warning"))["reason"] == "`acceleration` has no effect."
        assert (await (await opened()).told("hello"))["note"] == "`acceleration` has no effect."

    served(running, visit)


def test_settings_change_while_it_runs(running: Running) -> None:
    async def visit(opened: Any) -> None:
        page = await opened()
        await page.socket.send_str(json.dumps({"type": "set", "prompt": "a red circle", "strength": 0.3}))
        assert (await page.told("settings"))["settings"]["strength"] == 0.3
        await page.send()
        await page.shown()
        while not running.prompts:
            await asyncio.sleep(0.02)
        assert running.batch.config.strength == 0.3
        for bad, reason in (
            ({"strength": 9}, "`strength`"),
            ({"colour": 1}, "a setting of"),
            ({"steps": True}, "`steps`"),
        ):
            await page.socket.send_str(json.dumps({"type": "set", **bad}))
            assert reason in (await page.told("refused"))["reason"]
            assert (await page.told("settings"))["settings"]["prompt"] == "a red circle"
        await page.socket.send_str(json.dumps({"type": "set", "prompt": "bad"}))
        assert "better prompt" in (await page.told("refused"))["reason"]
        assert (await page.told("settings"))["settings"]["prompt"] == "a red circle"

    served(running, visit)
    assert running.prompts == ["a red circle"]
    assert running.live.settings.prompt == "a red circle"


def test_hostile_messages_are_counted_and_answered_and_nothing_stops(running: Running) -> None:
    async def visit(opened: Any) -> None:
        page = await opened()
        await page.told("role")
        await page.send(sequence=5)
        _, before = await page.shown()
        for sequence in (5, 4, 0):
            await page.send(sequence=sequence)
            assert (await page.told("refused"))["kind"] == "replayed"
        for message in (b"", b"SLIP", bytes(100), wire.pack(wire.Head(9, 9, 0.0), b"x"), bytes(wire.MAX_FRAME + 100)):
            await page.socket.send_bytes(message)
            assert (await page.told("refused"))["kind"] == "malformed"
        for text in ("", "{", "[]", '{"type": "shutdown"}'):
            await page.socket.send_str(text)
            assert (await page.told("refused"))["kind"] == "malformed"
        await page.socket.send_bytes(wire.pack(wire.Head(wire.FRAME, 6, 0.0), b"no image"))
        head, image = await page.shown()  # no black flash: the frame before it, and the stream continues
        assert (head.sequence, image) == (6, before)
        await page.send(sequence=7)
        assert (await page.shown())[0].sequence == 7
        assert running.live.refused == {"replayed": 3, "malformed": 10}

    served(running, visit)


def test_floods_are_left_out(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FRAMES_PER_SECOND", 20)
    monkeypatch.setattr(session, "TEXTS_PER_SECOND", 20)

    async def visit(opened: Any) -> None:
        page = await opened()
        for n in range(60):
            await page.send()
            await page.socket.send_str(json.dumps({"type": "set", "seed": n}))
        assert (await page.told("refused"))["kind"] == "rate"

    served(running, visit)
    assert running.live.refused["rate"] >= 40


def test_one_producer_and_viewers(running: Running) -> None:
    async def visit(opened: Any) -> None:
        first, second = await opened(), await opened()
        assert (await first.told("role"))["producer"] is True
        assert (await second.told("role"))["producer"] is False
        await second.send()
        assert (await second.told("refused"))["kind"] == "viewer"
        await first.send(50)
        assert await second.shown() == await first.shown()
        await first.socket.close()
        assert (await second.told("paused"))["reason"] == "page closed"
        await second.socket.send_str('{"type": "produce"}')
        assert (await second.told("role"))["producer"] is True
        await second.send()
        await second.shown()

    served(running, visit)


def test_who_is_let_in(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_origin({"Host": "a:1"})
    assert same_origin({"Host": "A:1", "Origin": "http://a:1"})
    for origin in ("http://b:1", "http://a:2", "null", "http://a:1.b"):
        assert not same_origin({"Host": "a:1", "Origin": origin})
    monkeypatch.setattr(session, "MAX_CLIENTS", 2)

    async def visit(opened: Any) -> None:
        for options in ({"id": "nothing"}, {"headers": {"Origin": "http://elsewhere.example"}}):
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await opened(**options)
        pages = [await opened(), await opened()]
        third = await opened()
        assert (await third.socket.receive()).data == 1013
        for page in pages:
            await page.told("role")

    served(running, visit)
    assert len(running.live.id) >= 30


def test_a_page_that_lost_its_connection_comes_back_in_its_place(running: Running) -> None:
    async def visit(opened: Any) -> None:
        first = await opened(key="mine")
        await first.told("role")
        await first.send()
        await first.shown()
        first.socket._response.connection.transport.abort()  # as a cable that is pulled
        again = await opened(key="mine")
        assert (await again.told("role"))["producer"] is True
        await again.send()
        assert (await again.shown())[0].sequence == 1

    served(running, visit)


@pytest.mark.parametrize("lost", [True, False])
def test_a_stream_ends_when_its_producer_stays_away(
    running: Running, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    monkeypatch.setattr(session, "GRACE" if lost else "PAUSE", 0.2)

    async def visit(opened: Any) -> None:
        page = await opened()
        await page.told("role")
        if lost:
            page.socket._response.connection.transport.abort()
        else:
            await page.socket.close()

    served(running, visit)
    running.thread.join(10)
    assert not running.thread.is_alive()
    assert "did not come back" in running.live.ended
    assert running.error is None


@pytest.mark.parametrize("error", [MemoryError("out of memory on cuda:0"), ZeroDivisionError("a worker failed")])
def test_what_goes_wrong_is_told_and_raised(running: Running, error: Exception) -> None:
    async def visit(opened: Any) -> None:
        page = await opened()
        running.gate.error = error
        await page.send()
        assert str(error) in (await page.told("ended"))["reason"]

    served(running, visit)
    running.thread.join(10)
    assert running.error is error


def test_an_interrupt_ends_it(running: Running) -> None:
    async def visit(opened: Any) -> None:
        page = await opened()
        await page.send()
        await page.shown()
        running.interrupt = KeyboardInterrupt("cancelled")
        assert "cancelled" in (await page.told("ended"))["reason"]

    served(running, visit)
    running.thread.join(10)
    assert isinstance(running.error, KeyboardInterrupt)


def test_a_slow_model_drops_frames_and_a_slow_client_results(running: Running) -> None:
    """The newest frame wins: delay does not grow, and what waits is one frame in each place."""

    async def visit(opened: Any) -> None:
        page = await opened()
        running.gate.delay = 0.05
        for _ in range(60):
            await page.send()
            await asyncio.sleep(0.005)
        head, _ = await page.shown()
        while head.sequence < 60:
            head, _ = await page.shown()
        report = await page.told("statistics")
        assert report["dropped"] > 20
        assert report["limit"].startswith("decode")
        assert report["latency_p95_ms"] < 4 * 50 + 100  # frames do not wait in queues

    served(running, visit)
    assert running.live.statistics.frames_out < 40


def test_frames_at_rest_are_repeated_until_a_setting_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.LiveFilter, "skip_probability", lambda self, cosine: 2.0)
    running = Running(LiveSettings(guidance="none", steps=1, similarity=0.5))

    async def visit(opened: Any) -> None:
        page = await opened()
        kinds = []
        for n in range(4):
            if n == 2:
                await page.socket.send_str(json.dumps({"type": "set", "seed": 9}))
                await page.told("settings")
                await asyncio.sleep(0.3)
            await page.send()
            kinds.append((await page.shown())[0].kind)
        assert kinds == [wire.RESULT, wire.REPEAT, wire.RESULT, wire.REPEAT]

    try:
        served(running, visit)
    finally:
        running.close()


def test_settings_without_effect_are_refused_by_name() -> None:
    running = Running(without={"prompt": "no CLIP is connected. Connect one."})
    try:
        with pytest.raises(ValueError, match="`prompt` has no effect here: no CLIP"):
            running.live.set({"prompt": "x"})
    finally:
        running.close()


def test_streams_are_counted_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_STREAMS", 2)
    streams = Streams()
    first = streams.open(LiveStream(LiveSettings()))
    streams.open(LiveStream(LiveSettings()))
    with pytest.raises(ValueError, match="at most 2 live streams"):
        streams.open(LiveStream(LiveSettings()))
    streams.close(first)
    assert first.ended == "Stopped."
    assert streams.find(first.id) is None
    with pytest.raises(ValueError, match="has ended"):
        first.join(None)  # type: ignore[arg-type]
    streams.open(LiveStream(LiveSettings()))
