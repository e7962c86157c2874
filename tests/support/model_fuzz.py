"""Model folders with one file deleted, cut, exchanged or edited, and what a rollout draws from a folder."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rats.pipeline.families.open import Model
from rats.pipeline.solver import euler
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from tests.support import tiny, tiny_flux2, tiny_qwen
from tests.support.damage import cut
from tests.support.tiny_sd3 import write_sd3
from tests.support.tiny_wan import FRAMES, write_wan

PROMPT = "a red fox"
WRITERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "flux": (tiny.write_flux, {}),
    "sd3": (write_sd3, {}),
    "qwen-image": (tiny_qwen.write_qwen_image, {"max_sequence_length": tiny_qwen.LENGTH}),
    "flux2": (tiny_flux2.write_flux2, {"max_sequence_length": tiny_flux2.LENGTH}),
    "wan": (partial(write_wan, scheduler="unipc"), {"frames": FRAMES, "scored_frames": 2}),
}
"""By family: what writes its tiny folder, and the settings that it needs besides."""
VALUES: list[Any] = [None, "", "x", -3, 0, 10**9, 2.5, [], {}, [None], True, {"a": []}]
"""Put where a configuration holds something else."""
HEADER = 8
"""Bytes at the start of a safetensors file that count those of its header."""


def write_all(folder: Path) -> Path:
    """A tiny folder of every family below `folder`, by its name."""
    for family, (write, _) in WRITERS.items():
        write(folder / family)
    return folder


def opened(family: str, folder: Path) -> Model:
    """The tiny model in `folder`, as a project of the tests sets it up."""
    sizes = {"height": tiny.SIZE, "width": tiny.SIZE, "max_sequence_length": tiny.LENGTH}
    grid = {"steps": 3, "nfe": [3], "true_cfg_scale": 2.5}
    settings = TeacherParams(**sizes | grid | WRITERS[family][1])
    return Model(ModelParams(path=str(folder), family=family), settings, ComputeParams())


def drawn(family: str, folder: Path) -> str:
    """Hash of what a rollout stores of one prompt: its embeddings and the states of three guided steps."""
    model = opened(family, folder)
    model.hashes(), model.folder.scheduler_hash(), model.outline.grids()
    teacher = model.open_teacher()
    conditioning = teacher.encode([PROMPT])
    noise = torch.randn(1, *teacher.latent_shape(), generator=torch.Generator().manual_seed(5))
    states, _ = euler(lambda x, s: teacher.guided_velocity(x, s, conditioning), noise, teacher.stock_sigmas(3))
    digest = hashlib.sha256()
    for tensor in (*(conditioning[name] for name in sorted(conditioning)), *states):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def copied(folder: Path, to: Path) -> Path:
    """A copy whose files are links until one is written anew."""
    return Path(shutil.copytree(folder, to, copy_function=os.link))


def damage(folder: Path, generator: random.Random) -> str:
    """Spoils one file of a copy; returns what was done, for a failure's text."""
    path = generator.choice(files(folder))
    kind = generator.choice([delete, truncate, exchange, edit, edit])
    return f"{path.relative_to(folder)}: {kind.__name__} {kind(path, folder, generator)}"


def files(folder: Path) -> list[Path]:
    """All files, in one order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def delete(path: Path, folder: Path, generator: random.Random) -> str:
    path.unlink()
    return ""


def truncate(path: Path, folder: Path, generator: random.Random) -> str:
    data = cut(path.read_bytes(), generator)
    replace(path, data)
    return f"to {len(data)} bytes"


def exchange(path: Path, folder: Path, generator: random.Random) -> str:
    """Another file of the same kind in its place."""
    others = [other for other in files(folder) if other.suffix == path.suffix and other != path]
    other = generator.choice(others or [path])
    replace(path, other.read_bytes())
    return f"with {other.relative_to(folder)}"


def edit(path: Path, folder: Path, generator: random.Random) -> str:
    """A field of a JSON file, a tensor's entry in a header of weights, a piece of any other file.

    Numbers of weights stay: which are right, no reader can know.
    """
    data = path.read_bytes()
    if path.suffix == ".json":
        content = json.loads(data)
        said = edit_json(content, generator)
        replace(path, json.dumps(content).encode())
        return said
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:HEADER], "little")
        header = json.loads(data[HEADER : HEADER + size])
        said = edit_header(header, generator)
        text = json.dumps(header).encode()
        replace(path, len(text).to_bytes(HEADER, "little") + text + data[HEADER + size :])
        return said
    at = generator.randrange(len(data))
    replace(path, data[:at] + data[at + 9 :])
    return f"without nine bytes from {at}"


def edit_json(content: Any, generator: random.Random) -> str:
    """One field goes, or holds a value of another kind; in lists and inner objects too.

    A value of the same kind would be another model, as valid as this one; so would any in place of a null.
    """
    while True:
        keys = sorted(content) if isinstance(content, dict) else list(range(len(content)))
        key = generator.choice(keys)
        inner = content[key]
        if not (isinstance(inner, dict | list) and inner and generator.random() < 0.7):
            break
        content = inner
    values = [value for value in VALUES if not _same_kind(value, inner)]
    if inner is None or generator.random() < 0.4:
        del content[key]
        return f"{key!r} away"
    content[key] = generator.choice(values)
    return f"{key!r} from {str(inner)[:40]!r} to {content[key]!r}"


def _same_kind(value: Any, other: Any) -> bool:
    """Numbers are all of one kind."""
    return type(value) is type(other) or type(value) in (int, float) and type(other) in (int, float)


def edit_header(header: dict[str, Any], generator: random.Random) -> str:
    """A tensor goes, has another name, another shape or another type."""
    name = generator.choice(sorted(set(header) - {"__metadata__"}))
    kind = generator.choice(["gone", "renamed", "reshaped", "retyped"])
    entry = header.pop(name)
    if kind == "renamed":
        header[f"{name}_"] = entry
    elif kind == "reshaped":
        header[name] = entry | {"shape": [*entry["shape"], 1]}
    elif kind == "retyped":
        header[name] = entry | {"dtype": "F64"}
    return f"{name} {kind}"


def replace(path: Path, data: bytes) -> None:
    """The file anew: what it was linked to stays."""
    path.unlink()
    path.write_bytes(data)
