"""Output of the command line. Every error is one line on stderr and an exit code."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rats.schemas.errors import RatsError, StorageError


def guarded(command: Callable[[], Any]) -> None:
    """Runs `command`. Errors that a user can act on become one line and the exit codes of `schemas.errors`."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # it would warn that torchvision is missing, which we do without
    # where there are more processes than cores, a thread that spins at a barrier takes the core from the one that it
    # waits for; OpenMP reads this once, when torch is imported, and workers and ranks inherit it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("rats").setLevel(logging.INFO)
    try:
        command()
    except RatsError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see the path"
        _fail(StorageError(f"{error}: {hint}, then run the same command again"))


def command_line() -> str:
    """What was typed, as a shell takes it."""
    return shlex.join(["rats", *sys.argv[1:]])


def print_result(value: dict[str, Any], as_json: bool) -> None:
    """Prints the result on stdout: one JSON object, or one line for each field."""
    if as_json:
        print(json.dumps(value))
        return
    for name, item in value.items():
        for line in item if isinstance(item, list) else [item]:
            print(f"{name.replace('_', ' ')}: {f'{line:.1f}' if isinstance(line, float) else line}")


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints one line for each row."""
    for row in rows:
        print("  ".join(("yes" if item else "no") if isinstance(item, bool) else str(item) for item in row.values()))


def print_checks(rows: list[dict[str, Any]]) -> None:
    """Prints one line for each check: yes, no, or - where something optional is missing."""
    width = max(len(row["check"]) for row in rows)
    for row in rows:
        mark = "yes" if row["ok"] else "no" if row["needed"] else "-"
        print(f"{row['check']:<{width}}  {mark:<3}  {row['found']}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file, replaced as a whole."""
    from rats.pipeline.files.atomic import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def _fail(error: RatsError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """Unwinds the stack, so that temporary files are removed and workers end; exits with 143."""
    raise SystemExit(128 + number)
