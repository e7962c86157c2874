"""Errors that a user can act on, each with its exit code (docs/design.md#exit-codes)."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120


class RatsError(Exception):
    """One line that says what, which value and the way out; `exit_code` is what the process returns."""

    exit_code = 1


class ConfigError(RatsError):
    """A wrong parameter, flag or prompt file."""

    exit_code = 2


class DataError(RatsError):
    """Shards, scores, checkpoints or weights that are damaged or belong to something else."""

    exit_code = 65


class NoWorkerError(RatsError):
    """No Dask worker took the work."""

    exit_code = 69


class CannotCreateError(RatsError):
    """An output cannot be created: a missing right, a path in the way."""

    exit_code = 73


class StorageError(RatsError):
    """Reading or writing failed: a full disk, an I/O error."""

    exit_code = 74


class RetryLaterError(RatsError):
    """Somebody else holds what we need; the same command works later."""

    exit_code = 75


def brief(value: Any) -> str:
    """A value for an error's one line, cut to a few words however large or deep it is."""
    return " ".join(_REPR.repr(value).split())[:300]


def nearest(name: str, known: Any) -> str:
    """A hint for an error text: ", did you mean 'x'?", else the known names."""
    names = sorted(str(one)[:80] for one in known)[:100]
    match = difflib.get_close_matches(name[:80], names, n=1)
    return f", did you mean {match[0]!r}?" if match else f" (known: {', '.join(names)[:300] or 'none'})"
