"""Checkpoints of the miniature's training: one file a model, replaced atomically."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch


def save_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Writes model, optimizer and counters under a temporary name, then renames."""
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, part)
    os.replace(part, path)


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Takes up a checkpoint if there is one; returns its counters, or those of a beginning."""
    if not path.exists():
        return {"step": 0}
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    if "optimizer" in saved:  # not in what another machine handed over
        optimizer.load_state_dict(saved["optimizer"])
    return saved["state"]


class Saver:
    """Saves a model in training every `every` seconds: an interruption costs no more than that."""

    def __init__(self, path: Path, every: float):
        self.path, self.every, self.last = path, every, time.time()

    def offer(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Saves if it is time."""
        if time.time() - self.last > self.every:
            self.save(model, optimizer, state)

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Saves now."""
        save_state(self.path, model, optimizer, state)
        self.last = time.time()
