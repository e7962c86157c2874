"""Samples of the teacher: losers for the rewards, and the sheets that people look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mini.concepts import CONCEPTS, STYLES
from mini.prompts import named, styled
from mini.teacher import MAX_LENGTH
from rats.pipeline import solver
from rats.pipeline.families.models import FamilyTeacher
from rats.pipeline.families.open import Model
from rats.pipeline.noise import noise
from rats.schemas.identity import prompt_id
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams


def open_miniature(folder: Path, scale: float) -> FamilyTeacher:
    """The pipeline folder with true guidance `scale`, in fp32: what its embedded guidance is learned from."""
    size = {"max_sequence_length": MAX_LENGTH, "height": 32, "width": 32}
    settings = TeacherParams(guidance_scale=1.0, true_cfg_scale=scale, **size)
    compute = ComputeParams(threads=torch.get_num_threads())
    return Model(ModelParams(path=str(folder)), settings, compute).open_teacher()


@torch.no_grad()
def sample(teacher: FamilyTeacher, prompts: list[str], steps: int, seed: int, guided: bool = True) -> np.ndarray:
    """uint8 (B, 32, 32, 3) of `steps` Euler steps, guided or not, from each prompt's own noise."""
    conditioning = teacher.encode(prompts)
    start = torch.stack([noise(seed, prompt_id(p), i, teacher.latent_shape()) for i, p in enumerate(prompts)])
    velocity = teacher.guided_velocity if guided else teacher.velocity
    states, _ = solver.euler(lambda x, s: velocity(x, s, conditioning), start, teacher.stock_sigmas(steps))
    return np.uint8(np.round(255 * teacher.decode(states[-1]).permute(0, 2, 3, 1).numpy()))


def losers(teacher: FamilyTeacher, rounds: int = 12) -> np.ndarray:
    """Samples of every concept, (concepts, rounds, 32, 32, 3), at 4 to 20 steps, guided or not, of any style."""
    pictures = []
    for turn in range(rounds):
        texts = [named(c) if turn % 4 == 3 else styled(c, STYLES[turn % 4]) for c in CONCEPTS]
        pictures.append(sample(teacher, texts, (4, 6, 8, 12, 16, 20)[turn % 6], 100 + turn, guided=turn % 3 != 0))
    return np.stack(pictures, 1)


def sheet(rows: list[np.ndarray], path: Path, zoom: int = 2) -> None:
    """Rows of pictures (each (n, 32, 32, 3)) as one PNG."""
    page = np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page).resize((page.shape[1] * zoom, page.shape[0] * zoom), Image.Resampling.NEAREST).save(path)
