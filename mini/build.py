"""Trains everything below `assets/`: `python -m mini.build --work DIR`, or one stage of it with `--only`.

Every stage goes on from its checkpoint in the work folder by the same command. `--pack FILE` writes the drawings into
one file, from which `--drawings FILE` builds on a machine without a network; `--scale 0.01` tries the whole chain out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mini import data, flow, teacher, vae
from mini.workplace import Workplace

VAE_STEPS = 2400
TEACHER = flow.Schedule(plain=24000, guided=6000, decay=6000)


def train_vae(place: Workplace, steps: int) -> None:
    """The autoencoder, then the latents of everything that the teacher sees."""
    if (place.work / "latents.pt").exists():
        return
    pictures = place.pictures.reshape(-1, *place.pictures.shape[3:])
    model = vae.train(pictures, place.work / "vae.pt", steps, place.device)
    print(f"vae PSNR {vae.psnr(model, pictures[::97]):.2f} dB", flush=True)
    place.write_latents(model)


def train_teacher(place: Workplace, schedule: flow.Schedule, how: flow.Settings) -> teacher.Miniature:
    """The FLUX miniature; returns its average."""
    torch.manual_seed(1)
    model = teacher.Miniature(*place.tokenizers)
    arguments = (place.latents, place.teacher_captions(), place.work / "teacher.pt", schedule, how)
    return flow.Training(model, *arguments).run()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="packages, checkpoints and cached latents")
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--drawings", type=Path, help="what --pack wrote; without it npm fetches the packages")
    parser.add_argument("--pack", type=Path, help="write the drawings into this file and stop")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps")
    parser.add_argument("--plain", type=int, default=TEACHER.plain, help="the teacher's steps at a constant rate")
    parser.add_argument("--guided", type=int, default=TEACHER.guided, help="then with guidance")
    parser.add_argument("--decay", type=int, default=TEACHER.decay, help="then with a falling rate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Parses the command line and builds."""
    asked = parse()
    torch.set_num_threads(asked.threads)
    asked.work.mkdir(parents=True, exist_ok=True)
    place = Workplace(asked.work, asked.drawings, asked.device, asked.threads)
    if asked.pack:
        data.pack(place.folders, asked.pack)
        return
    steps = [round(count * asked.scale) for count in (VAE_STEPS, asked.plain, asked.guided, asked.decay)]
    train_vae(place, steps[0])
    train_teacher(place, flow.Schedule(*steps[1:]), flow.Settings(device=asked.device))


if __name__ == "__main__":
    main()
