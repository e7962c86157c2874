"""`rats init --demo`: a small project on the embedded model, from the repository's own params.yaml."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rats.pipeline.prompts import Prompt, read_prompts
from rats.schemas.errors import ConfigError
from rats.schemas.params import load_params
from rats.stages.init import project_files, seen_from, write_files

ROOT = Path(__file__).parents[1]
CONCEPTS = {"train": 32, "validation": 8, "test": 16}
"""Of each of which the first prompt is taken."""
SMALLER: dict[str, dict[str, Any]] = {
    "teacher": {"noises_per_prompt": 2},
    "store": {"shard_samples": 16},
    "train": {"steps": 30, "batch": 16, "micro_batch": 16, "warmup": 5, "ema": 0.8, "checkpoint_every": 15},
    "evaluate": {"variants": ["rats"], "pictures": 12},
}
ABOUT = """# Written by `rats init --demo`: the embedded model, few prompts and few steps, so that all stages together
# take about two minutes on two free cores. It shows how the parts fit; figures of so few prompts show little.
"""


def demo_project(folder: Path, force: bool) -> list[Path]:
    """Writes params.yaml, prompts, dvc.yaml, and DVC's and git's settings into `folder`.

    Raises:
        ConfigError: this `rats` has no embedded model beside it.
        CannotCreateError: a file is there already, and `force` does not replace it.
    """
    if not (ROOT / "params.yaml").is_file():
        raise ConfigError("the embedded model is no part of an installed package: give this command in a clone of rats")
    default = load_params(ROOT / "params.yaml")
    values = default.model_dump(mode="json", exclude_unset=True)
    for block, changes in SMALLER.items():
        values[block] |= changes
    values["variants"] = {"rats": {}}
    values["model"]["path"] = _from(folder, default.model.path)
    for judge in values["evaluate"]["judges"]:
        judge["real_features"] = judge["real_features"] and _from(folder, judge["real_features"])
    for reward in values["rewards"]:
        reward["path"] = _from(folder, reward["path"])
    splits = {split: _few(read_prompts(ROOT / getattr(default.prompts, split)), n) for split, n in CONCEPTS.items()}
    values["prompts"] = {split: f"prompts/{split}.csv" for split in splits}
    params = ABOUT + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return write_files(folder, project_files(folder, params, splits), force)


def demo_commands(folder: Path) -> list[str]:
    """What to type after it."""
    rollouts = [f"rats stage rollout --split {split} --out data/teacher/{split}" for split in ("train", "test")]
    stages = [f"rats stage {stage}" for stage in ("train", "evaluate", "report")]
    return [f"cd {shlex.quote(str(folder))}", *rollouts, *stages, 'rats generate "a yellow star"']


def _from(folder: Path, path: str | None) -> str | None:
    """A path of the repository, as the project's folder sees it."""
    return path and seen_from(folder, str(ROOT / path))


def _few(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first prompt of each of so many concepts."""
    firsts: dict[str, Prompt] = {}
    for prompt in prompts:
        firsts.setdefault(prompt.concept, prompt)
    return list(firsts.values())[:count]
