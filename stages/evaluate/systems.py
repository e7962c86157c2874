"""The systems that an evaluation compares. Each one computes final latents from stored noise.

All start from the stored noises of the test shards. B samples, T latent tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rats.pipeline.families.open import Model
from rats.pipeline.files.places import Place
from rats.pipeline.prompts import Prompt, read_prompts
from rats.pipeline.protocols import Teacher
from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.schemas.errors import DataError
from rats.schemas.manifest import IndexRow
from rats.schemas.params import Params, with_variant
from rats.stages.measure.pictures import SystemLabel
from rats.stages.train.record import student_folder
from rats.trainer.data import Batch, Sample, collate
from rats.trainer.sampling import FinalSampler, few_steps

SPLIT_SEARCH_ORDER = ("test", "validation", "train")


@dataclass(frozen=True)
class System:
    """`draw` gives final latents (B, T, C) of a batch, `decode` their images (B, 3, H, W) in [0, 1]."""

    column: SystemLabel
    draw: FinalSampler
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Samples:
    """The stored samples that are compared, with the concept and the kind of each one's prompt."""

    shards: ShardSet
    rows: list[IndexRow]
    split: str
    concepts: list[str]
    kinds: list[str]

    def keep(self, keys: set[str]) -> Samples:
        """Only the samples with these keys."""
        kept = [i for i, row in enumerate(self.rows) if row.key in keys]
        rows, concepts, kinds = ([values[i] for i in kept] for values in (self.rows, self.concepts, self.kinds))
        return Samples(self.shards, rows, self.split, concepts, kinds)  # type: ignore[arg-type]

    def batches(self, size: int, device: torch.device) -> Iterator[Batch]:
        """Batches in order. Every sample's hash is checked."""
        for start in range(0, len(self.rows), size):
            yield collate([self._sample(row) for row in self.rows[start : start + size]], device)

    def _sample(self, row: IndexRow) -> Sample:
        arrays = read_sample(self.shards, row)
        x, x0 = (torch.from_numpy(np.array(arrays[name])) for name in ("x", "x0"))
        conditioning = read_embedding(self.shards, row.prompt_id)
        return Sample(row.key, row.prompt, x, x0, conditioning, scores=())


def open_samples(params: Params, folder: Place) -> Samples:
    """The newest snapshot of a published shard set, joined with the prompt file that it came from.

    Raises:
        DataError: the shards are damaged, or their prompts are in none of the configured files.
    """
    shards = ShardSet.open(folder)
    rows = shards.index(shards.snapshot())
    split, known = _prompts_of(params, {row.prompt_id for row in rows}, folder)
    concepts = [known[row.prompt_id].concept for row in rows]
    return Samples(shards, rows, split, concepts, [known[row.prompt_id].kind for row in rows])


def _prompts_of(params: Params, wanted: set[str], folder: Place) -> tuple[str, dict[str, Prompt]]:
    files = {split: getattr(params.prompts, split) for split in SPLIT_SEARCH_ORDER}
    for split, file in files.items():
        known = {prompt.id: prompt for prompt in read_prompts(file)} if file else {}
        if wanted <= set(known):
            return split, known
    names = ", ".join(str(file) for file in files.values() if file)
    raise DataError(f"{folder} holds prompts that are in none of {names}: run `rats stage rollout` for this split")


def systems(params: Params, model: Model, runs: Path) -> Iterator[System]:
    """The teacher, the untrained base at every NFE, then each variant's student; one network in memory at a time."""
    grids = {name: with_variant(params, name).grid for name in params.evaluate.variants}
    folders = {name: student_folder(runs / name) for name in grids}
    teacher = model.open_teacher()
    yield System(teacher_label(model), stored_final, teacher.decode)
    for nfe in sorted({n for grid in grids.values() for n in grid}):
        yield from _bases(teacher, nfe)
    del teacher
    for name, grid in grids.items():
        student = model.open_student(transformer=folders[name])
        for nfe in grid:
            yield System(
                SystemLabel(f"{name}-{nfe}", "student", name, nfe, nfe), few_steps(student, nfe), student.decode
            )


def teacher_label(model: Model) -> SystemLabel:
    """The teacher with its steps and evaluations."""
    return SystemLabel("teacher", "teacher", "", model.teacher.steps, model.teacher.evaluations)


def _bases(teacher: Teacher, nfe: int) -> Iterator[System]:
    """The teacher itself in `nfe` steps of its stock grid, with guidance and, if it has any, without."""
    cost = nfe * teacher.evaluations_per_step
    draw = few_steps(teacher, nfe, teacher.guided_velocity)
    yield System(SystemLabel(f"base_guided-{nfe}", "base_guided", "", nfe, cost), draw, teacher.decode)
    if teacher.is_guided:
        column = SystemLabel(f"base_unguided-{nfe}", "base_unguided", "", nfe, nfe)
        yield System(column, few_steps(teacher, nfe, teacher.unguided_velocity), teacher.decode)


def stored_final(batch: Batch) -> Tensor:
    """The teacher's stored final latents, which its scores were computed from."""
    return batch.x_HBTC[-1].float()
