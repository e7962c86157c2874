"""Checkpoints of the miniature's training: one file a model, replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def save_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Writes model, optimizer and counters under a temporary name, then renames."""
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, part)
    os.replace(part, path)


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Takes up a checkpoint if there is one; returns the counters `step` and `seconds`."""
    if not path.exists():
        return {"step": 0, "seconds": 0.0}
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["state"]
