"""`slipstream doctor`: what a report of a fault should tell, to paste."""

from __future__ import annotations

import argparse
from typing import Any

from .. import __version__
from ..core import doctor
from .options import add_model, add_size, check_cells, load_pipeline, size_of

SIZE = (128, 128)


def add_parser(subparsers: Any) -> None:
    """Declare `doctor`."""
    parser = subparsers.add_parser(
        "doctor", help="versions, devices, attention, and which stage limits a stream, to paste into a report"
    )
    add_size(parser, "of the frames that are timed (default 128x128)")
    add_model(parser, "pocket-lcm")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Print the report; what is installed comes first, because a model may not load."""
    print(doctor.report({"Slipstream": __version__}, doctor.versions(), doctor.devices(), doctor.attention()))
    height, width = size_of(args, SIZE)
    pipe = load_pipeline(args)
    check_cells(pipe, height, width)
    model = {"model": f"{type(pipe.model.network).__name__}, {pipe.device}, {str(pipe.dtype).removeprefix('torch.')}"}
    print(doctor.report(model, doctor.stages(pipe, height, width)))
    return 0
