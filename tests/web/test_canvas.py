"""The canvas in a page without a host: the same geometry as in Python, and what mouse, keys and touch do (`checks.js`)."""

from __future__ import annotations

import functools
import http.server
import json
import os
import pathlib
import queue
import shutil
import subprocess
import threading
from typing import Any

import pytest
import torch
from slipstream.core.drawing import Drawing, paint, read_drawing
from slipstream.core.masks import bounding_box
from slipstream.core.points import read_pairs, read_points, write_points
from slipstream.cow.canvas import canvas_size, place, plain_background
from slipstream.edit.geometry import Affine
from slipstream.nodes.edit import around

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHECKS = 38

POINTS = [
    "", "[]", '[{"x": 12, "y": 8.5}]', "[[1, 2], [3, 4]]", '{"positive": [{"x": 5, "y": 6}], "negative": [{"x": 1, "y": 1}]}', "12, 8",
    '[[{"x": 1, "y": 2}, {"x": 3, "y": 4}]]', "12,8 30,-4; 5,6", "-1.5, .5\n2,3", '{"x": 7, "y": 8}',
]  # fmt: skip
PAIRS = [
    "60, 60 -> 90.5, 60\n\n-1,2->3 , 4", "12,8:30,40", "1,2:3,4 5,6:7,8", '[[{"x": 1, "y": 2}, {"x": 9, "y": 9}, {"x": 3, "y": 4}]]',
    "[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]", "1,2 -> 3,4; 5,6 -> 7,8",
]  # fmt: skip
DRAWINGS: list[tuple[list[dict[str, Any]], tuple[int, int]]] = [
    ([{"box": [10, 20, 50, 60]}], (80, 70)),
    ([{"brush": [[20, 20], [60, 50]], "width": 16}], (80, 70)),
    ([{"brush": [[30, 30]], "width": 21}], (80, 70)),
    ([{"outline": [[10, 10], [70, 12], [40, 60]]}], (80, 70)),
    ([{"box": [10, 10, 60, 60]}, {"erase": [[10, 35], [60, 35]], "width": 10}], (80, 70)),
    ([{"box": [10, 10, 60, 60]}, {"erase": [[35, 35]], "width": 30}, {"brush": [[35, 35]], "width": 10}], (80, 70)),
    ([{"brush": [[0, 0], [200, 20]], "width": 12}], (80, 70)),
]


def seed_box(subject: tuple[int, int], canvas: tuple[int, int], scale: float, share: tuple[float, float]) -> list[int]:
    photo, keep = torch.ones(1, subject[1], subject[0], 3), torch.ones(1, subject[1], subject[0])
    found = place(photo, keep, plain_background(canvas[1], canvas[0]), scale, *share)
    top, left, bottom, right = bounding_box(found.keep[0])
    return [left, top, right, bottom]


def seed_canvas(width: int, height: int, photo: tuple[int, int] = (300, 200)) -> list[Any]:
    high, wide, filling = canvas_size(photo[::-1], width, height)
    return [photo, [width, height], [wide, high], filling]


def placed(centre: tuple[float, float], scale: float, angle: float, shift: tuple[float, float]) -> list[Any]:
    """Where the library's map takes a point: the one whose origin it is."""
    affine = Affine(centre, scale, shift, **({"angle": angle} if angle else {}))
    start = affine.inverse(torch.tensor([33.0, 44.0])).tolist()
    return [{"centre": centre, "scale": scale, "angle": angle, "shift": shift}, start, [33.0, 44.0]]


def cases() -> dict[str, Any]:
    """What the page compares itself with, all computed by the library."""
    drawn = []
    for shapes, (width, height) in DRAWINGS:
        drawing: Drawing = read_drawing(json.dumps({"size": [width, height], "shapes": shapes}))
        mask = paint(drawing, torch.zeros(height, width))
        top, left, bottom, right = bounding_box(mask)
        drawn.append([shapes, [width, height], int(mask.sum()), [left, top, right, bottom]])
    subjects = [
        ((40, 30), (128, 96), 1.0, (0.5, 1.0)),
        ((40, 30), (128, 96), 1.7, (0.3, 0.6)),
        ((33, 47), (64, 64), 1.0, (1.0, 0.0)),
    ]
    drags = [(((10.0, 10.0), (40.0, 50.0)), ((5.0, 5.0), (6.0, 5.0))), (((10.0, 10.0), (11.0, 10.0)),)]
    angles = (0.0, 90.0, -37.5) if "angle" in Affine.__dataclass_fields__ else (0.0,)
    return {
        "points": [[text, read_points(text)] for text in POINTS],
        "pairs": [[text, read_pairs(text)] for text in PAIRS],
        "written": [[read_points(text), write_points(read_points(text))] for text in POINTS],
        "placed": [placed((20.0, 30.0), scale, angle, (7.0, -3.0)) for scale in (0.5, 2.0) for angle in angles],
        "drawings": drawn,
        "seeds": [[*subject, seed_box(*subject)] for subject in subjects],
        "canvases": [seed_canvas(*sides) for sides in ((0, 0), (120, 0), (0, 160), (64, 96))],
        "around": [
            [pairs, [200, 160], [s.width for s in around(pairs, torch.zeros(1, 160, 200, 3))]] for pairs in drags
        ],
    }


class Server(http.server.ThreadingHTTPServer):
    """Serves the repository's files and /cases.json, and takes what the page found."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(ROOT)))
        self.cases = json.dumps(cases()).encode()
        self.results: queue.Queue[list[tuple[str, str]]] = queue.Queue()


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path != "/cases.json":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.cases)))
        self.end_headers()
        self.wfile.write(self.server.cases)

    def do_POST(self) -> None:
        self.server.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


BROWSERS = {
    "Chromium": (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"),
    "Firefox": (os.environ.get("FIREFOX"), "firefox", "firefox-esr"),
}
# Cameras that are none, which need no permission, and videos that play without a click.
CHROMIUM = (
    "--headless --no-sandbox --disable-gpu --no-proxy-server --remote-debugging-port=0 --use-fake-device-for-media-stream=device-count=2 "
    "--use-fake-ui-for-media-stream --autoplay-policy=no-user-gesture-required"
).split()
FIREFOX = {
    "media.navigator.permission.disabled": True, "media.navigator.streams.fake": True, "media.autoplay.default": 0,
    "media.autoplay.blocking_policy": 0, "network.proxy.type": 0,
}  # fmt: skip


def opened(name: str, page: str, profile: pathlib.Path) -> subprocess.Popen[bytes]:
    """Open a page in a browser without a window; skips the test where that browser is not installed."""
    path = next((path for program in BROWSERS[name] if program and (path := shutil.which(program))), None)
    if path is None:
        pytest.skip(f"no {name} here")  # tests/conftest.py counts this aloud
    command = [path, *CHROMIUM, f"--user-data-dir={profile}", page]
    if name == "Firefox":
        lines = [f"user_pref({json.dumps(key)}, {json.dumps(value)});" for key, value in FIREFOX.items()]
        (profile / "user.js").write_text("\n".join(lines))
        command = [path, "--headless", "--no-remote", "--profile", str(profile), page]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("name", BROWSERS)
def test_the_canvas_in_a_page_without_a_host(tmp_path: pathlib.Path, name: str) -> None:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser = opened(name, f"http://127.0.0.1:{server.server_port}/tests/web/page.html", tmp_path)
    except BaseException:
        server.shutdown()
        raise
    try:
        results = server.results.get(timeout=240)
    except queue.Empty:
        pytest.fail("the page did not come to its end")
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()
    wrong = "\n\n".join(f"{name}\n{error}" for name, error in results if error)
    assert not wrong, wrong
    assert len(results) >= CHECKS
