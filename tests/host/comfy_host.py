"""Start a private ComfyUI host, put one node pack into it, and drive it over its API.

Only the standard library is used, so any Python 3.10+ can run it; the host itself
runs in its own Python (the one with torch and ComfyUI's requirements).

    from comfy_host import ComfyHost

    with ComfyHost(packs=["."]) as host:          # COMFYUI_PATH, COMFYUI_PYTHON
        result = host.run(prompt)                 # API-format prompt
        assert result.ok, result.explain()
        png = result.files[0].read()

The command line has the same: see `python comfy_host.py --help`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid

READY_PATH = "/system_stats"
TERMINAL_EVENTS = ("execution_success", "execution_error", "execution_interrupted")
IMAGE_FORMATS = {1: "jpeg", 2: "png"}


class HostError(RuntimeError):
    """The host did not start, died, or did not answer as expected."""


class PackImportError(HostError):
    """The host started but could not import a linked node pack."""


class PromptRejected(HostError):
    """POST /prompt refused the graph (HTTP 400); `error` and `node_errors` say why."""

    def __init__(self, error, node_errors):
        self.error = error or {}
        self.node_errors = node_errors or {}
        super().__init__("\n".join([str(self.error.get("message", self.error)), *node_error_lines(self.node_errors)]))


def node_error_lines(node_errors):
    """One line for each thing that the host found wrong with a node's inputs."""
    return [
        f"  node {node_id} ({entry.get('class_type')}): {item.get('type')}: {item.get('message')} {item.get('details')}"
        for node_id, entry in node_errors.items()
        for item in entry.get("errors", [])
    ]


# --------------------------------------------------------------------------------------
# A small websocket client (RFC 6455, client side, no extensions).


class WebSocket:
    def __init__(self, host, port, path, timeout=30.0):
        self._sock = socket.create_connection((host, port), timeout=timeout)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = base64.b64encode(os.urandom(16)).decode()
        self._sock.sendall(
            (
                f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
                f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
                "Sec-WebSocket-Version: 13\r\n\r\n"
            ).encode()
        )
        self._buffer = b""
        while b"\r\n\r\n" not in self._buffer:
            chunk = self._sock.recv(4096)
            if not chunk:
                raise HostError("websocket handshake: connection closed")
            self._buffer += chunk
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n", 1)[0] + b" ":
            raise HostError(f"websocket handshake refused: {head[:200]!r}")
        self._sock.settimeout(None)
        self._send_lock = threading.Lock()

    def _read(self, n):
        while len(self._buffer) < n:
            chunk = self._sock.recv(max(65536, n - len(self._buffer)))
            if not chunk:
                raise ConnectionError("websocket closed")
            self._buffer += chunk
        data, self._buffer = self._buffer[:n], self._buffer[n:]
        return data

    def _send(self, opcode, payload):
        mask = os.urandom(4)
        n = len(payload)
        if n < 126:
            head = struct.pack(">BB", 0x80 | opcode, 0x80 | n)
        elif n < 65536:
            head = struct.pack(">BBH", 0x80 | opcode, 0x80 | 126, n)
        else:
            head = struct.pack(">BBQ", 0x80 | opcode, 0x80 | 127, n)
        body = bytes(b ^ mask[i % 4] for i, b in enumerate(payload))
        with self._send_lock:
            self._sock.sendall(head + mask + body)

    def send_text(self, text):
        self._send(0x1, text.encode())

    def receive(self):
        """Return the next message as str (text) or bytes (binary); None when closed."""
        parts, kind = [], None
        while True:
            b0, b1 = self._read(2)
            opcode, length = b0 & 0x0F, b1 & 0x7F
            if length == 126:
                (length,) = struct.unpack(">H", self._read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self._read(8))
            payload = self._read(length)
            if opcode == 0x8:
                return None
            if opcode == 0x9:
                self._send(0xA, payload)
                continue
            if opcode == 0xA:
                continue
            if opcode in (0x1, 0x2):
                kind = opcode
            parts.append(payload)
            if b0 & 0x80:
                data = b"".join(parts)
                return data.decode() if kind == 0x1 else data

    def close(self):
        with contextlib.suppress(OSError):
            self._send(0x8, b"")
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._sock.close()


# --------------------------------------------------------------------------------------
# What comes back from a run.


@dataclasses.dataclass
class Event:
    time: float  # seconds, time.monotonic()
    type: str  # a websocket message type, or "preview" / "text" / "binary"
    data: dict

    @property
    def node(self):
        return self.data.get("node", self.data.get("node_id"))


@dataclasses.dataclass
class OutputFile:
    node: str
    slot: str  # key of the node's UI output: "images", "gifs", "audio", ...
    filename: str
    subfolder: str
    type: str
    host: ComfyHost = dataclasses.field(repr=False)

    def read(self):
        return self.host.view(self.filename, self.subfolder, self.type)

    def save(self, folder):
        target = pathlib.Path(folder) / self.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.read())
        return target


@dataclasses.dataclass
class Result:
    prompt_id: str
    status: str  # "success", "error" or "interrupted"
    events: list
    outputs: dict  # node id -> its UI output
    files: list
    error: dict | None  # data of execution_error
    seconds: float  # from POST /prompt to the terminal event, on this side

    @property
    def ok(self):
        return self.status == "success"

    @property
    def cached_nodes(self):
        for event in self.events:
            if event.type == "execution_cached":
                return list(event.data.get("nodes", []))
        return []

    @property
    def executed_nodes(self):
        """Ids in the order in which the host began them (cached ones are not among them)."""
        return [e.data["node"] for e in self.events if e.type == "executing" and e.data.get("node")]

    @property
    def previews(self):
        return [e for e in self.events if e.type == "preview"]

    @property
    def warnings(self):
        """[(node id, text)] as the pack under test sent them while its nodes ran."""
        return [(e.data["node"], e.data["text"]) for e in self.events if e.type == "slipstream.warning"]

    def progress(self, node=None):
        """[(value, max)] as the progress bar got them, of one node or of all."""
        return [
            (e.data["value"], e.data["max"])
            for e in self.events
            if e.type == "progress" and (node is None or e.data.get("node") == str(node))
        ]

    def explain(self):
        if self.ok:
            return "success"
        if self.status == "interrupted":
            return "interrupted"
        error = self.error or {}
        trace = "".join(error.get("traceback", []))
        return (
            f"{error.get('node_type')} (node {error.get('node_id')}): "
            f"{error.get('exception_type')}: {error.get('exception_message')}\n{trace}"
        )


class Run:
    """A queued prompt whose events arrive in the background."""

    def __init__(self, host, client_id):
        self.host = host
        self.client_id = client_id
        self.prompt_id = None
        self.node_errors = {}  # outputs that the host left out because their inputs are bad, while it ran others
        self.events: list[Event] = []
        self._cond = threading.Condition()
        self._closed = False
        self._terminal = None
        self._finished = False
        self._on_event = None
        self._t0 = self._t1 = 0.0
        self._ws = WebSocket("127.0.0.1", host.port, f"/ws?clientId={client_id}")
        self._ws.send_text(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    # -- background ------------------------------------------------------------------

    def _pump(self):
        try:
            while (message := self._ws.receive()) is not None:
                event = self._decode(message)
                if event is not None:
                    self._add(event)
        except (OSError, ConnectionError):
            pass
        with self._cond:
            self._closed = True
            self._cond.notify_all()

    @staticmethod
    def _decode(message):
        now = time.monotonic()
        if isinstance(message, str):
            parsed = json.loads(message)
            return Event(now, parsed.get("type", "?"), parsed.get("data") or {})
        (kind,) = struct.unpack(">I", message[:4])
        if kind == 1:  # preview image: format, bytes
            (fmt,) = struct.unpack(">I", message[4:8])
            return Event(now, "preview", {"format": IMAGE_FORMATS.get(fmt, str(fmt)), "image": message[8:]})
        if kind == 3:  # progress text: node id, text
            (n,) = struct.unpack(">I", message[4:8])
            return Event(
                now,
                "text",
                {
                    "node": message[8 : 8 + n].decode(),
                    "text": message[8 + n :].decode("utf-8", "replace"),
                },
            )
        if kind == 4:  # preview image with a JSON head
            (n,) = struct.unpack(">I", message[4:8])
            meta = json.loads(message[8 : 8 + n])
            return Event(
                now,
                "preview",
                {
                    **meta,
                    "format": meta.get("image_type", "").split("/")[-1],
                    "image": message[8 + n :],
                },
            )
        return Event(now, "binary", {"kind": kind, "payload": message[4:]})

    def _add(self, event):
        with self._cond:
            self.events.append(event)
            mine = event.data.get("prompt_id") == self.prompt_id
            if mine and event.type in TERMINAL_EVENTS:
                self._terminal = event
            # The host writes /history between the terminal event and this one.
            if mine and event.type == "executing" and event.data.get("node") is None:
                self._t1 = event.time
                self._finished = True
            self._cond.notify_all()
        if self._on_event is not None:
            self._on_event(event)

    # -- foreground ------------------------------------------------------------------

    def wait_for(self, predicate, timeout=60.0):
        """Block until an event (past or coming) satisfies `predicate`; return it."""
        end = time.monotonic() + timeout
        seen = 0
        with self._cond:
            while True:
                while seen < len(self.events):
                    event = self.events[seen]
                    seen += 1
                    if predicate(event):
                        return event
                self.host.check_alive()
                if self._finished or self._closed:
                    raise HostError("the run ended before that event")
                self._cond.wait(min(1.0, max(0.0, end - time.monotonic())))
                if seen == len(self.events) and time.monotonic() >= end:
                    raise TimeoutError(f"no such event in {timeout} s")

    def wait(self, timeout=600.0):
        """Block until the host has finished with the prompt; return a Result."""
        end = time.monotonic() + timeout
        with self._cond:
            while not self._finished:
                self.host.check_alive()
                if self._closed:
                    raise HostError("the websocket closed before the run ended")
                if time.monotonic() >= end:
                    raise TimeoutError(
                        f"prompt {self.prompt_id} not finished in {timeout} s; "
                        f"last events: {[e.type for e in self.events[-5:]]}"
                    )
                self._cond.wait(1.0)
        self.close()
        kind = self._terminal.type if self._terminal else "execution_success"
        outputs = self.host.history(self.prompt_id).get(self.prompt_id, {}).get("outputs", {})
        files = []
        for node, ui in outputs.items():
            for slot, items in ui.items():
                for item in items if isinstance(items, list) else []:
                    if isinstance(item, dict) and "filename" in item:
                        files.append(
                            OutputFile(
                                node,
                                slot,
                                item["filename"],
                                item.get("subfolder", ""),
                                item.get("type", "output"),
                                self.host,
                            )
                        )
        return Result(
            prompt_id=self.prompt_id,
            status=kind.removeprefix("execution_"),
            events=list(self.events),
            outputs=outputs,
            files=files,
            error=self._terminal.data if kind == "execution_error" else None,
            seconds=self._t1 - self._t0,
        )

    def interrupt(self):
        self.host.interrupt(self.prompt_id)

    def close(self):
        self._ws.close()


# --------------------------------------------------------------------------------------
# The host process.


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class ComfyHost:
    """A ComfyUI process on a loopback port with its own temporary folders.

    comfyui, python   the ComfyUI checkout and the Python that can run it
                      (default: $COMFYUI_PATH and $COMFYUI_PYTHON)
    packs             node packs to link into custom_nodes: paths, or (name, path)
    models            {"checkpoints": ["/some/folder"], ...}: extra model folders
    settings          frontend settings to store before the start
    device            "cpu" (default) or "gpu"
    args, env         further host arguments and environment
    base              keep everything under this folder (default: a temporary one)
    keep              do not delete the temporary folder
    """

    def __init__(
        self,
        packs=(),
        *,
        comfyui=None,
        python=None,
        models=None,
        settings=None,
        device="cpu",
        args=(),
        env=None,
        base=None,
        keep=False,
        start_timeout=240.0,
        strict=True,
    ):
        comfyui = comfyui or os.environ.get("COMFYUI_PATH")
        python = python or os.environ.get("COMFYUI_PYTHON") or sys.executable
        if not comfyui or not (pathlib.Path(comfyui) / "main.py").is_file():
            raise HostError("set COMFYUI_PATH to a ComfyUI checkout (a folder with main.py)")
        self.comfyui = pathlib.Path(comfyui).resolve()
        self.python = str(python)
        self.packs = []
        for pack in packs:
            name, path = pack if isinstance(pack, tuple) else (None, pack)
            path = pathlib.Path(path).resolve()
            if not path.exists():
                raise HostError(f"no node pack at {path}")
            self.packs.append((name or path.name, path))
        self.models = models or {}
        self.settings = settings or {}
        self.device = device
        self.args = list(args)
        self.env = dict(env or {})
        self.strict = strict
        self.start_timeout = start_timeout
        self.process = None
        self.port = None
        self.start_seconds = None
        self._keep = keep or base is not None
        self.base = pathlib.Path(base) if base else None

    # -- life ------------------------------------------------------------------------

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        self.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self):
        return self.process.pid if self.process else None

    def _lay_out(self):
        if self.base is None:
            self.base = pathlib.Path(tempfile.mkdtemp(prefix="comfy-host-"))
        for name in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, path in self.packs:
            link = self.base / "custom_nodes" / name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(path, target_is_directory=path.is_dir())
        settings = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.0.0"}
        settings.update(self.settings)
        (self.base / "user/default/comfy.settings.json").write_text(json.dumps(settings))

    def _command(self):
        known = (self.comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        base = str(self.base)
        command = [self.python, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        optional = {
            "--base-directory": [base],
            "--user-directory": [f"{base}/user"],
            "--input-directory": [f"{base}/input"],
            "--output-directory": [f"{base}/output"],
            "--temp-directory": [base],
            "--database-url": [f"sqlite:///{base}/user/comfyui.db"],
            "--disable-auto-launch": [],
            "--disable-api-nodes": [],
        }
        if self.device == "cpu":
            optional["--cpu"] = []
        if self.models:
            # JSON is YAML, so no YAML library is needed to write this file.
            config = {
                f"extra_{folder}_{i}": {"base_path": str(path), folder: "."}
                for folder, paths in self.models.items()
                for i, path in enumerate([paths] if isinstance(paths, (str, os.PathLike)) else paths)
            }
            target = self.base / "extra_model_paths.yaml"
            target.write_text(json.dumps(config, indent=1))
            optional["--extra-model-paths-config"] = [str(target)]
        for flag, values in optional.items():
            if f'"{flag}"' in known:  # a host of another age may lack some of them
                command += [flag, *values]
        return command + self.args

    def start(self):
        self._lay_out()
        self.port = free_port()
        env = {
            **os.environ,
            "SLIPSTREAM_FOLDERS": tempfile.gettempdir(),  # tests keep their images there
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            # Tiny networks on shared cores: more threads spin against each other (measured: 100 times slower).
            **({"OMP_NUM_THREADS": "1"} if self.device == "cpu" else {}),
            **self.env,
        }
        self._log = open(self.base / "host.log", "wb")
        began = time.monotonic()
        self.process = subprocess.Popen(
            self._command(),
            cwd=self.comfyui,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                self.check_alive()
                with contextlib.suppress(OSError, HostError, http.client.HTTPException):
                    self.get(READY_PATH, timeout=5)
                    break
                if time.monotonic() - began > self.start_timeout:
                    raise HostError(f"host not ready in {self.start_timeout} s\n{self.log_tail()}")
                time.sleep(0.05)
            self.start_seconds = time.monotonic() - began
            if self.strict:
                status = self.pack_import_status()
                if not all(status.values()):
                    raise PackImportError(f"import failed, or not found in the log: {status}\n{self.log_tail(60)}")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, timeout=10.0):
        """End the process that was started here (by its pid) and remove its folder."""
        process, self.process = self.process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout)
        with contextlib.suppress(AttributeError):
            self._log.close()
        if self.base is not None and not self._keep:
            shutil.rmtree(self.base, ignore_errors=True)

    def check_alive(self):
        if self.process is None:
            raise HostError("the host is not running")
        if self.process.poll() is not None:
            raise HostError(f"the host exited with {self.process.returncode}\n{self.log_tail()}")

    def log(self):
        try:
            return (self.base / "host.log").read_text(encoding="utf-8", errors="replace")
        except (OSError, TypeError):
            return ""

    def log_tail(self, lines=40):
        return "\n".join(self.log().splitlines()[-lines:])

    def _import_lines(self):
        """(pack name, seconds, imported) of each line in the host's log of import times; newer hosts colour them."""
        pattern = re.compile(r"([\d.]+) seconds( \(IMPORT FAILED\))?: (.+?)\s*$")
        for line in self.log().splitlines():
            found = pattern.search(re.sub(r"\x1b\[[\d;]*m", "", line))
            name = found and pathlib.PurePath(found.group(3)).name
            if name in dict(self.packs):
                yield name, float(found.group(1)), found.group(2) is None

    def pack_import_status(self):
        """{pack name: True / False / None}, from the host's log of import times."""
        return {name: None for name, _ in self.packs} | {name: ok for name, _, ok in self._import_lines()}

    def pack_import_seconds(self):
        """{pack name: seconds}, as the host logged them (one decimal)."""
        return {name: seconds for name, seconds, _ in self._import_lines()}

    # -- HTTP ------------------------------------------------------------------------

    def request(self, method, path, body=None, headers=None, timeout=60.0):
        """(status, headers, bytes) of one HTTP request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            if body is not None and not isinstance(body, (bytes, bytearray)):
                body = json.dumps(body).encode()
                headers = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def get(self, path, timeout=60.0):
        status, _, body = self.request("GET", path, timeout=timeout)
        if status != 200:
            raise HostError(f"GET {path}: HTTP {status}: {body[:300]!r}")
        return json.loads(body)

    def post(self, path, data=None, timeout=60.0):
        status, _, body = self.request("POST", path, {} if data is None else data, timeout=timeout)
        if status >= 400:
            raise HostError(f"POST {path}: HTTP {status}: {body[:300]!r}")
        return json.loads(body) if body.strip() else None

    def object_info(self, node=None):
        if node is None:
            return self.get("/object_info")
        return self.get("/object_info/" + urllib.parse.quote(node)).get(node)

    def pack_nodes(self, name=None):
        """{node id: object_info entry} of the linked pack(s)."""
        modules = {f"custom_nodes.{n.split('.')[0]}" for n, _ in self.packs if name in (None, n)}
        modules |= {f"custom_nodes.{n}" for n, _ in self.packs if name in (None, n)}
        info = self.object_info()
        return {k: v for k, v in info.items() if v.get("python_module") in modules}

    def queue(self):
        return self.get("/queue")

    def history(self, prompt_id=None):
        return self.get(f"/history/{prompt_id}" if prompt_id else "/history")

    def interrupt(self, prompt_id=None):
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self, unload_models=True, free_memory=True):
        """Ask the host to unload models and drop its output cache (done when idle)."""
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def view(self, filename, subfolder="", type="output"):
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        status, _, body = self.request("GET", f"/view?{query}")
        if status != 200:
            raise HostError(f"GET /view {filename}: HTTP {status}")
        return body

    def upload_image(self, path_or_bytes, name=None, overwrite=True):
        """Put an image into the host's input folder; returns the name LoadImage takes."""
        if isinstance(path_or_bytes, (bytes, bytearray)):
            content, name = bytes(path_or_bytes), name or "image.png"
        else:
            path = pathlib.Path(path_or_bytes)
            content, name = path.read_bytes(), name or path.name
        boundary = uuid.uuid4().hex
        body = (
            (
                f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\n'
                f"{'true' if overwrite else 'false'}\r\n"
                f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n"
            ).encode()
            + content
            + f"\r\n--{boundary}--\r\n".encode()
        )
        status, _, answer = self.request(
            "POST",
            "/upload/image",
            body,
            {"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
        if status != 200:
            raise HostError(f"upload of {name}: HTTP {status}")
        return json.loads(answer)["name"]

    # -- runs ------------------------------------------------------------------------

    def submit(self, prompt, *, targets=None, extra_data=None, on_event=None):
        """Queue an API-format prompt; return a Run. PromptRejected if it is not valid."""
        self.check_alive()
        if "prompt" in prompt and "class_type" not in prompt.get("prompt", {}):
            prompt = prompt["prompt"]
        run = Run(self, uuid.uuid4().hex)
        run._on_event = on_event
        run.prompt_id = str(uuid.uuid4())
        body = {"prompt": prompt, "client_id": run.client_id, "prompt_id": run.prompt_id}
        if targets is not None:
            body["partial_execution_targets"] = [str(t) for t in targets]
        if extra_data:
            body["extra_data"] = extra_data
        run._t0 = time.monotonic()
        status, _, answer = self.request("POST", "/prompt", body)
        parsed = json.loads(answer) if answer.strip() else {}
        if status != 200:
            run.close()
            raise PromptRejected(parsed.get("error"), parsed.get("node_errors"))
        run.node_errors = parsed.get("node_errors") or {}
        with run._cond:
            if parsed.get("prompt_id", run.prompt_id) != run.prompt_id:
                # A host that gives its own id: look again at what has come already.
                run.prompt_id = parsed["prompt_id"]
                early, run.events = run.events, []
            else:
                early = []
        for event in early:
            run._add(event)
        return run

    def run(self, prompt, *, timeout=600.0, **kwargs):
        """Queue a prompt and wait for its end; return a Result (also for a node's error)."""
        return self.submit(prompt, **kwargs).wait(timeout)


def load_prompt(path):
    """An API-format prompt from a file: the graph itself, or {"prompt": graph}."""
    data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if "nodes" in data and "links" in data:
        raise HostError(
            f"{path} is a UI-format workflow; POST /prompt needs the API format "
            "(frontend menu: Workflow > Export (API))"
        )
    return data.get("prompt", data) if "class_type" not in data else data


def available():
    """True where the environment names a host, so that tests can skip where none is."""
    path = os.environ.get("COMFYUI_PATH")
    return bool(path) and (pathlib.Path(path) / "main.py").is_file()


# --------------------------------------------------------------------------------------
# Command line.


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", help="ComfyUI checkout (default: $COMFYUI_PATH)")
    parser.add_argument("--python", help="its Python (default: $COMFYUI_PYTHON)")
    parser.add_argument("--pack", action="append", default=[], help="node pack folder, repeatable")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--host-arg", action="append", default=[], help="passed on to main.py")
    sub = parser.add_subparsers(dest="command", required=True)
    sub.add_parser("check", help="start, list the pack's nodes, stop; fails on an import error")
    info = sub.add_parser("info", help="print /object_info of the pack, or of one node")
    info.add_argument("node", nargs="?")
    run = sub.add_parser("run", help="run API-format prompt files one after another")
    run.add_argument("prompt", nargs="+")
    run.add_argument("--image", action="append", default=[], help="upload to the input folder")
    run.add_argument("--out", default="host-out", help="folder for the downloaded files")
    run.add_argument("--timeout", type=float, default=600)
    bench = sub.add_parser("bench", help="overhead of a prompt: run it N times, milliseconds")
    bench.add_argument("prompt")
    bench.add_argument("--vary", help="NODE.INPUT to count up, so that the cache does not answer")
    bench.add_argument("-n", type=int, default=20)
    serve = sub.add_parser("serve", help="start and stay until Ctrl-C")
    serve.add_argument("--seconds", type=float, default=None)
    return parser


def main(argv=None):
    args = _parser().parse_args(argv)
    host = ComfyHost(
        args.pack,
        comfyui=args.comfyui,
        python=args.python,
        device=args.device,
        args=args.host_arg,
    )
    failed = 0
    with host:
        print(f"ready in {host.start_seconds:.1f} s at {host.url} (pid {host.pid})", flush=True)
        if args.command == "check":
            for node, entry in sorted(host.pack_nodes().items()):
                flags = [f for f in ("deprecated", "experimental", "output_node") if entry.get(f)]
                print(f"{node:40} {entry['category']:32} {entry['display_name']} {flags or ''}")
            print(f"import seconds: {host.pack_import_seconds()}")
        elif args.command == "info":
            data = host.object_info(args.node) if args.node else host.pack_nodes()
            print(json.dumps(data, indent=2))
        elif args.command == "run":
            for image in args.image:
                print("uploaded", host.upload_image(image))
            for path in args.prompt:
                try:
                    result = host.run(load_prompt(path), timeout=args.timeout)
                except PromptRejected as error:
                    print(f"{path}: rejected: {error}")
                    failed += 1
                    continue
                print(
                    f"{path}: {result.status} in {result.seconds:.3f} s, "
                    f"{len(result.executed_nodes)} nodes ran, {len(result.cached_nodes)} cached, "
                    f"{len(result.previews)} previews"
                )
                if not result.ok:
                    print(result.explain())
                    failed += 1
                for file in result.files:
                    print("  ", file.node, file.save(args.out))
        elif args.command == "bench":
            prompt, times = load_prompt(args.prompt), []
            for i in range(args.n + 2):
                if args.vary:
                    node, name = args.vary.split(".", 1)
                    prompt[node]["inputs"][name] = i
                result = host.run(prompt)
                if not result.ok:
                    raise SystemExit(result.explain())
                times.append(result.seconds * 1000)
            times = times[2:]  # the first ones warm up
            print(
                f"{args.n} runs: median {statistics.median(times):.2f} ms, min {min(times):.2f}, max {max(times):.2f}"
            )
        elif args.command == "serve":
            with contextlib.suppress(KeyboardInterrupt):
                end = time.monotonic() + (args.seconds or float("inf"))
                while time.monotonic() < end:
                    host.check_alive()
                    time.sleep(0.5)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
