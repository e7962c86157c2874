"""When, where and by what an evaluation was made."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rats.schemas.reports import Made

SOURCE = Path(__file__).parents[2]


def made_here(device: torch.device, command: str) -> Made:
    """Of this moment, machine and code."""
    now = datetime.now(UTC).isoformat(" ", "minutes").replace("+00:00", " UTC")
    return Made(
        date=now, code=" ".join(filter(None, (_version(), _commit()))), machine=_machine(device), command=command
    )


def _version() -> str:
    try:
        return f"rats {version('rats')}"
    except PackageNotFoundError:
        return "rats"


def _commit() -> str:
    """Such as commit 1a2b3c4d5e6f, with -dirty where files differ; nothing outside a checkout of `rats`."""
    if not (SOURCE / ".git").exists():
        return ""
    command = ("git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    try:
        return (
            f"commit {subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()}"
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def _machine(device: torch.device) -> str:
    torch_ = f"torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch_}"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {torch_}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
