"""Temporary names: hidden names beside the final one, with machine and process of the writer.

A process that is killed leaves its temporary file behind. By its name, another process can find out whether the writer
is still running.
"""

from __future__ import annotations

import os
import re
import socket

_NAME = re.compile(r"\.(?P<what>.*\..*)-(?P<process>[0-9]+)-[0-9a-f]{8}\.tmp", re.DOTALL)
_DAY = 24 * 3600.0


def temporary_name(name: str) -> str:
    """A new name beside `name` for this process to write under."""
    return f".{name}.{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}.tmp"


def is_temporary(name: str) -> bool:
    """Whether this is such a name, of any writer."""
    return _NAME.fullmatch(name) is not None


def is_abandoned(name: str) -> bool:
    """Whether it is a temporary name whose writer ran on this machine and is gone."""
    match = _NAME.fullmatch(name)
    return match is not None and _is_of_this_machine(match["what"]) and not is_alive(int(match["process"]))


def is_dead(name: str, written: float, since: float) -> bool:
    """Whether a temporary file that was `written` before `since` (seconds since 1970) has no writer any more.

    The processes of another machine are unknown: a writer there counts as dead after one more day.
    """
    match = _NAME.fullmatch(name)
    if match is None or written > since:
        return False
    if not _is_of_this_machine(match["what"]):
        return written < since - _DAY
    return is_abandoned(name)


def _is_of_this_machine(what: str) -> bool:
    # `what` is the file's name and the machine's, and both may have dots
    return what.endswith(f".{socket.gethostname()}")


def is_alive(process: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's process, or a number that no process of ours has
        pass
    return True
