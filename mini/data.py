"""Drawings and prompts: emoji by three designers, with unprompted variety.

The sources are npm packages (licences in NOTICE): `npm pack` fetches them once into a cache. `pack` copies what is
used of them into one file of about 13 MB, from which a machine without a network builds the same pictures.
Every picture is a function of (drawing, variant index), so that two builds see the same pixels.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mini.concepts import CONCEPTS, STYLES

PACKAGES = {
    "glossy": "@lobehub/fluent-emoji-3d@1.1.0",
    "soft": "emoji-datasource-google@16.0.0",
    "flat": "emoji-datasource-twitter@16.0.0",
    "names": "emojibase-data@17.0.0",
}
PATHS = {
    "glossy": "assets/{}.webp",
    "soft": "img/google/64/{}.png",
    "flat": "img/twitter/64/{}.png",
}
THINGS = (3, 4, 5, 6, 7)
"""Emojibase's groups of animals, food, places, activities and objects."""

CLOCKS = 58
"""Its subgroup of times of day, 24 of which are one clock."""

LABELS = "package/en/data.json"
PALETTE = ((255, 255, 255), (250, 222, 150), (178, 220, 245), (196, 232, 180), (242, 190, 205), (70, 78, 110))
"""Backgrounds, never named in a prompt: white, sand, sky, mint, rose, night."""

SIZE = 64
CANVAS = 2 * SIZE
"""Pixels a side at which a drawing is turned and shifted; then it is halved, which smooths its edges."""

VARIANTS = 48


def fetch(cache: Path) -> dict[str, Path]:
    """Unpacks the four packages below `cache`; a package that is there is not fetched again."""
    cache.mkdir(parents=True, exist_ok=True)
    folders = {}
    for key, package in PACKAGES.items():
        folders[key] = cache / key
        if not folders[key].exists():
            archive = subprocess.run(
                ["npm", "pack", package, "--silent"], cwd=cache, check=True, capture_output=True, text=True
            ).stdout.strip()
            with tarfile.open(cache / archive) as tar:
                tar.extractall(folders[key], filter="data")
    return folders


def pack(folders: dict[str, Path], path: Path) -> None:
    """Writes the drawings and the labels that a build uses, as they are in the packages, into one tar."""
    labels = load_labels(folders)
    ours = [labels[name] for name in [c.label for c in CONCEPTS] + further_labels(folders)]
    with tarfile.open(path, "w") as tar:
        _add(tar, f"names/{LABELS}", json.dumps(ours).encode())
        for style in STYLES:
            for entry in ours:
                file = drawing_file(folders, style, entry["hexcode"])
                _add(tar, f"{style}/{file.relative_to(folders[style])}", file.read_bytes())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def unpack(path: Path, cache: Path) -> dict[str, Path]:
    """Unpacks what `pack` wrote; the folders are those that `fetch` would give."""
    with tarfile.open(path) as tar:
        tar.extractall(cache, filter="data")
    return {key: cache / key for key in PACKAGES}


def load_labels(folders: dict[str, Path]) -> dict[str, dict]:
    """Emojibase entries by label: hexcode and keywords (`tags`)."""
    entries = json.loads((folders["names"] / LABELS).read_text())
    return {entry["label"]: entry for entry in entries}


def drawing_file(folders: dict[str, Path], style: str, hexcode: str) -> Path:
    """The file of one drawing; the sets differ in whether they spell the variation selector."""
    stem = hexcode.lower()
    for name in (stem, stem.replace("-fe0f", ""), stem + "-fe0f"):
        path = folders[style] / "package" / PATHS[style].format(name)
        if path.exists():
            return path
    raise FileNotFoundError(f"no drawing of {hexcode} in {PACKAGES[style]}")


def load_drawing(folders: dict[str, Path], style: str, hexcode: str) -> np.ndarray:
    """One drawing as premultiplied RGBA, float32 in [0, 1], (128, 128, 4)."""
    picture = Image.open(drawing_file(folders, style, hexcode)).convert("RGBA").convert("RGBa")
    return np.asarray(picture.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS), np.float32) / 255


def load_drawings(folders: dict[str, Path], names: list[str]) -> np.ndarray:
    """All designers' drawings of these labels, (labels, 3 styles, 128, 128, 4)."""
    labels = load_labels(folders)
    return np.stack([[load_drawing(folders, style, labels[name]["hexcode"]) for style in STYLES] for name in names])


def further_labels(folders: dict[str, Path]) -> list[str]:
    """Things outside our concepts that all three drew: the rewards learn to see on them.

    One that shares a word with a concept (black cat, green apple) is left out: it would show a test concept.
    """
    ours = {word for c in CONCEPTS for word in f"{c.label} {c.name}".lower().split()}
    found = [e for e in load_labels(folders).values() if e.get("group") in THINGS and e.get("subgroup") != CLOCKS]
    return [e["label"] for e in found if not ours & set(e["label"].lower().split()) and _drawn(folders, e["hexcode"])]


def _drawn(folders: dict[str, Path], hexcode: str) -> bool:
    try:
        return all(drawing_file(folders, style, hexcode).is_file() for style in STYLES)
    except FileNotFoundError:
        return False


def place(drawing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One variant: flip, scale 0.86 to 0.94, shift of up to 2 %, rotation up to 3 degrees, a background.

    uint8 (64, 64, 3). Wider ranges leave a small teacher with blurred drawings; flip, background and style are what
    a prompt leaves open.
    """
    scale, angle = rng.uniform(0.86, 0.94), np.deg2rad(rng.uniform(-3, 3))
    shift = rng.uniform(-0.02, 0.02, 2) * CANVAS
    flip = -1 if rng.random() < 0.5 else 1
    matrix = np.array([[np.cos(angle) * flip, np.sin(angle)], [-np.sin(angle) * flip, np.cos(angle)]]) / scale
    centre = np.full(2, CANVAS / 2)
    offset = centre - matrix @ (centre + shift)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    moved = np.stack([_halved(drawing[..., i], coefficients) for i in range(4)], -1)
    background = np.array(PALETTE[rng.integers(len(PALETTE))], np.float32) / 255
    return np.uint8(np.round(255 * np.clip(moved[..., :3] + (1 - moved[..., 3:]) * background, 0, 1)))


def _halved(channel: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """One channel of a drawing, moved and brought down to 64 pixels."""
    image = Image.fromarray(channel)
    moved = image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.asarray(moved.resize((SIZE, SIZE), Image.Resampling.BOX))


def variants_of(job: tuple[np.ndarray, list[int], int]) -> np.ndarray:
    """The first variants of one drawing, (count, 64, 64, 3); `job`: the drawing, its seed, count."""
    drawing, seed, count = job
    return np.stack([place(drawing, np.random.default_rng([*seed, index])) for index in range(count)])


def pictures(drawings: np.ndarray, seed: int, count: int, processes: int = 1) -> np.ndarray:
    """(concepts, styles, count, 64, 64, 3) uint8, the same in every build."""
    concepts, styles = drawings.shape[:2]
    jobs = [(drawings[c, s], [seed, c, s], count) for c in range(concepts) for s in range(styles)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        made = pool.map(variants_of, jobs, chunksize=4) if processes > 1 else map(variants_of, jobs)
        return np.stack(list(made)).reshape(concepts, styles, count, SIZE, SIZE, 3)
