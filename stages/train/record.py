"""The results of a training run: its record and its student."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from rats.pipeline.weights.hashes import hash_path
from rats.schemas.errors import ConfigError, DataError, reason
from rats.schemas.run import RunRecord

log = logging.getLogger(__name__)


def read_record(run: Path) -> RunRecord:
    """Reads run.json, which is written last. Raises ConfigError if it does not exist, DataError if it is damaged."""
    path = run / "run.json"
    if not path.is_file():
        raise ConfigError(f"no finished run in {run}: run `rats stage train --variant {run.name}`, or name another one")
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path} is no record of a run ({reason(error)}): train it again") from None


def student_folder(run: Path) -> Path:
    """The network that a run has left, or a ConfigError."""
    folder = run / "student"
    if not folder.is_dir():
        raise ConfigError(f"no student in {run}: run `rats stage train --variant {run.name}`, or name another run")
    return folder


def checked_student(run: Path, record: RunRecord) -> Path:
    """The network that a run has left; DataError when it is not the one that the run's record names."""
    folder = student_folder(run)
    if (found := hash_path(folder)) != record.student:
        raise DataError(
            f"{folder} is not the network that the run has left ({found[:12]} there, {record.student[:12]} "
            "in run.json): train again"
        )
    return folder


def clipped_share(norms: Sequence[float], limit: float | None) -> float:
    """Share of the steps whose gradient was longer than `train.clip_norm`; said aloud where it is most of them."""
    share = sum(limit is not None and norm > limit for norm in norms) / max(1, len(norms))
    if share > 0.5:
        tenth = sorted(norms)[int(0.9 * len(norms))]
        log.warning(
            "the gradient was clipped in %.0f %% of the steps: not its size but train.lr decided how far they went; "
            "train.clip_norm: %.2g would clip a tenth of them",
            *(100 * share, tenth),
        )
    return share
