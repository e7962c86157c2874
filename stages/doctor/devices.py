"""What this machine computes on: CUDA devices with memory, driver and bfloat16, Apple's GPU, the processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

import torch

DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def devices() -> list[dict[str, Any]]:
    """One entry a device, by the name that `compute.device` takes: `name`, `kind`, and of GPUs `bytes` and `bf16`."""
    found = [_cuda(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "kind": "Apple GPU", "bytes": torch.mps.recommended_max_memory(), "bf16": True})
    build = "" if torch.version.cuda or torch.version.hip else f", torch {torch.__version__} is a build without CUDA"
    kind = f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} torch threads{build}"
    return [*found, {"name": "cpu", "kind": kind}]


def driver() -> str | None:
    """The version of NVIDIA's driver, or None if nvidia-smi does not tell it."""
    if shutil.which(DRIVER_QUERY[0]) is None:
        return None
    try:
        done = subprocess.run(DRIVER_QUERY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _cuda(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    kind = f"{found.name}, compute capability {found.major}.{found.minor}"
    return {"name": f"cuda:{index}", "kind": kind, "bytes": found.total_memory, "bf16": bf16}
