"""Every option that can be without effect warns by its name; nothing warns at the defaults; a new option cannot be forgotten."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from slipstream.cli import build_parser, main
from slipstream.cli.options import Parser, joined_sizes

# What each command needs.
NEEDS = {
    "cow": "--image a.png --prompt x",
    "demo": "",
    "edit": "--image a.png --move 0:0:8:8 4 0",
    "search": "",
    "compare": "",
    "stream": "--input . --out frames",
    "live": "",
    "push": "--host a:1/b --input .",
    "osc": "--host a:1/b --osc 9000",
    "lmd masks": "",
    "lmd regenerate": "--image a.png --prompt x",
    "lmd train": "--images . --out new.safetensors",
    "lmd fill": "--fill fill.safetensors --image a.png --mask b.png",
    "lmd influence": "--before a.png --after b.png --mask c.png",
    "lmd stretch": "--image a.png --drag '4,4->8,8'",
}
PASTE, APPEARANCE = "--image a.png --paste b.png 0:0:8:8 4 0", "--image a.png --appearance 0:0:8:8 b.png 0:0:8:8"
NEXT = "--image a.png --next b.png"

# (command, options, the option without effect); options with an --image or an --input replace what the command needs.
CASES: list[tuple[str, str, str]] = [
    ("cow", "--cfg 1 --inversion-cfg 1 --negative y", "--negative"),
    ("cow", "--model pocket-lcm --inversion-cfg 1 --negative y", "--negative"),
    ("cow", "--no-paste --softness 5", "--softness"),
    ("cow", "--follow 0.5 --preserve 0.3", "--preserve"),
    *(
        ("edit", f"--only-preview {option}", option.split()[0])
        for option in (
            "--prompt x", "--result-prompt y", "--negative z", "--steps 3", "--cfg 3", "--mode fine", "--energy 0.5", "--hold-object 0.4",
            "--hold-fill 0.77", "--feather 9", "--max-pixels 5000", "--size 64x64", "--memory row", "--seed 3", "--model m",
            "--vae v", "--device cpu", "--dtype float32",
        )
    ),
    ("edit", "--only-preview --preview p.png --out o.png", "--out"),
    ("edit", "--cfg 1 --negative y", "--negative"),
    ("edit", "--drag-method energy", "--drag-method"),
    ("edit", "--mode fine --energy 0 --memory row", "--memory"),
    ("edit", "--memory row", "--memory"),
    ("edit", "--energy 0.3", "--energy"),
    ("edit", f"{APPEARANCE} --hold-object 0.4", "--hold-object"),
    ("edit", f"--mode fine {APPEARANCE} --hold-fill 0.77", "--hold-fill"),
    ("edit", f"{PASTE} --hold-fill 0.77", "--hold-fill"),
    ("stream", "--guidance none --cfg 2", "--cfg"),
    ("stream", "--guidance full --cfg 1", "--guidance"),
    ("stream", "--guidance none --delta 0.3", "--delta"),
    ("stream", "--cfg 1 --delta 0.3", "--delta"),
    ("stream", "--guidance full --cfg 2 --delta 0.3", "--delta"),
    ("stream", "--guidance self --cfg 2 --negative y", "--negative"),
    ("stream", "--guidance none --negative y", "--negative"),
    ("stream", "--t-index 20,40 --strength 0.7", "--strength"),
    ("stream", "--t-index 20,40 --steps 3", "--steps"),
    ("stream", "--steps 1 --renoise fresh", "--renoise"),
    ("stream", "--t-index 20 --cross-frame", "--cross-frame"),
    ("stream", "--input clip.mp4 --out b.mp4 --fps 30", "--fps"),
    ("stream", "--input webcam --out b.mp4 --fps 30", "--fps"),
    ("stream", "--input webcam:1 --out b.mp4 --drop", "--drop"),
    ("stream", "--prompt x --blend slerp", "--blend"),
    ("stream", "--blocks 4", "--blocks"),
    *(
        ("stream", f"--max-frames 1 {option}", option.split()[0])
        for option in ("--feedback 0.4", "--motion 0.5", "--cross-frame", "--frame-group 2")
    ),
    ("stream", "--graph", "--graph"),
    ("stream", "--graph --device cpu", "--graph"),
    ("live", "--guidance none --cfg 2", "--cfg"),
    ("live", "--guidance full --cfg 1", "--guidance"),
    ("live", "--guidance none --delta 0.3", "--delta"),
    ("live", "--guidance full --cfg 2 --delta 0.3", "--delta"),
    ("live", "--guidance self --cfg 2 --negative y", "--negative"),
    ("live", "--t-index 20,40 --strength 0.7", "--strength"),
    ("live", "--t-index 20,40 --steps 3", "--steps"),
    ("live", "--steps 1 --renoise fresh", "--renoise"),
    ("live", "--t-index 20 --cross-frame", "--cross-frame"),
    ("live", "--osc-host 0.0.0.0", "--osc-host"),
    ("live", "--device cpu --acceleration graph", "--acceleration"),
    ("live", "--priority 3", "--priority"),
    ("push", "--host a:1/b --input webcam --fps 30", "--fps"),
    ("push", "--host a:1/b --input= --out o.mp4 --fps 30", "--fps"),
    ("push", "--host a:1/b --input= --out o.mp4 --loop", "--loop"),
    ("stream", "--acceleration graph --device cpu", "--acceleration"),
    ("stream", "--acceleration compile --graph --device cuda", "--graph"),
    ("stream", "--priority 2", "--priority"),
    ("stream", "--priority throughput --frame-group 2", "--priority"),
    ("stream", "--priority throughput --max-frames 1", "--priority"),
    ("search", "--reference .", "--reference"),
    ("search", "--cfg 1 --negative y", "--negative"),
    ("search", "--objective reference-mmd --reference . --full karras", "--full"),
    ("search", "--steps 4 --computed 4 --no-fit", "--computed"),
    ("search", "--no-fit", "--no-fit"),
    ("search", "--workers 2", "--workers"),
    ("compare", "--objective self-mmd --reference .", "--reference"),
    ("compare", "--cfg 1 --negative y", "--negative"),
    ("lmd masks", "--kind fixed --low 0.3", "--low"),
    ("lmd masks", "--kind fixed --direction increasing", "--direction"),
    ("lmd masks", "--steps 1 --kind linear", "--kind"),
    ("lmd masks", "--steps 1 --low 0.3", "--low"),
    ("lmd masks", "--steps 1 --direction increasing", "--direction"),
    ("lmd masks", "--steps 1 --free", "--free"),
    ("lmd regenerate", "--kind fixed --low 0.3", "--low"),
    ("lmd regenerate", "--kind fixed --direction increasing", "--direction"),
    ("lmd regenerate", "--rounds 1 --kind linear", "--kind"),
    ("lmd regenerate", "--rounds 1 --low 0.3", "--low"),
    ("lmd regenerate", "--rounds 1 --direction increasing", "--direction"),
    ("lmd regenerate", "--rounds 1 --free", "--free"),
    ("lmd regenerate", "--rounds 1 --strength-end 0.3", "--strength-end"),
    ("lmd regenerate", "--cfg 1 --negative y", "--negative"),
    *(
        ("lmd fill", f"--steps 0 {option}", option.split()[0])
        for option in ("--prompt x", "--negative y", "--strength 0.3", "--cfg 2", "--seed 3")
    ),
    ("lmd fill", "--cfg 1 --negative y", "--negative"),
    ("lmd stretch", "--next b.png", "--next"),
    ("lmd stretch", "--window 5", "--window"),
    ("lmd stretch", f"{NEXT} --radius 9", "--radius"),
]  # fmt: skip

# The other options: each counts in every state, or is one of `cli.options.add_without_effect`.
MODEL = "model vae device dtype"
ALWAYS = {
    "cow": f"image mask invert_mask prompt out strip size scale x y background steps cfg_scale inversion_cfg cycles low high follow start "
    f"seed no_paste {MODEL}",
    "demo": f"out scenes size seed {MODEL}",
    "edit": "image preview only_preview move remove paste appearance drag",
    "search": f"prompt prompts sampler cfg_scale size objective features pairs seed batch steps evaluations minutes strategy layers begin "
    f"search_first_level store ray out chart {MODEL}",
    "compare": f"prompt prompts sampler cfg_scale size objective features pairs seed batch stock_steps repeats chart {MODEL}",
    "stream": f"input out prompt size max_frames t_index seed consistency similarity {MODEL}",
    "live": f"prompt size host port osc once t_index seed consistency similarity feedback motion {MODEL}",
    "push": "host input out prompt strength",
    "osc": "host osc osc_host",
    "lmd masks": f"steps size high patch mask_seed out {MODEL}",
    "lmd regenerate": f"image prompt mask size strength steps cfg_scale candidates seed rounds high patch mask_seed out {MODEL}",
    "lmd train": f"images out size steps batch learning_rate network patch ratio masks no_mirror restart cache chart seed {MODEL}",
    "lmd fill": f"fill image mask size steps out {MODEL}",
    "lmd influence": f"before after mask size seed out {MODEL}",
    "lmd stretch": f"image drag size seed out {MODEL}",
}  # fmt: skip


def parsed(command: str, options: str) -> tuple[Parser, argparse.Namespace]:
    needs = "" if "--image" in options or "--input" in options else NEEDS[command]
    args = build_parser().parse_args(joined_sizes([*command.split(), *needs.split(), *options.split()]))
    return args.parser, args


def warned(command: str, options: str) -> list[str]:
    parser, args = parsed(command, options)
    return list(parser.warnings(args))


@pytest.fixture(autouse=True)
def folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", NEEDS)
def test_the_defaults_warn_of_nothing(command: str) -> None:
    assert warned(command, "") == []


@pytest.mark.parametrize(("command", "options", "name"), CASES)
def test_an_option_without_effect_is_named(command: str, options: str, name: str) -> None:
    (text,) = (text for text in warned(command, options) if name in text.split(" no effect ")[0].split())
    assert text.startswith(f"{name} has no effect ")
    assert text.endswith(".")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("stream", "--guidance onetime --cfg 2 --delta 0.3 --negative y --steps 2 --renoise fresh --cross-frame --fps 30"),
        ("stream", "--guidance none --cfg 1 --strength 0.3 --drop --similarity 0.9 --blocks 4 --feedback 0.2"),
        ("stream", "--graph --device cuda:1"),
        ("stream", "--acceleration compile --priority 2"),
        ("stream", "--priority throughput"),
        ("cow", "--negative y --softness 5"),
        ("cow", "--model pocket-lcm --inversion-cfg 1.5 --negative y"),
        ("edit", f"{APPEARANCE} --hold-fill 0.77"),
        ("edit", "--mode fine --negative y --energy 0.3 --memory row --hold-object 0.9 --hold-fill 0.9"),
        ("edit", "--only-preview --out o.png"),
        ("search", "--objective reference-mmd --reference . --steps 6 --computed 2 --ray local --workers 2"),
        ("search", "--full karras --computed 2 --no-fit"),
        ("search", "--steps 4 --computed 4"),
        ("lmd regenerate", "--kind linear --low 0.3 --rounds 2 --strength-end 0.3 --free --negative y"),
        ("lmd fill", "--prompt x --negative y --strength 0.3 --seed 3"),
        ("lmd stretch", f"{NEXT} --window 5"),
    ],
)  # fmt: skip
def test_an_option_with_an_effect_does_not_warn(command: str, options: str) -> None:
    assert warned(command, options) == []


@pytest.mark.parametrize("command", NEEDS)
def test_every_option_has_a_rule_with_a_case_or_always_counts(command: str) -> None:
    parser, _ = parsed(command, "")
    shown = {
        a.dest: a.option_strings[0]
        for a in parser._actions
        if a.option_strings and a.dest not in ("help", "width", "height")
    }
    ruled = {name for rule in parser.unused for name in rule.inputs.split()}
    always = set(ALWAYS[command].split())
    assert always.isdisjoint(ruled)
    assert set(shown) == always | ruled, "a new option: when has it no effect? Give it a rule, or list it here"
    for rule in parser.unused:
        for name in rule.inputs.split():
            states = [parsed(c, options)[1] for c, options, option in CASES if c == command and option == shown[name]]
            assert any(rule.when(state) for state in states), f"{name} {rule.why}"


def test_a_command_warns_before_it_works(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["cow", "--image", "none.png", "--prompt", "x", "--no-paste", "--softness", "5"]) == 2
    assert caplog.messages == ["--softness has no effect with --no-paste. Leave one of them out."]
