"""Contact sheets: samples that nobody picked, with and without what they should show.

`python -m mini.sheet FOLDER OUT.png`: 100 samples; the prompts go to OUT.txt, so that one can guess before one reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from mini.concepts import CONCEPTS, STYLES
from mini.pipelines import open_pipeline, sample
from mini.prompts import named, styled


def unpicked(count: int, seed: int) -> list[str]:
    """Prompts drawn from all concepts, half without a style."""
    rng = np.random.default_rng(seed)
    picked = [CONCEPTS[i] for i in rng.permutation(len(CONCEPTS))[:count]]
    return [named(c) if rng.random() < 0.5 else styled(c, STYLES[rng.integers(len(STYLES))]) for c in picked]


def page(pictures: np.ndarray, across: int = 10, gap: int = 2, zoom: int = 1) -> Image.Image:
    """(N, H, W, 3) as rows of `across`, with white gaps."""
    padded = np.pad(pictures, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(padded[i : i + across]), 1) for i in range(0, len(padded), across)]
    image = Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape]))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def main() -> None:
    """Draws the sheet of a pipeline folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.0, help="the embedded scale")
    parser.add_argument("--cfg", type=float, default=1.0, help="the scale of true guidance, two evaluations a step")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    prompts = unpicked(asked.count, asked.seed)
    pictures = sample(open_pipeline(asked.folder), prompts, asked.steps, asked.seed, asked.guidance, asked.cfg)
    page(pictures).save(asked.out)
    asked.out.with_suffix(".txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
