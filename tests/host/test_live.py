"""Live Stream in the host: frames through the pack's own route on the host's server, settings while it runs, and every way it ends."""

from __future__ import annotations

import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from graph import DEVICE, node
from slipstream.core.images import save_image
from slipstream.stream.live import client
from slipstream.stream.video import open_source
from slipstream_tests.host.test_stream import pictures, text_of

pytest.importorskip("aiohttp")
SIZE = 64
LIVE = {
    "prompt": "", "width": SIZE, "height": SIZE, "strength": 0.6, "steps": 1, "guidance": "none", "guidance_scale": 1.0, "seed": 2,
    "crossfade": 3, "feedback": 0.0, "similarity": 1.0, "keep": 3, "panel": "",
}  # fmt: skip
RED, GREEN = "a large red circle on a blue background", "a large yellow circle on a green background"


def graph_of(clip: bool = True, **changes: Any) -> dict[str, Any]:
    sockets = {
        "model": ["1", 0],
        "vae": ["1", 2],
        "positive": ["p", 0],
        "negative": ["n", 0],
        **({"clip": ["1", 1]} if clip else {}),
    }
    return {
        "1": node("SlipstreamLoadModel", model="pocket-lcm"),
        "p": node("CLIPTextEncode", clip=["1", 1], text=RED),
        "n": node("CLIPTextEncode", clip=["1", 1], text=""),
        "live": node("SlipstreamLiveStream", **{**sockets, **LIVE, **changes}),
        "out": node("SaveImage", images=["live", 0], filename_prefix="live"),
        "text": node("PreviewAny", source=["live", 1]),
    }


@pytest.fixture
def frames(tmp_path: pathlib.Path) -> pathlib.Path:
    for i in range(6):
        image = torch.full((1, 48, 64, 3), 0.4)
        image[:, 10:30, 5 + 6 * i : 25 + 6 * i, 0] = 0.9
        (tmp_path / "in").mkdir(exist_ok=True)
        save_image(image, tmp_path / "in" / f"{i}.png")
    return tmp_path / "in"


class Pushing:
    """Frames that are pushed in a thread for as long as the stream runs, with the last that came back."""

    def __init__(self, url: str, frames: pathlib.Path, **settings: Any) -> None:
        self.found: client.Pushed | None = None
        self.shown: list[np.ndarray] = []
        self.thread = threading.Thread(target=self._run, args=(url, frames, settings))
        self.error: Exception | None = None
        self.thread.start()

    def check(self, height: int, width: int) -> None:
        assert (height, width) == (SIZE, SIZE)

    def write(self, image: torch.Tensor, stamp: Any) -> None:
        self.shown.append(image.numpy())

    def _run(self, url: str, frames: pathlib.Path, settings: dict[str, Any]) -> None:
        try:
            self.found = client.push(url, open_source(str(frames), 10), self, settings, loop=True)  # type: ignore[arg-type]
        except Exception as error:
            self.error = error

    def until(self, count: int) -> None:
        """Wait until so many more frames have come back."""
        wanted, end = len(self.shown) + count, time.monotonic() + 60
        while len(self.shown) < wanted:
            assert self.error is None, self.error
            assert time.monotonic() < end, "no frames come back"
            time.sleep(0.05)

    def join(self) -> None:
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def live(host: Any, frames: pathlib.Path) -> Iterator[Callable[..., tuple[Any, Pushing]]]:
    """Start a graph and push frames into it; what is still running at the end is cancelled."""
    started: list[tuple[Any, Pushing]] = []

    def start(graph: dict[str, Any], **settings: Any) -> tuple[Any, Pushing]:
        running = host.submit(graph)
        event = running.wait_for(lambda event: event.type == "slipstream.live", timeout=120)
        started.append((running, Pushing(f"{host.url}/slipstream/live/{event.data['stream']}", frames, **settings)))
        return started[-1]

    yield start
    for running, pushing in started:
        if pushing.thread.is_alive():
            running.interrupt()
        pushing.join()


def send(pushing: Pushing, message: dict[str, Any], url: str) -> list[dict[str, Any]]:
    """Join as another page, send one message, and return what is told until a moment later."""
    import asyncio
    import json

    import aiohttp

    async def visit() -> list[dict[str, Any]]:
        told = []
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            await socket.send_str(json.dumps(message))
            end = time.monotonic() + 1.0
            while (left := end - time.monotonic()) > 0:
                try:
                    found = await asyncio.wait_for(socket.receive(), left)
                except asyncio.TimeoutError:
                    break
                if found.type != aiohttp.WSMsgType.TEXT:
                    if found.type != aiohttp.WSMsgType.BINARY:
                        break
                    continue
                told.append(json.loads(found.data))
        return told

    return asyncio.run(visit())


def url_of(host: Any, running: Any) -> str:
    event = running.wait_for(lambda event: event.type == "slipstream.live", timeout=1)
    return f"{host.url}/slipstream/live/{event.data['stream']}"


def test_frames_go_round_and_the_last_ones_come_out(host: Any, live: Any) -> None:
    running, pushing = live(graph_of())
    pushing.until(5)
    send(pushing, {"type": "stop"}, url_of(host, running))
    result = running.wait(60)
    found = pictures(result)
    assert found.shape == (3, SIZE, SIZE, 3)
    assert "limited by" in text_of(result)
    assert "ended: Stopped." in text_of(result)
    pushing.join()
    assert pushing.found is not None
    assert pushing.found.ended == "Stopped."


def test_a_prompt_typed_live_is_seen_within_the_crossfade(host: Any, live: Any) -> None:
    """The background turns from blue to green, at the latest N frames and the crossfade later."""
    running, pushing = live(graph_of(strength=0.95))
    pushing.until(4)
    blue = pushing.shown[-1].reshape(-1, 3).mean(0)
    told = send(pushing, {"type": "set", "prompt": GREEN}, url_of(host, running))
    assert any(t["type"] == "settings" and t["settings"]["prompt"] == GREEN for t in told)
    pushing.until(3 + 1 + 3)  # crossfade, steps, and those that were on their way
    green = pushing.shown[-1].reshape(-1, 3).mean(0)
    assert blue[2] > blue[1]
    assert green[1] > green[2], (blue, green)
    # Another one in the middle of a fade, other steps and a negative prompt: nothing breaks.
    for change in (
        {"prompt": RED},
        {"prompt": "a square"},
        {"steps": 3, "guidance": "full", "guidance_scale": 2.0},
        {"negative": "a circle"},
    ):
        send(pushing, {"type": "set", **change}, url_of(host, running))
    pushing.until(5)
    told = send(pushing, {"type": "set", "strength": 7}, url_of(host, running))
    assert any(t["type"] == "refused" and "`strength`" in t["reason"] for t in told)


def test_without_a_clip_prompts_are_refused_by_name(host: Any, live: Any) -> None:
    running, pushing = live(graph_of(clip=False))
    pushing.until(1)
    told = send(pushing, {"type": "set", "prompt": "x"}, url_of(host, running))
    assert any(t["type"] == "refused" and "no CLIP is connected" in t["reason"] for t in told)


@pytest.mark.parametrize("keep", [True, False])
def test_cancel_ends_it(host: Any, live: Any, keep: bool) -> None:
    running, pushing = live(graph_of(on_interrupt="return finished frames" if keep else "discard"))
    pushing.until(3)
    running.interrupt()
    result = running.wait(60)
    pushing.join()
    assert pushing.found is not None
    assert pushing.found.ended == "Cancelled in ComfyUI."
    if keep:
        assert len(pictures(result)) == 3
    else:
        assert result.status == "interrupted"


def test_free_while_it_runs_changes_nothing_and_the_host_goes_on(host: Any, live: Any) -> None:
    running, pushing = live(graph_of())
    pushing.until(2)
    host.free()
    pushing.until(3)
    send(pushing, {"type": "stop"}, url_of(host, running))
    assert running.wait(60).ok
    again, more = live(graph_of(seed=3))
    more.until(2)
    send(more, {"type": "stop"}, url_of(host, again))
    assert again.wait(60).ok


def test_a_model_that_fails_is_told_and_raised(host: Any, live: Any) -> None:
    graph = graph_of(guidance="self", guidance_scale=1.2)
    graph["live"]["inputs"]["model"] = ["bad", 0]
    graph["bad"] = node("ProbeCount", model=["1", 0], name="live", spoiled=True)
    running, pushing = live(graph)
    result = running.wait(60)
    pushing.join()
    assert result.status == "error"
    assert pushing.found is not None
    assert "finite" in pushing.found.ended
    assert "finite" in result.explain()


def test_a_run_that_no_page_queued_tells_its_id_in_the_log(host: Any, frames: pathlib.Path) -> None:
    """It would hold the queue for minutes, and nobody could find it."""
    before = len(host.log())
    host.post("/prompt", {"prompt": graph_of()})
    end = time.monotonic() + 60
    while (told := re.search(r"no page queued this run.*?--host (\S+)", host.log()[before:], re.DOTALL)) is None:
        assert time.monotonic() < end, host.log_tail()
        time.sleep(0.1)
    url = told[1].split("/slipstream/")
    found = client.push(f"{host.url}/slipstream/{url[1]}", open_source(str(frames), 10))
    assert found.shown > 0
    host.interrupt()
    while any(host.queue().values()):
        assert time.monotonic() < end, "the host still runs"
        time.sleep(0.1)


def test_a_page_of_another_origin_is_refused(host: Any, live: Any) -> None:
    running, pushing = live(graph_of())
    pushing.until(1)
    path = url_of(host, running)[len(host.url) :]
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert host.request("GET", path, headers={**upgrade, "Origin": "http://elsewhere.example"})[0] == 403
    assert host.request("GET", "/slipstream/live/nothing", headers=upgrade)[0] == 404


@pytest.mark.parametrize("priority", ["throughput", "3"])
def test_frames_that_share_a_call_or_go_side_by_side_are_shown_and_what_has_no_effect_is_said(
    host: Any, live: Any, priority: str
) -> None:
    running, pushing = live(graph_of(priority=priority, acceleration="graph"))
    pushing.until(6)
    send(pushing, {"type": "set", "prompt": GREEN, "steps": 2}, url_of(host, running))
    pushing.until(4)
    told = send(pushing, {"type": "set", "feedback": 0.4}, url_of(host, running))
    assert any(t["type"] == "settings" and t["settings"]["feedback"] == 0.4 for t in told)
    pushing.until(2)
    send(pushing, {"type": "stop"}, url_of(host, running))
    result = running.wait(60)
    on_cpu = DEVICE == "cpu"
    assert ("`acceleration` has no effect: CUDA graphs need a CUDA device." in text_of(result)) == on_cpu
    forgone = "`priority` has no effect: calls side by side need recordings"
    assert (forgone in text_of(result)) == (on_cpu and priority == "3")


@pytest.mark.parametrize("typed", ["", "a large green square"])
def test_a_controlnet_stays_on_a_prompt_that_is_typed(host: Any, live: Any, frames: pathlib.Path, typed: str) -> None:
    """Also on one that was typed before the start, and its frames are those of that prompt with the ControlNet."""
    _, *moving = sorted(frames.iterdir())
    for image in moving:  # what is left is at rest, so that only the ControlNet tells the results apart
        image.unlink()
    graph = graph_of(strength=0.9, crossfade=0, prompt=typed)
    graph["i"] = node("EmptyImage", width=SIZE, height=SIZE, batch_size=1, color=0x40C020)
    graph["c"] = node("ProbeTinyControlNet", model=["1", 0])
    graph["a"] = node(
        "ControlNetApplyAdvanced", positive=["p", 0], negative=["n", 0], control_net=["c", 0], image=["i", 0], strength=1.0,
        start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    images = []
    for strength in (1.0, 0.0):
        graph["a"]["inputs"]["strength"] = strength
        graph["live"]["inputs"].update(positive=["a", 0], negative=["a", 1])
        running, pushing = live(graph)
        pushing.until(2)
        told = send(pushing, {"type": "set", "prompt": GREEN}, url_of(host, running))
        assert not [t for t in told if t["type"] == "refused"]
        pushing.until(1 + 3 + 2)  # steps, those that were on their way, and two of the new prompt
        send(pushing, {"type": "stop"}, url_of(host, running))
        assert running.wait(60).ok
        assert np.array_equal(*pushing.shown[-2:])
        images.append(pushing.shown[-1].astype(float))
    assert np.abs(images[0] - images[1]).mean() > 0.5, "the ControlNet acts under the typed prompt"
