"""Checkpoints: atomic folders, from which a run resumes bit by bit.

What `rats` draws at random has no state: noise comes from the store, the order from a counter, augmentation from (seed,
step, place in the batch). The global generators, which a reward or a network may use, are saved for each rank.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rats.pipeline.bounds import bounded
from rats.pipeline.files.atomic import atomic_folder
from rats.schemas.errors import DataError, one_line

FORMAT = 2
STATE_FILE = "state.json"
RNG = "rng-{rank:05d}"
"""Stem of the file with the states of a rank's generators."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """A setting that another took the place of when the run went on from `step`, by `--force`."""

    step: int
    field: str
    was: Any
    now: Any


@dataclass(frozen=True)
class RunState:
    """The state of a run. `seconds` is the time of all its steps so far, over all resumes.

    `position` is the stream's, in the shards of `generation` (0: the teacher's own). Of `asked` samples a reward failed
    on `bad`. `micro_batch` is what was found to fit after running out of memory, `tau` what was measured at the start.
    `finished` says why a run has ended before its last step.

    The network evaluations and reward calls are those of all steps so far; None: an older rats, which forgot them at
    each resume, has made some of the steps.
    """

    step: int = 0
    position: int = 0
    gate_sum: float = 0.0
    gate_count: int = 0
    seconds: float = 0.0
    asked: int = 0
    bad: int = 0
    generation: int = 0
    micro_batch: int | None = None
    tau: float | None = None
    finished: str | None = None
    student_forwards: int | None = 0
    teacher_forwards: int | None = 0
    teacher_reward_calls: int | None = 0
    changes: tuple[Change, ...] = ()

    @property
    def gate_mean(self) -> float | None:
        """Mean of the gate over all samples so far, which the `constant` control uses."""
        return self.gate_sum / self.gate_count if self.gate_count else None

    def after(self, position: int, gates: list[float], bad: int, seconds: float) -> RunState:
        """The state after one more step. `gates` are of scored samples, `bad` counts the others."""
        return replace(
            self,
            step=self.step + 1,
            position=position,
            gate_sum=self.gate_sum + sum(gates),
            gate_count=self.gate_count + len(gates),
            seconds=self.seconds + seconds,
            asked=self.asked + len(gates) + bad,
            bad=self.bad + bad,
        )

    def counted(self, more: Mapping[str, int]) -> RunState:
        """With so many more of each counter; what is unknown stays so."""
        known = {name: value for name in more if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value + more[name] for name, value in known.items()})


COUNTERS = ("student_forwards", "teacher_forwards", "teacher_reward_calls")


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint belongs to: hashes of the snapshot that is read, the shards' recipe, the settings.

    `values`: the settings that `settings` is the hash of; None in checkpoints of an older rats.
    """

    snapshot: str
    recipe: str
    settings: str
    values: Mapping[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A whole checkpoint on disk, verified."""

    path: Path
    state: RunState
    snapshot: int
    identity: RunIdentity

    def log(self, name: str) -> bytes | None:
        """A log of the run, such as metrics.csv, as it was at this checkpoint; None if there was none."""
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The files' tensors by file name, as `Learner.restore` takes them."""
        try:
            return {file.stem: load(bounded(file.read_bytes())) for file in sorted(self.path.glob("*.safetensors"))}
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"checkpoint {self.path} is damaged ({error}): delete it, use --resume latest") from error


class Checkpoints:
    """The checkpoints of one run, `<folder>/000050/`, the newest `limit` of them, and `keep`, if it names a step."""

    def __init__(self, folder: Path, limit: int = 2) -> None:
        """Creates nothing yet."""
        self.folder = folder
        self.limit = limit
        self.keep: int | None = None

    def never_drop(self, step: int | None) -> None:
        """Keeps the checkpoint of this step even if it is old. Replaces an earlier call."""
        self.keep = step

    def save(
        self,
        state: RunState,
        tensors: Mapping[str, dict[str, Tensor]],
        logs: Mapping[str, bytes],
        identity: RunIdentity,
        snapshot: int,
    ) -> Path:
        """Writes a checkpoint atomically, then removes the oldest. If it fails, the last one still exists."""
        files = {f"{name}.safetensors": save(content) for name, content in tensors.items()}
        files |= logs
        hashes = {name: blake3(data).hexdigest() for name, data in files.items()}
        record = {
            "format": FORMAT,
            "files": hashes,
            "state": asdict(state),
            "identity": asdict(identity),
            "snapshot": snapshot,
        }
        path = self.path(state.step)
        with atomic_folder(path) as temporary:
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            (temporary / STATE_FILE).write_text(json.dumps(record, sort_keys=True, indent=1))
        for old in self.paths()[self.limit :]:
            if int(old.name) != self.keep:
                shutil.rmtree(old)
        return path

    def path(self, step: int) -> Path:
        """The path of the checkpoint after `step` steps, whether or not it exists."""
        return self.folder / f"{step:06d}"

    def paths(self) -> list[Path]:
        """Newest first; anything not named like a checkpoint (a temporary folder of a killed save) is passed over."""
        found = [path for path in self.folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    def newest(self, at_most: int | None = None) -> SavedCheckpoint | None:
        """The newest whole checkpoint, of at most so many steps; None when there is none.

        Damaged ones are skipped with a warning.
        """
        for path in self.paths():
            if at_most is not None and int(path.name) > at_most:
                continue
            try:
                return read_checkpoint(path)
            except DataError as error:
                log.warning("%s; the one before it is used", error)
        return None

    def after(self, step: int) -> list[Path]:
        """The checkpoints of more than `step` steps; all of them where it is 0."""
        return [path for path in self.paths() if int(path.name) > step or step == 0]


_STATE, _IDENTITY = TypeAdapter(RunState), TypeAdapter(RunIdentity)


def read_checkpoint(path: Path) -> SavedCheckpoint:
    """Verifies a checkpoint and reads its state. Raises DataError if a file is damaged or missing."""
    try:
        record = json.loads((path / STATE_FILE).read_text())
        _verify(path, record)
        state = _STATE.validate_python(dict.fromkeys(COUNTERS) | record["state"])
        return SavedCheckpoint(path, state, int(record["snapshot"]), _IDENTITY.validate_python(record["identity"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"checkpoint {path} is damaged ({one_line(error)}): delete it, use --resume latest") from error


def _verify(path: Path, record: dict) -> None:
    if record["format"] != FORMAT:
        raise DataError(
            f"checkpoint {path} has format {record['format']}, this program reads {FORMAT}: start over with "
            "--force, or go on with the release that wrote it"
        )
    for name, digest in record["files"].items():
        if Path(name).name != name or not name.endswith((".safetensors", ".csv")):
            raise ValueError(f"a file named {name!r}")
        if blake3((path / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} has another hash than {STATE_FILE} says")
