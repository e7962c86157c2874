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
    """Its text is one line: what is wrong, with which value, and what to do. The process exits with `exit_code`.

    Attributes:
        what: What is wrong, with which value.
        remedy: What to do. Empty if `what` says it, or if the caller adds it (`remedy` below).
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        """Both are arguments of the exception, so that it can be pickled."""
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what

    def with_remedy(self, remedy: str) -> Self:
        """The same error with another remedy."""
        return type(self)(self.what, remedy)


class ConfigError(RatsError):
    """A wrong parameter, flag or prompt file."""

    exit_code = 2


class DataError(RatsError):
    """Shards, scores, checkpoints or weights that are damaged or belong to something else."""

    exit_code = 65


class NoWorkerError(RatsError):
    """No Dask worker accepted a task."""

    exit_code = 69


class CannotCreateError(RatsError):
    """An output cannot be created: a permission is missing, or something else has that path."""

    exit_code = 73


class StorageError(RatsError):
    """Reading or writing failed: a full disk, an I/O error."""

    exit_code = 74


class RetryLaterError(RatsError):
    """Another process holds a lock, or a server is busy. The same command works later."""

    exit_code = 75


@contextmanager
def remedy(text: str) -> Iterator[None]:
    """Adds a remedy to data and storage errors without one: the caller of a reader knows it, the reader does not.

    Use it as a context or a decorator. The innermost one counts. Other errors have their remedy in `what`.
    """
    try:
        yield
    except (DataError, StorageError) as error:
        error.remedy = error.remedy or text
        raise


def reason(error: BaseException, length: int = 200) -> str:
    """The text of an exception on one line of at most `length` characters; its class if the text is empty."""
    return plain(str(error), length) or type(error).__name__


def one_line(error: BaseException) -> str:
    """An exception on one line, for a table's cell or a log: its class and at most 300 characters."""
    return f"{type(error).__name__}: {reason(error, 300)}"


def brief(value: Any) -> str:
    """The repr of a value, short enough for an error's one line, however large or deep the value is."""
    return plain(_REPR.repr(value))


def plain(text: str, limit: int = 300) -> str:
    """Untrusted text on one line: cut to `limit`, and without escape sequences, which a terminal would execute."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: 10 * limit])
    return " ".join(shown.split())[:limit]


def nearest(name: str, known: Any) -> str:
    """A hint for an error text: ", did you mean 'x'?", else the known names."""
    names = sorted(str(one)[:80] for one in known)[:100]
    match = difflib.get_close_matches(name[:80], names, n=1)
    return f", did you mean {match[0]!r}?" if match else f" (known: {', '.join(names)[:300] or 'none'})"
