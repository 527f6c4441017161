"""Train the bundled pocket model from nothing: procedural captioned scenes, no downloads, a CPU is enough.

    python -m tools.train_pocket vae        the autoencoder
    python -m tools.train_pocket text       tokenizer and text encoder
    python -m tools.train_pocket unet       the diffusion model; writes --out
    python -m tools.train_pocket lcm        the few-step student; adds to --out
    python -m tools.train_pocket checker    the network that measures caption accuracy
    python -m tools.train_pocket eval       caption accuracy of --out
    python -m tools.train_pocket sheet      a contact sheet of --out

Run from the root of the repository. Each stage stops when its --minutes are over, saves itself once a minute into --work, and
continues from there when it is started again. On a CPU two processes of one thread train nearly twice as fast as one of two:

    torchrun --nproc-per-node 2 -m tools.train_pocket unet
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .pocket import checker as reading
from .pocket import sampling
from .pocket.scenes import caption, sample_scene
from .pocket.train_checker import CheckerSettings, train_checker
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
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*SETTINGS, "eval", "sheet"])
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path("out/pocket_work"), help="checkpoints and caches"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/pocket"), help="the pipeline folder")
    parser.add_argument("--minutes", type=float, help="training time; default: the stage's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process")
    parser.add_argument("--n", type=int, default=64, help="pictures of eval and sheet")
    parser.add_argument("--student", action="store_true", help="eval and sheet: the few-step student, 4 steps")
    return parser.parse_args()


def draw(args: argparse.Namespace) -> tuple[torch.Tensor, list[Any], list[str]]:
    """Pictures of held-out captions: three quarters with one object."""
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
    pictures, scenes, _ = draw(args)
    for name, value in reading.score(reading.load_checker(), pictures, scenes).items():
        print(f"{name:12} {100 * value:5.1f} %")


def sheet(args: argparse.Namespace) -> None:
    pictures, _, captions = draw(args)
    path = args.work / f"sheet{'_student' if args.student else ''}.png"
    sampling.contact_sheet(pictures, captions).save(path)
    print(path)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    settings: Any = SETTINGS.get(args.stage)
    if settings is not None and args.minutes is not None:
        settings = dataclasses.replace(settings, minutes=args.minutes)
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
