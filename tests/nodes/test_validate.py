"""Typed values that cannot work are refused by VALIDATE_INPUTS, in one sentence, before anything runs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import slipstream
from slipstream_tests.host import graph

NODES: dict[str, type[Any]] = slipstream.NODE_CLASS_MAPPINGS
VALIDATING = [id for id, node in NODES.items() if hasattr(node, "VALIDATE_INPUTS")]
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("SeedCanvas", {"colour": "red"}, "`colour` as #rrggbb, but got 'red'"),
    ("SeedCanvas", {"colour": "#12345"}, "`colour` as #rrggbb"),
    ("SeedCanvas", {"width": 90}, "`width` as a multiple of 8, but got 90. Use 88"),
    ("SeedCanvas", {"height": 9}, "`height` as a multiple of 8, but got 9. Use 8"),
    ("CowSampler", {"low": 0.7}, "`low` below `high` 0.6, but got 0.7"),
    ("CowSampler", {"high": 3.0}, "`high` between 0 and 1.0, but got 3.0"),
    ("CowSampler", {"low": 20.0, "high": 10.0, "range_unit": "noise level"}, "`low` below `high` 10.0, but got 20.0"),
    (
        "CowSampler",
        {"range_unit": "steps"},
        "`range_unit` to be one of 'training time', 'noise level', but got 'steps'",
    ),
    ("CowSampler", {"low": -1.0}, "`low` between 0.0 and 1000.0, but got -1.0"),
    ("SeedCanvas", {"canvas": "a circle"}, "`canvas` as JSON"),
    ("Move", {"canvas": "a circle"}, '`canvas` as JSON such as {"size"'),
    ("Paste", {"canvas": '{"shapes": [{"box": [1, 2]}]}'}, "Clear it, or draw again"),
    ("Drag", {"canvas": "[1, 2]"}, "`canvas` as JSON"),
    ("Remove", {"canvas": "a circle"}, "`canvas` as JSON"),
    ("Appearance", {"canvas": "a circle"}, "`canvas` as JSON"),
    ("Appearance", {"reference_canvas": "a circle"}, "`reference_canvas` as JSON"),
    ("Drag", {"handles": "here"}, "`handles` as lines of 'x, y -> x, y'"),
    ("Drag", {"handles": "here", "targets": "[[1, 2]]"}, "`handles` as a JSON list of points"),
    ("Drag", {"targets": '[{"x": 1}]'}, "`targets` as a JSON list of points"),
    ("Drag", {"handles": "[[1, 2], [3, 4]]", "targets": "[[1, 2]]"}, "as many `targets` as `handles` (2), but got 1"),
    ("Drag", {"handles": "[]", "targets": ""}, "at least one pair"),
    ("Drag", {"handles": "[[1, 2]]", "targets": "[[1, 2]]"}, "a target away from its handle"),
    ("Drag", {"handles": "[[1, 2], [5, 5]]", "targets": "[[9, 9], [9, 9]]"}, "targets that differ"),
    ("Drag", {"handles": "[[NaN, 2]]", "targets": "[[1, 2]]"}, "JSON list of points in pixels"),
    ("MaskSchedule", {"low": 0.9}, "`high` between 0.9 and 1, but got 0.75"),
    ("MaskSchedule", {"patch": 600}, "`patch` between 0 and 512, but got 600"),
    ("MaskSchedule", {"patch": -1}, "`patch` between 0 and 4096, but got -1"),
    ("MaskSchedule", {"high": 1.5}, "`high` between 0.0 and 1.0, but got 1.5"),
    ("MaskedRegenerate", {"high": 0.1}, "`high` between 0.15 and 1, but got 0.1"),
    ("TrainLatentFill", {"name": "a/b"}, "`name` to be a plain file name, but got 'a/b'"),
    ("TrainLatentFill", {"name": " "}, "`name` to be a plain file name"),
    ("TrainLatentFill", {"name": "NUL"}, "`name` to be a plain file name"),
    ("SaveSchedule", {"name": "com1.json"}, "`name` to be a plain file name"),
    ("SaveSchedule", {"name": "mine."}, "`name` to be a plain file name"),
    ("StretchMap", {"points": "60, 60 -> 90"}, "`points` as lines of 'x, y -> x, y', but got '60, 60 -> 90'"),
    ("SaveSchedule", {"name": "../mine"}, "`name` to be a plain file name, but got '../mine'"),
    ("SearchSchedule", {"evaluations": 0}, "a limit in `evaluations` or `minutes`"),
    ("SearchSchedule", {"evaluations": -1}, "`evaluations` between 0 and 1000000, but got -1"),
    (
        "ReferenceObjective",
        {"features": "inception", "inception_weights": "no/such.pth"},
        "`inception_weights` to be a file",
    ),
    ("SearchSchedule", {"computed": 6}, "`computed` between 1 and 4, but got 6"),
    ("SearchSchedule", {"computed": 2, "strategy": "published"}, "`strategy` other than published and `layers` off"),
    ("SearchSchedule", {"computed": 2, "layers": True}, "`strategy` other than published and `layers` off"),
    ("AddSchedule", {"levels": "1.0, many"}, "`levels` as numbers"),
    ("ReferenceObjective", {"features": "colour"}, "`features` to be one of"),
]


def validate(id: str, settings: dict[str, Any]) -> bool | str:
    """What the host would get: it gives the inputs that the function names, and leaves out linked ones."""
    node = NODES[id]
    names = set(inspect.signature(node.VALIDATE_INPUTS).parameters)
    specs = graph.all_inputs({"input": node.INPUT_TYPES()})
    assert names <= set(specs)
    values = {name: graph.default_of(list(specs[name])) for name in names} | settings
    return node.VALIDATE_INPUTS(**{name: value for name, value in values.items() if value is not None})


@pytest.mark.parametrize(("id", "settings", "message"), BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_bad_values_are_refused_in_one_sentence(id: str, settings: dict[str, Any], message: str) -> None:
    answer = validate(f"Slipstream{id}", settings)
    assert isinstance(answer, str)
    assert message in answer
    assert "\n" not in answer


@pytest.mark.parametrize("id", VALIDATING)
def test_the_defaults_are_accepted(id: str) -> None:
    assert validate(id, {}) is True


@pytest.mark.parametrize("id", VALIDATING)
def test_linked_inputs_are_not_judged(id: str) -> None:
    """The host does not know their values yet and leaves them out."""
    for name in inspect.signature(NODES[id].VALIDATE_INPUTS).parameters:
        assert validate(id, {name: None}) is True
    assert NODES[id].VALIDATE_INPUTS() is True
    assert isinstance(validate("SlipstreamCowSampler", {"low": -1.0, "high": None}), str)


def test_every_named_input_has_a_bad_case() -> None:
    """An input that VALIDATE_INPUTS names loses the host's own check of its range, so each is tested here."""
    for id in VALIDATING:
        if id == "SlipstreamLatentFill":  # accepts every name on purpose: its list may be older than the file
            continue
        named = {name for case, settings, _ in BAD if f"Slipstream{case}" == id for name in settings}
        specs = graph.all_inputs({"input": NODES[id].INPUT_TYPES()})
        for name in inspect.signature(NODES[id].VALIDATE_INPUTS).parameters:
            ranged = [value for value in ("min", "max") if value in specs[name][1]]
            for bound in ranged:
                beyond = specs[name][1][bound] + (-1 if bound == "min" else 1)
                assert isinstance(validate(id, {name: beyond}), str), f"{id}.{name} accepts {beyond}"
            assert ranged or name in named, f"{id}.{name} has no case"
