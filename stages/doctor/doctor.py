"""`rats doctor`: shows what is installed, what is missing and how to get it. Loads no weights, fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rats.stages.doctor.packages import CheckRow, check_row, packages


def run_checks(path: Path, overrides: Sequence[str], is_default: bool = True) -> list[CheckRow]:
    """One row for each check: `check`, `ok`, `needed`, and `found` (what is there, or what is wrong and what to do).

    Args:
        path: The parameter file.
        overrides: Values that replace the file's, as "key=value".
        is_default: Whether the user did not name this file, so that it may be missing.
    """
    rows = packages()
    if not all(one["ok"] for one in rows):
        return [*rows, check_row("all else", False, "cannot be looked at before these packages are there")]
    from rats.stages.doctor import params as doctor_params  # imports what the rows above are about

    return [*rows, *doctor_params.check_params(path, overrides, is_default)]
