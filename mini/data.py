"""Drawings and prompts: emoji by three designers, with unprompted variety.

The sources are npm packages (licences in NOTICE): `npm pack` fetches them once into a cache.
Every picture is a function of (drawing, variant index), so that two builds see the same pixels.
"""

from __future__ import annotations

import json
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
PALETTE = ((255, 255, 255), (250, 222, 150), (178, 220, 245), (196, 232, 180), (242, 190, 205), (70, 78, 110))
"""Backgrounds, never named in a prompt: white, sand, sky, mint, rose, night."""

SIZE = 32
VARIANTS = 48


def fetch(cache: Path) -> dict[str, Path]:
    """Unpacks the four packages below `cache`; a package that is there is not fetched again."""
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


def load_labels(folders: dict[str, Path]) -> dict[str, dict]:
    """Emojibase entries by label: hexcode and keywords (`tags`)."""
    entries = json.loads((folders["names"] / "package/en/data.json").read_text())
    return {entry["label"]: entry for entry in entries}


def load_drawing(folders: dict[str, Path], style: str, hexcode: str) -> np.ndarray:
    """One drawing as premultiplied RGBA, float32 in [0, 1], (128, 128, 4)."""
    stem = hexcode.lower()
    for name in (stem, stem.replace("-fe0f", ""), stem + "-fe0f"):
        path = folders[style] / "package" / PATHS[style].format(name)
        if path.exists():
            picture = Image.open(path).convert("RGBA").convert("RGBa").resize((128, 128), Image.Resampling.LANCZOS)
            return np.asarray(picture, np.float32) / 255
    raise FileNotFoundError(f"no drawing of {hexcode} in {PACKAGES[style]}")


def load_drawings(folders: dict[str, Path]) -> np.ndarray:
    """All drawings, (concepts, 3 styles, 128, 128, 4)."""
    labels = load_labels(folders)
    return np.stack([[load_drawing(folders, style, labels[c.label]["hexcode"]) for style in STYLES] for c in CONCEPTS])


def place(drawing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One variant: flip, scale 0.82 to 0.98, shift, rotation up to 8 degrees, a background. uint8 (32, 32, 3)."""
    scale, angle = rng.uniform(0.82, 0.98), np.deg2rad(rng.uniform(-8, 8))
    slack = (1 - scale) / 2 + 0.01
    shift = rng.uniform(-slack, slack, 2) * 128
    flip = -1 if rng.random() < 0.5 else 1
    matrix = np.array([[np.cos(angle) * flip, np.sin(angle)], [-np.sin(angle) * flip, np.cos(angle)]]) / scale
    offset = 64 - matrix @ (np.array([64, 64]) + shift)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    channels = [
        Image.fromarray(drawing[..., i]).transform(
            (128, 128), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
        )
        for i in range(4)
    ]
    moved = np.stack([np.asarray(c.resize((SIZE, SIZE), Image.Resampling.BOX)) for c in channels], -1)
    background = np.array(PALETTE[rng.integers(len(PALETTE))], np.float32) / 255
    return np.uint8(np.round(255 * np.clip(moved[..., :3] + (1 - moved[..., 3:]) * background, 0, 1)))


def variant(drawings: np.ndarray, concept: int, style: int, index: int) -> np.ndarray:
    """Variant `index` of one drawing, the same in every build."""
    return place(drawings[concept, style], np.random.default_rng([7, concept, style, index]))


def pictures(drawings: np.ndarray, count: int = VARIANTS) -> np.ndarray:
    """(concepts, styles, count, 32, 32, 3) uint8."""
    concepts, styles = drawings.shape[:2]
    return np.stack(
        [[[variant(drawings, c, s, i) for i in range(count)] for s in range(styles)] for c in range(concepts)]
    )
