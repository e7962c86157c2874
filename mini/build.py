"""Trains everything below `assets/`: `python -m mini.build --work DIR`, or some of its stages with `--only`.

Every stage goes on from its checkpoint in the work folder by the same command. `--pack FILE` writes the drawings into
one file, from which `--drawings FILE` builds on a machine without a network; `--scale 0.01` tries the whole chain out;
`--minutes` gives each stage a share of that time instead of a number of steps. On a GPU without a network, nine
minutes from drawings to weights in pieces of at most 15 MiB (`cat assets.part-* | tar x` puts them together):

    python -m mini.build --work /tmp/mini --drawings drawings.tar --minutes 8 --device cuda --threads 16 --batch 512 \
        --only vae teacher polish folder rival rewards --parcel "$OUT"

The stages `judge` and `bars` need the two judges' packages (`pip install .[judge]`) and run anywhere afterwards.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mini import build_rewards, data, flow, handover, prompts, rivals, teacher, vae
from mini.budget import Budget
from mini.workplace import Workplace, made_once

STAGES = ("vae", "teacher", "polish", "folder", "rival", "rewards", "judge", "bars")

PIECE = 15 * 2**20

GUIDANCE = 3.0
"""The embedded scale at which the bars are measured."""


def train_vae(place: Workplace, budget: Budget) -> None:
    """The autoencoder, then the latents of everything that the teacher sees."""
    if (place.work / "latents.pt").exists():
        return
    pictures = place.flat_pictures
    steps = budget.steps("vae", lambda path, count: vae.train(pictures, path, count, place.device))
    model = vae.train(pictures, place.work / "vae.pt", steps, place.device)
    print(f"vae PSNR {vae.psnr(model, pictures[::97]):.2f} dB", flush=True)
    place.write_latents(model)


def train_teacher(place: Workplace, budget: Budget, how: flow.Settings) -> teacher.Miniature:
    """The FLUX miniature; returns its average."""
    captions, latents = place.teacher_captions(), place.latents.to(place.device)

    def train(path: Path, schedule: flow.Schedule) -> teacher.Miniature:
        torch.manual_seed(1)
        return flow.Training(teacher.Miniature(*place.tokenizers), latents, captions, path, schedule, how).run()

    schedule = budget.schedule("teacher", train)
    return train(place.work / "teacher.pt", schedule)


def polish(place: Workplace, budget: Budget) -> None:
    """The decoder alone, for longer: the latents stay as they are."""
    pictures = place.flat_pictures

    def train(path: Path, steps: int) -> Any:
        return vae.polish(place.load_vae(), pictures, path, steps)

    model = train(place.work / "polished.pt", budget.steps("polish", train))
    print(f"polished PSNR {vae.psnr(model, pictures[::97]):.2f} dB", flush=True)


def write_folder(place: Workplace, assets: Path, model: teacher.Miniature) -> None:
    """The teacher's pipeline folder and the prompts."""
    name = "polished" if (place.work / "polished.pt").exists() else "vae"
    shutil.rmtree(assets / "flux-mini", ignore_errors=True)
    teacher.save_pipeline(assets / "flux-mini", model.cpu(), place.load_vae(name).cpu(), *place.tokenizers)
    prompts.write_splits(assets / "prompts", place.keywords)


def train_rewards(place: Workplace, assets: Path, budget: Budget) -> None:
    """The three rewards; the small generator's pictures are drawn once."""
    losers = made_once(place.work / "losers.npy", lambda: rivals.losers(place, place.work / "rival"))
    build_rewards.build_all(place, losers, assets / "rewards", budget)


def measure(place: Workplace, assets: Path) -> None:
    """The bars, below the work folder."""
    from mini import bars  # the judges are packages that training does without

    figures = bars.write(
        place.pictures, assets / "flux-mini", place.work / "bars.json", place.device, GUIDANCE, (50, 3)
    )
    print(figures, flush=True)


def write_judges(place: Workplace, assets: Path) -> None:
    """What the judges see in the real drawings."""
    from mini import bars

    for name, judge in bars.networks().items():
        bars.write_judge(place.pictures, assets / "judge" / f"{name}.safetensors", judge)


def build(place: Workplace, assets: Path, budget: Budget, how: flow.Settings, wanted: list[str]) -> None:
    """The wanted stages, in their order."""
    if {"rival", "rewards"} & set(wanted):
        _ = place.pictures, place.further  # by forked processes, so before a GPU is in use
    if "vae" in wanted:
        train_vae(place, budget)
    model = train_teacher(place, budget, how) if {"teacher", "folder"} & set(wanted) else None
    if "polish" in wanted:
        polish(place, budget)
    if "folder" in wanted and model is not None:
        write_folder(place, assets, model)
    if "rival" in wanted:
        rivals.train(place, budget, replace(how, batch=48))
    if "rewards" in wanted:
        train_rewards(place, assets, budget)
    if "judge" in wanted:
        write_judges(place, assets)
    if "bars" in wanted:
        measure(place, assets)


def parcel(assets: Path, folder: Path) -> None:
    """All results as one tar in pieces, for a machine that returns few and small files."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        tar.add(assets, "assets")
    content = whole.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for index, start in enumerate(range(0, len(content), PIECE)):
        (folder / f"assets.part-{index}").write_bytes(content[start : start + PIECE])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="packages, checkpoints and cached latents")
    parser.add_argument("--assets", type=Path, help="where the results go; without it below --work")
    parser.add_argument("--drawings", type=Path, help="what --pack wrote; without it npm fetches the packages")
    parser.add_argument("--pack", type=Path, help="write the drawings into this file and stop")
    parser.add_argument("--parcel", type=Path, help="write all results into this folder, in pieces")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps")
    parser.add_argument("--minutes", type=float, help="of all training together, instead of numbers of steps")
    for name, count in vars(flow.TEACHER).items():
        parser.add_argument(f"--{name}", type=int, default=count, help="the teacher's steps in this phase")
    parser.add_argument("--batch", type=int, default=flow.Settings.batch, help="the teacher's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Parses the command line and builds."""
    asked = parse()
    torch.set_num_threads(asked.threads)
    asked.work.mkdir(parents=True, exist_ok=True)
    handover.take_up(asked.work)
    place = Workplace(asked.work, asked.drawings, asked.device, asked.threads)
    if asked.pack:
        data.pack(place.folders, asked.pack)
        return
    budget = Budget(asked.work, flow.Schedule(asked.plain, asked.guided, asked.decay), asked.scale, asked.minutes)
    how = flow.Settings(batch=asked.batch, device=asked.device)
    assets = asked.assets or asked.work / "assets"
    build(place, assets, budget, how, asked.only)
    if asked.parcel:
        parcel(assets, asked.parcel)


if __name__ == "__main__":
    main()
