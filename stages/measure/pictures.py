"""The pictures of an evaluation: which ones are kept, and in which file.

A sheet is uint8 (P, H, W, 3) for one system. Pictures are chosen by seed before anything is sampled, never by hand.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rats.pipeline.bounds import bounded_file
from rats.pipeline.files.atomic import atomic_write
from rats.schemas.errors import DataError

Picture = NDArray[np.uint8]

PICTURES_FILE = "pictures.safetensors"
"""The file's name, beside evaluate.json."""

LONGEST_SIDE = 256
"""Larger pictures are shrunk for the report: an evaluation at 1024 px would fill hundreds of megabytes."""
PROMPTS_ACROSS_NOISES = 3
NOISES_SHOWN = 6


@dataclass(frozen=True)
class SystemLabel:
    """Which system a column of pictures is of: kind, variant, steps and evaluations."""

    id: str
    system: str
    variant: str
    nfe: int
    evaluations: int


@dataclass(frozen=True)
class Choice:
    """The samples to show: `side` for the comparison of systems, and `noises`, several noises of some prompts."""

    side: list[int]
    noises: list[list[int]]

    def rows(self) -> set[int]:
        """All of them."""
        return set(self.side).union(*self.noises) if self.noises else set(self.side)


@dataclass
class Pictures:
    """What the report shows. `side[id]` is (P, H, W, 3); `noises[id]` is a list of (M, H, W, 3).

    `prompts` and `keys` are those of the P samples in `side`, `noise_prompts` those of `noises`.
    """

    columns: list[SystemLabel]
    prompts: list[str]
    keys: list[str]
    noise_prompts: list[str]
    seed: int
    size: tuple[int, int]
    side: dict[str, Picture] = field(default_factory=dict)
    noises: dict[str, list[Picture]] = field(default_factory=dict)


def choose(concepts: Sequence[str], prompt_ids: Sequence[str], count: int, seed: int) -> Choice:
    """Chooses `count` samples of as many concepts as possible, and a few prompts with several noises."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(concepts)).tolist()
    side = _spread_over(order, concepts)[:count]
    by_prompt: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompt_ids):
        by_prompt.setdefault(prompt, []).append(row)
    several = [row for row in order if len(by_prompt[prompt_ids[row]]) > 1]
    firsts = _spread_over(several, concepts)[:PROMPTS_ACROSS_NOISES]
    return Choice(side, [by_prompt[prompt_ids[row]][:NOISES_SHOWN] for row in firsts])


def _spread_over(order: Iterable[int], labels: Sequence[str]) -> list[int]:
    """The same rows in another order: first one of each label, then a second of each, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for row in order:
        turns.append((seen.get(labels[row], 0), row))
        seen[labels[row]] = turns[-1][0] + 1
    return [row for _, row in sorted(turns, key=lambda turn: turn[0])]


def to_picture(image_3HW: NDArray[np.float32]) -> Picture:
    """An image in [0, 1] as (H, W, 3) uint8, rounded as diffusers rounds, shrunk to LONGEST_SIDE.

    Of a video (K, 3, H, W) a strip (H, K W, 3) of its frames, each shrunk so.
    """
    if image_3HW.ndim == 4:
        return np.concatenate([to_picture(frame) for frame in image_3HW], axis=1)
    pixels = (np.asarray(image_3HW, np.float32).transpose(1, 2, 0) * 255).round().astype(np.uint8)
    if max(pixels.shape[:2]) <= LONGEST_SIDE:
        return pixels
    picture = Image.fromarray(pixels)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def save_pictures(path: Path, pictures: Pictures) -> None:
    """One safetensors file with one metadata key (two would make its bytes vary)."""
    tensors = {f"side/{name}": sheet for name, sheet in pictures.side.items()}
    for name, rows in pictures.noises.items():
        tensors |= {f"noises/{name}/{i}": row for i, row in enumerate(rows)}
    about = {
        "columns": [asdict(column) for column in pictures.columns],
        "prompts": pictures.prompts,
        "keys": pictures.keys,
        "noise_prompts": pictures.noise_prompts,
        "seed": pictures.seed,
        "size": pictures.size,
    }
    text = json.dumps(about, sort_keys=True, ensure_ascii=False)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in sorted(tensors.items())}
    atomic_write(path, save(contiguous, metadata={"about": text}))


def load_pictures(path: Path) -> Pictures:
    """Reads what `save_pictures` wrote; DataError when it is missing or something else."""
    try:
        with safe_open(bounded_file(path), framework="numpy") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        columns = [SystemLabel(**column) for column in about["columns"]]
        prompts, keys, noise_prompts = (about[name] for name in ("prompts", "keys", "noise_prompts"))
        shown = Pictures(columns, prompts, keys, noise_prompts, about["seed"], tuple(about["size"]))
        for column in columns:
            shown.side[column.id] = tensors[f"side/{column.id}"]
            shown.noises[column.id] = [tensors[f"noises/{column.id}/{i}"] for i in range(len(shown.noise_prompts))]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds no pictures of an evaluation ({error}): run `rats stage evaluate`") from error
    return shown


def make_image_grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture unchanged; several in a nearly square grid."""
    width, height = pictures[0].size
    columns = math.ceil(math.sqrt(len(pictures)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def encode_image(picture: Image.Image, suffix: str) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(suffix, "PNG"))
    return buffer.getvalue()
