"""`<run>/replaced/0001/`: what a run had to make room for. It is moved there, never deleted."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from rats.pipeline.files.atomic import storage_errors

REPLACED = "replaced"
log = logging.getLogger(__name__)


def set_aside(out: Path, paths: Iterable[Path]) -> Path | None:
    """Move what there is of `paths`, which lie in `out`, below a new `<out>/replaced/<number>`; None: nothing was."""
    found = [path for path in paths if path.exists() or path.is_symlink()]
    if not found:
        return None
    folder = _new_folder(out / REPLACED)
    for path in found:
        target = folder / path.relative_to(out)
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
    names = ", ".join(path.relative_to(out).as_posix() for path in found)
    log.warning("%s: moved to %s (%.1f MB), which may be deleted", names, folder, _bytes(folder) / 1e6)
    return folder


def _new_folder(folder: Path) -> Path:
    taken = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    return folder / f"{max(taken, default=0) + 1:04d}"


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
