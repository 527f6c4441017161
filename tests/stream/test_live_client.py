"""The server of `slipstream live`, `slipstream push` and OSC, against a stream of a toy model."""

from __future__ import annotations

import argparse
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from slipstream.cli import live, main
from slipstream.cli.live import run_live, stream_url
from slipstream.core.images import read_image
from slipstream.core.images import save_image as save
from slipstream.stream.live.client import Pushed, push
from slipstream.stream.live.server import Server
from slipstream.stream.live.session import STREAMS
from slipstream.stream.live.settings import LiveSettings
from slipstream.stream.video import Stamp, open_source
from slipstream_tests.stream.test_live import SIZE, Running

pytest.importorskip("aiohttp")


@pytest.fixture
def running() -> Iterator[Running]:
    found = Running()
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def server(running: Running) -> Iterator[Server]:
    with Server("127.0.0.1", 0, running.streams) as found:
        yield found


@pytest.fixture
def frames(tmp_path):
    for i in range(8):
        save(torch.full((1, 40, 60, 3), i / 8), tmp_path / "in" / f"{i}.png") if i else (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_the_page_and_its_modules_are_served_and_nothing_else(server: Server) -> None:
    page = urllib.request.urlopen(server.url).read().decode()
    assert "Slipstream live" in page
    for name in ("panel", "connection", "source", "wire"):
        answer = urllib.request.urlopen(f"{server.url}/{name}.js")
        assert answer.headers["Content-Type"].startswith("text/javascript")
    for path in (
        "/page.html",
        "/../pyproject.toml",
        "/%2e%2e/pyproject.toml",
        "/slipstream/live/",
        "/slipstream/live/none",
    ):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(server.url + path)


def test_a_taken_port_is_one_sentence(server: Server) -> None:
    with (
        pytest.raises(ValueError, match=r"Expected `port` to be free on 127\.0\.0\.1, but \d+ cannot be used"),
        Server("127.0.0.1", server.port),
    ):
        pass
    assert not [t for t in threading.enumerate() if t.name == "slipstream-server" and t is not server._thread]


def test_frames_are_pushed_at_their_pace_and_stored(server: Server, running: Running, frames, tmp_path, capsys) -> None:
    url = f"{server.url}/slipstream/live/{running.live.id}"
    out = tmp_path / "out"
    assert (
        main(["push", "--host", url, "--input", str(frames), "--out", str(out), "--fps", "20", "--strength", "0.3"])
        == 0
    )
    assert running.live.settings.strength == 0.3
    stored = sorted(out.iterdir())
    assert 4 <= len(stored) <= 7  # latest wins: a busy machine may drop some
    assert read_image(stored[0]).shape == (1, *SIZE, 3)
    said = capsys.readouterr()
    assert f"{len(stored)}/7 frames" in said.err
    assert said.out == f"{out}\n"


def test_a_push_ends_with_its_stream(server: Server, running: Running, frames) -> None:
    url = f"{server.url}/slipstream/live/{running.live.id}"
    ended = threading.Timer(0.5, lambda: running.live.end("Stopped."))
    ended.start()
    found = push(url, open_source(str(frames), 30), loop=True)
    assert found.ended == "Stopped."
    assert found.sent > 8
    assert len(found.delays) == found.shown


def test_what_others_push_is_stored(server: Server, running: Running, frames, tmp_path, capsys) -> None:
    """Without --input nothing is sent; the command ends with the stream, and the video has the times at which results came."""
    url = f"{server.url}/slipstream/live/{running.live.id}"
    codes: list[int] = []
    out = tmp_path / "seen.mkv"
    watching = threading.Thread(target=lambda: codes.append(main(["push", "--host", url, "--output", str(out)])))
    watching.start()
    while not running.live._members:
        time.sleep(0.02)
    found = push(url, open_source(str(frames), 20))
    running.live.end("Stopped.")
    watching.join(20)
    assert codes == [0]
    seen = list(open_source(str(out)))
    assert found.shown - 1 <= len(seen) <= found.shown
    assert seen[0][1].seconds == 0
    assert seen[-1][1].seconds == pytest.approx((len(seen) - 1) / 20, abs=0.15)
    said = capsys.readouterr()
    assert f"{len(seen)}/? frames" in said.err
    assert said.out == f"{out}\n"
    assert main(["push", "--host", url]) == 2
    assert "Expected --input, --output or both" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--loop"], 0), (None, 130)])
def test_ctrl_c_ends_what_has_no_end_and_cancels_what_has_one(
    frames, tmp_path, monkeypatch, capsys, options: list[str] | None, code: int
) -> None:
    """Without --input, or with --loop, there is no other end; what came is stored either way."""

    def pushing(url, source, sink, settings, loop, show):  # type: ignore[no-untyped-def]
        for number in range(3):
            sink.write(torch.zeros(16, 24, 3), Stamp(number, Fraction(1, 10)))
            show(Pushed(sent=3, shown=number + 1))
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "push_frames", pushing)
    given = [] if options == [] else ["--input", str(frames), *(options or [])]
    out = tmp_path / "out.mkv"
    out.write_bytes(b"earlier")
    assert main(["push", "--host", "a:1/b", "--out", str(out), *given]) == code
    if code:
        (kept,) = tmp_path.glob("out.part-*.mkv")
        assert f"cancelled: 3 frames are in {kept}" in capsys.readouterr().err
    else:
        kept = out
    assert len(list(open_source(str(kept)))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "/slipstream/live/nothing"}, "no stream of this name"),
        ({"settings": {"strength": 7}}, "`strength`"),
    ],
)
def test_what_cannot_be_pushed_is_said(server: Server, running: Running, frames, change, message) -> None:
    url = server.url + change.get("url", f"/slipstream/live/{running.live.id}")
    with pytest.raises(ValueError, match=message):
        push(url, open_source(str(frames), 5), settings=change.get("settings"))


def test_a_second_producer_is_refused(server: Server, running: Running, frames) -> None:
    url = f"{server.url}/slipstream/live/{running.live.id}"
    first = threading.Thread(target=lambda: push(url, open_source(str(frames), 30), loop=True))
    first.start()
    while running.live.statistics.frames_out < 1:
        time.sleep(0.02)
    with pytest.raises(ValueError, match="another client does"):
        push(url, open_source(str(frames)))
    running.live.end("Stopped.")
    first.join(20)
    assert not first.is_alive()


def test_a_server_that_is_not_there_is_one_sentence(frames, capsys) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["push", "--host", f"127.0.0.1:{port}/slipstream/live/x", "--input", str(frames)]) == 2
    assert "argument --host: Expected `host` to be the address of a running live stream" in capsys.readouterr().err


def test_addresses() -> None:
    assert stream_url("http://a:1/slipstream/live/x") == "http://a:1/slipstream/live/x"
    assert stream_url("https://a/#x") == "https://a/slipstream/live/x"
    assert stream_url("a:8189/#x") == "http://a:8189/slipstream/live/x"
    for bad in ("", "a:1", "http://a:1/", "file:///etc/passwd", "http:///x"):
        with pytest.raises(ValueError, match="`host`"):
            stream_url(bad)


def test_osc_sets_settings_and_survives_what_it_does_not_know(running: Running, caplog) -> None:
    udp_client = pytest.importorskip("pythonosc.udp_client")
    from slipstream.stream.live.osc import OscServer

    with OscServer("127.0.0.1", 0, lambda: running.live) as osc:
        with pytest.raises(ValueError, match="Expected `osc` to be a free port"):
            OscServer("127.0.0.1", osc.port, lambda: None)
        client = udp_client.SimpleUDPClient("127.0.0.1", osc.port)
        client.send_message("/slipstream/strength", 9.0)
        client.send_message("/elsewhere", 1)
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"no osc", ("127.0.0.1", osc.port))
        client.send_message("/slipstream/t_index_list", [10, 20])
        client.send_message("/slipstream/prompt", "a red circle")
        end = time.monotonic() + 10
        while running.live.settings.prompt != "a red circle" and time.monotonic() < end:
            time.sleep(0.02)
    assert running.live.settings.t_index_list == (10, 20)
    assert running.live.settings.prompt == "a red circle"
    assert "OSC: Expected `strength`" in caplog.text


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("steps", (2.0,), 2),
        ("strength", (0.25,), 0.25),
        ("strength", (1.0,), 1.0),
        ("t_index_list", (32.0, 45.0), (32, 45)),
        ("t_index_list", (32,), (32,)),
        ("t_index_list", ("10,20",), (10, 20)),
        ("prompt", ("a, b",), "a, b"),
    ],
)
def test_osc_takes_what_faders_send(name: str, values: tuple[Any, ...], wanted: Any) -> None:
    from slipstream.stream.live.osc import setting_of

    assert getattr(LiveSettings().changed(setting_of(name, values)), name) == wanted
    with pytest.raises(ValueError, match="`steps` to be an integer"):
        LiveSettings().changed(setting_of("steps", (2.5,)))


def test_osc_reaches_a_stream_of_another_process(server: Server, running: Running, caplog) -> None:
    """What it refuses is logged, and the command ends with the stream."""
    udp_client = pytest.importorskip("pythonosc.udp_client")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"{server.url}/slipstream/live/{running.live.id}"
    command = threading.Thread(target=lambda: main(["osc", "--host", url, "--osc", str(port)]))
    command.start()
    client, end = udp_client.SimpleUDPClient("127.0.0.1", port), time.monotonic() + 20
    while running.live.settings.strength != 0.25 and time.monotonic() < end:
        client.send_message("/slipstream/strength", 0.25)
        client.send_message("/slipstream/steps", 0)
        time.sleep(0.05)
    assert running.live.settings.strength == 0.25
    while not running.live.refused["setting"] and time.monotonic() < end:
        time.sleep(0.02)
    assert running.live.refused["setting"]
    running.live.end("Stopped.")
    command.join(20)
    assert not command.is_alive()


def test_the_command_on_the_bundled_model(frames, tmp_path, caplog) -> None:
    """`live` serves and runs, `push` changes the prompt; Stop in the page ends it with `--once`."""
    parser_args = ["live", "--port", "0", "--once", "--steps", "1", "--size", "64x64", "--prompt", "a red circle"]
    from slipstream.cli import build_parser

    args: argparse.Namespace = build_parser().parse_args(parser_args)
    caplog.set_level("INFO")
    command = threading.Thread(target=run_live, args=(args,))
    command.start()
    end = time.monotonic() + 60
    while "--host" not in caplog.text and time.monotonic() < end:
        time.sleep(0.05)
    url = caplog.text.split("--host ")[1].split()[0]
    found = push(url, open_source(str(frames), 10), settings={"prompt": "a green square", "crossfade": 2})
    assert found.shown >= 1
    stream = STREAMS.find(url.rsplit("/", 1)[1])
    assert stream is not None
    assert stream.settings.prompt == "a green square"
    stream.end("Stopped.")
    command.join(30)
    assert not command.is_alive()
    assert "ended: Stopped." in caplog.text
