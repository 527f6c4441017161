"""Faults injected everywhere, and what survives: `python benchmarks/faults.py [--write]` prints the table of docs/figures/reliability.md.

With COMFYUI_PATH (and COMFYUI_PYTHON) set, every node that samples is tried too, in the host (tests/host/fault_checks.py); that takes
minutes, and `--nodes FILE` takes the lines that the script has printed before instead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import _common
import slipstream
import torch
from slipstream.cli import main as run_command
from slipstream.cli.progress import Progress
from slipstream.core.guidance import CFG, RCFG
from slipstream.core.images import encode_jpeg, read_image, save_image
from slipstream.core.noise import SeededNoise
from slipstream.core.reuse import ReuseSpan, reusing
from slipstream.core.samplers import sample
from slipstream.core.schedules import make_sigmas
from slipstream.cow import CowConfig, generate
from slipstream.edit import EditConfig, Move, invert, prepare_draft, sample_draft
from slipstream.lmd import FillConfig, LatentFill, RegenerateConfig, TrainConfig, regenerate, train
from slipstream.search import ModelPath, Schedule, SearchConfig, search
from slipstream.stream import BlendedStream, PromptBlend, StreamBatch, StreamConfig
from slipstream.stream.live import wire
from slipstream.stream.live.session import LiveStream
from slipstream.stream.live.settings import LiveSettings
from slipstream.stream.queues import StreamThreads
from slipstream.stream.sinks import open_sink
from slipstream.stream.video import open_source
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.edit import small
from slipstream_tests.search import jobs

DOCUMENT = _common.ROOT / "docs" / "figures" / "reliability.md"
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"
FILL = FillConfig(2, 8, 8, dim=32, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
TRAINING = TrainConfig(steps=12, batch=8)
VIDEOS = (".mp4", ".mkv", ".webm", ".avi")
ANIMATIONS = (".gif", ".webp", ".apng")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNALLED_AT = 3  # the frame, evaluation or step of a command after which a signal comes
COMMANDS = {
    "stream": "--input {place}/in --out {place}/out.mp4 --steps 1 --guidance none",
    "search": "--size 32x32 --pairs 2 --steps 2 --evaluations 8 --store {place}/a.sqlite --out {place}/out.json",
    "lmd train": "--images {place}/in --size 64x64 --patch 2 --steps 6 --batch 2 --out {place}/out.safetensors",
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a fault at a place, how often it was tried, how often nothing was lost, and what was."""

    fault: str
    place: str
    tried: int
    survived: int
    lost: str = "nothing"

    def __str__(self) -> str:
        return f"| {self.fault} | {self.place} | {self.tried} | {self.survived} | {self.lost} |"


class Failing(GaussianDenoiser):
    """Raises `error` at its call number `at`, counted from 1."""

    def __init__(self, at: int = 0, error: BaseException | None = None) -> None:
        super().__init__()
        self.at, self.error = at, error

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        if self.error is not None and self.calls + 1 == self.at:
            raise self.error
        return super().__call__(x, sigma, cond)


# ------------------------------------------------------------------------------------------------ techniques


def latents() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def mask() -> torch.Tensor:
    keep = torch.zeros(1, 64, 64)
    keep[:, 16:48, 16:48] = 1
    return keep


def cow(model: GaussianDenoiser) -> torch.Tensor:
    config = CowConfig(steps=6, cycles=2)
    return generate(model, latents(), mask(), constant_cond(), constant_cond(), config, SeededNoise(0)).latents


def stream(model: GaussianDenoiser) -> torch.Tensor:
    batch = StreamBatch(
        model, constant_cond(), constant_cond(), StreamConfig(steps=3, guidance="onetime", cfg_scale=1.5)
    )
    frames = [frame for _ in range(4) for frame in batch.push(latents())]
    return torch.cat([frame.latents for frame in [*frames, *batch.drain()]])


def masked(model: GaussianDenoiser) -> torch.Tensor:
    config = RegenerateConfig(rounds=2, steps=3)
    return regenerate(model, latents(), constant_cond(), constant_cond(), config, SeededNoise(0)).latents


def edited(model: GaussianDenoiser) -> torch.Tensor:
    config = EditConfig(steps=6, mode="draft", cfg_scale=2.0)
    image, cond = small.picture(), constant_cond()
    photo = invert(model, small.encode(image), cond, config, small.CANVAS, image)
    prepared = prepare_draft(Move(small.box(), 40.0, 10.0), photo, config, small.encode)
    return sample_draft(model, prepared, cond, cond, SeededNoise(3)).latents


def guided(kind: str) -> Callable[[GaussianDenoiser], torch.Tensor]:
    def run(model: GaussianDenoiser) -> torch.Tensor:
        guider = RCFG(model, constant_cond(0.2), constant_cond(-0.2), kind, 1.4, reference=latents())
        levels = make_sigmas("uniform", model.levels, 4)
        return sample("euler", guider, latents() * levels[0], levels, model.space, SeededNoise(1))

    return run


def reused(model: GaussianDenoiser) -> torch.Tensor:
    levels = make_sigmas("uniform", model.levels, 6)
    denoise = reusing(
        CFG(model, constant_cond(0.2), constant_cond(-0.2), 2.0), [ReuseSpan(float(levels[2]), float(levels[4]))]
    )
    return sample("euler", denoise, latents() * levels[0], levels, model.space, SeededNoise(1))


def searched(model: GaussianDenoiser) -> torch.Tensor:
    path = ModelPath(model, constant_cond(), size=(4, 2, 2), batch=2)
    config = SearchConfig(steps=2, pairs=2, holdout_pairs=2, evaluations=2, teacher_steps=2, finalists=1)
    return search(path, config).schedule.sigmas


TECHNIQUES: dict[str, Callable[[GaussianDenoiser], torch.Tensor]] = {
    "Cyclic One-Way Diffusion": cow, "Stream Batch": stream, "Masked Regenerate": masked, "Edit (draft)": edited,
    "Residual CFG (self)": guided("self"), "Residual CFG (onetime)": guided("onetime"), "call reuse": reused,
    "schedule search": searched,
}  # fmt: skip


def injected(fault: str, error: Callable[[], BaseException]) -> Iterator[Row]:
    """Raise an error at every network call of every technique: it comes out as it is and the next run, or else this one, is undisturbed."""
    for name, run in TECHNIQUES.items():
        model = Failing()
        expected = run(model)
        survived = 0
        for at in range(1, model.calls + 1):
            raised = error()
            try:
                found = run(Failing(at, raised))
            except type(raised):
                found = run(Failing())
            survived += bool(torch.equal(found, expected))
        yield Row(fault, f"{name}, at each network call", model.calls, survived)


def stopped_training() -> Iterator[Row]:
    expected, survived = train(waves(), FILL, TRAINING), 0
    for at in range(1, TRAINING.steps):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "fill.safetensors"

            def stop(step: Any, at: int = at) -> None:
                if step.index == at:
                    raise KeyboardInterrupt

            with contextlib.suppress(KeyboardInterrupt):
                train(waves(), FILL, TRAINING, path, callback=stop)
            survived += train(waves(), FILL, TRAINING, path).losses == expected.losses
    yield Row("cancel", "Train Latent Fill, after each step", TRAINING.steps - 1, survived)


def waves() -> torch.Tensor:
    return torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ processes


def child(what: str, place: pathlib.Path) -> None:
    """Do something in this process until it kills itself."""
    if what == "search":
        counted = [0]

        def kill(step: Any) -> None:
            counted[0] += 1
            if counted[0] == 20:
                os.kill(os.getpid(), signal.SIGKILL)

        search(jobs.make_path(), jobs.make_config(), store=place / "a.sqlite", callback=kill)
    elif what == "training":
        train(waves(), FILL, TRAINING, place / "fill.safetensors", checkpoint_every=2, callback=killed_at_nine)
    elif " SIG" in what:
        command, _, name = what.rpartition(" ")
        sys.exit(signalled_command(command, signal.Signals[name], place))
    else:
        sinks = [
            open_sink(str(place / f"out{suffix}"), open_source(str(place / "in"))).__enter__()
            for suffix in (*VIDEOS, *ANIMATIONS)
        ]
        for sink in sinks:
            for image, stamp in open_source(str(place / "in")):
                sink.write(image, stamp)
        os.kill(os.getpid(), signal.SIGKILL)


def killed_at_nine(step: Any) -> None:
    if step.index == 9:
        os.kill(os.getpid(), signal.SIGKILL)


def killed() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        run_child("search", place)
        result, expected = search(jobs.make_path(), jobs.make_config(), store=place / "a.sqlite"), jobs.make_path()
        undisturbed = search(expected, jobs.make_config())
        same = result.schedule.levels == undisturbed.schedule.levels
        same &= result.evaluated_now < undisturbed.evaluated_now
        yield Row("kill -9", "schedule search", 1, int(same), "the evaluation that was running")
        run_child("training", place)
        resumed = train(waves(), FILL, TRAINING, place / "fill.safetensors")
        same = resumed.losses == train(waves(), FILL, TRAINING).losses
        yield Row("kill -9", "training of a fill", 1, int(same), "steps since the last checkpoint (200 by default)")
        frames(place / "in", 75)
        for suffix in (*VIDEOS, *ANIMATIONS):
            (place / f"out{suffix}").write_text("earlier")
        run_child("video", place)
        folders = [part for part in place.glob("out.part-*") if part.is_dir()]
        whole = len(folders) == len(ANIMATIONS) and all(
            sum(1 for _ in open_source(str(part))) == 75 for part in folders
        )
        whole &= all((place / f"out{suffix}").read_text() == "earlier" for suffix in ANIMATIONS)
        yield Row("kill -9", f"animation writing ({', '.join(ANIMATIONS)})", len(ANIMATIONS), len(ANIMATIONS) * whole)
        good = 0
        for suffix in VIDEOS:
            (part,) = place.glob(f"out.part-*{suffix}")
            kept = (place / f"out{suffix}").read_text() == "earlier"
            good += kept and sum(1 for _ in open_source(str(part))) >= 25
        yield Row(
            "kill -9",
            f"video writing ({', '.join(VIDEOS)})",
            len(VIDEOS),
            good,
            "about the last second, and what the encoder holds",
        )


def words(command: str, place: pathlib.Path) -> list[str]:
    return [*command.split(), *COMMANDS[command].format(place=place).split()]


def signalled_command(command: str, number: signal.Signals, place: pathlib.Path) -> int:
    """Run a command of `slipstream` in this process; the signal comes in the middle of its work. Returns its exit code."""
    show = Progress.show

    def show_and_signal(self: Progress, index: int, total: int, note: str = "") -> None:
        show(self, index, total, note)
        if self.unit != "image" and index == SIGNALLED_AT:
            os.kill(os.getpid(), number)

    # A shell may have set it to be ignored, as nohup does.
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with patch.object(Progress, "show", show_and_signal):
        return run_command(words(command, place))


def signalled() -> Iterator[Row]:
    """End each command that works for long by each signal: one line, its exit code, and the work until then is there."""
    lost = {"stream": "frames in flight", "search": "the evaluation that was running", "lmd train": "nothing"}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        alone = pathlib.Path(folder) / "alone"
        for command in COMMANDS:
            frames(alone / "in", 4)
            if command != "stream":
                run_command(words(command, alone))
            good = 0
            for number in SIGNALS:
                place = pathlib.Path(folder) / f"{command} {number.name}".replace(" ", "-")
                frames(place / "in", 75 if command == "stream" else 4)
                good += ended_by(command, number, place, alone)
            names = ", ".join(number.name for number in SIGNALS)
            yield Row(names, f"command slipstream {command}", len(SIGNALS), good, lost[command])


def ended_by(command: str, number: signal.Signals, place: pathlib.Path, alone: pathlib.Path) -> bool:
    """Say whether a command that a signal ended has kept its work, and comes to the same result when it is given again."""
    earlier = place / {"stream": "out.mp4", "search": "out.json"}.get(command, "other")
    earlier.write_text("earlier")
    done = subprocess.run(
        [sys.executable, __file__, "--child", f"{command} {number.name}", str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stderr.splitlines()[-1]
    if done.returncode != 128 + number or not said.startswith(f"slipstream {command}: cancelled"):
        return False
    if earlier.read_text() != "earlier":
        return False
    if command == "stream":
        (part,) = place.glob("out.part-*.mp4")
        read = sum(1 for _ in open_source(str(part)))
        return f": {read} frames are in {part}" in said and SIGNALLED_AT <= read < 75
    if command == "search":
        kept = jobs.stored(place / "a.sqlite")
        again = run_command(words(command, place))
        levels = [Schedule.load(path / "out.json").levels for path in (place, alone)]
        return again == 0 and kept >= SIGNALLED_AT and levels[0] == levels[1]
    left = LatentFill.load(place / "out.safetensors")
    again = run_command(words(command, place))
    fills = [LatentFill.load(path / "out.safetensors").state_dict() for path in (place, alone)]
    moved = any(not torch.equal(value, fills[1][name]) for name, value in left.state_dict().items())
    return again == 0 and moved and all(torch.equal(value, fills[1][name]) for name, value in fills[0].items())


def frames(folder: pathlib.Path, count: int) -> None:
    for index in range(count):
        image = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(index))
        save_image(image, folder / f"{index}.png")


def run_child(what: str, place: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, "--child", what, str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode != -signal.SIGKILL:
        raise SystemExit(f"{what} ended with {done.returncode} before it was killed:\n{done.stderr}")


# ------------------------------------------------------------------------------------------------ disks and files


@contextlib.contextmanager
def small_disk(kilobytes: int) -> Iterator[pathlib.Path | None]:
    """Give a file system of its own that is soon full; None where this user may not mount one."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
        mounted = (
            shutil.which("mount") is not None
            and subprocess.run(command, capture_output=True, check=False).returncode == 0
        )
        try:
            yield pathlib.Path(folder) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=False)


def full_disk() -> Iterator[Row]:
    """Fill a disk, then write: the earlier file is unchanged, and the work continues or ends with one documented error."""
    with small_disk(400) as disk, tempfile.TemporaryDirectory() as folder:
        if disk is None:
            yield Row("full disk", "not tried: it takes the right to mount", 0, 0)
            return
        schedule = Schedule.load(sorted((_common.ROOT / "search/presets").glob("*.json"))[0])
        writers: dict[str, Callable[[pathlib.Path], Any]] = {
            "image .png": lambda path: save_image(torch.rand(1, 256, 256, 3), path),
            "schedule .json": schedule.save,
            "schedule .safetensors": schedule.save,
            "fill .safetensors": LatentFill(FILL).save,
        }
        for name, write in writers.items():
            path = disk / f"file{name.split()[1]}"
            path.write_text("earlier")
            yield Row("full disk", name, 1, int(refused(disk, lambda: write(path)) and path.read_text() == "earlier"))  # noqa: B023
        with filled(disk):
            result = train(waves(), FILL, TRAINING, disk / "b.safetensors", checkpoint_every=4)
        yield Row(
            "full disk", "training of a fill", 1, int(len(result.losses) == TRAINING.steps and result.problem != "")
        )
        with filled(disk):
            found = search(jobs.make_path(), jobs.make_config(evaluations=12), store=disk / "a.sqlite")
        yield Row("full disk", "schedule search", 1, int(any("in memory" in text for text in found.warnings)))
        frames(pathlib.Path(folder), 75)
        for suffix in (*VIDEOS, *ANIMATIONS):
            yield video_on(disk, pathlib.Path(folder), suffix)


def video_on(disk: pathlib.Path, source: pathlib.Path, suffix: str) -> Row:
    for old in disk.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    path = disk / f"out{suffix}"
    path.write_text("earlier")
    (disk / "filler").write_bytes(b"0" * (disk_free(disk) - 90_000))
    opened, error = open_source(str(source)), ""
    try:
        with open_sink(str(path), opened) as sink:
            for image, stamp in opened:
                sink.write(image, stamp)
    except OSError as raised:
        error = str(raised)
    parts = list(disk.glob("out.part-*"))
    parts = [part for part in parts if not part.is_dir() or any(part.iterdir())]
    read = sum(1 for _ in open_source(str(parts[0]))) if parts else 0
    good = error.startswith("Could not write") and path.read_text() == "earlier" and read > 0
    return Row("full disk", f"video {suffix}", 1, int(good), f"the last frames: {read} of {75} can be seen")


def disk_free(disk: pathlib.Path) -> int:
    return shutil.disk_usage(disk).free


@contextlib.contextmanager
def filled(disk: pathlib.Path) -> Iterator[None]:
    filler = disk / "filler"
    filler.write_bytes(b"0" * disk_free(disk))
    try:
        yield
    finally:
        filler.unlink()


def refused(disk: pathlib.Path, write: Callable[[], Any]) -> bool:
    with filled(disk):
        try:
            write()
        except OSError as error:
            return str(error).startswith("Could not write") and len(list(disk.glob(".part*"))) == 0
    return False


def replaced() -> Iterator[Row]:
    """Overwrite every file of a model while it is loaded: the same result comes out."""
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model"
        shutil.copytree(_common.ROOT / "pocket", model)
        pipe = slipstream.load(model)
        image = read_image(_common.ROOT / "assets" / "astronaut.jpg")[:, :64, :64, :3]

        def result() -> torch.Tensor:
            cond = pipe.encode_text(["a red circle"])
            return pipe.decode(pipe.model(pipe.encode_image(image), torch.full((1,), 1.0), cond))

        expected, files = result(), sorted(model.rglob("*.safetensors"))
        for file in files:
            file.write_bytes(b"0" * file.stat().st_size)
        same = len(files) * bool(torch.equal(result(), expected))
        yield Row("file replaced while loaded", "every weight file of a model", len(files), same)


# ------------------------------------------------------------------------------------------------ threads


def threads() -> Iterator[Row]:
    """Raise in each of a stream's five threads: the error comes out, finished frames come out before it, no thread is left."""
    good, places = 0, ("source", "encode", "denoise", "decode", "sink")
    for place in places:
        taken: list[Any] = []

        def at(stage: str, value: Any, index: list[int], place: str = place) -> Any:
            index[0] += 1
            if stage == place and index[0] == 4:
                raise RuntimeError("injected")
            return value

        counts = {name: [0] for name in places}
        model = Failing(4, RuntimeError("injected") if place == "denoise" else None)
        batch = StreamBatch(model, constant_cond(), None, StreamConfig(steps=1, guidance="none", cfg_scale=1))
        running = StreamThreads(
            (at("source", (torch.rand(8, 8, 3), i), counts["source"]) for i in range(8)),
            lambda image: at("encode", latents(), counts["encode"]),  # noqa: B023
            batch, lambda x: at("decode", torch.rand(1, 8, 8, 3), counts["decode"]),  # noqa: B023
            lambda image, meta, frame: taken.append(at("sink", meta, counts["sink"])), live=False,  # noqa: B023
        )  # fmt: skip
        try:
            running.start().wait(60)
        except RuntimeError as error:
            left = any(thread.is_alive() for thread in running._threads)
            # A frame in flight is lost with the pass that fails.
            good += str(error) == "injected" and taken == list(range(2 + (place != "denoise"))) and not left
    yield Row("exception in a thread", f"stream: {', '.join(places)}", len(places), good, "frames in flight")


class Told:
    """A client of a live stream that notes the reason of its end."""

    def __init__(self) -> None:
        self.reason, self.results = "", 0

    def offer(self, message: bytes) -> None:
        self.results += 1

    def tell(self, message: str) -> None:
        found = json.loads(message)
        self.reason = found["reason"] if found["type"] == "ended" else self.reason


def live_faults() -> Iterator[Row]:
    """End a live stream at each of its places: its client gets the reason, the error comes out, and no thread is left."""
    kinds = {
        "cancel": KeyboardInterrupt,
        "out of memory": torch.cuda.OutOfMemoryError,
        "exception in a thread": RuntimeError,
    }
    places = ("encode", "denoise", "decode", "the thread that runs it")
    for fault, kind in kinds.items():
        good = sum(live_survives(place, kind("injected")) for place in places)
        yield Row(fault, f"live stream: {', '.join(places)}", len(places), good, "frames in flight")


def live_survives(place: str, error: BaseException) -> bool:
    client, count, live = Told(), itertools.count(1), LiveStream(LiveSettings(steps=1, guidance="none"), (8, 8))
    member = live.join(client)
    model = Failing(3, error if place == "denoise" else None)
    batch = BlendedStream(
        model, [constant_cond()], PromptBlend([1.0]), 0, None, StreamConfig(**live.settings.updates())
    )

    def at(stage: str, value: Any) -> Any:
        if stage == place and client.results >= 2:
            raise error
        return value

    def check() -> None:
        live.receive(member, wire.pack(wire.Head(wire.FRAME, next(count), 0.0), encode_jpeg(torch.rand(8, 8, 3))))
        at("the thread that runs it", None)

    try:
        live.run(
            batch,
            lambda image: at("encode", latents()),
            lambda x: at("decode", torch.rand(1, 8, 8, 3)),
            lambda a, b: None,
            check,
        )
    except BaseException as found:
        left = [thread for thread in threading.enumerate() if thread.name.startswith("slipstream-")]
        return found is error and "injected" in client.reason and not left
    return False


# ------------------------------------------------------------------------------------------------ nodes


def nodes(printed: pathlib.Path | None) -> Iterator[Row]:
    """Give a row for each node and fault of tests/host/fault_checks.py."""
    host = pathlib.Path(os.environ.get("COMFYUI_PATH", "")).expanduser()
    if printed is None and not (host / "main.py").is_file():
        return
    for line in (run_in_host(host) if printed is None else printed.read_text()).splitlines():
        found = json.loads(line)
        place = f"node {found['node']}, at each call of network, VAE and text encoder"
        if found["tried"] < found["points"]:
            place = (
                f"node {found['node']}, at {found['tried']} of {found['points']} calls of network, VAE and text encoder"
            )
        yield Row(found["fault"].replace("error", "exception"), place, found["tried"], found["survived"])


def run_in_host(host: pathlib.Path) -> str:
    checks = _common.ROOT / "tests" / "host" / "fault_checks.py"
    python = os.environ.get("COMFYUI_PYTHON") or host / ".venv" / "bin" / "python"
    return subprocess.run([python, checks], cwd=host, stdout=subprocess.PIPE, text=True, check=True).stdout


def table(printed: pathlib.Path | None) -> list[Row]:
    return [
        *injected("cancel", KeyboardInterrupt), *injected("out of memory", lambda: torch.cuda.OutOfMemoryError("injected")),
        *injected("exception in the network or a callback", lambda: RuntimeError("injected")), *stopped_training(),
        *threads(), *live_faults(), *killed(), *signalled(), *full_disk(), *replaced(), *nodes(printed),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/figures/reliability.md")
    parser.add_argument("--nodes", type=pathlib.Path, help="what tests/host/fault_checks.py has printed")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    if args.child:
        child(args.child[0], pathlib.Path(args.child[1]))
        return 1
    rows = table(args.nodes)
    text = "\n".join(
        ["| fault | where | tried | survived | lost |", "| --- | --- | --- | --- | --- |", *map(str, rows)]
    )
    print(text)
    if args.write:
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    return int(any(row.survived < row.tried for row in rows))


if __name__ == "__main__":
    sys.exit(main())
