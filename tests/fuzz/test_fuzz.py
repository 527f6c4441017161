"""Odd and hostile inputs of every kind: a result, or one documented error in one line. SLIPSTREAM_FUZZ=N tries N of each kind.

A failure names the case: `SLIPSTREAM_FUZZ_CASE=N pytest tests/fuzz -k KIND` runs that one alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
import slipstream
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from slipstream.cli import main
from slipstream.core.drawing import paint, read_drawing
from slipstream.core.images import mask_of, read_frames, read_image, read_mask, save_image
from slipstream.core.loading import BUNDLED
from slipstream.core.masks import as_mask, bounding_box, feather, grow, painted
from slipstream.core.noise import SeededNoise
from slipstream.core.samplers import SAMPLERS, sample
from slipstream.core.schedules import SCHEDULES, make_sigmas
from slipstream.cow import CowConfig
from slipstream.cow.canvas import parse_colour, place, plain_background
from slipstream.cow.config import make_plan
from slipstream.edit import Appearance, Drag, EditConfig, Move, Paste
from slipstream.lmd import FillConfig, LatentFill, RegenerateConfig, TrainConfig, mask_schedule
from slipstream.lmd.stretch import parse_points
from slipstream.nodes.edit import read_drags
from slipstream.search import Schedule, SearchConfig
from slipstream.search.store import Rung, Store
from slipstream.stream import SimilarityFilter, StreamBatch, StreamConfig
from slipstream.stream.live.settings import LiveSettings
from slipstream.stream.sinks import open_sink
from slipstream.stream.video import open_source
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from slipstream_tests.conftest import ROOT
from slipstream_tests.fuzz.inputs import Inputs, numbers_in
from slipstream_tests.test_cli import EVERY, Loaded

COUNT = int(os.environ.get("SLIPSTREAM_FUZZ", "25"))
CASES = [int(os.environ["SLIPSTREAM_FUZZ_CASE"])] if "SLIPSTREAM_FUZZ_CASE" in os.environ else range(COUNT)
PRESETS = sorted((ROOT / "search/presets").glob("*.json"))
Kind = Callable[[Inputs, pathlib.Path], Any]


def one_line(text: str) -> bool:
    return bool(text) and text.isprintable()


def finite(values: Any) -> None:
    """Whatever came out is numbers."""
    for value in values if isinstance(values, (tuple, list)) else [values]:
        if isinstance(value, torch.Tensor):
            assert bool(torch.isfinite(value.float()).all()), "the result is not finite"


def configs(inputs: Inputs, folder: pathlib.Path) -> None:
    kind = inputs.choice(
        (
            CowConfig,
            StreamConfig,
            SearchConfig,
            EditConfig,
            TrainConfig,
            RegenerateConfig,
            FillConfig,
            SimilarityFilter,
            LiveSettings,
        )
    )
    if kind is SimilarityFilter:
        SimilarityFilter(inputs.number(), inputs.number(), seed=inputs.number(), blocks=inputs.number())
        return
    given = {name: 8 for name in ("channels", "height", "width")} if kind is FillConfig else {}
    if kind is StreamConfig and inputs.random() < 0.3:
        given = {"sigmas": inputs.sigmas(), "strength": None}
    config = kind(**inputs.settings(kind, **given))
    assert all(math.isfinite(n) for n in numbers_in(config)), config
    repr(config)


def cow_plans(inputs: Inputs, folder: pathlib.Path) -> None:
    config = CowConfig(**inputs.settings(CowConfig))
    levels = GaussianDenoiser().levels
    made = make_sigmas(config.schedule, levels, config.steps)
    finite(make_plan(config, levels, made if inputs.random() < 0.7 else inputs.sigmas()).levels)


def schedules(inputs: Inputs, folder: pathlib.Path) -> None:
    good = json.loads(inputs.choice(PRESETS).read_text())
    if inputs.random() < 0.3:  # presets have none of these
        spans = [{"sigma_high": 6.0, "sigma_low": 1.0, "kind": "fitted", "weights": [1.2, -0.2]}]
        good |= {"reuse": spans, "masks": [{"sigma_high": 9.0, "sigma_low": 0.5, "skip": ["mid_block.resnets.0"]}]}
    path = folder / "s.json"
    path.write_text(json.dumps(inputs.json_like(good)))
    schedule = Schedule.load(path)
    assert bool((schedule.sigmas.diff() < 0).all())
    finite(schedule.sigmas)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict(), allow_nan=False))) == schedule
    assert json.dumps(schedule.to_dict(), ensure_ascii=False).isprintable()
    schedule.mismatches({"name": "m", "hash": "h", "sigma_max": 1.0}, "euler", 3.0)


def schedule_bytes(inputs: Inputs, folder: pathlib.Path) -> None:
    path = folder / "s.json"
    path.write_bytes(inputs.bytes_like(inputs.choice(PRESETS).read_bytes()))
    Schedule.load(path)


def sigmas(inputs: Inputs, folder: pathlib.Path) -> None:
    model, noise = GaussianDenoiser(), SeededNoise(3)
    x = torch.randn(1, 4, 4, 4, generator=inputs.generator()) * 10
    levels = inputs.sigmas()
    cond = constant_cond()
    finite(
        sample(
            inputs.choice(list(SAMPLERS)),
            lambda x, sigma: model(x, sigma.expand(len(x)), cond),
            x,
            levels,
            model.space,
            noise,
        )
    )


def made_sigmas(inputs: Inputs, folder: pathlib.Path) -> None:
    levels = GaussianDenoiser().levels
    found = make_sigmas(
        inputs.choice([*SCHEDULES, "x"]), levels, inputs.number(), inputs.choice((1.0, inputs.number()))
    )
    finite(found)
    assert bool((found.diff() < 0).all())


def streams(inputs: Inputs, folder: pathlib.Path) -> None:
    strange = {"sigmas": inputs.sigmas(), "strength": None} if inputs.random() < 0.5 else {}
    config = StreamConfig(**{"steps": inputs.randrange(1, 4), **strange}, seed=inputs.number())
    batch = StreamBatch(GaussianDenoiser(), constant_cond(), constant_cond(), config)
    shape = (inputs.size(), inputs.size())
    frames = [f for _ in range(3) for f in batch.push(torch.randn(1, 4, *shape, generator=inputs.generator()))]
    finite([frame.latents for frame in [*frames, *batch.drain()]])


def points(inputs: Inputs, folder: pathlib.Path) -> None:
    pairs = [", ".join(str(inputs.number()) for _ in range(2)) for _ in range(4)]
    text = inputs.choice(
        (inputs.text(), f"{pairs[0]} -> {pairs[1]}", f"{pairs[0]}->{pairs[1]}\n{pairs[2]} -> {pairs[3]}")
    )
    finite(parse_points(text))


def drags(inputs: Inputs, folder: pathlib.Path) -> None:
    def text() -> str:
        good = [{"x": inputs.random() * 60, "y": 4.0}, [inputs.random() * 9, 7]]
        return inputs.choice((inputs.text(), json.dumps(inputs.json_like(good)), json.dumps(good)))

    for handle, target in read_drags(text(), text()):
        assert all(map(math.isfinite, (*handle, *target)))


def drawings(inputs: Inputs, folder: pathlib.Path) -> None:
    """The text of a canvas, good, changed and foreign, and what it paints."""
    shapes = [
        {"box": [4, 4, 20.5, 12]}, {"outline": [[1, 1], [30, 2], [9, 25]]}, {"brush": [[3, 3], [20, 20]], "width": 5},
        {"erase": [[8, 8]], "width": 2},
    ]  # fmt: skip
    good = {"size": [32, 24], "shapes": inputs.sample(shapes, inputs.randrange(5))}
    text = inputs.choice(
        (json.dumps(good), json.dumps(inputs.json_like(good)), json.dumps(inputs.json_like(good)), inputs.text())
    )
    drawing = read_drawing(text)
    painted_here = paint(drawing, torch.zeros(24, 32))
    finite(painted_here)
    assert painted_here.shape == (24, 32)


def tasks(inputs: Inputs, folder: pathlib.Path) -> None:
    kind = inputs.choice((Move, Drag, Paste, Appearance))
    given = {"mask": inputs.mask()}
    if kind in (Paste, Appearance):
        given["reference"] = None
    if kind is Appearance:
        given["reference_mask"] = inputs.mask()
    if kind is Drag:
        given["points"] = [
            tuple((inputs.number(), inputs.number()) for _ in range(2)) for _ in range(inputs.randrange(3))
        ]
    task = kind(**inputs.settings(kind, **given))
    assert all(math.isfinite(n) for n in numbers_in(task))


def masks(inputs: Inputs, folder: pathlib.Path) -> None:
    mask = inputs.mask() if inputs.random() < 0.8 else inputs.tensor()
    finite(as_mask(mask, inputs.choice((1, 2, 3)), inputs.size(), inputs.size()))
    clean = painted(mask)
    finite((grow(clean, inputs.randrange(-3, 4)), feather(clean, inputs.randrange(5))))
    bounding_box(clean[0])


def mask_schedules(inputs: Inputs, folder: pathlib.Path) -> None:
    height, width = inputs.size(), inputs.size()
    made = mask_schedule(
        inputs.randrange(-1, 6), inputs.choice(("linear", "cosine", "fixed", "x")), inputs.number(), inputs.number(),
        inputs.choice(("increasing", "decreasing")), inputs.number(), inputs.number(), inputs.random() < 0.5, height, width,
        inputs.choice((None, inputs.mask())),
    )  # fmt: skip
    finite(made.masks)


def canvases(inputs: Inputs, folder: pathlib.Path) -> None:
    parse_colour(inputs.text())
    found = place(
        inputs.image(), inputs.mask(), plain_background(*inputs.choice(((64, 64), (32, 48)))),
        *(inputs.choice((0.5, inputs.number())) for _ in range(3)),
    )  # fmt: skip
    finite((found.image, found.keep))


def image_files(inputs: Inputs, folder: pathlib.Path) -> None:
    """A damaged, cut off, tiny or odd file of every format, as image, mask, animation and video."""
    suffix = inputs.choice((".png", ".jpg", ".gif", ".webp", ".bmp", ".tif"))
    modes = {".jpg": ("RGB", "L", "CMYK"), ".png": ("RGB", "RGBA", "L", "P", "1", "I;16", "LA")}.get(
        suffix, ("RGB", "L")
    )
    buffer = io.BytesIO()
    picture = Image.effect_noise((inputs.size(), inputs.size()), 90).convert(inputs.choice(modes))
    picture.save(buffer, Image.registered_extensions()[suffix])
    path = folder / f"image{suffix}"
    path.write_bytes(inputs.bytes_like(buffer.getvalue()) if inputs.random() < 0.8 else buffer.getvalue())
    image = read_image(path)
    finite((image, read_mask(path), mask_of(image)))
    for frame, seconds in read_frames(path):
        finite(frame)
        assert seconds >= 0
    for frame, _ in open_source(str(path)):
        finite(frame)


def video_files(inputs: Inputs, folder: pathlib.Path) -> None:
    """A video of every container, changed or cut off: the frames that can be read, or one documented error."""
    suffix = inputs.choice((".mp4", ".mkv", ".webm", ".avi", ".mov"))
    whole = folder / f"whole{suffix}"
    if not whole.exists():
        frames = folder / "frames"
        if not frames.is_dir():
            for i in range(6):
                save_image(torch.rand(1, 16, 24, 3, generator=inputs.generator()), frames / f"{i}.png")
        source = open_source(str(frames))
        with open_sink(str(whole), source) as sink:
            for image, stamp in source:
                sink.write(image, stamp)
    path = folder / f"v{suffix}"
    path.write_bytes(inputs.bytes_like(whole.read_bytes()))
    for count, (frame, stamp) in enumerate(open_source(str(path))):
        finite(frame)
        assert math.isfinite(stamp.seconds)
        assert count < 100


def stores(inputs: Inputs, folder: pathlib.Path) -> None:
    """A store of a search whose bytes or rows were changed: refused, or taken as far as its rows are whole."""
    path = folder / "a.sqlite"
    for file in folder.glob("a.sqlite*"):
        file.unlink()
    with Store(path, {"a": 1}) as store:
        store.put("bank", "candidate", (Rung(2, 0.5, 0.1, 3),))
        store.put_tensor("t", torch.ones(2, 3))
    if inputs.random() < 0.5:
        path.write_bytes(inputs.bytes_like(path.read_bytes()))
    else:
        with contextlib.closing(sqlite3.connect(path)) as db:
            table, column = inputs.choice(
                (("evaluation", "rungs"), ("tensor", "shape"), ("tensor", "data"), ("job", "value"))
            )
            value = inputs.choice(
                (inputs.text().encode(errors="replace").decode(), json.dumps(inputs.json_value()), b"x", 3.5)
            )
            db.execute(f"UPDATE {table} SET {column} = ?", (value,))
            db.commit()
    with Store(path, {"a": 1}) as store:
        record, tensor = store.get("bank", "candidate"), store.tensor("t")
        assert record is None or all(math.isfinite(rung.score) for rung in record)
        finite([] if tensor is None else tensor)
        store.put("bank", "other", (Rung(2, 0.5, 0.1, 3),))


def fill_files(inputs: Inputs, folder: pathlib.Path) -> None:
    path = folder / "fill.safetensors"
    if not path.exists():
        LatentFill(
            FillConfig(2, 4, 4, 2, dim=16, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
        ).save(path)
    other = folder / "changed.safetensors"
    other.write_bytes(inputs.bytes_like(path.read_bytes()))
    fill = LatentFill.load(other)
    finite(fill.fill(torch.randn(1, 2, 4, 4, generator=inputs.generator()), torch.eye(4)[None]))


def model_folders(inputs: Inputs, folder: pathlib.Path) -> None:
    """The bundled model with one of its files changed, cut off or gone, or one weight of it missing."""
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    files = [p for p in BUNDLED.rglob("*") if p.is_file() and "_lcm" not in str(p) and p.suffix not in (".md", ".jpg")]
    for file in files:
        (model / file.relative_to(BUNDLED)).parent.mkdir(parents=True, exist_ok=True)
        (model / file.relative_to(BUNDLED)).symlink_to(file)
    chosen = inputs.choice([file for file in files if file.suffix == ".json"] + files)
    changed = model / chosen.relative_to(BUNDLED)
    changed.unlink()
    if chosen.suffix == ".safetensors":
        tensors = load_file(chosen)
        del tensors[inputs.choice(sorted(tensors))]
        save_file(tensors, changed, {"format": "pt"})
    elif chosen.suffix == ".json" and inputs.random() < 0.8:
        changed.write_text(json.dumps(inputs.json_like(json.loads(chosen.read_text())), default=str), errors="replace")
    elif inputs.random() < 0.8:
        changed.write_bytes(inputs.bytes_like(chosen.read_bytes()))
    try:
        pipe = slipstream.load(model)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    finite(pipe.encode_text(["a red circle"]).context)


def prompts(inputs: Inputs, folder: pathlib.Path) -> None:
    pipe = slipstream.load("pocket")
    cond = pipe.encode_text([inputs.text() for _ in range(inputs.randrange(1, 4))])
    finite(cond.context)


VALUES = ("1", "0", "-1", "nan", "1e400", "0.5", "64x64", "7x9", "1x1", "99999999x1", "in/1.png", "mask.png", "x.h5", ".", "/",
          "no/such.png", "a\ud800", "", "8:8:24:24", "4:4:4:4", "1,1 -> 2,2", "#ff0000", "karras", "cuda", "float8")  # fmt: skip


def command_lines(inputs: Inputs, folder: pathlib.Path) -> None:
    """Whatever is wrong is one line on stderr and exit code 2, before a model is loaded."""
    command = inputs.choice(list(EVERY))
    flags = sorted(set(re.findall(r"--[a-z-]+", HELP[command])) - {"--help", "--version"})
    words = EVERY[command].split()
    for _ in range(inputs.randrange(1, 4)):
        words.append(inputs.choice(flags))
        words += [inputs.choice((inputs.choice(VALUES), inputs.text())) for _ in range(inputs.choice((0, 1, 1, 1, 2)))]
    err, out = io.StringIO(), io.StringIO()
    with redirect_stderr(err), redirect_stdout(out):
        try:
            code = main([*command.split(), *words])
        except Loaded:
            return
    assert code in (0, 2), (code, words)
    check_shown(err.getvalue(), code, words)


# Commands that run to their end, as short as can be; {a}, {b} are images and {m}, {n} masks, of any kind.
WHOLE = (
    "cow --image {a} --mask {m} --prompt {t} --steps 5 --cycles 1 --size {s} --out o.png",
    "cow --image {a} --prompt {t} --steps 4 --out o.png",
    "cow --image {a} --mask {m} --background {b} --prompt {t} --steps 5 --cycles 1 --follow 0.5 --out o.jpg",
    "edit --image {a} --move {m} {x} {y} --steps 2 --out o.png", "edit --image {a} --remove {m} --prompt {t} --steps 2 --out o.png",
    "edit --image {a} --move {m} {x} 0 1.5 90 --steps 2 --mode fine --cfg 1 --out o.png",
    "edit --image {a} --paste {b} {n} {x} {y} --steps 2 --out o.webp", "edit --image {a} --drag {m} {x},{y}->{y},{x} --steps 2 --out o.png",
    "edit --image {a} --appearance {m} {b} {n} --steps 2 --out o.png", "edit --image {a} --move {m} {x} {y} --only-preview --preview o.png",
    "stream --input {a} --out out.gif --steps 1 --guidance none --prompt {t}", "stream --input in --out out.mp4 --steps 1 --size {s}",
    "lmd regenerate --image {a} --mask {m} --prompt {t} --patch 1 --rounds 1 --steps 1 --strength 1 --out o.png",
    "lmd fill --fill fill.safetensors --image {a} --mask {m} --size 64x64 --out o.png",
    "lmd influence --before {a} --after {b} --mask {m} --size {s} --out o.png",
    "lmd stretch --image {a} --next {b} --size {s} --out o.png", "lmd stretch --image {a} --drag {x},{y}->{y},{x} --out o.png",
    "lmd masks --steps 2 --size {s} --out o.png",
)  # fmt: skip


def whole_commands(inputs: Inputs, folder: pathlib.Path) -> None:
    """Commands to their end on images and masks of any kind and any size, with any prompt: a file, or one line and exit code 2."""
    for name in "abmn":
        for old in folder.glob(f"{name}.*"):
            old.unlink()
    given = {name: inputs.image_file(folder / name).name for name in "abmn"}
    if inputs.random() < 0.7:  # what most people give: masks of one size with their image, somewhere white
        for image, mask in (("a", "m"), ("b", "n")):
            with contextlib.suppress(ValueError):
                height, width = read_image(folder / given[image]).shape[1:3]
                box = torch.zeros(1, height, width, 3)
                box[:, : height // 2 + 1, width // 4 : width // 2 + 1] = 1
                given[mask] = save_image(box, folder / f"{mask}.png").name
    prompt = "a red circle" if inputs.random() < 0.6 else inputs.text()
    given |= {"t": prompt, "s": f"{inputs.size()}x{inputs.size()}"}
    given |= {name: str(inputs.randrange(24) if inputs.random() < 0.8 else inputs.number()) for name in "xy"}
    words = [word.format(**given) for word in inputs.choice(WHOLE).split()]
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        code = main(words)
    assert code in (0, 2), (code, words)
    check_shown(err.getvalue(), code, words)


def check_shown(text: str, code: int, words: list[str]) -> None:
    """A mistake is one line, beside warnings and progress."""
    lines = [line for line in text.splitlines() if "it/s" not in line and not line.startswith(("WARNING", "INFO"))]
    if code == 2:
        assert len(lines) == 1, (words, lines)
        assert one_line(lines[0]), lines


HELP: dict[str, str] = {}
KINDS: tuple[Kind, ...] = (
    configs, cow_plans, schedules, schedule_bytes, sigmas, made_sigmas, streams, points, drags, drawings, tasks, masks, mask_schedules,
    canvases, image_files, video_files, stores, fill_files, command_lines, whole_commands, model_folders, prompts,
)  # fmt: skip


@pytest.fixture
def place_for_files(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> pathlib.Path:
    kind = request.getfixturevalue("kind")
    if kind in (command_lines, whole_commands):
        from slipstream_tests.test_cli import folder

        made = getattr(folder, "__wrapped__", None) or folder.__pytest_wrapped__.obj
        made(tmp_path, monkeypatch)
    if kind is command_lines:

        def load(*args: Any, **kwargs: Any) -> None:
            raise Loaded

        monkeypatch.setattr("slipstream.core.loading.load", load)
        HELP.update({command: help_of(command) for command in EVERY})
    return tmp_path


def help_of(command: str) -> str:
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    return out.getvalue()


def failures(kind: Kind, cases: Iterable[int], folder: pathlib.Path) -> list[str]:
    """Return a line for each case that neither works nor fails as documented."""
    found = []
    for case in cases:
        try:
            kind(Inputs(f"{kind.__name__} {case}"), folder)
        except ValueError as error:
            if not (one_line(str(error)) and str(error).startswith("Expected")):
                found.append(f"case {case}: the message {str(error)!r:.300}")
        except Exception as error:
            trace, inner = error.__traceback__, ""
            while trace is not None:
                inner = f"{pathlib.Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
                trace = trace.tb_next
            found.append(f"case {case}: {type(error).__name__} at {inner}: {str(error)!r:.300}")
    return found


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_result_or_one_documented_error(kind: Kind, place_for_files: pathlib.Path) -> None:
    # Models take a second each, and what runs a model nearly so.
    share = {model_folders: 10, whole_commands: 5}.get(kind, 1)
    cases = range(max(len(CASES) // share, 2)) if share > 1 and len(CASES) > 1 else CASES
    found = failures(kind, cases, place_for_files)
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found[:20])
