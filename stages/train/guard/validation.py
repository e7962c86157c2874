"""The validation samples of a training run: prompts, the noise of each, and their embeddings.

S samples, T latent tokens, C channels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rats.pipeline.bounds import bounded_file
from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_write
from rats.pipeline.noise import noise
from rats.pipeline.prompts import Prompt, planned_samples, read_prompts
from rats.pipeline.protocols import Conditioning
from rats.pipeline.store.shards import as_stored
from rats.schemas.errors import ConfigError
from rats.schemas.params import Params
from rats.schemas.train_params import GuardParams
from rats.stages.measure.pictures import choose
from rats.trainer.data import Batch, Sample, collate

log = logging.getLogger(__name__)

EMBEDDINGS = "validation.safetensors"
"""Name of the file in the run's folder. With it, a resumed run needs no text encoders."""


@dataclass(frozen=True)
class ValidationSet:
    """One noise for each of S prompts, and their embeddings (S first)."""

    prompts: list[Prompt]
    noise_STC: Tensor
    conditioning: Conditioning

    @property
    def keys(self) -> list[str]:
        """The samples' keys, as in a rollout of these prompts."""
        return [sample.key for sample in planned_samples(self.prompts, 1)]

    @property
    def concepts(self) -> list[str]:
        """The concept of each sample."""
        return [prompt.concept for prompt in self.prompts]

    def first(self, count: int) -> ValidationSet:
        """The first `count` samples."""
        rows = {name: value[:count] for name, value in self.conditioning.items()}
        return ValidationSet(self.prompts[:count], self.noise_STC[:count], rows)

    def batches(self, size: int, device: torch.device) -> Iterator[Batch]:
        """Batches in order. Of their trajectories they have only the noise."""
        samples = [
            Sample(key, prompt.text, x[None], x[:0], {name: value[i] for name, value in self.conditioning.items()}, ())
            for i, (key, prompt, x) in enumerate(zip(self.keys, self.prompts, self.noise_STC, strict=True))
        ]
        for start in range(0, len(samples), size):
            yield collate(samples[start : start + size], device)


def open_validation_set(
    params: Params, model: Model, guard: GuardParams, shape: tuple[int, ...], folder: Path, again: bool
) -> ValidationSet:
    """`guard.prompts` prompts of the validation split, spread over its concepts, drawn by lot (`evaluate.seed`).

    The noise is the one that a store would hold for them (rounded, index 0). If `again`, for a resumed run, the
    embeddings are read from `folder`. Otherwise the text encoders are loaded, used and freed.

    Raises:
        ConfigError: there are no validation prompts; or one for a guard, which compares.
    """
    if params.prompts.validation is None:
        raise ConfigError(
            "train.guard and train.samples_every look at validation prompts: set prompts.validation, or both to null"
        )
    prompts = read_prompts(params.prompts.validation)
    if guard.every is not None and len(prompts) < 2:
        raise ConfigError(f"{params.prompts.validation} has one prompt: nothing can be told apart, add some")
    seed = params.evaluate.seed
    chosen = choose([prompt.concept for prompt in prompts], [prompt.id for prompt in prompts], guard.prompts, seed).side
    prompts = [prompts[i] for i in chosen]
    starts = [as_stored(noise(params.teacher.seed, prompt.id, 0, shape)) for prompt in prompts]
    return ValidationSet(prompts, torch.stack(starts), _embeddings(model, prompts, folder / EMBEDDINGS, again))


def _embeddings(model: Model, prompts: list[Prompt], path: Path, again: bool) -> Conditioning:
    about = json.dumps({"prompts": [prompt.id for prompt in prompts], "length": model.teacher.max_sequence_length})
    if again and (found := _read(path, about)):
        return found
    log.info("encoding %d validation prompts", len(prompts))
    texts = [prompt.text for prompt in prompts]
    model.lengths(texts, guided=False).tell(log)
    encoded = model.open_text().encode(texts)
    conditioning = {name: value.detach().cpu().contiguous() for name, value in encoded.items()}
    atomic_write(path, save(conditioning, {"about": about}))
    return conditioning


def _read(path: Path, about: str) -> Conditioning | None:
    """The embeddings that an earlier start has saved; None if they are of other prompts or damaged."""
    try:
        with safe_open(bounded_file(path), framework="pt") as file:
            if (file.metadata() or {}).get("about") == about:
                return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, ValueError, SafetensorError):
        pass
    return None
