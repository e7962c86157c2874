"""The student that a run leaves: a folder that diffusers loads."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_folder
from rats.pipeline.weights.loading import save_component
from rats.pipeline.weights.lora import save_lora, shortened_lora
from rats.pipeline.weights.movement import share_kept, shortened
from rats.schemas.train_params import TrainParams
from rats.trainer.optim import Learner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedAs:
    """The student's folder, its dtype, and the share of what training moved that this dtype keeps."""

    folder: Path
    dtype: str
    kept: float = 1.0


def save_student(learner: Learner, folder: Path, model: Model, chosen: TrainParams) -> SavedAs:
    """The trained network, or its adapters, as a folder that diffusers loads.

    The weights are those of the moving average, if one is kept, `train.update_length` of the way from the base to
    there. All ranks must call, the main one writes.
    """
    weights = learner.weights()
    saved_as = SavedAs(folder, model.params.dtype if chosen.save_dtype == "model" and not chosen.lora else "float32")
    if learner.ranks.is_main:
        with atomic_folder(folder) as temporary:
            if chosen.lora:
                weights = shortened_lora(weights, chosen.update_length)
                save_lora(model.rebuilt_network(weights, chosen.lora), temporary)
            else:
                kept = _save_network(model, weights, chosen.update_length, saved_as.dtype, temporary)
                saved_as = replace(saved_as, kept=kept)
        if saved_as.kept < 0.5:
            log.warning(
                "saved in %s, the student keeps %.2g of what training moved: set train.save_dtype: float32",
                *(saved_as.dtype, saved_as.kept),
            )
    learner.ranks.wait()
    return saved_as


def _save_network(model: Model, trained: dict[str, Tensor], length: float, dtype: str, folder: Path) -> float:
    """The share of the update, of this length, that the files keep."""
    # training starts from the weights in the model's dtype, whatever their file has
    weights = trained if length == 1 else shortened(model.base_network().state_dict(), trained, length)
    network = model.base_network(dtype)
    kept = share_kept(network.state_dict(), weights.items())
    network.load_state_dict(weights)
    save_component(network, folder)
    return kept
