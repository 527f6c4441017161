"""Every command: the shared options, what is refused before a model is loaded, cancelling, and the progress display."""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from slipstream.cli import build_parser, main, options, progress
from slipstream.cli.options import joined_sizes, size_of
from slipstream.core.images import save_image
from slipstream.core.progress import Step
from slipstream.lmd import FillConfig, LatentFill
from slipstream_tests.conftest import ROOT
from slipstream_tests.devices import accelerators

# What each command needs, in a folder with in/1.png, mask.png and fill.safetensors.
NEEDS = {
    "cow": "--image in/1.png --mask mask.png --prompt x --scale 0.2",
    "demo": "",
    "edit": "--image in/1.png --move 8:8:24:24 4 0",
    "search": "",
    "compare": "--stock-steps 2",
    "stream": "--input in --out frames",
    "lmd regenerate": "--image in/1.png --prompt x",
    "lmd train": "--images in --out new.safetensors",
    "lmd fill": "--fill fill.safetensors --image in/1.png --mask mask.png",
}
WITHOUT_MODEL = {
    "lmd masks": "",
    "lmd influence": "--before in/1.png --after in/1.png --mask mask.png",
    "lmd stretch": "--image in/1.png --next in/1.png",
}
OUTPUTS = {
    "cow": ("--out", "--strip"), "edit": ("--out", "--preview"), "search": ("--out", "--chart"), "compare": ("--chart",),
    "stream": ("--out", "--output"), "lmd regenerate": ("--out",), "lmd train": ("--out", "--chart"), "lmd fill": ("--out",),
    "lmd masks": ("--out",), "lmd influence": ("--out",), "lmd stretch": ("--out",),
}  # fmt: skip
EVERY = {**NEEDS, **WITHOUT_MODEL}


class Loaded(Exception):  # noqa: N818
    """Stands for the work: whatever is refused is refused before it."""


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    save_image(image, tmp_path / "in" / "1.png")
    mask = torch.zeros(1, 64, 64, 3)
    mask[:, 16:48, 16:48] = 1
    save_image(mask, tmp_path / "mask.png")
    (tmp_path / "fill.safetensors").write_bytes(saved_fill())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@functools.cache
def saved_fill() -> bytes:
    """Made once: to draw its weights takes longer than most of the tests that have it beside them."""
    with tempfile.TemporaryDirectory() as place:
        path = pathlib.Path(place) / "fill.safetensors"
        LatentFill(FillConfig(4, 8, 8, 2)).save(path)
        return path.read_bytes()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Loading a model is noted and ends the command."""
    calls: list[tuple[Any, ...]] = []

    def instead(source: Any, device: Any = None, dtype: Any = None, *, vae: Any = None) -> None:
        calls.append((source, vae, device, dtype))
        raise Loaded

    monkeypatch.setattr("slipstream.core.loading.load", instead)
    return calls


def run(command: str, *more: object) -> int:
    """Run a command; options that are given in `more` replace those it needs."""
    words = EVERY[command].split()
    for flag in {"--out" if word == "--output" else word for word in more}:
        if str(flag).startswith("--") and flag in words:
            at = words.index(str(flag))
            end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[at:end]
    return main([*command.split(), *words, *map(str, more)])


def refused(capsys: pytest.CaptureFixture[str], command: str, *more: object) -> str:
    assert run(command, *more) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith(("WARNING", "INFO"))]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"slipstream {command}: ")
    return lines[0]


# ------------------------------------------------------------------------------------------------ shared options


@pytest.mark.parametrize("command", NEEDS)
def test_every_command_chooses_model_vae_device_and_dtype(
    folder: pathlib.Path, load: list[tuple[Any, ...]], command: str
) -> None:
    with pytest.raises(Loaded):
        run(command, "--model", "m", "--vae", "v", "--device", "d", "--dtype", "t", "--size", "256x192", "--seed", 7)
    assert load == [("m", "v", "d", "t")]


@pytest.mark.parametrize("command", EVERY)
def test_every_command_chooses_size_and_seed(folder: pathlib.Path, command: str) -> None:
    words = [*command.split(), *EVERY[command].split()]

    def parse(*more: str) -> Any:
        return build_parser().parse_args(joined_sizes([*words, *more]))

    for spelling in (["--size", "48x32"], ["--size", "32", "48"], ["--width", "48", "--height", "32"]):
        assert size_of(parse(*spelling), (1, 1)) == (32, 48)
    assert size_of(parse("--width", "48"), (1, 2)) == (1, 48)
    assert size_of(parse(), (1, 2)) == (1, 2)
    if command not in ("lmd influence", "lmd stretch"):
        args = parse("--seed", "18446744073709551615")
        assert 2**64 - 1 in (getattr(args, "seed", None), getattr(args, "mask_seed", None))


@pytest.mark.parametrize("command", WITHOUT_MODEL)
def test_shared_options_without_effect_warn_by_name(
    folder: pathlib.Path, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(command, "--device", "cpu", "--vae", "v") == 0
    assert f"--device has no effect on `slipstream {command}`." in caplog.text
    assert "--vae has no effect" in caplog.text
    ours = [record.levelno for record in caplog.records if record.name.startswith("slipstream")]
    assert ours == [logging.WARNING] * 2  # matplotlib warns where HOME cannot be written


def test_older_spellings_stay(folder: pathlib.Path) -> None:
    parse = build_parser().parse_args
    assert parse(["stream", "--input", "in", "--output", "frames"]).out == "frames"
    assert parse(["edit", "--image", "a", "--guidance", "0.5"]).energy_scale == 0.5
    assert parse(["lmd", "masks", "--mask-seed", "3"]).mask_seed == 3
    assert parse(["lmd", "train", "--images", "in", "--out", "a.safetensors", "--size", "medium"]).size == "medium"


@pytest.mark.parametrize("command", [*EVERY, "", "lmd"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert "usage: slipstream" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["cow", "edit", "search", "compare", "stream", "live", "doctor", *(c for c in EVERY if "lmd" in c)]
)
def test_help_explains_every_option_with_its_default(command: str) -> None:
    parser = build_parser()
    for word in command.split():
        parser = next(a.choices for a in parser._actions if isinstance(a.choices, dict))[word]
    for action in parser._actions:
        if action.help == "==SUPPRESS==" or not action.option_strings:
            continue
        assert action.help, action.option_strings
        text = parser._get_formatter()._get_help_string(action) or ""
        counted = isinstance(action.default, (int, float)) and not isinstance(action.default, bool)
        if counted or (action.default and action.choices):
            assert "default" in text, action.option_strings


def test_seed_size_and_dtype_have_an_effect(folder: pathlib.Path) -> None:
    def made(*more: str) -> bytes:
        assert run("lmd regenerate", "--steps", "1", "--rounds", "1", "--strength", "1", "--out", "a.png", *more) == 0
        return (folder / "a.png").read_bytes()

    results = [
        made(),
        made("--seed", "1"),
        made("--dtype", "bfloat16"),
        made("--size", "35x50"),
        made("--vae", str(ROOT / "pocket" / "vae")),
    ]
    assert len(set(results[:4])) == 4
    assert results[4] == results[0]


def test_what_pillow_warns_of_is_not_printed(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Two lines with the path of its source, beside our one."""

    def load(*args: Any, **kwargs: Any) -> None:
        warnings.warn_explicit("Corrupt EXIF data.", UserWarning, "x.py", 1, "PIL.TiffImagePlugin")
        warnings.warn_explicit("Another.", UserWarning, "x.py", 1, "elsewhere")
        raise ValueError("Expected `x`")

    monkeypatch.setattr("slipstream.core.loading.load", load)
    assert run("cow") == 2
    assert [str(each.message) for each in recwarn] == ["Another."]


# ------------------------------------------------------------------------------------------------ refused before the work


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command, flags in OUTPUTS.items() for flag in flags])
@pytest.mark.parametrize(
    ("name", "message"),
    [("no/such/out", "no folder"), ("in", "is a folder"), ("x.h5", "but got"), ("out", "but got"), ("x", "read-only")],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    folder: pathlib.Path, load: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    command: str, flag: str, name: str, message: str,
) -> None:  # fmt: skip
    suffix = {("search", "--out"): ".json", ("lmd train", "--out"): ".safetensors"}.get((command, flag), ".png")
    if message in ("no folder", "read-only"):
        name += suffix
    if message == "read-only":
        (folder / name).write_text("x")
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(name))
    if command == "stream" and name in ("out", "in"):
        name, message = {"out": ("mask.txt", "but got"), "in": ("in", "another place than `input`")}[name]
    line = refused(capsys, command, flag, name)
    assert message in line or "such as out.png" in line
    assert load == []
    assert not (folder / name).exists() or name in ("in", "x" + suffix)


@pytest.mark.parametrize("command", NEEDS)
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--seed", "-1"), ("--seed", "1.5"), ("--seed", "nan"), ("--seed", str(2**64)), ("--size", "big"), ("--size", "0x64"),
        ("--size", "64"), ("--size", "64x64x64"), ("--width", "0"), ("--cfg", "nan"), ("--cfg", "inf"), ("--cfg", "x"),
        ("--steps", "-1"), ("--steps", "2.5"), ("--steps", "9" * 400), ("--prompt", "caf\udce9"), ("--negative", "\udcff"),
        ("--no-such-option", "1"), ("--strength", "nan"),
    ],
)  # fmt: skip
def test_bad_values_are_one_line_that_names_the_option(
    folder: pathlib.Path, load: list[Any], capsys: pytest.CaptureFixture[str], command: str, flag: str, value: str
) -> None:
    assert run(command, flag, value) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    unknown = f"unrecognized arguments: {flag}".encode("ascii", "backslashreplace").decode()
    assert f"argument {flag}: Expected" in error or unknown in error
    assert load == []


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("cow", ["--image", "gone.png"], "no such file"),
        ("cow", ["--background", "gone.png"], "no such file"),
        ("cow", ["--cycles", "0"], "argument --cycles: Expected `cycles`"),
        ("cow", ["--low", "0.9", "--high", "0.1"], "Expected `"),
        ("demo", ["--scenes", "0"], "argument --scenes: Expected"),
        ("demo", ["--out", "mask.png"], "is a file"),
        ("demo", ["--size", "8x8"], "canvas"),
        ("edit", ["--move", "gone.png", "4", "0"], "no such file"),
        ("edit", ["--move", "8:8:24:24", "nan", "0"], "Expected numbers for --move"),
        ("edit", ["--move", "8:8:24:24", "400", "0"], "moved out"),
        ("edit", ["--hold-object", "2"], "argument --hold-object: Expected `anchor_object`"),
        ("edit", ["--energy", "-1"], "argument --energy: Expected `energy_scale`"),
        ("search", ["--sampler", "none"], "argument --sampler: Expected `sampler`"),
        ("search", ["--prompts", "gone.txt"], "argument --prompts: Expected a text file"),
        ("search", ["--prompts", "mask.png"], "argument --prompts: Expected a text file"),
        ("search", ["--objective", "reference-mmd"], "argument --reference: Expected `reference`"),
        ("search", ["--objective", "reference-mmd", "--reference", "gone"], "argument --reference: Expected `reference`"),
        ("search", ["--store", "no/a.sqlite"], "argument --store: Expected `store`"),
        ("search", ["--pairs", "0"], "argument --pairs: Expected"),
        ("compare", ["gone.json"], "gone.json"),
        ("compare", ["mask.png"], "mask.png"),
        ("stream", ["--input", "gone.mp4"], "no such file"),
        ("stream", ["--fps", "0"], "argument --fps: Expected `fps`"),
        ("stream", ["--cfg", "0.5"], "argument --cfg: Expected `cfg_scale`"),
        ("stream", ["--similarity", "-1"], "argument --similarity: Expected `threshold`"),
        ("stream", ["--prompt", "a:-1", "--prompt", "b:1"], "argument --prompt: Expected `weights`"),
        ("stream", ["--t-index", "40,20"], "argument --t-index: Expected `t_index_list`"),
        ("stream", ["--out", "out.webp", "--size", "20000x8"], "20000x8"),
        ("lmd regenerate", ["--high", "2"], "argument --high: Expected `high`"),
        ("lmd regenerate", ["--mask", "gone.png"], "no such file"),
        ("lmd train", ["--images", "gone"], "argument --images: Expected `images`"),
        ("lmd train", ["--batch", "0"], "argument --batch: Expected `batch`"),
        ("lmd fill", ["--fill", "gone.safetensors"], "gone.safetensors"),
        ("lmd fill", ["--fill", "mask.png"], "mask.png"),
        ("lmd fill", ["--strength", "2"], "argument --strength: Expected `strength`"),
        ("lmd masks", ["--steps", "0"], "Expected `"),
        ("lmd stretch", ["--drag", "1,1"], "Expected"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_a_model_is_loaded(
    folder: pathlib.Path,
    load: list[Any],
    capsys: pytest.CaptureFixture[str],
    command: str,
    more: list[str],
    message: str,
) -> None:
    assert message in refused(capsys, command, *more)
    assert load == []


@pytest.mark.parametrize("command", NEEDS)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "gone"), "gone"), (("--device", "abacus"), "argument --device: Expected `device`"),
        (("--dtype", "int8"), "argument --dtype: Expected `dtype`"), (("--vae", "gone"), "gone"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_loaded_is_one_line(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], command: str, more: tuple[str, str], message: str
) -> None:
    assert message in refused(capsys, command, *more)


@pytest.mark.parametrize("words", [[], ["none"], ["lmd"], ["lmd", "none"], ["cow"], ["stream", "--input", "in"]])
def test_incomplete_commands_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("slipstream")
    assert error.count("\n") == 1


def test_an_error_of_several_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Expected `size`\nof two")

    monkeypatch.setattr("slipstream.core.loading.load", fail)
    assert main(["demo", "--out", str(os.curdir)]) == 2
    assert capsys.readouterr().err == "slipstream demo: argument --size: Expected `size` of two\n"


# ------------------------------------------------------------------------------------------------ devices

FEW = {
    "cow": "--steps 5 --cycles 1 --size 64x64", "demo": "--scenes 1 --size 128x128", "edit": "--steps 4 --out new.png",
    "search": "--size 32x32 --pairs 2 --steps 2 --evaluations 4 --out new.json", "compare": "--size 32x32 --pairs 2 --repeats 1",
    "stream": "--steps 2", "lmd regenerate": "--steps 2 --rounds 2 --out new.png",
    "lmd train": "--size 64x64 --patch 2 --steps 2 --batch 1", "lmd fill": "--steps 0 --out new.png",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("command", NEEDS)
@pytest.mark.parametrize("device", accelerators(), ids=str)
def test_every_command_runs_on_every_device(
    folder: pathlib.Path, device: torch.device, command: str, dtype: str
) -> None:
    assert run(command, *FEW[command].split(), "--device", device, "--dtype", dtype) == 0


# ------------------------------------------------------------------------------------------------ cancelling, progress


@pytest.mark.parametrize("command", NEEDS)
def test_ctrl_c_is_one_line(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def press(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slipstream.core.loading.load", press)
    assert run(command) == 130
    assert capsys.readouterr().err == f"slipstream {command}: cancelled\n"


def test_ctrl_c_is_one_line_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slipstream.cli.import_module", press)
    assert run("stream") == 130
    assert capsys.readouterr().err == "slipstream: cancelled\n"
    code = (
        "import slipstream.cli, sys; print(*sorted(name for name in ('torch', 'numpy', 'PIL') if name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "\n", "imported before `main` can catch Ctrl-C"


@pytest.mark.parametrize(
    ("command", "work", "kept"),
    [
        ("search", "search.search", "nothing is kept; with --store a search continues"),
        (
            "search --store s.sqlite",
            "search.search",
            "evaluations are kept in s.sqlite, and the same command continues",
        ),
        ("lmd train", "lmd.train", "the last finished step is kept, and the same command continues from it"),
    ],
)
def test_a_cancelled_command_says_what_is_kept(
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    work: str,
    kept: str,
) -> None:
    def press(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    name, _, more = command.partition(" --")
    monkeypatch.setattr(f"slipstream.cli.{work}", press)
    assert run(name, *(f"--{more}".split() if more else ()), *FEW[name].split()) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"slipstream {name}: cancelled: {kept}"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_end_a_command_like_ctrl_c(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    number = getattr(signal, name)
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and a command leaves it so

    def kill(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    before = signal.getsignal(number)
    monkeypatch.setattr("slipstream.core.loading.load", kill)
    assert run("cow") == 128 + number
    assert capsys.readouterr().err == "slipstream cow: cancelled\n"
    assert signal.getsignal(number) is before
    signal.signal(number, inherited)


def test_file_names_that_are_no_text_are_written_and_printed(folder: pathlib.Path, capsysbinary: Any) -> None:
    try:
        (folder / "caf\udce9").mkdir()
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system has text names only")
    assert run("lmd masks", "--out", "caf\udce9/a.png") == 0
    assert b"a.png" in capsysbinary.readouterr().out


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress() as shown:
        for index in range(1, 5):
            clock[0] += 6
            shown(Step("sample", index, 4, 0.0))
    assert capsys.readouterr().err == "2/4 steps, sample\n4/4 steps, sample\n"
    with progress.Progress("frame") as shown:
        for index in (1, 2, 3):
            shown.show(index, 0)
    assert capsys.readouterr().err == "3/? frames\n"


def test_progress_is_one_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    bars: list[Any] = []

    def make(**settings: Any) -> Any:
        bars.append(tqdm.tqdm(**{**settings, "file": open(os.devnull, "w")}))
        return bars[-1]

    monkeypatch.setattr(progress, "_tqdm", lambda: make)
    with progress.Progress() as shown:
        for index in (1, 2, 3):
            shown(Step("invert", index, 3, 0.0))
        for index in (1, 2):
            shown(Step("sample", index, 8, 0.0))
    assert [(bar.n, bar.total) for bar in bars] == [(3, 3), (2, 8)]
    assert all(bar.disable or bar.fp.writable() for bar in bars)


def test_the_option_behind_an_argument_is_named() -> None:
    parser = options.Parser(prog="p")
    parser.add_argument("--cfg", dest="cfg_scale")
    explained: Callable[[str], str] = lambda text: parser.explain(ValueError(text))  # noqa: E731
    assert explained("Expected `cfg_scale` x.") == "p: argument --cfg: Expected `cfg_scale` x."
    assert explained("Expected `other` x.") == "p: Expected `other` x."
    assert explained("No `cfg_scale` here.") == "p: No `cfg_scale` here."
