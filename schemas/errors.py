"""Errors that a user can act on, each with its exit code (docs/design.md#exit-codes)."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120


class RatsError(Exception):
    """One line that says what, which value and the way out; `exit_code` is what the process returns.

    Attributes:
        what: What is wrong, with which value.
        remedy: The way out. Empty where `what` says it, or where a caller knows it better (`remedy` below).
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        """Both are arguments of the exception, so that it survives the way from another process."""
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what

    def with_remedy(self, remedy: str) -> Self:
        """The same error with another way out."""
        return type(self)(self.what, remedy)


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


@contextmanager
def remedy(text: str) -> Iterator[None]:
    """The way out of damage that is found within and has none yet: who calls a reader knows it, the reader does not.

    A context or a decorator. Of two, one in the other, the inner one counts. Other errors say what to do in `what`.
    """
    try:
        yield
    except (DataError, StorageError) as error:
        error.remedy = error.remedy or text
        raise


def reason(error: BaseException, length: int = 200) -> str:
    """What an exception says, on one line of at most `length` characters; its kind where it says nothing."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def one_line(error: BaseException) -> str:
    """An exception as a table's cell or a log's line may hold it: its kind, and at most 300 characters."""
    return f"{type(error).__name__}: {reason(error, 300)}"


def brief(value: Any) -> str:
    """A value for an error's one line, cut to a few words however large or deep it is."""
    return " ".join(_REPR.repr(value).split())[:300]


def nearest(name: str, known: Any) -> str:
    """A hint for an error text: ", did you mean 'x'?", else the known names."""
    names = sorted(str(one)[:80] for one in known)[:100]
    match = difflib.get_close_matches(name[:80], names, n=1)
    return f", did you mean {match[0]!r}?" if match else f" (known: {', '.join(names)[:300] or 'none'})"
