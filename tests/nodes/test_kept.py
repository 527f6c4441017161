"""What outlives a run is listed here: a new cache must say whose results it keeps. Nodes that read files notice a changed one."""

from __future__ import annotations

import ast
import math
import os
import pathlib
from typing import Any

import pytest
import slipstream
from slipstream.core.files import stamp
from slipstream.nodes import lmd, models, search
from slipstream.search import Schedule

ROOT = pathlib.Path(slipstream.__file__).resolve().parent
PACKAGES = ("core", "cow", "edit", "lmd", "nodes", "search", "stream")
CACHES = {"MODELS", "PROMPTS", "INVERSIONS", "Cache", "Store", "encode_files"}
# By file, the caches that it uses, and whose results they keep. The nodes among them are KEPT in tests/host/test_identity.py.
USED = {
    "core/cache.py": {"Cache"},
    "core/loading.py": {"MODELS"},  # load(), of the library: the host keeps its models by itself
    "core/pipeline.py": {"PROMPTS"},  # encode_text, of the library
    "cow/sampling.py": {"INVERSIONS"},  # Cow Sampler
    "edit/invert.py": {"INVERSIONS"},  # Edit: features of an inversion
    "nodes/edit.py": {"INVERSIONS"},  # Invert Photo
    "nodes/host/anchors.py": {"INVERSIONS"},  # RCFG Guider: what a part of a sampling hands on
    "nodes/lmd.py": {"encode_files"},  # Train Latent Fill
    **{f"search/{name}.py": {"Store"} for name in ("dispatch", "engine", "evaluation", "store", "workers")},  # Search Schedule
    "search/comparison.py": {"Store"},  # Compare Schedules: in memory, for one run
}  # fmt: skip
# Functions that remember their results, and variables of a module that runs write to. No result of a node is among them.
REMEMBERED = {
    "core/cache.py": {"CACHES"}, "core/codec.py": {"conv_relu_of"}, "core/compiling.py": {"function_for"},
    "core/files.py": {"_sweep"}, "core/graphs.py": {"_say_once"},
    "core/identity.py": {"_code_names", "_FIRST"},
    "core/images.py": {"_writes"}, "core/layers.py": {"_returned"}, "core/taps.py": {"_tapped"},
    "nodes/host/identity.py": {"_register"}, "nodes/stream.py": {"INTERRUPTED"}, "stream/sinks.py": {"_fragments"},
    "nodes/unused.py": {"specs"}, "search/workers.py": {"_TASKS"},
}  # fmt: skip


def remembered(tree: ast.Module) -> set[str]:
    """Return the cached functions of a module, and its variables that begin empty."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    cached = {
        f.name for f in functions if any(ast.unparse(d).split("(")[0].endswith("cache") for d in f.decorator_list)
    }
    empty = {
        "{}",
        "[]",
        "set()",
        "dict()",
        "list()",
        "WeakSet()",
        "OrderedDict()",
        "weakref.WeakKeyDictionary()",
        "WeakKeyDictionary()",
    }
    for node in tree.body:
        if (
            isinstance(node, (ast.Assign, ast.AnnAssign))
            and node.value is not None
            and ast.unparse(node.value) in empty
        ):
            cached.add(ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target))
    return cached


def test_everything_that_outlives_a_run_is_listed() -> None:
    used, kept = {}, {}
    for path in (p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))):
        tree, name = ast.parse(path.read_text()), path.relative_to(ROOT).as_posix()
        loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        used |= {name: loaded & CACHES} if loaded & CACHES else {}
        kept |= {name: remembered(tree)} if remembered(tree) else {}
    assert used == USED
    assert kept == REMEMBERED


def test_a_stamp_changes_with_size_time_and_number(tmp_path: pathlib.Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one"), b.write_text("two")
    os.utime(a, ns=(10**18, 10**18))
    first = stamp(a)
    a.write_text("four")
    os.utime(a, ns=(10**18, 10**18))
    assert stamp(a) != first
    a.write_text("one")
    os.utime(a, ns=(10**18 + 10**7, 10**18 + 10**7))
    assert stamp(a) != first
    assert len({first, stamp(a), stamp(b), stamp(a, b), stamp()}) == 5


@pytest.fixture
def files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    for name in ("schedule.json", "fill.safetensors", "photo.png", "weights.pth", "unet.safetensors"):
        (tmp_path / name).write_text("first")
    monkeypatch.setattr(search, "schedule_files", lambda: {"mine": tmp_path / "schedule.json"})
    monkeypatch.setattr(lmd, "fill_folder", lambda: tmp_path)
    monkeypatch.setattr(models, "listed", lambda: {"mine": models.Folder(tmp_path)})
    return tmp_path


# (node, input, its value in a folder, the file that is replaced)
READ = [
    (models.LoadModel, "model", "mine", "unet.safetensors"),
    (search.LoadSchedule, "file", "mine", "schedule.json"),
    (search.ReferenceObjective, "folder", "{}", "photo.png"),
    (search.ReferenceObjective, "inception_weights", "{}/weights.pth", "weights.pth"),
    (lmd.TrainLatentFill, "folder", "{}", "photo.png"),
    (lmd.LatentFill, "fill_name", "fill.safetensors", "fill.safetensors"),
]


@pytest.mark.parametrize(("node", "input", "value", "file"), READ)
def test_a_replaced_file_is_read_again(node: Any, input: str, value: str, file: str, files: pathlib.Path) -> None:
    ask = lambda: node.IS_CHANGED(**{input: value.format(files)})  # noqa: E731
    first = ask()
    assert ask() == first
    (files / file).write_text("the second")
    assert ask() != first
    (files / file).unlink()
    assert ask() != first
    assert math.isnan(node.IS_CHANGED(**{input: None})), "a linked name is not known: the node runs in every run"


def test_every_node_that_reads_files_is_here() -> None:
    ours = {node for node in slipstream.NODE_CLASS_MAPPINGS.values() if hasattr(node, "IS_CHANGED")}
    # Stream Frames counts its cancelled runs: tests/host/test_stream.py. Doctor and Live Stream run again in every run and read no file.
    assert {node.__name__ for node in ours} == {node.__name__ for node, *_ in READ} | {
        "StreamFrames",
        "LiveStreamNode",
        "Doctor",
    }


def test_a_schedule_is_saved_beside_one_of_its_name_also_when_two_hosts_save_at_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "user_folder", lambda kind: tmp_path)
    schedule = Schedule.load(next(search.PRESETS.glob("*.json")))
    unused = search._unused

    def other_host_first(name: str, taken: dict[str, Any]) -> str:
        found = unused(name, taken)
        if found == "mine":
            (tmp_path / "mine.json").write_text("of another host")
        return found

    monkeypatch.setattr(search, "_unused", other_host_first)
    path = search.SaveSchedule().save(schedule, "mine", False)["result"][0]
    assert path == str(tmp_path / "mine (2).json")
    assert Schedule.load(path) == schedule
    assert (tmp_path / "mine.json").read_text() == "of another host"
    monkeypatch.setattr(Schedule, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        search.SaveSchedule().save(schedule, "other", False)
    assert not (tmp_path / "other.json").exists()
