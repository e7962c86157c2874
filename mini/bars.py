"""Is the miniature good enough? Kernel distance and recognition of its samples beside those of its autoencoder.

Judged on validation and test concepts by two networks that nobody here trained. The bars: the teacher's distance is
at most twice the autoencoder's, its recognition at least four fifths of what other real pictures get. Distances are
counted from that of other real pictures, which is below zero: they are variants of the very drawings of the reference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mini.concepts import CONCEPTS, STYLES
from mini.judges import distance, recognition
from mini.pipelines import open_pipeline, sample
from mini.prompts import named, styled
from mini.rewards import to_images
from mini.vae import rebuilt
from rats.stages.measure.kid import write_real
from rats.stages.measure.networks import NETWORKS, Judge

JUDGED = np.array([i for i, concept in enumerate(CONCEPTS) if concept.split != "train"])
REAL_VARIANTS, OTHER_VARIANTS = slice(0, 4), slice(4, 8)
"""The first are the reference; the second are what real pictures get, and what the autoencoder rebuilds."""


@dataclass
class Set:
    """Pictures (N, 64, 64, 3) and the concept of each."""

    pictures: np.ndarray
    concepts: np.ndarray


def real_set(pictures: np.ndarray, variants: slice) -> Set:
    """Real pictures of the judged concepts, all styles."""
    chosen = pictures[JUDGED][:, :, variants]
    return Set(chosen.reshape(-1, *chosen.shape[3:]), np.repeat(JUDGED, chosen.shape[1] * chosen.shape[2]))


def drawn_set(folder: Path, steps: int, guidance: float, seeds: int, device: str) -> Set:
    """Samples for every judged concept: `seeds` without a style and one of each style."""
    prompts, concepts = [], []
    for index in JUDGED:
        own = [named(CONCEPTS[index])] * seeds + [styled(CONCEPTS[index], style) for style in STYLES]
        prompts += own
        concepts += [index] * len(own)
    pictures = sample(open_pipeline(folder, device), prompts, steps, seed=7, guidance=guidance)
    return Set(pictures, np.array(concepts))


def measure(judge: Judge, sets: dict[str, Set]) -> dict[str, dict[str, tuple[float, float]]]:
    """Each set's distance and recognition with half-widths; the reference is the set "real"."""
    features = {name: judge.features(to_images(s.pictures)).numpy().astype(np.float64) for name, s in sets.items()}
    real = sets["real"].concepts
    return {
        name: {
            "kid": distance(features[name], s.concepts, features["real"]),
            "recognition": recognition(features[name], s.concepts, features["real"], real),
        }
        for name, s in sets.items()
        if name != "real"
    }


def write(pictures: np.ndarray, folder: Path, path: Path, device: str, guidance: float, steps: tuple[int, ...]) -> dict:
    """Measures all sets by both judges and writes the figures."""
    other = real_set(pictures, OTHER_VARIANTS)
    sets = {"real": real_set(pictures, REAL_VARIANTS), "other real": other}
    pipe = open_pipeline(folder, device)
    sets["autoencoder"] = Set(rebuilt(pipe.vae, other.pictures), other.concepts)
    for count in steps:
        sets[f"teacher {count}"] = drawn_set(folder, count, guidance, seeds=5, device=device)
    figures = {name: measure(judge, sets) for name, judge in networks().items()}
    bars = {name: verdicts(values, f"teacher {max(steps)}") for name, values in figures.items()}
    path.write_text(json.dumps({"figures": figures, "bars": bars}, indent=2) + "\n")
    return bars


def verdicts(figures: dict[str, dict[str, tuple[float, float]]], system: str) -> dict[str, float]:
    """Of one judge's figures: what the bars compare, for one of the sets."""
    floor = figures["other real"]["kid"][0]
    lost = figures["autoencoder"]["kid"][0] - floor
    return {
        "kid over the autoencoder's (at most 2)": (figures[system]["kid"][0] - floor) / lost,
        "recognition over real (at least .8)": figures[system]["recognition"][0]
        / figures["other real"]["recognition"][0],
    }


def write_judge(pictures: np.ndarray, path: Path, judge: Judge) -> None:
    """A judge's features of the reference pictures, for `rats stage evaluate`."""
    real = real_set(pictures, REAL_VARIANTS)
    write_real(path, judge.features(to_images(real.pictures)).numpy(), [CONCEPTS[i].name for i in real.concepts])


def networks() -> dict[str, Judge]:
    """The judges of `rats stage evaluate`."""
    return {name: network() for name, network in NETWORKS.items()}
