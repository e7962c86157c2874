"""Checkpoints: folders that are whole or not there, and a run that goes on from one to the last bit.

Nothing random is saved, because nothing random has a state: noise comes from the store, the order from a counter,
augmentation from (seed, step, micro-batch).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rats.pipeline.atomic import atomic_folder
from rats.schemas.errors import DataError

FORMAT = 1
STATE, METRICS = "state.json", "metrics.csv"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """Where a run stands; `seconds` is what its steps have cost so far, over all resumes."""

    step: int = 0
    position: int = 0
    gate_sum: float = 0.0
    gate_count: int = 0
    seconds: float = 0.0

    @property
    def gate_mean(self) -> float | None:
        """Mean of the gate over all samples so far: what the `constant` control is set to."""
        return self.gate_sum / self.gate_count if self.gate_count else None

    def after(self, position: int, gates: list[float], seconds: float) -> State:
        """The state one step later."""
        total, count = self.gate_sum + sum(gates), self.gate_count + len(gates)
        return State(self.step + 1, position, total, count, self.seconds + seconds)


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: hashes of the snapshot that is read, the shards' recipe, the settings."""

    snapshot: str
    recipe: str
    settings: str


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk, verified."""

    path: Path
    state: State
    snapshot: int
    identity: Identity

    def metrics(self) -> bytes:
        """The run's metrics.csv as it was at this checkpoint."""
        return (self.path / METRICS).read_bytes()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The files' tensors by file name, as `Learner.restore` takes them."""
        try:
            return {file.stem: load(file.read_bytes()) for file in sorted(self.path.glob("*.safetensors"))}
        except (SafetensorError, OSError) as error:
            raise DataError(f"checkpoint {self.path} is damaged ({error}): delete it, use --resume latest") from error


class Checkpoints:
    """The checkpoints of one run, `<folder>/000050/`, the newest `limit` of them."""

    def __init__(self, folder: Path, limit: int = 2) -> None:
        """Creates nothing yet."""
        self.folder = folder
        self.limit = limit

    def save(
        self,
        state: State,
        tensors: Mapping[str, dict[str, Tensor]],
        metrics: bytes,
        identity: Identity,
        snapshot: int,
    ) -> Path:
        """Write a whole folder under its final name, then drop the oldest; the last one stays if this fails."""
        files = {f"{name}.safetensors": save(_plain(content)) for name, content in tensors.items()}
        files[METRICS] = metrics
        record = {"format": FORMAT, "files": {name: blake3(data).hexdigest() for name, data in files.items()}}
        record |= {"state": asdict(state), "identity": asdict(identity), "snapshot": snapshot}
        path = self.path(state.step)
        with atomic_folder(path) as temporary:
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            (temporary / STATE).write_text(json.dumps(record, sort_keys=True, indent=1))
        for old in self._paths()[self.limit :]:
            shutil.rmtree(old)
        return path

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies, whether or not it is there."""
        return self.folder / f"{step:06d}"

    def _paths(self) -> list[Path]:
        """Newest first; anything not named like a checkpoint (a temporary folder of a killed save) is passed over."""
        names = [p for p in self.folder.glob("[0-9]*") if p.name.isdigit() and p.is_dir()]
        return sorted(names, key=lambda p: int(p.name), reverse=True)

    def newest(self, at_most: int | None = None) -> Saved | None:
        """The newest whole checkpoint, of at most so many steps; None when there is none.

        A damaged one is passed over with a warning.
        """
        for path in self._paths():
            if at_most is not None and int(path.name) > at_most:
                continue
            try:
                return read(path)
            except DataError as error:
                log.warning("%s; the one before it is used", error)
        return None

    def keep_until(self, step: int) -> None:
        """Remove the checkpoints after `step`: this run will make its own."""
        for path in self._paths():
            if int(path.name) > step or step == 0:
                shutil.rmtree(path)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read(path: Path) -> Saved:
    """Verify a checkpoint and say where it stands. Raises DataError when a file is damaged or missing."""
    try:
        record = json.loads((path / STATE).read_text())
        _verify(path, record)
        return Saved(path, State(**record["state"]), int(record["snapshot"]), Identity(**record["identity"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"checkpoint {path} is damaged ({reason}): delete it, use --resume latest") from error


def _verify(path: Path, record: dict) -> None:
    if record["format"] != FORMAT:
        raise DataError(f"checkpoint {path} has format {record['format']}, this program reads {FORMAT}: update rats")
    for name, digest in record["files"].items():
        if Path(name).name != name or not name.endswith((".safetensors", METRICS)):
            raise ValueError(f"a file named {name!r}")
        if blake3((path / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} has another hash than {STATE} says")
