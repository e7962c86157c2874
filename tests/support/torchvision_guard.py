"""Torchvision beside a torch that it was not built for: its operators are missing, and transformers fails to import.

A package index may hold torchvision for CUDA alone. Beside torch for the CPU its import then fails, and so do those of
transformers, diffusers and peft, which look for it. Only the reward packages need torchvision: the core does without.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest

MISSING = "operator torchvision::nms does not exist"
BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[Any] = []
"""An operator is declared as long as its library lives."""


def mend_torchvision() -> None:
    """Makes `import torchvision` work where only its box operators are missing, which no reward uses.

    Has to run before transformers is imported. A torchvision that works is left alone, for declaring the operators
    twice would break it; where there is none, or torch is not the CPU's, nothing is imported.
    """
    if find_spec("torchvision") is None or not version("torch").endswith("+cpu"):
        return
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if MISSING not in str(error):
            raise
        _declare_operators()
        import_module("torchvision")


def _declare_operators() -> None:
    from torch.library import Library

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + BOXES)
    _declared.append(library)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """As a plugin (`-p tests.support.torchvision_guard`): before a conftest imports transformers."""
    mend_torchvision()
