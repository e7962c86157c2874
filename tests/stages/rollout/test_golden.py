"""Golden latents: the same recipe gives the same trajectory for ever, or `SOLVER_VERSION` goes up.

The fixture holds a few values of the miniature's trajectories, with true guidance and a negative prompt, so that
everything between a prompt and a stored state is in them: tokenizers, encoders, noise, grid, guidance, solver.
After a change that is meant: raise SOLVER_VERSION, then `python -m tests.stages.rollout.test_golden` writes them anew.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.schemas.params import Params
from rats.schemas.recipe import SOLVER_VERSION
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.workers.run import WorkerTarget
from tests.support.project import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "golden-latents.json"
PROMPTS = ("red apple", "cat face")
TOLERANCE = 6e-3
"""Three roundings of float16 near 4; another number of threads moves a value by one at most, a formula by far more."""


def trajectories(folder: Path) -> dict[str, Any]:
    """Values of stored trajectories: two channels of four tokens, at all horizons, and the spread of each state."""
    shards = rolled_out(folder)
    rows = shards.index(shards.snapshot())
    values: dict[str, Any] = {"solver_version": SOLVER_VERSION, "weights": shards.recipe.weights}
    for row in rows:
        latents = {name: array.astype(np.float64) for name, array in read_sample(shards, row).items()}
        for name, array in latents.items():
            values[f"{row.prompt} {row.noise_index}: {name}"] = array[:, ::5, :2].round(4).tolist()
            values[f"{row.prompt} {row.noise_index}: spread of {name}"] = array.std(axis=(1, 2)).round(4).tolist()
    return values


def rolled_out(folder: Path) -> ShardSet:
    """A rollout of the miniature in 8 steps."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    teacher = {"steps": 8, "nfe": [3], "guidance_scale": 3.0, "true_cfg_scale": 2.0, "negative_prompt": "blue house"}
    sizes = {"max_sequence_length": 10, "height": 32, "width": 32, "noises_per_prompt": 2, "seed": 5}
    values = {
        "model": {"path": str(ROOT / "assets" / "flux-mini")},
        "prompts": {"train": str(folder / "prompts.txt")},
        "teacher": teacher | sizes,
        "compute": {"micro_batch": 4},
        "store": {"path": str(folder / "store")},
        "train": {"reward": "none", "nfe": [3]},
    }
    report = rollout_stage(Params.model_validate(values), "train", where=WorkerTarget(workers=0))
    return ShardSet.open(folder / "store" / report.fingerprint)


def test_the_latents_of_a_fixed_recipe_have_not_moved(tmp_path: Path) -> None:
    golden, now = json.loads(FIXTURE.read_text()), trajectories(tmp_path)
    if golden.pop("weights") != now.pop("weights"):
        pytest.fail(
            "assets/flux-mini has other weights: write the golden latents anew "
            "(python -m tests.stages.rollout.test_golden)"
        )
    assert golden.pop("solver_version") == now.pop("solver_version"), "write the golden latents anew"
    assert set(golden) == set(now)
    for name, values in golden.items():
        moved = np.abs(np.array(values) - np.array(now[name])).max()
        assert moved < TOLERANCE, f"{name} moved by {moved:.4f}: raise SOLVER_VERSION, then write the latents anew"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = trajectories(Path(scratch))
    lines = (f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
