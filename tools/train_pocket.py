"""Train the bundled pocket model from nothing: procedural captioned scenes, no downloads, a CPU is enough.

    python -m tools.train_pocket vae        the autoencoder
    python -m tools.train_pocket text       tokenizer and text encoder
    python -m tools.train_pocket unet       the diffusion model; writes --out
    python -m tools.train_pocket lcm        the few-step student; adds to --out
    python -m tools.train_pocket checker    the network that measures caption accuracy
    python -m tools.train_pocket eval       caption accuracy of --out
    python -m tools.train_pocket sheet      a contact sheet of --out

and of the bundled flow model, by one command that goes through its stages and continues where it was stopped:

    python -m tools.train_pocket flow --work out/flow_work --out out/pocket_flow

Its stages alone: flow-text, flow-vae, flow-dit, flow-decoder (while flow-dit runs), flow-checker, flow-eval, flow-sheet. It needs
fonts-noto-color-emoji. On one GPU it is made to end within nine minutes; on a CPU it may run for hours in the background: --minutes is
the time of flow-dit, and a longer one continues a training that had ended.

Run from the root of the repository. Each stage stops when its --minutes are over, saves itself once a minute into --work, and
continues from there when it is started again. On a CPU two processes of one thread train nearly twice as fast as one of two:

    torchrun --nproc-per-node 2 -m tools.train_pocket unet
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .pocket import checker as reading
from .pocket import sampling
from .pocket.emoji import OBJECTS
from .pocket.flow_checker import WEIGHTS, FlowCheckerSettings, load_flow_checker, train_flow_checker
from .pocket.flow_checker import score as flow_score
from .pocket.flow_sampling import FlowPipeline, held_out, plain_shapes, read_by_pixels
from .pocket.flow_scenes import FEW_OBJECTS, make_atlas
from .pocket.flow_scenes import render as render_flow
from .pocket.scenes import caption, sample_scene
from .pocket.train_checker import CheckerSettings, train_checker
from .pocket.train_flow import FlowSettings, on_gpu, train_flow
from .pocket.train_flow_text import FlowTextSettings, train_flow_text
from .pocket.train_flow_vae import FlowVaeSettings, train_flow_vae
from .pocket.train_lcm import LcmSettings, train_lcm
from .pocket.train_text import TextSettings, train_text
from .pocket.train_unet import UnetSettings, train_unet
from .pocket.train_vae import VaeSettings, train_vae

SETTINGS: dict[str, Any] = {
    "vae": VaeSettings(),
    "text": TextSettings(),
    "unet": UnetSettings(),
    "lcm": LcmSettings(),
    "checker": CheckerSettings(),
    "flow-text": FlowTextSettings(),
    "flow-vae": FlowVaeSettings(),
    "flow-dit": FlowSettings(),
    "flow-decoder": FlowVaeSettings(minutes=60.0, decoder_only=True, lr=1e-3),
    "flow-checker": FlowCheckerSettings(),
}
FLOW_STAGES = ("flow-text", "flow-vae", "flow-dit", "flow-checker")
# What each stage of `flow` changes on one GPU; nine minutes in all with the loading. See `on_gpu` for flow-dit.
ON_GPU: dict[str, dict[str, Any]] = {
    "flow-text": {"minutes": 0.4, "batch": 512},
    "flow-vae": {"minutes": 1.5, "batch": 64, "full_batch": 16, "pool": 512},
    "flow-decoder": {"minutes": 1.5, "batch": 64, "full_batch": 16, "pool": 512},
    "flow-checker": {"minutes": 1.0, "batch": 256, "pool": 2560},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*SETTINGS, "eval", "sheet", "flow", "flow-eval", "flow-sheet"])
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path("out/pocket_work"), help="checkpoints and caches"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/pocket"), help="the pipeline folder")
    parser.add_argument("--minutes", type=float, help="training time; default: the stage's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process")
    parser.add_argument("--n", type=int, default=64, help="images of eval and sheet")
    parser.add_argument("--steps", type=int, default=20, help="steps of flow-eval and flow-sheet")
    parser.add_argument(
        "--few", action="store_true", help="flow-eval and flow-sheet: the objects that a CPU is trained on"
    )
    parser.add_argument("--student", action="store_true", help="eval and sheet: the few-step student, 4 steps")
    return parser.parse_args()


def draw(args: argparse.Namespace) -> tuple[torch.Tensor, list[Any], list[str]]:
    """Images of held-out captions: three quarters with one object."""
    rng = np.random.default_rng(4242)
    scenes = [sample_scene(rng, 2 if i % 4 == 3 else 1) for i in range(args.n)]
    captions = [caption(s) for s in scenes]
    pipe = sampling.load_pipeline(args.out, args.student, args.device)
    noise = sampling.start_noise(pipe.unet, args.n, seed=1)
    latents = []
    for i in range(0, args.n, 32):
        part, start = captions[i : i + 32], noise[i : i + 32]
        latents.append(
            sampling.lcm_latents(pipe, part, start, 4, seed=1)
            if args.student
            else sampling.ddim_latents(pipe, part, start)
        )
    return sampling.decode(pipe.vae, torch.cat(latents)), scenes, captions


def evaluate(args: argparse.Namespace) -> None:
    images, scenes, _ = draw(args)
    for name, value in reading.score(reading.load_checker(), images, scenes).items():
        print(f"{name:12} {100 * value:5.1f} %")


def sheet(args: argparse.Namespace) -> None:
    images, _, captions = draw(args)
    path = args.work / f"sheet{'_student' if args.student else ''}.png"
    sampling.contact_sheet(images, captions).save(path)
    print(path)


def flow_settings(stage: str, device: str, minutes: float | None) -> Any:
    """Settings of a stage of the flow model on this device."""
    settings = SETTINGS[stage]
    if device != "cpu":
        settings = on_gpu(settings) if stage == "flow-dit" else dataclasses.replace(settings, **ON_GPU[stage])
    return settings if minutes is None else dataclasses.replace(settings, minutes=minutes)


def flow_stage(stage: str, args: argparse.Namespace, minutes: float | None) -> None:
    settings = flow_settings(stage, args.device, minutes)
    match stage:
        case "flow-text":
            train_flow_text(args.work, args.device, settings)
        case "flow-vae" | "flow-decoder":
            train_flow_vae(args.work, args.device, settings)
        case "flow-dit":
            train_flow(args.work, args.out, args.device, settings)
        case "flow-checker":
            train_flow_checker(args.work, args.device, settings)


def drawn(args: argparse.Namespace) -> tuple[str, ...]:
    return FEW_OBJECTS if args.few else tuple(OBJECTS)


def flow_eval(args: argparse.Namespace) -> None:
    """Print what is read from rendered scenes, from scenes through the autoencoder, and from images of held-out captions.

    Of coloured shapes on plain backgrounds by their pixels; of all others by the checker: the one of `work`, else the bundled one.
    """
    pipe, atlas = FlowPipeline(args.out, args.device), make_atlas()
    cases = [("one coloured shape on a plain background, read by pixels", *plain_shapes(args.n), read_by_pixels)]
    trained = args.work / WEIGHTS.name
    read = functools.partial(flow_score, load_flow_checker(trained if trained.exists() else WEIGHTS))
    for pairs, objects in enumerate(("one object", "two objects")):
        cases.append((f"{objects}, read by the checker", *held_out(args.n, pairs, drawn(args)), read))
    for title, scenes, captions, read in cases:
        real = render_flow(scenes, atlas)
        columns = {"real": real, "vae": pipe.rebuilt(real), f"{args.steps} steps": pipe.draw(captions, args.steps)}
        print_table(f"{title}, {len(captions)} captions", {name: read(x, scenes) for name, x in columns.items()})


def print_table(title: str, columns: dict[str, dict[str, float]]) -> None:
    """Markdown, attributes down and columns across, in percent."""
    print(f"\n{title}\n\n| % right | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
    for name in next(iter(columns.values())):
        print(f"| {name} | {' | '.join(f'{100 * c[name]:.1f}' for c in columns.values())} |")


def flow_sheet(args: argparse.Namespace) -> None:
    _, captions = held_out(args.n, 0.25, drawn(args))
    path = args.work / "sheet.png"
    sampling.contact_sheet(FlowPipeline(args.out, args.device).draw(captions, args.steps), captions).save(path)
    print(path)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # on a GPU; a CPU computes as before
    args.work.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    settings: Any = SETTINGS.get(args.stage)
    if settings is not None and args.minutes is not None:
        settings = dataclasses.replace(settings, minutes=args.minutes)
    if args.stage.startswith("flow"):
        run_flow(args)
    else:
        run(args, settings)


def run_flow(args: argparse.Namespace) -> None:
    match args.stage:
        case "flow":
            for stage in FLOW_STAGES:
                flow_stage(stage, args, args.minutes if stage == "flow-dit" else None)
            flow_sheet(args)
        case "flow-eval":
            flow_eval(args)
        case "flow-sheet":
            flow_sheet(args)
        case stage:
            flow_stage(stage, args, args.minutes)


def run(args: argparse.Namespace, settings: Any) -> None:
    match args.stage:
        case "vae":
            train_vae(args.work, args.device, settings)
        case "text":
            train_text(args.work, args.device, settings)
        case "checker":
            train_checker(args.work, args.device, settings)
        case "unet":
            train_unet(args.work, args.out, args.device, settings)
            sheet(args)
        case "lcm":
            train_lcm(args.work, args.out, args.device, settings)
            sheet(argparse.Namespace(**{**vars(args), "student": True}))
        case "eval":
            evaluate(args)
        case "sheet":
            sheet(args)


if __name__ == "__main__":
    main()
