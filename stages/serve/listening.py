"""Where a server listens, and how it is told to end."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rats.pipeline.rewards.remote_protocol import NEW_TOKEN
from rats.schemas.errors import CannotCreateError, ConfigError, brief


def listening_at(host: str, port: int, open_to_all: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise CannotCreateError(
            f"cannot listen at {brief(host)}, port {port}: {error}; choose another --host or --port"
        ) from error
    if open_to_all and not ipaddress.ip_address(opened.getsockname()[0]).is_loopback:
        opened.close()
        raise ConfigError(
            f"others can reach {host or 'every address'}, so requests must carry a token: write one ({NEW_TOKEN}) and "
            "give --token-file FILE, or listen at 127.0.0.1 and come through an SSH tunnel"
        )
    opened.setblocking(False)
    return opened


@contextmanager
def on_sigterm(end: Callable[[], None]) -> Iterator[list[int]]:
    """Calls `end` on SIGTERM and appends it to the list. Only the main thread may set a handler."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def handler(number: int, frame: Any) -> None:
        told.append(number)
        end()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
